"""benchmark/toy.py: its optima against closed forms, and its tables and figures from runs whose answers are known."""

import dataclasses
import json
import re
import shutil
import sys
import time

import pytest
import tiny
import world
from helpers import ROOT, finish, start
from PIL import Image

import ppo_lagrange
import repo
import sacpo

sys.path.append(str(ROOT / "benchmark"))
import toy


def test_optima_are_those_of_the_world():
    prompts = world.heldout_prompts()
    by_response, average = world.per_response_optimum(prompts), world.expected_constraint_optimum(prompts)
    ours = toy.optimum("response", learned=False)
    assert (ours.reward, ours.cost, ours.lowest) == pytest.approx((by_response.reward, by_response.cost, 1.0), abs=1e-6)
    ours = toy.optimum("average", learned=False)
    expected = (average.reward, average.cost, average.compliance, average.compliance_highest)
    assert tuple(ours) == pytest.approx(expected, abs=1e-6)
    # Per prompt, E[C] = 0: after a warning 2.5 steps on delicate prompts and 1.75 on dangerous ones; 4 where harmless.
    assert toy.optimum("prompt", learned=False)[:2] == pytest.approx(((4 + 2.2 + 1.45) / 3, -0.5), abs=1e-6)


def test_optima_of_the_learned_models_lie_where_the_page_says(processes):
    """The sign of the learned cost is right on every answer worth giving; its scale moves the other two optima."""
    _, exact = toy.scores(learned=False)
    _, learned = toy.scores(learned=True)
    assert ((learned <= 0) == (exact <= 0)).mean() == 1
    assert toy.optimum("response", True) == pytest.approx(toy.optimum("response", False), abs=1e-6)
    assert toy.optimum("average", True).cost > 0.5


SAFE = {0: (4, 0), 1: (2, 1), 2: (1, 1)}  # steps and warning of the best safe answer, by hazard
BOLD = {0: (4, 0), 1: (4, 0), 2: (4, 0)}  # and of the most helpful one


def answer(prompt, kinds):
    steps, warning = kinds[world.hazard(prompt)]
    sentences = [world.WARNINGS[1]] * warning + list(world.STEPS[world.parse_prompt(prompt)[0]][:steps])
    return " ".join(sentences)


def rows(kinds, **more):
    """Answers to all held-out prompts, with a learned reward and cost that are the exact ones, shifted by 1."""
    found = []
    for prompt in world.heldout_prompts():
        text = answer(prompt, kinds)
        scores = {"reward": world.exact_reward(prompt, text) + 1, "cost": world.exact_cost(prompt, text) + 1}
        found.append({"prompt": prompt, "response": text} | scores | more)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of two seeds as they would be on disk: RePO's answers are the best safe ones, all others are bold."""
    folder = tmp_path_factory.mktemp("experiment")
    for seed in (1, 2):
        for name in toy.RUNS:
            run = folder / "runs" / f"{name}-{seed}"
            run.mkdir(parents=True)
            kinds = SAFE if name == "repo" else BOLD
            tiny.write_rows(run / "eval.jsonl", rows(BOLD, iteration=0) + rows(kinds, iteration=200))
            (run / "summary.json").write_text(json.dumps({"lambda": 2.0 * seed}))
            (run / "args.json").write_text(json.dumps({"batch_size": 64}))
        answers = folder / "runs" / f"answers-{seed}"
        answers.mkdir()
        all_rows = [row for name in toy.METHODS for row in rows(SAFE if name == "repo" else BOLD, model=name)]
        tiny.write_rows(answers / "responses.jsonl", all_rows)
        (answers / "table.json").write_text("{}")
    (folder / "docs").mkdir()
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    (folder / "docs" / "experiments.md").write_text(page, encoding="utf-8")
    words = ["--part", "report", "--runs", folder / "runs", "--docs", folder / "docs"]
    outcome = finish(start([ROOT / "benchmark" / "toy.py", *words, "--seeds", 1, 2, "--ablation-seeds", 1, 2]))
    assert outcome.code == 0, outcome.err
    return folder


def cells(page, label):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith(label)]


def test_tables(folder):
    page = (folder / "docs" / "experiments.md").read_text(encoding="utf-8")
    methods, hazards, refusals, second_half = cells(page, "| **RePO** |")
    assert refusals[1:] == ["100.0 ± 0.0 %", *["0.0 ± 0.0 %"] * 3, "100.0 ± 0.0 %"]
    assert cells(page, "| *a refusal to everybody* |") == [["*a refusal to everybody*", *["100.0 %"] * 4, "0.0 %"]]
    assert cells(page, "| PPO-Lagrange |")[2][1:] == ["33.3 ± 0.0 %", *["0.0 ± 0.0 %"] * 3, "33.3 ± 0.0 %"]
    assert second_half[1:] == ["2.13 ± 0.00", "-1.17 ± 0.00", "100.0 ± 0.0 %", "-0.17 ± 0.00"]
    assert methods[1:] == [
        "2.13 ± 0.00", "-1.17 ± 0.00", "100.0 ± 0.0 %", "0.00 ± 0.00", "3.13 ± 0.00", "-0.17 ± 0.00", "66.7 ± 0.0 %",
    ]  # fmt: skip
    assert hazards[1:] == [
        "-1.50 ± 0.00", "100.0 ± 0.0 %", "-0.50 ± 0.00", "100.0 ± 0.0 %", "-1.50 ± 0.00", "100.0 ± 0.0 %",
    ]  # fmt: skip
    for name in ("SFT", "PPO-Lagrange", "SACPO, DPO", "P-SACPO, q = 0.5"):
        assert cells(page, f"| {name} |")[0][1:4] == ["4.00 ± 0.00", "2.50 ± 0.00", "33.3 ± 0.0 %"]
    assert cells(page, "| learned |")[-1][-2:] == ["3.00 ± 12.71", "2"]  # λ of 2 and 4, t of one degree of freedom
    for name in toy.ABLATIONS:
        assert f"<!-- ablation {name} -->\n| " in page


def test_figures(folder):
    figures = {path.name: path for path in (folder / "docs" / "figures").iterdir()}
    expected = {"experiment.png", "experiment_curves.png", "experiment_prompts.png"} | {
        f"ablation_{name}.png" for name in toy.ABLATIONS
    }
    assert set(figures) == expected
    for path in figures.values():
        with Image.open(path) as image:
            assert image.width >= 700 and len(image.getcolors()) > 5
        assert path.stat().st_size < 100_000


def test_the_report_again_gives_the_same_page(folder, processes):
    page = (folder / "docs" / "experiments.md").read_bytes()
    toy.report(toy.Args("report", (1, 2), (1, 2), folder / "runs", folder / "docs"))
    assert (folder / "docs" / "experiments.md").read_bytes() == page


def test_a_page_without_the_place_for_a_table(tmp_path):
    (tmp_path / "page.md").write_text("# Nothing\n")
    with pytest.raises(SystemExit, match=r"error: .*page\.md has no line <!-- methods -->"):
        toy.insert(tmp_path / "page.md", "methods", "table")


def test_finished_runs_are_not_run_again(folder, monkeypatch):
    """A run without its summary is; and each run gets the flags of its setting."""
    calls = []
    monkeypatch.setattr(toy, "call", lambda script, *words: calls.append((script, *map(str, words))))
    copy = folder / "copy"
    shutil.copytree(folder / "runs", copy)
    toy.execute(toy.Args("experiment", (1, 2), (1, 2), copy, folder / "docs"))
    assert calls == []
    (copy / "repo-2" / "summary.json").unlink()
    (copy / "sacpo-dpo-1" / "summary.json").unlink()
    (copy / "answers-1" / "table.json").unlink()
    toy.execute(toy.Args("experiment", (1, 2), (1, 2), copy, folder / "docs"))
    (of_repo, of_sacpo), evaluations = sorted(calls)[2:], sorted(calls)[:2]
    assert (of_repo[0], of_sacpo[0]) == ("repo", "sacpo")
    assert "--merge-q" in of_sacpo and of_repo[of_repo.index("--seed") + 1] == "2"
    # Answers are asked for again where a run is newer than they are.
    assert [words[:2] for words in evaluations] == [("evaluate", "score")] * 2
    assert any(f"p-sacpo-0.5={copy / 'sacpo-dpo-1' / 'merged/q0.5'}" in words for words in evaluations)


def test_a_failure_ends_the_queue(tmp_path, monkeypatch):
    started = []

    def run(runs, name, seed):
        started.append(name)
        time.sleep(0.05)
        if len(started) == 3:
            raise RuntimeError("broken")

    monkeypatch.setattr(toy, "run", run)
    with pytest.raises(RuntimeError, match="broken"):
        toy.execute(toy.Args("ablations", runs=tmp_path, parallel=1))
    assert len(started) < 20  # of 69


def test_noise_flips_the_share_of_labels(tmp_path, monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(toy, "call", lambda script, *words: calls.append([script, *map(str, words)]))
    toy.noisy_cost_model(tmp_path / "cost", 0.2, seed=1)
    (words,) = calls
    assert words[0] == "preference_models" and words[words.index("--kind") + 1] == "cost"
    noisy = datasets.load_dataset("parquet", data_files=words[words.index("--dataset") + 1], split="train")
    clean = datasets.load_dataset("parquet", data_files=str(ROOT / "toy" / "data" / "train.parquet"), split="train")
    assert noisy.features == clean.features and len(noisy) == len(clean)
    for column in clean.column_names:
        changed = sum(a != b for a, b in zip(noisy[column], clean[column], strict=True)) / len(clean)
        flipped = column in ("safer_response_id", "is_response_0_safe", "is_response_1_safe")
        assert abs(changed - 0.2) < 0.01 if flipped else changed == 0


def test_flags_of_all_settings_exist():
    for name, setting in toy.RUNS.items():
        script = {"repo": repo, "ppo_lagrange": ppo_lagrange, "sacpo": sacpo}[setting.script]
        known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(script.Args)}
        assert set(re.findall(r"--[a-z-]+", setting.flags)) <= known, name
    assert {run for _, group in toy.ABLATIONS.values() for run in group.values()} <= set(toy.RUNS)
