"""What the pages say is so: metrics, files, flags, links."""

import dataclasses
import re
import sys

import kills
import pytest
import strain
from helpers import ROOT, read_lines, read_summary

import evaluate
import ppo_lagrange
import preference_models
import repo
import sacpo

sys.path.append(str(ROOT / "benchmark"))
import memory
import throughput

import toy

OTHERS = {
    "evaluate.py score": evaluate.Score,
    "evaluate.py judge": evaluate.Judge,
    "benchmark/toy": toy.Args,
    "benchmark/memory": memory.Args,
    "benchmark/throughput": throughput.Args,
    "tests/kills": kills.Args,
    "tests/strain": strain.Args,
}
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("toy/*.md")])


def documented_metrics(page: str) -> list[str]:
    """First column of the table below the heading "Logged metrics"."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("## Logged metrics")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_each_metric_of_rl_is_documented_and_each_documented_one_is_logged(repo_run, lagrange_run):
    for folder, page in ((repo_run, "repo.md"), (lagrange_run, "ppo_lagrange.md")):
        logged = read_lines(folder / "metrics.jsonl")
        assert documented_metrics(page) == [*logged[0], "ptx_loss"]  # the last only with --ptx-dataset
        assert list(logged[0]) == list(logged[-1])


def test_each_metric_of_the_preference_models_is_documented_and_each_documented_one_is_logged(preference_runs):
    logged = {name for kind in preference_runs.values() for row in read_lines(kind / "metrics.jsonl") for name in row}
    assert set(documented_metrics("preference_models.md")) == logged


def test_the_keys_of_the_summaries_are_documented(repo_run, lagrange_run, preference_runs):
    runs = (repo_run, "repo.md"), (lagrange_run, "ppo_lagrange.md"), (preference_runs["cost"], "preference_models.md")
    for folder, page in runs:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        summary = read_summary(folder)
        names = [*summary, *summary.get("before", {})]
        assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_the_scripts_exist(page):
    """Each command that calls a script uses flags that it has."""
    text = re.sub(r"\\\n(?![+-])", " ", page.read_text(encoding="utf-8"))  # a line of a diff goes on in its own kind
    arguments = {script.__name__: script.Args for script in (repo, ppo_lagrange, sacpo, preference_models)}
    for name, args in (arguments | OTHERS).items():
        flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(args)} | {"--help"}
        program = name if ".py" in name else f"{name}.py"
        for command in re.findall(rf"{re.escape(program)}( [^\n;|&#]*)", text):
            assert set(re.findall(r" (--[a-z][a-z-]+)", command)) <= flags, command
