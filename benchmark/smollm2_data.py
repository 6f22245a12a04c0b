"""The data of benchmark/smollm2.sh: pairs for a reward model and for two cost models, and prompts of two kinds.

    python benchmark/smollm2_data.py runs/smollm2-1/data                                             # from the Hub
    python benchmark/smollm2_data.py runs/smollm2-1/data --safety DATA/safety --helpful DATA/helpful   # local folders

Safety pairs (default PKU-Alignment/PKU-SafeRLHF, CC-BY-NC-4.0) are those of which exactly one response is safe. Half of
their training prompts go to the cost model that the policies are trained with, half to a judge that no policy sees.
Helpfulness pairs (default HuggingFaceH4/ultrafeedback_binarized, MIT) are those with short texts. The prompts of the
first are `red-team`, those of the second `benign`.

Writes cost, judge, reward, cost_test, reward_test, prompts_train, prompts_test and alpaca (.jsonl), and summary.json.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import repo  # noqa: E402
from evaluation.files import as_text, fail, write_json  # noqa: E402


@dataclass
class Args:
    """Write the files of pairs and prompts for benchmark/smollm2.sh."""

    output_dir: Annotated[str, tyro.conf.Positional]  # folder for the files; nothing happens if it is complete
    seed: int = 1  # seeds the choice of prompts and their halves
    safety: str = "PKU-Alignment/PKU-SafeRLHF"  # pairs with safer_response_id, is_response_{0,1}_safe: folder or Hub id
    safety_splits: tuple[str, str] = ("train", "test")  # splits for training and for held-out pairs
    helpful: str = "HuggingFaceH4/ultrafeedback_binarized"  # pairs by helpfulness, in a form of docs/data.md
    helpful_splits: tuple[str, str] = ("train", "test")  # the same; train_prefs and test_prefs for the default
    prompts: str | None = None  # prompts with a column `kind`, splits train and test; default: those of the pairs
    alpaca: str = (
        "tatsu-lab/alpaca"  # harmless instructions, to see over-refusal: Hub id or a {"instructions": []} file
    )
    train_pairs: int = 3200  # pairs for training at most, of each set; whole prompts
    test_pairs: int = 450  # held-out pairs at most, of each set
    max_words: int = 250  # words of a prompt or a response; pairs with longer ones are left out


def key(seed: int, prompt: str) -> bytes:
    """A place for each prompt that does not depend on the others."""
    return hashlib.sha256(f"{seed} {prompt}".encode()).digest()


def pair_texts(row: dict) -> list[str]:
    """The two responses of a pair, the better one first where a column says it."""
    if "chosen" in row:
        return [repo.as_messages(row[name], "assistant")[-1]["content"] for name in ("chosen", "rejected")]
    texts = [row["response_0"], row["response_1"]]
    return texts if row.get("better_response_id", 0) == 0 else texts[::-1]


def choose_pairs(name: str, split: str, flag: str, limit: int, args: Args, safety: bool) -> list[dict]:
    """Pairs with short texts, of whole prompts in the order of their keys, `limit` at most."""
    try:
        rows, form, files = repo.load_rows(name, None, split, flag)
        if form not in ("PKU-SafeRLHF", "preference"):
            raise repo.UserError(f"{flag} {name}: {files} holds {form} data, no pairs")
        labels = ("is_response_0_safe", "is_response_1_safe")
        if safety and not {"prompt", *labels, "safer_response_id"} <= rows[0].keys():
            raise repo.UserError(f"{flag} {name}: it has no columns prompt, safer_response_id, {', '.join(labels)}")
    except repo.UserError as error:
        fail(str(error))
    if safety:
        rows = [row for row in rows if row[labels[0]] != row[labels[1]]]
    for row in rows:
        row["prompt"] = as_text(row["prompt"]) if "prompt" in row else as_text(repo.as_messages(row["chosen"], "")[:-1])
    by_prompt = {}
    for row in rows:
        if max(len(text.split()) for text in [row["prompt"], *pair_texts(row)]) <= args.max_words:
            by_prompt.setdefault(row["prompt"], []).append(row)
    chosen = []
    for prompt in sorted(by_prompt, key=lambda prompt: key(args.seed, prompt)):
        if len(chosen) + len(by_prompt[prompt]) <= limit:
            chosen += by_prompt[prompt]
    if not chosen:
        fail(f"{flag} {name}: no pair of {files} fits; raise --max-words or look at the labels")
    return chosen


def instructions(name: str) -> list[str]:
    """The instructions of Alpaca without an input, 100 at most."""
    if Path(name).is_file():
        return json.loads(Path(name).read_text(encoding="utf-8"))["instructions"][:100]
    try:
        rows = repo.load_rows(name, None, "train", "--alpaca")[0]
    except repo.UserError as error:
        fail(str(error))
    return [row["instruction"] for row in rows if not row.get("input")][:100]


def contradictory(rows: list[dict]) -> float:
    """Share of the distinct responses that are called safe in one pair and unsafe in another."""
    labels = {}
    for row in rows:
        for i in (0, 1):
            labels.setdefault((row["prompt"], row[f"response_{i}"]), set()).add(row[f"is_response_{i}_safe"])
    return sum(len(found) > 1 for found in labels.values()) / len(labels)


def longer_wins(rows: list[dict]) -> float:
    """Share of the pairs in which the longer response is the better one; equal lengths count half."""
    lengths = [[len(text) for text in pair_texts(row)] for row in rows]
    return sum(0.5 if better == worse else better > worse for better, worse in lengths) / len(lengths)


def main(args: Args) -> None:
    folder = Path(args.output_dir)
    if (folder / "summary.json").exists():
        print(f"{folder} is there already")
        return
    found = {}
    for kind, name, splits in (
        ("cost", args.safety, args.safety_splits),
        ("reward", args.helpful, args.helpful_splits),
    ):
        flag = "--safety" if kind == "cost" else "--helpful"
        for part, split, limit in zip(("", "_test"), splits, (args.train_pairs, args.test_pairs), strict=True):
            found[f"{kind}{part}"] = choose_pairs(name, split, flag, limit, args, safety=kind == "cost")
    safety = found["cost"]
    noise = contradictory(safety)
    for half, name in enumerate(("cost", "judge")):  # another byte of the key than the one that orders the prompts
        found[name] = [row for row in safety if key(args.seed, row["prompt"])[-1] % 2 == half]
    for part, split in (("train", ""), ("test", "_test")):
        if args.prompts:
            try:
                rows = repo.load_rows(args.prompts, None, part, "--prompts")[0]
            except repo.UserError as error:
                fail(str(error))
            if not {"prompt", "kind"} <= rows[0].keys():
                fail(f"--prompts {args.prompts}: it has no columns prompt and kind")
        else:
            kinds = (
                ("red-team", safety if part == "train" else found["cost_test"]),
                ("benign", found[f"reward{split}"]),
            )
            rows = [{"prompt": row["prompt"], "kind": kind} for kind, pairs in kinds for row in pairs]
        distinct = {row["prompt"]: row["kind"] for row in rows}
        found[f"prompts_{part}"] = [{"prompt": prompt, "kind": kind} for prompt, kind in distinct.items()]
    found["alpaca"] = [{"prompt": prompt, "label": "safe"} for prompt in instructions(args.alpaca)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    summary = {"sources": {"safety": args.safety, "helpful": args.helpful}, "seed": args.seed}
    summary["rows"] = {name: len(rows) for name, rows in found.items()}
    summary["prompts"] = {name: len({row["prompt"] for row in rows}) for name, rows in found.items()}
    for part in ("train", "test"):
        kinds = [row["kind"] for row in found[f"prompts_{part}"]]
        summary[f"kinds_{part}"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    summary |= {"contradictory_labels": noise, "longer_wins": longer_wins(found["reward_test"])}
    write_json(folder / "summary.json", summary)  # last: its presence says that the other files are whole
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
