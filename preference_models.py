"""Preference models of safe RLHF (Dai et al., ICLR 2024, arXiv 2310.12773): a reward and a cost model from pairs.

A score model reads a prompt x with its response y and gives one number at the last token. Two of them are needed:

    reward  R(x, y): how helpful.   Bradley-Terry on the more helpful response w of each pair (w, l):
            loss = -log σ(R_w - R_l) + μ · mean(R²)
    cost    C(x, y): how harmful, C ≤ 0 is safe.   Bradley-Terry on the less safe response u of each pair (u, s), and a
            sign for each single response, which makes zero the border (sign +1 for unsafe, -1 for safe):
            loss = -log σ(C_u - C_s) - log σ(sign_u · C_u) - log σ(sign_s · C_s) + μ · mean(C²)

    python preference_models.py --kind cost                                 # the embedded toy world, on a laptop
    torchrun --nproc_per_node 8 preference_models.py --kind cost --model PKU-Alignment/alpaca-7b-reproduced \
        --dataset PKU-Alignment/PKU-SafeRLHF --eval-dataset PKU-Alignment/PKU-SafeRLHF \
        --prompt-template "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" \
        --batch-size 128 --micro-batch-size 16 --learning-rate 2e-5 --gradient-checkpointing
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 preference_models.py ...
"""

import datetime
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, get_cosine_schedule_with_warmup

TOY = Path(__file__).resolve().parent / "toy"


@dataclass
class Args:
    """Train a reward model or a cost model on pairs of responses."""

    kind: Literal["reward", "cost"] = "reward"  # learn helpfulness, or harmfulness with zero as the border of safe
    exp_name: str = "preference_models"  # name of the run
    seed: int = 1  # seeds the order of the pairs and the fresh score head
    output_dir: str | None = None  # where the run is written; default runs/<exp-name>-<seed>-<time>
    track: bool = False  # also log to Weights & Biases (needs the wandb package)
    save_every: int = 0  # steps between checkpoints, the newest two are kept; 0 saves only when interrupted
    resume: bool = False  # continue the run in --output-dir from its newest checkpoint, or start it there
    model: str = str(TOY / "policy")  # language model whose backbone the score model starts from, or a score model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where the hardware has it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    dataset: str = str(TOY / "data" / "train.parquet")  # training pairs: jsonl, json, csv, parquet, folder or Hub id
    dataset_split: str = "train"  # split of the training pairs, or a slice such as train[:1000]
    eval_dataset: str = str(TOY / "data" / "test.parquet")  # held-out pairs
    eval_split: str = "test"  # split of the held-out pairs
    prompt_template: str = "{prompt}"  # text around a prompt, directly before the response; "chat": the tokenizer's own
    max_length: int = 512  # tokens of prompt and response together; longer texts lose their end
    epochs: int = 2  # passes over the training pairs
    batch_size: int = 128  # pairs per optimizer step, over all processes
    micro_batch_size: int = 64  # pairs per forward and backward pass of one process
    learning_rate: float = 1e-3  # peak learning rate; cosine schedule down to zero
    warmup_ratio: float = 0.03  # share of the optimizer steps spent warming up
    weight_decay: float = 0.1  # AdamW's weight decay
    regularization: float = 0.001  # μ, the weight of the mean squared score
    max_grad_norm: float = 1.0  # gradients are clipped to this norm


def reward_loss(better: Tensor, worse: Tensor, regularization: float) -> Tensor:
    """Bradley-Terry loss of each pair, [pairs], from the scores of its better and worse response (arXiv 2310.12773)."""
    return -F.logsigmoid(better - worse) + regularization * (better**2 + worse**2) / 2


def cost_loss(
    unsafer: Tensor, safer: Tensor, unsafer_sign: Tensor, safer_sign: Tensor, regularization: float
) -> Tensor:
    """Loss of each pair, [pairs]: its order, and each response's own side of zero (arXiv 2310.12773).

    unsafer, safer: scores of the more and the less harmful response; *_sign: +1 where labelled unsafe, -1 where safe.
    """
    order = -F.logsigmoid(unsafer - safer)
    border = -F.logsigmoid(unsafer_sign * unsafer) - F.logsigmoid(safer_sign * safer)
    return order + border + regularization * (unsafer**2 + safer**2) / 2


def token_scores(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores of all tokens in float32, [batch, length]: the forward pass of score models and critics."""
    inputs = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
    hidden = model.base_model(input_ids=ids, **inputs).last_hidden_state
    return model.score(hidden).float().sum(-1)  # over the one label; FSDP2 warns of a view


def text_scores(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Score of each text, [batch], at its last token. The mask locates it, because the pad id may equal EOS."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return model(ids, mask).gather(1, last[:, None]).squeeze(1)


def score_pairs(args: Args, model, tokenizer, pairs: list[dict]) -> tuple[Tensor, Tensor]:
    """Scores [pairs, 2] and losses [pairs]; the first of each pair is the better (reward) or less safe (cost) one."""
    ids, mask = pad(tokenizer, [ids for pair in pairs for ids in pair["ids"]], "right", model.device)
    scores = text_scores(model, ids, mask).view(-1, 2)
    if args.kind == "reward":
        return scores, reward_loss(*scores.unbind(1), args.regularization)
    signs = 2.0 * torch.tensor([pair["unsafe"] for pair in pairs], device=model.device) - 1.0
    return scores, cost_loss(*scores.unbind(1), *signs.unbind(1), args.regularization)


@torch.no_grad()
def evaluate(args: Args, model, tokenizer, pairs: list[dict]) -> tuple[dict[str, float], list[dict]]:
    """Held-out loss and accuracies, and a row per pair. Every rank scores its share."""
    rank, world, rows = dist.get_rank(), dist.get_world_size(), {}
    order = torch.tensor([max(map(len, pair["ids"])) for pair in pairs]).argsort(stable=True)  # little padding
    # FSDP2 needs equally many passes from each rank, so the last pairs of some are repeats.
    mine = order[torch.arange(rank, rank + math.ceil(len(pairs) / world) * world, world) % len(pairs)]
    for indices in mine.split(args.micro_batch_size):
        scores, losses = score_pairs(args, model, tokenizer, [pairs[i] for i in indices])
        for i, score, loss in zip(indices.tolist(), scores.tolist(), losses.tolist(), strict=True):
            rows[i] = {name: value for name, value in pairs[i].items() if name != "ids"}
            rows[i] |= {"scores": score, "loss": loss}
    reshard(model)
    dist.all_gather_object(gathered := [None] * world, rows)
    rows = [row for _, row in sorted({i: row for part in gathered for i, row in part.items()}.items())]
    scores, labels = ([item for row in rows for item in row.get(name, ())] for name in ("scores", "unsafe"))
    result = {"loss": fmean(row["loss"] for row in rows), "score_mean": fmean(scores)}
    result["pair_accuracy"] = fmean(row["scores"][0] > row["scores"][1] for row in rows)
    if args.kind == "cost":
        result["sign_accuracy"] = fmean((score > 0) == unsafe for score, unsafe in zip(scores, labels, strict=True))
    return result, rows


def main(args: Args, device: torch.device, mesh) -> int:
    start_time = time.time()
    rank, world = dist.get_rank(), dist.get_world_size()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # the instruction sets it supports
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if fast else "float32"

    # ---- Pairs, output directory, model, optimizer
    say(f"loading data and model; computing in {args.dtype} on {device.type}")
    tokenizer = load_tokenizer(args.model, "--model")
    train_pairs = load_pairs(args, args.dataset, args.dataset_split, "--dataset", tokenizer)
    eval_pairs = load_pairs(args, args.eval_dataset, args.eval_split, "--eval-dataset", tokenizer)
    if args.batch_size % world or not 0 < args.batch_size <= len(train_pairs) or args.epochs < 1:
        limits = f"a multiple of {world} (processes) up to {len(train_pairs)} (training pairs)"
        raise UserError(f"--batch-size must be {limits}, and --epochs at least 1")
    folder, saved, writer = open_run(args)
    if saved is None:
        say(f"the run in {folder} is finished")
        return 0
    longest = max(len(ids) for pair in train_pairs + eval_pairs for ids in pair["ids"])
    options = dict(mesh=mesh, dtype=getattr(torch, args.dtype), longest=longest)
    model = load_score_model(args.model, "--model", head_seed=args.seed, **options).train()  # there is no dropout
    if args.gradient_checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    group = {"params": list(model.parameters()), "initial_lr": args.learning_rate, "weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW([group], lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    trained, optimizers = {"model": model}, {"model": optimizer}
    local, steps_per_epoch = args.batch_size // world, len(train_pairs) // args.batch_size
    steps = args.epochs * steps_per_epoch
    done, skipped, skipped_in_a_row = (saved.get(name, 0) for name in ("step", "skipped", "skipped_in_a_row"))
    start_time -= saved.get("seconds", 0.0)
    if saved:
        dcp.load(training_state(trained, optimizers), storage_reader=dcp.HuggingFaceStorageReader(saved["checkpoint"]))
    warmup = min(math.ceil(args.warmup_ratio * steps), steps - 1)  # the first warm-up step has rate 0
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps, last_epoch=done - 1)
    stop, alone = [], "RANK" not in os.environ  # SIGTERM and the first Ctrl-C save and stop; torchrun repeats Ctrl-C
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(130) if stop and alone else stop.append(number))

    bar = tqdm(range(done + 1, steps + 1), f"{args.kind} model", steps, initial=done, disable=rank != 0)
    for step in bar:
        # 1. This rank's pairs: a new order every epoch, whose last incomplete batch is left out
        epoch, batch = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(train_pairs), generator=random_generator(args.seed, "pairs", epoch))
        pairs = [train_pairs[i] for i in order[batch * args.batch_size + rank * local :][:local]]

        # 2. Loss and gradients. FSDP averages gradients over ranks; the factor `world` makes that a sum
        loss, right = 0.0, 0
        for first in range(0, local, args.micro_batch_size):
            scores, losses = score_pairs(args, model, tokenizer, pairs[first : first + args.micro_batch_size])
            (losses.sum() / args.batch_size * world).backward()
            loss += losses.sum().item()
            right += (scores[:, 0] > scores[:, 1]).sum().item()

        # 3. The update; one with gradients that are not finite is skipped, and the third in a row ends the run
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).full_tensor().item()
        skip = not math.isfinite(grad_norm)
        skipped, skipped_in_a_row = skipped + skip, skipped_in_a_row + 1 if skip else 0
        if skip:
            say(f"step {step}: gradients are not finite, update skipped")
        else:
            optimizer.step()
        if skipped_in_a_row == 3:
            raise UserError("three updates in a row had gradients that are not finite; lower --learning-rate")
        optimizer.zero_grad()

        # 4. Log
        sums = global_sum(loss=loss, pair_accuracy=right, stopped=len(stop))
        stopped, mean = sums["stopped"], {name: total / args.batch_size for name, total in sums.items()}
        metrics = {"loss": {"loss": mean["loss"], "grad_norm": grad_norm, "learning_rate": schedule.get_last_lr()[0]}}
        metrics["accuracy"] = {"pair_accuracy": mean["pair_accuracy"]}
        schedule.step()
        if step % steps_per_epoch == 0:
            result, rows = evaluate(args, model, tokenizer, eval_pairs)
            metrics["held_out"] = {f"eval_{name}": value for name, value in result.items()}
        place = {"step": step, "epoch": step / steps_per_epoch, "skipped_updates": skipped}
        log_metrics(folder, writer, step, place, metrics)
        bar.set_postfix_str(f"loss {mean['loss']:.3f}, accuracy {mean['pair_accuracy']:.1%}")

        # 5. Save what the run needs to continue
        if step < steps and (stopped or (args.save_every and step % args.save_every == 0)):
            state = {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row, "seconds": time.time() - start_time}
            save_checkpoint(folder, step, training_state(trained, optimizers), state)
            if stopped:
                say(f"stopped after step {step}; to continue, add --resume --output-dir {folder} to the command")
                return 128 + (stop or [signal.SIGTERM])[0]  # the status that shells give to the signal

    save_model(model, tokenizer, folder / "model")
    append_json(folder / "eval.jsonl", rows)
    if rank == 0:
        writer.close()
        summary = {"algorithm": f"{args.kind} model", "skipped_updates": skipped, "eval": result}
        summary["data"] = {"dataset": len(train_pairs), "eval_dataset": len(eval_pairs)}
        summary |= environment(args, device, start_time, "pairs", steps * args.batch_size)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items())
        print(f"{args.kind} model on {len(eval_pairs)} held-out pairs: {figures}\nwritten to {folder}")
    return 0


# ======================================================================================================================
# Plumbing: processes and errors, data, models, runs and checkpoints, logs
# ======================================================================================================================
class UserError(Exception):
    """A mistake the user can fix; the message says how."""


def report(kind, error, trace) -> None:
    """End the run, as sys.excepthook: a user's mistake in one line with status 2, anything else with a traceback."""
    if dist.get_rank() > 0:  # rank 0 reports errors common to all ranks; torchrun ends the others meanwhile
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if kind is not UserError:
        sys.__excepthook__(kind, error, trace)
        os._exit(1)  # a clean exit would wait for the other ranks
    tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    os._exit(2)


def say(message: str) -> None:
    """A line on standard error, above the progress bar, from rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(message, file=sys.stderr)


def start_processes():
    """Join the processes of torchrun, or run as one process. Returns the device and the mesh of processes."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    options = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    options["timeout"] = datetime.timedelta(hours=2)  # rank 0 may be downloading while the others wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **options)
    sys.excepthook = report
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 1 < local < world:  # shard inside a node, replicate across nodes
        return device, init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return device, init_device_mesh(device.type, (world,))


def random_generator(*key) -> torch.Generator:
    """A separate generator per use, keyed by seed, use and iteration: no draw depends on earlier ones."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def global_sum(**values) -> dict[str, float]:
    """Sums of numbers over all ranks, by name."""
    total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def load_rows(name: str, split: str, flag: str) -> datasets.Dataset:
    """The rows of a jsonl, json, csv or parquet file, of a folder of such files, or of a dataset of the Hub."""
    try:
        source = {"path": name}  # a path that exists is a path; anything else is a Hub id
        if os.path.isfile(name):
            suffix = Path(name.lower().removesuffix(".gz")).suffix.replace("jsonl", "json")[1:]
            if suffix not in ("json", "csv", "parquet"):
                raise ValueError("a data file ends in .jsonl, .json, .csv or .parquet")
            source = {"path": suffix, "data_files": {split.split("[")[0]: name}}
        rows = datasets.load_dataset(**source, split=split)
        next(iter(rows))
    except Exception as error:
        reason = error.__cause__ or str(error) or "no rows"
        place = "" if os.path.exists(name) else " (no path)"
        raise UserError(f"{flag} {name}{place}: split '{split}' cannot be read: {reason}") from None
    return rows


def read_column(rows: datasets.Dataset, column: str, source: str, labels: bool = False) -> list:
    """A column of texts, none of them empty, or of labels 0 and 1; source: flag and name of the data."""
    if column not in rows.column_names:
        raise UserError(f"{source}: no column '{column}'; the columns are {', '.join(rows.column_names)}")
    for row, value in enumerate(values := rows[column][:]):
        if value not in (0, 1) if labels else not (isinstance(value, str) and value.strip()):
            needed = "0 or 1" if labels else "a text"
            raise UserError(f"{source}: row {row} has {str(value)[:80]!r} as '{column}', where {needed} is needed")
    return values


def load_tokenizer(name: str, flag: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer beside a model. One without a pad token pads with EOS: masks, not ids, mark the padding."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        AutoConfig.from_pretrained(name, trust_remote_code=False)  # a model with code of its own is refused
        if tokenizer.eos_token is None:
            raise ValueError("it has no EOS token")
    except Exception as error:
        place = "" if os.path.exists(name) else " (no such path; without toy/ beside the script, give paths or Hub ids)"
        raise UserError(f"{flag} {name}{place}: it cannot be loaded: {error}") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encode(tokenizer, template: str, prompts: list[str], responses: list[str] | None = None) -> list[list[int]]:
    """Tokens of prompts in their template ("chat": the tokenizer's own); with responses: prompt, response and EOS."""
    chat = template == "chat"
    try:
        if not chat and "{prompt}" not in template:
            raise ValueError("it has no {prompt} in it")
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts if chat]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    except Exception as error:
        raise UserError(f"the prompt template '{template}' of {tokenizer.name_or_path} fails: {error}") from None
    texts = texts if chat else [template.replace("{prompt}", prompt) for prompt in prompts]
    texts = [text + response for text, response in zip(texts, responses or [""] * len(texts), strict=True)]
    encoded, eos = tokenizer(texts, add_special_tokens=not chat)["input_ids"], tokenizer.eos_token_id
    encoded = [ids[:-1] if ids[-1:] == [eos] else ids for ids in encoded]  # some tokenizers end every text in EOS
    return encoded if responses is None else [[*ids, eos] for ids in encoded]


def pad(tokenizer, texts: list[list[int]], side: str, device) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor. Returns (ids, mask), both [batch, longest]; mask is 1 at tokens, 0 at padding."""
    batch = tokenizer.pad({"input_ids": texts}, padding_side=side, return_attention_mask=True, return_tensors="pt")
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def load_pairs(args: Args, name: str, split: str, flag: str, tokenizer) -> list[dict]:
    """Pairs as {prompt, responses, ids} and, for a cost model, unsafe; the last three have an entry per response.

    The better response is first for a reward model, the more harmful one for a cost model.
    """
    rows, source, cost = load_rows(name, split, flag), f"{flag} {name}", args.kind == "cost"
    prompts, *responses = (read_column(rows, column, source) for column in ("prompt", "response_0", "response_1"))
    labels = read_column(rows, "safer_response_id" if cost else "better_response_id", source, labels=True)
    safe = [read_column(rows, f"is_response_{i}_safe", source, labels=True) for i in (0, 1) if cost]
    ids, pairs = [encode(tokenizer, args.prompt_template, prompts, texts) for texts in responses], []
    for row, prompt in enumerate(prompts):
        order = (1, 0) if int(labels[row]) != cost else (0, 1)
        both = {"responses": [responses[i][row] for i in order], "ids": [ids[i][row][: args.max_length] for i in order]}
        pairs.append({"prompt": prompt} | both | ({"unsafe": [not safe[i][row] for i in order]} if cost else {}))
    return pairs


def load_model(cls, name, flag, *, mesh, dtype, longest, config=None, unused=(), cpu_offload=False, loading=None):
    """A model of the library's class `cls` in evaluation mode, sharded by FSDP2. Rank 0 alone reads its weights.

    longest: tokens of the longest text. unused: prefixes of weight names that may be missing or left over.
    """
    loading = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True} | (loading or {})
    try:
        config = config or AutoConfig.from_pretrained(name, trust_remote_code=False)
        if longest > (limit := getattr(config, "max_position_embeddings", None) or longest):
            raise ValueError(f"it reads {limit} tokens, but a text may have {longest}; lower the length flags")
        for key in [key for key, value in vars(config).items() if "drop" in key and isinstance(value, float)]:
            setattr(config, key, 0.0)  # dropout would change log-probabilities between two forward passes
        if dist.get_rank() == 0:
            model, info = cls.from_pretrained(name, config=config, output_loading_info=True, **loading)
            keys = {*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])}
            if wrong := sorted(key for key in keys if not key.startswith(unused)):
                raise ValueError(f"{cls.__name__} lacks, or does not expect, the weights {', '.join(wrong[:4])}")
        else:
            with torch.device("meta"):
                model = cls.from_config(config, dtype=loading["dtype"])
    except Exception as error:
        raise UserError(f"{flag} {name} cannot be loaded: {error}") from None
    if dtype == torch.bfloat16 and longest <= 128 and mesh.device_type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward pass is slow there on short texts
    shard(model, mesh, dtype, cpu_offload)
    return model.eval()


def shard(model: nn.Module, mesh, dtype: torch.dtype, cpu_offload: bool) -> None:
    """FSDP2: each transformer block is gathered when it computes, the rest with the root; gradients are in float32."""
    weights = model.state_dict() if dist.get_rank() == 0 else {}
    # What no checkpoint holds, such as the frequencies of rotary embeddings, comes from rank 0 as well.
    buffers = [(key, buffer) for key, buffer in model.named_buffers() if key not in weights]
    extra = [buffers, getattr(model, "generation_config", None)]
    dist.broadcast_object_list(extra)
    buffers, model.generation_config = extra
    model.to_empty(device="meta")
    model.tie_weights()  # moving a model to another device unties its tied weights
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or []}
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if sum(parameter.numel() for parameter in model.parameters()) < 2**28:  # small: every rank has a copy, in FSDP2's
        blocks, shape = [], (dist.get_world_size(), 1)  # terms sharded over one rank and replicated over all
        mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    for unit in [*blocks, model]:
        fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32), offload_policy=offload)
    model.to_empty(device="cpu" if cpu_offload else mesh.device_type)
    model.tie_weights()
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(model, weights, options=options)
    for key, buffer in buffers:
        module, _, name = key.rpartition(".")
        setattr(model.get_submodule(module), name, buffer.to(mesh.device_type))


def reshard(model: nn.Module) -> None:
    """Give back the memory of gathered parameters: without a backward pass FSDP2 keeps those of the root."""
    for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
        unit.reshard()


def load_score_model(name, flag, *, head_seed=None, loading=None, **options):
    """A one-label score model, whose forward pass is `token_scores`; head_seed: draws the head of a language model."""
    config, loading, unused = AutoConfig.from_pretrained(name, trust_remote_code=False), loading or {}, ()
    architecture = (config.architectures or ["model"])[0]
    if architecture.endswith("ForScore"):  # Safe RLHF's class (arXiv 2310.12773): the head has another name
        loading, unused = loading | {"key_mapping": {r"^score_head\.": "score."}}, ("normalizer.",)
    elif not architecture.endswith("Classification"):
        unused = ("lm_head.", "score.")
        if head_seed is None:
            raise UserError(f"{flag} {name} is a {architecture} without a score head; give a score model")
        torch.manual_seed(head_seed)
    elif config.num_labels != 1:
        raise UserError(f"{flag} {name} has {config.num_labels} labels; a score model has one")
    config.num_labels, biased = 1, architecture.endswith(("ForTokenClassification", "ForScore"))
    cls = getattr(transformers, f"AutoModelFor{'Token' if biased else 'Sequence'}Classification")
    model = load_model(cls, name, flag, config=config, unused=unused, loading=loading, **options)
    if not hasattr(model, "score"):
        raise UserError(f"{flag} {name} is a {architecture}, whose head scores no tokens; give a decoder's")
    model.forward = token_scores.__get__(model)
    return model


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer: under another name first, then renamed: never half-written."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        beside = folder.with_name(folder.name + ".part")
        once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # tied weights have two names
        model.config.pad_token_id = tokenizer.pad_token_id
        state = {name: value for name, value in state.items() if name in once}
        if not all(value.isfinite().all() for value in state.values()):
            raise UserError(f"the weights for {folder} are not finite; lower --learning-rate")
        model.save_pretrained(beside, state_dict=state, save_original_format=not hasattr(model, "score"))
        tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    dist.barrier()


LOGS = ("metrics.jsonl", "eval.jsonl")
MAY_CHANGE = "output_dir resume save_every eval_every track micro_batch_size gradient_checkpointing cpu_offload"


def open_run(args: Args) -> tuple[Path, dict, SummaryWriter | None]:
    """Lock the output directory while rank 0 lives. Returns it, the newest checkpoint's state and TensorBoard's writer.

    The state is {} without a checkpoint and None if the run is finished. Logs are cut back to the checkpoint.
    """
    folder = Path(args.output_dir or f"runs/{args.exp_name}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
    found, writer = [folder, None], None
    if args.resume and args.output_dir is None:
        raise UserError("--resume continues a run: give its --output-dir")
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not value >= 0 and name != "cost_threshold":  # a NaN, too
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 0 or more")
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(os.open(folder / "lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--output-dir {folder} is in use by another process or not writable: {error}") from None
        flags, now = folder / "args.json", json.loads(json.dumps(asdict(args)))  # tuples are lists in JSON
        held = [p.name for p in folder.iterdir() if p.stat().st_size > 0 and p.name not in ("args.json", "tensorboard")]
        if held and not (args.resume and flags.exists()):
            raise UserError(f"--output-dir {folder} holds a run ({held[0]}); take another, or continue it by --resume")
        before = json.loads(flags.read_text(encoding="utf-8")) if held else now
        for key in (before.keys() | now.keys()) - set(MAY_CHANGE.split()):
            if before.get(key) != now.get(key):
                raise UserError(f"--resume: --{key.replace('_', '-')} was {before.get(key)} and is {now.get(key)} now")
        if not held:
            flags.write_text(json.dumps(now, indent=2), encoding="utf-8")
        if "summary.json" not in held:
            state = {}
            for place in sorted((folder / "checkpoints").glob("[0-9]*[0-9]"))[-1:]:
                state = json.loads((place / "state.json").read_text(encoding="utf-8"))
                state |= {"checkpoint": str(place), "step": int(place.name)}
            for name in LOGS:
                (folder / name).touch()
                os.truncate(folder / name, state.get(name, 0))
            if args.track:
                import wandb

                run_id = f"{folder.name}-{flags.stat().st_mtime_ns}"
                wandb.init(project="safe-rlhf", config=vars(args), sync_tensorboard=True, id=run_id, resume="allow")
            writer = SummaryWriter(folder / "tensorboard", purge_step=state.get("step", 0) + 1, flush_secs=1)
            found[1] = state
    dist.broadcast_object_list(found)
    return *found, writer


def training_state(trained: dict, optimizers: dict) -> dict[str, Tensor]:
    """Weights and AdamW's moments of the trained models by name; loading a checkpoint fills these tensors in place."""
    tensors = {}
    for name, model in trained.items():
        reshard(model)
        for key, weight in model.named_parameters():
            state = optimizers[name].state[weight]
            if not state:  # as AdamW begins
                state["step"] = torch.zeros((), device=weight.device)
                state |= {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            tensors |= {f"{name}.{key}.{moment}": value.detach() for moment, value in (state | {"": weight}).items()}
    return tensors


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict) -> None:
    """Write what a run needs to continue, then rename it: a kill leaves no half-written one. Keeps the newest two."""
    beside = folder / "checkpoints" / f"{step:08d}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    # A rank copies a whole file to CPU memory before it writes it, so the files must not be large.
    files = 1 + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) // 2**34
    numbers = {name: 1 + i * files // len(tensors) for i, name in enumerate(tensors)}
    writer = dcp.HuggingFaceStorageWriter(str(beside), fqn_to_index_mapping=numbers, save_distributed=True)
    dcp.save(tensors, storage_writer=writer)
    if dist.get_rank() == 0:
        state |= {name: (folder / name).stat().st_size for name in LOGS}
        (beside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        beside.rename(beside.with_suffix(""))
        for old in sorted(beside.parent.glob("[0-9]*[0-9]"))[:-2]:
            shutil.rmtree(old)


def append_json(path: Path, rows: list[dict]) -> None:
    """Add rows to a file of JSON Lines, on rank 0."""
    if dist.get_rank() == 0:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def log_metrics(folder: Path, writer: SummaryWriter | None, step: int, place: dict, metrics: dict[str, dict]) -> None:
    """One line of metrics.jsonl: place, then metrics by group and name; TensorBoard's scalars as group/name."""
    for group, name, value in [(group, *item) for group, figures in metrics.items() for item in figures.items()]:
        place = place | {name: value if math.isfinite(value) else None}  # JSON has no NaN
        if writer:
            writer.add_scalar(f"{group}/{name}", value, step)
    append_json(folder / "metrics.jsonl", [place])


def environment(args: Args, device: torch.device, start_time: float, unit: str, count: int) -> dict:
    """What a run computed with and how fast, for summary.json; count: the units it read, such as episodes."""
    seconds, versions = time.time() - start_time, {"torch": torch.__version__, "transformers": transformers.__version__}
    name = torch.cuda.get_device_name() if device.type == "cuda" else os.uname().machine
    figures = {"seed": args.seed, "dtype": args.dtype, "processes": dist.get_world_size(), "device": name}
    return figures | {"versions": versions, "wall_seconds": seconds, unit: count, f"{unit}_per_second": count / seconds}


if __name__ == "__main__":
    status = main(tyro.cli(Args, console_outputs=os.environ.get("RANK", "0") == "0"), *start_processes())
    dist.barrier()  # without it gloo's threads can abort a process at its exit
    dist.destroy_process_group()
    sys.exit(status)
