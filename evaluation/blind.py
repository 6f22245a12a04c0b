"""`blind`: people compare answers without the names of models, and their verdicts are set beside a model judge's.

`export` writes a sheet (CSV), a page that shows it (HTML, works offline), and a key that names the models. `import`
reads the sheets that people filled in.

    python -m evaluation blind export --responses runs/suite --sheet runs/blind/sheet.csv --blind-pairs 100
    python -m evaluation blind import --responses runs/suite --sheets runs/blind/ada.csv --output-dir runs/judged
"""

import csv
import hashlib
import io
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evaluation.files import check_ranges, fail, write_json
from evaluation.judge import Comparison, find_verdicts, read_models
from evaluation.tables import interval, print_markdown
from evaluation.verdicts import CRITERIA, Outcomes, pair_outcomes, print_rates, tabulate_outcomes


@dataclass
class Export(Comparison):
    """Write pairs of answers without names, for people to judge."""

    sheet: str = "sheet.csv"  # the CSV file to write; its page (.html) and its key (.key.json) come beside it
    blind_pairs: int = 0  # pairs in the sheet at most, the same number for any two models; 0 takes all


@dataclass
class Import(Comparison):
    """Read filled sheets: rates by each person, and how far people and model judges agree."""

    sheets: list[str] = field(default_factory=list)  # the sheet as people filled it in, a copy each, beside its key
    people: list[str] = field(default_factory=list)  # their names, in the order of --sheets; default: the files' names
    output_dir: str = "runs/people"  # where it is written: the directory of `judge`, if a model judged, too
    bootstrap_resamples: int = 5000  # resamples of the prompts behind each 95% interval


@dataclass
class Blind:
    """People as judges."""

    step: Export | Import


SHEET = ["id", "prompt", "answer_1", "answer_2", *CRITERIA]  # the last ones hold verdicts, empty or a key of WORTH
WORTH = {"1": 1.0, "tie": 0.5, "2": 0.0}  # a cell of the sheet, and what it is worth to answer 1
FORMULA = r"^[\s\u0000-\u001f]*[=+\-@＝＋－＠]"  # what a spreadsheet program runs, also with wide signs


# ---- Export: sheet, page and key
def draw_pairs(answers: dict, couples: list[tuple[str, str]], limit: int, rng: np.random.Generator) -> list[dict]:
    """Pairs of answers to one prompt in random order: {"index", "first", "second"}, the last two names of models.

    Each couple of models gets the same number of pairs, on prompts drawn at random, and each of the two comes first in
    half of them. limit: pairs of all couples together at most; 0 takes all. Answers that read the same are left out.
    """
    pairs = []
    for couple in couples:
        one, other = (answers[name] for name in couple)
        differ = [i for i in one if one[i]["response"].split() != other[i]["response"].split()]
        drawn = rng.permutation(differ)[: limit // len(couples) if limit else None].tolist()
        for index, turn in zip(drawn, rng.permutation(len(drawn)) % 2, strict=True):
            first, second = reversed(couple) if turn else couple
            pairs.append({"index": index, "first": first, "second": second})
        print(f"{' and '.join(couple)}: {len(drawn)} pairs; {len(one) - len(differ)} left out, where both are the same")
    return [pairs[place] for place in rng.permutation(len(pairs))]


def pair_texts(pair: dict, answers: dict[str, dict[int, dict]]) -> list[str]:
    """Prompt, first and second answer of a pair."""
    first, second = (answers[pair[side]][pair["index"]] for side in ("first", "second"))
    return [first["prompt"], first["response"], second["response"]]


def as_cell(text: str) -> str:
    """A text as a cell that no spreadsheet program runs: what would be a formula gets an apostrophe in front."""
    return "'" + text if re.match(FORMULA, text) else text


def write_sheet(rows: list[list[str]]) -> bytes:
    """A sheet as CSV; the mark at its beginning tells Excel that it is UTF-8. rows: id, prompt and both answers."""
    text = io.StringIO()
    csv.writer(text).writerows([SHEET, *([*map(as_cell, row), *[""] * len(CRITERIA)] for row in rows)])
    return text.getvalue().encode("utf-8-sig")


def write_page(rows: list[list[str]]) -> bytes:
    """The page of a sheet, which saves the sheet with its verdicts under the page's own name."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()  # tells sheets apart in the browser's store
    data = {"digest": digest, "columns": SHEET, "criteria": list(CRITERIA), "formula": FORMULA, "rows": rows}
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # No text of a model may end the element that holds it.
    return page.replace("DATA", json.dumps(data).replace("<", r"\u003c")).encode()


def blind_export(args: Export) -> None:
    """Write a sheet, its page and its key; never over a file that is there, which may hold verdicts."""
    check_ranges(args, "", "blind_pairs limit seed")
    answers, couples = read_models(args)
    sheet, key, page = (Path(args.sheet).with_suffix(end) for end in (".csv", ".key.json", ".html"))
    if any(path.exists() for path in (sheet, key, page)):
        fail(f"--sheet {sheet}: there is a sheet, page or key of this name, which may hold verdicts; choose another")
    if 0 < args.blind_pairs < len(couples):
        fail(f"--blind-pairs is {args.blind_pairs}; there are {len(couples)} pairs of models to share them")
    pairs = draw_pairs(answers, couples, args.blind_pairs, np.random.default_rng(args.seed))
    if not pairs:
        fail("--responses: there is nothing to judge, since all models gave the same answers")
    rows = [[str(number), *pair_texts(pair, answers)] for number, pair in enumerate(pairs, start=1)]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    write_json(key, {"seed": args.seed, "pairs": {row[0]: pair for row, pair in zip(rows, pairs, strict=True)}})
    page.write_bytes(write_page(rows))
    sheet.write_bytes(write_sheet(rows))
    print(f"\n{len(pairs)} pairs; give people {page} or {sheet}, and keep {key}, which names the models")


# ---- Import: verdicts read back, agreement
def read_sheet(content: bytes) -> list[dict[str, str]]:
    """Rows of a sheet, also as other programs save it: semicolons or tabs, UTF-16, no mark. ValueError if none is."""
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    csv.field_size_limit(2**31 - 1)
    for delimiter in ",;\t":
        head, *rows = [*csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)] or [[]]
        columns = [name.strip().lower() for name in head]
        if set(SHEET) <= set(columns):
            return [dict(itertools.zip_longest(columns, row[: len(columns)], fillvalue="")) for row in rows]
    raise ValueError(f"its columns are not {', '.join(SHEET)}")


def plain(text: str) -> str:
    """A text without what spreadsheet programs change: blanks, ends of lines, an apostrophe in front."""
    return "".join(filter(str.isprintable, text.lstrip("'"))).replace(" ", "")


def read_person(sheet: Path, answers: dict[str, dict[int, dict]]) -> tuple[Outcomes, dict[str, int]]:
    """One person's outcomes, and counts: pairs of the key, rows missing from the sheet, verdicts on each criterion."""
    try:
        (key,) = sheet.parent.glob("*.key.json")
        pairs = json.loads(key.read_text(encoding="utf-8"))["pairs"]
    except (ValueError, LookupError, TypeError):
        fail(f"--sheets {sheet}: put the key of its export beside it, and no other .key.json")
    try:
        rows = read_sheet(sheet.read_bytes())
    except (OSError, ValueError, csv.Error) as exception:
        fail(f"--sheets {sheet} cannot be read: {exception}; save it as 'CSV UTF-8'")
    outcomes, seen = {}, set()
    for number, row in enumerate(rows, start=2):  # as spreadsheet programs count, the head is row 1
        if not any(cell.strip() for cell in row.values()):
            continue
        where = f"--sheets {sheet}, row {number} (id {row['id']})"
        pair = pairs.get(row["id"].strip())
        if pair is None or row["id"].strip() in seen:
            fail(f"{where}: the id is not in {key}, or another row has it, too")
        seen.add(row["id"].strip())
        for name in (pair["first"], pair["second"]):
            if pair["index"] not in answers.get(name, {}):
                fail(f"{where}: --responses, --models, --base and --limit leave out prompt {pair['index']} of {name}; "
                     "choose all answers that were exported")  # fmt: skip
        if [plain(row[name]) for name in SHEET[1:4]] != [plain(text) for text in pair_texts(pair, answers)]:
            fail(f"{where}: prompt and answers are not those of --responses that {key} names")
        model_a, model_b = sorted((pair["first"], pair["second"]))
        for criterion in CRITERIA:
            cell = row[criterion].strip().lower()
            if cell and cell not in WORTH:
                fail(f"{where}: {criterion} is '{cell}'; write 1, 2 or tie, or leave it empty")
            if cell:
                worth = WORTH[cell] if model_a == pair["first"] else 1 - WORTH[cell]
                outcomes[criterion, model_a, model_b, pair["index"]] = worth
    counts = {"pairs": len(pairs), "rows_missing": len(pairs) - len(seen)}
    return outcomes, counts | {name: sum(key[0] == name for key in outcomes) for name in CRITERIA}


def cohen_kappa(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa (1960) of counts [..., verdict of one, verdict of the other]: agreement beyond chance, 1 at most;
    NaN without pairs, or if both gave one and the same verdict throughout."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = tables / tables.sum((-2, -1), keepdims=True)
        observed = np.trace(shares, axis1=-2, axis2=-1)
        by_chance = (shares.sum(-1) * shares.sum(-2)).sum(-1)
        return np.where(by_chance < 1, (observed - by_chance) / (1 - by_chance), np.nan)


def agreement(one: Outcomes, other: Outcomes, criterion: str, resamples: int, rng: np.random.Generator) -> dict:
    """How far two judges agree on the pairs that both have judged by one criterion: win, tie or loss.

    The interval is a bootstrap over prompts: pairs of one prompt share an answer.
    """
    shared = [key for key in one if key in other and key[0] == criterion]
    prompts = {index: row for row, index in enumerate(dict.fromkeys(index for *_, index in shared))}
    counts = np.zeros((len(prompts), 3, 3))
    for key in shared:
        counts[prompts[key[-1]], round(2 * one[key]), round(2 * other[key])] += 1
    table = counts.sum(0)
    result = {"pairs": len(shared), "prompts": len(prompts)} | dict.fromkeys(("agreement", "kappa", "low", "high"))
    if shared:
        result["agreement"] = float(np.trace(table) / table.sum())
        draws = rng.integers(len(prompts), size=(resamples, len(prompts)))
        found = interval(cohen_kappa(table), cohen_kappa(np.stack([counts[draw].sum(0) for draw in draws])))
        result |= {"kappa": found["mean"], "low": found["low"], "high": found["high"]} if found else {}
    return result


def blind_import(args: Import) -> None:
    """Rates by each person, and the agreement of people and model judges."""
    check_ranges(args, "bootstrap_resamples", "limit seed")
    people = args.people or [Path(entry).stem for entry in args.sheets]
    (answers, _), folder = read_models(args), Path(args.output_dir)
    verdicts = [row for row in find_verdicts(folder, answers) if {row["first"], row["second"]} <= set(answers)]
    judges = {}
    for name in dict.fromkeys(row["judge"] for row in verdicts):
        judges[name] = pair_outcomes([row for row in verdicts if row["judge"] == name])
    if not people or len(people) != len(args.sheets) or len({*people, *judges}) < len(people) + len(judges):
        fail("--sheets: give at least one, and each person another name by --people, none of them the model judge's")
    names, couples, resamples = list(answers), list(itertools.combinations(answers, 2)), args.bootstrap_resamples
    results = {"seed": args.seed, "bootstrap_resamples": resamples, "base": names[0], "people": {}, "agreement": []}
    for name, sheet in zip(people, args.sheets, strict=True):
        judges[name], counts = read_person(Path(sheet), answers)
        results["people"][name] = {"sheet": sheet} | counts | {"criteria": {}}
        for criterion in (criterion for criterion in CRITERIA if counts[criterion]):
            indices = sorted({key[-1] for key in judges[name] if key[0] == criterion})
            rates = tabulate_outcomes(judges[name], criterion, names, couples, indices, resamples, args.seed)
            results["people"][name]["criteria"][criterion] = rates
    for (one, other), criterion in itertools.product(itertools.combinations(judges, 2), CRITERIA):
        figures = agreement(judges[one], judges[other], criterion, resamples, np.random.default_rng(args.seed))
        results["agreement"].append({"judges": [one, other], "criterion": criterion} | figures)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "people.json", results)
    print_people(results)
    print(f"\nwritten to {folder}")


def print_people(results: dict) -> None:
    """Rates by each person, and the agreement of all judges."""
    for name, person in results["people"].items():
        given = ", ".join(f"{person[criterion]} on {criterion}" for criterion in CRITERIA)
        print(f"\n{name}: {person['pairs']} pairs, verdicts: {given}; {person['rows_missing']} rows are missing")
        for criterion, models in person["criteria"].items():
            print_rates(criterion, models, results["base"])
    lines = [["judges", "criterion", "pairs", "agreement", "Cohen's kappa"]]
    for row in results["agreement"]:
        share = f"{row['agreement']:.1%}" if row["pairs"] else ""
        kappa = "undefined" if row["kappa"] is None else "{kappa:.2f} [{low:.2f}, {high:.2f}]".format(**row)
        lines.append([" and ".join(row["judges"]), row["criterion"], str(row["pairs"]), share, kappa])
    print()
    print_markdown(lines)
