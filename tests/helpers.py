"""Running the scripts from tests: in this process, by python, by torchrun; and looking at their updates."""

import contextlib
import copy
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import tyro
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import ppo_lagrange
import preference_models
import repo
import repo_group
import sacpo

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {script.__name__: script for script in (repo, ppo_lagrange, repo_group, sacpo, preference_models)}


@dataclass
class Outcome:
    """What a script left behind: exit status and output."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in (self.out + "\n" + self.err).splitlines() if line.startswith("error:")]


def command(**flags) -> list[str]:
    """Command line of flags by field name; None leaves a flag out, True gives no value, a list several."""
    words = []
    for name, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


changed = mock.patch.multiple  # changed(module, name=value): with other functions for a while


def captured(function, mistake: type[Exception]) -> Outcome:
    """What a program leaves behind that runs as a function of this process; a mistake of the user is one line."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = function()
    except SystemExit as stop:
        code = stop.code
    except mistake as error:
        code = 2
        err.write(f"error: {' '.join(str(error).split())}\n")  # as `report` does
    return Outcome(code or 0, out.getvalue(), err.getvalue())


def run_main(script, processes, words: list[str]) -> Outcome:
    """main() of a script in this process. What ends with a process in earnest is given back: locks, signal handlers."""
    locks = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def flock(descriptor, operation):
        locks.append(descriptor)
        fcntl.flock(descriptor, operation)

    own = SimpleNamespace(**vars(fcntl) | {"flock": flock})
    try:
        with changed(script, fcntl=own):
            return captured(lambda: script.main(tyro.cli(script.Args, args=words), *processes), script.UserError)
    finally:
        for descriptor in locks:
            os.close(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(program: list, processes: int | None = None, python_path: Path | str = "", **options) -> subprocess.Popen:
    """Start python, or torchrun with a number of processes, on a program; the output goes to pipes."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*launcher, *map(str, program)],
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(python_path)},
        start_new_session=True,
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options,
    )


def finish(process: subprocess.Popen, seconds: float = 300) -> Outcome:
    """Wait for a started program; one that hangs is ended with all its ranks, and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.terminate()  # torchrun ends its ranks, which are in sessions of their own, when it is asked to end
    return Outcome(process.returncode, out, err)


def load_policy(folder, processes, dtype=torch.float32):
    """A language model as repo.py loads it."""
    options = dict(mesh=processes[1], dtype=dtype, longest=0, tokenizer=repo.load_tokenizer(str(folder), "--model"))
    return repo.load_model(AutoModelForCausalLM, str(folder), "--model", **options)


def load_scores(folder, processes, **options):
    """A score model as repo.py loads it."""
    options |= dict(mesh=processes[1], dtype=torch.float32, longest=0)
    options["tokenizer"] = repo.load_tokenizer(str(folder), "--reward-model")
    return repo.load_score_model(str(folder), "--reward-model", **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that may be sharded over the ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@contextlib.contextmanager
def recorded_updates():
    """Record every update of every model: a list of (parameters, gradients) before clipping, as lists of tensors."""
    updates, original = [], nn.utils.clip_grad_norm_

    def clip_grad_norm_(parameters, max_norm):
        parameters = list(parameters)
        updates.append(([whole(each) for each in parameters], [whole(each.grad) for each in parameters]))
        return original(parameters, max_norm)

    with changed(nn.utils, clip_grad_norm_=clip_grad_norm_):
        yield updates


def assert_near(tensors, expected, tolerance: float) -> None:
    """Every tensor within a tolerance that is relative to the largest entry of all that are expected."""
    scale = max(tensor.abs().max().item() for tensor in expected)
    for number, (one, other) in enumerate(zip(tensors, expected, strict=True)):
        assert (one.double() - other.double()).abs().max() <= tolerance * scale, number


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # as text, U+2028 would end a line, too


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_summary(folder: Path) -> dict:
    return read_json(folder / "summary.json")


def read_back(cls, folder: Path):
    """A saved model by the library's class, which finds every weight, of the right shape, and no other."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def without_times(figures: dict) -> dict:
    return {name: value for name, value in copy.deepcopy(figures).items() if "second" not in name}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
