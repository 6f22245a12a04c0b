"""Under strain: bad inputs of every flag, full disks, read-only places, data that change, checkpoints from strangers.

Short forms of the parts of strain.py, whose figures stand in docs/reliability.md.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import strain
import tiny
import torch
from helpers import ROOT, changed, command, contents, finish, read_lines, run_main, start
from kills import compare
from safetensors.torch import load_file
from test_resume import RUNS, cut_off, resume, sacpo_defaults, sign, whole  # noqa: F401
from transformers import AutoTokenizer

import evaluate
import ppo_lagrange
import preference_models
import repo
import sacpo

TRAINING = {"repo": repo, "ppo_lagrange": ppo_lagrange, "preference_models": preference_models, "sacpo": sacpo}


def mounts() -> bool:
    """Whether a disk can be mounted here: needed by the continuous tests, asked of nobody else."""
    if os.environ.get("CI") == "true":
        return True
    place = tempfile.mkdtemp()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", place], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["umount", place], check=True)
    os.rmdir(place)
    return done.returncode == 0


needs_mount = pytest.mark.skipif(not mounts(), reason="no right to mount a tmpfs")


# ---- Bad inputs


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench, place = strain.Bench(tmp_path_factory.mktemp("bench")), os.getcwd()
    os.chdir(bench.place)
    yield bench
    os.chdir(place)


@pytest.mark.parametrize("script", strain.SCRIPTS)
def test_bad_inputs_of_every_flag(bench, processes, script):
    """A tenth of them, and one of each flag at least; `python tests/strain.py bad-inputs` tries all."""
    cases = strain.bad_cases(script, bench)
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(strain.SCRIPTS[script][1])}
    chance, told = random.Random(script), []
    for flag in sorted({case.flag for case in cases} | fields):
        mine = [case for case in cases if case.flag == flag and case.given != "128 KiB, and a prompt"]  # 10 s
        told += [bench.told(script, case, processes) for case in chance.sample(mine, max(1, len(mine) // 12))]
    assert len(set(told)) > len(told) / 2  # the lines say what is wrong


def test_the_page_of_bad_inputs_names_every_flag():
    text = (ROOT / "docs" / "bad_inputs.md").read_text(encoding="utf-8")
    for script, (_, cls) in strain.SCRIPTS.items():
        rows = [line for line in text.splitlines() if f" {script}" in line]
        for field in dataclasses.fields(cls):
            assert any(f"| `--{field.name.replace('_', '-')}` |" in row for row in rows), (script, field.name)


def test_an_enormous_line_is_cut_and_control_characters_are_escaped(processes, capsys):
    for script in (*TRAINING.values(), evaluate):
        with changed(script, shut_down=lambda: None), pytest.raises(SystemExit):
            script.fail("x" * 10_000 + " a\x1b[2J\u202eb\nc \ud800 💣")
        line = capsys.readouterr().err
        assert line.isascii() is False and len(line) < 2100 and line.endswith(" a\\x1b[2J\\u202eb c \\ud800 💣\n")


# ---- Full disks


@needs_mount
@pytest.mark.parametrize("script", ["repo", "sacpo", "preference_models"])
def test_disks_that_fill_up(tmp_path, processes, script):
    """Each run ends in one line and, with room again, goes on to the end of one that never lacked it."""
    bench = strain.Bench(tmp_path / "files")
    ways = dict(strain.fill_disks(script, 3 if script == "repo" else 2, bench, tmp_path, processes))
    assert set(ways.values()) >= ({"resumed", "begun again"} if script == "repo" else {"resumed"}), ways


@needs_mount
@pytest.mark.parametrize("function", ["append_json", "save_model", "write_json", "save_checkpoint"])
def test_a_disk_that_is_full_at_a_bad_moment(run, whole, tmp_path, function):  # noqa: F811
    """Whatever is written next does not fit: a log, the model, the summary, a checkpoint."""
    disk, called, original = tmp_path / "disk", [], getattr(repo, function)
    disk.mkdir()

    def fill(*args):
        called.append(1)
        if len(called) == dict(append_json=4, write_json=4).get(function, 1):
            with (disk / "ballast").open("wb") as file:
                file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        return original(*args)

    with strain.small_disk(disk, 2**23):
        with changed(repo, **{function: fill}):
            outcome = run(repo, output_dir=disk / "run", save_every=2, **RUNS["repo"][1])
        assert outcome.code == 2 and len(outcome.errors) == 1 and "Traceback" not in outcome.err, outcome
        assert re.search("No space left|os error 28", outcome.errors[0])
        assert not (disk / "run" / "summary.json").exists()
        (disk / "ballast").unlink()
        assert resume(run, "repo", disk / "run").code == 0
        compare(whole("repo"), disk / "run")


@needs_mount
def test_a_full_disk_ends_both_of_two_processes(defaults, tmp_path):
    """Rank 0 alone writes logs: the other must not wait for it."""
    flags = defaults["repo"] | dict(output_dir=tmp_path / "disk" / "run", total_episodes=16000)
    (tmp_path / "disk").mkdir()
    with strain.small_disk(tmp_path / "disk", 2**16):
        outcome = finish(start([ROOT / "repo.py", *command(**flags)], 2), seconds=100)
    assert outcome.code == 1 and len(outcome.errors) == 1 and "No space left" in outcome.errors[0], outcome.err


def test_what_tensorboards_thread_cannot_write_is_told_once(run, tmp_path, monkeypatch):
    """Its own traceback would be a second voice; errors of another kind keep theirs."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, []

    def fail_later(self, data):
        calls.append(1)
        if len(calls) > 30:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fail_later)
    outcome = run(repo, output_dir=tmp_path / "run")
    assert outcome.code == 2 and len(outcome.errors) == 1 and "No space left" in outcome.errors[0]
    assert "Traceback" not in outcome.err
    shown = []
    with changed(threading, __excepthook__=lambda thread: shown.append(thread.exc_type)):
        for error in (OSError, PermissionError, ValueError):
            failing = threading.Thread(target=lambda error=error: (_ for _ in ()).throw(error()))
            failing.start()
            failing.join()
    assert shown == [ValueError]


# ---- Places that cannot be written


@needs_mount
@pytest.mark.parametrize("name", ["repo", "dpo"])
def test_data_on_a_read_only_disk(run, whole, files, tmp_path, name):  # noqa: F811
    """Nothing is written beside data or models."""
    script, flags = RUNS[name]
    with strain.small_disk(tmp_path, 2**26) as remount:
        (tmp_path / "out").mkdir()
        with strain.small_disk(tmp_path / "out", 2**26):
            shutil.copytree(files.policy, tmp_path / "policy")
            for path in (files.train, files.test):
                (tmp_path / path.stem).mkdir()
                shutil.copy(path, tmp_path / path.stem / "data.jsonl")
            remount("ro")
            flags = flags | dict(dataset=tmp_path / "train", eval_dataset=tmp_path / "test")
            out = tmp_path / "out" / "run"
            outcome = run(script, model=tmp_path / "policy", output_dir=out, save_every=2, **flags)
            assert outcome.code == 0, outcome.err
            result = "stage2" if name == "dpo" else "model"
            model = load_file(out / result / "model.safetensors")
            expected = load_file(whole(name) / result / "model.safetensors")
            assert all(torch.equal(model[key], expected[key]) for key in expected)


@needs_mount
@pytest.mark.parametrize("script", [*TRAINING, "evaluate"])
def test_an_output_directory_on_a_read_only_disk(bench, processes, tmp_path, script):
    with strain.small_disk(tmp_path, 2**16) as remount:
        remount("ro")
        changes = dict(output_dir=tmp_path / "runs" / "one")
        line = bench.told(script, strain.Case("--output-dir", "read-only", changes), processes)
        assert f"--output-dir {tmp_path}" in line


# ---- Data that change


@pytest.fixture
def own_data(files, tmp_path) -> dict[str, Path]:
    copies = {"dataset": files.train, "eval_dataset": files.test}
    return {flag: Path(shutil.copy(path, tmp_path)) for flag, path in copies.items()}


@pytest.mark.parametrize("name", ["repo", "reward", "dpo"])
def test_data_that_change_during_a_run_change_nothing(run, whole, tmp_path, own_data, name):  # noqa: F811
    """They are read once, before the first step."""
    script, flags = RUNS[name]
    clip_gradients = script.clip_gradients

    def clip(*args):
        own_data["dataset"].write_text("torn")
        own_data["eval_dataset"].unlink(missing_ok=True)
        return clip_gradients(*args)

    with changed(script, clip_gradients=clip):
        outcome = run(script, output_dir=tmp_path / "run", save_every=2, **flags | own_data)
    assert outcome.code == 0, outcome.err
    compare(whole(name), tmp_path / "run")


@pytest.mark.parametrize(
    "name, flag", [("repo", "dataset"), ("repo", "eval_dataset"), ("reward", "eval_dataset"), ("dpo", "dataset")]
)
def test_data_that_changed_are_refused_by_resume(run, tmp_path, own_data, name, flag):
    folder = tmp_path / "run"
    cut_off(run, name, folder, 7 if name == "repo" else 4, **own_data)
    rows = read_lines(own_data[flag])
    before, original = contents(folder), own_data[flag].read_bytes()
    for change in (rows[:-1], rows[::-1], [rows[0] | dict(prompt="ba be?", response_0="ba"), *rows[1:]]):
        tiny.write_rows(own_data[flag], change)
        outcome = resume(run, name, folder, **own_data)
        assert outcome.code == 2 and len(outcome.errors) == 1, outcome
        assert f"--{flag.replace('_', '-')} {own_data[flag]} holds other data" in outcome.errors[0]
        assert contents(folder) == before
    own_data[flag].write_bytes(original)  # the same content at another time
    assert resume(run, name, folder, **own_data).code == 0


def test_supervised_data_that_changed_are_refused_by_resume(run, tmp_path):
    rows = [{"prompt": row["prompt"], "response": row["response_0"]} for row in tiny.make_pairs(20, seed=5)]
    data = tiny.write_rows(tmp_path / "ptx.jsonl", rows)
    cut_off(run, "repo", tmp_path / "run", 7, ptx_dataset=data)
    tiny.write_rows(data, rows[1:])
    outcome = resume(run, "repo", tmp_path / "run", ptx_dataset=data)
    assert outcome.code == 2 and f"--ptx-dataset {data} holds other data" in outcome.errors[0]


# ---- Checkpoints of a run that are not what it wrote


def test_one_flipped_bit_is_not_resumed(run, tmp_path):
    """Whichever it is, of any file of the checkpoint."""
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 3 * 4 + 1, total_episodes=80)
    newest, chance = folder / "checkpoints" / "00000004", random.Random(0)
    args = repo.Args(**json.loads((folder / "args.json").read_text()))
    assert repo.find_checkpoint(folder, args, torch.float32)["checkpoint"] == str(newest)
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for bit in chance.sample(range(8 * len(content)), 20):
            changed_content = bytearray(content)
            changed_content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed_content)
            assert repo.find_checkpoint(folder, args, torch.float32)["checkpoint"].endswith("00000002"), (path, bit)
        path.write_bytes(content)


def test_a_stranger_cannot_reach_files_outside_by_a_run(run, tmp_path):
    """Names with .. in state.json, and links in place of logs, folders and files of a checkpoint."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    cut_off(run, "repo", folder, 7)
    shutil.copytree(folder, tmp_path / "kept")
    outside.mkdir()
    (outside / "file").write_text("mine " * 1000)
    before = contents(outside)
    newest = folder / "checkpoints" / "00000002"

    def names():
        state = json.loads((newest / "state.json").read_text())
        state["logs"] |= {"../outside/file": 1, str(outside / "file"): 2}
        (newest / "state.json").write_text(json.dumps(state))
        sign(newest)

    def link(*path):
        def replace():
            place = folder.joinpath(*path)
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
            place.symlink_to(outside if path[-1] in ("tensorboard", "model.part", "00000002") else outside / "file")

        return replace

    links = [("metrics.jsonl",), ("eval.jsonl",), ("tensorboard",), ("model.part",), ("args.json",), ("summary.json",)]
    links += [("tensorboard", "events.out.1"), ("checkpoints", "00000002"), ("checkpoints", "00000002", "state.json")]
    for change in (names, *(link(*path) for path in links)):
        change()
        outcome = resume(run, "repo", folder)
        refused = outcome.code == 2 and len(outcome.errors) == 1 and outcome.err.count("\n") == 1
        passed_over = outcome.code == 0 and "passed over the checkpoint" in outcome.err
        assert refused or passed_over, (change, outcome)
        assert contents(outside) == before
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)


def test_a_signed_state_that_no_run_wrote(run, tmp_path):
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 7)
    newest = folder / "checkpoints" / "00000002"
    args = repo.Args(**json.loads((folder / "args.json").read_text()))
    assert repo.find_checkpoint(folder, args, torch.float32)
    written = (newest / "state.json").read_text()
    for change in (dict(logs=3), dict(logs={"eval.jsonl": "many"}), dict(logs=[]), dict(state=[]), dict(state={})):
        (newest / "state.json").write_text(written)
        tiny.edit_json(newest / "state.json", **change)
        sign(newest)
        assert repo.find_checkpoint(folder, args, torch.float32) == {}, change


# ---- Models from strangers


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


class Runs:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def stranger(content: str, folder: Path, source: Path, mark: Path) -> None:
    """Make a checkpoint that is not what it looks like; code of its own would leave the mark."""
    tiny.copy_model(source, folder)
    weights = folder / "model.safetensors"
    code = f"open({str(mark)!r}, 'w')\n"
    if content == "a pickle":
        torch.save(Runs(mark), folder / "pytorch_model.bin")
        weights.unlink()
    elif content == "a pickle with the name of safetensors":
        torch.save(Runs(mark), weights)
    elif content == "an index of a pickle":
        torch.save(Runs(mark), folder / "model-00001-of-00001.bin")
        weights.unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif content == "code of an unknown model":
        (folder / "code.py").write_text(code)
        names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
        tiny.edit_json(folder / "config.json", auto_map=names, model_type="own")
    elif content == "code of a tokenizer":
        (folder / "code.py").write_text(code)
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]}}
        tiny.edit_json(folder / "tokenizer_config.json", **own)
    elif content == "a link to a folder":
        (folder / "more").symlink_to(mark.parent)
    elif content.startswith("a link"):
        name = "config.json" if "configuration" in content else "model.safetensors"
        shutil.move(folder / name, mark.with_name(f"{folder.name}-{name}"))
        (folder / name).symlink_to(mark.with_name(f"{folder.name}-{name}"))
    elif content == "an index that leads out":
        shutil.move(weights, folder.parent / "outside.safetensors")
        names = dict.fromkeys(load_file(folder.parent / "outside.safetensors"), "../outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    elif content == "a header without end":
        weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    elif content == "a tensor without end":
        entry = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
        weights.write_bytes(header(json.dumps({"lm_head.weight": entry}).encode()) + bytes(8))
    elif content == "a model without end":
        tiny.edit_json(folder / "config.json", hidden_size=2 * 10**9, head_dim=10**9)
    elif content == "a configuration of other types":
        tiny.edit_json(folder / "config.json", hidden_size="large", num_hidden_layers=[2])


CONTENTS = [
    "a pickle",
    "a pickle with the name of safetensors",
    "an index of a pickle",
    "code of an unknown model",
    "code of a tokenizer",
    "a link to weights",
    "a link to a configuration",
    "a link to a folder",
    "an index that leads out",
    "a header without end",
    "a tensor without end",
    "a model without end",
    "a configuration of other types",
]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_model_from_a_stranger(bench, processes, tmp_path, content):
    """Refused in one line as every model a script takes, and nothing of it is run."""
    for script, names in (
        ("repo", ("model", "reward_model", "cost_critic")),
        ("sacpo", ("model",)),
        ("preference_models", ("model",)),
        ("evaluate", ("cost_model",)),
    ):
        for name in names:
            source = {"reward_model": bench.reward, "cost_model": bench.cost, "cost_critic": bench.cost}
            source = source.get(name, bench.policy)
            folder = tmp_path / f"{script}-{name}" / "model"
            folder.parent.mkdir()
            stranger(content, folder, source, tmp_path / "ran")
            line = bench.told(script, strain.Case(f"--{name}", content, {name: folder}), processes)
            assert str(folder) in line
            assert not (tmp_path / "ran").exists()
    folder = tmp_path / "evaluate-models" / "model"  # some are found out when the model is read, after others
    stranger(content, folder, bench.policy, tmp_path / "ran")
    changes = dict(models=f"ours={folder}", output_dir=tmp_path / "scores")
    outcome = run_main(evaluate, processes, bench.words("evaluate", strain.Case("", "", changes)))
    assert outcome.code == 2 and len(outcome.errors) == 1 and str(folder) in outcome.errors[0], outcome
    assert "Traceback" not in outcome.err and not (tmp_path / "ran").exists()


def test_links_into_the_cache_of_the_hub_are_followed(bench, processes, tmp_path):
    """There a snapshot's files are links to blobs; a link to what is beside the cache is refused, too."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    tiny.copy_model(bench.policy, snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    repo.locate(str(snapshot), "model", "--model")
    (snapshot / "more.json").symlink_to(bench.folder / "file")
    with pytest.raises(repo.UserError, match=r"more\.json is a link that leads out of the folder"):
        repo.locate(str(snapshot), "model", "--model")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{% for m in messages %}{{ lipsum.__globals__['os'].popen('touch MARK').read() }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% set x = messages.append(1) %}x",
    ],
    ids=range(7),
)
def test_a_chat_template_is_kept_in_its_sandbox(bench, processes, tmp_path, template):
    """It reaches no attributes, files or endless ranges; what it tries is told in one line."""
    folder = tiny.copy_model(bench.policy, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template.replace("MARK", str(tmp_path / "mark"))
    tokenizer.save_pretrained(folder)
    changes = dict(model=folder, prompt_template="chat")
    line = bench.told("repo", strain.Case("--prompt-template", "hostile", changes), processes)
    assert "chat template fails" in line
    assert not (tmp_path / "mark").exists()


# ---- A long run


def test_the_slope_of_memory():
    assert strain.slope([(0, 1.0), (1, 3.0), (2, 5.0)]) == pytest.approx(2.0)
    assert 1 < strain.resident(os.getpid()) < 100_000
