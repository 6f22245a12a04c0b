"""Running the scripts from tests: in this process, by python, by torchrun; and looking at their updates."""

import contextlib
import copy
import io
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parent.parent


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
    """Command line of flags by field name; None leaves a flag out, True gives it without a value."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def run_main(script, processes, words: list[str]) -> Outcome:
    """main() of a script in this process. Its process group stays, since the next test needs it, too."""
    out, err = io.StringIO(), io.StringIO()
    argv, shut_down = sys.argv, script.shut_down
    sys.argv, script.shut_down = [f"{script.__name__}.py", *words], lambda: None
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            script.main(*processes)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv, script.shut_down = argv, shut_down
    return Outcome(code, out.getvalue(), err.getvalue())


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


def start_nodes(nodes: int, processes: int, program: list, python_path: Path | str = "") -> list[subprocess.Popen]:
    """Start torchrun once for each of several nodes, which meet over the loopback device of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = ["-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc_per_node", str(processes)]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--local_addr", "127.0.0.1"]
    return [start([*launcher, *program], python_path=python_path) for _ in range(nodes)]


def finish(process: subprocess.Popen, seconds: float = 300) -> Outcome:
    """Wait for a started program; one that hangs is ended with all its ranks, and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, which are in sessions of their own, when it is asked to end
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out = err = "(no output)"
        raise AssertionError(f"no end after {seconds} s:\n{out}\n{err}") from None
    return Outcome(process.returncode, out, err)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that may be sharded over the ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@contextlib.contextmanager
def recorded_updates(script):
    """Record every update of every model: a list of (parameters, gradients) before clipping, each by name."""
    updates, original = [], script.clip_gradients

    def clip_gradients(model, max_grad_norm):
        parameters = {name: whole(value) for name, value in model.named_parameters()}
        gradients = {name: whole(value.grad) for name, value in model.named_parameters()}
        updates.append((parameters, gradients))
        return original(model, max_grad_norm)

    script.clip_gradients = clip_gradients
    try:
        yield updates
    finally:
        script.clip_gradients = original


@contextlib.contextmanager
def changed(module, **replacements):
    """Replace functions of a module for a while."""
    originals = {name: getattr(module, name) for name in replacements}
    for name, value in replacements.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(module, name, value)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # as text, U+2028 would end a line, too


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def without_times(metrics: dict) -> dict:
    return {name: value for name, value in copy.deepcopy(metrics).items() if "second" not in name}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
