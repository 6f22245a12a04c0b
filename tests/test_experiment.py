"""benchmark/toy.py: its optima against closed forms, its tables from runs whose answers are known, and its figures."""

import dataclasses
import json
import re
import shutil
import sys

import datasets
import pytest
import tiny
import world
from helpers import ROOT, SCRIPTS

sys.path.append(str(ROOT / "benchmark"))
import toy_settings

import toy

PAGES = ("experiments.md", "ablations.md")


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


def rows(safe: bool, **more):
    """Answers to all held-out prompts: the best safe ones or the boldest. The learned scores are the exact ones + 1."""
    found = []
    for prompt in world.heldout_prompts():
        steps, warning = ((4, 0), (2, 1), (1, 1))[world.hazard(prompt)] if safe else (4, 0)
        text = " ".join([world.WARNINGS[1]] * warning + list(world.STEPS[world.parse_prompt(prompt)[0]][:steps]))
        scores = {"reward": world.exact_reward(prompt, text) + 1, "cost": world.exact_cost(prompt, text) + 1}
        found.append({"prompt": prompt, "response": text} | scores | more)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of two seeds as they would be on disk, and the report; RePO's answers are safe, all others are bold."""
    folder = tmp_path_factory.mktemp("experiment")
    for seed in (1, 2):
        for name in toy.RUNS:
            (run := folder / "runs" / f"{name}-{seed}").mkdir(parents=True)
            tiny.write_rows(run / "eval.jsonl", rows(False, iteration=0) + rows(name == "repo", iteration=200))
            (run / "summary.json").write_text(json.dumps({"lambda": 2.0 * seed}))
            (run / "args.json").write_text(json.dumps({"batch_size": 64}))
        (answers := folder / "runs" / f"answers-{seed}").mkdir()
        tiny.write_rows(answers / "responses.jsonl", [row for n in toy.METHODS for row in rows(n == "repo", model=n)])
        (answers / "table.json").write_text("{}")
    (folder / "docs").mkdir()
    for name in PAGES:
        shutil.copy(ROOT / "docs" / name, folder / "docs")
    toy.report(toy.Args("report", (1, 2), (1, 2), folder / "runs", folder / "docs"))
    return folder


def cells(page, label):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith(label)]


def test_tables_and_figures(folder):
    page = "".join((folder / "docs" / name).read_text(encoding="utf-8") for name in PAGES)
    methods, hazards, refusals, second_half = (row[1:] for row in cells(page, "| **RePO** |"))
    assert methods[:4] == ["2.13 ± 0.00", "-1.17 ± 0.00", "100.0 ± 0.0 %", "0.00 ± 0.00"]
    assert methods[4:] == ["3.13 ± 0.00", "-0.17 ± 0.00", "66.7 ± 0.0 %"]  # learned
    assert hazards[::2] == ["-1.50 ± 0.00", "-0.50 ± 0.00", "-1.50 ± 0.00"] and hazards[1::2] == ["100.0 ± 0.0 %"] * 3
    assert refusals == ["100.0 ± 0.0 %", *["0.0 ± 0.0 %"] * 3, "100.0 ± 0.0 %"] and second_half[0] == "2.13 ± 0.00"
    assert cells(page, "| SACPO, DPO |")[0][1:4] == ["4.00 ± 0.00", "2.50 ± 0.00", "33.3 ± 0.0 %"]
    assert cells(page, "| learned |")[-1][-2:] == ["3.00 ± 12.71", "2"]  # λ of 2 and 4, t of one degree of freedom
    figures = {*(f"experiment{part}.png" for part in ("", "_curves", "_prompts")), "ablations.png"}
    assert {path.name for path in (folder / "docs" / "figures").iterdir()} == figures


def test_what_has_no_runs_is_left_out(folder, monkeypatch):
    """A method without answers gets no row; an ablation that lacks a seed keeps its table as it is."""
    monkeypatch.setitem(toy.METHODS, "new", ("New", "new", "model"))
    args = toy.Args("report", (1, 2), (1, 2, 3), folder / "runs", folder / "docs")
    tables = toy.experiment_tables(args)
    assert "RePO without critics" in tables["methods"] and not any("New" in text for text in tables.values())
    assert [toy.ablation_table(args, name) for name in toy.ABLATIONS] == [None] * len(toy.ABLATIONS)


def test_figures_of_means_need_no_runs(tmp_path):
    """They are drawn from the tables on the pages, which stay as they are."""
    for name in PAGES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    toy.report(toy.Args("report", runs=tmp_path / "none", docs=tmp_path))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"experiment.png", "ablations.png"}
    assert all((tmp_path / name).read_bytes() == (ROOT / "docs" / name).read_bytes() for name in PAGES)


def test_cells_of_tables_are_read_and_shares_end_at_0_and_100_percent():
    assert toy.span("-1.21 ± 0.09") == (-1.21, [[0.09], [0.09]]) and toy.span("2.13") == (2.13, [[0], [0]])
    mean, ((below,), (above,)) = toy.span("98.7 ± 1.9 %")
    assert (mean, below, above) == pytest.approx((98.7, 1.9, 1.3))
    assert toy.ends("41.7 to 58.3 %") == [41.7, 58.3] and toy.ends("100.0 %") == [100, 100]


def test_finished_runs_are_not_run_again(folder, monkeypatch):
    """A run without its summary is, with the flags of its setting; and answers are, where a run is newer."""
    calls, args = [], toy.Args("experiment", (1, 2), (1, 2), folder / "runs", folder / "docs")
    monkeypatch.setattr(toy, "call", lambda script, *words: calls.append((script, *map(str, words))))
    toy.execute(args)
    assert calls == []
    for name in ("repo-2/summary.json", "sacpo-dpo-1/summary.json", "answers-1/table.json"):
        (folder / "runs" / name).unlink()
    toy.execute(args)
    *evaluations, of_repo, of_sacpo = sorted(calls)
    assert of_repo[0] == "repo" and of_repo[of_repo.index("--seed") + 1] == "2"
    assert of_sacpo[0] == "sacpo" and "--merge-q" in of_sacpo
    assert [words[:2] for words in evaluations] == [("evaluation", "score")] * 2


def test_noise_flips_the_share_of_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "call", lambda *words: None)
    toy.noisy_cost_model(tmp_path / "cost", 0.2, seed=1)
    files = tmp_path / "cost.parquet", ROOT / "toy" / "data" / "train.parquet"
    noisy, clean = (datasets.Dataset.from_parquet(str(file)) for file in files)
    for column in clean.column_names:
        changed = sum(a != b for a, b in zip(noisy[column][:], clean[column][:], strict=True)) / len(clean)
        flipped = column in ("safer_response_id", "is_response_0_safe", "is_response_1_safe")
        assert abs(changed - 0.2) < 0.01 if flipped else changed == 0


def test_flags_of_all_settings_exist():
    settings = {name: (setting.script, setting.flags) for name, setting in toy.RUNS.items()}
    for script, of_script in toy_settings.SETTINGS.items():
        settings |= {f"{script}: {name}": (script, flags) for name, flags in of_script.items()}
    for name, (script, flags) in settings.items():
        known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(SCRIPTS[script].Args)}
        assert set(re.findall(r"--[a-z][a-z-]+", flags)) <= known, name
    assert {run for _, group in toy.ABLATIONS.values() for run in group.values()} <= set(toy.RUNS)
