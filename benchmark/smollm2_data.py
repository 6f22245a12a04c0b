"""The data of benchmark/smollm2.sh: pairs for a reward model and for two cost models, and prompts of two kinds.

    python benchmark/smollm2_data.py runs/smollm2-1/data                                             # from the Hub
    python benchmark/smollm2_data.py runs/smollm2-1/data --safety DATA/safety --helpful DATA/helpful   # local folders

Safety pairs (default PKU-Alignment/PKU-SafeRLHF, CC-BY-NC-4.0) are those with exactly one safe response. Half of their
training prompts go to the cost model that the policies are trained with, half to a judge that no policy sees.
Helpfulness pairs (default HuggingFaceH4/ultrafeedback_binarized, MIT, labelled by GPT-4) are those with one question
and short texts. The prompts of the first are `red-team`, those of the second `benign`. A prompt that is held out is in
no file for training, whatever its capitals and spaces.

Writes cost, judge, reward, cost_test, reward_test, prompts_train, prompts_test, xstest and alpaca (.jsonl), and
summary.json. The rows of xstest and alpaca are in random order, so that the first ones are a sample. cost_noisy has the
pairs of cost with a share of their labels flipped.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import repo  # noqa: E402
from evaluation.files import fail, write_json  # noqa: E402

SAFETY, HELPFUL = "PKU-Alignment/PKU-SafeRLHF", "HuggingFaceH4/ultrafeedback_binarized"
LABELS = ("is_response_0_safe", "is_response_1_safe")


@dataclass
class Args:
    """Write the files of pairs and prompts for benchmark/smollm2.sh."""

    output_dir: Annotated[str, tyro.conf.Positional]  # folder for the files; nothing happens if it is complete
    seed: int = 1  # seeds the choice of prompts and their halves
    safety: str = SAFETY  # pairs with safer_response_id and is_response_{0,1}_safe, splits train and test
    helpful: str = HELPFUL  # pairs by helpfulness, in a form of docs/data.md, splits train and test
    prompts: str | None = None  # prompts with a column `kind`, splits train and test; default: those of the pairs
    xstest: str = "Paul/XSTest"  # prompts with a column `label`, safe or unsafe
    alpaca: str = "tatsu-lab/alpaca"  # harmless instructions: Hub id, or a file {"instructions": [texts]}
    train_pairs: int = 3200  # pairs for training at most, of each set; whole prompts
    test_pairs: int = 450  # held-out pairs at most, of each set
    max_words: int = 250  # words of a prompt or a response; pairs with longer ones are left out
    noise: float = 0.1  # share of the labels of cost_noisy that are flipped


def key(seed: int, prompt: str) -> bytes:
    """A random place for each prompt that does not depend on the others."""
    return hashlib.sha256(f"{seed} {prompt}".encode()).digest()


def responses_of(row: dict) -> list[str]:
    """The two responses of a pair, the better one first where a column says it; fewer if one is missing."""
    if "chosen" in row:
        dialogues = [repo.as_messages(row[name], "assistant") for name in ("chosen", "rejected")]
        return [turns[-1]["content"] for turns in dialogues if turns and turns[-1]["role"] == "assistant"]
    texts = [row["response_0"], row["response_1"]]
    return texts if row.get("better_response_id", 0) == 0 else texts[::-1]


def prompt_of(row: dict) -> str | None:
    """The prompt, if it is a single message."""
    turns = repo.as_messages(row.get("prompt") or row.get("chosen"), "user")
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else None


def choose_pairs(args: Args, flag: str, split: str) -> list[dict]:
    """Pairs with short texts, of whole prompts in the order of their keys, up to a number of pairs."""
    name, limit = getattr(args, flag[2:]), args.train_pairs if split == "train" else args.test_pairs
    rows, form, files = repo.load_rows(name, None, f"{split}_prefs" if name == HELPFUL else split, flag)
    if form not in ("PKU-SafeRLHF", "preference"):
        raise repo.UserError(f"{flag} {name}: {files} holds {form} data, no pairs")
    if flag == "--safety":
        if not {"prompt", *LABELS, "safer_response_id"} <= rows[0].keys():
            raise repo.UserError(f"{flag} {name}: it has no columns prompt, safer_response_id, {', '.join(LABELS)}")
        rows = [row for row in rows if row[LABELS[0]] != row[LABELS[1]]]
    by_prompt = {}
    for row in rows:
        prompt, responses = prompt_of(row), responses_of(row)
        tied = "score_chosen" in row and row["score_chosen"] == row["score_rejected"]
        texts = [prompt or "", *responses]
        if all(texts) and len(texts) == 3 and not tied and max(len(t.split()) for t in texts) <= args.max_words:
            by_prompt.setdefault(prompt, []).append(row | {"prompt": prompt})
    chosen = []
    for prompt in sorted(by_prompt, key=lambda prompt: key(args.seed, prompt)):
        if len(chosen) + len(by_prompt[prompt]) <= limit:
            chosen += by_prompt[prompt]
    if not chosen:
        raise repo.UserError(f"{flag} {name}: no pair of {files} fits; raise --max-words or look at the labels")
    return chosen


def choose_prompts(args: Args, pairs: dict[str, list[dict]], split: str) -> list[dict]:
    """Distinct prompts with their kind; one of both kinds is red-team."""
    if args.prompts:
        rows = repo.load_rows(args.prompts, None, split, "--prompts")[0]
        if not {"prompt", "kind"} <= rows[0].keys():
            raise repo.UserError(f"--prompts {args.prompts}: it has no columns prompt and kind")
    else:
        kinds = {"red-team": pairs["safety" if split == "train" else "cost_test"]}
        kinds["benign"] = pairs["reward" if split == "train" else "reward_test"]
        rows = [{"prompt": row["prompt"], "kind": kind} for kind, found in kinds.items() for row in found]
    distinct = {}
    for row in rows:
        distinct.setdefault(row["prompt"], {"prompt": row["prompt"], "kind": row["kind"]})
    return list(distinct.values())


def suite(args: Args, name: str) -> list[dict]:
    """Prompts with a label, in random order; of Alpaca the first hundred instructions without an input."""
    flag, source = f"--{name}", getattr(args, name)
    if name == "alpaca" and source.endswith(".json"):
        rows = [{"instruction": text} for text in json.loads(Path(source).read_text(encoding="utf-8"))["instructions"]]
    else:
        rows = repo.load_rows(source, None, "train", flag)[0]
    needed = {"instruction"} if name == "alpaca" else {"prompt", "label"}
    if not needed <= rows[0].keys():
        raise repo.UserError(f"{flag} {source}: it has no columns {', '.join(sorted(needed))}")
    if name == "alpaca":
        rows = [{"prompt": row["instruction"], "label": "safe"} for row in rows if not row.get("input")][:100]
    rows = [{"prompt": row["prompt"], "label": row["label"]} for row in rows]
    return sorted(rows, key=lambda row: key(args.seed, row["prompt"]))


def flip_labels(args: Args, rows: list[dict]) -> list[dict]:
    """Pairs with a share of their labels flipped: the safety of each response by itself, and which one is safer."""
    columns = (*LABELS, "safer_response_id")
    flipped = np.random.default_rng(args.seed).random((len(rows), len(columns))) < args.noise
    return [
        row | {name: type(row[name])(not row[name]) for name, flip in zip(columns, flips, strict=True) if flip}
        for row, flips in zip(rows, flipped, strict=True)
    ]


def contradictory(rows: list[dict]) -> float:
    """Share of the distinct responses that are called safe in one pair and unsafe in another."""
    labels = {}
    for row in rows:
        for i in (0, 1):
            labels.setdefault((row["prompt"], row[f"response_{i}"]), set()).add(row[LABELS[i]])
    return sum(len(found) > 1 for found in labels.values()) / len(labels)


def longer_wins(rows: list[dict]) -> float:
    """Share of the pairs in which the longer response is the better one; equal lengths count half."""
    lengths = [[len(text) for text in responses_of(row)] for row in rows]
    return sum(0.5 if better == worse else better > worse for better, worse in lengths) / len(lengths)


def main(args: Args) -> None:
    """Raises repo.UserError for data that do not fit, and for a folder made with other settings."""
    folder, settings = Path(args.output_dir), asdict(args)
    del settings["output_dir"]
    if (folder / "summary.json").exists():
        before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["settings"]
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise repo.UserError(f"{folder} was made with another --{changed[0]}; choose another folder or remove it")
        print(f"{folder} exists already")
        return
    found = {"safety": choose_pairs(args, "--safety", "train"), "cost_test": choose_pairs(args, "--safety", "test")}
    found |= {
        "reward": choose_pairs(args, "--helpful", "train"),
        "reward_test": choose_pairs(args, "--helpful", "test"),
    }
    found |= {f"prompts_{split}": choose_prompts(args, found, split) for split in ("train", "test")}
    spelling = {name: [" ".join(row["prompt"].lower().split()) for row in rows] for name, rows in found.items()}
    held_out = {prompt for name in ("cost_test", "reward_test", "prompts_test") for prompt in spelling[name]}
    removed = 0
    for name in ("safety", "reward", "prompts_train"):
        kept = [row for row, prompt in zip(found[name], spelling[name], strict=True) if prompt not in held_out]
        removed, found[name] = removed + len(found[name]) - len(kept), kept
    safety = found.pop("safety")
    for half, name in enumerate(("cost", "judge")):  # another byte of the key than the first, which orders the prompts
        found[name] = [row for row in safety if key(args.seed, row["prompt"])[-1] % 2 == half]
    found["cost_noisy"] = flip_labels(args, found["cost"])
    found |= {name: suite(args, name) for name in ("xstest", "alpaca")}

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    summary = {"settings": settings, "rows": {name: len(rows) for name, rows in found.items()}}
    summary["prompts"] = {name: len({row["prompt"] for row in rows}) for name, rows in found.items()}
    for part in ("train", "test"):
        kinds = [row["kind"] for row in found[f"prompts_{part}"]]
        summary[f"kinds_{part}"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    summary |= {"removed_as_held_out": removed, "contradictory_labels": contradictory(safety)}
    summary["longer_wins"] = longer_wins(found["reward_test"])
    write_json(folder / "summary.json", summary)  # last: its presence says that the other files are whole
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except repo.UserError as error:
        fail(str(error))
