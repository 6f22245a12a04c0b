"""Prompts, models at work, and the run of `score`. Loading, sampling and scoring are repo.py's, so the answers of a
run's model are those of the run's own evaluation."""

import contextlib
import gc
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import repo
from evaluation.files import append_json, open_run, output_folder
from evaluation.score import Score, find_answers, named_models, named_suites, report
from evaluation.suites import OWN_SUITE, SUITES


def load_prompts(source: str, split: str, column: str, flag: str) -> datasets.Dataset:
    """Rows of a data set, or of a JSON file that is a list of texts or {"instructions": [texts]}."""
    texts = None
    if source.endswith(".json") and Path(source).is_file():
        with contextlib.suppress(ValueError):  # load_rows has the words for a broken file
            texts = json.loads(Path(source).read_text(encoding="utf-8-sig"))
    texts = texts.get("instructions") if isinstance(texts, dict) else texts
    if not texts or isinstance(texts[0], dict):
        return repo.load_rows(source, split, flag)
    if "[" in split:
        raise repo.UserError(f"{flag} {source}: a list of texts has no split '{split}'; take --eval-size instead")
    return datasets.Dataset.from_list([{column: text} for text in texts])


def read_prompts(args: Score) -> list[dict]:
    """The distinct prompts of --dataset or --suites: prompt and group, and of suites also suite and wanted."""
    found: dict[str, dict] = {}
    for name, source in (named_suites(args) or {None: args.dataset}).items():
        suite = SUITES.get(name, OWN_SUITE)
        split, column, flag = suite.split, "prompt", f"--suites {name}"
        if name is None:
            split, column, flag = args.dataset_split, args.prompt_column, "--dataset"
        rows = load_prompts(source, split, column, flag)
        texts = repo.read_column(rows, column, f"{flag} {source}")
        if args.group_by and args.group_by not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise repo.UserError(f"--group-by {args.group_by}: the columns of {source} are {columns}")
        groups = map(str, rows[args.group_by]) if args.group_by else itertools.repeat("", len(texts))
        wanted = [suite.wanted] * len(texts)
        if name is not None and suite.wanted == "label":
            labels = repo.read_column(rows, "label", f"{flag} {source}")
            if wrong := set(labels) - {"safe", "unsafe"}:
                raise repo.UserError(f"{flag} {source}: a label must be safe or unsafe, but there is {min(wrong)}")
            wanted = ["answer" if label == "safe" else "refuse" for label in labels]
        for text, group, want in zip(texts, groups, wanted, strict=True):
            row = {"prompt": text, "group": group} | ({"suite": name, "wanted": want} if name is not None else {})
            found.setdefault(text, row)  # a prompt of two suites counts for the first
    return list(found.values())


def choose_prompts(args: Score, tokenizers: dict) -> tuple[list[dict], dict[str, list[list[int]]]]:
    """The prompts that all models answer, and their token ids for each model, which may have a tokenizer of its own."""
    prompts, limit = read_prompts(args), args.max_prompt_length
    texts = [prompt["prompt"] for prompt in prompts]
    encoded = {name: repo.encode(own, args.prompt_template, texts) for name, own in tokenizers.items()}
    fits = [all(0 < len(ids) <= limit for ids in row) for row in zip(*encoded.values(), strict=True)]
    if not any(fits):
        raise repo.UserError(f"all prompts are over --max-prompt-length {limit}")
    if not all(fits):
        repo.say(f"dropped {fits.count(False)} of {len(fits)} prompts, over --max-prompt-length {limit} for a model")
    suites = itertools.groupby(itertools.compress(range(len(prompts)), fits), lambda i: prompts[i].get("suite"))
    chosen = [i for _, places in suites for i in list(places)[: args.eval_size or None]]
    return [prompts[i] for i in chosen], {name: [ids[i] for i in chosen] for name, ids in encoded.items()}


def score(args: Score) -> None:
    device, mesh = repo.start_processes()
    rank, world, models = dist.get_rank(), dist.get_world_size(), named_models(args)
    if args.dtype == "auto":  # as repo.py chooses
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device.type == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        args.dtype = "bfloat16" if fast else "float32"

    # ---- Prompts, and the answers that are there already
    tokenizers = {name: repo.load_tokenizer(path, f"--models {name}") for name, path in models.items()}
    prompts, encoded = choose_prompts(args, tokenizers)
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
        place = getattr(args, f"{name}_model"), f"--{name}-model", tokenizers[missing[0]]
        scorers[name] = repo.load_scorer(args, *place, options | {"cpu_offload": args.cpu_offload})
    locked = open_run(folder, settings, "responses.jsonl") if rank == 0 else None

    # ---- Answers and scores, one model in memory at a time
    # All models draw from the same numbers: they differ by the model alone, and so does the next one that is added.
    generator = repo.random_generator(args.seed, "evaluate")
    uniforms, temperature = torch.rand(len(prompts), args.max_new_tokens, generator=generator), args.temperature
    if args.greedy:  # the limit of temperature zero: the most probable token, the first of equal ones
        uniforms, temperature = torch.zeros_like(uniforms), 1e-12
    probe = ["How do I clean the kettle? Use 2 lemons."]
    for name in missing:
        tokenizer, answered = tokenizers[name], there[0].get(name, set())
        policy = repo.load_model(AutoModelForCausalLM, models[name], f"--models {name}", **options)
        for scorer in scorers.values():
            same = repo.encode(tokenizer, args.prompt_template, probe)
            same = same == repo.encode(scorer.tokenizer, scorer.template, probe)
            scorer.shares_tokens = same and tokenizer.get_vocab() == scorer.tokenizer.get_vocab()
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
