"""Real processes of the scripts without the seconds that imports take: multiprocessing's server imports, then forks."""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from signal import SIGKILL

from helpers import ROOT, Outcome

context = multiprocessing.get_context("forkserver")


class Forks:
    """The server, whose memory every process begins with."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
        context.set_forkserver_preload(["helpers"])  # which imports the scripts
        forkserver.ensure_running()
        del os.environ["PYTHONPATH"]

    def start(self, program: list, processes: int | None = None, cwd: Path = ROOT) -> "Started":
        """Alone as by python, or so many processes as by torchrun."""
        environments = [{}]
        if processes:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
            group |= dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
            environments = [group | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
        outputs = [f"{tempfile.mkdtemp(dir=self.folder)}/output" for _ in environments]
        return Started(list(map(str, program)), environments, str(cwd), outputs)


class Started:
    """Processes of one program."""

    def __init__(self, words: list[str], environments: list[dict[str, str]], cwd: str, outputs: list[str]):
        self.outputs, self.processes = outputs, []
        for environment, output in zip(environments, outputs, strict=True):
            Path(f"{output}.out").touch(), Path(f"{output}.err").touch()
            self.processes.append(context.Process(target=run, args=(words, environment, cwd, output)))
            self.processes[-1].start()

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def outcomes(self) -> list[Outcome]:
        """Of each process so far; its code is None while it runs."""
        codes = [process.exitcode for process in self.processes]  # before the texts, which are whole at the end
        texts = [[Path(f"{output}.{name}").read_text("utf-8") for name in ("out", "err")] for output in self.outputs]
        return [Outcome(code, *both) for code, both in zip(codes, texts, strict=True)]

    def wait_until(self, condition, seconds: float = 120) -> None:
        """Wait for a condition, while all processes run."""
        end = time.monotonic() + seconds
        while not condition():
            if any(process.exitcode is not None for process in self.processes) or time.monotonic() > end:
                self.send_signal(SIGKILL)
                raise AssertionError(f"the run ended or hangs: {self.outcomes()}")
            time.sleep(0.005)

    def finish(self, seconds: float = 300) -> list[Outcome]:
        """Wait for the end of all processes; those that hang are killed, and the test fails."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.send_signal(SIGKILL)
            raise AssertionError(f"no end after {seconds} s: {self.outcomes()}")
        return self.outcomes()


def run(words: list[str], environment: dict[str, str], cwd: str, output: str) -> None:
    """A forked process: the program as __main__, and its end as python would have it."""
    os.setsid()
    os.environ |= environment
    os.chdir(cwd)
    for number, name in ((0, os.devnull), (1, f"{output}.out"), (2, f"{output}.err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_RDWR), number)
    sys.argv, code = words, 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
