"""`score` and `card`: the answers of repo.py's evaluation, numbers by other means, going on, suites, mistakes."""

import itertools
import json
import math
import shutil
from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
import world
from helpers import ROOT, changed, command, contents, read_json, read_lines, read_summary, run_main
from huggingface_hub import ModelCard
from test_judge import run as call
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluation.score
import repo
from evaluation import figures, suites, tables
from evaluation.sampling import read_prompts
from evaluation.score import Score

FIGURES = ("reward_cost.png", "cost_distribution.png", "compliance_reward.png")


@pytest.fixture(scope="module")
def repo_run(processes, defaults, tmp_path_factory):
    """Folder of a run of repo.py: two iterations."""
    folder = tmp_path_factory.mktemp("runs") / "repo"
    assert run_main(repo, processes, command(**defaults["repo"] | dict(output_dir=folder))).code == 0
    return folder


@pytest.fixture(scope="module")
def models(files, tmp_path_factory):
    """Three policies: two of other weights, and one whose tokenizer has the words in another order."""
    folder, other = tmp_path_factory.mktemp("models"), tiny.make_tokenizer(tiny.WORDS[::-1])
    return {
        "first": files.policy,
        "second": tiny.make_model(folder / "second", seed=5),
        "reversed": tiny.make_model(folder / "reversed", seed=6, tokenizer=other),
    }


@pytest.fixture(scope="module")
def score(processes, files, models):
    """score(*names, **flags): `score` in this process on the tiny files. Returns an Outcome."""
    defaults = dict(reward_model=files.reward, cost_model=files.cost, dataset=files.test, dataset_split="train")
    defaults |= dict(dtype="float32", max_new_tokens=16, batch_size=5, bootstrap_resamples=200)

    def score(*names, draw=False, **flags):
        entries = [f"{name}={models[name]}" if name in models else name for name in names]
        draw_figures = evaluation.score.draw_figures if draw else lambda folder: None  # most tests can spare the second
        alone = changed(repo, start_processes=lambda: processes), changed(dist, destroy_process_group=lambda: None)
        with alone[0], alone[1], changed(evaluation.score, draw_figures=draw_figures):
            return call(["score", "--models", *entries, *command(**defaults | flags)])

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


def table_of(folder) -> dict:
    return read_json(folder / "table.json")


def test_answers_are_those_of_a_runs_evaluation(repo_run, score, tmp_path):
    """A run's final model, under the run's settings, writes the run's last evaluation again."""
    assert score(f"run={repo_run / 'model'}", output_dir=tmp_path / "out", batch_size=16).code == 0
    rows = read_lines(repo_run / "eval.jsonl")
    for row, expected in zip(answered(tmp_path / "out"), rows[-13:], strict=True):
        assert all(row[name] == expected[name] for name in ("prompt", "response", "length"))
        assert (row["reward"], row["cost"]) == pytest.approx((expected["reward"], expected["cost"]), abs=1e-5)
    table = table_of(tmp_path / "out")["models"]["run"]
    for name, value in read_summary(repo_run)["after"].items():
        assert table[name]["mean"] == pytest.approx(value, abs=1e-5), name


def test_greedy_answers_are_the_librarys(score, models, tmp_path):
    assert score("second", output_dir=tmp_path / "out", greedy=True).code == 0
    model, tokenizer = (cls.from_pretrained(models["second"]) for cls in (AutoModelForCausalLM, AutoTokenizer))
    for row in answered(tmp_path / "out"):
        ids = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**ids, do_sample=False, max_new_tokens=16)[0, ids["input_ids"].shape[1] :]
        assert row["response"].strip() == tokenizer.decode(tokens, skip_special_tokens=True)
        assert row["length"] == len(tokens)
        assert row["finished"] == (tokens[-1] == tokenizer.eos_token_id)


def test_a_model_with_a_tokenizer_of_its_own(score, files, models, tmp_path):
    """Its answers are scored as texts: as by score models that read its tokens."""
    reward, cost = (tiny.permuted_copy(folder, tmp_path / folder.name) for folder in (files.reward, files.cost))
    assert score("first", "reversed", output_dir=tmp_path / "one").code == 0
    assert score("first", "reversed", output_dir=tmp_path / "other", reward_model=reward, cost_model=cost).code == 0
    compared = 0
    for row, expected in zip(answered(tmp_path / "one"), answered(tmp_path / "other"), strict=True):
        assert row["response"] == expected["response"]
        tokenizer = AutoTokenizer.from_pretrained(models[row["model"]])
        if len(tokenizer(row["response"])["input_ids"]) + row["finished"] == row["length"]:  # all of it is text
            compared += 1
            assert (row["reward"], row["cost"]) == pytest.approx((expected["reward"], expected["cost"]), abs=1e-4)
    assert compared > 8


def test_two_processes_answer_as_one(score, models, finished, forks, tmp_path):
    words = command(**score.defaults | dict(output_dir=tmp_path / "out", cpu_offload=True))
    entries = [f"{name}={models[name]}" for name in ("first", "second")]
    outcomes = forks.start([ROOT / "evaluation" / "__main__.py", "score", "--models", *entries, *words], 2).finish()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    for row, expected in zip(answered(tmp_path / "out"), answered(finished[0]), strict=True):
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, abs=1e-4) if name in ("reward", "cost") else value)


def test_every_format_of_prompts_gives_the_same_answers(score, finished, files, tmp_path):
    texts, pair = [row["prompt"] for row in read_lines(files.test)], ("chosen", "rejected")
    turns, answer = [{"role": "user", "content": x} for x in texts], {"role": "assistant", "content": "ba"}
    forms = {"list": [*texts, texts[0]], "suite": {"name": "a suite", "instructions": texts}}
    forms |= {"texts": [{"question": x} for x in texts], "messages": [{"messages": [turn, answer]} for turn in turns]}
    forms["pairs"] = [{"question": [turn]} | {key: [answer] for key in pair} for turn in turns]
    forms["hh-rlhf"] = [dict.fromkeys(pair, f"\n\nHuman: {x}\n\nAssistant: ba") for x in texts]
    forms["Alpaca"] = [{"instruction": x, "input": "", "output": "ba"} for x in texts]
    forms["ShareGPT"] = [{"conversations": [{"from": "human", "value": x}]} for x in texts]
    tokenizer = repo.load_tokenizer(str(files.policy), "--models first")
    for name, rows in forms.items():
        (path := tmp_path / f"{name}.json").write_text(json.dumps(rows), "utf-8-sig" if name == "list" else "utf-8")
        args = Score(dataset=str(path), dataset_split="train", prompt_column="question")
        assert [row["prompt"] for row in read_prompts(args, {"first": tokenizer})[0]] == texts, name
    assert score("first", output_dir=tmp_path / "size", eval_size=5).code == 0
    assert answered(tmp_path / "size") == answered(finished[0])[:5]
    outcome = score("first", output_dir=tmp_path / "short", max_prompt_length=5)
    short = [row["prompt"] for row in answered(tmp_path / "short")]
    assert short == [text for text in texts if len(text.split()) < 5]
    assert f"kept {len(short)} of 13 rows" in outcome.err and "one over 5 tokens" in outcome.err


def test_a_prompt_of_several_messages(score, files, models, tmp_path):
    """It needs a chat template; it is kept as it is, and people and judges read it as lines."""
    tokenizer, policies = tiny.make_tokenizer(), [models["first"], models["second"]]
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} . {% endfor %}"
    for source in (*policies, files.reward, files.cost):
        tokenizer.save_pretrained(tiny.copy_model(source, tmp_path / source.name))
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("ba", "be", "bi?"))]
    flags = dict(dataset=tiny.write_rows(tmp_path / "chat.jsonl", [{"prompt": turns}]), output_dir=tmp_path / "out")
    flags |= {f"{name}_model": tmp_path / name for name in ("reward", "cost")}
    names, out = [f"{source.name}={tmp_path / source.name}" for source in policies], tmp_path / "out"
    assert "a prompt of several messages does not fit" in score(*names, **flags).errors[0] and not out.exists()
    for _ in range(2):  # the second time no answer is missing
        assert score(*names, **flags, prompt_template="chat").code == 0
    assert [row["prompt"] for row in answered(out)] == [turns, turns]
    assert call(["blind", "export", "--responses", out, "--sheet", tmp_path / "sheet.csv"]).code == 0
    assert "user: ba\nassistant: be\nuser: bi?" in (tmp_path / "sheet.csv").read_text()


def rows_of(rewards, costs, name="model"):
    return [
        {"model": name, "index": i, "prompt": f"p{i}", "response": f"{name} {i}", "reward": r, "cost": c}
        | {"length": 1 + i, "finished": True}
        for i, (r, c) in enumerate(zip(rewards, costs, strict=True))
    ]


def test_measures_and_ties():
    one = rows_of([0.0, 1.0, 2.0, 3.0], [-1.0, 0.5, 0.0, 2.0], "one")
    other = rows_of([0.0, 2.0, 1.0, 4.0], [0.0, 0.5, 0.0, 1.0], "other")
    table = tables.tabulate({"one": one, "other": other}, 0.5, 10, np.random.default_rng(0))
    means = {key: table["other"][key]["mean"] for key in tables.MEASURES}
    expected = dict(reward=1.75, cost=0.375, safety_compliance=0.75, violation=0.125, response_length=2.5)
    assert means == expected | dict(reward_win_rate=0.625, cost_win_rate=0.5)
    assert table["one"]["reward_win_rate"] is None and table["one"]["cost_win_rate"] is None
    one, other = rows_of([1.0, 2.0], [0.5, 0.25], "one"), rows_of([1.0000001, 3.0], [0.4999999, 0.2], "other")
    other[0]["response"] = one[0]["response"]  # the same answer is a tie whatever the rounding
    row = tables.tabulate({"one": one, "other": other}, 0.0, 10, np.random.default_rng(0))["other"]
    assert row["reward_win_rate"]["mean"] == 0.75 and row["cost_win_rate"]["mean"] == 0.75


def test_intervals():
    """Of two prompts the range; of 60 normal numbers around the true mean in 95% of samples, as wide as theory says."""
    rng = np.random.default_rng(0)
    drawn = tables.resample(np.array([[0.0, 1.0], [3.0, 3.0]]), 1000, rng)
    assert tables.interval(0.5, drawn[:, 0]) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert tables.interval(3.0, drawn[:, 1]) == {"mean": 3.0, "low": 3.0, "high": 3.0}
    samples = rng.normal(size=(400, 60))
    found = [tables.interval(0.0, means) for means in tables.resample(samples, 400, rng).T]
    assert 0.90 < np.mean([row["low"] < 0 < row["high"] for row in found]) < 0.98
    assert np.mean([row["high"] - row["low"] for row in found]) / 2 == pytest.approx(1.96 / 60**0.5, rel=0.05)


@pytest.mark.parametrize("count, total", [(0, 1), (0, 120), (1, 30), (7, 40), (399, 400), (60, 120), (120, 120)])
def test_the_upper_bound_is_clopper_and_pearsons(count, total):
    """At the bound, `count` or fewer have probability 5%, summed in fractions."""
    bound = tables.share_upper_bound(count, total)
    p = Fraction(bound)
    probability = sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(count + 1))
    assert bound == 1 if count == total else float(probability) == pytest.approx(0.05, rel=1e-6)
    if count == 0:
        assert bound == pytest.approx(1 - 0.05 ** (1 / total))


def test_the_table_is_that_of_the_answers(finished):
    folder, outcome = finished
    table, rows = table_of(folder), answered(folder)
    assert [(row["model"], row["index"]) for row in rows] == [(m, i) for m in ("first", "second") for i in range(13)]
    assert table["baseline"] == "first" and table["prompts"] == 13 and table["dtype"] == "float32"
    first, second = rows[:13], rows[13:]
    for name, own in (("first", first), ("second", second)):
        entry, unsafe = table["models"][name], sum(row["cost"] > 0 for row in own)
        assert entry["reward"]["mean"] == pytest.approx(sum(row["reward"] for row in own) / 13)
        assert entry["safety_compliance"]["mean"] == pytest.approx(1 - unsafe / 13)
        assert entry["unsafe_upper_bound"] == tables.share_upper_bound(unsafe, 13)
        assert f"| {name} " in outcome.out and f"| {entry['unsafe_upper_bound']:.1%} " in outcome.out
    wins = sum(b["reward"] > a["reward"] for a, b in zip(first, second, strict=True)) / 13
    assert table["models"]["second"]["reward_win_rate"]["mean"] == pytest.approx(wins)
    mixed = [i for i in range(13) if (first[i]["cost"] > 0) != (second[i]["cost"] > 0)]
    compared = read_lines(folder / "compare_prompts.jsonl")
    assert sorted(row["index"] for row in compared) == mixed and mixed
    assert all(row["unsafe"]["cost"] > 0 >= row["safe"]["cost"] for row in compared)
    assert [row["unsafe"]["cost"] for row in compared] == sorted(row["unsafe"]["cost"] for row in compared)[::-1]
    assert f"{len(mixed)} of 13 prompts are unsafe under one model and safe under another" in outcome.out
    assert "| wins over first, reward " in outcome.out and "| wins over first, cost " in outcome.out
    assert "\nwins: share of prompts with more reward or less cost, a tie is half" in outcome.out
    assert f"  highest cost: {compared[0]['unsafe']['model']} (reward " in outcome.out


def test_figures(finished, tmp_path):
    """As wide as a page; also of one answer, and of many long names."""
    answers = {f"{'long-' * 12}{i:04}": rows_of([1.0, i], [i - 5, 0.0]) for i in range(12)} | {"a": rows_of([1], [0])}
    figures.draw_scores(tmp_path / FIGURES[0], answers, 0.0)
    figures.draw_costs(tmp_path / FIGURES[1], answers, 0.0)
    for path in [*tmp_path.iterdir(), *(finished[0] / name for name in FIGURES)]:
        data = path.read_bytes()
        width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
        assert data.startswith(b"\x89PNG") and len(data) < 100_000 and 480 <= width <= 830 and 150 <= height <= 930


def test_a_method_looks_the_same_in_every_figure():
    known = figures.STYLES
    assert len({marker for _, marker, _ in known.values()}) == len({*figures.COLORS.values()}) == len(known)
    found = figures.method_styles(["mine", "repo-x", "p-sacpo-0.5", "repo", "p-sacpo-0.25", "reporter"])
    assert found["repo"] == known["repo"] and found["p-sacpo-0.5"] == known["p-sacpo"]
    assert len({*found.values()}) == 6 and found["reporter"] in known.values()
    assert figures.method_styles(["repo-group-2"])["repo-group-2"] == known["repo-group"]
    assert figures.method_colors([*known]) == figures.COLORS
    assert len({*figures.method_styles([str(i) for i in range(100)]).values()}) == 100


def test_an_evaluation_that_was_killed_goes_on(finished, score, tmp_path):
    """With the last line torn in the middle of a batch: the missing answers alone, and the same files in the end."""
    folder, whole = tmp_path / "out", contents(finished[0])
    shutil.copytree(finished[0], folder)
    lines = whole["responses.jsonl"].splitlines(keepends=True)
    (folder / "responses.jsonl").write_bytes(b"".join(lines[:17]) + lines[17][:40])
    sampled, sample_responses = [], repo.sample_responses

    def record(policy, tokenizer, prompts, *rest):
        sampled.append(len(prompts))
        return sample_responses(policy, tokenizer, prompts, *rest)

    with changed(repo, sample_responses=record):
        assert score("first", "second", output_dir=folder, compare_prompts=True, draw=True).code == 0
    assert sampled == [5, 5, 3]  # the batches of the second model, the first of them cut short
    after = contents(folder)
    assert [name for name in whole if after[name] != whole[name]] == ["args.json"]  # where --output-dir is


def test_what_is_free_to_change_and_a_model_that_is_added(finished, score, tmp_path):
    """Without a missing answer no model is loaded; groups, threshold and order are those of the last command."""
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)

    def refuse(*args, **kwargs):
        raise AssertionError

    with changed(repo, load_model=refuse):
        flags = dict(bootstrap_resamples=50, cost_threshold=-0.5, batch_size=3, group_by="safer_response_id")
        outcome = score("second", "first", output_dir=folder, **flags)
    assert outcome.code == 0 and answered(folder) == answered(finished[0]), outcome
    table = table_of(folder)
    assert table["baseline"] == "second" and table["cost_threshold"] == -0.5
    groups = [str(row["safer_response_id"]) for row in read_lines(score.defaults["dataset"])]
    for group, part in table["groups"].items():
        own = [row for row in answered(folder)[13:] if groups[row["index"]] == group]
        assert part["prompts"] == len(own) == groups.count(group)
        share = sum(row["cost"] <= -0.5 for row in own) / len(own)
        assert part["models"]["second"]["safety_compliance"]["mean"] == pytest.approx(share)
        assert f"safer_response_id: {group}, {len(own)} prompts" in outcome.out
    assert set(table["groups"]) == {"0", "1"}
    assert score("first", "reversed", output_dir=folder).code == 0
    rows = answered(folder)
    assert rows[:26] == answered(finished[0]) and [row["model"] for row in rows[26:]] == ["reversed"] * 13
    assert set(read_json(folder / "args.json")["models"]) == {"first", "second", "reversed"}
    assert score("reversed", output_dir=tmp_path / "alone").code == 0
    assert answered(tmp_path / "alone") == rows[26:]


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(seed=2), "--seed is 2, but --output-dir"),
        (dict(dataset="changed.jsonl"), "--dataset is changed.jsonl, but --output-dir"),
        (dict(names=["first=second"]), "--models first is second, but --output-dir"),
        (dict(names=["../up=policy"]), "--models ../up: write name=path"),
        (dict(names=["a=nobody/nothing"]), "--models a nobody/nothing"),
        (dict(output_dir="new", reward_model="first"), "--reward-model first"),
        (dict(dataset="nobody/nothing.json"), "--dataset nobody/nothing.json"),
        (dict(prompt_column="question"), "dropped 13 without a prompt"),
        (dict(group_by="kind"), "--group-by kind: the columns of"),
        (dict(max_prompt_length=1), "kept 0 of 13 rows, cut 0 texts, dropped 13 with"),
        (dict(temperature=0), "--temperature is 0"),
        (dict(prompt_template="Q:"), "has no {prompt} in it"),
        (dict(bath_size=8), "bath-size"),
        (dict(suites=["xtest"]), "--suites xtest is not known; the suites are pku-saferlhf,"),
        (dict(suites=["i-cona"]), "--suites i-cona is not on the Hub; docs/suites.md says where"),
        (dict(suites=["own=own.csv"]), "a label must be safe or unsafe, but there is harmless"),
    ],
)
def test_mistakes(finished, score, files, models, tmp_path, monkeypatch, flags, part):
    """One line, status 2, and nothing is written; a directory that is there stays as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(models[name])
    (tmp_path / "changed.jsonl").write_text(files.test.read_text().replace("?", "."))
    tiny.write_rows(tmp_path / "own.csv", [{"prompt": "ba", "label": "safe"}, {"prompt": "be", "label": "harmless"}])
    before, flags = contents(finished[0]), dict(output_dir=finished[0]) | flags
    outcome = score(*flags.pop("names", ["first"]), **flags)
    assert outcome.code == 2 and part in " ".join(outcome.err.replace("│", "").split()), outcome
    assert "Traceback" not in outcome.err and contents(finished[0]) == before and not (tmp_path / "new").exists()


def test_data_that_changed_and_scores_that_are_no_numbers(score, files, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(files.test.read_bytes())
    assert score("first", output_dir=tmp_path / "out", dataset=data).code == 0
    data.write_text(files.test.read_text().replace("?", "."))
    assert "--dataset: its prompts are not those" in score("first", output_dir=tmp_path / "out", dataset=data).errors[0]
    bad = tiny.copy_model(files.reward, tmp_path / "bad", lambda w: w["model.embed_tokens.weight"][5:].fill_(math.nan))
    outcome = score("first", output_dir=tmp_path / "nan", reward_model=bad)
    assert outcome.code == 2 and "error: --reward-model: the score of first on prompt 0 is nan" in outcome.err
    assert answered(tmp_path / "nan") == []


def test_the_rule_for_refusals():
    for sentence in world.SENTENCES:
        assert suites.refused(sentence) == (sentence in world.REFUSALS), sentence
    refusals = ("I'm sorry, but I can't help.", "I’m really sorry, that is nothing for me.", "Sorry! No.", "", " \n")
    refusals += ("As an AI, I must respectfully decline.", "Breaking locks is both illegal and dangerous.")
    refusals += ("Good question. However, I am not able to say how that is done.", "I cannot fulfil\n\n  this wish")
    answers = ("Sorry to hear that! Restart the computer.", "You can't open it without a key, so call a locksmith.")
    answers += ("Press it. Wait a minute. I cannot stress enough that the cable must be dry.", "No, they did not.")
    assert [text for text in refusals if not suites.refused(text)] == []
    assert [text for text in answers if suites.refused(text)] == []


def suite_row(index, suite, wanted, cost, refuses):
    response = world.REFUSALS[0] if refuses else "Press it."
    return {"index": index, "suite": suite, "wanted": wanted, "cost": cost, "response": response}


def shares(rows, resamples=10):
    table = suites.tabulate_suites({"model": rows}, 0.0, resamples, np.random.default_rng(0))
    return table, {suite: part["models"]["model"] for suite, part in table.items()}


def test_shares_of_suites():
    kinds = enumerate(itertools.product((-1, 1), (0, 1)))
    own = [suite_row(i, "a", "answer", cost, refuses) for i, (cost, refuses) in kinds]
    own += [suite_row(4, "a", "refuse", -1.0, True), suite_row(5, "b", None, 2.0, False)]
    table, found = shares(own)
    counts = {suite: (part["prompts"], part["to_answer"]) for suite, part in table.items()}
    assert counts == {"a": (5, 4), "b": (1, 0), "all": (6, 4)}
    means = {suite: [figure and figure["mean"] for figure in part.values()] for suite, part in found.items()}
    assert means["a"] == pytest.approx([0.6, 0.5, 0.25, 1.0, 2 * 0.25 * 1.0 / 1.25, 1.0])
    assert means["b"] == [0.0, None, None, 0.0, None, 0.0]
    assert means["all"] == pytest.approx([0.5, 0.5, 0.25, 0.5, 2 * 0.25 * 0.5 / 0.75, 0.5])
    for refuses, cost in ((True, -1.0), (False, 1.0)):  # neither refusing all nor answering all earns a balance
        own = [suite_row(i, "a", ("answer", "refuse")[i % 2], cost, refuses) for i in range(20)]
        assert shares(own)[1]["all"]["balance"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    # Over-refusal among 100 of 400 prompts: the half-width of 100 independent answers, not of 400.
    own = [suite_row(i, "a", "answer" if i < 100 else None, -1.0, i % 2 == 0) for i in range(400)]
    figure = shares(own, 2000)[1]["a"]["over_refusal"]
    assert figure["mean"] == 0.5 and (figure["high"] - figure["low"]) / 2 == pytest.approx(0.098, rel=0.1)


def test_suites_from_files(score, tmp_path):
    """In the forms they have; a prompt of two suites counts for the first, and --eval-size is of each."""
    texts = list(dict.fromkeys(tiny.make_sentence(torch.Generator().manual_seed(i), 3, 6) for i in range(40)))
    cona, xstest, own = texts[:4], texts[4:10], [texts[0], *texts[10:12]]
    (tmp_path / "I-CoNa.json").write_text(json.dumps({"instructions": [*cona, cona[0]], "inputs": []}))
    rows = [{"id": i, "prompt": text, "label": ("unsafe", "safe")[i % 2]} for i, text in enumerate(xstest)]
    tiny.write_rows(tmp_path / "xstest.csv", rows)
    tiny.write_rows(tmp_path / "own.jsonl", [{"prompt": text, "label": "safe"} for text in own])
    files = {"i-cona": "I-CoNa.json", "xstest": "xstest.csv", "own": "own.jsonl"}
    flags = dict(suites=[f"{name}={tmp_path / file}" for name, file in files.items()], dataset=None, dataset_split=None)
    assert score("first", **flags, output_dir=tmp_path / "out", draw=True).code == 0
    expected = [("i-cona", text, "refuse") for text in cona]
    expected += [("xstest", text, ("refuse", "answer")[i % 2]) for i, text in enumerate(xstest)]
    expected += [("own", text, "answer") for text in own[1:]]
    assert [(row["suite"], row["prompt"], row["wanted"]) for row in answered(tmp_path / "out")] == expected
    table = table_of(tmp_path / "out")["suites"]
    counts = {suite: (part["prompts"], part["to_answer"]) for suite, part in table.items()}
    assert counts == {"i-cona": (4, 0), "xstest": (6, 3), "own": (2, 2), "all": (12, 5)}
    assert (tmp_path / "out" / "compliance_over_refusal.png").stat().st_size > 2000
    assert score("first", **flags, output_dir=tmp_path / "few", eval_size=2).code == 0
    assert [row["suite"] for row in answered(tmp_path / "few")] == ["i-cona"] * 2 + ["xstest"] * 2 + ["own"] * 2
    unused = flags | dict(dataset="none.jsonl")  # such as the default of another checkout
    assert score("first", **unused, output_dir=tmp_path / "few", eval_size=2).code == 0
    outcome = score("first", **flags | dict(suites=flags["suites"][:1]), output_dir=tmp_path / "out")
    assert outcome.code == 2 and "--suites is" in outcome.errors[0]


def test_the_card_of_a_run(repo_run, tmp_path):
    shutil.copytree(repo_run, tmp_path / "run")
    outcome = call(["card", tmp_path / "run"])
    assert outcome.code == 0 and f"hf upload YOUR_NAME/run {tmp_path / 'run' / 'model'} ." in outcome.out, outcome
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and card.data.tags[0] == "repo"
    assert card.data.base_model is None and card.data.datasets is None and card.data.license is None  # paths are no ids
    summary, args = read_summary(repo_run), read_json(repo_run / "args.json")
    for name, value in summary["after"].items():
        assert f"| {name.replace('_', ' ')} | {summary['before'][name]:.4g} | {value:.4g} |" in card.text
    for name, value in args.items():
        assert (f"| `--{name.replace('_', '-')}` | `{value}` |" in card.text) == (value is not None), name
    assert f"| torch | {torch.__version__} |" in card.text and "arxiv.org/abs/2410.19933" in card.text


def test_cards_of_other_algorithms(tmp_path):
    """SACPO has several models; a base model and data on the Hub are named; a figure may not be finite."""
    args = dict(model="org/base", dataset=["org/pairs"], eval_dataset="org/pairs", prompt_template="{prompt} | A:")
    stages = [{"preference": name, "eval": {"pair_accuracy": 0.6125, "gap": None}} for name in ("helpful", "safe")]
    for name in ("stage1", "stage2", "merged/q0.5"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "model").symlink_to("stage2")
    assert "is not the directory of a finished run" in call(["card", tmp_path]).errors[0]
    (tmp_path / "args.json").write_text(json.dumps(args))
    (tmp_path / "summary.json").write_text(json.dumps({"algorithm": "sacpo", "stages": stages, "processes": 2}))
    assert call(["card", tmp_path]).code == 0
    for name in ("stage1", "model", "merged/q0.5"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.base_model == "org/base" and card.data.datasets == ["org/pairs"]
        assert "| pair accuracy | 0.6125 | 0.6125 |" in card.text and "| gap | not finite | not finite |" in card.text
        assert "| `--prompt-template` | `{prompt} \\| A:` |" in card.text


def test_the_pages_tell_what_is_written(finished):
    folder, text = finished[0], (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table, args = table_of(folder), read_json(folder / "args.json")
    names = [*contents(folder), *table, *table["models"]["second"], *answered(folder)[0], "groups"]
    assert [name for name in names if f"`{name}`" not in text] == []
    assert set(args) == {*Score.__dataclass_fields__, "command", "prompts"}
    page = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")
    for name, suite in suites.SUITES.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        words = {"answer": "all to answer", "refuse": "all to refuse", "label": "`label`", None: "not said"}
        assert words[suite.wanted] in line and (suite.source or "file") in line, line
    assert [name for name in (*suites.SUITE_MEASURES, "suite", "wanted") if f"`{name}`" not in page] == []
