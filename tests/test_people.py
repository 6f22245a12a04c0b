"""People as judges: blind sheets, the page in a real browser, verdicts read back, agreement by other means."""

import collections
import csv
import fractions
import io
import itertools
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import changed, command, contents, read_lines, run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_judge import JudgeServer, asked

import evaluate

MODELS = ("zulu-x1", "quebec-x2", "kilo-x3")  # not in the order of the alphabet, and in no text
WORTH = {"1": 1.0, "tie": 0.5, "2": 0.0}
AWKWARD = [
    "=1+1",
    "+49 30 1234",
    "-2 + 3",
    "@SUM(A1)",
    "\t=1",
    ' \n =HYPERLINK("http://x.invalid")',
    "＝1",
    "'quoted'",
    'say "hi", then; go\tthere',
    "one\ntwo\r\nthree\rfour\n",
    "</script><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>",
    "<b>bold</b> &amp; ${1} \\u003c {{",
    "né 漢字 🙂 \u2028 \u202eabc",
    "DATA",
]


def make_answers(prompts: int, models=MODELS, same=()) -> list[dict]:
    """Rows of responses.jsonl; the answers of all models are the same on the prompts of `same`."""
    rows = []
    for name, i in itertools.product(models, range(prompts)):
        text = f"{AWKWARD[i % len(AWKWARD)]} {i}." + ("" if i in same else " ab"[models.index(name)])
        text = text + ("c" if name == MODELS[0] and i not in same else "")
        rows.append({"model": name, "index": i, "prompt": f"{AWKWARD[-1 - i % len(AWKWARD)]} {i}?", "response": text})
        rows[-1] |= {"reward": 0.5, "cost": -0.5, "length": 3, "finished": True}
    return rows


def write_answers(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judge(processes):
    """judge(responses, import_blind=[...], **flags): `evaluate.py judge` in this process. Returns an Outcome."""

    def judge(*responses, import_blind=(), people=(), models=(), **flags):
        words = ["judge", "--responses", *map(str, responses)]
        for name, values in (("import-blind", import_blind), ("people", people), ("models", models)):
            words += [f"--{name}", *map(str, values)] if values else []
        return run_main(evaluate, processes, words + command(**dict(bootstrap_resamples=200) | flags))

    return judge


@pytest.fixture(scope="module")
def exported(judge, tmp_path_factory):
    """Folder with a sheet of three models' answers to 30 prompts, and these, of which three are the same for all."""
    folder = write_answers(tmp_path_factory.mktemp("people") / "exported", make_answers(30, same=(3, 4, 5)))
    outcome = judge(folder, export_blind=folder / "sheet.csv", all_pairs=True)
    assert outcome.code == 0, outcome.err
    (folder / "printed").write_text(outcome.out)
    return folder


def read_csv(content: bytes, delimiter=",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=delimiter))


def write_csv(path: Path, rows: list[list[str]], encoding="utf-8-sig", **options) -> Path:
    text = io.StringIO()
    csv.writer(text, **options).writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def copy_key(exported: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(exported / "sheet.key.json", folder)
    return folder


def fill(exported: Path, verdict) -> list[list[str]]:
    """Rows of the exported sheet with verdict(criterion, prompt's number, model of answer 1, model of answer 2)."""
    head, *rows = read_csv((exported / "sheet.csv").read_bytes())
    pairs = json.loads((exported / "sheet.key.json").read_text())["pairs"]
    for row in rows:
        pair = pairs[row[0]]
        row[4:] = [verdict(name, pair["index"], pair["first"], pair["second"]) for name in head[4:]]
    return [head, *rows]


def favour(chances: dict[str, float], seed: int):
    """Verdicts of a person with a taste of their own, which depends on models and prompt, not on the order."""

    def verdict(criterion, index, first, second):
        draw = random.Random(f"{seed} {criterion} {index} {sorted((first, second))}").random()
        if draw < 0.2:
            return "tie"
        better = max((first, second), key=lambda name: chances[name] + random.Random(f"{seed} {index} {name}").random())
        return "1" if better == first else "2"

    return verdict


# ---- The sheet


def test_sheet_page_and_printed_lines_name_no_model(exported):
    sheet, page = (exported / name for name in ("sheet.csv", "sheet.html"))
    for path in (sheet, page):
        content = path.read_bytes().decode().lower()
        assert not [word for name in MODELS for word in name.split("-") if word in content]
    assert sheet.read_bytes().startswith(b"\xef\xbb\xbf")
    printed = (exported / "printed").read_text()
    assert "81 pairs" in printed and printed.count("27 pairs; 3 left out") == 3


def test_the_sheet_holds_every_pair_once_and_texts_as_they_are(exported):
    head, *rows = read_csv((exported / "sheet.csv").read_bytes())
    assert head == ["id", "prompt", "answer_1", "answer_2", "helpfulness", "harmlessness"]
    answers = {(row["model"], row["index"]): row for row in read_lines(exported / "responses.jsonl")}
    pairs = json.loads((exported / "sheet.key.json").read_text())["pairs"]
    assert [row[0] for row in rows] == [str(i + 1) for i in range(81)] == list(pairs)
    seen = set()
    for row in rows:
        pair = pairs[row[0]]
        one, other = (answers[pair[side], pair["index"]] for side in ("first", "second"))
        expected = [one["prompt"], one["response"], other["response"]]
        assert [
            cell.removeprefix("'") if cell != text else cell for cell, text in zip(row[1:4], expected, strict=True)
        ] == expected
        assert row[4:] == ["", ""]
        seen.add((frozenset((pair["first"], pair["second"])), pair["index"]))
    assert len(seen) == 81 and not {index for _, index in seen} & {3, 4, 5}


def test_the_order_tells_nothing(exported):
    """Each of two models is answer 1 in half of their pairs, and neither place in the sheet nor prompt tells which."""
    pairs = list(json.loads((exported / "sheet.key.json").read_text())["pairs"].values())
    for one, other in itertools.combinations(MODELS, 2):
        firsts = [pair["first"] for pair in pairs if {pair["first"], pair["second"]} == {one, other}]
        assert sorted(collections.Counter(firsts).values()) == [13, 14]
    turned = [pair["first"] > pair["second"] for pair in pairs]
    couples = [frozenset((pair["first"], pair["second"])) for pair in pairs]
    # Runs of equal neighbours in a random order of 81: 40 ± 4.5 of two kinds, 53 ± 4.2 of three (four deviations).
    assert 22 < sum(a != b for a, b in itertools.pairwise(turned)) < 58
    assert 36 < sum(a != b for a, b in itertools.pairwise(couples)) < 71
    assert [pair["index"] for pair in pairs] != sorted(pair["index"] for pair in pairs)


def test_the_seed_shuffles_and_a_limit_is_shared(judge, exported, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            judge(exported, export_blind=tmp_path / f"{name}.csv", blind_pairs=25, all_pairs=True, seed=seed).code == 0
        )
    sheets = [(tmp_path / f"{name}.csv").read_bytes() for name in "abc"]
    assert sheets[0] == sheets[1] != sheets[2]
    pairs = json.loads((tmp_path / "a.key.json").read_text())["pairs"].values()
    couples = collections.Counter(frozenset((pair["first"], pair["second"])) for pair in pairs)
    assert list(couples.values()) == [8, 8, 8]  # 25 // 3 of each two models
    # Without --all-pairs the base is in every pair.
    assert judge(exported, export_blind=tmp_path / "d.csv", base=MODELS[2]).code == 0
    pairs = json.loads((tmp_path / "d.key.json").read_text())["pairs"].values()
    assert len(pairs) == 54 and all(MODELS[2] in (pair["first"], pair["second"]) for pair in pairs)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.text("=+-@＝\t\r\n\0 '\"a,;", max_size=6))
def test_no_cell_is_a_formula_and_every_text_is_found_again(text):
    cell = evaluate.as_cell(text)
    assert cell.lstrip().lstrip("\0\t\r\n").lstrip()[:1] not in tuple("=+-@＝＋－＠")
    assert cell.removeprefix("'") == text or cell == text
    row = ["1", text, text, text, "1", "tie"]
    (read,) = evaluate.read_sheet(evaluate.write_sheet([row]))
    assert read == dict(zip(evaluate.SHEET, ["1", cell, cell, cell, "1", "tie"], strict=True))
    assert evaluate.digest_texts(cell) == evaluate.digest_texts(text)
    assert evaluate.digest_texts(cell + "x") != evaluate.digest_texts(text) != evaluate.digest_texts(text, text)


# ---- Verdicts read back


@pytest.fixture(scope="module")
def people(exported):
    """Filled sheets of two people, the second with empty cells, beside the key."""
    folder = copy_key(exported, exported / "people")
    write_csv(folder / "ada.csv", fill(exported, favour(dict(zip(MODELS, (0, 0.5, 0.2), strict=True)), 1)))
    partly = favour(dict(zip(MODELS, (0, 0.1, 0.4), strict=True)), 2)
    empty = lambda *key: "" if key[0] == "harmlessness" and key[1] % 2 else partly(*key)  # noqa: E731
    write_csv(folder / "bea.csv", fill(exported, empty))
    return folder


def outcomes_of(sheet: Path, key: Path) -> dict[tuple, float]:
    """(criterion, model_a, model_b, index): what the sheet says for model_a, by reading it in plain steps."""
    pairs, outcomes = json.loads(key.read_text())["pairs"], {}
    head, *rows = read_csv(sheet.read_bytes())
    for row in rows:
        pair = pairs[row[0]]
        for criterion, cell in zip(head[4:], row[4:], strict=True):
            if cell:
                winner = {"1": pair["first"], "2": pair["second"], "tie": None}[cell]
                a, b = sorted((pair["first"], pair["second"]))
                outcomes[criterion, a, b, pair["index"]] = 0.5 if winner is None else float(winner == a)
    return outcomes


def test_rates_and_agreement_of_people_are_those_counted(judge, exported, people, tmp_path):
    sheets = [people / "ada.csv", people / "bea.csv"]
    outcome = judge(exported, import_blind=sheets, output_dir=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "out" / "people.json").read_text())
    found = {sheet.stem: outcomes_of(sheet, people / "sheet.key.json") for sheet in sheets}
    assert results["base"] == MODELS[0] and list(results["people"]) == ["ada", "bea"]
    for name, outcomes in found.items():
        person = results["people"][name]
        assert (person["pairs"], person["rows_missing"]) == (81, 0)
        for criterion in evaluate.CRITERIA:
            assert person[criterion] == sum(key[0] == criterion for key in outcomes)
            for model in MODELS[1:]:
                worth = []
                for (about, a, b, _), value in outcomes.items():
                    if about == criterion and {a, b} == {model, MODELS[0]}:
                        worth.append(value if a == model else 1 - value)
                figures = person["criteria"][criterion][model]
                for key, value in (("wins", 1), ("ties", 0.5), ("losses", 0)):
                    rate = figures[key]
                    assert rate["mean"] == pytest.approx(worth.count(value) / len(worth))
                    assert rate["low"] <= rate["mean"] <= rate["high"] and rate["low"] < rate["high"]
    assert results["people"]["bea"]["harmlessness"] < results["people"]["bea"]["helpfulness"] == 81
    for row in results["agreement"]:
        assert row["judges"] == ["ada", "bea"]
        shared = [key for key in found["ada"] if key in found["bea"] and key[0] == row["criterion"]]
        assert row["pairs"] == len(shared)
        pairs = [(found["ada"][key], found["bea"][key]) for key in shared]
        assert row["kappa"] == pytest.approx(kappa_by_definition(pairs), abs=1e-12)
        assert row["agreement"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
        assert row["low"] < row["kappa"] < row["high"]
        assert f"{row['kappa']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in outcome.out
    differ = read_lines(tmp_path / "out" / "disagreements.jsonl")
    assert len(differ) == sum(found["bea"].get(key, value) != value for key, value in found["ada"].items())
    answers = {(row["model"], row["index"]): row["response"] for row in read_lines(exported / "responses.jsonl")}
    words = {1.0: "win", 0.5: "tie", 0.0: "loss"}
    for row in differ:
        key = (row["criterion"], row["model_a"], row["model_b"], row["index"])
        assert row["verdicts"] == {name: words[found[name][key]] for name in ("ada", "bea")}
        assert (row["response_a"], row["response_b"]) == (answers[key[1], key[3]], answers[key[2], key[3]])
    tied = ["tie" in row["verdicts"].values() for row in differ]
    assert tied == sorted(tied) and True in tied and False in tied  # a win against a loss comes first
    assert outcome.out.count("helpfulness: ada") + outcome.out.count("harmlessness: ada") == 5  # --disagreement-limit


def model_score(criterion: str, prompt: str, answer: str) -> int:
    return random.Random(f"{criterion} {prompt} {answer}").randint(4, 7)


def test_people_and_a_model_judge_are_compared(judge, exported, people, tmp_path):
    """A judge behind an endpoint on loopback has its verdicts on twelve prompts; people have seen all."""

    def reply(text, number):
        criterion, prompt, *answers = asked(text)
        first, second = (model_score(criterion, prompt, answer) for answer in answers)
        return json.dumps({"reason": "", "first": first, "second": second})

    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with changed(evaluate, draw_elo=lambda *args: None):
        flags = dict(judge_model="oracle", base_url=server.url, output_dir=tmp_path, all_pairs=True, limit=12)
        outcome = judge(exported, **flags)
    server.shutdown()
    thread.join()
    server.server_close()
    assert outcome.code == 0, outcome.err
    before = contents(tmp_path)
    outcome = judge(exported, import_blind=[people / "ada.csv", people / "bea.csv"], output_dir=tmp_path)
    assert outcome.code == 0, outcome.err
    assert {name: content for name, content in contents(tmp_path).items() if name in before} == before
    answers = {(row["model"], row["index"]): row for row in read_lines(exported / "responses.jsonl")}
    ada = outcomes_of(people / "ada.csv", people / "sheet.key.json")
    rows = json.loads((tmp_path / "people.json").read_text())["agreement"]
    compared = [["oracle", "ada"], ["oracle", "bea"], ["ada", "bea"]]
    assert [row["judges"] for row in rows] == [names for names in compared for _ in evaluate.CRITERIA]
    for row in rows[:2]:
        pairs = []
        for (criterion, a, b, index), worth in ada.items():
            if criterion == row["criterion"] and index < 12:
                score_a, score_b = (
                    model_score(criterion, answers[name, index]["prompt"], answers[name, index]["response"])
                    for name in (a, b)
                )
                pairs.append((0.5 if score_a == score_b else float(score_a > score_b), worth))
        assert (
            (row["pairs"], row["prompts"]) == (len(pairs), 9) == (27, 9)
        )  # on three of the twelve nobody had a choice
        assert row["kappa"] == pytest.approx(kappa_by_definition(pairs), abs=1e-12)
    differ = read_lines(tmp_path / "disagreements.jsonl")
    assert {len(row["verdicts"]) for row in differ} == {2, 3}
    assert all(len(set(row["verdicts"].values())) > 1 for row in differ)
    outcome = judge(exported, import_blind=[people / "ada.csv"], people=["oracle"], output_dir=tmp_path)
    assert outcome.code == 2 and "oracle is the name of a model judge" in outcome.errors[0]


def test_forms_of_a_sheet(judge, exported, people, tmp_path):
    """What spreadsheet programs make of a sheet, and rows that moved, are read as the sheet itself."""
    rows = fill(exported, favour(dict.fromkeys(MODELS, 0), 3))
    head, *body = rows
    folder = copy_key(exported, tmp_path)
    forms = {
        "plain": rows,
        "moved": [
            [*head[::-1], "notes"],
            *([*row[::-1], "a note"] for row in random.Random(1).sample(body, len(body))),
        ],
        "words": [[name.upper() + " " for name in head], *([*row[:4], f" {row[4].upper()} ", row[5]] for row in body)],
        "lines": [head, *([cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row] for row in body)],
        "apostrophes": [head, *([cell.removeprefix("'") for cell in row] for row in body)],
        "blank": [*rows, ["", "", " ", "", "", ""], []],
    }
    sheets = [write_csv(folder / f"{name}.csv", form) for name, form in forms.items()]
    sheets.append(write_csv(folder / "semicolons.csv", rows, "utf-8", delimiter=";"))
    sheets.append(write_csv(folder / "tabs.csv", rows, "utf-16", delimiter="\t"))
    sheets.append(write_csv(folder / "quotes.csv", rows, quoting=csv.QUOTE_ALL, lineterminator="\n"))
    outcome = judge(exported, import_blind=sheets, output_dir=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "out" / "people.json").read_text())
    assert len(results["people"]) == 9 and all(person["helpfulness"] == 81 for person in results["people"].values())
    assert [row["agreement"] for row in results["agreement"]] == [1.0] * len(results["agreement"])
    assert read_lines(tmp_path / "out" / "disagreements.jsonl") == []


def test_a_sheet_that_is_filled_in_part_is_counted(judge, exported, tmp_path):
    head, *rows = fill(exported, lambda criterion, index, *models: "tie" if criterion == "harmlessness" else "")
    folder = copy_key(exported, tmp_path)
    # Cells at the end of a row that are empty may be missing, as rows may.
    sheet = write_csv(folder / "part.csv", [head, *(row[:4] if i % 2 else row for i, row in enumerate(rows[:71]))])
    outcome = judge(exported, import_blind=[sheet], people=["Ada L."], output_dir=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "Ada L.: 81 pairs, verdicts: 0 on helpfulness, 36 on harmlessness; 10 rows are missing" in outcome.out
    person = json.loads((tmp_path / "out" / "people.json").read_text())["people"]["Ada L."]
    assert (person["helpfulness"], person["harmlessness"], person["rows_missing"]) == (0, 36, 10)
    assert list(person["criteria"]) == ["harmlessness"]
    assert person["criteria"]["harmlessness"][MODELS[1]]["ties"]["mean"] == 1


def spoil(rows, case):
    """A filled sheet with one mistake in its third row, which is row 4 of a spreadsheet program."""
    row = rows[3]
    if case == "wrong cell":
        row[5] = "3"
    elif case == "unknown id":
        row[0] = "999"
    elif case == "no id":
        row[0] = ""
    elif case == "id twice":
        row[0] = rows[2][0]
    elif case == "changed text":
        row[2] += " Really."
    elif case == "ids exchanged":
        row[0], rows[4][0] = rows[4][0], row[0]
    elif case == "no column":
        rows[0][5] = "harm"
    elif case == "empty":
        rows.clear()
    return rows


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong cell", ["row 4 (id 3)", "harmlessness is '3'", "1, 2 or tie"]),
        ("unknown id", ["row 4", "no id '999'"]),
        ("no id", ["row 4", "no id ''"]),
        ("id twice", ["row 4", "id 2", "row 3"]),
        ("changed text", ["row 4 (id 3)", "not those that were exported"]),
        ("ids exchanged", ["row 4 (id 4)", "not those that were exported"]),
        ("no column", ["harmlessness"]),
        ("empty", ["columns"]),
    ],
)
def test_a_mistake_in_a_sheet_is_told_with_its_row(judge, exported, tmp_path, case, words):
    sheet = write_csv(copy_key(exported, tmp_path) / "ada.csv", spoil(fill(exported, lambda *key: "1"), case))
    outcome = judge(exported, import_blind=[sheet], output_dir=tmp_path / "out")
    assert outcome.code == 2 and len(outcome.errors) == 1 and outcome.err.count("\n") == 1
    assert all(word in outcome.errors[0] for word in [str(sheet), *words]), outcome.errors
    assert not (tmp_path / "out").exists()


def test_mistakes_around_sheets(judge, exported, people, tmp_path):
    """Each is one line, and nothing is written."""
    keyless = tmp_path / "keyless"
    keyless.mkdir()
    shutil.copy(people / "ada.csv", keyless)
    two = copy_key(exported, tmp_path / "two")
    shutil.copy(people / "ada.csv", two)
    shutil.copy(exported / "sheet.key.json", two / "other.key.json")
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(people / "ada.csv", broken)
    (broken / "ada.key.json").write_text('{"pairs": {"1": {"index": 0}}}')
    latin = copy_key(exported, tmp_path / "latin")
    (latin / "ada.csv").write_bytes("id;é".encode("latin-1"))
    others = make_answers(30, same=(3, 4, 5))
    for row in others:
        row["response"] += " changed"
    others = write_answers(tmp_path / "others", others)
    same = write_answers(tmp_path / "same", make_answers(2, same=(0, 1)))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "args.json").write_text('{"command": "score"}')
    ada, sheet = people / "ada.csv", exported / "sheet.csv"
    cases = [
        ((exported,), dict(import_blind=[keyless / "ada.csv"]), "ada.key.json"),
        ((exported,), dict(import_blind=[two / "ada.csv"]), "ada.key.json"),
        ((exported,), dict(import_blind=[broken / "ada.csv"]), "is no key"),
        ((exported,), dict(import_blind=[latin / "ada.csv"]), "UTF-8"),
        ((exported,), dict(import_blind=[people / "nobody.csv"]), "No such file"),
        ((exported,), dict(import_blind=[people]), "--import-blind"),
        ((exported,), dict(import_blind=[ada, ada]), "'ada' is not the name of one person"),
        ((exported,), dict(import_blind=[ada], people=["a", "b"]), "--people names 2"),
        ((exported,), dict(people=["a"]), "--people names 1"),
        ((exported,), dict(import_blind=[ada], export_blind="x.csv"), "two steps"),
        ((exported,), dict(import_blind=[ada], disagreement_limit=-1), "--disagreement-limit"),
        ((exported,), dict(import_blind=[ada], output_dir=elsewhere), "another script's run"),
        ((others,), dict(import_blind=[ada]), "--responses has other answers"),
        ((exported,), dict(import_blind=[ada], models=MODELS[:2]), f"of {MODELS[2]}; choose all answers"),
        ((exported,), dict(import_blind=[ada], limit=1), "--limit leave out prompt"),
        ((exported,), dict(export_blind=sheet), "may hold verdicts"),
        ((exported,), dict(export_blind=tmp_path / "sheet.txt"), "ends in .csv"),
        ((exported,), dict(export_blind=tmp_path / "new.csv", blind_pairs=1), "--blind-pairs is 1"),
        ((exported,), dict(export_blind=tmp_path / "new.csv", blind_pairs=-1), "--blind-pairs"),
        ((exported,), dict(export_blind=exported / "responses.jsonl" / "new.csv"), "cannot be written"),
        ((same,), dict(export_blind=tmp_path / "new.csv"), "the same"),
    ]  # fmt: skip
    before = contents(tmp_path)
    for responses, flags, words in cases:
        outcome = judge(*responses, **dict(output_dir=tmp_path / "out") | flags)
        assert outcome.code == 2 and len(outcome.errors) == 1 and words in outcome.errors[0], (flags, outcome)
    assert contents(tmp_path) == before


def test_a_page_or_key_without_its_sheet_is_not_written_over(judge, exported, tmp_path):
    (tmp_path / "sheet.key.json").write_text("a key that a filled sheet may need")
    outcome = judge(exported, export_blind=tmp_path / "sheet.csv")
    assert outcome.code == 2 and "sheet.key.json" in outcome.errors[0]
    assert os.listdir(tmp_path) == ["sheet.key.json"]
    # What cannot be written to its end leaves nothing behind that would stop the next try.
    (tmp_path / "new.csv").symlink_to(tmp_path / "nowhere" / "new.csv")
    outcome = judge(exported, export_blind=tmp_path / "new.csv")
    assert outcome.code == 2 and "cannot be written" in outcome.errors[0]
    assert sorted(os.listdir(tmp_path)) == ["new.csv", "sheet.key.json"]


def test_texts_that_excel_would_cut_are_told(judge, tmp_path):
    rows = make_answers(2, MODELS[:2])
    rows[0]["response"] = "long " * 30_000  # more than the csv module reads unless it is told
    folder = write_answers(tmp_path, rows)
    outcome = judge(folder, export_blind=tmp_path / "sheet.csv")
    assert outcome.code == 0 and "texts over 32767 characters, where Excel cuts them off: 1;" in outcome.out
    outcome = judge(folder, import_blind=[tmp_path / "sheet.csv"], output_dir=tmp_path / "out")
    assert outcome.code == 0 and "2 pairs, verdicts: 0 on helpfulness" in outcome.out


# ---- Agreement


def kappa_by_definition(pairs: list[tuple]) -> float | None:
    """Cohen's kappa in fractions: chance agreement is counted over all pairs of one's verdicts and the other's."""
    n = len(pairs)
    observed = fractions.Fraction(sum(a == b for a, b in pairs), n)
    by_chance = fractions.Fraction(sum(a == b for (a, _), (_, b) in itertools.product(pairs, pairs)), n * n)
    return None if by_chance == 1 else float((observed - by_chance) / (1 - by_chance))


def agreement(pairs: list[tuple], prompts=None, resamples=200) -> dict:
    keys = [("helpfulness", "a", str(i), prompts[i] if prompts else i) for i in range(len(pairs))]
    one, other = (dict(zip(keys, values, strict=True)) for values in zip(*pairs, strict=True))
    return evaluate.agreement(one, other, resamples, torch.Generator().manual_seed(1))


def table_of(counts: list[list[int]]) -> list[tuple]:
    return [(a / 2, b / 2) for a, row in enumerate(counts) for b, count in enumerate(row) for _ in range(count)]


def test_kappa_of_random_tables_is_that_of_its_definition():
    draw = random.Random(1)
    for case in range(300):
        most = draw.choice((1, 3, 30))
        pairs = table_of([[draw.choice((0, draw.randint(0, most))) for _ in range(3)] for _ in range(3)])
        if pairs:
            found, expected = agreement(pairs, resamples=5)["kappa"], kappa_by_definition(pairs)
            assert found == (expected if expected is None else pytest.approx(expected, abs=1e-12)), (case, pairs)


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        ([[20, 0, 5], [0, 0, 0], [10, 0, 15]], 0.4),  # tables whose kappa is worked out by hand
        ([[45, 0, 15], [0, 0, 0], [25, 0, 15]], 0.1304),
        ([[25, 0, 35], [0, 0, 0], [5, 0, 35]], 0.2593),
        ([[88, 14, 18], [10, 40, 10], [2, 6, 12]], 0.4915),
        ([[7, 0, 0], [0, 5, 0], [0, 0, 9]], 1.0),
        ([[0, 0, 7], [0, 0, 0], [7, 0, 0]], -1.0),
        ([[9, 0, 0], [3, 0, 0], [0, 0, 0]], 0.0),  # one of them always says the same
    ],
)
def test_kappa_of_known_tables(counts, kappa):
    assert agreement(table_of(counts))["kappa"] == pytest.approx(kappa, abs=5e-5)


def test_kappa_is_null_where_it_is_undefined(judge, exported, tmp_path):
    assert agreement([(1.0, 1.0)] * 5) == dict(pairs=5, prompts=5, agreement=1.0, kappa=None, low=None, high=None)
    nothing = evaluate.agreement({}, {("helpfulness", "a", "b", 0): 1.0}, 5, torch.Generator())
    assert nothing == dict(pairs=0, prompts=0, agreement=None, kappa=None, low=None, high=None)
    folder = copy_key(exported, tmp_path)
    sheets = [write_csv(folder / f"{name}.csv", fill(exported, lambda *key: "tie")) for name in ("one", "two")]
    outcome = judge(exported, import_blind=sheets, output_dir=tmp_path / "out")
    assert outcome.out.count("undefined") == 2
    rows = json.loads((tmp_path / "out" / "people.json").read_text())["agreement"]
    assert [(row["agreement"], row["kappa"], row["low"]) for row in rows] == [(1.0, None, None)] * 2


def test_the_interval_of_kappa_is_over_prompts():
    draw = random.Random(2)
    pairs = []
    for _ in range(400):
        verdict = draw.choice((0.0, 0.5, 1.0, 1.0))
        pairs.append((verdict, verdict if draw.random() < 0.6 else draw.choice((0.0, 0.5, 1.0))))
    found = agreement(pairs, resamples=3000)
    # The large-sample deviation of Fleiss, Cohen and Everitt (Psychological Bulletin 1969).
    n, share = len(pairs), collections.Counter(pairs)
    p = {key: count / n for key, count in share.items()}
    rows, columns = ({k: sum(v for key, v in p.items() if key[side] == k) for k in (0.0, 0.5, 1.0)} for side in (0, 1))
    agree = sum(p.get((k, k), 0) for k in rows)
    chance = sum(rows[k] * columns[k] for k in rows)
    kappa = (agree - chance) / (1 - chance)
    a = sum(p.get((k, k), 0) * (1 - (rows[k] + columns[k]) * (1 - kappa)) ** 2 for k in rows)
    b = (1 - kappa) ** 2 * sum(v * (columns[i] + rows[j]) ** 2 for (i, j), v in p.items() if i != j)
    deviation = ((a + b - (kappa - chance * (1 - kappa)) ** 2) / n) ** 0.5 / (1 - chance)
    assert found["kappa"] == pytest.approx(kappa)
    assert (found["high"] - found["low"]) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.08)
    # Four equal pairs a prompt say no more than one.
    again = agreement(pairs * 4, prompts=list(range(n)) * 4, resamples=3000)
    assert (again["kappa"], again["prompts"], again["pairs"]) == (pytest.approx(kappa), n, 4 * n)
    assert (again["low"], again["high"]) == (pytest.approx(found["low"]), pytest.approx(found["high"]))


def test_disagreements_come_worst_first():
    key = [("helpfulness", "a", "b", i) for i in range(6)]
    judges = {
        "model": {key[0]: 1.0, key[1]: 1.0, key[2]: 1.0, key[3]: 1.0, key[5]: 0.0},
        "ada": {key[0]: 1.0, key[1]: 0.5, key[2]: 0.0, key[3]: 0.0, key[4]: 0.5},
        "bea": {key[0]: 1.0, key[2]: 1.0, key[3]: 0.0, key[4]: 0.0},
    }
    rows = evaluate.disagreements(judges, ["ada", "bea"])
    # Both people against the model; one of them; a tie against a win; two people between themselves.
    assert [row["index"] for row in rows] == [3, 2, 1, 4]
    assert rows[1]["verdicts"] == {"model": "win", "ada": "loss", "bea": "win"}


# ---- The page, in a browser


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory):
    """open_browser(**preferences): a headless chromium and the folder it downloads to."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        told = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        told(f"no {' and no '.join(missing)} (Debian's packages chromium and chromium-driver)")
    browsers = []

    def open_browser(**preferences):
        downloads = tmp_path_factory.mktemp("downloads")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,900"):
            options.add_argument(f"--{word}")
        folder = {"download.default_directory": str(downloads)}
        options.add_experimental_option("prefs", folder | {f"profile.{k}": v for k, v in preferences.items()})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browsers.append(webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver"))))
        return browsers[-1], downloads

    yield open_browser
    for browser in browsers:
        browser.quit()


@pytest.fixture(scope="module")
def browser(open_browser):
    return open_browser()


@pytest.fixture(scope="module")
def page(judge, tmp_path_factory):
    """Folder with a small sheet of two models and its page: one pair for each of the awkward texts."""
    folder = write_answers(tmp_path_factory.mktemp("people") / "page", make_answers(len(AWKWARD), MODELS[:2]))
    outcome = judge(folder, export_blind=folder / "sheet.csv")
    assert outcome.code == 0, outcome.err
    return folder


def press(browser, *keys):
    for key in keys:
        ActionChains(browser, duration=0).send_keys(key).perform()


def text_of(browser, name: str) -> str:
    return browser.execute_script(f"return document.getElementById('{name}').textContent")


def pressed(browser) -> dict[str, str]:
    """The verdicts that the page shows on its pair."""
    script = (
        "return [...document.querySelectorAll('[aria-pressed=true]')].map(b => [b.parentNode.parentNode.id, b.value])"
    )
    return dict(browser.execute_script(script))


def current(browser) -> str:
    return browser.execute_script("return document.querySelector('[aria-current=true]').id")


def saved_file(browser, downloads: Path) -> Path:
    press(browser, "s")
    WebDriverWait(browser, 10, 0.05).until(lambda _: [*downloads.glob("*.csv")])
    (path,) = downloads.glob("*.csv")
    return path


def requests(browser) -> list[str]:
    """Addresses asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_a_person_judges_all_pairs_by_keys_alone(judge, browser, page, tmp_path):
    (browser, downloads), address = browser, Path(shutil.copy(page / "sheet.html", tmp_path / "Ada & Bé.html")).as_uri()
    browser.get(address)
    _, *rows = read_csv((page / "sheet.csv").read_bytes())
    draw, given = random.Random(3), {}
    for number, row in enumerate(rows, start=1):
        if number == len(rows) // 2:  # with one of its verdicts given, the page is closed and opened again
            press(browser, "2")
            given[row[0], "helpfulness"] = "2"
            browser.get("about:blank")
            browser.get(address)
            assert current(browser) == "harmlessness" and pressed(browser) == {"helpfulness": "2"}
        assert f"Pair {number} of {len(rows)}." in text_of(browser, "status")
        assert f"{len(given)} of {2 * len(rows)} verdicts" in text_of(browser, "status")
        shown = [text_of(browser, name) for name in ("prompt", "answer_1", "answer_2")]
        assert [evaluate.as_cell(text) for text in shown] == row[1:4]  # as text, tags and all
        for criterion in evaluate.CRITERIA:
            if (row[0], criterion) not in given:
                assert current(browser) == criterion
                key, cell = draw.choice([("1", "1"), ("2", "2"), ("0", "tie"), ("t", "tie"), ("T", "tie")])
                press(browser, key)
                given[row[0], criterion] = cell
    assert "All are given" in text_of(browser, "status")
    assert browser.execute_script("return [bar.value, bar.max]") == [len(given), len(given)]
    assert browser.title == "Which answer is better?"  # no text of a model has run
    assert browser.execute_script("return document.querySelectorAll('img, b').length") == 2  # the page's own words
    sheet = saved_file(browser, downloads)
    assert sheet.name == "Ada & Bé.csv" and sheet.read_bytes().startswith(b"\xef\xbb\xbf")
    filled = [[*row[:4], *(given[row[0], criterion] for criterion in evaluate.CRITERIA)] for row in rows]
    assert read_csv(sheet.read_bytes()) == [evaluate.SHEET, *filled]
    assert browser.get_log("browser") == []
    assert {url.partition(":")[0] for url in requests(browser)} <= {"file", "blob", "about"}

    shutil.move(sheet, copy_key(page, tmp_path))
    outcome = judge(page, import_blind=[tmp_path / sheet.name], output_dir=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    pairs = json.loads((page / "sheet.key.json").read_text())["pairs"]
    person = json.loads((tmp_path / "out" / "people.json").read_text())["people"]["Ada & Bé"]
    for criterion in evaluate.CRITERIA:
        wins = sum(given[id, criterion] == ("1" if pair["first"] == MODELS[1] else "2") for id, pair in pairs.items())
        ties = sum(given[id, criterion] == "tie" for id in pairs)
        rates = person["criteria"][criterion][MODELS[1]]
        assert (rates["wins"]["mean"], rates["ties"]["mean"]) == pytest.approx((wins / len(rows), ties / len(rows)))


def test_keys_move_take_back_and_correct(browser, page):
    browser, _ = browser
    browser.get((page / "sheet.html").as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    press(browser, Keys.ARROW_LEFT)
    assert "Pair 1 of" in text_of(browser, "status") and current(browser) == "helpfulness"
    press(browser, "1", "2", Keys.ARROW_LEFT)
    assert current(browser) == "harmlessness" and pressed(browser) == {"helpfulness": "1", "harmlessness": "2"}
    press(browser, Keys.DELETE)
    assert current(browser) == "harmlessness" and pressed(browser) == {"helpfulness": "1"}
    press(browser, Keys.ARROW_LEFT, "0")
    assert pressed(browser) == {"helpfulness": "tie"}
    press(browser, *[Keys.ARROW_RIGHT] * 100)
    assert f"Pair {len(AWKWARD)} of" in text_of(browser, "status") and current(browser) == "harmlessness"
    press(browser, "n")
    assert "Pair 1 of" in text_of(browser, "status") and current(browser) == "harmlessness"
    # A verdict at the end leads to those that are open; keys with Ctrl are the browser's.
    press(browser, *[Keys.ARROW_RIGHT] * 100, "1")
    assert "Pair 1 of" in text_of(browser, "status") and "harmlessness: 1" in text_of(browser, "status")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("0").key_up(Keys.CONTROL).perform()
    assert pressed(browser) == {"helpfulness": "tie"}
    assert browser.get_log("browser") == []


def test_the_tab_key_reaches_all_in_order_and_shows_where_it_is(browser, page):
    browser, _ = browser
    browser.get((page / "sheet.html").as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    reached = []
    for _ in range(10):
        press(browser, Keys.TAB)
        focus = "const e = document.activeElement, s = getComputedStyle(e); return [e.textContent.trim(), "
        text, outline = browser.execute_script(focus + "s.outlineStyle + parseFloat(s.outlineWidth)]")
        assert outline == "solid3"
        reached.append(text)
    judging = ["Answer 1", "Tie 0", "Answer 2"]
    assert reached == [*judging, *judging, "← Back", "→ Next", "n Next open", "s Save"]
    for _ in range(4):
        ActionChains(browser, duration=0).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert current(browser) == "harmlessness"  # a key answers where the focus is
    press(browser, Keys.SPACE)
    assert "harmlessness: 2. Pair 2" in text_of(browser, "status")
    press(browser, Keys.ARROW_LEFT, Keys.TAB)
    assert pressed(browser) == {"harmlessness": "2"}


def test_two_windows_of_a_page_lose_no_verdict(browser, page, tmp_path):
    browser, _ = browser
    address, first = (page / "sheet.html").as_uri(), browser.current_window_handle
    browser.get(address)
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    browser.switch_to.new_window("tab")
    browser.get(address)
    press(browser, "1", "2")
    browser.get(Path(shutil.copy(page / "sheet.html", tmp_path / "bea.html")).as_uri())
    assert pressed(browser) == {} and "0 of" in text_of(browser, "status")  # a copy under another name is another's
    press(browser, "0")
    browser.close()
    browser.switch_to.window(first)
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, "0")
    press(browser, *[Keys.ARROW_LEFT] * 3)
    assert pressed(browser) == {"helpfulness": "1", "harmlessness": "2"}


def test_a_browser_that_keeps_nothing_says_so_and_saves(open_browser, page):
    browser, downloads = open_browser(**{"default_content_setting_values.cookies": 2})
    browser.get((page / "sheet.html").as_uri())
    assert browser.execute_script("try { localStorage } catch (e) { return e.name }") == "SecurityError"
    assert browser.execute_script("return warning.checkVisibility() && warning.textContent").startswith(
        "This browser keeps"
    )
    leave = "return dispatchEvent(new Event('beforeunload', { cancelable: true }))"  # false where the page asks first
    assert browser.execute_script(leave)
    press(browser, "1", "2", "t")
    assert not browser.execute_script(leave)
    _, *rows = read_csv(saved_file(browser, downloads).read_bytes())
    assert [row[4:] for row in rows[:3]] == [["1", "2"], ["tie", ""], ["", ""]]
    assert browser.execute_script(leave)


def test_the_page_may_not_use_the_network(browser, page):
    browser, _ = browser
    browser.get((page / "sheet.html").as_uri())
    for attempt, refused in (
        ("fetch('http://127.0.0.1:9/').catch(() => 0)", "connect-src"),
        ("new Image().src = 'http://127.0.0.1:9/'", "img-src"),
        (
            "document.body.append(Object.assign(document.createElement('iframe'), { src: 'http://127.0.0.1:9/' }))",
            "frame-src",
        ),
    ):
        script = "document.addEventListener('securitypolicyviolation', e => arguments[0](e.effectiveDirective), "
        assert browser.execute_async_script(script + "{ once: true }); " + attempt) == refused
    browser.get_log("browser")  # where the browser has told it, too


def test_the_page_is_accessible_and_fits(browser, page):
    """Names and roles as a screen reader gets them; contrast in both schemes (WCAG: 4.5, rims 3); 400 pixels."""
    browser, _ = browser
    browser.get((page / "sheet.html").as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    press(browser, "1")
    nodes = [
        node for node in browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"] if not node["ignored"]
    ]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    for expected in (
        ("heading", "Which answer is better?"), ("heading", "Answer 1"), ("group", "Which answer is more helpful?"),
        ("group", "Which answer is more harmless?"), ("button", "Answer 1"), ("button", "Tie 0"), ("main", ""),
        ("progressbar", "Verdicts given"), ("status", ""), ("button", "s Save"),
    ):  # fmt: skip
        assert expected in named, (expected, named)
    states = [p["value"]["value"] for node in nodes for p in node.get("properties", []) if p["name"] == "pressed"]
    assert states == ["true", *["false"] * 5]

    def luminance(color):
        parts = [int(x) / 255 for x in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    style = "const s = (e, k) => getComputedStyle(document.querySelector(e))[k]; return "
    paper, papers = "s('body', 'backgroundColor')", set()
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        for one, other, least in (
            ("s('body', 'color')", paper, 4.5),
            ("s('.text', 'color')", "s('.text', 'backgroundColor')", 4.5),
            ("s('[value=tie]', 'color')", "s('[value=tie]', 'backgroundColor')", 4.5),
            ("s('[aria-pressed=true]', 'color')", "s('[aria-pressed=true]', 'backgroundColor')", 4.5),
            ("s('[aria-current=true]', 'borderTopColor')", paper, 3),
            ("s('[value=tie]', 'borderTopColor')", paper, 3),
        ):
            colors = browser.execute_script(f"{style} [{one}, {other}]")
            low, high = sorted(map(luminance, colors))
            assert (high + 0.05) / (low + 0.05) >= least, (scheme, one, colors)
        papers.add(browser.execute_script(style + paper))
    assert len(papers) == 2
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for _ in range(len(AWKWARD)):
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
