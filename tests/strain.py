"""Strain on the scripts, each part a command whose figures stand in docs/reliability.md.

    python tests/strain.py bad-inputs                      # every flag of every script: writes docs/bad_inputs.md
    python tests/strain.py disk                            # full disks; needs the right to mount a tmpfs
    python tests/strain.py memory --iterations 10000       # resident memory of a long run on the toy world

Short forms of them are in test_strain.py.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from helpers import ROOT, changed, contents, finish, run_main, start

sys.path.append(str(ROOT))
import conftest  # noqa: F401 - nothing is looked up on the Hub, and no cache outlives the command
import tiny
from kills import compare

import evaluate
import ppo_lagrange
import preference_models
import repo
import sacpo


@dataclass
class Args:
    """Put the scripts under strain."""

    part: tyro.conf.Positional[Literal["bad-inputs", "disk", "memory"]]
    """bad-inputs: generated bad values of every flag; disk: a disk that fills up during a run; memory: resident memory
    of a long run of repo.py on the toy world"""
    iterations: int = 10000
    """iterations of the long run, each of four responses of up to eight tokens"""
    sizes: int = 24
    """disks of different sizes, for each script"""


# ======================================================================================================================
# Bad inputs
# ======================================================================================================================
SCRIPTS = {
    "repo": (repo, repo.Args),
    "ppo_lagrange": (ppo_lagrange, ppo_lagrange.Args),
    "sacpo": (sacpo, sacpo.Args),
    "preference_models": (preference_models, preference_models.Args),
    "evaluate": (evaluate, evaluate.Score),
    "judge": (evaluate, evaluate.Judge),
}
OPENERS = {"evaluate": "open_evaluation", "judge": "collect"}  # what makes the output directory; of the others open_run

# What the flags allow, written down apart from the scripts' own checks. Other numbers must be above zero.
ANY_NUMBER = {"cost_threshold"}
ZERO_OR_MORE = {"seed", "save_every", "eval_every", "eval_size", "train_size", "warmup_ratio", "weight_decay"}
ZERO_OR_MORE |= {"kl_coef", "ptx_coef", "gae_lambda", "lambda_init", "lambda_lr", "lambda_max", "regularization"}
ZERO_OR_MORE |= {"compare_limit", "limit", "connection_retries", "retries", "price_in", "price_out", "blind_pairs"}
ZERO_OR_MORE |= {"disagreement_limit", "judge's temperature"}
AT_MOST_ONE = {"gae_lambda", "warmup_ratio"}
MODELS = {"model", "reward_model", "cost_model", "reward_critic", "cost_critic"}
DATA = {"dataset", "eval_dataset", "ptx_dataset"}
LISTS = {  # of the flags that take several texts, some bad values of each
    "suites": ["nothing", "all=x", "=x", "a=", "../a=x", "💣=x"],
    "responses": ["nowhere", "/nowhere/at/all", "EMPTY", "TORN", "ONE", "FOLDER"],
    "judge's models": ["nobody", "", "a=b"],
    "import_blind": ["nowhere.csv", "FOLDER", "TORN"],
    "people": ["ann", "", ("ann", "ann")],
}
TEXTS = {  # bad values of other texts
    "base": ["nobody", ""],
    "judge_model": ["", " "],
    "base_url": [
        "",
        "localhost",
        "ftp://localhost",
        "http://",
        "http://h:0/v1",
        "http://h:x",
        "http://key@h",
        "http://h/?key=1",
    ],
    "api_key_env": ["", "sk-1234", "A B", "NO_SUCH_VARIABLE"],
    "extra_body": ["", "[]", "{", '{"messages": []}', "null", "💣"],
    "export_blind": ["", "sheet", "sheet.html"],
    "push_to_hub": ["", "name", "a/b/c", "a b/c", "-/-", "💣/c"],
}
TEMPLATES = {"prompt_template", "score_prompt_template"}

NOT_UTF8 = os.fsdecode(b"\xff\xfe")  # as a name of another encoding arrives in sys.argv
STRANGE = {
    "empty": "",
    "blank": " \t",
    "NUL": "a\0b",
    "not UTF-8": f"a{NOT_UTF8}",
    "right to left": "\u202eba\u202c",
    "emoji": "💣",
    "line break": "ba\nbe",
    "escape sequence": "\x1b[2J",
    "128 KiB": "a" * (2**17 - 100),  # Linux passes no longer word
}


@dataclass
class Case:
    """One bad input: what is wrong, by a word, and the words of the command line that replace or follow the others."""

    flag: str
    given: str
    changes: dict  # flags by field name; None leaves a flag out
    more: tuple[str, ...] = ()  # words at the end


class Bench:
    """Tiny files, and the flags of a short run of each script on them."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "out"
        folder.mkdir(exist_ok=True)
        self.policy = tiny.make_model(folder / "policy")
        self.reward = tiny.make_model(folder / "reward", "score", seed=1)
        self.cost = tiny.make_model(folder / "cost", "biased_score", seed=2)
        self.train = tiny.write_rows(folder / "train.jsonl", tiny.make_pairs(40))
        self.test = tiny.write_rows(folder / "test.jsonl", tiny.make_pairs(13, seed=1))
        self.place = folder / "place"  # the working directory
        for name in ("place/runs", "empty", "run", "text"):
            (folder / name).mkdir(parents=True)
        (folder / "run" / "args.json").write_text("{}")
        (folder / "text" / "note.txt").write_text("ba")
        (folder / "file").write_text("ba")
        os.mkfifo(folder / "pipe.jsonl")
        for name, content in BAD_DATA.items():
            (folder / name).write_bytes(content)
        shared = dict(dataset=self.train, eval_dataset=self.test, eval_split="train", dtype="float32", warmup_ratio=0)
        shared |= dict(output_dir=self.out)
        rl = dict(model=self.policy, reward_model=self.reward, cost_model=self.cost, max_new_tokens=16, eval_every=0)
        rl |= shared | dict(total_episodes=32, batch_size=16, micro_batch_size=8)
        pairs = shared | dict(model=self.policy, epochs=1, batch_size=8, micro_batch_size=4)
        score = dict(models=f"ours={self.policy}", reward_model=self.reward, cost_model=self.cost, dataset=self.test)
        score |= dict(dataset_split="train", max_new_tokens=16, dtype="float32", output_dir=self.out)
        rows = [
            dict(model=name, index=i, prompt="ba?", response=name, reward=0.5, cost=0.5, length=1, finished=True)
            for name in ("one", "two")
            for i in range(3)
        ]
        judge = dict(responses=tiny.write_rows(folder / "responses.jsonl", rows), judge_model="judge")
        judge |= dict(base_url="http://127.0.0.1:9/v1", output_dir=self.out)
        tiny.write_rows(folder / "one.jsonl", rows[:3])
        self.flags = {
            "repo": rl,
            "ppo_lagrange": rl | dict(lambda_max=20),
            "sacpo": pairs | dict(train_size=32),
            "preference_models": pairs,
            "evaluate": score,
            "judge": judge,
        }

    def words(self, script: str, case: Case) -> list[str]:
        flags = self.flags[script] | case.changes
        words = {"evaluate": ["score"], "judge": ["judge"]}.get(script, [])
        for name, value in flags.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}"]
                words += [] if value is True else map(str, value if isinstance(value, tuple) else [value])
        return [*words, *case.more]

    def told(self, script: str, case: Case, processes) -> str:
        """The one line that a bad input is told in; anything else that happens is an AssertionError."""
        module, _ = SCRIPTS[script]
        before = contents_and_folders(self.folder)

        opener = OPENERS.get(script, "open_run")
        original = getattr(module, opener)

        def accepted(*args):
            if script != "judge":  # which would ask its endpoint
                original(*args)
            raise AssertionError(f"{script} {case.flag} ({case.given}) is not refused")

        try:
            with changed(module, **{opener: accepted}):
                outcome = run_main(module, processes, self.words(script, case))
        except AssertionError:
            shutil.rmtree(self.out, ignore_errors=True)
            raise
        name = f"{script} {case.flag} ({case.given}): {outcome}"
        assert outcome.code == 2, name
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and outcome.err.endswith("\n"), name
        assert outcome.err[:-1].isprintable() and len(outcome.err) < 2100, name
        assert not outcome.out or outcome.out.startswith("--dataset: dropped"), name
        assert "Traceback" not in outcome.err, name
        assert contents_and_folders(self.folder) == before, name
        return outcome.err.strip().replace(str(self.folder), "TMP").replace(str(ROOT), "ROOT")


def contents_and_folders(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


BAD_DATA = {
    "empty.jsonl": b"",
    "rows.txt": b"ba\n",
    "columns.jsonl": b'{"question": "ba"}\n',
    "torn.jsonl": b'{"prompt": "ba"}\n{"prompt": ',
    "latin.jsonl": '{"prompt": "b\xe4"}\n'.encode("latin-1"),
    "latin.csv": "prompt\nb\xe4\n".encode("latin-1"),
    "utf-16.jsonl": '{"prompt": "ba"}\n'.encode("utf-16"),
    "deep.json": b"[" * 100_000,
    "surrogate.jsonl": b'{"prompt": "\\ud800"}\n',
    "numbers.jsonl": b'{"prompt": 7}\n',
    "lists.jsonl": b'{"prompt": ["ba"]}\n',
    "null.jsonl": b'{"prompt": null}\n',
    "blank.jsonl": b'{"prompt": " "}\n',
    "mixed.jsonl": b'{"prompt": "ba"}\n{"prompt": 7}\n',
    "text.parquet": b"PAR1 no table",
    "text.jsonl.gz": b"not packed",
    "zeros.parquet": bytes(2**16),
    "quotes.csv": b'prompt\n"ba\n',
}


def bad_values(name: str, kind, bench: Bench) -> Iterator[tuple[str, object]]:
    """(what is wrong, value) for a flag of a type; a value None is a flag without its value."""
    options = [option for option in typing.get_args(kind) if option is not types.NoneType]
    if isinstance(kind, types.UnionType):
        yield from bad_values(name, options[0], bench)
    elif kind is bool:
        yield "a value", ("maybe",)
    elif typing.get_origin(kind) is Literal:
        yield "missing", None
        yield "another word", "other"
        yield "upper case", str(options[0]).upper()
        yield "a number", 1
        yield from STRANGE.items()
    elif kind in (int, float):
        yield "missing", None
        yield from [("a word", "many"), ("a comma", "1,5"), ("two numbers", ("1", "2")), ("nan", "nan")]
        yield from [("inf", "inf"), ("-inf", "-inf"), ("beyond all floats", "1e400"), ("hexadecimal", "0x10")]
        yield from STRANGE.items()
        if kind is int:
            yield from [("a fraction", 2.5), ("65 bits", 2**64), ("401 digits", 10**400), ("65 bits below", -(2**64))]
        if name not in ANY_NUMBER:
            yield "negative", -1
        if name not in ANY_NUMBER | ZERO_OR_MORE:
            yield "zero", 0
        if name in AT_MOST_ONE:
            yield "above 1", 1.5
    elif typing.get_origin(kind) in (tuple, list) and options[0] is not str:
        for what, value in bad_values(name, options[0], bench):
            if what not in ("missing", "two numbers", "negative", "zero"):
                yield what, value
        if options[0] is float:
            yield from [("outside", 1.5), ("negative", -0.5), ("twice", ("0.5", "0.5"))]
            yield "twice to six digits", ("0.1", "0.1000000001")
        else:
            word = typing.get_args(options[0])[0]
            yield from [("three", (word,) * 3), ("one of two wrong", (word, "other"))]
    elif name in LISTS:
        places = {"EMPTY": "empty.jsonl", "TORN": "torn.jsonl", "ONE": "one.jsonl", "FOLDER": "empty"}
        for value in LISTS[name]:
            yield str(value), bench.folder / places[value] if value in places else value
        yield from [(what, STRANGE[what]) for what in ("NUL", "not UTF-8")]
    elif name in TEXTS:
        yield "missing", None
        yield from [(what, STRANGE[what]) for what in ("NUL", "not UTF-8")]
        yield from [(value or "empty", value) for value in TEXTS[name]]
    elif name == "models":
        yield "missing", None
        yield from [("no name", str(bench.policy)), ("empty name", f"={bench.policy}"), ("empty path", "ours=")]
        yield from [("a name twice", (f"a={bench.policy}",) * 2), ("a path as name", f"../a={bench.policy}")]
        for what, value in STRANGE.items():
            yield f"name: {what}", f"{value}={bench.policy}"
        for what, value in bad_values("model", str, bench):
            if value is not None:
                yield what, f"ours={value}"
    elif name in MODELS:
        yield "missing", None
        yield from STRANGE.items()
        yield from PATHS.items()
        for what in ("empty", "text", "file", "train.jsonl"):
            yield f"a {'folder' if (bench.folder / what).is_dir() else 'file'}: {what}", bench.folder / what
    elif name in DATA:
        yield "missing", None
        yield from STRANGE.items()
        yield from PATHS.items()
        for what in ("empty", "text", "policy", "file", "pipe.jsonl", *BAD_DATA):
            if not (name == "ptx_dataset" and what == "blank.jsonl"):
                yield f"a {'folder' if (bench.folder / what).is_dir() else 'file'}: {what}", bench.folder / what
    elif name.endswith("split"):
        yield "missing", None
        yield from STRANGE.items()
        yield from [("no end", "train["), ("no rows", "train[:0]"), ("no numbers", "train[a:b]")]
        yield from [("backwards", "train[9:2]"), ("three parts", "train[1:2:3]"), ("over 100%", "train[200%:300%]")]
    elif name == "prompt_column":
        yield "missing", None
        yield from STRANGE.items()
        yield "no column of the data", "question"
    elif name in TEMPLATES:
        yield "missing", None
        for what, value in STRANGE.items():
            if not (name == "score_prompt_template" and what == "empty"):
                yield what, value
            if what in ("NUL", "not UTF-8"):
                yield f"{what}, and a prompt", value + "{prompt}"
        yield from [("no prompt", "Q:"), ("upper case", "{PROMPT}"), ("the tokenizer has none", "chat")]
        if name == "prompt_template":
            yield "128 KiB, and a prompt", "ba " * (2**17 // 3 - 50) + "{prompt}"
    elif name == "exp_name":
        yield "missing", None
        yield from [(what, STRANGE[what]) for what in ("NUL", "not UTF-8")]
        yield "300 letters", "a" * 300
        yield "128 KiB", STRANGE["128 KiB"]
    elif name == "output_dir":
        yield "missing", None
        yield from [(what, STRANGE[what]) for what in ("empty", "blank", "NUL", "not UTF-8", "128 KiB")]
        yield from [(what, value) for what, value in PATHS.items() if what != "nowhere"]
        yield from [("a file", bench.folder / "file"), ("below a file", bench.folder / "file" / "out")]
        yield from [("holds a run", bench.folder / "run"), ("no place for files", "/proc/nowhere")]
    else:  # free text
        yield "missing", None
        yield from [(what, STRANGE[what]) for what in ("NUL", "not UTF-8")]


PATHS = {
    "nowhere": "/nowhere/at/all",
    "longer than PATH_MAX": "/" + "a/" * 4096,
    "a name of 300 letters": "/tmp/" + "a" * 300,
}

CONTRADICTIONS = {
    "repo": [
        dict(lambda_init=5, lambda_max=2),
        dict(responses_per_prompt=3),
        dict(total_episodes=15),
        dict(max_new_tokens=125),
        dict(max_prompt_length=2),
        dict(resume=True, output_dir=None),
        dict(batch_size=2**40, total_episodes=2**41),
        dict(max_new_tokens=2**40),
    ],
    "sacpo": [
        dict(max_length=64),
        dict(max_prompt_length=600),
        dict(stages="safe", merge_q=0.5),
        dict(loss="kto", batch_size=1),
        dict(loss=("dpo", "kto"), stages="safe"),
        dict(batch_size=41),
        dict(batch_size=2**40),
        dict(resume=True, output_dir=None),
    ],
    "preference_models": [
        dict(batch_size=41),
        dict(batch_size=2**40),
        dict(resume=True, output_dir=None),
    ],
    "evaluate": [
        dict(max_new_tokens=125),
        dict(max_new_tokens=2**40),
        dict(max_prompt_length=1),
        dict(bootstrap_resamples=2**40),
    ],
}
CONTRADICTIONS["judge"] = [
    dict(export_blind="a.csv", import_blind="b.csv"),
    dict(import_blind=("a/b.csv", "c/b.csv")),
    dict(import_blind="b.csv", people=("ann", "bob")),
    dict(responses=None),
    dict(judge_model=None),
    dict(models="one"),
    dict(models=("one", "one")),
    dict(seed=2**63 - 1),
]
CONTRADICTIONS["ppo_lagrange"] = CONTRADICTIONS["repo"]

# Output directories that judge finds out when it makes them, after it has asked its endpoint for a first verdict.
OF_COLLECT = {"300 letters", "128 KiB", "longer than PATH_MAX", "a name of 300 letters", "below a file"}
OF_COLLECT |= {"a file", "no place for files"}

UNKNOWN = {
    "unknown": "--bath-size=8",
    "no flag": "ba",
    "emoji": "--💣",
    "not UTF-8": f"--{NOT_UTF8}",
    "NUL": "--a\0b",
    "line break": "--a\nb",
    "short": "-x",
}


def bad_cases(script: str, bench: Bench) -> list[Case]:
    """All bad inputs of a script, a flag after the other."""
    _, cls = SCRIPTS[script]
    kinds, cases = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        name, flag = field.name, f"--{field.name.replace('_', '-')}"
        own = f"judge's {name}" if script == "judge" and name in ("models", "temperature") else name
        for what, value in bad_values(own, kinds[name], bench):
            if script == "judge" and what in OF_COLLECT:
                continue
            changes = {name: None if value is None else value}
            if kinds[name] is bool:
                cases.append(Case(flag, what, {}, (f"{flag}={value[0]}",)))
                continue
            if name == "exp_name":
                changes["output_dir"] = None  # its default holds the name
            if name == "ptx_dataset":
                changes["ptx_coef"] = 1
            if name == "ptx_split":
                changes |= dict(ptx_dataset=bench.train)
            cases.append(Case(flag, what, changes, (flag,) if value is None else ()))
    for changes in CONTRADICTIONS[script]:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in changes)
        cases.append(Case(flags, "contradictory", changes))
    return cases + [Case("", what, {}, (word,)) for what, word in UNKNOWN.items()]


def given(case: Case) -> str:
    """What a case gives its flag, as a table can show it."""
    words = [f"`{value}`" if type(value) in (int, float) else value for value in case.changes.values()]
    return f"{case.given}: {' '.join(map(str, words))}" if case.given == "contradictory" else case.given


def report_bad_inputs() -> int:
    """Give every bad input to the scripts and write docs/bad_inputs.md. Returns how many were not told in one line."""
    begun, rows, counts, wrong = time.monotonic(), {}, {}, 0
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    bench, place = Bench(folder), os.getcwd()
    processes = repo.start_processes()
    os.chdir(bench.place)  # a run without --output-dir would be written to runs/ here
    for script in SCRIPTS:
        cases = bad_cases(script, bench)
        counts[script] = len(cases)
        for case in cases:
            try:
                rows.setdefault((case.flag, given(case), bench.told(script, case, processes)), []).append(script)
            except Exception as exception:
                wrong += 1
                print(
                    f"{script} {case.flag} ({case.given}): {type(exception).__name__}: {exception}"[:1000], flush=True
                )
    os.chdir(place)
    shutil.rmtree(folder)
    names = {"evaluate": "evaluate.py score", "judge": "evaluate.py judge"}
    each = ", ".join(f"{count} of {names.get(script, f'{script}.py')}" for script, count in counts.items())
    text = ["# Bad inputs", "", INTRODUCTION.format(total=sum(counts.values()), each=each), ""]
    text += ["| flag | given | scripts | told |", "| --- | --- | --- | --- |"]
    for (flag, what, line), scripts in sorted(rows.items(), key=lambda item: item[0][0]):
        if len(line) > 300:  # between words
            line = f"{line[:200].rpartition(' ')[0]} ... {line[-80:].partition(' ')[2]}"
        cells = [f"`{flag}`" if flag else "", what, ", ".join(scripts), f"`{line}`"]
        text.append("| " + " | ".join(cell.replace("|", "\\|").replace("``", "") for cell in cells) + " |")
    (ROOT / "docs" / "bad_inputs.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    seconds = time.monotonic() - begun
    print(f"{sum(counts.values())} bad inputs, {wrong} not told in one line: {each}; {seconds:.0f} s")
    return wrong


INTRODUCTION = """\
Made by `python tests/strain.py bad-inputs`: {total} bad inputs, generated from the fields of each script's `Args` and
given to its `main()` in one process ({each}). Each
ended with status 2 and this one line on standard error, and wrote nothing. `TMP` stands for the folder of the tiny
checkpoints and data. Lines are cut to 300 characters here, to 2,000 by the scripts."""


# ======================================================================================================================
# Full disks
# ======================================================================================================================
@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[typing.Callable[[str], None]]:
    """A disk of so many bytes in a folder. Yields a function that mounts it again with other options."""

    def mount(*options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", *options, str(folder)], check=True, capture_output=True)

    mount(f"size={size}", "tmpfs")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(folder: Path, size: int, attempt: typing.Callable, whole: Path) -> str:
    """A run on a disk of `size` bytes; attempt(output_dir, resume) runs the script and returns its Outcome.

    Where the disk is too small the run must end in one line and leave whole checkpoints only, and with room again it
    must go on to the end of the run in `whole`, bit for bit. Returns how it went.
    """
    with small_disk(folder, size) as remount:
        outcome = attempt(folder / "run", False)
        if outcome.code == 0:
            return "room enough"
        assert len(outcome.errors) == 1 and "Traceback" not in outcome.err, outcome.err
        assert re.search("No space left|os error 28", outcome.errors[0]), outcome.errors
        for place in (folder / "run").glob("checkpoints/*"):
            subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=place, check=True)
        remount("size=1g")
        outcome = attempt(folder / "run", True)
        assert outcome.code == 0, outcome.err
        compare(whole, folder / "run")
        return "resumed" if f"from {folder}" in outcome.err else "begun again"


DISK_RUNS = {  # each with a checkpoint every second step
    "repo": dict(total_episodes=64, eval_every=2),
    "ppo_lagrange": dict(total_episodes=64, eval_every=2),
    "sacpo": dict(merge_q=0.5),
    "preference_models": dict(),
}


def fill_disks(script: str, sizes: int, bench: Bench, folder: Path, processes) -> Iterator[tuple[int, str]]:
    """(bytes, how it went) of runs of a script on the tiny files, on so many disks of sizes up to what it takes."""

    def attempt(output_dir: Path, resume: bool):
        flags = dict(output_dir=output_dir, save_every=2, resume=resume or None, **DISK_RUNS[script])
        return run_main(SCRIPTS[script][0], processes, bench.words(script, Case("", "", flags)))

    outcome = attempt(folder / "whole", False)
    assert outcome.code == 0, outcome.err
    needed = sum(len(content) + 2**12 for content in contents(folder / "whole").values())
    (folder / "disk").mkdir()
    for i in range(1, sizes + 1):
        size = 2**12 * (needed * i // (sizes * 2**12))  # whole pages
        yield size, fill_disk(folder / "disk", max(size, 2**13), attempt, folder / "whole")


def report_disk(sizes: int) -> None:
    processes = repo.start_processes()
    for script in DISK_RUNS:
        folder, begun = Path(tempfile.mkdtemp(prefix="disk-")), time.monotonic()
        bench = Bench(folder / "files")
        ways = [way for _, way in fill_disks(script, sizes, bench, folder, processes)]
        shutil.rmtree(folder)
        told = ", ".join(f"{ways.count(way)} {way}" for way in sorted(set(ways)))
        print(f"{script}.py: {sizes} disks of different sizes: {told}; {time.monotonic() - begun:.0f} s", flush=True)


# ======================================================================================================================
# A long run
# ======================================================================================================================
def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def slope(points: list[tuple[float, float]]) -> float:
    """Slope of the line of least squares through points (x, y)."""
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)


def memory(iterations: int) -> list[tuple[float, float]]:
    """(iteration, resident MiB) about once a second of a run of repo.py, without evaluations between start and end."""
    folder, points = Path(tempfile.mkdtemp(prefix="memory-")), []
    words = ["--total-episodes", 4 * iterations, "--batch-size", 4, "--micro-batch-size", 4, "--max-new-tokens", 8]
    words += ["--eval-every", 0, "--eval-size", 16, "--dtype", "float32", "--output-dir", folder / "run"]
    process = start([ROOT / "repo.py", *words], stderr=(folder / "bar").open("w"))  # a pipe would fill
    metrics, lines, place = folder / "run" / "metrics.jsonl", 0, 0
    while process.poll() is None:
        time.sleep(1)
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(place)
                lines, place = lines + file.read().count(b"\n"), file.tell()
        if 0 < lines < iterations and process.poll() is None:
            points.append((lines, resident(process.pid)))
    outcome = finish(process)
    assert outcome.code == 0, (folder / "bar").read_text(encoding="utf-8")
    shutil.rmtree(folder)
    return points


def report_memory(iterations: int) -> None:
    begun = time.monotonic()
    points = memory(iterations)
    warm = [point for point in points if point[0] >= 0.05 * iterations]
    print(
        f"{iterations} iterations: {warm[0][1]:.0f} MiB after 5%, {warm[-1][1]:.0f} at the end, at most "
        f"{max(value for _, value in warm):.0f}; slope {1000 * slope(warm):+.2f} MiB per 1,000 iterations; "
        f"{time.monotonic() - begun:.0f} s"
    )


def main() -> int:
    args = tyro.cli(Args)
    if args.part == "bad-inputs":
        return int(report_bad_inputs() > 0)
    if args.part == "disk":
        report_disk(args.sizes)
    else:
        report_memory(args.iterations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
