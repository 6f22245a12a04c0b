"""Runs that are cut off go on to the same end: checkpoints, resuming, logs, refusals, signals, kills.

Most runs are cut off by an exception in this process, which leaves the files that a kill would leave there."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, changed, command, contents, finish, read_lines, read_summary, start
from helpers import without_times as timeless
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import ppo_lagrange
import preference_models
import repo
import repo_group
import sacpo

RUNS = {  # each with a checkpoint every second step of four, five or eight
    "repo": (repo, dict(total_episodes=64, eval_every=2)),
    "lagrange": (ppo_lagrange, dict(total_episodes=64, update_epochs=2)),
    "group": (repo_group, dict(total_episodes=64, update_epochs=2)),
    "reward": (preference_models, dict()),
    "dpo": (sacpo, dict(merge_q=0.5, train_size=32)),
    "kto": (sacpo, dict(loss="kto", train_size=32)),
}
ONE_EACH = pytest.mark.parametrize("name", ["repo", "lagrange", "group", "reward", "dpo"])
# Calls of clip_grad_norm_, of which each of the three models of repo.py and ppo_lagrange.py makes one per update
CUTS = [("repo", 2), ("repo", 12), ("lagrange", 19), ("reward", 4), ("dpo", 2), ("dpo", 4), ("dpo", 8), ("kto", 7)]
CUTS += [("group", 6)]  # of one model


class CutOff(BaseException):
    """Ends a run at once, as a kill does."""


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """For each of RUNS its folder, never cut off."""
    folder, folders = tmp_path_factory.mktemp("whole"), {}

    def get(name):
        if name not in folders:
            script, flags = RUNS[name]
            folders[name] = folder / name
            assert run(script, output_dir=folder / name, save_every=2, **flags).code == 0
        return folders[name]

    return get


def cut_off(run, name, folder, call, module=nn.utils, function="clip_grad_norm_", before=lambda *_: None, **flags):
    """A run of RUNS that ends in a call of a function."""
    script, settings = RUNS[name]
    calls, original = [], getattr(module, function)

    def until_then(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            before(*args)
            raise CutOff
        return original(*args, **kwargs)

    with changed(module, **{function: until_then}), pytest.raises(CutOff):
        run(script, **dict(output_dir=folder, save_every=2) | settings | flags)


def resume(run, name, folder, **flags):
    script, settings = RUNS[name]
    return run(script, **dict(output_dir=folder, save_every=2, resume=True) | settings | flags)


def compare(whole: Path, other: Path) -> None:
    """Hold two finished runs to each other: everything bit for bit, but for times and the order of a file's tensors."""
    one, two = ({name for name in contents(folder) if "tensorboard" not in name} for folder in (whole, other))
    assert one == two
    for name in one:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(whole / name), load_file(other / name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
        elif name == "metrics.jsonl":
            ours, theirs = (read_lines(folder / name) for folder in (whole, other))
            assert list(map(timeless, ours)) == list(map(timeless, theirs))
        elif name == "summary.json":
            assert timeless(read_summary(whole)) == timeless(read_summary(other))
        elif not name.endswith(("args.json", "state.json", "model.safetensors.index.json")):
            assert (whole / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("name, call", CUTS)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(run, whole, tmp_path, name, call):
    cut_off(run, name, tmp_path / "run", call)
    assert resume(run, name, tmp_path / "run").code == 0
    compare(whole(name), tmp_path / "run")


@pytest.mark.parametrize("name", ["repo", "reward", "dpo"])
def test_a_run_that_was_cut_off_while_it_saved(run, whole, tmp_path, name):
    """A half-written checkpoint is neither used nor kept. The same for the model at the end."""

    def torn(tensors):
        beside = next((tmp_path / "run" / "checkpoints").glob("*.part"))
        (beside / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"torn")

    script = RUNS[name][0]
    cut_off(run, name, tmp_path / "run", 2, script.dcp, "save", torn)
    cut_off(run, name, tmp_path / "run", 1, script, "save_model", resume=True)
    assert resume(run, name, tmp_path / "run").code == 0
    compare(whole(name), tmp_path / "run")


@ONE_EACH
def test_a_process_that_was_killed(run, forks, defaults, whole, tmp_path, name):
    (script, flags), folder = RUNS[name], tmp_path / "run"
    words = command(**defaults[script.__name__] | flags | dict(output_dir=folder, save_every=2))
    process = forks.start([script.__file__, *words])
    process.wait_until(lambda: any((folder / "checkpoints").glob("[0-9]*[0-9]")))
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0].code == -signal.SIGKILL and not (folder / "summary.json").exists()
    assert resume(run, name, folder).code == 0
    compare(whole(name), folder)


def test_another_number_of_processes_goes_on(run, forks, defaults, whole, tmp_path):
    """One process begins and two go on; two begin and one goes on: as without a break."""
    words = [ROOT / "repo.py", *command(**defaults["repo"] | RUNS["repo"][1] | dict(save_every=2, resume=True))]
    cut_off(run, "repo", tmp_path / "more", 3 * 3)
    more, fewer = (forks.start([*words, "--output-dir", tmp_path / name], 2) for name in ("more", "fewer"))
    fewer.wait_until((tmp_path / "fewer" / "checkpoints" / "00000002").exists)
    fewer.send_signal(signal.SIGKILL)
    assert [outcome.code for outcome in more.finish()] == [0, 0]
    assert not (tmp_path / "fewer" / "summary.json").exists()
    place = tmp_path / "fewer" / "checkpoints" / "00000002"
    assert len(list(place.glob("*.safetensors"))) == 2  # each rank writes its own
    assert resume(run, "repo", tmp_path / "fewer").code == 0
    expected = read_lines(whole("repo") / "metrics.jsonl")
    for name, count in (("more", 2), ("fewer", 1)):
        for line, other in zip(read_lines(tmp_path / name / "metrics.jsonl"), expected, strict=True):
            assert timeless(line) == pytest.approx(timeless(other), rel=1e-4, abs=1e-5)
        assert read_summary(tmp_path / name)["processes"] == count


def steps_of(folder) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@ONE_EACH
def test_signals_save_and_say_how_to_continue(run, forks, defaults, tmp_path, name):
    """Also without --save-every. SIGTERM and Ctrl-C by turns. Meanwhile nobody else may write into the directory."""
    script, number = RUNS[name][0], signal.SIGTERM if name in ("repo", "dpo") else signal.SIGINT
    flags = dict(output_dir=tmp_path / "run")
    flags |= dict(total_episodes=16000) if name in ("repo", "lagrange", "group") else dict(epochs=2000)
    process = forks.start([script.__file__, *command(**defaults[script.__name__] | flags)])
    process.wait_until(lambda: steps_of(tmp_path / "run") > 2)
    for more in (dict(), dict(resume=True)):
        outcome = run(script, **flags | more)
        assert outcome.code == 2 and len(outcome.errors) == 1 and "in use by another process" in outcome.errors[0]
    process.send_signal(number)
    outcome, steps = process.finish()[0], steps_of(tmp_path / "run")
    assert outcome.code == 128 + number, outcome.err
    line = [line for line in outcome.err.splitlines() if "stopped " in line]
    assert len(line) == 1 and f"--resume --output-dir {tmp_path / 'run'}" in line[0] and f" {steps};" in line[0]
    assert [int(place.name) for place in (tmp_path / "run" / "checkpoints").iterdir()] == [steps]
    log_metrics = script.log_metrics

    def signalled(*args):
        log_metrics(*args)
        if steps_of(tmp_path / "run") == steps + 1:  # a second signal would end the process at once
            os.kill(os.getpid(), signal.SIGTERM)

    with changed(script, log_metrics=signalled):  # it goes on, and stops again
        assert run(script, resume=True, **flags).code == 143
    assert steps_of(tmp_path / "run") == steps + 2


def test_torchrun_passes_a_signal_on(defaults, tmp_path):
    flags = defaults["repo"] | dict(output_dir=tmp_path / "run", total_episodes=16000)
    process = start([ROOT / "repo.py", *command(**flags)], 2)
    while steps_of(tmp_path / "run") < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process, seconds=60)
    assert outcome.code == 1 and outcome.err.count("stopped after iteration") == 1, outcome.err
    assert [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()] == [steps_of(tmp_path / "run")]


def test_logs_are_cut_back_to_the_checkpoint_and_times_add_up(run, tmp_path):
    """Each iteration stands once in metrics.jsonl, eval.jsonl and TensorBoard's events, whatever was repeated."""
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 3 * 3 + 1)  # iteration 3 is in the logs, the checkpoint is of iteration 2
    assert len(read_lines(folder / "metrics.jsonl")) == 3
    path = folder / "checkpoints" / "00000002" / "state.json"
    tiny.edit_json(path, seconds=json.loads(path.read_text())["seconds"] + 1000)
    assert resume(run, "repo", folder, save_every=1).code == 0
    assert [line["iteration"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["iteration"] for row in read_lines(folder / "eval.jsonl")] == [0] * 13 + [2] * 13 + [4] * 13
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    expected = [(line["iteration"], pytest.approx(line["lambda"])) for line in read_lines(folder / "metrics.jsonl")]
    assert [(event.step, event.value) for event in board.Scalars("safety/lambda")] == expected
    assert 1000 < read_summary(folder)["wall_seconds"] < 1100
    places = list((folder / "checkpoints").iterdir())
    assert {place.name for place in places} == {"00000003", "00000004"}  # the newest two
    assert {file.suffix for place in places for file in place.iterdir()} == {".safetensors", ".json"}


CHANGES = {  # of each script, flags that matter
    "repo": [dict(seed=2), dict(kl_coef=0.3), dict(total_episodes=80), dict(rectify="advantage")],
    "reward": [dict(kind="cost"), dict(learning_rate=0.1)],
    "dpo": [dict(loss="kto"), dict(stages="safe"), dict(merge_q=0.25)],
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_resume_finds(run, whole, tmp_path, name):
    """Nothing: the run starts. A finished run: that is said. Flags that matter and are others, other files: refused."""
    outcome = run(RUNS[name][0], resume=True)
    assert outcome.code == 2 and "--output-dir" in outcome.errors[0]
    before = contents(whole(name))
    outcome = resume(run, name, whole(name))
    assert outcome.code == 0 and "is finished" in outcome.err and contents(whole(name)) == before
    assert resume(run, name, tmp_path / "new" / "folder").code == 0
    compare(whole(name), tmp_path / "new" / "folder")
    cut_off(run, name, tmp_path / "run", 7 if name == "repo" else 4)
    before = contents(tmp_path / "run")
    for change in CHANGES[name]:
        outcome = resume(run, name, tmp_path / "run", **change)
        flag = "--" + next(iter(change)).replace("_", "-")
        assert outcome.code == 2 and len(outcome.errors) == 1 and flag in outcome.errors[0], outcome.err
    assert contents(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    outcome = resume(run, name, tmp_path / "other")
    assert outcome.code == 2 and len(outcome.errors) == 1 and str(tmp_path / "other") in outcome.errors[0]


def test_flags_that_do_not_matter_may_change(run, whole, tmp_path):
    cut_off(run, "repo", tmp_path / "run", 7)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    flags = dict(micro_batch_size=16, save_every=3, eval_every=0, gradient_checkpointing=True, cpu_offload=True)
    assert resume(run, "repo", tmp_path / "moved", **flags).code == 0
    one, other = (read_lines(folder / "metrics.jsonl") for folder in (whole("repo"), tmp_path / "moved"))
    for line, expected in zip(other, one, strict=True):
        assert timeless(line) == pytest.approx(timeless(expected), rel=1e-4, abs=1e-5)
