"""Kill a run again and again with SIGKILL, resume it each time, and compare it with the run that was never killed.

    python tests/kills.py --script repo.py --kills 20                      # on the toy world
    python tests/kills.py --script sacpo.py --kills 20 --processes 2

Every third kill strikes while a checkpoint is being written, every fifth before the run has got anywhere, the others at
a random moment. Compared are the final weights, the last checkpoint with all critics and optimizer states, and the
logs, bit for bit; only times may differ. The number of processes stays the same, with one thread each.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from helpers import ROOT, contents, finish, read_lines, start, without_times
from safetensors.torch import load_file

FLAGS = {  # enough to do for twenty kills
    "repo.py": ["--total-episodes", "3840", "--eval-every", "20"],
    "ppo_lagrange.py": ["--total-episodes", "3840", "--eval-every", "20"],
    "preference_models.py": ["--dataset-split", "train[:8000]", "--batch-size", "128"],
    "sacpo.py": ["--train-size", "2048", "--loss", "dpo", "kto", "--merge-q", "0.5"],
}


@dataclass
class Args:
    """Kill a run and resume it, many times."""

    script: str = "repo.py"
    """the training script"""
    kills: int = 20
    """how often the run is killed"""
    processes: int = 1
    """1 starts python, more start torchrun"""
    seed: int = 1
    """seeds the moments of the kills"""


@dataclass
class Tally:
    """What the kills hit."""

    starting: int = 0  # no checkpoint since the start
    working: int = 0
    saving: int = 0  # a half-written checkpoint was left
    seconds: float = 0.0


def descendants(pid: int) -> list[int]:
    """A process and all that it started, the ranks of torchrun among them."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def kill(process: subprocess.Popen) -> None:
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for a condition or for the end of the process, whichever comes first."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.001)


def campaign(script: str, words: list, folder: Path, kills: int, processes: int, seed: int) -> Tally:
    """Run the script to its end once without kills and once with them, in two folders below `folder`, and compare."""
    begun, tally, chance = time.monotonic(), Tally(), random.Random(seed)
    program = [ROOT / script, *words, "--dtype", "float32", "--save-every", "1"]
    whole, killed = folder / "whole", folder / "killed"
    processes = processes if processes > 1 else None
    reference = start([*program, "--output-dir", whole], processes)
    checkpoints = killed / "checkpoints"

    def newest() -> str:
        return max((path.name for path in checkpoints.glob("[0-9]*[0-9]")), default="")

    for number in range(1, kills + 1):
        before = newest()
        process = start([*program, "--output-dir", killed, "--resume"], processes)
        if number % 5 == 0:
            time.sleep(chance.uniform(0, 8))
        else:
            wait_until(lambda before=before: newest() > before, process)
            time.sleep(chance.uniform(0, 1))
            if number % 3 == 0:
                wait_until(lambda: any(checkpoints.glob("*.part")), process)
                time.sleep(chance.uniform(0, 0.02))
        assert process.poll() is None, "the run ended before its kill: give it more to do"
        kill(process)
        saving = any(checkpoints.glob("*.part"))
        tally.saving += saving
        tally.working += newest() > before and not saving
        tally.starting += newest() == before and not saving
    for process in (start([*program, "--output-dir", killed, "--resume"], processes), reference):
        outcome = finish(process, seconds=600)
        assert outcome.code == 0, outcome.err
    compare(whole, killed)
    tally.seconds = time.monotonic() - begun
    return tally


def compare(whole: Path, other: Path) -> None:
    """Hold two finished runs to each other: weights, evaluations, checkpoints byte for byte, metrics but for times."""
    one, two = (contents(folder) for folder in (whole, other))
    weights = [name for name in one if name.endswith(".safetensors")]
    assert any(name.startswith("checkpoints") for name in weights)
    assert any(not name.startswith("checkpoints") for name in weights)
    assert one["eval.jsonl"] == two["eval.jsonl"]
    for name in weights:  # of a checkpoint the tensors: their order in a file is open
        if name.startswith("checkpoints"):
            ours, theirs = (load_file(folder / name) for folder in (whole, other))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        else:
            assert one[name] == two[name], name
    logs = [[without_times(line) for line in read_lines(folder / "metrics.jsonl")] for folder in (whole, other)]
    assert logs[0] == logs[1]
    unlike = {name for name in set(one) ^ set(two) if "tensorboard" not in name}
    assert not unlike, f"only in one of them: {sorted(unlike)}"


def main() -> None:
    args = tyro.cli(Args)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    tally = campaign(args.script, FLAGS[args.script], folder, args.kills, args.processes, args.seed)
    shutil.rmtree(folder)
    print(
        f"{args.script}, {args.processes} process(es): {args.kills} kills, {tally.starting} while starting, "
        f"{tally.working} while working, {tally.saving} while saving; equal bit for bit; {tally.seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
