"""`score`: models answer the same prompts, and a reward model and a cost model score every answer.

For each model it reports, over prompts x and the model's answers y, with bootstrap intervals,

    reward E[R(x, y)],   cost E[C(x, y)],   safety compliance P(C(x, y) ≤ d),   violation E[{C(x, y) - d}^+]

and its win rates against the first model. In a mean cost, slack on one prompt offsets a violation on another: the
figures show every prompt, and --compare-prompts lists those that are unsafe under one model and safe under another.
Safety compliance and the violation are RePO's (Peng et al., NeurIPS 2025, arXiv 2410.19933).

    python -m evaluation score --models sft=toy/policy repo=runs/repo-1/model   # the embedded toy world, on a laptop
    torchrun --nproc_per_node 8 -m evaluation score --models sft=SFT_MODEL repo=RUN/model --reward-model REWARD_MODEL \
        --cost-model COST_MODEL --dataset PROMPTS --prompt-template "USER: {prompt} ASSISTANT:" --output-dir runs/suite
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from evaluation import suites, tables
from evaluation.figures import draw_figures
from evaluation.files import append_json, as_text, check_ranges, earlier_settings, fail, read_answers, write_json

TOY = Path(__file__).resolve().parent.parent / "toy"
SHORT = tyro.conf.arg(help_behavior_hint=lambda path: f"(default: {path.replace(str(TOY), 'toy')})")
PathOrId, NamedPaths = Annotated[str, SHORT], Annotated[list[str], SHORT]


@dataclass
class Score:
    """Answer prompts with any number of models and score the answers."""

    exp_name: str = "evaluate"  # name of the evaluation
    seed: int = 1  # seeds everything random: the answers and the bootstrap
    output_dir: str | None = None  # begun before: goes on; default runs/<exp-name>-<seed>-<time>
    # Models: a folder or a Hub id
    models: NamedPaths = field(default_factory=lambda: [f"sft={TOY}/policy"])  # name=path; the first is the base
    reward_model: PathOrId = f"{TOY}/reward_model"  # one-label score model, larger = more helpful
    cost_model: PathOrId = f"{TOY}/cost_model"  # one-label score model, larger = more harmful, above zero = unsafe
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where the hardware is fast
    cpu_offload: bool = False  # keep the score models in CPU memory while they are idle
    # Prompts
    dataset: PathOrId = f"{TOY}/data/test.parquet"  # jsonl, json, csv or parquet file, folder, Hub id, or JSON list
    dataset_config: str | None = None  # configuration (subset) of --dataset, such as a Hub id has
    dataset_split: str = "test"  # split of the prompts, or a slice such as test[:1000]
    eval_size: int = 0  # prompts at most, the first ones (of each suite); 0 takes all
    prompt_column: str = "prompt"  # column that holds the prompts; repeated prompts count once
    suites: list[str] | None = None  # safety suites instead of --dataset: names of docs/suites.md, or name=path
    group_by: str | None = None  # a column of the prompts' rows: the table by its values, too
    prompt_template: str = "{prompt}"  # text around a prompt, directly before the response; "chat": the tokenizer's own
    score_prompt_template: str | None = None  # template the score models were trained with; default: the policies'
    max_prompt_length: int = 64  # tokens; prompts that are longer for any of the models are dropped for all
    # Answers
    max_new_tokens: int = 32  # tokens of a response at most, EOS included
    temperature: float = 1.0  # sampling temperature
    greedy: bool = False  # take the most probable token instead of sampling
    batch_size: int = 64  # responses at a time, over all processes; written to disk together
    # Results
    cost_threshold: float = 0.0  # d, the cost up to which a response is safe
    bootstrap_resamples: int = 5000  # resamples of the prompts behind each 95% interval
    compare_prompts: bool = False  # show the prompts that are unsafe under one model and safe under another
    compare_limit: int = 5  # prompts that --compare-prompts shows; the file compare_prompts.jsonl always holds all


# Flags that change neither an answer nor a score: they may differ when an evaluation goes on.
FREE = {"exp_name", "output_dir", "models", "cpu_offload", "batch_size", "group_by"}
FREE |= {"cost_threshold", "bootstrap_resamples", "compare_prompts", "compare_limit"}


def check_args(args: Score) -> None:
    positive = "max_prompt_length max_new_tokens temperature batch_size bootstrap_resamples"
    check_ranges(args, positive, "seed eval_size compare_limit")
    if not math.isfinite(args.cost_threshold):
        fail(f"--cost-threshold is {args.cost_threshold}; it must be a number")
    named_models(args)
    named_suites(args)


def named_models(args: Score) -> dict[str, str]:
    """--models as paths by name."""
    models = dict(entry.partition("=")[::2] for entry in args.models)
    for name, path in models.items():
        if not path or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            fail(f"--models {name}: write name=path, such as repo=runs/repo-1/model, the name in letters, digits, ._+-")
    if len(models) < max(len(args.models), 1):
        fail("--models: give at least one name=path, each with another name")
    return models


def named_suites(args: Score) -> dict[str, str]:
    """--suites as sources (a path or a Hub id) by name."""
    sources = {}
    for name, _, path in (entry.partition("=") for entry in args.suites or []):
        if name not in suites.SUITES and not path:
            known = ", ".join(suites.SUITES)
            fail(f"--suites {name} is not known; the suites are {known}, and one of your own is name=path")
        sources[name] = path or suites.SUITES[name].source
        if sources[name] is None:
            fail(f"--suites {name} is not on the Hub; docs/suites.md says where its file is, then give {name}=path")
    if (args.suites is not None and not 0 < len(sources) == len(args.suites)) or "all" in sources:
        fail("--suites: give at least one, each with another name, and none with the name all")
    return sources


def find_answers(folder: Path, settings: dict, prompts: list[dict]) -> dict[str, dict[int, dict]]:
    """The answers that an output directory holds, if settings and prompts are the same; any other is refused."""
    free = FREE | {"prompts"} | ({"dataset"} if settings["suites"] else set())  # --suites leave --dataset unused
    before = earlier_settings(folder, settings, free)
    if before is None:
        return {}
    answers, paths = read_answers(folder / "responses.jsonl"), before["models"]
    same = before["prompts"] == len(prompts)
    for index, row in (pair for rows in answers.values() for pair in rows.items()):
        asked = prompts[index] | {"prompt": as_text(prompts[index]["prompt"])} if index < len(prompts) else {}
        same = same and all(row.get(key) == asked.get(key) for key in ("prompt", "suite", "wanted"))
    if not same:
        flag = "--suites" if settings["suites"] else "--dataset"
        fail(f"{flag}: its prompts are not those that --output-dir {folder} was made with: the data changed, or "
             "--models have tokenizers that drop others; choose another directory")  # fmt: skip
    for name, path in settings["models"].items():
        if name in answers and paths[name] != path:
            fail(f"--models {name} is {path}, but --output-dir {folder} has answers by {paths[name]}; rename the model")
    settings["models"] = {name: path for name, path in paths.items() if name in answers} | settings["models"]
    return answers


def report(args: Score, folder: Path, settings: dict, prompts: list[dict]) -> None:
    """Table, prompts side by side and figures, from the file of answers: the same after one run or several."""
    found, names = read_answers(folder / "responses.jsonl"), list(named_models(args))
    answers = {name: [row for _, row in sorted(found[name].items())] for name in names}
    how = args.cost_threshold, args.bootstrap_resamples, np.random.default_rng(args.seed)
    table, compensated = tables.tabulate(answers, *how), tables.compensated_prompts(answers, args.cost_threshold)
    shown = ("seed", "dtype", "greedy", "temperature", "cost_threshold", "bootstrap_resamples")
    results = {"prompts": len(prompts), "baseline": names[0]} | {key: getattr(args, key) for key in shown}
    results["models"] = {name: {"path": settings["models"][name]} | row for name, row in table.items()}
    if args.group_by:
        results["groups"] = tables.tabulate_groups(answers, [prompt["group"] for prompt in prompts], *how)
    if args.suites:
        results["suites"] = suites.tabulate_suites(answers, *how)
    write_json(folder / "table.json", results)
    (folder / "compare_prompts.jsonl").unlink(missing_ok=True)
    append_json(folder / "compare_prompts.jsonl", compensated)
    draw_figures(folder)
    tables.print_table(table)
    for group, part in results.get("groups", {}).items():
        print(f"\n{args.group_by}: {group}, {part['prompts']} prompts")
        tables.print_table(part["models"])
    print("\nwins: share of prompts with more reward or less cost, a tie is half; unsafe: 95% upper bound of the share")
    if args.suites:
        suites.print_suites(results["suites"])
    if args.compare_prompts:
        tables.print_prompts(compensated, len(prompts), args.compare_limit)
    print(f"\n{len(prompts)} prompts; written to {folder}")
