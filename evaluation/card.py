"""`card`: a model card for the models of a run, README.md beside each, from args.json and summary.json alone.

python -m evaluation card runs/repo-1
hf upload YOUR_NAME/toy-repo runs/repo-1/model .
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import tyro

from evaluation.files import fail


@dataclass
class Card:
    """Write a model card for the Hub beside each model of a run."""

    run: tyro.conf.Positional[str]  # directory of a finished run of a training script


METHODS = {  # title, what it does, and papers by their ids on arXiv
    "repo": (
        "rectified policy optimization (RePO)",
        "The policy maximises the reward under a constraint on the rectified cost, E[{C - d}^+] ≤ 0, so slack on one "
        "prompt cannot offset a violation on another.",
        ["2410.19933", "2310.12773"],
    ),
    "ppo_lagrange": (
        "PPO-Lagrange",
        "The policy maximises the reward under a constraint on the mean cost, E[C] ≤ d.",
        ["2310.12773"],
    ),
    "sacpo": (
        "stepwise alignment (SACPO)",
        "The policy is aligned to helpfulness and to safety, one after the other, by DPO or KTO. A mixture has weights "
        "between those of both stages.",
        ["2404.11049"],
    ),
    "preference_models": (
        "a score model from preferences",
        "It reads a prompt and a response. Its number at the last token says how helpful the response is (a reward "
        "model), or how harmful, above zero unsafe (a cost model).",
        ["2310.12773"],
    ),
}
METHODS["repo_group"] = ("rectified policy optimization (RePO) without critics", *METHODS["repo"][1:])


def is_hub_id(name) -> bool:
    """Whether a name given for a model or a data set is a Hub id: a path that exists is a path."""
    return isinstance(name, str) and not os.path.exists(name) and name[:1] not in "./" and name.count("/") == 1


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(text).replace("|", "\\|") for text in line) + " |" for line in lines)


def results(summary: dict) -> str:
    """The figures of summary.json as a table: before and after, by stage, or of the held-out pairs."""
    columns = {key: summary[key] for key in ("before", "after", "eval") if key in summary}
    columns |= {f"after {stage['preference']}": stage["eval"] for stage in summary.get("stages", [])}
    rows = []
    for name in next(iter(columns.values()), {}):
        figures = [column[name] for column in columns.values()]
        rows.append([name.replace("_", " "), *("not finite" if x is None else f"{x:.4g}" for x in figures)])
    return table(["", *columns], rows)


def card_text(args: dict, summary: dict, algorithm: str, folder: Path) -> str:
    """The card: YAML for the Hub, then text for people. It names no licence: the run does not know it."""
    title, method, papers = METHODS[algorithm]
    task, head = "text-generation", "CausalLM"
    if algorithm == "preference_models":
        task, head = "text-classification", "SequenceClassification"
    named = [args[name] for name in args if name.endswith("dataset")]  # SACPO's are lists, of one per stage
    data = [name for each in named for name in (each if isinstance(each, list) else [each]) if is_hub_id(name)]
    card = huggingface_hub.ModelCardData(pipeline_tag=task, datasets=list(dict.fromkeys(data)) or None)
    card.base_model = args["model"] if is_hub_id(args["model"]) else None
    card.library_name, card.tags = "transformers", [algorithm.replace("_", "-"), "rlhf", "safe-rlhf", "safety"]
    made = {key: summary[key] for key in ("dtype", "processes", "device") if key in summary}
    made |= {"wall time": f"{summary.get('wall_seconds', 0):.0f} s"}
    made |= {f"rows of {key}": rows for key, rows in summary.get("data", {}).items()} | summary.get("versions", {})
    made |= {f"`--{name.replace('_', '-')}`": f"`{value}`" for name, value in args.items() if value is not None}
    return f"""---
{card.to_yaml()}
---

# {Path(args["model"]).name}: {title}

Made from `{args["model"]}` by `{algorithm}.py`; this is `{folder.name}` of the run. {method}

`AutoModelFor{head}` and `AutoTokenizer` load it. The response follows directly after the prompt in its template,
`{args["prompt_template"]}`.

## Results

On the held-out data of `--eval-dataset`.

{results(summary)}

## How it was made

{table(["", ""], list(map(list, made.items())))}

## Limits and licence

"Safe" means what the cost model says of a response or, without one, what the labels of the data say. Where these err,
this model has learnt the error. The results are the run's own. No licence is granted here: that of the base model
holds, and those of the data. Please cite {", ".join(f"[arXiv {id}](https://arxiv.org/abs/{id})" for id in papers)}.
"""


def write_cards(args: Card) -> None:
    """README.md in model/, and in stage1/, stage2/ and merged/q of SACPO."""
    run = Path(args.run)
    folders = [path.parent for pattern in ("*", "merged/*") for path in sorted(run.glob(f"{pattern}/config.json"))]
    try:
        settings, summary = (json.loads((run / name).read_text("utf-8")) for name in ("args.json", "summary.json"))
    except (OSError, ValueError) as exception:
        fail(f"{run} is not the directory of a finished run: {exception}")
    algorithm = "preference_models" if "kind" in settings else summary.get("algorithm")
    if algorithm not in METHODS or not folders:
        fail(f"{run} is not the directory of a finished run of {', '.join(METHODS)}")
    for folder in folders:
        (folder / "README.md").write_text(card_text(settings, summary, algorithm, folder), encoding="utf-8")
        print(f"written: {folder / 'README.md'}")
    print(f"Read it, then upload the model: hf upload YOUR_NAME/{run.name} {run / 'model'} .")
