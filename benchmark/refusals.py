"""How often the rule for refusals in evaluation/suites.py agrees with people: on XSTest's published, labelled answers.

    git clone https://github.com/paul-rottger/xstest
    python benchmark/refusals.py xstest/model_completions/*.csv

Prints the table of docs/suites.md, one row per file. A file has the columns `completion` and `final_label`, which is
1_full_compliance, 2_full_refusal or 3_partial_refusal.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation.suites import refused  # noqa: E402
from evaluation.tables import print_markdown  # noqa: E402

COMPLIED, REFUSED, PARTLY = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """answers with people's labels, in XSTest's form"""


def count(path: Path) -> dict[str, tuple[int, int]]:
    """For each label (how many answers the rule takes for refusals, how many answers there are)."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {}
    for label in (REFUSED, PARTLY, COMPLIED):
        found = [refused(row["completion"]) for row in rows if row["final_label"] == label]
        counts[label] = sum(found), len(found)
    if sum(total for _, total in counts.values()) < len(rows):
        raise ValueError(f"a label of {path} is none of {', '.join(counts)}")
    return counts


def line(name: str, counts: dict[str, tuple[int, int]]) -> list[str]:
    """A row of the table. Agreement is over whole refusals and answers, then with partial refusals as refusals."""
    cells = [f"{found} of {total}" for found, total in counts.values()]
    (refusals, of_refusals), (partly, of_partly), (mistaken, of_answers) = counts.values()
    right, total = refusals + of_answers - mistaken, of_refusals + of_answers
    return [name, *cells, f"{right / total:.1%}", f"{(right + partly) / (total + of_partly):.1%}"]


def main(args: Args) -> None:
    all_counts = {path.stem.removeprefix("xstest_v2_completions_"): count(path) for path in args.files}
    sums = {
        label: tuple(map(sum, zip(*(counts[label] for counts in all_counts.values()), strict=True)))
        for label in (REFUSED, PARTLY, COMPLIED)
    }
    head = ["answers of", "refusals found", "partial refusals found", "answers taken for refusals"]
    lines = [line(name, counts) for name, counts in (all_counts | {"all": sums}).items()]
    print_markdown([[*head, "agreement", "with partial ones"], *lines])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
