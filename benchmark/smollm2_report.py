"""The report of benchmark/smollm2.sh: does slack on benign prompts offset unsafe answers to red-team prompts?

    python benchmark/smollm2_report.py runs/smollm2-1                  # one seed: bootstrap intervals over prompts
    python benchmark/smollm2_report.py runs/smollm2-1 runs/smollm2-2   # several: mean over seeds ± 95%, Student's t

It first measures every answer in OUT/evaluate/prompts: its cost by the judge, which training never used, and the KL
divergence, entropy and repetition of its tokens. That takes minutes. The rows go to measures.jsonl there, and a later
start measures only what is missing. Then it prints report.md and draws two figures. What a folder lacks is left out.
"""

import gc
import itertools
import json
import math
import os
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation import files, suites, tables  # noqa: E402
from evaluation.figures import method_styles, plt, save_figure  # noqa: E402

METHODS = {  # name in evaluate/: title, folder of the RL run
    "sft": ("SFT, the start", None),
    "ppo": ("PPO (λ = 0)", "ppo"),
    "reward-shaping": ("Reward Shaping", "reward_shaping"),
    "ppo-lagrange": ("PPO-Lagrange", "ppo_lagrange"),
    "repo": ("RePO", "repo"),
    "rectified-penalty": ("RePO, fixed λ", "rectified_penalty"),
    "repo-group": ("RePO without critics", "repo_group"),
    "repo-noisy": ("RePO, 10 % of cost labels flipped", "repo_noisy"),
    "repo-low-kl": ("RePO, β = 0.01", "repo_low_kl"),
    "sacpo-dpo": ("SACPO, DPO", None),
}
COMPARED = ["repo", "ppo-lagrange"]
STYLES = method_styles(list(METHODS))
KINDS = ["red-team", "benign", "all"]


class Number(NamedTuple):
    """How a number is shown; a factor of 100 makes it a percentage."""

    heading: str
    factor: int = 1
    digits: int = 2
    interval: bool = False  # a single seed gets a bootstrap interval over prompts


SHARE = Number("", 100, 1)
NUMBERS = {  # of answers
    "reward": Number("reward", interval=True), "cost": Number("cost", interval=True),
    "safe": Number("safe, cost model", 100, 1, True), "judge_safe": Number("safe, judge", 100, 1, True),
    "unsafe": Number("unsafe at most, cost model", 100, 1), "judge_unsafe": Number("unsafe at most, judge", 100, 1),
    "kl": Number("KL per response", interval=True), "entropy": Number("entropy per token"),
    "refusal": Number("refusals", 100, 1), "length": Number("length", 1, 1), "finished": Number("ended", 100, 1),
    "repetition": Number("repetition", 100, 1), "judge_cost": Number("cost, judge", interval=True),
    "excess": Number("E{C-d}^+", interval=True), "judge_excess": Number("E{C-d}^+, judge", interval=True),
}  # fmt: skip
TRAINING = {  # metrics of an RL run; the figure shows the first six
    "reward": Number("reward"), "cost": Number("cost"), "safety_compliance": Number("safe, %", 100, 0),
    "kl": Number("KL per response"), "entropy": Number("entropy per token"), "response_length": Number("length", 1, 0),
    "lambda": Number("λ"), "finished": Number("ended, %", 100, 0), "repetition": Number("repetition, %", 100, 0),
}  # fmt: skip
COLLAPSED = {"kl": 10.0, "repetition": 0.3}  # a run that ends above one of these is marked


@dataclass
class Args:
    """Report the runs of benchmark/smollm2.sh as Markdown tables and figures."""

    outs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs/smollm2-1"),)  # folders of the recipe, one per seed
    output_dir: Path | None = None  # where report.md and the figures go; default: report/ in the first folder
    prompts: tuple[str, ...] = ()  # prompts to show with all answers: indices in evaluate/prompts, or suites:INDEX
    bootstrap_resamples: int = 5000  # resamples of the prompts behind each 95% interval
    batch_size: int = 32  # answers measured at a time


# -- measuring --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def answers_of(out: Path, part: str = "prompts") -> list[dict]:
    """Rows of responses.jsonl of the models that have answered every prompt."""
    rows, folder = [], out / "evaluate" / part
    if (folder / "args.json").exists():
        rows = files.read_rows(folder / "responses.jsonl", files.ANSWER)
        counts, total = Counter(row["model"] for row in rows), read_json(folder / "args.json")["prompts"]
        rows = [row for row in rows if row["model"] in METHODS and counts[row["model"]] == total]
    return sorted(rows, key=lambda row: row["index"])


def measures_of(out: Path) -> dict[tuple[str, int], dict]:
    rows = files.read_rows(out / "evaluate" / "prompts" / "measures.jsonl", {"model", "index", "judge_cost", "kl"})
    return {(row["model"], row["index"]): row for row in rows}


def measure(args: Args) -> None:
    """Append a row for every answer that has none to measures.jsonl; all paths are checked before the work."""
    missing = {}
    for out in args.outs:
        known = measures_of(out)
        rows = [row for row in answers_of(out) if (row["model"], row["index"]) not in known]
        if rows:
            paths = read_json(out / "evaluate" / "prompts" / "args.json")["models"]
            named = {row["model"] for row in rows} - {next(iter(paths))}  # the first may be a Hub id
            needed = {f"the model {name}": Path(paths[name]) for name in paths if name in named}
            for what, path in (needed | {"the judge": out / "judge" / "model"}).items():
                if not path.exists():
                    files.fail(f"{out}: answers must still be measured, but {what} is not in {path.absolute()}")
            missing[out] = rows
    if not missing:
        return
    import torch.distributed as dist  # a report of measured answers starts faster without

    import repo

    processes = repo.start_processes()
    for out, rows in missing.items():
        measure_answers(args, out, rows, *processes)
    dist.barrier()  # without it gloo's threads can abort a process at its exit
    dist.destroy_process_group()
    sys.excepthook = sys.__excepthook__


def measure_answers(args: Args, out: Path, rows: list[dict], device, mesh) -> None:
    """Cost by the judge; log π - log π_SFT summed over the tokens, whose mean estimates the KL divergence; the mean of
    -log π, whose mean estimates the entropy; both under the temperature of sampling. Repetition: the share of 4-grams
    of tokens that repeat an earlier one. The text is tokenized again."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    import repo

    folder = out / "evaluate" / "prompts"
    settings = SimpleNamespace(**read_json(folder / "args.json"))
    base = next(iter(settings.models))
    tokenizer = repo.load_tokenizer(settings.models[base], f"the model {base}", settings.prompt_template)
    prompts = [row["prompt"] for row in rows]
    encoded = repo.encode(tokenizer, prompts), repo.encode(tokenizer, prompts, [row["response"] for row in rows])
    tokens = {}
    for row, head, ids in zip(rows, *encoded, strict=True):
        start = len(os.path.commonprefix([head, ids]))  # a token may join prompt and response
        end = len(ids) if row["finished"] else max(len(ids) - 1, start + 1)  # a cut response has no end token
        tokens[row["model"], row["index"]] = ids[:start], ids[start:end]
    longest = max(len(head) + len(tail) for head, tail in tokens.values())
    dtype = getattr(torch, settings.dtype)
    options = dict(mesh=mesh, dtype=dtype, loading={"dtype": dtype}, longest=longest, tokenizer=tokenizer)
    judge = repo.load_scorer(settings, str(out / "judge" / "model"), "the judge", rows, options)
    judge.shares_tokens = False  # it reads texts: the sampled tokens are not kept
    ref_policy = repo.load_model(AutoModelForCausalLM, settings.models[base], f"the model {base}", **options)

    path = folder / "measures.jsonl"
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill may have cut the last line
    for name in dict.fromkeys(row["model"] for row in rows):
        policy = ref_policy
        if name != base:
            policy = repo.load_model(AutoModelForCausalLM, settings.models[name], f"the model {name}", **options)
        own = sorted((row for row in rows if row["model"] == name), key=lambda row: row["length"])  # little padding
        for first in tqdm(range(0, len(own), args.batch_size), name):
            batch = own[first : first + args.batch_size]
            heads, tails = zip(*(tokens[name, row["index"]] for row in batch), strict=True)
            parts = repo.pad(tokenizer, [*heads], "left", device), repo.pad(tokenizer, [*tails], "right", device)
            ids, mask = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))  # [batch, prompt + response]
            response_mask = parts[1][1]
            temperature = 1.0 if settings.greedy else settings.temperature
            how = dict(length=response_mask.shape[1], temperature=temperature)
            with torch.no_grad():
                logprobs = repo.response_logprobs(policy, ids, mask, **how).double()
                ref_logprobs = logprobs
                if name != base:
                    ref_logprobs = repo.response_logprobs(ref_policy, ids, mask, **how).double()
            texts, finished = [row["response"] for row in batch], torch.tensor([row["finished"] for row in batch])
            responses = repo.Responses(ids, mask, response_mask, finished, texts, ids)
            costs = repo.score_responses(judge, [row["prompt"] for row in batch], responses, len(batch)).tolist()
            kl, entropy = (logprobs - ref_logprobs).sum(1).tolist(), (-logprobs.sum(1) / response_mask.sum(1)).tolist()
            repetition, measured = repo.repeated_ngrams(parts[1][0], response_mask).tolist(), []
            for row, tail, *values in zip(batch, tails, costs, kl, entropy, repetition, strict=True):
                figures = dict(zip(("judge_cost", "kl", "entropy", "repetition"), values, strict=True))
                measured.append({"model": row["model"], "index": row["index"], "tokens": len(tail)} | figures)
            files.append_json(path, measured)
        del policy
        gc.collect()  # a sharded model holds itself in cycles


# -- numbers ----------------------------------------------------------------------------------------------------------


def read_seed(out: Path) -> pd.DataFrame:
    """A row per answer of a folder: responses.jsonl with measures.jsonl and the kind of the prompt."""
    rows, measured = answers_of(out), measures_of(out)
    if not rows:
        return pd.DataFrame()
    path, limit = out / "data" / "prompts_test.jsonl", read_json(out / "evaluate/prompts/args.json")["cost_threshold"]
    kinds = {files.as_text(row["prompt"]): row["kind"] for row in files.read_rows(path, {"prompt", "kind"})}
    if unknown := {files.as_text(row["prompt"]) for row in rows} - set(kinds):
        files.fail(f"{path} lacks {len(unknown)} prompts of evaluate/prompts, so their kind is not known")
    frame = pd.DataFrame([row | measured[row["model"], row["index"]] for row in rows])
    frame["seed"], frame["limit"] = str(out), limit
    frame["kind"] = [kinds[files.as_text(prompt)] for prompt in frame["prompt"]]
    frame["refusal"] = frame["response"].map(suites.refused)
    for name in ("", "judge_"):
        frame[f"{name}excess"] = (frame[f"{name}cost"] - limit).clip(lower=0)
        frame[f"{name}safe"] = frame[f"{name}cost"] <= limit
        frame[f"{name}unsafe"] = ~frame[f"{name}safe"]
    return frame.astype(dict.fromkeys(NUMBERS, float))


def of_kind(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    return frame if kind == "all" else frame[frame["kind"] == kind]


def read_training(outs: tuple[Path, ...]) -> pd.DataFrame:
    """metrics.jsonl of all RL runs, with method and seed; NaN where a metric was not finite or is not known."""
    frames = [pd.DataFrame()]
    for out, (name, (_, run)) in itertools.product(outs, METHODS.items()):
        rows = files.read_rows(out / run / "metrics.jsonl", {"iteration", "episodes"}) if run else []
        frames.append(pd.DataFrame(rows).assign(model=name, seed=str(out)) if rows else frames[0])
    columns = ["model", "seed", "iteration", "episodes", *TRAINING]  # a metric that is not logged is NaN
    return pd.concat(frames, ignore_index=True).reindex(columns=columns).astype(dict.fromkeys(TRAINING, float))


def show(means: list[float], number: Number, interval: dict | None = None) -> str:
    """The number of one seed, with its interval over prompts if there is one; the mean of several seeds with half its
    95% interval by Student's t."""
    values = [np.mean(means)]
    if len(means) > 1:
        values.append(stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / math.sqrt(len(means)))
    elif interval:
        values += [interval["low"], interval["high"]]
    mean, *others = (f"{number.factor * value:.{number.digits}f}" for value in values)
    return mean + {0: "", 1: " ± {}", 2: " [{}, {}]"}[len(others)].format(*others) + " %" * (number.factor > 1)


def cell(frame: pd.DataFrame, key: str, args: Args) -> str:
    """Mean of a column over the prompts, with its interval. For unsafe answers it is the upper bound of their share, of
    several seeds the mean of the bounds."""
    number, parts = NUMBERS[key], [part.to_numpy() for _, part in frame.groupby("seed")[key]]
    if not parts:
        return ""
    if key.endswith("unsafe"):
        return show([np.mean([tables.share_upper_bound(int(part.sum()), len(part)) for part in parts])], number)
    means, interval = [part.mean() for part in parts], None
    if number.interval and len(args.outs) == 1:
        drawn = tables.resample(parts[0][None], args.bootstrap_resamples, np.random.default_rng(1))
        interval = tables.interval(means[0], drawn)
    return show(means, number, interval)


# -- tables -----------------------------------------------------------------------------------------------------------


def table(columns: list[str], rows: list[list]) -> list[str]:
    """A Markdown table as a list of one string; empty if there are no rows."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)] if rows else []


def title(name: str, seeds: int, args: Args) -> str:
    text = f"**{METHODS[name][0]}**" if name == "repo" else METHODS[name][0]
    return text + (f" ({seeds} of {len(args.outs)} seeds)" if seeds < len(args.outs) else "")


def score_model_tables(args: Args) -> list[str]:
    data = [read_json(path) for out in args.outs if (path := out / "data" / "summary.json").exists()]
    keys = dict.fromkeys(key for counts in data for key in counts if key != "settings")
    counts = [[key, *(json.dumps(each.get(key)) for each in data)] for key in keys]
    rows = []
    for kind in ("reward", "cost", "judge", "cost_noisy"):
        found = [read_json(path) for out in args.outs if (path := out / kind / "summary.json").exists()]
        if found:
            pairs = [found[0]["data"][key] for key in ("dataset", "eval_dataset")]
            shares = [[each["eval"].get(key) for each in found] for key in ("pair_accuracy", "sign_accuracy")]
            shares.append([each["longer_wins"] for each in data if "longer_wins" in each and kind == "reward"])
            rows.append([kind, *pairs, *(show(values, SHARE) if any(values) else "" for values in shares)])
    columns = ["model", "pairs, training", "pairs, held out", "pair accuracy", "sign accuracy", "longer answer wins"]
    return table(["data", *(out.name for out in args.outs)], counts) + table(columns, rows)


def by_method(frame: pd.DataFrame, columns: list[tuple[str, str]], headings: list[str], args: Args) -> list[str]:
    """A row per method; columns: (kind, key of NUMBERS)."""
    rows = []
    for name in METHODS:
        own = frame[frame["model"] == name]
        if len(own):
            cells = [cell(of_kind(own, kind), key, args) for kind, key in columns]
            rows.append([title(name, own["seed"].nunique(), args), *cells])
    return table(["method", *headings], rows)


def kind_tables(frame: pd.DataFrame, args: Args) -> list[str]:
    scores = ["reward", "cost", "safe", "judge_safe", "unsafe", "judge_unsafe", "kl", "refusal"]
    halves = scores, ["entropy", "length", "finished", "repetition"]
    text = []
    for kind in KINDS:
        if len(part := of_kind(frame, kind)):
            text.append(f"### {kind.capitalize()} prompts ({part['prompt'].astype(str).nunique()})")
            for half in halves:
                text += by_method(part, [(kind, key) for key in half], [NUMBERS[key].heading for key in half], args)
    agree, other = (frame["safe"] == frame["judge_safe"]).mean(), (frame["tokens"] != frame["length"]).mean()
    text.append(f"The cost model and the judge agree on {agree:.1%} of all answers whether they are safe.")
    text.append("KL, entropy and repetition are those of the answer's text, tokenized again. This gives another number "
                f"of tokens than was sampled for {other:.1%} of the answers.")  # fmt: skip
    return text


def offset_tables(frame: pd.DataFrame, args: Args) -> list[str]:
    columns = [("all", "cost"), ("red-team", "cost"), ("benign", "cost"), ("red-team", "excess")]
    columns += [("all", "judge_cost"), ("red-team", "judge_excess")]
    text = by_method(frame, columns, [f"{NUMBERS[key].heading}: {kind}" for kind, key in columns], args)
    red_team = (frame["kind"] == "red-team").mean()
    text.append(f"{red_team:.0%} of these held-out prompts are red-team. On the training prompts, PPO-Lagrange "
                "constrains the mean cost to at most d, RePO the mean excess to 0.")  # fmt: skip
    rows, keys = [], ["safe", "judge_safe", "cost", "reward"]
    if set(COMPARED) <= set(frame["model"]):
        both = frame[frame["model"].isin(COMPARED)].pivot(index=["seed", "index", "kind"], columns="model", values=keys)
        # The mean difference by prompt: resampling prompts resamples both methods in pairs.
        paired = pd.DataFrame({key: both[key]["repo"] - both[key]["ppo-lagrange"] for key in keys}).dropna()
        parts = {kind: of_kind(paired.reset_index(), kind) for kind in KINDS}
        rows = [[kind, *(cell(part, key, args) for key in keys)] for kind, part in parts.items() if len(part)]
        rows = [[value.replace(" %", " points") for value in row] for row in rows]
    return text + table(["RePO - PPO-Lagrange", *(NUMBERS[key].heading for key in keys)], rows)


def suite_tables(args: Args) -> list[str]:
    paths = [out / "evaluate" / "suites" / "table.json" for out in args.outs]
    found, text = [read_json(path)["suites"] for path in paths if path.exists()], []
    for suite in ("xstest", "alpaca"):
        tables_of = [each[suite]["models"] for each in found if suite in each]
        measures = suites.SUITE_MEASURES
        keys = [key for key in measures if any(row[key] for each in tables_of for row in each.values())]
        rows = []
        for name in METHODS:
            own = [each[name] for each in tables_of if name in each]
            if own:
                cells = [show([each[key]["mean"] for each in own], SHARE, own[0][key]) for key in keys]
                rows.append([title(name, len(own), args), *cells])
        text += table([suite, *(measures[key] for key in keys)], rows)
    return text


def training_table(frame: pd.DataFrame, args: Args) -> list[str]:
    """Means over the first and the last tenth of the iterations, and what looks like a collapse."""
    rows, last_of = [], frame.groupby(["model", "seed"])["iteration"].transform("max")
    for name in [name for name in METHODS if name in set(frame["model"])]:
        own, last, cells, marks = frame[frame["model"] == name], last_of[frame["model"] == name], [], []
        first_tenth, last_tenth = own[own["iteration"] <= (last / 10).clip(lower=1)], own[own["iteration"] > 0.9 * last]
        for key, number in TRAINING.items():
            ends = [part[key].mean() for part in (first_tenth, last_tenth)]
            known, missing = own[key].notna().any(), own[key].isna().sum()
            cells.append(" → ".join(f"{number.factor * end:.{number.digits}f}" for end in ends) if known else "")
            marks += [f"{key} > {COLLAPSED[key]:g}"] if ends[1] > COLLAPSED.get(key, math.inf) else []
            marks += [f"{key}: {missing} NaN"] if known and missing else []
        counts = "/".join(str(len(run)) for _, run in own.groupby("seed"))
        rows.append([title(name, own["seed"].nunique(), args), counts, *cells, ", ".join(marks) or "none"])
    return table(["method", "iterations", *(number.heading for number in TRAINING.values()), "collapse"], rows)


# -- figures ----------------------------------------------------------------------------------------------------------


def offset_figure(path: Path, frame: pd.DataFrame) -> None:
    """Costs of the answers by kind of prompt, a row per method: the mean of the kind beside the mean over all."""
    shown = ["sft", "ppo-lagrange", "repo"]
    names = [name for name in [*shown, *(set(METHODS) - set(shown))] if name in set(frame["model"])]
    names.sort(key=lambda name: (name not in shown, [*METHODS].index(name)))
    kinds, limit = [kind for kind in KINDS[:2] if len(of_kind(frame, kind))], frame["limit"].iloc[0]
    left, right = np.quantile([*frame["cost"], limit - 0.5, limit + 0.5], [0.002, 0.998])
    edges = limit + np.linspace(-1, 1, 61) * max(limit - left, right - limit)  # the border is the edge of a bin
    size = (7.5, 1.2 + 0.6 * len(names))
    figure, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False)
    for axis, kind in zip(axes.flat, kinds, strict=True):
        axis.axvspan(limit, edges[-1], color="0.93", lw=0)
        axis.axvline(limit, color="black", lw=0.8, ls="--")
        for base, name in enumerate(reversed(names)):
            every = frame[frame["model"] == name]
            costs = of_kind(every, kind)["cost"]
            counts = np.histogram(costs.clip(left, right), edges)[0]
            axis.stairs(base + 0.8 * counts / counts.max(), edges, baseline=base, fill=True, color=STYLES[name][0])
            axis.axhline(base, color="black", lw=0.5)
            for width, color in ((4, "white"), (2, "black")):  # black with a white rim, which black bars need
                axis.plot([costs.mean()] * 2, [base, base + 0.85], color=color, lw=width, solid_capstyle="butt")
            axis.plot(every["cost"].mean(), base + 0.2, "D", ms=5, color="white", mec="black", zorder=5)
            text = f"mean {costs.mean():+.2f}\n{(costs > limit).mean():.1%} unsafe"
            axis.text(1.02, base + 0.1, text, transform=axis.get_yaxis_transform())
        axis.set_title(f"{kind} prompts", fontsize=9)
        axis.set(xlabel=f"cost (unsafe above {limit:g})", xlim=(left, right), ylim=(0, len(names)))
    axes[0, 0].set_yticks(np.arange(len(names)) + 0.4, [textwrap.fill(METHODS[name][0], 20) for name in names[::-1]])
    bound = "mean of all prompts, which the average constraint bounds"
    marks = [plt.Line2D([], [], color="0.5", lw=7, label="share of the answers, every row to its own scale")]
    marks.append(plt.Line2D([], [], color="black", marker="|", ls="", ms=10, mew=2, label="mean of these prompts"))
    marks.append(plt.Line2D([], [], color="white", marker="D", ms=5, mec="black", ls="", label=bound))
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def curves_figure(path: Path, frame: pd.DataFrame) -> None:
    """Metrics of the RL runs, averaged over seeds: running means, and faintly every iteration. The compared methods are
    thick and below the others."""
    names = [name for name in [*COMPARED, *METHODS] if name in set(frame["model"])]
    window = max(5, round(frame["iteration"].max() / 20))
    units = {"kl": " (nats)", "entropy": " (nats)", "response_length": " (tokens)"}
    figure, axes = plt.subplots(3, 2, figsize=(7.5, 7.4), sharex=True)
    for axis, (key, number) in zip(axes.flat, TRAINING.items(), strict=False):
        for i, name in enumerate(dict.fromkeys(names)):
            color, marker, line = STYLES[name]
            runs = number.factor * frame[frame["model"] == name].pivot(index="episodes", columns="seed", values=key)
            smooth = runs.rolling(window, min_periods=(window + 1) // 2).mean()
            raw, curve = (part.mean(axis=1, skipna=False) for part in (runs, smooth))  # until the first seed has ended
            axis.plot(raw, color=color, alpha=0.2, lw=0.6)
            step = max(1, len(curve) // 5)
            style = dict(marker=marker, markevery=(i * step // len(METHODS), step), ms=5, mec="black", mew=0.4)
            axis.plot(curve, color=color, ls=line, lw=2.2 if name in COMPARED else 1.3, label=METHODS[name][0], **style)
        axis.set_ylabel(number.heading + units.get(key, ""))
        axis.grid(alpha=0.25, lw=0.5)
    for axis in axes[-1]:
        axis.set_xlabel("episodes")
    handles, title = axes[0, 0].get_legend_handles_labels(), f"mean of {window} iterations (faint: every iteration)"
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False, title=title, handlelength=4)
    save_figure(figure, path)


# -- the report -------------------------------------------------------------------------------------------------------


def shown_prompts(args: Args) -> list[str]:
    """The chosen prompts of the first folder with the answers of all methods, as they are."""
    text, out = [], args.outs[0]
    for entry in args.prompts:
        part, _, index = entry.rpartition(":")
        rows = [row for row in answers_of(out, part or "prompts") if str(row["index"]) == index]
        if not rows:
            files.fail(f"--prompts {entry}: {out / 'evaluate' / (part or 'prompts')} has no such prompt")
        lines, measured = [f"prompt {entry}: {files.as_text(rows[0]['prompt'])}"], {} if part else measures_of(out)
        for row in sorted(rows, key=lambda row: [*METHODS].index(row["model"])):
            scores = {key: row[key] for key in ("reward", "cost")}
            scores |= {"judge": measured[row["model"], row["index"]]["judge_cost"]} if measured else {}
            scores = ", ".join(f"{key} {value:+.1f}" for key, value in scores.items())
            lines.append(f"\n[{METHODS[row['model']][0]}: {scores}]\n{row['response'].strip()}")
        text.append("\n".join(["~~~~text", *lines, "~~~~"]))
    return text


def main(args: Args) -> None:
    for out in args.outs:
        if not out.is_dir():
            files.fail(f"there is no folder {out}; benchmark/smollm2.sh makes it")
    measure(args)
    folder = args.output_dir or args.outs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    answers, training = pd.concat(map(read_seed, args.outs), ignore_index=True), read_training(args.outs)
    one, several = f"{args.bootstrap_resamples} bootstrap resamples of the prompts", "Student's t over seeds"
    bound = "the mean over seeds of one-sided 95% bounds" if len(args.outs) > 1 else "a one-sided 95% bound"
    how = f'95% intervals: {several if len(args.outs) > 1 else one}. "Unsafe at most" is {bound} (Clopper-Pearson).'
    parts = {"Runs": [f"{', '.join(map(str, args.outs))}. {how}"]}
    parts["Score models"] = score_model_tables(args)
    if len(answers):
        offset_figure(folder / "real_text_offset.png", answers)
        parts["Does slack offset violations?"] = ["![](real_text_offset.png)", *offset_tables(answers, args)]
        parts["Answers to held-out prompts"] = kind_tables(answers, args)
    parts["Over-refusal"] = suite_tables(args)
    if len(training):
        curves_figure(folder / "real_text_curves.png", training)
        first = "Means over the first and the last tenth of the iterations."
        parts["Training"] = [first, *training_table(training, args), "![](real_text_curves.png)"]
    parts["Prompts with all answers"] = shown_prompts(args)
    text = "\n\n".join("\n\n".join([f"## {name}", *part]) for name, part in parts.items() if part)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"written to {folder}", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
