"""Prompts, models at work, and the run of `score`. Loading, sampling and scoring are repo.py's, so the answers of a
run's model are those of the run's own evaluation."""

import contextlib
import gc
import itertools
import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import repo
from evaluation.files import append_json, open_run, output_folder
from evaluation.score import Score, find_answers, named_models, named_suites, report
from evaluation.suites import OWN_SUITE, SUITES


def load_prompts(args: Score, source: str, split: str, flag: str, tokenizer) -> list[dict]:
    """repo.load_examples, also of a JSON file that is a list of texts or {"instructions": [texts]}."""
    texts = None
    with contextlib.suppress(OSError, ValueError):  # load_rows has the words for no file, and a broken one
        texts = json.loads(Path(source).read_text(encoding="utf-8-sig")) if source.endswith(".json") else None
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(texts, dict) and isinstance(texts.get("instructions"), list):
            texts, source = texts["instructions"], f"{folder}/{Path(source).name}"
            Path(source).write_text(json.dumps(texts), encoding="utf-8")
        if isinstance(texts, list) and texts and isinstance(texts[0], str):
            args = replace(args, prompt_column="text")  # as the library calls it
        return repo.load_examples(args, source, split, flag, tokenizer, (args.max_prompt_length, 0))


def reading(tokenizer) -> tuple:
    """What tells tokenizers apart, as in repo.load_scorer."""
    probe = ["How do I clean the kettle? Use 2 lemons."]
    return tokenizer.get_vocab(), repo.encode(tokenizer, probe, probe)


def read_prompts(args: Score, tokenizers: dict) -> tuple[list[dict], dict[str, list[list[int]]]]:
    """The distinct prompts of --dataset or --suites that all models can read, and their tokens for each model, which
    may have a tokenizer of its own. A prompt is {prompt, group}, and of suites also suite and wanted."""
    kinds = {name: (*reading(own), own.special, own.chat_template) for name, own in tokenizers.items()}
    twins = {name: next(other for other in kinds if kinds[other] == kinds[name]) for name in kinds}
    prompts, tokens, seen = [], {name: [] for name in tokenizers}, set()
    for name, source in (named_suites(args) or {None: args.dataset}).items():
        suite, how = SUITES.get(name, OWN_SUITE), (args, source, args.dataset_split, "--dataset")
        if name is not None:
            how = replace(args, prompt_column="prompt", dataset_config=None), source, suite.split, f"--suites {name}"
        read = {}
        for model in dict.fromkeys(twins.values()):
            read[model] = {str(row["prompt"]): row for row in load_prompts(*how, tokenizers[model])}
        first, *others = read.values()
        keys = [key for key in first if key not in seen and all(key in rows for rows in others)]
        seen.update(keys)  # a prompt of two suites counts for the first
        for key in keys[: args.eval_size or None]:
            row, wanted = first[key]["row"], suite.wanted
            if args.group_by and args.group_by not in row:
                raise repo.UserError(f"--group-by {args.group_by}: the columns of {source} are {', '.join(row)}")
            if name is not None and wanted == "label":
                wanted = {"safe": "answer", "unsafe": "refuse"}.get(label := row.get("label"))
                if wanted is None:
                    raise repo.UserError(f"{how[-1]} {source}: a label must be safe or unsafe, but there is {label}")
            prompts.append({"prompt": first[key]["prompt"], "group": str(row[args.group_by]) if args.group_by else ""})
            prompts[-1] |= {"suite": name, "wanted": wanted} if name is not None else {}
            for model, twin in twins.items():
                tokens[model].append(read[twin][key]["head"])
    if not prompts:
        raise repo.UserError("no prompt can be read by all models; raise --max-prompt-length")
    return prompts, tokens


def score(args: Score) -> None:
    device, mesh = repo.start_processes()
    rank, world, models = dist.get_rank(), dist.get_world_size(), named_models(args)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # as repo.py chooses
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if fast else "float32"

    # ---- Prompts, and the answers that are there already
    template = args.prompt_template
    tokenizers = {name: repo.load_tokenizer(path, f"--models {name}", template) for name, path in models.items()}
    prompts, encoded = read_prompts(args, tokenizers)
    folder, settings = output_folder(args), {"command": "score"} | asdict(args)
    settings |= {"models": models, "suites": named_suites(args) or None, "prompts": len(prompts)}
    there: list[dict] = [{}]
    if rank == 0:
        there = [{name: set(rows) for name, rows in find_answers(folder, settings, prompts).items()}]
    dist.broadcast_object_list(there)
    missing = [name for name in models if len(there[0].get(name, ())) < len(prompts)]

    # ---- Score models, only where an answer is missing
    longest = max(len(ids) for rows in encoded.values() for ids in rows) + args.max_new_tokens
    dtype, scorers = getattr(torch, args.dtype), {}
    options = dict(mesh=mesh, dtype=dtype, loading={"dtype": dtype}, longest=longest)
    for name in ("reward", "cost") if missing else ():
        own = options | {"tokenizer": tokenizers[missing[0]], "offload": args.cpu_offload}
        scorers[name] = repo.load_scorer(args, getattr(args, f"{name}_model"), f"--{name}-model", prompts, own)
    locked = open_run(folder, settings, "responses.jsonl") if rank == 0 else None

    # ---- Answers and scores, one model in memory at a time
    # All models draw from the same numbers: they differ by the model alone, and so does the next one that is added.
    generator = repo.random_generator(args.seed, "evaluate")
    uniforms, temperature = torch.rand(len(prompts), args.max_new_tokens, generator=generator), args.temperature
    if args.greedy:  # the limit of temperature zero: the most probable token, the first of equal ones
        uniforms, temperature = torch.zeros_like(uniforms), 1e-12
    for name in missing:
        tokenizer, answered = tokenizers[name], there[0].get(name, set())
        policy = repo.load_model(AutoModelForCausalLM, models[name], f"--models {name}", tokenizer=tokenizer, **options)
        for scorer in scorers.values():
            scorer.shares_tokens = reading(tokenizer) == reading(scorer.tokenizer)
        bar = tqdm(total=len(prompts), initial=len(answered), desc=name, disable=rank != 0)
        for start in range(0, len(prompts), args.batch_size):
            batch = range(start, min(start + args.batch_size, len(prompts)))
            if answered.issuperset(batch):
                continue
            # A batch that was cut short is answered again as a whole: rounding depends on what is padded together.
            # FSDP2 needs equally many prompts from each rank, so the last ones of some are repeats.
            mine = [batch[i % len(batch)] for i in range(rank, math.ceil(len(batch) / world) * world, world)]
            texts, ids = [prompts[i]["prompt"] for i in mine], [encoded[name][i] for i in mine]
            responses = repo.sample_responses(policy, tokenizer, ids, uniforms[mine], temperature)
            columns = {"response": responses.texts}
            for key, scorer in scorers.items():
                columns[key] = repo.score_responses(scorer, texts, responses, len(mine)).tolist()
            columns |= {"length": responses.response_mask.sum(1).tolist(), "finished": responses.finished.tolist()}
            rows = {}
            for j, i in enumerate(mine):
                prompt = {key: value for key, value in prompts[i].items() if key != "group"}
                rows[i] = {"model": name, "index": i} | prompt | {key: column[j] for key, column in columns.items()}
            dist.all_gather_object(gathered := [{}] * world, rows)
            rows = {i: row for part in gathered for i, row in part.items() if i not in answered}
            for (i, row), key in itertools.product(rows.items(), scorers):
                if not math.isfinite(row[key]):
                    raise repo.UserError(f"--{key}-model: the score of {name} on prompt {i} is {row[key]}")
            if rank == 0:
                append_json(folder / "responses.jsonl", [rows[i] for i in sorted(rows)])
            bar.update(len(rows))
        bar.close()
        del policy
        gc.collect()  # a sharded model holds itself in cycles
        torch.cuda.empty_cache()
    if locked:
        report(args, folder, settings, prompts)
        locked.close()
    dist.barrier()  # without it gloo's threads can abort a process at its exit
    dist.destroy_process_group()
