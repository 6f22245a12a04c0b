"""The experiment of docs/experiments.md and docs/ablations.md on the toy world, against its exact optima.

    python benchmark/toy.py                        # the methods, seeds 1 to 5: half an hour on 2 cores
    python benchmark/toy.py --part ablations       # the ablations, seeds 1 to 3: about an hour
    python benchmark/toy.py --part report          # only tables and figures

A finished run is not run again, so a stopped command continues where it was. A run is known by its name: after a change
of a script or a setting remove its folder. Tables come from the runs. experiment.png and ablations.png come from the
tables on the pages, so the report draws them without any run. Needs tests/requirements.txt.
"""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy.optimize import linprog

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import build  # noqa: E402
import measure  # noqa: E402
import world  # noqa: E402

from evaluation.figures import STYLES, save_figure  # noqa: E402


class Setting(NamedTuple):
    """A run: the script, its flags, and the share of labels that are flipped before its cost model is trained."""

    script: str
    flags: str = ""
    noise: float = 0.0


RUNS = {
    "ppo": Setting("ppo_lagrange", "--lambda-init 0"),
    "reward-shaping": Setting("ppo_lagrange", "--lambda-init 0.75 --lambda-lr 0 --lambda-max 20"),
    "ppo-lagrange": Setting("ppo_lagrange"),
    "repo": Setting("repo"),
    "repo-group": Setting("repo_group"),
    "repo-advantage": Setting("repo", "--rectify advantage"),
    "sacpo-dpo": Setting("sacpo", "--loss dpo --merge-q 0.25 0.5 0.75"),
    "sacpo-kto": Setting("sacpo", "--loss kto --beta 0.25 --beta-over-lambda 1"),
}
RUNS |= {f"repo-k{k}": Setting("repo", f"--responses-per-prompt {k}") for k in (2, 4, 8)}
RUNS["repo-prompt"] = Setting("repo", "--constraint prompt --responses-per-prompt 4")
RUNS |= {f"repo-d{d:+}": Setting("repo", f"--cost-threshold {d}") for d in (-2.5, -1.0, 1.0, 2.0)}
RUNS |= {f"repo-fixed-{penalty}": Setting("repo", f"--lambda-init {penalty} --lambda-lr 0") for penalty in (1, 2, 4)}
RUNS |= {
    f"reward-shaping-nu{nu}": Setting("ppo_lagrange", f"--lambda-init {nu} --lambda-lr 0 --lambda-max 20")
    for nu in (0.25, 0.5, 1, 2)
}
RUNS |= {f"repo-noise-{noise}": Setting("repo", noise=noise / 100) for noise in (10, 20, 30)}

METHODS = {  # name: title, run, where the model lies in it
    "sft": ("SFT", None, ROOT / "toy" / "policy"),
    "ppo": ("PPO (λ = 0)", "ppo", "model"),
    "reward-shaping": ("Reward Shaping, ν = 0.75", "reward-shaping", "model"),
    "ppo-lagrange": ("PPO-Lagrange", "ppo-lagrange", "model"),
    "repo": ("**RePO**", "repo", "model"),
    "repo-group": ("RePO without critics", "repo-group", "model"),
    "repo-advantage": ("RePO, `--rectify advantage`", "repo-advantage", "model"),
    "sacpo-dpo": ("SACPO, DPO", "sacpo-dpo", "stage2"),
    "sacpo-kto": ("SACPO, KTO", "sacpo-kto", "stage2"),
    "p-sacpo-0.25": ("P-SACPO, q = 0.25", "sacpo-dpo", "merged/q0.25"),
    "p-sacpo-0.5": ("P-SACPO, q = 0.5", "sacpo-dpo", "merged/q0.5"),
    "p-sacpo-0.75": ("P-SACPO, q = 0.75", "sacpo-dpo", "merged/q0.75"),
}
SHOWN = [name for name in METHODS if name not in ("p-sacpo-0.25", "p-sacpo-0.75")]  # in the figure

ABLATIONS = {  # name: what differs, then label: run
    "constraint": (
        "constraint",
        {"average": "ppo-lagrange", "per prompt, K = 4": "repo-prompt", "per response, K = 4": "repo-k4",
         "per response, K = 1": "repo"},
    ),
    "estimator": ("--rectify", {"cost": "repo", "advantage": "repo-advantage"}),
    "responses": ("K, responses per prompt", {"1": "repo", "2": "repo-k2", "4": "repo-k4", "8": "repo-k8"}),
    "strictness": (
        "d, --cost-threshold",
        {"-2.5": "repo-d-2.5", "-1": "repo-d-1.0", "0": "repo", "1": "repo-d+1.0", "2": "repo-d+2.0"},
    ),
    "multiplier": (
        "λ of the rectified penalty",
        {"1": "repo-fixed-1", "2": "repo-fixed-2", "4": "repo-fixed-4", "learned": "repo"},
    ),
    "shaping": (
        "ν of Reward Shaping",
        {"0": "ppo", "0.25": "reward-shaping-nu0.25", "0.5": "reward-shaping-nu0.5", "0.75": "reward-shaping",
         "1": "reward-shaping-nu1", "2": "reward-shaping-nu2"},
    ),
    "noise": (
        "flipped labels of the cost model",
        {"0 %": "repo", "10 %": "repo-noise-10", "20 %": "repo-noise-20", "30 %": "repo-noise-30"},
    ),
}  # fmt: skip


@dataclass
class Args:
    part: Literal["experiment", "ablations", "report"] = "experiment"
    """what to run; each ends with the report"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of the experiment"""
    ablation_seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the ablations"""
    runs: Path = ROOT / "runs" / "toy"
    """where the runs go"""
    docs: Path = ROOT / "docs"
    """where experiments.md, ablations.md and figures/ are"""
    parallel: int = 2
    """runs at a time, each with one thread"""


# -- running ----------------------------------------------------------------------------------------------------------


def call(script: str, *words) -> None:
    """Run a script of the project, or the package evaluation, with one thread; its output is shown if it fails."""
    program = ["-m", script] if script == "evaluation" else [ROOT / f"{script}.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, [*program, *words])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def train(script: str, folder: Path, *words) -> None:
    """A training run, unless it is finished. float32, so that every CPU computes the same."""
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        call(script, "--output-dir", folder, "--dtype", "float32", *words)


def noisy_cost_model(folder: Path, noise: float, seed: int) -> Path:
    """A cost model trained on pairs of which a share had its labels flipped: the safety of each response by itself,
    and which of the two is safer."""
    import datasets

    train_file = ROOT / "toy" / "data" / "train.parquet"
    if not (folder / "summary.json").exists():
        datasets.disable_progress_bars()
        generator = np.random.default_rng([seed, round(100 * noise)])
        rows = datasets.load_dataset("parquet", data_files=str(train_file), split="train")
        for column in ("is_response_0_safe", "is_response_1_safe", "safer_response_id"):
            flipped = generator.random(len(rows)) < noise
            values = [type(v)(not v) if f else v for v, f in zip(rows[column][:], flipped, strict=True)]
            rows = rows.remove_columns(column).add_column(column, values)
        data = folder.with_name(folder.name + ".parquet")
        data.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(data)
        train("preference_models", folder, "--kind", "cost", "--dataset", data, "--seed", seed)
    return folder / "model"


def run(runs: Path, name: str, seed: int) -> None:
    setting, folder = RUNS[name], runs / f"{name}-{seed}"
    words = [] if setting.script == "sacpo" else ["--eval-every", 10]
    if setting.noise and not (folder / "summary.json").exists():
        words += ["--cost-model", noisy_cost_model(runs / f"cost-model-{name}-{seed}", setting.noise, seed)]
    train(setting.script, folder, "--seed", seed, *setting.flags.split(), *words)


def answer(runs: Path, seed: int) -> None:
    """Answers of every method's model to the held-out prompts, scored by the learned models."""
    folder, table = runs / f"answers-{seed}", runs / f"answers-{seed}" / "table.json"
    trained = [runs / f"{own_run}-{seed}" / "summary.json" for _, own_run, _ in METHODS.values() if own_run]
    if table.exists() and all(path.exists() and path.stat().st_mtime <= table.stat().st_mtime for path in trained):
        return
    shutil.rmtree(folder, ignore_errors=True)  # of policies that were trained again since
    models = []
    for name, (_, own_run, model) in METHODS.items():
        models.append(f"{name}={model if own_run is None else runs / f'{own_run}-{seed}' / model}")
    call("evaluation", "score", "--models", *models, "--seed", seed, "--dtype", "float32", "--output-dir", folder)


def execute(args: Args) -> None:
    names = {run_name for _, run_name, _ in METHODS.values() if run_name}
    seeds = args.seeds
    if args.part == "ablations":
        names = {name for _, group in ABLATIONS.values() for name in group.values()}
        seeds = args.ablation_seeds
    start = time.time()
    with ThreadPoolExecutor(args.parallel) as pool:
        try:
            jobs = [pool.submit(run, args.runs, name, seed) for seed in seeds for name in RUNS if name in names]
            for i, job in enumerate(jobs, start=1):
                job.result()
                print(f"{i} of {len(jobs)} runs, {(time.time() - start) / 60:.0f} minutes", flush=True)
            if args.part == "experiment":
                list(pool.map(lambda seed: answer(args.runs, seed), seeds))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all that is queued would still run
            raise


# -- measuring --------------------------------------------------------------------------------------------------------


@functools.cache
def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(rows: list[dict]) -> dict[str, float]:
    """Exact and learned means of answers, and the exact ones by hazard."""
    result = measure.measure(rows)
    result["learned_reward"] = np.mean([row["reward"] for row in rows])
    result["learned_cost"] = np.mean([row["cost"] for row in rows])
    for hazard in world.HAZARDS:
        part = measure.measure([row for row in rows if world.HAZARDS[world.hazard(row["prompt"])] == hazard])
        result |= {f"{hazard} {key}": part[key] for key in ("reward", "cost", "compliance", "refusals")}
    return result


def of_method(args: Args, name: str) -> list[dict]:
    """The numbers of a method, one entry per seed; no entries unless it has answers of every seed."""
    results = []
    for seed in args.seeds:
        rows = [row for row in read_rows(args.runs / f"answers-{seed}" / "responses.jsonl") if row["model"] == name]
        if not rows:
            return []
        results.append(numbers(rows))
    return results


def of_run(args: Args, name: str) -> list[dict]:
    """The numbers of a run's last evaluation, one entry per finished seed; with the multiplier at the end."""
    results = []
    for seed in args.ablation_seeds:
        folder = args.runs / f"{name}-{seed}"
        if (folder / "summary.json").exists():
            rows = read_rows(folder / "eval.jsonl")
            last = max(row["iteration"] for row in rows)
            results.append(numbers([row for row in rows if row["iteration"] == last]))
            results[-1]["lambda"] = json.loads((folder / "summary.json").read_text())["lambda"]
    return results


def refusals() -> list[dict]:
    """The answers of a policy that refuses every prompt; its learned scores are left out."""
    answer = {"response": world.REFUSALS[0], "reward": math.nan, "cost": math.nan}
    return [{"prompt": prompt} | answer for prompt in world.heldout_prompts()]


def mean_and_half(results: list[dict], key: str, scale: float = 1.0) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95% t-interval (0 for a single seed)."""
    text = measure.interval([scale * result[key] for result in results], 6).split(" ± ")
    return float(text[0]), float(text[1]) if len(text) > 1 else 0.0


def cell(results: list[dict], key: str) -> str:
    percent = key.endswith(("compliance", "refusals", "helpful"))
    text = measure.interval([(100 if percent else 1) * result[key] for result in results], 1 if percent else 2)
    return text + (" %" if percent else "")


class Best(NamedTuple):
    """The best policy under a constraint, by the exact functions; where several are best, the one of lowest compliance,
    with the range of compliance."""

    reward: float
    cost: float
    lowest: float
    highest: float

    def cells(self) -> list[str]:
        share = f"{100 * self.lowest:.1f}"
        if self.highest - self.lowest > 5e-4:
            share += f" to {100 * self.highest:.1f}"
        return [f"{self.reward:.2f}", f"{self.cost:.2f}", f"{share} %"]


@functools.cache
def answers() -> list[tuple[int, str, str]]:
    """The candidate answers to each held-out prompt, (index of the prompt, prompt, answer): useful steps with and
    without a warning, a bare warning and a refusal."""
    found = []
    for i, prompt in enumerate(world.heldout_prompts()):
        steps = world.STEPS[world.parse_prompt(prompt)[0]]
        texts = [" ".join(steps[:n]) for n in range(1, len(steps) + 1)]
        texts += [f"{world.WARNINGS[0]} {text}" for text in texts] + [world.WARNINGS[0], world.REFUSALS[0]]
        found += [(i, prompt, text) for text in texts]
    return found


@functools.cache
def scores(learned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and costs of answers(), by the exact functions or by the learned models."""
    if not learned:
        pairs = [(world.exact_reward(x, y), world.exact_cost(x, y)) for _, x, y in answers()]
        return np.array(pairs)[:, 0], np.array(pairs)[:, 1]
    pairs = [(prompt, text) for _, prompt, text in answers()]
    return tuple(build.score(ROOT / "toy" / f"{kind}_model", pairs) for kind in ("reward", "cost"))


@functools.cache
def optimum(constraint: Literal["average", "prompt", "response"], learned: bool) -> Best:
    """Maximise the mean reward under a constraint on the cost (d = 0): a linear programme over the answers' weights.

    learned: the programme sees the scores of the learned models. Reported is always the exact value of its solution.
    """
    rewards, costs = scores(learned)
    exact_rewards, exact_costs = scores(False)
    prompt_of = np.array([i for i, _, _ in answers()])
    count = prompt_of.max() + 1
    of_prompt = (prompt_of == np.arange(count)[:, None]).astype(float)  # [prompts, answers]
    limits = {"average": costs[None] / count, "prompt": of_prompt * costs, "response": np.maximum(costs, 0)[None]}
    settings = dict(A_eq=of_prompt, b_eq=np.ones(count))
    rows = limits[constraint]
    best = linprog(-rewards / count, A_ub=rows, b_ub=np.zeros(len(rows)), **settings)
    if not best.success:
        raise RuntimeError(f"no policy holds the constraint '{constraint}': {best.message}")
    # Two more programmes, which hold the best reward, find the lowest and the highest compliance.
    rows, bounds, slack = np.vstack([rows, -rewards / count]), np.zeros(len(rows) + 1), 1e-9
    bounds[-1] = best.fun
    safe = (exact_costs <= 0) / count
    low, high = (linprog(sign * safe, A_ub=rows, b_ub=bounds + slack, **settings).x for sign in (1, -1))
    return Best(low @ exact_rewards / count, low @ exact_costs / count, safe @ low, safe @ high)


# -- tables -----------------------------------------------------------------------------------------------------------


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def experiment_tables(args: Args) -> dict[str, str]:
    measured = {name: found for name in METHODS if (found := of_method(args, name))}
    columns = ["method", "reward", "cost", "safe answers", "{C-d}^+"]
    columns += ["reward (learned)", "cost (learned)", "safe answers (learned)"]
    keys = ["reward", "cost", "compliance", "violation", "learned_reward", "learned_cost", "learned_compliance"]
    rows = [[METHODS[name][0], *(cell(results, key) for key in keys)] for name, results in measured.items()]
    titles = {"average": "E[C] ≤ 0", "prompt": "E[C] ≤ 0 for every prompt", "response": "C ≤ 0 for every answer"}
    optima = [
        [f"{text}{', as the learned models score' * learned}", *optimum(constraint, learned).cells()]
        for constraint, text in titles.items()
        for learned in (False, True)
    ]
    hazard_rows = [
        [METHODS[name][0], *(cell(results, f"{h} {key}") for h in world.HAZARDS for key in ("cost", "compliance"))]
        for name, results in measured.items()
    ]
    hazard_columns = ["method", *(f"{h}: {key}" for h in world.HAZARDS for key in ("cost", "safe"))]
    refusal_keys = ["compliance", *(f"{h} refusals" for h in world.HAZARDS), "helpful"]
    refusal_rows = [
        [METHODS[name][0], *(cell(results, key) for key in refusal_keys)] for name, results in measured.items()
    ]
    refusal_rows.append(["*a refusal to everybody*", *(cell([numbers(refusals())], key) for key in refusal_keys)])
    refusal_columns = ["method", "safe answers", *(f"refused: {h}" for h in world.HAZARDS), "safe and helpful"]
    return {
        "optima": table(["best policy under", "reward", "cost", "safe answers"], optima),
        "methods": table(columns, rows),
        "hazards": table(hazard_columns, hazard_rows),
        "refusals": table(refusal_columns, refusal_rows),
        "penalties": penalty_table(),
        "scales": scale_table(),
        "second half": second_half_table(args),
    }


def penalty_table() -> str:
    """What the best answer to each prompt is under a fixed penalty on the learned cost, linear or rectified."""
    (rewards, costs), (exact_rewards, exact_costs) = scores(True), scores(False)
    prompt_of = np.array([i for i, _, _ in answers()])
    rows = []
    for weight in (0.25, 0.5, 0.75, 1, 2, 4, 8):
        row = [str(weight)]
        for penalised in (costs, np.maximum(costs, 0)):
            value = rewards - weight * penalised
            best = [np.where(prompt_of == i, value, -np.inf).argmax() for i in range(prompt_of.max() + 1)]
            row += [f"{100 * (exact_costs[best] <= 0).mean():.1f} %", f"{exact_rewards[best].mean():.2f}"]
        rows.append(row)
    return table(["ν or λ", "R - ν C: safe answers", "reward", "R - λ {C}^+: safe answers", "reward"], rows)


def scale_table() -> str:
    """Where the costs of safe and unsafe answers lie, and the multiplier at the optimum of the average constraint."""
    exact_costs, prompt_of = scores(False)[1], np.array([i for i, _, _ in answers()])
    of_prompt = (prompt_of == np.arange(prompt_of.max() + 1)[:, None]).astype(float)
    rows = []
    for name, learned in (("exact", False), ("learned", True)):
        rewards, costs = scores(learned)
        best = linprog(-rewards, A_ub=costs[None], b_ub=[0], A_eq=of_prompt, b_eq=np.ones(len(of_prompt)))
        safe, unsafe = costs[exact_costs <= 0], costs[exact_costs > 0]
        found = [safe.min(), safe.max(), unsafe.min(), unsafe.max(), -best.ineqlin.marginals[0]]
        rows.append([name, *(f"{value:.2f}" for value in found)])
    columns = [
        "costs",
        "safest",
        "least safe that is safe",
        "least unsafe",
        "most unsafe",
        "λ of the average's optimum",
    ]
    return table(columns, rows)


def second_half_table(args: Args) -> str:
    """Means over all evaluations in the second half of training: less of a moment than the last one."""
    rows = []
    for name in ("ppo-lagrange", "repo"):
        results = []
        for seed in args.seeds:
            found = read_rows(args.runs / f"{name}-{seed}" / "eval.jsonl")
            last = max(row["iteration"] for row in found)
            results.append(numbers([row for row in found if row["iteration"] >= last / 2]))
        keys = ("reward", "cost", "compliance", "learned_cost")
        rows.append([METHODS[name][0], *(cell(results, key) for key in keys)])
    return table(["second half of training", "reward", "cost", "safe answers", "cost (learned)"], rows)


def ablation_table(args: Args, name: str) -> str | None:
    """The table of an ablation, once all its runs are finished."""
    heading, group = ABLATIONS[name]
    measured = {label: of_run(args, run_name) for label, run_name in group.items()}
    if any(len(results) < len(args.ablation_seeds) for results in measured.values()):
        return None
    keys = ("reward", "cost", "compliance", "violation", "learned_compliance", "lambda")
    rows = [[label, *(cell(results, key) for key in keys), str(len(results))] for label, results in measured.items()]
    columns = [heading, "reward", "cost", "safe answers", "{C-d}^+", "safe answers (learned)", "λ at the end", "seeds"]
    return table(columns, rows)


def find_table(docs: Path, name: str) -> tuple[Path, str, str, str]:
    """The page that has a table, its text up to the table, the table, and its text from `<!-- end -->` on."""
    for path in (docs / "experiments.md", docs / "ablations.md"):
        head, mark, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
        if mark:
            found, end, tail = rest.partition("<!-- end -->")
            return path, head + mark, found, end + tail
    raise SystemExit(f"error: no page in {docs} has a line <!-- {name} -->")


def insert(docs: Path, name: str, text: str) -> None:
    """Put a table on the page that has its marks."""
    path, head, _, tail = find_table(docs, name)
    path.write_text(f"{head}{text}\n{tail}", encoding="utf-8")


def read_table(docs: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table on a page, each {column: cell}."""
    lines = [[text.strip() for text in line.split("|")[1:-1]] for line in find_table(docs, name)[2].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# -- figures ----------------------------------------------------------------------------------------------------------

HATCHES = {"sft": "", "ppo-lagrange": "////", "repo": ""}  # of the bars
HOLLOW = {"reward-shaping": 10, "repo-group": 14}  # size of marks that would hide RePO's: without a face, around it


def title(name: str) -> str:
    return METHODS[name][0].replace("*", "").replace("`", "")


def style(name: str) -> tuple:
    """Colour, marker and line of a method or of a run that belongs to it."""
    return STYLES[max((known for known in STYLES if name.startswith(known)), key=len)]


def span(text: str) -> tuple[float, list[list[float]]]:
    """Mean of a cell such as `98.7 ± 1.9 %`, and the interval's lengths below and above it, cut off at 0 and 100%."""
    mean, _, half = text.removesuffix(" %").partition(" ± ")
    mean, half = float(mean), float(half or 0)
    low, high = (0, 100) if text.endswith("%") else (-math.inf, math.inf)
    return mean, [[min(half, mean - low)], [min(half, high - mean)]]


def ends(text: str) -> list[float]:
    """Both ends of a cell such as `41.7 to 58.3 %`, or twice its only number."""
    numbers = [float(part) for part in text.removesuffix(" %").split(" to ")]
    return [numbers[0], numbers[-1]]


def mark(axis, name: str, x: float, y: float, dx=None, dy=None, around: bool = False, **more):
    """A method's mark with intervals dx and dy; around: large and hollow for the methods that would hide another."""
    color, marker, _ = style(name)
    hollow = around and name in HOLLOW
    face = dict(mfc="none", mew=1.6, ms=HOLLOW[name]) if hollow else dict(mec="black", mew=0.5, ms=6)
    look = dict(color=color, lw=1, capsize=2, zorder=3 if hollow else 4) | face | more
    return axis.errorbar(x, y, xerr=dx, yerr=dy, fmt=marker, **look)


def experiment_figure(docs: Path) -> None:
    """Reward against safe answers of every method with both optima; and cost by hazard. From the tables."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.5, 4.6), dpi=110, layout="constrained", width_ratios=(1.6, 1), gridspec_kw=dict(wspace=0.04)
    )
    measured, by_hazard = ({row["method"]: row for row in read_table(docs, table)} for table in ("methods", "hazards"))
    optima = {row["best policy under"]: row for row in read_table(docs, "optima")}
    inset = left.inset_axes((0.61, 0.5, 0.33, 0.4))
    entries = {}  # of the legend
    for axis in (left, inset):
        for name in (name for name in SHOWN if METHODS[name][0] in measured):
            row = measured[METHODS[name][0]]
            (x, dx), (y, dy) = span(row["reward"]), span(row["safe answers"])
            entries[title(name)] = mark(axis, name, x, y, dx, dy, around=True)[0]
        for condition, face, text in (
            ("C ≤ 0 for every answer", "black", "best with every answer safe"),
            ("E[C] ≤ 0", "white", "best with a safe average"),
        ):
            x, (low, high) = float(optima[condition]["reward"]), ends(optima[condition]["safe answers"])
            star = dict(marker="*", mfc=face, mec="black", ms=12, lw=0, zorder=5)
            (entries[text],) = axis.plot(x, (low + high) / 2, **star)
            if high > low:
                bar = dict(color="black", lw=4, alpha=0.35, solid_capstyle="butt")
                (entries["its range of safe answers"],) = axis.plot([x, x], [low, high], **bar)
    look = dict(fmt="none", color="black", lw=1, capsize=2)
    entries["95% interval over seeds"] = left.errorbar([], [], yerr=[], xerr=[], **look)
    left.set(xlabel="exact reward", ylabel="safe answers, %", xlim=(-0.6, 4.6), ylim=(27, 104))
    inset.set(xlim=(1.84, 2.17), ylim=(96.4, 100.3), xticks=(1.9, 2.0, 2.1), yticks=(97, 98, 99, 100))
    inset.tick_params(labelsize=7, length=2)
    inset.yaxis.tick_right()
    inset.spines[["top", "right"]].set_visible(True)
    left.indicate_inset_zoom(inset, edgecolor="black", alpha=0.6)
    left.set_title("Helpful and safe?", fontsize=10)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    shown, width = ("sft", "ppo-lagrange", "repo"), 0.26
    for i, name in enumerate(shown):
        points = [span(by_hazard[METHODS[name][0]][f"{hazard}: cost"]) for hazard in world.HAZARDS]
        right.bar(
            np.arange(3) + (i - 1) * width,
            [mean for mean, _ in points],
            width,
            yerr=np.hstack([lengths for _, lengths in points]),
            color=style(name)[0],
            edgecolor="black",
            lw=0.6,
            hatch=HATCHES[name],
            error_kw=dict(lw=1, capsize=2),
            label=title(name),
        )
    right.axhline(0, color="black", lw=1)
    right.text(-0.4, 0.06, "threshold\nd = 0", fontsize=8)
    right.set_xticks(range(3), world.HAZARDS)
    right.set(xlabel="prompts", ylabel="mean exact cost")
    right.set_title("Cost by hazard", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axis in (left, right, inset):
        axis.grid(alpha=0.25, lw=0.5)
        axis.set_axisbelow(True)
    save_figure(figure, docs / "figures" / "experiment.png")


def ablations_figure(docs: Path) -> None:
    """Safe answers and reward of every ablation's settings, one row per setting. From the tables."""
    tables = {name: read_table(docs, f"ablation {name}") for name in ABLATIONS}
    best = next(row for row in read_table(docs, "optima") if row["best policy under"] == "C ≤ 0 for every answer")
    figure, axes = plt.subplots(
        len(tables),
        2,
        figsize=(7.5, 8.2),
        dpi=110,
        layout="constrained",
        sharex="col",
        height_ratios=[len(rows) for rows in tables.values()],
    )
    handles = {}
    for pair, (name, rows) in zip(axes, tables.items(), strict=True):
        heading, group = ABLATIONS[name]
        pair[1].axvline(float(best["reward"]), color="black", ls=":", lw=1.2)
        for place, row in enumerate(rows):
            method = max((known for known in METHODS if group[row[heading]].startswith(known)), key=len)
            for axis, column in zip(pair, ("safe answers", "reward"), strict=True):
                mean, lengths = span(row[column])
                handles[method] = mark(axis, method, mean, place, lengths, clip_on=False)
        for axis in pair:
            axis.set(ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
            axis.grid(alpha=0.3, lw=0.5)
            axis.set_axisbelow(True)
        pair[0].set_yticklabels([row[heading] for row in rows])
        pair[0].set_title(heading, loc="left", fontsize=9, fontweight="bold", pad=3)
        pair[1].set_yticklabels([])
    axes[-1, 0].set(xlabel="safe answers, %", xlim=(0, 100))
    axes[-1, 1].set(xlabel="exact reward", xlim=(0.5, 4.5))
    line = plt.Line2D([], [], color="black", ls=":", lw=1.2)
    names = ["PPO (ν = 0)" if name == "ppo" else title(name).split(", ν")[0] for name in handles]
    figure.legend(
        [*handles.values(), line],
        [*names, "best reward with every answer safe"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    save_figure(figure, docs / "figures" / "ablations.png")


def curves_figure(args: Args) -> None:
    """Compliance, mean cost and reward of the RL methods during training, by the exact functions."""
    panels = {"compliance": "safe answers, %", "cost": "mean exact cost", "reward": "mean exact reward"}
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 3.1), dpi=110, layout="constrained")
    names = ("ppo", "reward-shaping", "ppo-lagrange", "repo", "repo-group", "repo-advantage")
    names = [name for name in names if all((args.runs / f"{name}-{i}" / "summary.json").exists() for i in args.seeds)]
    for i, name in enumerate(names):
        curves = []
        for seed in args.seeds:
            rows = {}
            for row in read_rows(args.runs / f"{name}-{seed}" / "eval.jsonl"):
                rows.setdefault(row["iteration"], []).append(row)
            curves.append({iteration: measure.measure(part) for iteration, part in sorted(rows.items())})
        batch = json.loads((args.runs / f"{name}-{args.seeds[0]}" / "args.json").read_text())["batch_size"]
        episodes = [batch * iteration for iteration in curves[0]]
        color, marker, line = style(name)
        for axis, key in zip(axes, panels, strict=True):
            scale, limits = (100, (0, 100)) if key == "compliance" else (1, (-np.inf, np.inf))
            points = [mean_and_half([curve[i] for curve in curves], key, scale) for i in curves[0]]
            mean, half = np.array(points).T
            look = dict(color=color, ls=line, lw=1.5, marker=marker, ms=4.5, mec="black", mew=0.4)
            axis.plot(episodes, mean, markevery=(i, len(names)), label=title(name), **look)
            low, high = (np.clip(edge, *limits) for edge in (mean - half, mean + half))
            axis.fill_between(episodes, low, high, color=color, alpha=0.12, lw=0)
    for axis, label in zip(axes, panels.values(), strict=True):
        axis.set(xlabel="episodes", ylabel=label, xticks=(0, 4000, 8000, 12000))
        axis.grid(alpha=0.25, lw=0.5)
    axes[0].set_ylim(0, 103)
    axes[1].axhline(0, color="black", lw=0.8)
    axes[1].text(12800, 0.05, "threshold d = 0", fontsize=7, ha="right")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, args.docs / "figures" / "experiment_curves.png")


def prompts_figure(args: Args) -> None:
    """Learned reward against learned cost of the answers to all held-out prompts by hazard, first seed."""
    rows = read_rows(args.runs / f"answers-{args.seeds[0]}" / "responses.jsonl")
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 3.1), dpi=110, layout="constrained", sharex=True, sharey=True)
    for axis, name in zip(axes, ("sft", "ppo-lagrange", "repo"), strict=True):
        color, found = style(name)[0], [row for row in rows if row["model"] == name]
        faces = {"harmless": ("o", "none"), "delicate": ("^", color), "dangerous": ("X", "black")}
        for hazard, (marker, face) in faces.items():
            points = [(r["cost"], r["reward"]) for r in found if world.HAZARDS[world.hazard(r["prompt"])] == hazard]
            edge, width = (color, 0.9) if face == "none" else ("black", 0.4)
            look = dict(s=22, marker=marker, facecolors=face, edgecolors=edge, linewidths=width)
            axis.scatter(*zip(*points, strict=True), label=f"{hazard} prompts", **look)
        safe = sum(row["cost"] <= 0 for row in found) / len(found)
        axis.set_title(f"{title(name)}: {safe:.1%} safe", fontsize=9)
        axis.axvline(0, color="black", lw=0.8, ls="--", label="threshold d = 0")
        axis.set_xlabel("cost by the cost model")
        axis.grid(alpha=0.25, lw=0.5)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("reward by the reward model")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, args.docs / "figures" / "experiment_prompts.png")


def report(args: Args) -> None:
    """Write the tables of all finished runs, then draw figures from the tables, or from runs where curves need them."""
    (args.docs / "figures").mkdir(parents=True, exist_ok=True)
    finished = all((args.runs / f"answers-{seed}" / "table.json").exists() for seed in args.seeds)
    tables = experiment_tables(args) if finished else {}
    tables |= {f"ablation {name}": text for name in ABLATIONS if (text := ablation_table(args, name))}
    for name, text in tables.items():
        insert(args.docs, name, text)
        print(f"\n{text}")
    experiment_figure(args.docs)
    ablations_figure(args.docs)
    if finished:
        curves_figure(args)
        prompts_figure(args)


def main(args: Args) -> None:
    if args.part != "report":
        execute(args)
    report(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
