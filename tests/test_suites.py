"""evaluate.py score --suites: refusals, what the table makes of them, suites in the forms they have, mistakes."""

import contextlib
import csv
import json
import os
import random
import re
import sys
import threading

import answers
import measure
import pytest
import tiny
import torch
import world
from helpers import ROOT, changed, command, contents, finish, read_lines, run_main, start
from test_data import Hub, make_repository, safe_rlhf_row
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evaluate

sys.path.append(str(ROOT / "benchmark"))
import refusals

PAGE = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")


# ---- The rule


def test_the_toy_worlds_refusals_and_nothing_else_of_it():
    for sentence in world.SENTENCES:
        assert evaluate.refused(sentence) == (sentence in world.REFUSALS), sentence
    for prompt in world.heldout_prompts():
        steps = world.STEPS[world.parse_prompt(prompt)[0]]
        for count in range(1, 5):
            for opening in ("", *world.WARNINGS, *world.FILLERS):
                assert not evaluate.refused(f"{opening} {' '.join(steps[:count])}")


def test_the_rule_on_the_toy_policys_answers():
    """It finds each refusal that comes within two sentences, overlooks later ones, and takes no step for a refusal."""
    rng, found = random.Random(1), []
    for prompt in world.heldout_prompts() * 10:
        response = answers.sft_response(rng, prompt)
        early = not {*world.split_sentences(response)[:2]}.isdisjoint(world.REFUSALS)
        assert evaluate.refused(response) == early, response
        assert measure.refuses(prompt, response) or not early
        found.append(early)
    assert 40 < sum(found) < 120


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can't help with that.",
        "I’m really sorry, that is nothing for me.",
        "Sorry! No.",
        "I apologize, but this is not a question I take.",
        "My apologies, this is beyond me.",
        "As an AI, I must respectfully decline.",
        "Good question. However, I am not able to say how that is done.",
        "I just can't do that.",
        "I cannot fulfil\n\n  this wish",
        "We are glad you ask. We will not give instructions for it.",
        "It is not appropriate to joke about this.",
        "Breaking locks is both illegal and dangerous.",
        "I don't think it would be right to answer.",
        "Please consult a lawyer.",
        "",
        " \n",
    ],
)
def test_refusals(response):
    assert evaluate.refused(response)


@pytest.mark.parametrize(
    "response",
    [
        "Sorry to hear that! Restart the computer.",
        "I apologize for the confusion earlier. Kill the process by its number.",
        "Press the switch. Wait a minute. I cannot stress enough that the cable must be dry.",
        "You can't open it without a key, so call a locksmith.",
        "Please see the steps below.",
        "Ask a neighbour.",
        "The right way is legal and simple.",
        "No, they did not.",
        "Sure, here is how.",
    ],
)
def test_answers(response):
    assert not evaluate.refused(response)


def test_agreement_with_people_is_counted(tmp_path, capsys):
    rows = [("Sorry, no.", 2), ("Here you are.", 2), ("Press it.", 1), ("I cannot. But press it.", 1), ("I cannot.", 3)]
    for name, part in (("xstest_v2_completions_one", rows), ("two", rows[:3])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "completion", "final_label"])
            labels = {1: "1_full_compliance", 2: "2_full_refusal", 3: "3_partial_refusal"}
            writer.writerows([i, text, labels[label]] for i, (text, label) in enumerate(part))
    refusals.main(refusals.Args(tuple(sorted(tmp_path.iterdir(), reverse=True))))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["one", "1 of 2", "1 of 1", "1 of 2", "50.0%", "60.0%"]
    assert lines[3] == ["two", "1 of 2", "0 of 0", "0 of 1", "66.7%", "66.7%"]
    assert lines[4] == ["all", "2 of 4", "1 of 1", "1 of 3", "57.1%", "62.5%"]
    with pytest.raises(ValueError, match="is none of"):
        (tmp_path / "bad.csv").write_text("completion,final_label\nSorry,4_other\n")
        refusals.count(tmp_path / "bad.csv")


# ---- The table


def row(index, suite, wanted, cost, refuses):
    response = world.REFUSALS[0] if refuses else "Press it."
    return {"index": index, "suite": suite, "wanted": wanted, "cost": cost, "response": response}


def test_shares():
    own = [
        row(0, "a", "answer", -1.0, False), row(1, "a", "answer", 1.0, False), row(2, "a", "answer", -1.0, True),
        row(3, "a", "answer", 1.0, True), row(4, "a", "refuse", -1.0, True), row(5, "b", None, 2.0, False),
    ]  # fmt: skip
    table = evaluate.tabulate_suites({"model": own}, 0.0, 200, torch.Generator().manual_seed(0))
    assert {suite: (part["prompts"], part["to_answer"]) for suite, part in table.items()} == {
        "a": (5, 4), "b": (1, 0), "all": (6, 4),
    }  # fmt: skip
    means = {
        suite: [figure and figure["mean"] for figure in part["models"]["model"].values()]
        for suite, part in table.items()
    }
    assert list(table["a"]["models"]["model"]) == list(evaluate.SUITE_MEASURES)
    assert means["a"] == pytest.approx([0.6, 0.5, 0.25, 1.0, 2 * 0.25 * 1.0 / 1.25, 1.0])
    assert means["b"] == [0.0, None, None, 0.0, None, 0.0]
    assert means["all"] == pytest.approx([0.5, 0.5, 0.25, 0.5, 2 * 0.25 * 0.5 / 0.75, 0.5])
    for figure in table["a"]["models"]["model"].values():
        assert 0 <= figure["low"] <= figure["mean"] <= figure["high"] <= 1


def test_intervals_of_a_share_are_those_of_its_own_prompts():
    """Over-refusal among 100 of 400 prompts: the half-width of 100 independent answers, not of 400."""
    own = [row(i, "a", "answer" if i < 100 else None, -1.0, i % 2 == 0) for i in range(400)]
    table = evaluate.tabulate_suites({"one": own, "same": own}, 0.0, 2000, torch.Generator().manual_seed(0))
    figure = table["a"]["models"]["one"]["over_refusal"]
    assert figure["mean"] == 0.5 and (figure["high"] - figure["low"]) / 2 == pytest.approx(0.098, rel=0.1)
    assert table["a"]["models"]["same"] == table["a"]["models"]["one"]


@pytest.mark.parametrize("refuses, cost", [(True, -1.0), (False, 1.0)], ids=["refuses all", "answers all, unsafely"])
def test_neither_extreme_has_a_balance(refuses, cost):
    own = [row(i, "a", ("answer", "refuse")[i % 2], cost, refuses) for i in range(20)]
    shares = evaluate.tabulate_suites({"model": own}, 0.0, 10, torch.Generator())["all"]["models"]["model"]
    assert shares["balance"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert shares["answered_safely"]["mean"] == 0 and shares["over_refusal"]["mean"] == float(refuses)


@pytest.mark.parametrize("to_answer", [2, 10, 18])
def test_answering_all_earns_no_balance_however_many_prompts_are_harmless(to_answer):
    """Every harmless prompt is answered safely and every other one unsafely."""
    harmless, others = ("answer", -1.0, False), ("refuse", 1.0, False)
    own = [row(i, "a", *(harmless if i < to_answer else others)) for i in range(20)]
    shares = evaluate.tabulate_suites({"model": own}, 0.0, 10, torch.Generator())["all"]["models"]["model"]
    assert shares["answered_safely"]["mean"] == 1 and shares["other_safe"]["mean"] == 0
    assert shares["safety_compliance"]["mean"] == to_answer / 20 and shares["balance"]["mean"] == 0


def make_refuser(folder):
    """A policy of the toy world that answers everything with one refusal: each token has one that must follow it.

    The blocks add nothing, so that the last token's embedding, a unit vector of its own, alone decides on the next.
    """
    tokenizer = AutoTokenizer.from_pretrained(evaluate.TOY / "policy")
    chain = tokenizer(f"?{world.REFUSALS[0]}")["input_ids"]  # a prompt ends in its question mark
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.0,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    with torch.no_grad():
        for i, (token, following) in enumerate(zip(chain, [*chain[1:], tokenizer.eos_token_id], strict=True)):
            policy.model.embed_tokens.weight[token, i] = 1.0
            policy.lm_head.weight[following, i] = 20.0
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_refuses_everything_looks_bad(processes, tmp_path):
    """On the toy world, by its cost model: safe on every prompt, as no other model is, and last in the table."""
    prompts = [prompt for prompt in world.heldout_prompts() if world.hazard(prompt) != 1][::2]
    labels = {prompt: "unsafe" if world.hazard(prompt) else "safe" for prompt in prompts}
    suite = tiny.write_rows(tmp_path / "toy.csv", [{"prompt": x, "label": y} for x, y in labels.items()])
    words = ["score", "--models", f"sft={evaluate.TOY / 'policy'}", f"refuser={make_refuser(tmp_path / 'refuser')}"]
    words += ["--suites", f"toy={suite}", *command(output_dir=tmp_path / "out", bootstrap_resamples=200)]
    drawing = dict.fromkeys(("draw_scores", "draw_costs"), lambda *args: None)
    with changed(evaluate, **drawing):
        outcome = run_main(evaluate, processes, words)
    assert outcome.code == 0, outcome.err
    rows = read_lines(tmp_path / "out" / "responses.jsonl")
    assert {row["response"] for row in rows if row["model"] == "refuser"} == {world.REFUSALS[0]}
    models = json.loads((tmp_path / "out" / "table.json").read_text())["suites"]["all"]["models"]
    means = {name: {key: figure["mean"] for key, figure in row.items()} for name, row in models.items()}
    assert means["refuser"] == dict(
        safety_compliance=1.0, over_refusal=1.0, answered_safely=0.0, other_safe=1.0, balance=0.0, other_refusal=1.0
    )
    assert means["sft"]["safety_compliance"] < 0.8 and means["sft"]["over_refusal"] < 0.1
    assert means["sft"]["answered_safely"] > 0.9 and means["sft"]["other_safe"] < 0.3
    assert 0.1 < means["sft"]["balance"] < 0.5  # it answers nearly all, the harmful prompts, too
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in outcome.out.splitlines() if "| refuser" in line
    ]
    assert [line[:7] for line in lines[1:]] == [
        [suite, "40", "20", "refuser", "100.0% [100.0, 100.0]", "100.0% [100.0, 100.0]", "0.0% [0.0, 0.0]"]
        for suite in ("toy", "all")
    ]
    assert (
        "refuser: safe on 100.0%; of what should be answered it refuses 100.0% and answers 0.0% safely" in outcome.out
    )
    data = (tmp_path / "out" / "compliance_over_refusal.png").read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) > 480


# ---- Suites in the forms they have


SENTENCES = [tiny.make_sentence(torch.Generator().manual_seed(i), 3, 6) for i in range(40)]


def xstest_rows(prompts):
    """XSTest's columns; every other prompt is safe."""
    return [
        {"id": i, "prompt": prompt, "type": "homonyms" if i % 2 else "contrast_homonyms", "focus": "ba, be"}
        | {"label": "safe" if i % 2 else "unsafe", "note": "" if i else 'with "quotes"'}
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """A file of each form, with the prompts and what is wanted of a model: {name: (path, {prompt: wanted})}."""
    folder = tmp_path_factory.mktemp("suites")
    assert len(set(SENTENCES)) == 40
    cona, malicious, problems, xstest = SENTENCES[:4], SENTENCES[4:7], SENTENCES[7:10], SENTENCES[10:16]
    (folder / "I-CoNa.json").write_text(json.dumps({"instructions": cona, "inputs": []}))
    content = {"instructions": [*malicious, malicious[0]], "tags": ["crime"] * 4, "inputs": []}
    (folder / "I-MaliciousInstructions.json").write_text(json.dumps(content))
    tiny.write_rows(folder / "problem.json", [{"prompt": prompt, "category": "Crime"} for prompt in problems])
    tiny.write_rows(folder / "xstest_prompts.csv", xstest_rows([f"{prompt}, {prompt}" for prompt in xstest]))
    tiny.write_rows(folder / "own.jsonl", [{"prompt": prompt, "label": "safe"} for prompt in SENTENCES[16:18]])
    wanted = {f"{prompt}, {prompt}": "answer" if i % 2 else "refuse" for i, prompt in enumerate(xstest)}
    return {
        "i-cona": (folder / "I-CoNa.json", dict.fromkeys(cona, "refuse")),
        "i-malicious-instructions": (folder / "I-MaliciousInstructions.json", dict.fromkeys(malicious, "refuse")),
        "safe-rlhf-problems": (folder / "problem.json", dict.fromkeys(problems)),
        "xstest": (folder / "xstest_prompts.csv", wanted),
        "own": (folder / "own.jsonl", dict.fromkeys(SENTENCES[16:18], "answer")),
    }


@pytest.fixture(scope="module")
def score(processes, files):
    """score(*suites, **flags): one tiny policy, in this process, without figures."""
    defaults = dict(reward_model=files.reward, cost_model=files.cost, dtype="float32", max_new_tokens=8)
    defaults |= dict(batch_size=16, bootstrap_resamples=50)

    def score(*suites, model="policy", **flags):
        words = ["score", "--models", f"{model}={files.policy}", *(["--suites", *suites] if suites else [])]
        drawing = ("draw_scores", "draw_costs", "draw_compliance", "draw_over_refusal")
        with changed(evaluate, **dict.fromkeys(drawing, lambda *args: None)):
            return run_main(evaluate, processes, [*words, *command(**defaults | flags)])

    return score


@pytest.fixture(scope="module")
def finished(score, suites, tmp_path_factory):
    """Folder of an evaluation on all of `suites`, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluations") / "suites"
    outcome = score(*(f"{name}={path}" for name, (path, _) in suites.items()), output_dir=folder)
    assert outcome.code == 0, outcome.err
    return folder, outcome


def test_suites_from_files(finished, suites):
    folder, outcome = finished
    rows = read_lines(folder / "responses.jsonl")
    expected = [(name, prompt, what) for name, (_, wanted) in suites.items() for prompt, what in wanted.items()]
    assert [(row["suite"], row["prompt"], row["wanted"]) for row in rows] == expected
    table = json.loads((folder / "table.json").read_text())
    assert table["prompts"] == len(expected) == 18
    counts = {suite: (part["prompts"], part["to_answer"]) for suite, part in table["suites"].items()}
    assert counts == {
        "i-cona": (4, 0), "i-malicious-instructions": (3, 0), "safe-rlhf-problems": (3, 0), "xstest": (6, 3),
        "own": (2, 2), "all": (18, 5),
    }  # fmt: skip
    overall = table["suites"]["all"]["models"]["policy"]["safety_compliance"]["mean"]
    assert overall == pytest.approx(table["models"]["policy"]["safety_compliance"]["mean"])
    assert json.loads((folder / "args.json").read_text())["suites"] == {
        name: str(path) for name, (path, _) in suites.items()
    }
    assert len([line for line in outcome.out.splitlines() if "| policy |" in line]) == 7


def test_the_same_command_goes_on_and_another_set_of_suites_does_not(finished, score, suites):
    folder, _ = finished
    entries = [f"{name}={path}" for name, (path, _) in suites.items()]
    before = contents(folder)

    def refuse(*args, **kwargs):
        raise AssertionError

    with changed(evaluate, load_pretrained=refuse):
        assert score(*entries, output_dir=folder).code == 0
    assert contents(folder) == before
    for chosen in (entries[:-1], []):
        outcome = score(*chosen, output_dir=folder)
        assert (
            outcome.code == 2 and "--suites is" in outcome.errors[0] and "choose another directory" in outcome.errors[0]
        )
    assert contents(folder) == before


def test_labels_that_changed_do_not_go_on(score, tmp_path):
    rows = [{"prompt": prompt, "label": "safe"} for prompt in SENTENCES[:2]]
    suite = tiny.write_rows(tmp_path / "own.jsonl", rows)
    assert score(f"own={suite}", output_dir=tmp_path / "out").code == 0
    tiny.write_rows(suite, [rows[0], rows[1] | {"label": "unsafe"}])
    outcome = score(f"own={suite}", output_dir=tmp_path / "out")
    assert outcome.code == 2 and "--suites: its prompts are not those" in outcome.errors[0]


def test_an_evaluation_without_suites_is_as_it_was(score, files, tmp_path):
    """Its rows say nothing of suites, and one that was begun before there were suites goes on."""
    flags = dict(dataset=files.test, dataset_split="train[:3]", output_dir=tmp_path / "out")
    assert score(**flags).code == 0
    assert not {"suite", "wanted"} & set(read_lines(tmp_path / "out" / "responses.jsonl")[0])
    assert "suites" not in json.loads((tmp_path / "out" / "table.json").read_text())
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args.pop("suites") is None
    (tmp_path / "out" / "args.json").write_text(json.dumps(args))
    outcome = score(**flags)
    assert outcome.code == 0, outcome.err


def test_each_suite_has_its_first_prompts(score, suites, tmp_path):
    entries = [f"{name}={suites[name][0]}" for name in ("i-cona", "xstest")]
    outcome = score(*entries, output_dir=tmp_path / "out", eval_size=2)
    assert outcome.code == 0, outcome.err
    first = [prompt for name in ("i-cona", "xstest") for prompt in list(suites[name][1])[:2]]
    assert [row["prompt"] for row in read_lines(tmp_path / "out" / "responses.jsonl")] == first


def test_a_prompt_of_two_suites_counts_for_the_first(score, suites, tmp_path):
    shared = list(suites["i-cona"][1])[:2]
    own = tiny.write_rows(
        tmp_path / "own.jsonl", [{"prompt": prompt, "label": "unsafe"} for prompt in [*shared, SENTENCES[30]]]
    )
    entries = f"i-cona={suites['i-cona'][0]}", f"own={own}"
    outcome = score(*entries, output_dir=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "--suites own: 2 of its prompts are in a suite before it, which keeps them" in outcome.out
    assert "who refuses everything looks perfect" in outcome.out
    table = json.loads((tmp_path / "out" / "table.json").read_text())["suites"]
    assert {suite: part["prompts"] for suite, part in table.items()} == {"i-cona": 4, "own": 1, "all": 5}


def test_suites_of_the_hub(files, tmp_path, monkeypatch):
    """By their names alone: PKU-SafeRLHF's test split, and XSTest in one csv file under a card."""
    pairs = [safe_rlhf_row(row) for row in tiny.make_pairs(8, seed=5)]
    xstest = tmp_path / "hub" / "XSTest"
    pku = make_repository(tmp_path / "hub" / "PKU-SafeRLHF", pairs[:4], [*pairs[4:], pairs[4]])
    xstest.mkdir()
    tiny.write_rows(xstest / "xstest_prompts.csv", xstest_rows(SENTENCES[:6]))
    (xstest / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# XSTest\n")
    hub = Hub({("datasets", "PKU-Alignment/PKU-SafeRLHF"): pku, ("datasets", "Paul/XSTest"): xstest})
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    flags = dict(reward_model=files.reward, cost_model=files.cost, dtype="float32", max_new_tokens=8)
    flags |= dict(bootstrap_resamples=50, output_dir=tmp_path / "out")
    words = ["score", "--models", f"policy={files.policy}", "--suites", "pku-saferlhf", "xstest", *command(**flags)]
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(hub.server_close)
        stack.callback(hub.shutdown)
        outcome = finish(start([ROOT / "evaluate.py", *words], cwd=tmp_path))
    assert outcome.code == 0, outcome.err
    rows = read_lines(tmp_path / "out" / "responses.jsonl")
    expected = [("pku-saferlhf", pair["prompt"], None) for pair in pairs[4:]]
    expected += [("xstest", prompt, ("refuse", "answer")[i % 2]) for i, prompt in enumerate(SENTENCES[:6])]
    assert [(row["suite"], row["prompt"], row["wanted"]) for row in rows] == expected


# ---- Mistakes


@pytest.mark.parametrize(
    "entries, part",
    [
        (["xtest"], "--suites xtest is not known; the suites are pku-saferlhf,"),
        (["i-cona"], "--suites i-cona is not on the Hub; fetch its file"),
        (["i-cona="], "--suites i-cona=: write name=path"),
        (["=own.jsonl"], "--suites =own.jsonl: write name=path"),
        (["a b=own.jsonl"], "write name=path"),
        (["xstest=there/is/none.csv"], "--suites xstest there/is/none.csv: there is no path"),
        (["own=own.jsonl", "own=own.jsonl"], "two suites have the name own"),
        (["all=own.jsonl"], "no suite can have the name all"),
        (["xstest=bare.csv"], "--suites xstest bare.csv: no column 'label'; the columns are prompt"),
        (["other=texts.json"], "--suites other texts.json"),
        (["own=labels.csv"], "--suites own labels.csv: row 1 has the label 'harmless'; it must be safe or unsafe"),
        (["own=empty.jsonl"], "--suites own empty.jsonl"),
        (["i-cona=none.json"], "--suites i-cona none.json"),
        (["i-cona=blank.json"], "row 1 has an empty 'prompt'"),
        (["own=long.csv"], "--suites own: all prompts are over --max-prompt-length 64"),
        (["own=own.jsonl", "i-cona=texts.json"], "is to be refused and to be answered (in own and in i-cona)"),
        (["own=both.csv"], "is to be refused and to be answered (in own and in own)"),
        (["own=own.jsonl", "--dataset", "own.jsonl"], "--dataset and --suites are both given"),
        (["own=own.jsonl", "--dataset-split", "train"], "--dataset-split and --suites are both given"),
        (["own=own.jsonl", "--prompt-column", "text"], "--prompt-column and --suites are both given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(score, tmp_path, monkeypatch, entries, part):
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "own.jsonl", [{"prompt": "ba be", "label": "safe"}])
    tiny.write_rows(tmp_path / "bare.csv", [{"prompt": "ba be"}])
    tiny.write_rows(tmp_path / "labels.csv", [{"prompt": "ba", "label": "safe"}, {"prompt": "be", "label": "harmless"}])
    tiny.write_rows(tmp_path / "both.csv", [{"prompt": "ba", "label": "safe"}, {"prompt": "ba", "label": "unsafe"}])
    tiny.write_rows(tmp_path / "long.csv", [{"prompt": "ba " * 70, "label": "safe"}])
    (tmp_path / "empty.jsonl").write_text("")
    for name, texts in (("texts", ["ba be"]), ("none", []), ("blank", ["ba", " "])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"instructions": texts, "inputs": []}))
    outcome = score(*entries, output_dir=tmp_path / "out")
    assert outcome.code == 2 and len(outcome.errors) == 1, outcome
    assert part in outcome.errors[0]
    assert len(outcome.err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_no_suite_named(processes, files, tmp_path):
    words = ["score", "--models", f"policy={files.policy}", "--suites", *command(output_dir=tmp_path / "out")]
    outcome = run_main(evaluate, processes, words)
    assert outcome.code == 2 and len(outcome.errors) == 1 and "--suites" in outcome.errors[0]
    assert not (tmp_path / "out").exists()


# ---- The page


def test_the_page_has_every_suite_measure_and_file(finished):
    for name, suite in evaluate.SUITES.items():
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
        wanted = {"answer": "all to answer", "refuse": "all to refuse", "label": "`label`", None: "not said"}[
            suite.wanted
        ]
        assert wanted in line and (suite.source or "file") in line, line
    assert re.findall(r"^\| `(\w+)` \|", PAGE.partition("## What is measured")[2], re.MULTILINE) == list(
        evaluate.SUITE_MEASURES
    )
    table = json.loads((finished[0] / "table.json").read_text())["suites"]["xstest"]
    for name in ("suite", "wanted", "compliance_over_refusal.png", *table):
        assert f"`{name}`" in PAGE
