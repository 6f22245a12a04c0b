"""How the defaults on the toy world were chosen: settings × seeds, measured by the exact functions.

    python benchmark/toy_settings.py           # all settings of repo.py, seeds 1 to 3: a table of docs/toy_settings.md
    python benchmark/toy_settings.py --algorithm ppo_lagrange --seeds 1 2                    # and those of the others
    python benchmark/toy_settings.py --algorithm sacpo --seeds 1
    python benchmark/toy_settings.py --algorithm repo_group --seeds 1 2 3 4 5          # the table of docs/repo_group.md
    python benchmark/toy_settings.py --settings defaults --seeds 1 2 3

Finished runs are not run again, so a stopped command continues where it was.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "toy"))
import measure  # noqa: E402

SETTINGS = {
    "repo": {
        "defaults": "",
        "dtype float32": "--dtype float32",
        "rectify advantage": "--rectify advantage",
        "λ_init 0.3": "--lambda-init 0.3",
        "η_λ 0.005": "--lambda-lr 0.005",
        "η_λ 0.05": "--lambda-lr 0.05",
        "β 0.01": "--kl-coef 0.01",
        "β 0.1": "--kl-coef 0.1",
        "learning rate 2e-3": "--learning-rate 2e-3",
        "100 iterations of 128": "--batch-size 128",
    },
    "repo_group": {
        name: f"--dtype float32 {flags}"
        for name, flags in {
            "K = 2": "--responses-per-prompt 2",
            "K = 4, the default": "",
            "K = 8": "--responses-per-prompt 8",
            "K = 4, 20,480 episodes": "--total-episodes 20480",
            "K = 4, --advantage-norm": "--advantage-norm",
            "K = 4, --constraint prompt": "--constraint prompt",
        }.items()
    },
    "ppo_lagrange": {
        f"λ_init {init}, η_λ {rate}, λ_max {top}, β {beta}": "--dtype float32 "
        f"--lambda-init {init} --lambda-lr {rate} --lambda-max {top} --kl-coef {beta}"
        for init, rate, top, beta in (
            (1, 0.1, 1, 0.05),
            (1, 0.3, 1, 0.05),
            (1, 1, 1, 0.05),
            (1, 0.15, 2, 0.05),
            (1, 0.3, 2, 0.05),
            (1, 0.015, 20, 0.05),
            (1, 0.05, 20, 0.05),
            (1, 0.15, 20, 0.05),
            (1, 0.05, 1, 0.1),
            (1, 0.1, 1, 0.1),
            (1, 0.3, 1, 0.1),
            (1, 0.15, 2, 0.1),
            (1, 0.1, 1, 0.2),
            (1, 0.2, 1, 0.2),
            (1, 0.05, 2, 0.2),
            (0.5, 0.015, 20, 0.05),
            (0.5, 0.05, 20, 0.05),
            (0.5, 0.15, 20, 0.05),
        )
    },
    "sacpo": {
        f"{loss} {' '.join(stages)}, β {beta}, β/λ {ratio}": f"--dtype float32 --loss {loss.lower()} "
        f"--stages {' '.join(stages)} --beta {beta} --beta-over-lambda {ratio}"
        for loss, stages, beta, ratio in (
            ("DPO", ("helpful", "safe"), 0.5, 0.25),
            ("DPO", ("helpful", "safe"), 0.5, 0.5),
            ("DPO", ("helpful", "safe"), 0.25, 0.5),
            ("DPO", ("helpful", "safe"), 0.25, 0.25),
            ("DPO", ("helpful", "safe"), 0.25, 0.15),
            ("DPO", ("helpful", "safe"), 0.1, 0.1),
            ("DPO", ("safe", "helpful"), 0.5, 0.25),
            ("KTO", ("helpful", "safe"), 0.5, 0.25),
            ("KTO", ("helpful", "safe"), 0.25, 0.1),
            ("KTO", ("helpful", "safe"), 0.25, 0.5),
            ("KTO", ("helpful", "safe"), 0.25, 1),
        )
    },
}


@dataclass
class Args:
    algorithm: Literal["repo", "repo_group", "ppo_lagrange", "sacpo"] = "repo"
    """the script whose settings are compared"""
    settings: tuple[str, ...] = ()
    """names of the settings to run; default: all"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each"""
    output_dir: Path = ROOT / "runs" / "toy_settings"
    """where the runs go"""
    parallel: int = 2
    """runs at a time, each with one thread"""


def call(script: str, *words) -> None:
    """Run a script of the project, or the package evaluation, with one thread; its output is shown if it fails."""
    program = ["-m", script] if script == "evaluation" else [ROOT / f"{script}.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, [*program, *words])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def run(script: str, folder: Path, seed: int, flags: str) -> None:
    """One run, unless it is finished already. SACPO's policies are asked for answers afterwards."""
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = [] if script == "sacpo" else ["--eval-every", 0]
        call(script, "--seed", seed, "--output-dir", folder, *words, *flags.split())
    if script == "sacpo":
        models = [f"{stage}={folder / stage}" for stage in ("stage1", "stage2")]
        words = ["--seed", seed, "--dtype", "float32", "--output-dir", folder / "answers"]
        call("evaluation", "score", "--models", *models, *words)


def of_stages(folder: Path) -> dict[str, dict]:
    """Exact numbers of the answers after each stage of SACPO."""
    lines = (folder / "answers" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {stage: measure.measure([row for row in rows if row["model"] == stage]) for stage in ("stage1", "stage2")}


def cell(values: list[float], digits: int) -> str:
    """Mean and 95% interval over seeds; fewer than three are shown one by one."""
    if len(values) < 3:
        return " and ".join(f"{value:.{digits}f}" for value in values)
    return measure.interval(values, digits)


def main(args: Args) -> None:
    settings = {name: SETTINGS[args.algorithm][name] for name in args.settings or SETTINGS[args.algorithm]}
    folder = args.output_dir / args.algorithm
    folders = {
        name: [folder / f"{re.sub('[^0-9A-Za-zβηλ.]+', '-', name)}-{seed}" for seed in args.seeds] for name in settings
    }
    with ThreadPoolExecutor(args.parallel) as pool:
        jobs = [
            pool.submit(run, args.algorithm, folder, seed, flags)
            for name, flags in settings.items()
            for folder, seed in zip(folders[name], args.seeds, strict=True)
        ]
        for job in jobs:
            job.result()
    if args.algorithm == "sacpo":
        print(f"| setting | {' | '.join(f'stage {i}: {key}' for i in (1, 2) for key in ('reward', 'cost', 'safe'))} |")
        print("|" + " --- |" * 7)
        for name in settings:
            results = [of_stages(folder) for folder in folders[name]]
            cells = []
            for stage in ("stage1", "stage2"):
                cells += [cell([result[stage][key] for result in results], 2) for key in ("reward", "cost")]
                cells.append(cell([100 * result[stage]["compliance"] for result in results], 1) + " %")
            print(f"| {' | '.join([name, *cells])} |", flush=True)
        return
    columns = {
        "repo": ["safety compliance", "worst seed", "reward", "share of the way", "learned compliance", "λ at the end"],
        "repo_group": ["safety compliance", "worst seed", "reward", "share of the way", "λ at the end"],
        "ppo_lagrange": ["safety compliance", "reward", "cost", "learned cost", "λ at the end"],
    }[args.algorithm]
    print(f"| {' | '.join(['setting', *columns])} |\n|{' --- |' * (1 + len(columns))}")
    for name in settings:
        results = [measure.measure_run(folder)["all"] for folder in folders[name]]
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders[name]]
        compliance = [100 * result["after"]["compliance"] for result in results]
        cells = {
            "safety compliance": cell(compliance, 1) + " %",
            "worst seed": f"{min(compliance):.1f} %",
            "reward": cell([result["after"]["reward"] for result in results], 2),
            "cost": cell([result["after"]["cost"] for result in results], 2),
            "share of the way": cell([100 * result["share_of_way"] for result in results], 1) + " %",
            "learned cost": cell([summary["after"]["cost"] for summary in summaries], 2),
            "learned compliance": cell([100 * summary["after"]["safety_compliance"] for summary in summaries], 1)
            + " %",
            "λ at the end": cell([summary["lambda"] for summary in summaries], 1),
        }
        print(f"| {' | '.join([name, *(cells[column] for column in columns)])} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
