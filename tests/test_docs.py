"""What the pages say is so: metrics, files, flags, links."""

import dataclasses
import re
import sys

import pytest
from helpers import ROOT, SCRIPTS, read_lines, read_summary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.blind import Export, Import
from evaluation.card import Card
from evaluation.judge import Judge
from evaluation.score import Score

sys.path.append(str(ROOT / "benchmark"))
import gpu
import memory
import smollm2_data
import smollm2_report
import throughput

import toy

ARGS = {f"{name}.py": script.Args for name, script in SCRIPTS.items()}
ARGS |= {"evaluation score": Score, "evaluation judge": Judge, "evaluation card": Card}
ARGS |= {"evaluation blind export": Export, "evaluation blind import": Import}
TOOLS = (gpu, memory, smollm2_data, smollm2_report, throughput, toy)
ARGS |= {f"benchmark/{tool.__name__}.py": tool.Args for tool in TOOLS}
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("toy/*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_metrics_and_keys_of_summaries_are_documented_and_each_documented_metric_is_logged(name, run, tmp_path):
    more = {"sacpo": dict(loss="kto"), "preference_models": dict(kind="cost")}.get(name, {})
    assert run(SCRIPTS[name], output_dir=tmp_path / "run", **more).code == 0
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    table = text.partition("## Logged metrics")[2].partition("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (\w*) ?\|", table, re.MULTILINE))  # the metric: its group
    documented.pop("ptx_loss", None)  # only with --ptx-dataset
    assert set(documented) == {key for row in read_lines(tmp_path / "run" / "metrics.jsonl") for key in row}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    numbers = (1, 2) if name == "sacpo" else ("",)  # TensorBoard has a group for each stage
    tags = {f"{group}{number}/{key}" for key, group in documented.items() if group for number in numbers}
    assert set(events.Tags()["scalars"]) == tags
    summary = read_summary(tmp_path / "run")
    assert [key for key in [*summary, *summary.get("before", {})] if f"`{key}`" not in text] == []


def test_each_format_of_data_has_a_row_that_is_read_and_each_reason_to_drop_rows_is_said(tmp_path):
    page, forms = (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), set()
    for i, row in enumerate(re.search(r"```\n(\{.*?)```", page, re.DOTALL)[1].splitlines()):
        (tmp_path / f"{i}.jsonl").write_text(row, encoding="utf-8")
        forms.add(SCRIPTS["repo"].load_rows(str(tmp_path / f"{i}.jsonl"), None, "train", "--dataset")[1])
    assert forms == {*SCRIPTS["repo"].FORMATS}
    table = page.partition("| dropped | why |")[2].split("\n\n")[0]
    reasons = [row.split(" | ")[0][2:] for row in table.splitlines()[2:]]
    source = (ROOT / "repo.py").read_text(encoding="utf-8")
    assert reasons and [reason for reason in reasons if reason.split(" N ")[0] not in source] == []


def anchors(page) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@each_page
def test_pages_are_short_and_in_plain_words(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= {"README.md": 180, "from_ppo_to_repo.md": 350}.get(page.name, 150)
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    unwanted = r"\b(?:pays?|paid|coins?|price|nobody|so that|but for|note that|simply)\b"
    assert re.findall(unwanted, prose, re.IGNORECASE) == []


@each_page
def test_flags_of_the_scripts_exist(page):
    """Each command that calls a script uses flags that it has."""
    text = re.sub(r"\\\n(?![+-])", " ", page.read_text(encoding="utf-8"))  # a line of a diff goes on in its own kind
    for name, args in ARGS.items():
        flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(args)} | {"--help"}
        for command in re.findall(rf"{re.escape(name)}( [^\n;|&#`]*)", text):
            assert set(re.findall(r" (--[a-z][a-z-]+)", command)) <= flags, f"{name}{command}"


@each_page
def test_files_that_are_named_exist(page):
    """Paths in code, such as `docs/scale.md` or `toy/build.py`."""
    named = re.findall(
        r"(?<![\w/.])((?:docs|tests|toy|benchmark|evaluation)/[\w/.]+\.(?:py|md|sh|png))", page.read_text("utf-8")
    )
    named += [word for word in re.findall(r"(?<![\w/.-])\w+\.py\b", page.read_text("utf-8")) if "/" not in word]
    places = [ROOT, ROOT / "toy", ROOT / "evaluation", ROOT / "tests", ROOT / "docs" / "tutorial", ROOT / "benchmark"]
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert missing - {"ppo_pi.py"} == set() or page.name == "peers.md"
