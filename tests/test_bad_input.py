"""Mistakes of a user: one line on standard error that begins with `error:`, status 2, no traceback, nothing lost."""

import math
import sys

import pytest
import tiny
import torch
from helpers import ROOT, SCRIPTS, changed, command, contents, finish, read_lines, read_summary, recorded_updates, start
from safetensors.torch import load_file

import repo

EVERY = pytest.mark.parametrize("script", ["repo", "repo_group", "preference_models", "sacpo"])


@pytest.fixture
def refused(run, tmp_path):
    """refused(script, *parts, **flags): the run ends as it should, and its line holds all the parts."""

    def refused(script, *parts, **flags):
        outcome = run(SCRIPTS[script], **dict(output_dir=tmp_path / "out") | flags)
        line = outcome.err.splitlines()[-1]
        assert outcome.code == 2 and line.startswith("error: ") and len(outcome.errors) == 1, outcome
        assert [part for part in map(str, parts) if part not in line] == [], line
        assert "Traceback" not in outcome.err and not list(tmp_path.glob("out/*model*"))

    return refused


MISFITS = [  # of which scripts: flags, and what the line says of them
    ("repo repo_group", dict(responses_per_prompt=3), "--batch-size 16 3"),
    ("repo repo_group", dict(total_episodes=15), "--batch-size --total-episodes 16"),
    ("repo repo_group preference_models", dict(prompt_template="Q:"), "template {prompt}"),
    ("repo", dict(score_prompt_template="Q:"), "template {prompt}"),
    ("repo", dict(batch_size=0), "--batch-size"),
    ("repo", dict(max_new_tokens=125), "128"),
    ("repo", dict(max_prompt_length=2), "--dataset 40 with an empty prompt or one over 2 tokens"),
    ("repo", dict(temperature=0), "--temperature"),
    ("repo", dict(learning_rate="inf"), "not finite"),
    ("repo", dict(lambda_init=-1), "--lambda-init"),
    ("repo", dict(kl_coef="nan"), "--kl-coef"),
    ("repo", dict(micro_batch_size=0), "at least 1"),
    ("repo_group", dict(responses_per_prompt=1), "--responses-per-prompt 2"),
    ("repo_group", dict(eval_size=0), "at least 1"),
    ("preference_models sacpo", dict(batch_size=41), "--batch-size 40"),
    ("preference_models sacpo", dict(batch_size=0), "--batch-size 40"),
    ("sacpo", dict(batch_size=1, loss="kto"), "--batch-size 2"),
    ("sacpo", dict(loss=["dpo", "kto"], stages="safe"), "--loss"),
    ("sacpo", dict(stages=["safe", "safe"]), "--stages"),
    ("sacpo", dict(merge_q=0.5, stages="safe"), "--merge-q"),
    ("sacpo", dict(max_prompt_length=1), "--dataset 40 with an empty prompt or one over 1 tokens"),
]


@EVERY
def test_flags_that_do_not_fit(refused, script):
    for _, flags, parts in (row for row in MISFITS if script in row[0].split()):
        refused(script, *parts.split(), **flags)
    # Batches are split evenly over the processes.
    with changed(SCRIPTS[script].dist, get_world_size=lambda: 3):
        refused(script, "--batch-size", f"multiple of {12 if script == 'repo_group' else 3}")


@EVERY
def test_models_and_data_that_are_nowhere(refused, script):
    for flag in ("model", "reward_model", "cost_model", "reward_critic", "cost_critic", "dataset", "eval_dataset"):
        for name in ("nobody/nothing", "/nowhere/at/all") if hasattr(SCRIPTS[script].Args, flag) else ():
            refused(script, f"--{flag.replace('_', '-')} {name}", **{flag: name})


def only_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")  # a pickle could run code
    (folder / "model.safetensors").unlink()


def custom_code(folder):
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    tiny.edit_json(folder / "config.json", model_type="own", auto_map=dict.fromkeys(classes, "code.Own"))


DAMAGES = {
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "only pickle": only_pickle,
    "custom code": custom_code,
    "broken": lambda folder: (folder / "config.json").write_text("{"),
    "truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"1" * 1000),
    "merge it": lambda folder: (folder / "adapter_config.json").write_text("{}"),  # a LoRA adapter
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_no_whole_checkpoint(refused, files, tmp_path, damage):
    folder = tiny.copy_model(files.policy, tmp_path / "folder")
    DAMAGES[damage](folder)
    for script in SCRIPTS:
        refused(script, folder, damage if damage == "merge it" else "cannot be loaded", model=folder)
    assert not (folder / "ran").exists()


def test_every_weight_counts_and_heads_are_what_they_must_be(refused, files, tmp_path):
    up, more = "model.layers.1.mlp.up_proj.weight", torch.zeros(17)
    two = tiny.make_model(tmp_path / "two", "score", num_labels=2)
    for number, (script, flag, folder, part, change) in enumerate(
        [
            ("repo", "model", files.policy, up, lambda weights: weights.pop(up)),
            ("repo", "reward_model", files.reward, "more", lambda weights: weights.update(more=more)),
            ("repo", "reward_model", files.reward, "score.bias", lambda weights: weights.update({"score.bias": more})),
            ("repo", "cost_model", files.cost, "", lambda weights: weights.update({up: more})),
            ("preference_models", "model", files.reward, up, lambda weights: weights.pop(up)),
            ("sacpo", "model", files.policy, "more", lambda weights: weights.update(more=more)),
            ("repo", "reward_model", two, "2 labels", None),
            ("preference_models", "model", two, "2 labels", None),
            ("repo", "cost_model", files.policy, "give a score model", None),
            ("repo", "model", files.reward, "lm_head", None),
            ("sacpo", "model", files.reward, "lm_head", None),
        ]
    ):
        folder = tiny.copy_model(folder, tmp_path / f"{number}", change)
        refused(script, f"--{flag.replace('_', '-')} {folder}", part, **{flag: folder})


@EVERY
def test_data_without_the_rows_that_are_needed(refused, files, tmp_path, script):
    (tmp_path / "empty").mkdir()
    refused(script, f"--dataset {tmp_path / 'empty'}", dataset=tmp_path / "empty")
    for split in ("train[:0]", "train[99:]", "train["):
        refused(script, f"--dataset {files.train}", split, dataset_split=split)
    for name, content, part in (
        ("a.jsonl", "", "split"),
        ("b.json", "[]", "split"),
        ("c.jsonl", '{"prompt": "ba"}\n{"prompt": \n', "split"),
        ("d.jsonl", '{"question": "ba", "answer": "pi"}\n', "the first row is {'question': 'ba', 'answer': 'pi'}"),
        ("e.txt", "ba pi?\n", ".jsonl, .json, .csv or .parquet"),
        ("f.parquet", "no parquet", "split"),
    ):
        (tmp_path / name).write_text(content)
        refused(script, f"--dataset {tmp_path / name}", part, dataset=tmp_path / name)
        refused(script, f"--eval-dataset {tmp_path / name}", part, eval_dataset=tmp_path / name)
    rows = [row | dict(prompt=text) for row, text in zip(read_lines(files.train), ["", "  \n", None] * 2, strict=False)]
    data = tiny.write_rows(tmp_path / "empty.jsonl", rows)
    refused(script, f"--dataset {data}", "kept 0 of 6 rows", "6 without a prompt that ends with", dataset=data)


LABELS = dict(better_response_id=2, safer_response_id=None, is_response_0_safe=None)


@pytest.mark.parametrize("name, value", LABELS.items())
def test_labels_of_pairs(refused, files, tmp_path, name, value):
    rows = read_lines(files.train)
    kind = "reward" if name == "better_response_id" else "cost"
    rows[3][name] = value
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    less = tiny.write_rows(tmp_path / "less.jsonl", [{k: v for k, v in row.items() if k != name} for row in rows])
    for script, flags in (("preference_models", dict(kind=kind)), ("sacpo", dict(loss="kto"))):
        refused(script, "--dataset", f"a row has {value} as '{name}'", dataset=data, **flags)
        refused(script, "--eval-dataset", f"a row has {value} as '{name}'", eval_dataset=data, **flags)
        refused(script, f"a row has None as '{name}'", "its columns are prompt, response_0", dataset=less, **flags)
    safe = [row | dict(is_response_0_safe=True, is_response_1_safe=True) for row in read_lines(files.train)]
    data = tiny.write_rows(tmp_path / "safe.jsonl", safe)
    refused("sacpo", f"--dataset {data}", "only desirable or only", dataset=data, loss="kto", stages="safe")


@EVERY
def test_what_is_in_the_output_directory_stays(run, files, tmp_path, script):
    """A folder that holds something else, say the checkpoint to start from in model/, is not written over."""
    tiny.copy_model(files.policy, tmp_path / "mine" / "model")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for folder in (tmp_path / "mine", tmp_path / "file", tmp_path / "file" / "below"):
        outcome = run(SCRIPTS[script], output_dir=folder, model=tmp_path / "mine" / "model")
        assert outcome.code == 2 and len(outcome.errors) == 1 and "--output-dir" in outcome.err
    assert {name: text for name, text in contents(tmp_path).items() if text} == before


def test_srun_without_torchrun(processes, monkeypatch):
    """Its tasks would all be rank 0 of a run of their own, in one directory."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for script in SCRIPTS.values():
        with changed(script.dist, init_process_group=lambda *_, **__: None):
            monkeypatch.setenv("SLURM_NTASKS", "2")
            with pytest.raises(script.UserError, match=r"srun .* torchrun"):
                script.start_processes()
            for name, value in (("RANK", "0"), ("SLURM_NTASKS", "1")):  # by torchrun, or one task
                monkeypatch.setenv(name, value)
                assert script.start_processes()[0].type == processes[0].type
            monkeypatch.delenv("RANK")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_ends_with_status_two_and_one_line(forks, defaults, tmp_path, script):
    flags = defaults[script] | dict(model="nobody/nothing", output_dir=tmp_path / "out")
    mistake = forks.start([ROOT / f"{script}.py", *command(**flags)], cwd=tmp_path)
    words = (["--bath-size", "8"], ["--batch-size", "many"], ["--dtype", "float16"])
    (outcome,) = mistake.finish()
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith("error: --model nobody/nothing"), outcome
    assert len(outcome.errors) == 1 and "Traceback" not in outcome.err and not outcome.out
    for process in [forks.start([ROOT / f"{script}.py", *each], cwd=tmp_path) for each in words]:  # tyro's own words
        (outcome,) = process.finish()
        assert outcome.code == 2 and "Traceback" not in outcome.err and "--" in outcome.out + outcome.err
    assert not list(tmp_path.iterdir())


# A bad flag is found by both ranks at once, a folder that holds a run by rank 0 alone: neither may hang.
def test_torchrun_ends_with_one_line(forks, defaults, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("{}")
    words = command(**defaults["repo"] | dict(output_dir=tmp_path / "out"))
    flag = forks.start([ROOT / "repo.py", *words, "--batch-sise", "7"], 2)
    # Seconds on an idle machine. A rank left alone would wait for two hours.
    outcome = finish(start([ROOT / "repo.py", *words], processes=2), seconds=120)
    assert outcome.code == 1 and len(outcome.errors) == 1 and "holds a run" in outcome.errors[0], outcome.err
    assert contents(tmp_path / "out").items() >= {"metrics.jsonl": b"{}"}.items()
    first, second = flag.finish()
    assert first.code == second.code == 2 and "--batch-sise" in first.out + first.err and not second.out + second.err


@pytest.mark.parametrize("which, value", [(0, math.nan), (1, math.nan), (1, math.inf)])  # of reward and cost
def test_a_score_that_is_not_finite(run, tmp_path, which, value):
    """In iteration 2 it costs one update and nothing else. In the evaluation before the first one it ends the run."""
    score_responses, calls = repo.score_responses, []

    def scores(*args):
        calls.append(1)
        result = score_responses(*args)
        if len(calls) == bad:
            result[3] = value
        return result

    with changed(repo, score_responses=scores):
        bad = 2 + 2 + 1 + which  # after the evaluation and the first iteration
        outcome = run(repo, total_episodes=48, output_dir=tmp_path / "out")
        calls, bad = [], 1 + which
        at_once = run(repo, output_dir=tmp_path / "at once")
    assert at_once.code == 2 and len(at_once.errors) == 1 and "not finite" in at_once.errors[0]
    assert outcome.code == 0 and outcome.err.count("update skipped") == 1 and "iteration 2" in outcome.err
    metrics = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert read_summary(tmp_path / "out")["skipped_updates"] == 1
    assert [line["skipped_updates"] for line in metrics] == [0, 1, 1]
    assert metrics[1]["kl"] is metrics[1]["entropy"] is None and metrics[1]["repetition"] is not None
    assert metrics[1]["lambda"] == metrics[0]["lambda"] < metrics[2]["lambda"] and metrics[2]["policy_grad_norm"] > 0
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()  # it is not JSON
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


# Of each script: a loss, its calls in an update, models
LOSSES = [("repo", "policy_loss", 2, 3), ("ppo_lagrange", "value_loss", 4, 3), ("repo_group", "policy_loss", 2, 1)]
LOSSES += [("preference_models", "reward_loss", 2, 1), ("sacpo", "dpo_loss", 2, 1)]


@pytest.mark.parametrize("script, name, per_update, models", LOSSES)
def test_gradients_that_are_not_finite(run, tmp_path, script, name, per_update, models):
    """One such update is skipped in all models of the run. The third in a row ends it."""
    module, function, calls, bad = SCRIPTS[script], getattr(SCRIPTS[script], name), [], {1}
    flags = dict(total_episodes=16 * 5) if hasattr(module.Args, "total_episodes") else dict()

    def loss(*args):
        calls.append(1)
        update, call = divmod(len(calls) - 1, per_update)
        return function(*args) * (math.nan if update in bad and call == 0 else 1)

    with changed(module, **{name: loss}), recorded_updates() as updates:
        outcome = run(module, output_dir=tmp_path / "one", **flags)
        calls, bad = [], {0, 2, 3, 4}
        three = run(module, output_dir=tmp_path / "three", **flags)
    assert outcome.code == 0 and outcome.err.count("update skipped") == 1, outcome.err
    assert read_summary(tmp_path / "one")["skipped_updates"] == 1
    for i in range(models, 2 * models):
        (before, _), (after, gradients) = updates[i], updates[i + models]
        assert all(map(torch.equal, before, after)) and all(gradient.isfinite().all() for gradient in gradients)
    assert three.code == 2 and three.err.count("update skipped") == 4 and len(three.errors) == 1
    assert "three updates in a row" in three.errors[0]
