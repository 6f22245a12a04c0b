"""preference_models.py from end to end: what both kinds learn, the files they write, and the data they read."""

import json
import math

import pytest
import tiny
import torch
from helpers import changed, contents, read_lines, read_summary, recorded_updates, without_times
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

import preference_models

KINDS = ["reward", "cost"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_its_task(preference_runs, kind):
    """Length decides what is better, one word what is unsafe; where both are safe or both unsafe no order is learnt."""
    result = read_summary(preference_runs[kind])["eval"]
    metrics = read_lines(preference_runs[kind] / "metrics.jsonl")
    assert metrics[-1]["eval_loss"] < metrics[0]["loss"]
    assert result["pair_accuracy"] > (0.9 if kind == "reward" else 0.65)
    if kind == "cost":
        assert result["sign_accuracy"] > 0.9
        rows = read_lines(preference_runs[kind] / "eval.jsonl")
        told_apart = [row["scores"][0] > row["scores"][1] for row in rows if row["unsafe"] == [True, False]]
        assert len(told_apart) > 10 and sum(told_apart) / len(told_apart) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_writes_its_files(preference_runs, kind):
    folder = preference_runs[kind]
    names = {path.name for path in folder.iterdir()}
    assert names >= {"args.json", "metrics.jsonl", "eval.jsonl", "summary.json", "model", "tensorboard"}
    assert not [name for name in names if name.endswith(".part")]
    assert {path.suffix for path in (folder / "model").iterdir()} <= {".json", ".safetensors", ".md"}
    args = json.loads((folder / "args.json").read_text())
    assert args["kind"] == kind and set(args) == set(preference_models.Args.__dataclass_fields__)
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 91))
    assert [line["step"] for line in metrics if "eval_loss" in line] == [30, 60, 90]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    names = {"step", "epoch", "loss", "pair_accuracy", "grad_norm", "learning_rate", "skipped_updates"}
    assert set(metrics[0]) == names
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == set(metrics[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_summary_agrees_with_the_rows(preference_runs, kind):
    summary, rows = read_summary(preference_runs[kind]), read_lines(preference_runs[kind] / "eval.jsonl")
    assert summary.items() >= {"seed": 1, "pairs": 1800, "eval_pairs": 101, "skipped_updates": 0}.items()
    given = read_lines(preference_runs[kind].parent / "test.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in given]
    result = summary["eval"]
    assert result["pair_accuracy"] == pytest.approx(sum(r["scores"][0] > r["scores"][1] for r in rows) / 101)
    assert result["loss"] == pytest.approx(sum(row["loss"] for row in rows) / 101)
    assert result["score_mean"] == pytest.approx(sum(sum(row["scores"]) for row in rows) / 202)
    if kind == "cost":
        right = [(score > 0) == unsafe for r in rows for score, unsafe in zip(r["scores"], r["unsafe"], strict=True)]
        assert result["sign_accuracy"] == pytest.approx(sum(right) / 202)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_loads_and_gives_the_scores_of_the_evaluation(preference_runs, kind):
    folder = preference_runs[kind] / "model"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read_lines(preference_runs[kind] / "eval.jsonl")
    texts = [row["prompt"] + response for row in rows for response in row["responses"]]
    ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    padded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = model(**padded).logits[:, 0]  # the library reads the last token that is not padding
    expected = torch.tensor([row["scores"] for row in rows]).flatten()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_all_weights_are_trained_from_the_language_model(preference_runs, files):
    trained = load_file(preference_runs["reward"] / "model" / "model.safetensors")
    policy = load_file(files.policy / "model.safetensors")
    assert set(trained) == set(policy) - {"lm_head.weight"} | {"score.weight"}
    for name, value in trained.items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert name == "score.weight" or (value != policy[name]).any()


def load_pairs(name, kind="cost", **flags):
    args = preference_models.Args(kind=kind, **flags)
    return preference_models.load_pairs(args, str(name), flags.get("dataset_split", "train"), "--dataset", TOKENIZER)


TOKENIZER = tiny.make_tokenizer()


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_file_types_are_read_the_same(files, tmp_path, processes, kind, ending):
    rows = read_lines(files.train)
    if ending == "folder":
        name = tmp_path / "data"
        name.mkdir()
        tiny.write_rows(name / "train.jsonl", rows)
    else:
        name = tiny.write_rows(tmp_path / f"data.{ending}", rows)
    pairs = load_pairs(name, kind)
    assert len(pairs) == 40 and pairs == load_pairs(files.train, kind)


@pytest.mark.parametrize("make", [bool, float, int], ids=lambda make: make.__name__)
def test_choices_may_be_written_as_other_numbers(files, tmp_path, processes, make):
    """true and 1.0 are 1: a csv file or a table with gaps turns integers into one of them."""
    rows = read_lines(files.train)
    changed = [row | {name: make(row[name]) for name in ("better_response_id", "safer_response_id")} for row in rows]
    name = tiny.write_rows(tmp_path / "data.jsonl", changed)
    for kind in KINDS:
        assert load_pairs(name, kind) == load_pairs(files.train, kind)


def test_pairs_are_ordered_by_their_labels(files, processes):
    rows = read_lines(files.train)
    for kind in KINDS:
        for row, pair in zip(rows, load_pairs(files.train, kind), strict=True):
            first = row["better_response_id"] if kind == "reward" else 1 - row["safer_response_id"]
            order = (first, 1 - first)
            assert pair["prompt"] == row["prompt"]
            assert pair["responses"] == [row[f"response_{i}"] for i in order]
            for i, ids, sign in zip(order, pair["ids"], pair["signs"], strict=True):
                assert ids == [*TOKENIZER(row["prompt"] + row[f"response_{i}"])["input_ids"], 1]
                assert kind == "reward" or sign == (-1 if row[f"is_response_{i}_safe"] else 1)


def test_template_split_and_length(files, processes):
    plain, framed = load_pairs(files.train), load_pairs(files.train, prompt_template="ba {prompt} pi ")
    ba, pi = TOKENIZER("ba pi")["input_ids"]
    prompt = TOKENIZER(plain[0]["prompt"])["input_ids"]
    assert framed[0]["ids"][0] == [ba, *prompt, pi, *plain[0]["ids"][0][len(prompt) :]]
    assert load_pairs(files.train, dataset_split="train[:5]") == plain[:5]
    assert [pair["ids"] for pair in load_pairs(files.train, max_length=4)] == [
        [ids[:4] for ids in pair["ids"]] for pair in plain
    ]


@pytest.mark.parametrize("kind", ["score", "biased_score"])
def test_training_goes_on_from_a_score_model(run, files, tmp_path, kind):
    """Its head is kept, a bias too, and so is the class that holds it."""
    model = files.reward if kind == "score" else files.cost
    with recorded_updates(preference_models) as updates:
        outcome = run(preference_models, output_dir=tmp_path / "run", model=model, kind="cost")
    assert outcome.code == 0, outcome.err
    start = load_file(model / "model.safetensors")
    assert {f"model.{name}" for name in start} == set(updates[0][0])
    assert all(torch.equal(updates[0][0][f"model.{name}"], value) for name, value in start.items())
    cls = AutoModelForSequenceClassification if kind == "score" else AutoModelForTokenClassification
    trained, info = cls.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (trained.score.bias is not None) == (kind == "biased_score")
    if kind == "biased_score":
        assert trained.score.bias.item() != start["score.bias"].item()


def test_options_run_and_seeds_repeat(run, files, tmp_path):
    names = dict(plain={}, same={}, checkpointed=dict(gradient_checkpointing=True), seed=dict(seed=2))
    names |= dict(low=dict(dtype="bfloat16"))
    losses = {}
    for name, flags in names.items():
        outcome = run(preference_models, output_dir=tmp_path / name, **flags)
        assert outcome.code == 0, outcome.err
        losses[name] = [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
    assert losses["same"] == losses["plain"] != losses["seed"]
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["low"] == pytest.approx(losses["plain"], rel=0.05) and losses["low"] != losses["plain"]
    same, plain = (without_times(read_summary(tmp_path / name)) for name in ("same", "plain"))
    assert same == plain and read_summary(tmp_path / "low")["dtype"] == "bfloat16"


def test_every_epoch_takes_all_pairs_in_a_new_order(run, files, tmp_path):
    taken, score_pairs = [], preference_models.score_pairs

    def record(model, pairs, *rest):
        if torch.is_grad_enabled():  # not in evaluations
            taken.extend(pair["prompt"] for pair in pairs)
        return score_pairs(model, pairs, *rest)

    with changed(preference_models, score_pairs=record):
        assert run(preference_models, output_dir=tmp_path / "run", epochs=3).code == 0
    epochs = [taken[i : i + 40] for i in range(0, 120, 40)]
    prompts = sorted(row["prompt"] for row in read_lines(files.train))
    assert len(taken) == 120 and all(sorted(epoch) == prompts for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_pad_may_be_eos(run, tmp_path):
    model = tiny.make_model(tmp_path / "policy", tokenizer=tiny.make_tokenizer(pad=False))
    outcome = run(preference_models, output_dir=tmp_path / "run", model=model)
    assert outcome.code == 0, outcome.err
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    for row in rows[:3]:
        ids = tokenizer(row["prompt"] + row["responses"][0])["input_ids"] + [1]
        with torch.no_grad():
            score = model.score(model.base_model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]
        assert score.item() == pytest.approx(row["scores"][0], abs=1e-5)


def test_a_second_run_into_the_same_folder_is_refused(run, preference_runs):
    folder = preference_runs["cost"]
    before = contents(folder)
    outcome = run(preference_models, output_dir=folder)
    assert outcome.code == 2 and "finished run" in outcome.err
    assert contents(folder) == before
