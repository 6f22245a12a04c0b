"""Errors and files that all commands share."""

import fcntl
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

ANSWER = {"model", "index", "prompt", "response", "reward", "cost", "length", "finished"}  # keys of responses.jsonl


def fail(message: str) -> NoReturn:
    """End the command with one line on standard error and exit status 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # rank 0 tells it, and torchrun then ends the other processes
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        os._exit(2)  # a clean exit would wait for the other processes
    sys.exit(2)


def check_ranges(args, above_zero: str, zero_or_more: str) -> None:
    """Refuse numbers out of range; both lists are names of fields, separated by blanks."""
    for name in above_zero.split() + zero_or_more.split():
        value, least = getattr(args, name), "above 0" if name in above_zero.split() else "0 or more"
        if not (0 <= value < math.inf) or (value == 0 and least == "above 0"):
            fail(f"--{name.replace('_', '-')} is {value}; it must be {least}")


def output_folder(args) -> Path:
    """--output-dir, or a new directory below runs/."""
    return Path(args.output_dir or f"runs/{args.exp_name}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}")


def write_json(path: Path, value) -> None:
    """Written beside and renamed, so a kill leaves a whole file or none."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def append_json(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path, keys: set[str]) -> list[dict]:
    """Rows of a jsonl file that hold all `keys`, without a last line that a kill cut short."""
    content, rows = path.read_bytes() if path.is_file() else b"", []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            missing = keys - set(rows[-1])
        except (ValueError, TypeError):
            missing = keys
        if missing:
            fail(f"{path}, line {number} does not hold {', '.join(sorted(missing))}; take the line out")
    return rows


def as_text(prompt: str | list[dict]) -> str:
    """A prompt as people and judges read it: several messages are lines "role: content"."""
    return prompt if isinstance(prompt, str) else "\n".join("{role}: {content}".format(**turn) for turn in prompt)


def read_answers(path: Path) -> dict[str, dict[int, dict]]:
    """Rows of responses.jsonl by model and prompt index; a prompt of several messages as text."""
    answers: dict[str, dict[int, dict]] = {}
    for row in read_rows(path, ANSWER):
        row["prompt"] = as_text(row["prompt"])
        answers.setdefault(row["model"], {})[row["index"]] = row
    return answers


def earlier_settings(folder: Path, settings: dict, free: set[str]) -> dict | None:
    """args.json of a directory that goes on, None for a new one. Settings outside of `free` must be the same."""
    if not (folder / "args.json").exists():
        if any((folder / name).exists() for name in ("responses.jsonl", "verdicts.jsonl", "metrics.jsonl")):
            fail(f"--output-dir {folder} holds results, but no args.json; choose another directory")
        return None
    before = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    if before.get("command") != settings["command"]:
        fail(f"--output-dir {folder} holds the run of another command; choose another directory")
    for name, value in settings.items():
        if name not in free and before.get(name) != value:
            flag, made = f"--{name.replace('_', '-')}", f"--output-dir {folder} was made with {before.get(name)}"
            fail(f"{flag} is {value}, but {made}; choose another directory")
    return before


def open_run(folder: Path, settings: dict, rows: str):
    """Make the output directory or go on in it: write args.json and cut off a torn last line of the file of rows. It
    is returned, locked until it is closed: a second process would make every row again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / rows).open("ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--output-dir {folder} is in use by another process; let it end, or choose another directory")
    except OSError as exception:
        fail(f"--output-dir {folder} cannot be written: {exception}")
    write_json(folder / "args.json", settings)
    os.ftruncate(file.fileno(), (folder / rows).read_bytes().rfind(b"\n") + 1)
    return file
