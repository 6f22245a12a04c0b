"""evaluate.py score: the same answers as repo.py's evaluation, the numbers of the table, going on, mistakes."""

import dataclasses
import hashlib
import json
import re
import shutil

import pytest
import tiny
import torch
from helpers import ROOT, changed, command, contents, finish, read_lines, run_main, start
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import repo

FIGURES = ("reward_cost.png", "cost_distribution.png", "compliance_reward.png")


@pytest.fixture(scope="module")
def models(files, tmp_path_factory):
    """Three policies: two of other weights, and one whose tokenizer has the words in another order."""
    folder = tmp_path_factory.mktemp("models")
    other = tiny.make_tokenizer(tiny.WORDS[::-1])
    return {
        "first": files.policy,
        "second": tiny.make_model(folder / "second", seed=5),
        "reversed": tiny.make_model(folder / "reversed", seed=6, tokenizer=other),
    }


@pytest.fixture(scope="module")
def score(processes, files, models):
    """score(*names, **flags): `evaluate.py score` in this process on the tiny files. Returns an Outcome."""
    defaults = dict(reward_model=files.reward, cost_model=files.cost, dataset=files.test, dataset_split="train")
    defaults |= dict(dtype="float32", max_new_tokens=16, batch_size=5, bootstrap_resamples=200)

    def score(*names, draw=False, **flags):
        entries = [f"{name}={models[name]}" if name in models else name for name in names]
        words = ["score", "--models", *entries, *command(**defaults | flags)]
        drawing = ("draw_scores", "draw_costs", "draw_compliance")  # a second a run that most tests can spare
        with changed(evaluate, **({} if draw else dict.fromkeys(drawing, lambda *args: None))):
            return run_main(evaluate, processes, words)

    score.defaults = defaults
    return score


@pytest.fixture(scope="module")
def finished(score, tmp_path_factory):
    """Folder of an evaluation of two models, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluations") / "finished"
    outcome = score("first", "second", output_dir=folder, compare_prompts=True, draw=True)
    assert outcome.code == 0, outcome.err
    return folder, outcome


def answered(folder) -> list[dict]:
    return read_lines(folder / "responses.jsonl")


# ---- Answers and scores


def test_answers_are_those_of_a_runs_evaluation(repo_run, score, tmp_path):
    """A run's final model, under the run's settings, writes the run's last evaluation again."""
    outcome = score(f"run={repo_run / 'model'}", output_dir=tmp_path / "out", batch_size=16)
    assert outcome.code == 0, outcome.err
    after = [row for row in read_lines(repo_run / "eval.jsonl") if row["iteration"] == 3]
    for row, expected in zip(answered(tmp_path / "out"), after, strict=True):
        for name in ("prompt", "response", "length"):
            assert row[name] == expected[name]
        for name in ("reward", "cost"):
            assert row[name] == pytest.approx(expected[name], abs=1e-5)
    after = json.loads((repo_run / "summary.json").read_text())["after"]
    table = json.loads((tmp_path / "out" / "table.json").read_text())["models"]["run"]
    for name, value in after.items():
        assert table[name]["mean"] == pytest.approx(value, abs=1e-5), name


def test_scores_are_those_of_the_score_models(score, files, tmp_path):
    """Read one by one, each sampled sequence by itself and without padding."""
    sampled, sample_responses = [], evaluate.sample_responses

    def record(*rest):
        responses = sample_responses(*rest)
        for ids, mask in zip(responses.sequences, responses.attention_mask, strict=True):
            sampled.append(ids[mask > 0])
        return responses

    with changed(evaluate, sample_responses=record):
        assert score("first", "second", output_dir=tmp_path / "out").code == 0
    tokenizer = AutoTokenizer.from_pretrained(files.policy)
    rows = answered(tmp_path / "out")
    assert [(row["model"], row["index"]) for row in rows] == [(m, i) for m in ("first", "second") for i in range(13)]
    for name in ("reward", "cost"):
        scorer = evaluate.load_score_model(str(getattr(files, name)), torch.float32, "", 1, False)
        for row, ids in zip(rows, sampled, strict=True):
            with torch.no_grad():
                expected = scorer(ids[None], torch.ones_like(ids)[None])[0, -1].item()
            assert row[name] == pytest.approx(expected, abs=1e-5)
            prompt = tokenizer(row["prompt"])["input_ids"]
            assert ids[: len(prompt)].tolist() == prompt and len(ids) == len(prompt) + row["length"]
            assert row["response"] == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            assert row["finished"] == (ids[-1] == tokenizer.eos_token_id)


def test_greedy_answers_are_the_librarys(score, models, files, tmp_path):
    assert score("second", output_dir=tmp_path / "out", greedy=True).code == 0
    model = AutoModelForCausalLM.from_pretrained(models["second"])
    tokenizer = AutoTokenizer.from_pretrained(models["second"])
    for row in answered(tmp_path / "out"):
        ids = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**ids, do_sample=False, max_new_tokens=16)[0, ids["input_ids"].shape[1] :]
        assert row["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert row["length"] == len(tokens)


def test_a_model_with_a_tokenizer_of_its_own(score, files, models, tmp_path):
    """Its answers are scored as texts: as by score models that read its tokens."""
    permuted = {name: tiny.permuted_copy(getattr(files, name), tmp_path / name) for name in ("reward", "cost")}
    assert score("first", "reversed", output_dir=tmp_path / "one").code == 0
    flags = dict(reward_model=permuted["reward"], cost_model=permuted["cost"])
    assert score("first", "reversed", output_dir=tmp_path / "other", **flags).code == 0
    compared = 0
    for row, expected in zip(answered(tmp_path / "one"), answered(tmp_path / "other"), strict=True):
        assert row["response"] == expected["response"] and row["length"] == expected["length"]
        tokenizer = AutoTokenizer.from_pretrained(models[row["model"]])
        if (
            len(tokenizer(row["response"])["input_ids"]) + row["finished"] == row["length"]
        ):  # special tokens are no text
            compared += 1
            for name in ("reward", "cost"):
                assert row[name] == pytest.approx(expected[name], abs=1e-4)
    assert compared > 8


def test_two_processes_answer_as_one(score, models, finished, tmp_path):
    entries = [f"{name}={models[name]}" for name in ("first", "second")]
    words = command(**score.defaults | dict(output_dir=tmp_path / "out", cpu_offload=True))
    program = [ROOT / "tests" / "sharded.py", "evaluate", "score", "--models", *entries, *words]
    outcome = finish(start(program, processes=2, python_path=ROOT), seconds=400)
    assert outcome.code == 0, outcome
    for row, expected in zip(answered(tmp_path / "out"), answered(finished[0]), strict=True):
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, abs=1e-4) if name in ("reward", "cost") else value)


# ---- Prompts


def test_every_format_of_prompts_gives_the_same_answers(score, finished, files, tmp_path):
    texts = [row["prompt"] for row in read_lines(files.test)]
    rows = [{"question": text} for text in texts]
    (tmp_path / "list.json").write_text(json.dumps([*texts, texts[0]]))
    (tmp_path / "suite.json").write_text(json.dumps({"name": "a suite", "instructions": texts}))
    for name in ("objects.json", "rows.jsonl", "rows.csv", "rows.parquet"):
        tiny.write_rows(tmp_path / name, rows)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert len(names) == 6
    for name in names:
        flags = dict(dataset=tmp_path / name, prompt_column="question", output_dir=tmp_path / f"of {name}")
        outcome = score("first", **flags)
        assert outcome.code == 0, outcome.err
        assert answered(tmp_path / f"of {name}") == answered(finished[0])[:13], name


def test_the_first_prompts_and_slices(score, finished, files, tmp_path):
    texts = [row["prompt"] for row in read_lines(files.test)]
    (tmp_path / "list.json").write_text(json.dumps(texts))
    assert score("first", output_dir=tmp_path / "size", eval_size=5).code == 0
    assert score("first", output_dir=tmp_path / "split", dataset_split="train[:5]").code == 0
    flags = dict(dataset=tmp_path / "list.json", dataset_split="test[:5]")
    assert score("first", output_dir=tmp_path / "list", **flags).code == 0
    for name in ("size", "split", "list"):
        assert answered(tmp_path / name) == answered(finished[0])[:5]


def test_long_prompts_are_dropped_for_all(score, files, models, tmp_path):
    """Over the limit in the tokenizer of one model is enough; the others do not answer such a prompt either."""
    letters = tiny.make_tokenizer([*"abdefgiklmnoprstu"])
    by_letter = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    letters.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(by_letter)
    spelling = tiny.make_model(tmp_path / "spelling", seed=7, tokenizer=letters)
    texts = list(dict.fromkeys(row["prompt"] for row in read_lines(files.test)))
    short = [text for text in texts if len(text.replace(" ", "")) <= 9]
    assert 0 < len(short) < len(texts)
    outcome = score("first", f"spelling={spelling}", output_dir=tmp_path / "out", max_prompt_length=9)
    assert outcome.code == 0, outcome.err
    assert f"dropped {len(texts) - len(short)} of {len(texts)} prompts" in outcome.out
    assert [row["prompt"] for row in answered(tmp_path / "out")] == short * 2


# ---- Statistics


def rows_of(rewards, costs, name="model"):
    return [
        {"model": name, "index": i, "prompt": f"p{i}", "response": f"{name} {i}", "reward": r, "cost": c}
        | {"length": 1 + i, "finished": True}
        for i, (r, c) in enumerate(zip(rewards, costs, strict=True))
    ]


def test_measures_and_ties():
    one = rows_of([0.0, 1.0, 2.0, 3.0], [-1.0, 0.5, 0.0, 2.0], "one")
    other = rows_of([0.0, 2.0, 1.0, 4.0], [0.0, 0.5, 0.0, 1.0], "other")
    table = evaluate.tabulate({"one": one, "other": other}, 0.5, 10, torch.Generator())
    assert list(table["other"]) == list(evaluate.MEASURES)
    means = {key: value["mean"] for key, value in table["other"].items()}
    expected = dict(reward=1.75, cost=0.375, safety_compliance=0.75, violation=0.125, response_length=2.5)
    assert means == expected | dict(reward_win_rate=0.625, cost_win_rate=0.5)
    assert table["one"]["reward_win_rate"] is None and table["one"]["cost_win_rate"] is None
    summary = repo.summarize(other, 0.5)
    assert {key: means[key] for key in summary} == summary


def test_the_same_answer_is_a_tie_whatever_the_rounding():
    one, other = rows_of([1.0, 2.0], [0.5, 0.25], "one"), rows_of([1.0000001, 3.0], [0.4999999, 0.2], "other")
    other[0]["response"] = one[0]["response"]
    row = evaluate.tabulate({"one": one, "other": other}, 0.0, 10, torch.Generator())["other"]
    assert row["reward_win_rate"]["mean"] == 0.75 and row["cost_win_rate"]["mean"] == 0.75


def test_intervals_of_two_prompts_are_known():
    """Means of resampled (0, 1) are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the 95% interval is the whole range."""
    values = torch.tensor([[0.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    intervals = evaluate.bootstrap(values, 1000, torch.Generator().manual_seed(0))
    assert intervals.tolist() == [[0.0, 1.0], [3.0, 3.0]]


def test_intervals_are_those_of_a_plain_bootstrap():
    """Of all resamples at once by indexing, from the same generator; a seed repeats them, another changes them."""
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    intervals = evaluate.bootstrap(values, 500, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    drawn = torch.stack([torch.randint(40, (40,), generator=generator) for _ in range(500)])
    means = values[:, drawn].mean(-1).sort(1).values
    for interval, ordered in zip(intervals, means, strict=True):
        for limit, share in zip(interval.tolist(), (0.025, 0.975), strict=True):
            place = share * 499
            below, above = ordered[int(place)].item(), ordered[int(place) + 1].item()
            assert limit == pytest.approx(below + (place - int(place)) * (above - below))
    assert torch.equal(intervals, evaluate.bootstrap(values, 500, torch.Generator().manual_seed(2)))
    assert not torch.equal(intervals, evaluate.bootstrap(values, 500, torch.Generator().manual_seed(3)))


def test_intervals_cover_the_mean():
    """Of 400 samples of 60 normal numbers about 95% have an interval around the true mean (a little less: 94%)."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 60, generator=generator, dtype=torch.float64)
    low, high = evaluate.bootstrap(samples, 400, generator).T
    assert 0.90 < ((low < 0) & (high > 0)).double().mean() < 0.98
    half = (high - low).mean().item() / 2
    assert half == pytest.approx(1.96 / 60**0.5, rel=0.05)


def test_a_difference_of_models_is_resampled_in_pairs():
    """A model that is better by a hair on every prompt wins always, however much prompts differ."""
    rewards = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    better = rows_of([reward + 1e-6 for reward in rewards], rewards, "other")
    table = evaluate.tabulate({"one": rows_of(rewards, rewards), "other": better}, 0.0, 100, torch.Generator())
    assert table["other"]["reward_win_rate"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert table["other"]["cost_win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_the_table_is_that_of_the_answers(finished):
    folder, outcome = finished
    table, rows = json.loads((folder / "table.json").read_text()), answered(folder)
    assert table["baseline"] == "first" and table["prompts"] == 13 and table["dtype"] == "float32"
    first, second = ([row for row in rows if row["model"] == name] for name in ("first", "second"))
    for name, own in (("first", first), ("second", second)):
        for key, value in repo.summarize(own, 0.0).items():
            entry = table["models"][name][key]
            assert entry["mean"] == pytest.approx(value)
            assert entry["low"] <= entry["mean"] <= entry["high"]
    wins = sum(b["reward"] > a["reward"] for a, b in zip(first, second, strict=True)) / 13
    assert table["models"]["second"]["reward_win_rate"]["mean"] == pytest.approx(wins)
    lines = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and all(line.count("|") == 9 for line in lines)
    assert lines[2].startswith("| first ") and f"{table['models']['first']['reward']['mean']:.2f} [" in lines[2]


# ---- Prompts that pay for others


def test_compensated_prompts_come_worst_first():
    answers = {
        "a": rows_of([1, 2, 3, 4, 5], [1.0, -1.0, 3.0, -2.0, 0.0], "a"),
        "b": rows_of([5, 6, 7, 8, 9], [0.0, 2.0, 4.0, -1.0, 0.5], "b"),
        "c": rows_of([6, 5, 4, 3, 2], [-9.0, 1.0, -1.0, -3.0, 9.0], "c"),
    }
    rows = evaluate.compensated_prompts(answers, 0.0)
    found = [(row["index"], row["unsafe"]["model"], row["safe"]["model"]) for row in rows]
    assert found == [(4, "c", "a"), (2, "b", "c"), (1, "b", "a"), (0, "a", "c")]
    assert rows[0]["prompt"] == "p4"
    assert rows[0]["unsafe"]["response"] == "c 4" and rows[0]["unsafe"]["cost"] == 9.0
    assert rows[0]["safe"]["response"] == "a 4" and rows[0]["safe"]["reward"] == 5


def test_compensated_prompts_are_written_and_shown(finished, score, tmp_path):
    folder, outcome = finished
    rows, answers = read_lines(folder / "compare_prompts.jsonl"), answered(folder)
    costs = {(row["model"], row["index"]): row["cost"] for row in answers}
    mixed = [i for i in range(13) if (costs["first", i] > 0) != (costs["second", i] > 0)]
    assert sorted(row["index"] for row in rows) == mixed and len(mixed) > 2
    assert [row["unsafe"]["cost"] for row in rows] == sorted((row["unsafe"]["cost"] for row in rows), reverse=True)
    assert f"{len(mixed)} of 13 prompts are unsafe under one model and safe under another" in outcome.out
    shutil.copytree(folder, tmp_path / "copy")
    shown = score("first", "second", output_dir=tmp_path / "copy", compare_prompts=True, compare_limit=2).out
    assert shown.count("\n  unsafe  ") == shown.count("\n  safe    ") == 2
    assert shown.index(rows[0]["prompt"]) < shown.index(rows[1]["prompt"])
    quiet = score("first", "second", output_dir=tmp_path / "copy").out
    assert "unsafe under" not in quiet and len(read_lines(folder / "compare_prompts.jsonl")) == len(mixed)


# ---- Figures


def test_figures_have_the_width_of_a_page(finished):
    for name in FIGURES:
        data = (finished[0] / name).read_bytes()
        assert data.startswith(b"\x89PNG") and 2_000 < len(data) < 100_000
        width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
        assert 480 <= width <= 830 and 150 <= height <= 830


def test_a_method_keeps_its_colour():
    colors = evaluate.method_colors(["mine", "repo", "other", "ppo"])
    assert colors["repo"] == evaluate.COLORS["repo"] and colors["ppo"] == evaluate.COLORS["ppo"]
    assert len(set(colors.values())) == 4
    assert len(set(evaluate.COLORS.values())) == len(evaluate.COLORS) == 9
    assert len(evaluate.method_colors([f"model-{i}" for i in range(30)])) == 30


def test_figures_of_one_answer_and_of_many_long_names(tmp_path):
    """No range of scores, no spread, names as long as they may be."""
    sets = [{"a": rows_of([1.0], [0.0])}, {f"{'long-' * 12}{i:04}": rows_of([1.0, i], [i - 5, 0.0]) for i in range(12)}]
    for answers in sets:
        table = evaluate.tabulate(answers, 0.0, 10, torch.Generator())
        evaluate.draw_scores(tmp_path / FIGURES[0], answers, 0.0)
        evaluate.draw_costs(tmp_path / FIGURES[1], answers, 0.0)
        evaluate.draw_compliance(tmp_path / FIGURES[2], table)
        assert all((tmp_path / name).stat().st_size < 100_000 for name in FIGURES)


# ---- Going on


def test_an_evaluation_that_was_killed_goes_on(finished, score, tmp_path):
    """With the last line torn in the middle of a batch: the missing answers alone, and the same files in the end."""
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    whole = contents(folder)
    lines = whole["responses.jsonl"].splitlines(keepends=True)
    (folder / "responses.jsonl").write_bytes(b"".join(lines[:17]) + lines[17][:40])
    for name in (*FIGURES, "table.json", "compare_prompts.jsonl"):
        (folder / name).unlink()
    sampled, sample_responses = [], evaluate.sample_responses

    def record(policy, tokenizer, prompts, *rest):
        sampled.append(len(prompts))
        return sample_responses(policy, tokenizer, prompts, *rest)

    with changed(evaluate, sample_responses=record):
        assert score("first", "second", output_dir=folder, compare_prompts=True, draw=True).code == 0
    assert sampled == [5, 5, 3]  # the batches of the second model, the first of them cut short
    after = contents(folder)
    assert after.keys() == whole.keys()
    assert [name for name in whole if after[name] != whole[name]] == ["args.json"]  # where --output-dir stands


def test_a_finished_evaluation_loads_no_model(finished, score, tmp_path):
    """It writes table and figures again, under settings that change no answer; another order has another baseline."""
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    before = contents(folder)

    def refuse(*args, **kwargs):
        raise AssertionError

    with changed(evaluate, load_pretrained=refuse):
        flags = dict(bootstrap_resamples=50, cost_threshold=-0.5, batch_size=3)
        assert score("second", "first", output_dir=folder, **flags).code == 0
    after = contents(folder)
    assert after["responses.jsonl"] == before["responses.jsonl"] and after["table.json"] != before["table.json"]
    table = json.loads(after["table.json"])
    assert table["baseline"] == "second" and table["cost_threshold"] == -0.5
    args = json.loads(after["args.json"])
    assert args["bootstrap_resamples"] == 50 and set(args["models"]) == {"first", "second"}


def test_a_model_is_added(finished, score, models, tmp_path):
    """It alone is answered, as if it had been there from the beginning; models that are left out keep their answers."""
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    assert score("first", "reversed", output_dir=folder).code == 0
    rows = answered(folder)
    assert rows[:26] == answered(finished[0]) and [row["model"] for row in rows[26:]] == ["reversed"] * 13
    assert list(json.loads((folder / "table.json").read_text())["models"]) == ["first", "reversed"]
    assert list(json.loads((folder / "args.json").read_text())["models"]) == ["first", "second", "reversed"]
    assert score("reversed", output_dir=tmp_path / "alone").code == 0
    assert answered(tmp_path / "alone") == rows[26:]


@pytest.fixture
def refused(score, tmp_path):
    """refused(folder, *parts, names, **flags): one line that holds the parts, status 2, and nothing changed."""

    def refused(folder, *parts, names=("first",), **flags):
        before = contents(folder) if folder.exists() else None
        outcome = score(*names, **dict(output_dir=folder) | flags)
        line = outcome.err.strip()
        assert outcome.code == 2, outcome
        assert line.startswith("error: ") and len(line.splitlines()) == 1, outcome.err
        for part in parts:
            assert str(part) in line, f"{part!r} is not in: {line}"
        assert (contents(folder) if folder.exists() else None) == before

    return refused


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(seed=2), "--seed is 2"),
        (dict(temperature=0.5), "--temperature is 0.5"),
        (dict(greedy=True), "--greedy is True"),
        (dict(max_new_tokens=8), "--max-new-tokens is 8"),
        (dict(max_prompt_length=50), "--max-prompt-length is 50"),
        (dict(eval_size=3), "--eval-size is 3"),
        (dict(dtype="bfloat16"), "--dtype is bfloat16"),
        (dict(prompt_template="Q {prompt}"), "--prompt-template is Q"),
        (dict(score_prompt_template="Q {prompt}"), "--score-prompt-template is Q"),
        (dict(dataset_split="train[:12]"), "--dataset-split is train[:12]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_settings_do_not_go_on(refused, finished, flags, part):
    refused(finished[0], part, str(finished[0]), **flags)


def test_other_models_and_data_do_not_go_on(refused, finished, files, models, tmp_path):
    refused(finished[0], "--reward-model is", files.cost, reward_model=files.cost)
    refused(finished[0], "--cost-model is", files.reward, cost_model=files.reward)
    refused(finished[0], "--models first is", models["second"], files.policy, names=[f"first={models['second']}"])
    refused(finished[0], "--dataset is", files.train, dataset=files.train)


def test_data_that_changed_do_not_go_on(refused, score, files, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(files.test.read_bytes())
    assert score("first", output_dir=tmp_path / "out", dataset=data).code == 0
    data.write_text(files.test.read_text().replace("?", "."))
    refused(tmp_path / "out", "--dataset", "changed", dataset=data)


def test_folders_of_others_are_refused(refused, repo_run, finished, tmp_path):
    refused(repo_run, "--output-dir", "another script's run")
    shutil.copytree(finished[0], tmp_path / "bare")
    (tmp_path / "bare" / "args.json").unlink()
    refused(tmp_path / "bare", "--output-dir", "responses.jsonl", "no args.json")
    shutil.copytree(finished[0], tmp_path / "broken")
    with (tmp_path / "broken" / "responses.jsonl").open("a") as file:
        file.write('{"model": "first"}\n')
    refused(tmp_path / "broken", "responses.jsonl, line 27")
    (tmp_path / "file").write_text("a file")
    outcome_folder = tmp_path / "file" / "out"
    refused(outcome_folder, "--output-dir", outcome_folder)


# ---- Mistakes


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(names=["policy"]), "write name=path"),
        (dict(names=["first="]), "write name=path"),
        (dict(names=["=policy"]), "a name has"),
        (dict(names=["../up=policy"]), "a name has"),
        (dict(names=["a b=policy"]), "a name has"),
        (dict(names=[f"{'a' * 65}=policy"]), "a name has"),
        (dict(names=["first", "first"]), "two models have the name first"),
        (dict(names=[]), "--models is empty"),
        (dict(names=["a=nobody/nothing"]), "--models a nobody/nothing"),
        (dict(reward_model="nobody/nothing"), "--reward-model nobody/nothing"),
        (dict(cost_model="nobody/nothing"), "--cost-model nobody/nothing"),
        (dict(dataset="nobody/nothing.json"), "--dataset nobody/nothing.json"),
        (dict(prompt_column="question"), "no column 'question'"),
        (dict(max_prompt_length=2), "all prompts are over --max-prompt-length 2"),
        (dict(max_new_tokens=125), "--max-new-tokens 125"),
        (dict(max_new_tokens=0), "--max-new-tokens is 0"),
        (dict(temperature=0), "--temperature is 0"),
        (dict(batch_size=0), "--batch-size is 0"),
        (dict(bootstrap_resamples=0), "--bootstrap-resamples is 0"),
        (dict(eval_size=-1), "--eval-size is -1"),
        (dict(compare_limit=-1), "--compare-limit is -1"),
        (dict(cost_threshold="nan"), "--cost-threshold is nan"),
        (dict(seed=-1), "--seed is -1"),
        (dict(prompt_template="Q:"), "--prompt-template"),
        (dict(score_prompt_template="Q:"), "--score-prompt-template"),
        (dict(dtype="float16"), "float16"),
        (dict(bath_size=8), "bath-size"),
    ],
    ids=lambda value: ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else "",
)
def test_flags(refused, tmp_path, flags, part):
    refused(tmp_path / "out", part, **flags)


@pytest.mark.parametrize(
    "content, parts",
    [
        ("[", ["cannot be read"]),
        ("[]", ["--dataset"]),
        ('["ba", ""]', ["row 1", "empty"]),
        ('["ba", 7]', ["row 1", "no text"]),
        ('[{"text": "ba"}]', ["no column 'prompt'", "text"]),
        ('["ba", "\\ud800"]', ["surrogate"]),
        ('{"instructions": []}', ["no column 'prompt'"]),
        ('{"prompts": ["ba"]}', ["no column 'prompt'", "prompts"]),
    ],
    ids=["broken", "no rows", "empty", "number", "objects", "half a character", "no instructions", "other key"],
)
def test_json_files(refused, tmp_path, content, parts):
    (tmp_path / "data.json").write_text(content)
    refused(tmp_path / "out", f"--dataset {tmp_path / 'data.json'}", *parts, dataset=tmp_path / "data.json")


def test_a_slice_of_a_json_file_that_is_none(refused, tmp_path):
    (tmp_path / "data.json").write_text('["ba"]')
    refused(tmp_path / "out", "--dataset-split 'test['", dataset=tmp_path / "data.json", dataset_split="test[")


def test_the_command_has_a_name(processes):
    for words, part in (([], "score"), (["scroe"], "scroe"), (["--models", "a=b"], "--models")):
        outcome = run_main(evaluate, processes, words)
        assert outcome.code == 2 and len(outcome.errors) == 1 and part in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1


def test_score_models_are_checked_before_anything_is_written(refused, files, tmp_path):
    refused(tmp_path / "out", f"--reward-model {files.policy}", "score head", reward_model=files.policy)


def test_a_model_that_cannot_be_loaded_keeps_the_others_answers(score, models, finished, tmp_path):
    """The same command goes on when it is mended; a name without answers may get another path."""

    def lacks(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]

    broken = tiny.copy_model(models["second"], tmp_path / "broken", lacks)
    outcome = score("first", f"second={broken}", output_dir=tmp_path / "out")
    assert outcome.code == 2 and len(outcome.errors) == 1 and f"--models second {broken}" in outcome.errors[0]
    assert answered(tmp_path / "out") == answered(finished[0])[:13]
    assert score("first", "second", output_dir=tmp_path / "out").code == 0
    assert answered(tmp_path / "out") == answered(finished[0])


def test_torn_weights_and_score_models_are_found_before_the_first_answer(refused, models, files, tmp_path):
    broken = tiny.copy_model(models["second"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for path, part in ((broken, "model.safetensors"), (files.reward, "a score model")):
        refused(tmp_path / "out", f"--models second {path}", part, names=("first", f"second={path}"))


def test_a_list_of_texts_with_a_byte_order_mark(score, finished, tmp_path):
    texts = [row["prompt"] for row in answered(finished[0])[:13]]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8-sig")
    flags = dict(dataset=tmp_path / "texts.json", output_dir=tmp_path / "out")
    assert score("first", **flags).code == 0
    assert answered(tmp_path / "out") == answered(finished[0])[:13]


def test_scores_that_are_no_numbers(score, files, tmp_path):
    def change(weights):
        weights["score.weight"].fill_(float("nan"))

    broken = tiny.copy_model(files.reward, tmp_path / "broken", change)
    outcome = score("first", output_dir=tmp_path / "out", reward_model=broken)
    assert outcome.code == 2 and "--reward-model: the score of first on prompt 0 is nan" in outcome.errors[0]
    assert answered(tmp_path / "out") == []


# ---- The page


def test_the_page_tells_what_is_written(finished):
    folder = finished[0]
    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    table = json.loads((folder / "table.json").read_text())
    names = [*contents(folder), *table, *table["models"]["second"], *table["models"]["second"]["reward"]]
    names += [*answered(folder)[0], *read_lines(folder / "compare_prompts.jsonl")[0]]
    assert [name for name in names if f"`{name}`" not in text] == []
    written = set(re.findall(r"^\| `([\w.]+)`", text.partition("## Files")[2].partition("\n## ")[0], re.MULTILINE))
    assert written == set(contents(folder))
    keys = re.findall(r"^\| `(\w+)` \|", text.partition("## Table")[2].partition("\n## ")[0], re.MULTILINE)
    assert keys == list(evaluate.MEASURES)


def test_args_hold_every_flag_and_the_prompts(finished, files):
    args = json.loads((finished[0] / "args.json").read_text())
    assert set(args) == {field.name for field in dataclasses.fields(evaluate.Score)} | {
        "command", "prompts", "prompts_sha256",
    }  # fmt: skip
    texts = [row["prompt"] for row in answered(finished[0])[:13]]
    assert args["prompts"] == 13
    assert args["prompts_sha256"] == hashlib.sha256(json.dumps(texts).encode()).hexdigest()
