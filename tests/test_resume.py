"""Runs that are cut off go on to the same end: checkpoints, resuming, logs, refusals, SIGTERM, kills.

Most runs are cut off in this process by an exception, which leaves the files that a kill would leave there; real kills
of real processes are in kills.py, of which the last test is a short form.
"""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, changed, command, contents, finish, read_lines, read_summary, start, without_times
from kills import campaign, compare, wait_until
from safetensors import SafetensorError
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedModel

import ppo_lagrange
import preference_models
import repo
import sacpo

CUTS = {"repo": (2, 8, 12), "lagrange": (19,), "reward": (1, 4, 5), "dpo": (2, 4, 6, 8), "kto": (3, 7)}


class CutOff(BaseException):
    """Ends a run at once, as a kill does."""


RUNS = {  # each with a checkpoint every second step of four, five or eight
    "repo": (repo, dict(total_episodes=64, eval_every=2)),
    "lagrange": (ppo_lagrange, dict(total_episodes=64, update_epochs=2)),
    "reward": (preference_models, dict()),
    "dpo": (sacpo, dict(merge_q=0.5)),
    "kto": (sacpo, dict(loss="kto")),
}


@pytest.fixture(scope="module", autouse=True)
def sacpo_defaults(defaults):
    settings = {name: defaults["preference_models"][name] for name in ("model", "dataset", "eval_dataset", "dtype")}
    defaults["sacpo"] = settings | dict(eval_split="train", train_size=32, batch_size=8, micro_batch_size=4)
    yield
    del defaults["sacpo"]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """For each of RUNS its folder, never cut off, with a checkpoint every second step."""
    folder, folders = tmp_path_factory.mktemp("whole"), {}

    def get(name):
        if name not in folders:
            script, flags = RUNS[name]
            folders[name] = folder / name
            outcome = run(script, output_dir=folder / name, save_every=2, **flags)
            assert outcome.code == 0, outcome.err
        return folders[name]

    return get


def cut_off(run, name, folder, step, function="clip_gradients", **flags):
    """A run of RUNS in a new folder that ends in the `step`-th call of a function of the script."""
    script, settings = RUNS[name]
    calls, original = [], getattr(script, function)

    def until_then(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise CutOff
        return original(*args, **kwargs)

    with changed(script, **{function: until_then}), pytest.raises(CutOff):
        run(script, **(dict(output_dir=folder, save_every=2) | settings | flags))


def model_files(folder):
    """The files of a run's model but its card, which tells the command and the time."""
    return {name: content for name, content in contents(folder / "model").items() if name != "README.md"}


def resume(run, name, folder, **flags):
    script, settings = RUNS[name]
    return run(script, output_dir=folder, **(dict(save_every=2, resume=True) | settings | flags))


def sign(place: Path) -> None:
    """Make a changed checkpoint one whose files are those of its digests."""
    (place / "SHA256SUMS").write_text(repo.checksums(place))


@pytest.mark.parametrize(
    "name, step",  # each of the three models of the RL scripts calls clip_gradients once an update
    [(name, step) for name, steps in CUTS.items() for step in steps],
)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(run, whole, tmp_path, name, step):
    cut_off(run, name, tmp_path / "run", step)
    outcome = resume(run, name, tmp_path / "run")
    assert outcome.code == 0, outcome.err
    compare(whole(name), tmp_path / "run")
    one, other = (without_times(read_summary(folder)) for folder in (whole(name), tmp_path / "run"))
    assert one == other


@pytest.mark.parametrize("name, call", [("repo", 2), ("reward", 2), ("dpo", 2)])
def test_a_run_that_was_cut_off_while_it_saved(run, whole, tmp_path, name, call):
    """A half-written checkpoint is neither used nor kept."""
    script, flags = RUNS[name]
    calls, original = [], script.dcp.save

    def save(tensors, storage_writer):
        calls.append(1)
        if len(calls) == call:
            Path(storage_writer.path, "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"torn")
            raise CutOff
        original(tensors, storage_writer=storage_writer)

    with changed(script.dcp, save=save), pytest.raises(CutOff):
        run(script, output_dir=tmp_path / "run", save_every=2, **flags)
    assert any((tmp_path / "run" / "checkpoints").glob("*.part"))
    outcome = resume(run, name, tmp_path / "run")
    assert outcome.code == 0, outcome.err
    compare(whole(name), tmp_path / "run")


def test_a_run_whose_end_was_cut_off(run, whole, tmp_path):
    """After the last step: the evaluation, the model and the links are written again."""
    for name, function, call in (("repo", "save_model", 1), ("repo", "print_results", 1), ("dpo", "save_model", 3)):
        folder = tmp_path / f"{name}-{function}"
        cut_off(run, name, folder, call, function)
        (folder / "summary.json").unlink(missing_ok=True)  # written before the results are printed
        assert resume(run, name, folder).code == 0
        compare(whole(name), folder)


def test_checkpoints_hold_tensors_and_json_and_two_are_kept(run, tmp_path):
    assert run(repo, output_dir=tmp_path / "run", total_episodes=80, save_every=1).code == 0
    places = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [place.name for place in places] == ["00000004", "00000005"]
    for place in places:
        assert {file.suffix or file.name for file in place.iterdir()} == {".safetensors", ".json", "SHA256SUMS"}
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=place, check=True)
        state = json.loads((place / "state.json").read_text())
        assert state["state"]["iteration"] == int(place.name) and state["state"]["lambda"] > 1
    sizes = {path.name: path.stat().st_size for path in places[-1].glob("*.safetensors")}
    # Three models, each with the two moments of Adam, in float32.
    weights = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert 7 * weights < sum(sizes.values()) < 11 * weights


def test_large_checkpoints_come_in_several_files(run, whole, tmp_path):
    """The limit is lowered for the test; what is resumed does not depend on it."""
    source = (ROOT / "repo.py").read_text(encoding="utf-8")
    assert source.count("2**34") == 1
    namespace = dict(vars(repo))
    function = source[source.index("def save_checkpoint(") : source.index("def load_checkpoint(")]
    exec(function.replace("2**34", "2**14"), namespace)
    with changed(repo, save_checkpoint=namespace["save_checkpoint"]):
        cut_off(run, "repo", tmp_path / "run", 8)
    assert len(list((tmp_path / "run" / "checkpoints" / "00000002").glob("*.safetensors"))) > 2
    assert resume(run, "repo", tmp_path / "run").code == 0
    assert model_files(whole("repo")) == model_files(tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated", "zeros", "absent", "no state", "torn state", "no digests"])
def test_a_broken_checkpoint_is_passed_over_and_said(run, whole, tmp_path, damage):
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 3 * 4 + 1, total_episodes=80, save_every=1)
    newest, before = folder / "checkpoints" / "00000004", folder / "checkpoints" / "00000003"
    shards = next(newest.glob("*.safetensors"))
    if damage == "truncated":
        shards.write_bytes(shards.read_bytes()[:-1])
    elif damage == "zeros":
        shards.write_bytes(b"\0" * shards.stat().st_size)
    elif damage == "no digests":  # as an earlier version wrote it
        (newest / "SHA256SUMS").unlink()
    elif damage == "absent":
        shards.unlink()
    elif damage == "no state":
        (newest / "state.json").unlink()
    else:
        (newest / "state.json").write_text('{"files": {')
    outcome = resume(run, "repo", folder, total_episodes=80)
    assert outcome.code == 0, outcome.err
    assert f"passed over the checkpoint {newest}, which is not whole" in outcome.err
    assert f"from {before}" in outcome.err
    assert run(repo, output_dir=tmp_path / "whole", **RUNS["repo"][1] | dict(total_episodes=80)).code == 0
    for name in ("model/model.safetensors", "eval.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_without_a_whole_checkpoint_a_run_starts_again(run, whole, tmp_path):
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 3 * 2 + 1)
    for file in (folder / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"")
    outcome = resume(run, "repo", folder)
    assert outcome.code == 0 and "from the start" in outcome.err
    compare(whole("repo"), folder)


def test_logs_are_cut_back_to_the_checkpoint(run, tmp_path):
    """Each iteration stands once in metrics.jsonl, eval.jsonl and TensorBoard's events, whatever was repeated."""
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 3 * 3 + 1)  # iteration 3 is in the logs, the checkpoint is of iteration 2
    assert len(read_lines(folder / "metrics.jsonl")) == 3
    assert resume(run, "repo", folder).code == 0
    assert [line["iteration"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    rows = read_lines(folder / "eval.jsonl")
    assert [row["iteration"] for row in rows] == [0] * 13 + [2] * 13 + [4] * 13
    steps = []
    for events in (folder / "tensorboard").iterdir():
        accumulator = EventAccumulator(str(events)).Reload()
        steps += [event.step for event in accumulator.Scalars("reward")]
    assert sorted(steps) == [1, 2, 3, 4]


def test_wall_clock_time_adds_up(run, tmp_path):
    cut_off(run, "repo", tmp_path / "run", 3 * 3 + 1)
    state = tmp_path / "run" / "checkpoints" / "00000002" / "state.json"
    saved = json.loads(state.read_text())
    saved["state"]["seconds"] += 1000
    state.write_text(json.dumps(saved))
    sign(state.parent)
    assert resume(run, "repo", tmp_path / "run").code == 0
    assert 1000 < read_summary(tmp_path / "run")["wall_seconds"] < 1100


CHANGES = {  # of each script, flags that matter
    "repo": [dict(seed=2), dict(kl_coef=0.3), dict(total_episodes=80), dict(rectify="advantage"), dict(batch_size=8)],
    "reward": [dict(kind="cost"), dict(learning_rate=0.1), dict(max_length=300)],
    "dpo": [dict(loss="kto"), dict(stages="safe"), dict(merge_q=0.25), dict(beta=1.5)],
}


@pytest.mark.parametrize("name, change", [(name, change) for name, changes in CHANGES.items() for change in changes])
def test_changed_flags_that_matter_are_refused_by_name(run, tmp_path, name, change):
    folder = tmp_path / "run"
    cut_off(run, name, folder, 7 if name == "repo" else 4)
    before = contents(folder)
    outcome = resume(run, name, folder, **change)
    flag = "--" + next(iter(change)).replace("_", "-")
    assert outcome.code == 2 and len(outcome.errors) == 1 and flag in outcome.errors[0], outcome.errors
    assert contents(folder) == before


def test_flags_that_do_not_matter_may_change(run, whole, tmp_path):
    cut_off(run, "repo", tmp_path / "run", 7)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    flags = dict(micro_batch_size=16, save_every=3, eval_every=0, gradient_checkpointing=True, shard_over="world")
    assert resume(run, "repo", tmp_path / "moved", **flags).code == 0
    one, other = (read_lines(folder / "metrics.jsonl") for folder in (whole("repo"), tmp_path / "moved"))
    for line, expected in zip(other, one, strict=True):
        assert without_times(line) == pytest.approx(without_times(expected), rel=1e-4, abs=1e-5)


def test_another_compute_type_is_refused(run, tmp_path):
    """--dtype auto is the same flag on every machine, and may mean another type there."""
    cut_off(run, "repo", tmp_path / "run", 7, dtype="auto")
    state = tmp_path / "run" / "checkpoints" / "00000002" / "state.json"
    saved = json.loads(state.read_text())
    saved["state"]["dtype"] = "float64"
    state.write_text(json.dumps(saved))
    sign(state.parent)
    outcome = resume(run, "repo", tmp_path / "run", dtype="auto")
    assert outcome.code == 2 and "--dtype" in outcome.errors[0] and "float64" in outcome.errors[0]


@pytest.mark.parametrize("name", ["repo", "reward", "dpo"])
def test_what_resume_finds(run, whole, tmp_path, name):
    """Nothing: the run starts. A finished run: that is said, and nothing is touched. Other files: refused."""
    script, flags = RUNS[name]
    outcome = run(script, resume=True, **flags)
    assert outcome.code == 2 and "--output-dir" in outcome.errors[0]

    before = contents(whole(name))
    outcome = resume(run, name, whole(name))
    assert outcome.code == 0 and "is finished" in outcome.out and contents(whole(name)) == before

    assert resume(run, name, tmp_path / "new" / "folder").code == 0
    compare(whole(name), tmp_path / "new" / "folder")

    (tmp_path / "other" / "model").mkdir(parents=True)
    outcome = resume(run, name, tmp_path / "other")
    assert outcome.code == 2 and "(model)" in outcome.errors[0]

    cut_off(run, name, tmp_path / "run", 4)
    outcome = run(script, output_dir=tmp_path / "run", **flags)
    assert outcome.code == 2 and "--resume" in outcome.errors[0]


def test_a_run_that_was_killed_as_it_wrote_its_flags(run, whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text('{"exp_name": "re')
    assert resume(run, "repo", tmp_path / "run").code == 0
    compare(whole("repo"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["exp_name"] == "repo"


def test_a_checkpoint_whose_tensors_are_others_is_told_in_one_line(run, tmp_path):
    """Whole files, but not what the run needs, which only loading shows."""
    cut_off(run, "repo", tmp_path / "run", 7)
    shards = next((tmp_path / "run" / "checkpoints" / "00000002").glob("*.safetensors"))
    save_file({"other": torch.zeros(3)}, shards)
    sign(shards.parent)
    outcome = resume(run, "repo", tmp_path / "run")
    assert outcome.code == 2 and len(outcome.errors) == 1 and str(shards.parent) in outcome.errors[0]


@pytest.mark.parametrize("log", ["metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("change", ["absent", "cut short"])
def test_logs_that_lost_lines_are_refused(run, tmp_path, log, change):
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 7)
    path = folder / log
    path.unlink() if change == "absent" else path.write_bytes(path.read_bytes()[:300])
    before = contents(folder)
    outcome = resume(run, "repo", folder)
    assert outcome.code == 2 and len(outcome.errors) == 1 and str(path) in outcome.errors[0], outcome.errors
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_flags_that_are_not_what_a_run_writes_are_refused(run, tmp_path, text):
    cut_off(run, "repo", tmp_path / "run", 7)
    (tmp_path / "run" / "args.json").write_text(text)
    outcome = resume(run, "repo", tmp_path / "run")
    assert outcome.code == 2 and len(outcome.errors) == 1 and "args.json" in outcome.errors[0], outcome.errors


def test_a_resume_that_fails_leaves_the_logs(run, files, tmp_path):
    """Whatever is wrong with the models is found before anything is cut back."""
    cut_off(run, "repo", tmp_path / "run", 3 * 3 + 1)
    before = contents(tmp_path / "run")

    def refuse(*args):
        raise repo.UserError("no such model")

    with changed(repo, load_critic=refuse):
        assert resume(run, "repo", tmp_path / "run").code == 2
    assert contents(tmp_path / "run") == before


def test_the_run_of_another_script_is_refused(run, tmp_path):
    """Also where all flags that both have agree."""
    flags = dict(exp_name="same", lambda_lr=0.1)
    cut_off(run, "lagrange", tmp_path / "run", 19, **flags)
    outcome = run(repo, output_dir=tmp_path / "run", resume=True, **RUNS["lagrange"][1] | flags)
    assert outcome.code == 2 and "--constraint None, not response" in outcome.errors[0]


def test_a_checkpoint_before_the_first_update_changes_nothing(run, tmp_path):
    """States of an optimizer that has made no step are made for the checkpoint; their step count stays zero."""
    scores = []

    def first_not_finite(original):
        def score_responses(*args):
            result = original(*args)
            scores.append(1)
            return result * float("nan") if len(scores) == 3 else result  # after 2 of the evaluation before

        return score_responses

    models = []
    for save_every in (0, 1):
        scores.clear()
        folder = tmp_path / f"{save_every}"
        with changed(repo, score_responses=first_not_finite(repo.score_responses)):
            outcome = run(repo, output_dir=folder, total_episodes=48, save_every=save_every, eval_size=16)
        assert outcome.code == 0 and read_summary(folder)["skipped_updates"] == 1, outcome.err
        assert math.isnan(read_lines(folder / "metrics.jsonl")[0]["policy_grad_norm"] or math.nan)
        models.append((folder / "model" / "model.safetensors").read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("name", ["repo", "reward", "dpo"])
def test_sigterm_after_the_last_step_lets_the_run_end(run, whole, tmp_path, name):
    script, flags = RUNS[name]
    original = script.save_model

    def save_model(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        original(*args)

    with changed(script, save_model=save_model):
        outcome = run(script, output_dir=tmp_path / "run", save_every=2, **flags)
    if name == "dpo":  # its first stage is saved half-way: the run stops in the second
        assert outcome.code == 143 and "of stage 2" in outcome.err
        outcome = resume(run, name, tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert model_files(whole(name)) == model_files(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_broken_checkpoint_does_not_take_the_place_of_a_whole_one(run, tmp_path):
    """Iteration 4 is broken: once 3 is written, 2 and 3 are there beside it."""
    folder = tmp_path / "run"
    cut_off(run, "repo", folder, 3 * 4 + 1, total_episodes=80)
    (folder / "checkpoints" / "00000004" / "state.json").unlink()
    cut_off(run, "repo", folder, 3 + 1, total_episodes=80, save_every=1, resume=True)
    whole = [place for place in (folder / "checkpoints").iterdir() if (place / "state.json").exists()]
    assert sorted(place.name for place in whole) == ["00000002", "00000003"]
    assert resume(run, "repo", folder, total_episodes=80, save_every=1).code == 0
    assert sorted(place.name for place in (folder / "checkpoints").iterdir()) == ["00000004", "00000005"]


def test_a_full_disk_is_told_in_one_line(run, tmp_path):
    def save(*args, **kwargs):
        raise repo.dcp.api.CheckpointException("", {0: (OSError(28, "No space left on device"), None)})

    with changed(repo.dcp, save=save):
        outcome = run(repo, output_dir=tmp_path / "run", save_every=1)
    assert outcome.code == 2 and len(outcome.errors) == 1 and "No space left on device" in outcome.errors[0]


def test_a_place_that_cannot_be_written_is_told_in_one_line(run, tmp_path):
    log = repo.log_metrics

    def log_metrics(folder, *rest):
        (folder / "checkpoints").write_text("a file")
        log(folder, *rest)

    with changed(repo, log_metrics=log_metrics):
        outcome = run(repo, output_dir=tmp_path / "run", save_every=1)
    assert outcome.code == 2 and len(outcome.errors) == 1 and "checkpoints" in outcome.errors[0]


def test_a_model_that_cannot_be_written_is_told_in_one_line(run, tmp_path):
    """Its half-written folder is taken away, for it keeps the disk full."""

    def save_pretrained(self, folder, **kwargs):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with changed(PreTrainedModel, save_pretrained=save_pretrained):
        outcome = run(repo, output_dir=tmp_path / "run")
    assert outcome.code == 2 and len(outcome.errors) == 1 and "No space left" in outcome.errors[0], outcome.err
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "model.part").exists()


def test_memory_does_not_grow_with_the_iterations(run, files, tmp_path):
    """Tensors that are alive when an iteration is logged: as many, and as large, at the fourth as at the twelfth."""
    alive, log = [], repo.log_metrics

    def log_metrics(*args):
        gc.collect()
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        alive.append((len(tensors), sum(tensor.numel() for tensor in tensors)))
        log(*args)

    with changed(repo, log_metrics=log_metrics):
        flags = dict(total_episodes=192, save_every=3, eval_every=5, ptx_dataset=supervised(tmp_path))
        assert run(repo, output_dir=tmp_path / "run", **flags).code == 0
    counts = {count for count, _ in alive[3:]}
    assert len(alive) == 12 and max(counts) - min(counts) <= 4, alive
    assert alive[-1][1] < 1.2 * alive[3][1], alive


def supervised(folder):
    rows = [{"prompt": row["prompt"], "response": row["response_0"]} for row in tiny.make_pairs(20, seed=5)]
    return tiny.write_rows(folder / "ptx.jsonl", rows)


@pytest.mark.parametrize("script", ["repo.py", "preference_models.py", "sacpo.py"])
def test_sigterm_saves_and_says_how_to_go_on(defaults, run, tmp_path, script):
    """Also without --save-every. RePO is started by torchrun, with two processes."""
    long = {
        "repo.py": dict(total_episodes=16000),
        "preference_models.py": dict(epochs=2000),
        "sacpo.py": dict(epochs=2000),
    }
    flags = defaults[script.removesuffix(".py")] | long[script] | dict(output_dir=tmp_path / "run")
    process = start([ROOT / script, *command(**flags)], 2 if script == "repo.py" else None)
    wait_until(lambda: metrics_of(tmp_path / "run") > 2, process)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process, seconds=60)
    line = [line for line in outcome.err.splitlines() if "stopped by SIGTERM" in line]
    assert len(line) == 1 and f"--resume --output-dir {tmp_path / 'run'}" in line[0], outcome.err
    assert outcome.code == (143 if script != "repo.py" else 1)
    steps = metrics_of(tmp_path / "run")
    places = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [int(place.name) for place in places] == [steps] and f" {steps} of" in line[0]
    # It goes on from there, here with another number of processes, and stops again at the next step.
    module = {"repo.py": repo, "preference_models.py": preference_models, "sacpo.py": sacpo}[script]

    class Stopped:
        def is_set(self):
            return True

    with changed(module, heed_sigterm=Stopped):
        outcome = run(module, resume=True, **flags)
    assert outcome.code == 143 and metrics_of(tmp_path / "run") == steps + 1, outcome.err


def metrics_of(folder) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_another_number_of_processes_goes_on(defaults, run, whole, tmp_path):
    """One process begins and two go on, with shards or copies; two begin and one goes on: as without a break."""
    flags = command(**defaults["repo"] | RUNS["repo"][1])
    cut_off(run, "repo", tmp_path / "up", 3 * 3)
    cut_off(run, "repo", tmp_path / "down", 1)  # only its folder is used, which two processes fill
    shutil.rmtree(tmp_path / "down")
    shutil.copytree(tmp_path / "up", tmp_path / "copies")
    words = [*flags, "--save-every", "2", "--output-dir"]
    sharded = dict(processes=2, python_path=ROOT)
    up, down = (
        start([ROOT / "tests" / "sharded.py", "repo", *words, *rest], **sharded)
        for rest in ([tmp_path / "up", "--resume"], [tmp_path / "down"])
    )
    copies = start([ROOT / "repo.py", *words, tmp_path / "copies", "--resume"], processes=2)
    for name, process in dict(up=up, down=down, copies=copies).items():
        outcome = finish(process)
        assert outcome.code == 0, outcome.err
        assert name == "down" or f"from {tmp_path / name / 'checkpoints' / '00000002'}" in outcome.err, outcome.err
    for entry in ("summary.json", "checkpoints/00000004"):  # as if it had been killed at its third iteration
        path = tmp_path / "down" / entry
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert resume(run, "repo", tmp_path / "down").code == 0
    expected = read_lines(whole("repo") / "metrics.jsonl")
    for folder in ("up", "down", "copies"):
        lines = read_lines(tmp_path / folder / "metrics.jsonl")
        for line, other in zip(lines, expected, strict=True):
            assert without_times(line) == pytest.approx(without_times(other), rel=1e-4, abs=1e-5)
    assert read_summary(tmp_path / "up")["processes"] == 2 and read_summary(tmp_path / "down")["processes"] == 1


def test_three_kills(tmp_path):
    """A short form of `python tests/kills.py`: one kill before the run gets anywhere is not among so few."""
    words = ["--total-episodes", "768", "--eval-every", "4", "--eval-size", "8"]
    tally = campaign("repo.py", words, tmp_path, kills=3, processes=1, seed=1)
    assert tally.saving >= 1 and tally.starting + tally.working + tally.saving == 3
