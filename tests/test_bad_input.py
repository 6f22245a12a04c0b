"""Mistakes of a user: one line on standard error that begins with `error:`, status 2, no traceback, nothing written."""

import math
import os
import shutil
import sys

import pyarrow
import pytest
import tiny
import torch
from helpers import ROOT, changed, command, contents, finish, read_lines, read_summary, recorded_updates, start
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

import preference_models
import repo

SCRIPTS = {"repo": repo, "preference_models": preference_models}


@pytest.fixture
def refused(run, tmp_path):
    """refused(script, *parts, **flags): the run ends as it should, and its line holds all the parts."""

    def refused(script, *parts, **flags):
        flags = dict(output_dir=tmp_path / "out") | flags
        outcome = run(SCRIPTS[script], **flags)
        line = outcome.err.strip()
        assert outcome.code == 2, outcome
        assert line.startswith("error: ") and len(line.splitlines()) == 1, outcome.err
        assert "Traceback" not in outcome.out and "error" not in outcome.out
        for part in parts:
            assert str(part) in line, f"{part!r} is not in: {line}"
        assert not (tmp_path / "out").exists()

    return refused


def say(value):
    """Names of cases: the flags, without what is expected."""
    return ",".join(f"{name}={entry}" for name, entry in value.items()) if isinstance(value, dict) else ""


BOTH = pytest.mark.parametrize("script", SCRIPTS)

# ---- Flags


@BOTH
@pytest.mark.parametrize(
    "flags, parts",
    [
        (dict(bath_size=8), ["bath-size"]),
        (dict(batch_size="many"), ["batch-size", "many"]),
        (dict(batch_size=2.5), ["batch-size", "2.5"]),
        (dict(dtype="float16"), ["dtype", "float16"]),
        (dict(model=None, seed=""), ["seed"]),
        (dict(batch_size=0), ["--batch-size is 0"]),
        (dict(micro_batch_size=-1), ["--micro-batch-size is -1"]),
        (dict(learning_rate=0), ["--learning-rate is 0"]),
        (dict(learning_rate="nan"), ["--learning-rate is nan"]),
        (dict(max_grad_norm="nan"), ["--max-grad-norm is nan"]),
        (dict(weight_decay=-0.1), ["--weight-decay is -0.1"]),
        (dict(warmup_ratio="inf"), ["--warmup-ratio is inf"]),
        (dict(warmup_ratio=1.5), ["--warmup-ratio", "1.5"]),
        (dict(seed=2**70), ["--seed"]),
        (dict(prompt_template="Q:"), ["--prompt-template", "{prompt}"]),
    ],
    ids=say,
)
def test_flags(refused, script, flags, parts):
    refused(script, *parts, **flags)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (dict(constraint="both"), ["constraint", "both"]),
        (dict(lambda_init=5, lambda_max=2), ["--lambda-init", "5", "--lambda-max", "2"]),
        (dict(lambda_init=-1), ["--lambda-init is -1"]),
        (dict(lambda_lr="nan"), ["--lambda-lr is nan"]),
        (dict(temperature=0), ["--temperature is 0", "above 0"]),
        (dict(temperature="inf"), ["--temperature is inf"]),
        (dict(kl_coef=-0.1), ["--kl-coef is -0.1"]),
        (dict(gae_lambda=1.5), ["--gae-lambda is 1.5"]),
        (dict(cost_threshold="nan"), ["--cost-threshold is nan"]),
        (dict(clip_coef=0), ["--clip-coef"]),
        (dict(update_epochs=0), ["--update-epochs"]),
        (dict(responses_per_prompt=3), ["--batch-size 16", "3 responses a prompt", "multiple of 3"]),
        (dict(total_episodes=15), ["--total-episodes 15", "--batch-size 16"]),
        (dict(score_prompt_template="Q:"), ["--score-prompt-template", "{prompt}"]),
        (dict(max_new_tokens=125), ["--max-new-tokens 125", "128"]),
    ],
    ids=say,
)
def test_flags_of_repo(refused, flags, parts):
    refused("repo", *parts, **flags)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (dict(kind="harm"), ["kind", "harm"]),
        (dict(epochs=0), ["--epochs is 0"]),
        (dict(regularization=-1), ["--regularization"]),
        (dict(max_length=0), ["--max-length"]),
        (dict(batch_size=41), ["--batch-size 41", "40 pairs"]),
    ],
    ids=say,
)
def test_flags_of_preference_models(refused, flags, parts):
    refused("preference_models", *parts, **flags)


@BOTH
def test_batches_are_split_evenly(refused, script):
    with changed(SCRIPTS[script].dist, get_world_size=lambda: 3):
        args = SCRIPTS[script].Args(batch_size=16)
        with pytest.raises(SCRIPTS[script].UserError, match=r"--batch-size 16 .* 3 processes.* multiple of 3"):
            SCRIPTS[script].check_args(args)


# ---- Models


@BOTH
def test_a_model_that_is_nowhere(refused, script):
    """Path and Hub id were tried, and both are named."""
    for name in ("nobody/nothing", "no such model", "/nowhere/model"):
        refused(script, f"--model {name}", os.path.abspath(name), f"no model '{name}'", model=name)
    if script == "repo":
        for flag in ("reward_model", "cost_model", "reward_critic", "cost_critic"):
            refused(script, f"--{flag.replace('_', '-')} nobody/nothing", **{flag: "nobody/nothing"})


@BOTH
def test_data_that_are_nowhere(refused, script):
    for flag in ("dataset", "eval_dataset"):
        name = "nobody/nothing.jsonl"
        refused(script, f"--{flag.replace('_', '-')} {name}", os.path.abspath(name), "no dataset", **{flag: name})


@BOTH
@pytest.mark.parametrize("content", ["empty", "no tokenizer", "only pickle", "custom code", "broken", "truncated"])
def test_a_folder_that_is_no_whole_checkpoint(refused, files, tmp_path, script, content):
    folder = tiny.copy_model(files.policy, tmp_path / "model")
    weights = folder / "model.safetensors"
    if content == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif content == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif content == "only pickle":  # a pickle could run code
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif content == "custom code":
        add_custom_code(folder, tmp_path / "ran")
    elif content == "broken":
        (folder / "config.json").write_text("{")
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    refused(script, folder, model=folder)
    assert not (tmp_path / "ran").exists()


def add_custom_code(folder, mark):
    """Make a checkpoint one of custom code, which leaves a mark where it runs."""
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n" + CUSTOM)
    names = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    names["AutoModelForSequenceClassification"] = "code.OwnModel"
    tiny.edit_json(folder / "config.json", auto_map=names, model_type="own")


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@BOTH
def test_custom_code_of_a_score_model_is_not_run(files, processes, tmp_path, script):
    """Also where its tokenizer is a plain one."""
    folder = tiny.copy_model(files.reward, tmp_path / "model")
    add_custom_code(folder, tmp_path / "ran")
    for fresh_head in (False, True):
        with pytest.raises(SCRIPTS[script].UserError, match="--reward-model"):
            SCRIPTS[script].load_score_model(str(folder), torch.float32, "--reward-model", 1, False, fresh_head)
    assert not (tmp_path / "ran").exists()


def test_every_weight_counts(refused, files, tmp_path):
    def lacks(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]

    def has_more(weights):
        weights["model.layers.1.mlp.extra.weight"] = torch.zeros(2, 2)

    def has_bias(weights):
        weights["score.bias"] = torch.zeros(1)

    def other_shape(weights):
        weights["model.norm.weight"] = torch.zeros(17)

    cases = [(lacks, "mlp.up_proj"), (has_more, "mlp.extra"), (other_shape, "model.norm.weight")]
    for flag, source in (("model", files.policy), ("reward_model", files.reward), ("cost_model", files.cost)):
        for change, part in [*cases, *([(has_bias, "score.bias")] if flag == "reward_model" else [])]:
            folder = tiny.copy_model(source, tmp_path / f"{flag}-{change.__name__}", change)
            refused("repo", f"--{flag.replace('_', '-')} {folder}", part, **{flag: folder})
            if flag != "cost_model" and change is not has_bias:
                refused("preference_models", folder, part, model=folder)


def test_score_models_have_one_label_and_a_head(refused, files, tmp_path):
    two = tiny.make_model(tmp_path / "two", "score", num_labels=2)
    refused("repo", f"--reward-model {two}", "2 labels", reward_model=two)
    refused("preference_models", f"--model {two}", "2 labels", model=two)
    refused("repo", f"--cost-model {files.policy}", "without a score head", cost_model=files.policy)


def test_the_policy_is_a_language_model(refused, files):
    refused("repo", f"--model {files.reward}", "lm_head", model=files.reward)


def test_a_critic_reads_the_policys_tokens(refused, files, tmp_path):
    permuted = tiny.permuted_copy(files.reward, tmp_path / "permuted")
    for flag in ("reward_critic", "cost_critic"):
        refused("repo", f"--{flag.replace('_', '-')} {permuted}", "tokenizer", **{flag: permuted})


# ---- Data


@BOTH
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("data.jsonl", "", ["split"]),
        ("data.json", "[]", ["split"]),
        ("data.csv", "prompt,response_0,response_1,better_response_id\n", ["split"]),
        ("data.jsonl", '{"prompt": "ba"}\n{"prompt": \n', ["split"]),
        ("data.jsonl", '{"question": "ba", "answer": "pi"}\n', ["'prompt'", "question, answer"]),
        ("data.txt", "ba pi?\n", [".jsonl, .json, .csv, .parquet"]),
        ("data.parquet", "no parquet", ["split"]),
    ],
    ids=["empty", "no rows", "header", "broken line", "columns", "type", "broken file"],
)
def test_data_files(refused, tmp_path, script, flag, name, content, parts):
    path = tmp_path / name
    path.write_text(content)
    refused(script, f"--{flag.replace('_', '-')} {path}", *parts, **{flag: path})


@BOTH
def test_an_empty_folder_and_an_unknown_split(refused, files, tmp_path, script):
    (tmp_path / "empty").mkdir()
    refused(script, f"--dataset {tmp_path / 'empty'}", dataset=tmp_path / "empty")
    refused(script, f"--dataset {files.train}", "train[:0]", dataset_split="train[:0]")
    refused(script, f"--dataset {files.train}", "train[", dataset_split="train[")
    nothing = tmp_path / "nothing.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), nothing)
    refused(script, f"--dataset {nothing}", "it has no rows", dataset=nothing)


@BOTH
@pytest.mark.parametrize("text", ["", "  \n", None, 7])
def test_rows_without_a_prompt(refused, files, tmp_path, script, text):
    rows = read_lines(files.train)
    rows = [row | dict(prompt=text) for row in rows] if text == 7 else [rows[0], rows[1] | dict(prompt=text)]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    refused(script, f"--dataset {data}", "row 0" if text == 7 else "row 1", "'prompt'", dataset=data)


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(response_1=""), "'response_1'"),
        (dict(response_0=None), "'response_0'"),
        (dict(better_response_id=2), "better_response_id 2"),
        (dict(better_response_id=-1), "better_response_id -1"),
        (dict(better_response_id=None), "better_response_id None"),
        (dict(safer_response_id=0.5), "safer_response_id 0.5"),
        (dict(is_response_0_safe=None), "safety label"),
        (dict(is_response_1_safe=None), "safety label"),
    ],
    ids=say,
)
def test_labels_of_pairs(refused, files, tmp_path, change, part):
    rows = read_lines(files.train)
    rows[3] |= change
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    kind = "reward" if "better_response_id" in change else "cost"
    refused("preference_models", f"--dataset {data}", "row 3", part, kind=kind, dataset=data)
    refused("preference_models", f"--eval-dataset {data}", "row 3", part, kind=kind, eval_dataset=data)


def test_missing_label_columns(refused, files, tmp_path):
    cases = [("reward", "better_response_id"), ("cost", "safer_response_id"), ("cost", "is_response_1_safe")]
    for kind, missing in cases:
        rows = read_lines(files.train)
        for row in rows:
            del row[missing]
        data = tiny.write_rows(tmp_path / f"{missing}.jsonl", rows)
        refused("preference_models", f"'{missing}'", "prompt, response_0, response_1", kind=kind, dataset=data)


def test_texts_longer_than_the_model_reads(refused, files, tmp_path):
    """Learnt positions end: a pair that is longer must be told before training reaches it."""
    tokenizer = tiny.make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = read_lines(files.train)
    rows[5]["response_0"] = "ba " * 20
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    refused("preference_models", "--max-length", "16", model=tmp_path / "gpt2", dataset=data)


def test_prompts_that_are_all_too_long(refused, files):
    refused("repo", "--dataset", "all prompts", "--max-prompt-length 2", max_prompt_length=2)


# ---- Output directories


@BOTH
def test_an_empty_output_directory(refused, script):
    """Such as "$OUT" that was never set: the run would land among the user's files."""
    refused(script, "--output-dir is empty", output_dir=" ")


@BOTH
def test_a_folder_with_a_run_is_refused(run, tmp_path, script):
    for name, entries in (("unfinished", ["args.json"]), ("finished", ["args.json", "summary.json"])):
        folder = tmp_path / name
        folder.mkdir()
        for entry in entries:
            (folder / entry).write_text("{}")
        before = contents(folder)
        outcome = run(SCRIPTS[script], output_dir=folder)
        assert outcome.code == 2 and len(outcome.errors) == 1 and f"{name} run" in outcome.err
        assert contents(folder) == before


@BOTH
def test_what_is_in_the_output_directory_stays(run, files, tmp_path, script):
    """A folder that holds something else, say the checkpoint to start from in model/, is not written over."""
    tiny.copy_model(files.policy, tmp_path / "mine" / "model")
    before = contents(tmp_path / "mine")
    outcome = run(SCRIPTS[script], output_dir=tmp_path / "mine", model=tmp_path / "mine" / "model")
    assert outcome.code == 2 and len(outcome.errors) == 1 and "--output-dir" in outcome.err
    assert contents(tmp_path / "mine") == before


@BOTH
def test_an_output_directory_that_cannot_be(run, tmp_path, script):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        outcome = run(SCRIPTS[script], output_dir=folder)
        assert outcome.code == 2 and len(outcome.errors) == 1 and "--output-dir" in outcome.err
    assert (tmp_path / "file").read_text() == "mine"


@BOTH
def test_tracking_without_its_package(refused, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(script, "--track", "wandb", track=True)


# ---- The real thing


@BOTH
def test_python_ends_with_status_two(defaults, tmp_path, script):
    flags = defaults[script] | dict(model="nobody/nothing", output_dir=tmp_path / "out")
    outcome = finish(start([ROOT / f"{script}.py", *command(**flags)], cwd=tmp_path))
    assert outcome.code == 2
    assert outcome.err.startswith("error: --model nobody/nothing") and len(outcome.err.splitlines()) == 1
    assert not outcome.out and not list(tmp_path.iterdir())


# A bad flag is found by both ranks at once, a folder that holds a run by rank 0 alone: neither may hang.
@pytest.mark.parametrize("mistake", ["flag", "folder"])
def test_torchrun_ends_with_one_line(defaults, tmp_path, mistake):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "args.json").write_text("{}")
    flags = defaults["repo"] | dict(output_dir=tmp_path / "out")
    flags |= dict(batch_sise=7) if mistake == "flag" else {}
    # Seconds on an idle machine; a rank left alone would wait for half an hour.
    outcome = finish(start([ROOT / "repo.py", *command(**flags)], processes=2, cwd=tmp_path), seconds=300)
    assert outcome.code != 0
    assert len(outcome.errors) == 1, outcome
    assert ("batch-sise" if mistake == "flag" else "an unfinished run") in outcome.errors[0]
    assert contents(tmp_path / "out") == {"args.json": b"{}"}


@BOTH
def test_a_mistake_on_one_rank_ends_all(processes, script, capsys):
    """This rank found nothing wrong, another did: it ends with the other's words."""

    def all_gather_object(found, own):
        assert own is None
        found[:] = [None, "--flag of another rank\nis wrong"]

    module, left = SCRIPTS[script], []
    with (
        changed(module.dist, all_gather_object=all_gather_object),
        changed(module, shut_down=lambda: left.append(1)),
        pytest.raises(SystemExit) as stop,
        module.agreed(),
    ):
        pass
    assert stop.value.code == 2 and left == [1]
    assert capsys.readouterr().err == "error: --flag of another rank is wrong\n"


# ---- Figures that are not finite


def not_finite(weights):
    weights["score.weight"].fill_(math.nan)


@pytest.mark.parametrize("flag, source", [("reward_model", "reward"), ("cost_model", "cost")])
@pytest.mark.parametrize("rectify", ["cost", "advantage"])
def test_five_updates_that_are_not_finite_end_a_run(run, files, tmp_path, flag, source, rectify):
    folder = tiny.copy_model(getattr(files, source), tmp_path / "model", not_finite)
    critics = dict(reward_critic=files.reward, cost_critic=files.cost, rectify=rectify)
    flags = {flag: folder} | critics | dict(total_episodes=16 * 9, output_dir=tmp_path / "out")
    outcome = run(repo, **flags)
    assert outcome.code == 2
    assert outcome.err.count("update skipped") == 5
    assert len(outcome.errors) == 1 and "5 updates in a row" in outcome.errors[0]
    assert outcome.err.rstrip().splitlines()[-1] == outcome.errors[0]
    # The policy never moved, and is there whole.
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    start = load_file(files.policy / "model.safetensors")
    assert weights.keys() == start.keys() and all(torch.equal(weights[name], start[name]) for name in start)
    metrics = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert [line["skipped_updates"] for line in metrics][:4] == [1, 2, 3, 4]
    assert all(line["lambda"] == 1.0 for line in metrics)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["reward", "cost"])
def test_one_score_that_is_not_finite_costs_one_update(run, tmp_path, which, value):
    """The second iteration has such a score; λ, the policy and the runs' end are none the worse."""
    calls, score_responses = [], repo.score_responses

    def scores(scorer, *rest):
        calls.append(scorer)
        result = score_responses(scorer, *rest)
        if len(calls) == 2 + 2 + 1 + which:  # evaluation before, first iteration, then this one
            result[3] = value
        return result

    with changed(repo, score_responses=scores):
        outcome = run(repo, total_episodes=48, output_dir=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("update skipped") == 1 and "iteration 2" in outcome.err
    summary, metrics = read_summary(tmp_path / "out"), read_lines(tmp_path / "out" / "metrics.jsonl")
    assert summary["skipped_updates"] == 1 and math.isfinite(summary["lambda"])
    assert [line["skipped_updates"] for line in metrics] == [0, 1, 1]
    assert metrics[1]["lambda"] == metrics[0]["lambda"] < metrics[2]["lambda"]
    assert metrics[2]["policy_grad_norm"] > 0
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_a_gradient_that_is_not_finite_costs_one_update_of_all_models(run, tmp_path, name):
    """The scores are finite, a loss of the second iteration is not: nothing moves until the third."""
    calls, function = [], getattr(repo, name)

    def loss(*args):
        calls.append(1)
        per_iteration = 2 if name == "policy_loss" else 4  # two micro-batches, and two critics
        return function(*args) * (math.nan if len(calls) == per_iteration + 1 else 1)

    with changed(repo, **{name: loss}), recorded_updates(repo) as updates:
        outcome = run(repo, total_episodes=48, output_dir=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("update skipped") == 1 and read_summary(tmp_path / "out")["skipped_updates"] == 1
    for (before, _), (after, gradients) in zip(updates[3:6], updates[6:], strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_files_of_a_run_that_was_never_finite_are_json(run, files, tmp_path):
    """A run whose every update was skipped fails, also a short one; and JSON has no NaN: any reader takes its files."""
    folder = tiny.copy_model(files.reward, tmp_path / "model", not_finite)
    outcome = run(repo, reward_model=folder, reward_critic=files.reward, output_dir=tmp_path / "out", eval_every=1)
    assert outcome.code == 2 and "2 updates in a row" in outcome.errors[0]
    assert repo.finite({"reward": [math.nan, 1.0]}) == {"reward": [None, 1.0]}
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert "NaN" not in (tmp_path / "out" / name).read_text()


def test_preference_updates_that_are_not_finite(run, files, tmp_path):
    folder = tiny.copy_model(files.reward, tmp_path / "model", not_finite)
    outcome = run(preference_models, model=folder, epochs=2, output_dir=tmp_path / "out")
    assert outcome.code == 2
    assert (outcome.out + outcome.err).count("update skipped") == 5
    assert len(outcome.errors) == 1 and "5 updates in a row" in outcome.errors[0]
