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

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, get_cosine_schedule_with_warmup

TOY = Path(__file__).resolve().parent / "toy"
PathOrId = Annotated[str, tyro.conf.arg(help_behavior_hint=lambda path: f"(default: {path.replace(str(TOY), 'toy')})")]


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
    model: PathOrId = f"{TOY}/policy"  # language model whose backbone the score model starts from, or a score model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where the hardware has it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    dataset: PathOrId = f"{TOY}/data/train.parquet"  # training pairs: jsonl, json, csv, parquet, folder or Hub id
    dataset_config: str | None = None  # configuration (subset) of --dataset and --eval-dataset, such as a Hub id has
    dataset_split: str = "train"  # split of the training pairs, or a slice such as train[:1000]
    eval_dataset: PathOrId = f"{TOY}/data/test.parquet"  # held-out pairs
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


def cost_loss(unsafer, safer, unsafer_sign, safer_sign, regularization: float) -> Tensor:
    """Loss of each pair, [pairs]: its order, and each response's own side of zero (arXiv 2310.12773).

    unsafer, safer: scores of the more and the less harmful response; *_sign: +1 if labelled unsafe, -1 if safe."""
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
    rank, world, count = dist.get_rank(), dist.get_world_size(), len(pairs)
    order = torch.tensor([max(map(len, pair["ids"])) for pair in pairs]).argsort(stable=True)  # little padding
    # FSDP2 needs equally many passes from each rank, so the last pairs of some are repeats.
    mine = order[torch.arange(rank, rank + math.ceil(count / world) * world, world) % count]
    values = torch.full((count, 3), -math.inf, device=model.device)  # both scores, the loss
    for rows in mine.split(args.micro_batch_size):
        values[rows] = torch.column_stack(score_pairs(args, model, tokenizer, [pairs[row] for row in rows]))
    dist.all_reduce(values, dist.ReduceOp.MAX)
    figures = {"loss": values[:, 2], "score_mean": values[:, :2], "pair_accuracy": values[:, 0] > values[:, 1]}
    if args.kind == "cost":
        figures["sign_accuracy"] = (values[:, :2] > 0) == torch.tensor([pair["unsafe"] for pair in pairs]).to(values)
    rows = [pair | {"scores": row[:2], "loss": row[2]} for pair, row in zip(pairs, values.tolist(), strict=True)]
    return {name: values.double().mean().item() for name, values in figures.items()}, rows


def main(args: Args, device: torch.device, mesh) -> int:
    start_time, rank, world = time.time(), dist.get_rank(), dist.get_world_size()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # the instruction sets it supports
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if fast else "float32"

    # ---- Pairs, output directory, model, optimizer
    say(f"loading data and model; computing in {args.dtype} on {device.type}")
    tokenizer = load_tokenizer(args.model, "--model", args.prompt_template)
    train_pairs = load_pairs(args, args.dataset, args.dataset_split, "--dataset", tokenizer)
    eval_pairs = load_pairs(args, args.eval_dataset, args.eval_split, "--eval-dataset", tokenizer)
    if args.batch_size not in range(world, len(train_pairs) + 1, world) or min(args.micro_batch_size, args.epochs) < 1:
        limits = f"a multiple of {world} (processes) up to {len(train_pairs)} (training pairs)"
        raise UserError(f"--batch-size must be {limits}, --micro-batch-size and --epochs at least 1")
    folder, saved, writer = open_run(args)
    if saved is None:
        say(f"the run in {folder} is finished")
        return 0
    longest = max(len(ids) for pair in train_pairs + eval_pairs for ids in pair["ids"])
    options = dict(mesh=mesh, dtype=getattr(torch, args.dtype), longest=longest, tokenizer=tokenizer)
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
    append_json(folder / "eval.jsonl", [{name: row[name] for name in row if name != "ids"} for row in rows])
    if rank == 0:
        writer.close()
        summary = {"algorithm": f"{args.kind} model", "skipped_updates": skipped, "eval": result}
        summary["data"] = {"dataset": len(train_pairs), "eval_dataset": len(eval_pairs)}
        summary |= environment(args, device, start_time, "pairs", steps * args.batch_size)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        figures = f"  pair accuracy {result['pair_accuracy']:.1%} (chance: 50%)\n"
        if args.kind == "cost":
            unsafe = sum(sum(pair["unsafe"]) for pair in eval_pairs) / (2 * len(eval_pairs))
            most = f"always the more frequent sign: {max(unsafe, 1 - unsafe):.1%}"
            figures += f"  sign accuracy {result['sign_accuracy']:.1%} ({most})\n"
        print(f"{args.kind} model on {len(eval_pairs)} held-out pairs:\n{figures}written to {folder}")
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
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    options["timeout"] = 4 * dist.constants.default_pg_timeout  # 2 hours: rank 0 may be downloading
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **options)
    sys.excepthook = report
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS") or 1) > 1:
        raise UserError("srun starts several tasks, which do not find each other; start one per node, each by torchrun")
    for library in (transformers, datasets):
        library.logging.set_verbosity(50)  # critical
        library.utils.logging.disable_progress_bar()
    return device, dist.init_device_mesh(device.type, (dist.get_world_size(),))


def random_generator(*key) -> torch.Generator:
    """A separate generator per use, keyed by seed, use and iteration: no draw depends on earlier ones."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1)


def global_sum(**values) -> dict[str, float]:
    """Sums of numbers over all ranks, by name."""
    total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


# Formats by the columns that hold responses, or dialogues that end in one. The first format whose columns exist counts
FORMATS = {"PKU-SafeRLHF": ("response_0", "response_1"), "preference": ("chosen", "rejected"), "Alpaca": ("output",)}
FORMATS |= {n: (n,) for n in ("completion", "messages", "response")} | {"ShareGPT": ("conversations",)} | {"prompt": ()}


def load_rows(name: str, config: str | None, split: str, flag: str) -> tuple[list[dict], str, str]:
    """Rows of a jsonl, json, csv or parquet file, a folder of such files or a Hub dataset; their format; file names."""
    try:
        source, part = {"path": name, "name": config}, split.split("[")[0]
        if os.path.isfile(name):  # a path that exists is a path; anything else is a Hub id
            suffix = Path(name.lower().removesuffix(".gz")).suffix.replace("jsonl", "json")[1:]
            if suffix not in ("json", "csv", "parquet"):
                raise ValueError("a data file ends in .jsonl, .json, .csv or .parquet")
            source = {"path": suffix, "data_files": {part: re.sub(r"([*?[])", r"[\1]", os.path.abspath(name))}}
        with tempfile.TemporaryDirectory() as fresh:  # the library's cache may hold what a file held before
            builder = datasets.load_dataset_builder(**source, cache_dir=fresh if os.path.exists(name) else None)
            builder.config.keep_default_na = False  # "None" and "NA" in a csv file are texts
            builder.download_and_prepare()
            rows = builder.as_dataset(split).to_list()
        form = next(form for form, columns in FORMATS.items() if rows[0].keys() >= {*columns})
    except Exception as error:
        place, reason = "" if os.path.exists(name) else " (no such path)", error.__cause__ or str(error) or "no rows"
        raise UserError(f"{flag} {name}{place}: split '{split}' cannot be read: {reason}") from None
    files = [os.path.basename(file) for file in (builder.config.data_files or {}).get(part, [split])]
    return rows, form, ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def as_messages(value, role: str) -> list[dict[str, str]]:
    """Messages {role, content} from a list of them (also ShareGPT's), hh-rlhf's text, or one text by `role`."""
    if isinstance(value, str):
        parts = re.split(r"\s*\n\n(Human|Assistant): *", value) if value[:8] == "\n\nHuman:" else ["", role, value]
        value = [{"role": name, "content": text} for name, text in zip(parts[1::2], parts[2::2], strict=True)]
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    turns = [(turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")) for turn in turns]
    roles = {"Human": "user", "human": "user", "Assistant": "assistant", "gpt": "assistant"}
    turns = [{"role": roles.get(str(by), by), "content": text if isinstance(text, str) else ""} for by, text in turns]
    while turns and not turns[-1]["content"].strip():
        turns.pop()  # an empty turn at the end invites an answer
    return turns


def load_examples(args: Args, name: str, split: str, flag: str, tokenizer, limits, counts=()) -> list[dict]:
    """Rows as {prompt: text or messages, head: its tokens, responses, ids: (prompt, response) tokens of each, row}.

    limits: tokens of prompts, and of texts, where responses are cut; counts: of responses per row, () ignores them."""
    rows, form, files = load_rows(name, args.dataset_config, split, flag)
    fields, column, examples, kept, dropped = FORMATS[form], getattr(args, "prompt_column", "prompt"), {}, [], []
    special, cut = re.compile("|".join(map(re.escape, {tokenizer.eos_token, *tokenizer.special.values()}))), 0
    for number, row in enumerate(rows):
        alpaca = " ".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        prompt = as_messages(row.get(column, alpaca), "user")
        dialogues = [as_messages(row[field], "assistant") for field in fields] or [[]]
        ends = [turns.pop()["content"] for turns in dialogues if turns and turns[-1]["role"] == "assistant"]
        # A dialogue that begins with an answer continues the prompt.
        heads = [turns if turns and turns[0]["role"] != "assistant" else prompt + turns for turns in dialogues]
        head, responses = heads[0], ends if counts else []
        key = number if len(responses) == 2 else str((head, responses))  # pairs may be repeated
        reasons = {
            f"of a form that does not fit ({len(fields)} responses)": counts and len(fields) not in counts,
            "with an undesirable response": counts == (1,) and form == "completion" and row.get("label", 1) != 1,
            "without a response at the end": counts and len(ends) < len(fields),
            "whose responses answer different prompts": counts and any(other != head for other in heads),
            "without a prompt that ends with the user": not head or head[-1]["role"] != "user",
            "with an empty message": not all(turn["content"].strip() for turn in head if turn["role"] != "system"),
            "with a special token in the text": special.search("\n".join([t["content"] for t in head] + responses)),
            "that repeat another": key in examples,
        }
        dropped += [reason for reason, holds in reasons.items() if holds][:1]
        if not any(reasons.values()):
            examples[key] = {"prompt": head if head[1:] else head[0]["content"], "responses": responses, "row": row}
    prompts, responses = ([example[name] for example in examples.values()] for name in ("prompt", "responses"))
    columns = [encode(tokenizer, prompts, texts) for texts in zip(*responses, strict=True)]
    for example, head, *texts in zip(examples.values(), encode(tokenizer, prompts), *columns, strict=True):
        starts = [len(os.path.commonprefix([head, text])) for text in texts]  # a token may join prompt and response
        ids = [(text[:start], text[start : limits[1]]) for text, start in zip(texts, starts, strict=True)]
        if not 0 < len(head) <= limits[0]:
            dropped.append(f"with an empty prompt or one over {limits[0]} tokens")
        elif ids and ((ids[1:] == ids[:1] and len({*example["responses"]}) == 2) or not all(x and y for x, y in ids)):
            dropped.append(f"whose responses are empty or equal at {limits[1]} tokens")
        else:
            kept.append(example | {"head": head, "ids": ids})
            cut += sum(len(text) > limits[1] for text in texts)
    line = f"{flag} {name}: {form} data from {files}, kept {len(kept)} of {len(rows)} rows, cut {cut} texts, dropped "
    line += ", ".join(f"{dropped.count(reason)} {reason}" for reason in dict.fromkeys(dropped)) or "none"
    if not kept:
        raise UserError(f"{line}; the first row is {str(rows[0])[:300]}")
    say(line)
    return kept


def load_tokenizer(name: str, flag: str, template: str = "{prompt}") -> transformers.PreTrainedTokenizerBase:
    """The tokenizer beside a model, with its prompt template, special tokens and the id that ends a response added."""
    try:
        if os.path.exists(os.path.join(name, "adapter_config.json")):
            raise ValueError("it is an adapter; merge it into its model first")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # a model with code of its own is refused
        if tokenizer.eos_token is None:
            raise ValueError("it has no EOS token")
        tokenizer.special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        tokenizer.template, tokenizer.end_id = template, tokenizer.eos_token_id
        if template == "chat":  # the first special token behind an answer ends it
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\N{SNOWMAN}"}]
            tail = tokenizer.apply_chat_template(turns, tokenize=False).partition("\N{SNOWMAN}")[2]
            ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
            tokenizer.end_id = next((i for i in ids if i in tokenizer.special), tokenizer.eos_token_id)
        elif "{prompt}" not in template:
            raise ValueError(f"the prompt template '{template}' has no {{prompt}} in it")
    except Exception as error:
        place = "" if os.path.exists(name) else " (no such path; without toy/ beside the script, give paths or Hub ids)"
        raise UserError(f"{flag} {name}{place}: it cannot be loaded: {error}") from None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= getattr(config, "vocab_size", sys.maxsize):
        tokenizer.pad_token = tokenizer.eos_token  # any id in the embedding will do: masks, not ids, mark the padding
    return tokenizer


def encode(tokenizer, prompts: list, responses: list[str] | None = None) -> list[list[int]]:
    """Tokens of prompts (texts or messages) in their template; with responses: prompt, response and end of the turn."""
    chat, eos, bos = tokenizer.template == "chat", tokenizer.eos_token_id, tokenizer.bos_token_id
    turns = [prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] for prompt in prompts]
    if not chat and any(len(messages) > 1 for messages in turns):
        raise UserError(f"a prompt of several messages does not fit the template '{tokenizer.template}'; chat reads it")
    try:
        texts = [tokenizer.template.replace("{prompt}", messages[0]["content"]) for messages in turns]
        if chat and turns:
            texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} fails: {error}") from None
    texts = [text + response for text, response in zip(texts, responses or [""] * len(texts), strict=True)]
    encoded = tokenizer(texts, add_special_tokens=not chat)["input_ids"] if texts else []
    encoded = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]  # the template's BOS and the tokenizer's
    encoded = [ids[:-1] if not chat and ids[-1:] == [eos] else ids for ids in encoded]  # some tokenizers add EOS to all
    return encoded if responses is None else [[*ids, tokenizer.end_id] for ids in encoded]


def pad(tokenizer, texts: list[list[int]], side: str, device) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor. Returns (ids, mask), both [batch, longest]; mask is 1 at tokens, 0 at padding."""
    batch = tokenizer.pad({"input_ids": texts}, padding_side=side, return_attention_mask=True, return_tensors="pt")
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def load_pairs(args: Args, name: str, split: str, flag: str, tokenizer) -> list[dict]:
    """Pairs as {prompt, responses, ids, unsafe}; of a pair the better one (reward) or less safe one (cost) first."""
    pairs, reward, source = [], args.kind == "reward", f"{flag} {name}"
    for example in load_examples(args, name, split, flag, tokenizer, (args.max_length, args.max_length), (2,)):
        chosen = read_label(example["row"], "better_response_id" if reward else "safer_response_id", source)
        order = (chosen, 1 - chosen) if reward else (1 - chosen, chosen)
        columns = {"responses": example["responses"], "ids": [x + y for x, y in example["ids"]]}
        if not reward:
            columns["unsafe"] = [not read_label(example["row"], f"is_response_{i}_safe", source) for i in (0, 1)]
        pairs.append({"prompt": example["prompt"]} | {key: [both[i] for i in order] for key, both in columns.items()})
    return pairs


def read_label(row: dict, column: str, source: str) -> int:
    """A label, 0 or 1, by PKU-SafeRLHF's column names. In preference data the chosen response is number 0."""
    safe = {f"is_response_{i}_safe": row.get(f"is_{name}_safe") for i, name in enumerate(("chosen", "rejected"))}
    value = (row if "response_0" in row else {"better_response_id": 0, "safer_response_id": 0} | safe | row).get(column)
    if value not in (0, 1):
        raise UserError(f"{source}: a row has {value!r} as '{column}', not 0 or 1; its columns are {', '.join(row)}")
    return int(value)


def load_model(cls, name, flag, mesh, dtype, longest, tokenizer, config=None, unused=(), offload=False, loading=None):
    """A model of the class `cls`, sharded by FSDP2: a block is gathered while it computes. Rank 0 alone reads weights.

    longest: tokens of the longest text; unused: prefixes of weights that may be missing or left over."""
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
        raise UserError(f"{flag} {name} cannot be loaded: {str(error)[:400]}") from None
    if dtype == torch.bfloat16 and longest <= 128 and mesh.device_type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward pass is slow there on short texts
    weights = model.state_dict() if dist.get_rank() == 0 else {}
    # What no checkpoint holds, such as the frequencies of rotary embeddings, comes from rank 0 as well.
    buffers = [(key, buffer) for key, buffer in model.named_buffers() if key not in weights]
    dist.broadcast_object_list(extra := [buffers, getattr(model, "generation_config", None)])
    buffers, model.generation_config = extra
    model.to_empty(device="meta")
    model.tie_weights()  # moving a model to another device unties its tied weights
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or []}
    small = sum(weight.numel() for weight in model.parameters()) < 2**24  # one unit: gathering blocks takes longer
    blocks = [module for module in model.modules() if type(module).__name__ in names and not small]
    policies = dict(mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32), reshard_after_forward=True)
    policies["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for unit in [*reversed(blocks), model]:  # a block within a block comes first
        fully_shard(unit, mesh=mesh, **policies)
    model.to_empty(device="cpu" if offload else mesh.device_type)
    model.tie_weights()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for key, buffer in buffers:
        model.get_buffer(key).copy_(buffer)
    for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        embedding.padding_idx = None  # the library would not train this row, which may be EOS's
    model.vocabulary = max(tokenizer.get_vocab().values()) + 1  # the ids of tokens; an embedding may have more rows
    ids = torch.tensor(encode(tokenizer, ["How are you?"])).to(mesh.device_type)
    with torch.no_grad():
        readings = [model.train(mode)(input_ids=ids).logits.nan_to_num() for mode in (True, False)]
    if (readings[0] - readings[1]).abs().max() > 0.01 * readings[1].abs().max():  # no field above switched it off
        raise UserError(f"{flag} {name} reads a text differently in training mode: set its dropout or noise to zero")
    return model


def load_score_model(name, flag, *, head_seed=None, loading=None, **options):
    """A one-label score model, whose forward pass is `token_scores`; head_seed: draws the head of a language model."""
    config, loading, unused = AutoConfig.from_pretrained(name, trust_remote_code=False), loading or {}, ()
    architecture = (config.architectures or ["model"])[0]
    if architecture.endswith("ForScore"):  # Safe RLHF's class (arXiv 2310.12773): the head has another name
        loading, unused = loading | {"key_mapping": {r"^score_head\.": "score."}}, ("normalizer.",)
    elif not architecture.endswith("Classification") and head_seed is not None:
        unused = ("lm_head.", "embed_out.", "score.")
        torch.manual_seed(head_seed)
    elif not architecture.endswith("Classification") or config.num_labels != 1:
        raise UserError(f"{flag} {name} is a {architecture} of {config.num_labels} labels; give a score model, of one")
    config.num_labels, config.classifier_dropout = 1, 0.0
    biased = architecture.endswith(("ForTokenClassification", "ForScore"))
    cls = getattr(transformers, f"AutoModelFor{'Token' if biased else 'Sequence'}Classification")
    model = load_model(cls, name, flag, config=config, unused=unused, loading=loading, **options)
    if not hasattr(model, "score"):
        raise UserError(f"{flag} {name} is a {architecture}, whose head scores no tokens; give a decoder's")
    model.forward = token_scores.__get__(model)
    return model


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer: under another name first, then renamed: never half-written."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        beside = folder.with_name(folder.name + ".part")
        once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # tied weights have two names
        model.config.pad_token_id = tokenizer.pad_token_id
        state = {name: value for name, value in state.items() if name in once}
        model.save_pretrained(beside, state_dict=state, save_original_format=not hasattr(model, "score"))
        tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    dist.barrier()


LOGS = ("metrics.jsonl", "eval.jsonl")
MAY_CHANGE = "output_dir resume save_every eval_every track micro_batch_size gradient_checkpointing cpu_offload"


def open_run(args: Args) -> tuple[Path, dict, SummaryWriter | None]:
    """The locked output directory, its newest checkpoint's state ({}: none, None: finished), TensorBoard's writer."""
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
        held = [p.name for p in folder.iterdir() if p.lstat().st_size and p.name not in ("args.json", "tensorboard")]
        if held and not (args.resume and flags.exists()):
            raise UserError(f"--output-dir {folder} holds a run ({held[0]}); take another, or continue it by --resume")
        before = json.loads(flags.read_text(encoding="utf-8")) if held else now
        for key in {key for key in before | now if before.get(key) != now.get(key)} - set(MAY_CHANGE.split()):
            raise UserError(f"--resume: --{key.replace('_', '-')} was {before.get(key)} and is {now.get(key)} now")
        if not held:
            flags.write_text(json.dumps(now, indent=2), encoding="utf-8")
        if "summary.json" not in held:
            found[1] = state = {}
            for place in sorted((folder / "checkpoints").glob("[0-9]*[0-9]"))[-1:]:
                state |= json.loads((place / "state.json").read_text(encoding="utf-8"))
                state |= {"checkpoint": str(place), "step": int(place.name)}
            for name in LOGS:
                with (folder / name).open("ab") as file:
                    file.truncate(state.get(name, 0))  # what came after the checkpoint comes again
            if args.track:
                import wandb

                run_id = f"{folder.name}-{flags.stat().st_mtime_ns}"
                wandb.init(project="safe-rlhf", config=vars(args), sync_tensorboard=True, id=run_id, resume="allow")
            writer = SummaryWriter(folder / "tensorboard", purge_step=state.get("step", 0) + 1, flush_secs=1)
    dist.broadcast_object_list(found)
    return *found, writer


def training_state(trained: dict, optimizers: dict) -> dict[str, Tensor]:
    """Weights and AdamW's moments of the trained models by name; loading a checkpoint fills these tensors in place."""
    tensors = {}
    for name, model in trained.items():
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
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(beside), save_distributed=True))
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
