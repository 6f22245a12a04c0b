"""How the defaults on the toy world were chosen: settings × seeds, measured by the exact functions.

    python benchmark/toy_settings.py           # all settings of repo.py, seeds 1 to 3: a table of docs/toy_settings.md
    python benchmark/toy_settings.py --algorithm ppo_lagrange                                    # and the other one
    python benchmark/toy_settings.py --settings defaults --seeds 1 2 3

Runs that are finished are not run again, so a stopped command goes on where it was.
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
    "ppo_lagrange": {
        f"λ_init {init}, η_λ {rate}": f"--dtype float32 --lambda-init {init} --lambda-lr {rate}"
        for init in (1.0, 0.5)
        for rate in (0.015, 0.05, 0.15)
    },
}


@dataclass
class Args:
    algorithm: Literal["repo", "ppo_lagrange"] = "repo"
    """the script whose settings are compared"""
    settings: tuple[str, ...] = ()
    """names of the settings to run; default: all"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each"""
    output_dir: Path = ROOT / "runs" / "toy_settings"
    """where the runs go"""
    parallel: int = 2
    """runs at a time, each with one thread"""


def run(script: str, folder: Path, seed: int, flags: str) -> None:
    """One run, unless it is finished already."""
    if (folder / "summary.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, ROOT / f"{script}.py", "--seed", seed, "--eval-every", 0, "--output-dir", folder]
    command += flags.split()
    done = subprocess.run(
        [*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


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
    columns = ["setting", "safety compliance", "worst seed", "reward", "cost", "share of the way"]
    columns += ["learned compliance", "λ at the end"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name in settings:
        results = [measure.measure_run(folder)["all"] for folder in folders[name]]
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders[name]]
        after = {key: [result["after"][key] for result in results] for key in ("compliance", "reward", "cost")}
        cells = [
            name,
            measure.interval([100 * value for value in after["compliance"]], 1) + " %",
            f"{100 * min(after['compliance']):.1f} %",
            measure.interval(after["reward"], 2),
            measure.interval(after["cost"], 2),
            measure.interval([100 * result["share_of_way"] for result in results], 1) + " %",
            measure.interval([100 * summary["after"]["safety_compliance"] for summary in summaries], 1) + " %",
            measure.interval([summary["lambda"] for summary in summaries], 1),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
