"""SACPO: stepwise alignment, safe RLHF without score models: first one preference, then the other.

A policy π_θ should be helpful (reward R) and safe (cost C). The optimum of the Lagrangian with multiplier λ,

    maximise  E_x E_y [R(x, y) - λ C(x, y)] - β KL(π_θ ‖ π_ref),    π* ∝ π_ref exp((R - λ C) / β)
                                                                       ∝ (π_ref exp(R / β)) exp(-C / (β/λ)),

is the result of two alignments in a row, to helpfulness with β and then to safety with β/λ, or in the other order. The
reference of each is the policy it starts from. With r(y) = log π_θ(y | x) - log π_ref(y | x) it minimises one of

    DPO     -log σ( b (r(y_chosen) - r(y_rejected)) )                                mean over pairs
    KTO     w_D (1 - σ( b (r(y) - z_0) ))  where y is desirable,                     mean over responses
            w_U (1 - σ( b (z_0 - r(y)) ))  where it is not; z_0 = {mean of r over responses to OTHER prompts}^+

where b is β (--beta) if the stage is about helpfulness and β/λ (--beta-over-lambda) if it is about safety, in either
order. P-SACPO gives policies between the stages without training: weights (1 - q) θ_stage1 + q θ_stage2.

Sources: SACPO, P-SACPO (Wachi et al., NeurIPS 2024, arXiv 2404.11049); DPO (arXiv 2305.18290); KTO (arXiv 2402.01306).

Without flags it runs on the embedded toy world: on a laptop, offline, in about a minute. At the paper's scale:

    torchrun --nproc_per_node 8 sacpo.py --model PKU-Alignment/alpaca-7b-reproduced --train-size 0 --epochs 3 \
        --dataset PKU-Alignment/PKU-SafeRLHF-30K --eval-dataset PKU-Alignment/PKU-SafeRLHF-30K \
        --beta 0.1 --beta-over-lambda 0.025 --prompt-template "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" \
        --merge-q 0.25 0.5 0.75 --batch-size 256 --micro-batch-size 16 --learning-rate 2e-5 --max-prompt-length 128
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ...     # on each node
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
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, get_cosine_schedule_with_warmup

TOY = Path(__file__).resolve().parent / "toy"
SHORT = tyro.conf.arg(help_behavior_hint=lambda path: f"(default: {path.replace(str(TOY), 'toy')})")
PathOrId, PathsOrIds = Annotated[str, SHORT], Annotated[tuple[str, ...], SHORT]


@dataclass
class Args:
    """Align a language model stepwise with two preferences (SACPO)."""

    exp_name: str = "sacpo"  # name of the run
    seed: int = 1  # seeds everything random
    output_dir: str | None = None  # where the run is written; default runs/<exp-name>-<seed>-<time>
    track: bool = False  # also log to Weights & Biases (needs the wandb package)
    save_every: int = 0  # steps between checkpoints, the newest two are kept; 0 saves only when interrupted
    resume: bool = False  # continue the run in --output-dir from its newest checkpoint, or start it there
    model: PathOrId = f"{TOY}/policy"  # language model after supervised fine-tuning: the policy and first reference
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where the hardware has it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    dataset: PathsOrIds = (f"{TOY}/data/train.parquet",)  # training pairs, for all stages or one per stage
    dataset_config: str | None = None  # configuration (subset) of --dataset and --eval-dataset, such as a Hub id has
    dataset_split: str = "train"  # split of the training pairs, or a slice such as train[:1000]
    eval_dataset: PathsOrIds = (f"{TOY}/data/test.parquet",)  # held-out pairs, in the same way
    eval_split: str = "test"  # split of the held-out pairs
    train_size: int = 8192  # training pairs at most, drawn at random, the same from the same data; 0 takes all
    prompt_template: str = "{prompt}"  # text around a prompt, directly before the response; "chat": the tokenizer's own
    max_prompt_length: int = 64  # tokens; pairs with longer prompts are dropped
    max_length: int = 512  # tokens of prompt and response together; longer texts lose their end
    # Stages
    stages: tuple[Literal["helpful", "safe"], ...] = ("helpful", "safe")  # the order; a single one is plain DPO or KTO
    loss: tuple[Literal["dpo", "kto"], ...] = ("dpo",)  # loss of all stages, or one for each
    beta: float = 0.5  # β, weight of the KL divergence from the reference in the helpfulness stage
    beta_over_lambda: float = 0.25  # β/λ, the same in the safety stage: the smaller, the more safety counts
    merge_q: tuple[float, ...] = ()  # P-SACPO: mix weights (1 - q) of stage 1 and q of stage 2, for each q
    epochs: int = 1  # passes over the training pairs in each stage
    batch_size: int = 64  # pairs per optimizer step, over all processes
    micro_batch_size: int = 64  # pairs per forward and backward pass of one process, two texts each
    learning_rate: float = 1e-3  # peak learning rate; cosine schedule down to zero
    warmup_ratio: float = 0.03  # share of the optimizer steps spent warming up
    weight_decay: float = 0.0  # AdamW's weight decay
    max_grad_norm: float = 1.0  # gradients are clipped to this norm


# ---- The algorithm: pure functions. Log-probabilities are those of whole responses
def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """Direct preference optimization (arXiv 2305.18290): the loss of each pair, [pairs], from log π(y | x) in nats."""
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def kto_loss(logprobs, ref_logprobs, desirable, z_0: float, beta: float, w_d: float, w_u: float) -> Tensor:
    """Kahneman-Tversky optimization (arXiv 2402.01306): the loss of each response, judged by itself against z_0.

    logprobs, ref_logprobs: log π(y | x) in nats; desirable: KTO's labels; tensors of one shape. z_0: the reference
    point, one number for the global batch, without gradient. w_d, w_u: weights of (un)desirable responses."""
    log_ratio = logprobs - ref_logprobs
    desirable_loss = w_d * (1 - F.sigmoid(beta * (log_ratio - z_0)))
    undesirable_loss = w_u * (1 - F.sigmoid(beta * (z_0 - log_ratio)))
    return torch.where(desirable, desirable_loss, undesirable_loss)


def mismatch(batch: list[dict], max_length: int) -> list[dict]:
    """Each pair's responses after the prompts of the next pair with others, for KTO's z_0; [] if a pair finds none."""
    crossed = []
    for i, pair in enumerate(batch):
        others = (one for one in batch[i:] + batch[:i] if all(one["prompts"][k] != pair["prompts"][k] for k in (0, 1)))
        if not (other := next(others, None)):
            return []
        ids = [(x, y[: max_length - len(x)]) for (x, _), (_, y) in zip(other["ids"], pair["ids"], strict=True)]
        crossed.append(pair | {"prompts": other["prompts"], "ids": ids})
    return crossed


def response_logprobs(policy, ids: Tensor, mask: Tensor, length: int, temperature: float) -> Tensor:
    """Log-probabilities of the last `length` tokens under the tempered distribution, [batch, length]."""
    inputs = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
    logits = policy(input_ids=ids, logits_to_keep=length + 1, **inputs).logits[:, :-1, : policy.vocabulary]
    # A few positions at a time, recomputed in the backward pass: float32 logits of a whole batch would take gigabytes.
    step = max(1, (2**24 if logits.is_cuda else 2**20) // (logits.shape[0] * logits.shape[2]))  # 2^20 fit a CPU cache
    chunks = zip(logits.split(step, 1), ids[:, -length:].split(step, 1), strict=True)
    parts = [checkpoint(token_logprobs, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts, 1).masked_fill(mask[:, -length:] == 0, 0.0)  # a logit at padding may be infinite


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of tokens [batch, length] under tempered logits [batch, length, vocabulary]."""
    logits = logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def pair_logprobs(policy, tokenizer, pairs: list[dict]) -> Tensor:
    """log π(y | x) of both responses of each pair in float32, [pairs, 2]: the sum over a response's tokens, EOS too."""
    prompts, responses = zip(*(text for pair in pairs for text in pair["ids"]), strict=True)
    prompt_ids, prompt_mask = pad(tokenizer, prompts, "left", policy.device)
    response_ids, mask = pad(tokenizer, responses, "right", policy.device)
    ids, attention_mask = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, mask], 1)
    logprobs = response_logprobs(policy, ids, attention_mask, mask.shape[1], 1.0)  # [2 pairs, response], 0 at padding
    return logprobs.sum(1).unflatten(0, (-1, 2))


@torch.no_grad()
def all_logprobs(policy, tokenizer, pairs: list[dict], micro_batch_size: int) -> Tensor:
    """pair_logprobs of many pairs, [pairs, 2]: every rank reads its share, and all get the whole."""
    rank, world, count = dist.get_rank(), dist.get_world_size(), len(pairs)
    order = torch.tensor([max(len(x) + len(y) for x, y in pair["ids"]) for pair in pairs]).argsort(stable=True)
    # FSDP2 needs equally many passes from each rank, so the last pairs of some are repeats.
    mine = order[torch.arange(rank, rank + math.ceil(count / world) * world, world) % count]
    logprobs = torch.full((count, 2), -math.inf, device=policy.device)
    for rows in mine.split(micro_batch_size):  # texts of similar length together: little padding
        logprobs[rows] = pair_logprobs(policy, tokenizer, [pairs[row] for row in rows])
    dist.all_reduce(logprobs, dist.ReduceOp.MAX)
    return logprobs


def main(args: Args, device: torch.device, mesh) -> int:
    start_time, rank, world = time.time(), dist.get_rank(), dist.get_world_size()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # the instruction sets it supports
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if fast else "float32"
    given, count = (args.stages, args.loss, args.dataset, args.eval_dataset), len(args.stages)
    given = [values * count if len(values) == 1 else values for values in given]  # one for all stages, or one per stage
    if {count or 1} != {len(set(args.stages)), *map(len, given)} or not all(0 <= q <= 1 < count for q in args.merge_q):
        raise UserError("--stages takes helpful, safe or both; --loss and data sets one or one each; --merge-q 0 to 1")

    # ---- Pairs, output directory, model
    say(f"loading data and model; computing in {args.dtype} on {device.type}")
    tokenizer, loaded = load_tokenizer(args.model, "--model", args.prompt_template), {}
    train_pairs, eval_pairs = {}, {}
    for preference, loss_name, name, eval_name in zip(*given, strict=True):
        settings = (preference, loss_name, tokenizer, loaded)
        train_pairs[preference] = load_pairs(args, name, args.dataset_split, "--dataset", *settings)
        eval_pairs[preference] = load_pairs(args, eval_name, args.eval_split, "--eval-dataset", *settings)
    count, least = min(map(len, train_pairs.values())), 2 if "kto" in args.loss else 1
    if args.batch_size % world or not least <= args.batch_size <= count or min(args.epochs, args.micro_batch_size) < 1:
        limits = f"a multiple of {world} (processes) from {least} to {count} (training pairs)"
        raise UserError(f"--batch-size must be {limits}, --micro-batch-size and --epochs at least 1")
    folder, saved, writer = open_run(args)
    if saved is None:
        say(f"the run in {folder} is finished")
        return 0
    ids = [ids for pairs in [*train_pairs.values(), *eval_pairs.values()] for pair in pairs for ids in pair["ids"]]
    most = max(len(x) for x, _ in ids) + max(len(y) for _, y in ids)  # KTO's z_0 joins prompts and responses of pairs
    longest = min(args.max_length, most) if "kto" in args.loss else max(len(x) + len(y) for x, y in ids)
    options = dict(mesh=mesh, dtype=getattr(torch, args.dtype), longest=longest, tokenizer=tokenizer)
    start = str(folder / "stage1") if saved.get("results") else args.model
    policy = load_model(AutoModelForCausalLM, start, "--model", **options).train()  # there is no dropout
    ends = policy.generation_config.eos_token_id  # one, several or none
    ends = {tokenizer.eos_token_id, tokenizer.end_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    policy.generation_config.eos_token_id = sorted(ends)  # saved with the model: it ends as it learns to end
    if args.gradient_checkpointing:
        (getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable)()
    local, size = args.batch_size // world, args.micro_batch_size
    local_rows = slice(rank * local, (rank + 1) * local)  # this rank's part of a global batch
    steps_before, steps = 0, 0  # of the stages before; of this stage
    skipped, skipped_in_a_row = saved.get("skipped", 0), saved.get("skipped_in_a_row", 0)
    start_time, results = start_time - saved.get("seconds", 0.0), saved.get("results", [])
    stop, alone = [], "RANK" not in os.environ  # SIGTERM and the first Ctrl-C save and stop; torchrun repeats Ctrl-C
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(130) if stop and alone else stop.append(number))

    for stage, (preference, loss_name, *_) in enumerate(zip(*given, strict=True), 1):
        steps_before += steps
        pairs, held_out, batches = train_pairs[preference], eval_pairs[preference], []
        steps_per_epoch = len(pairs) // args.batch_size
        steps = args.epochs * steps_per_epoch
        done = max(0, saved.get("step", 0) - steps_before)  # steps of this stage
        if done >= steps:
            continue

        # 1. The batches of this stage: a new order every epoch, whose last incomplete batch is left out
        beta = args.beta if preference == "helpful" else args.beta_over_lambda
        for epoch in range(args.epochs):
            order = torch.randperm(len(pairs), generator=random_generator(args.seed, "pairs", preference, epoch))
            batches += order[: steps_per_epoch * args.batch_size].split(args.batch_size)
        labels = [label for pair in pairs for label in pair["desirable"]]
        w_undesirable = sum(labels) / (len(labels) - sum(labels))  # desirable responses per undesirable one

        # 2. The reference is the policy that the stage starts from: read once, before the first update
        say(f"stage {stage}: reading the log-probabilities of the reference")
        crossed = [mismatch([pairs[i] for i in batch], args.max_length) for batch in batches if loss_name == "kto"]
        reference, held_out_reference = (all_logprobs(policy, tokenizer, some, size) for some in (pairs, held_out))
        crossed_reference = [all_logprobs(policy, tokenizer, texts, size) if texts else None for texts in crossed]
        group = {"params": list(policy.parameters()), "initial_lr": args.learning_rate}
        adam = dict(lr=args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
        trained, optimizers = {"policy": policy}, {"policy": torch.optim.AdamW([group], **adam)}
        if done:
            reader = dcp.HuggingFaceStorageReader(saved["checkpoint"])
            dcp.load(training_state(trained, optimizers), storage_reader=reader)
        warmup = min(math.ceil(args.warmup_ratio * steps), steps - 1)  # the first warm-up step has rate 0
        schedule = get_cosine_schedule_with_warmup(optimizers["policy"], warmup, steps, last_epoch=done - 1)
        bar = tqdm(range(done + 1, steps + 1), f"{preference}, {loss_name}", steps, initial=done, disable=rank != 0)
        for step in bar:
            # 3. KTO's reference point, over the global batch
            batch, z_0, log_ratio_sum = batches[step - 1], 0.0, 0.0
            if loss_name == "kto" and crossed[step - 1]:
                for rows in torch.arange(args.batch_size)[local_rows].split(size):
                    with torch.no_grad():
                        logprobs = pair_logprobs(policy, tokenizer, [crossed[step - 1][row] for row in rows])
                    log_ratio_sum += (logprobs - crossed_reference[step - 1][rows]).sum().item()
                z_0 = max(0.0, global_sum(z_0=log_ratio_sum)["z_0"] / (2 * args.batch_size))

            # 4. Losses and gradients. FSDP averages gradients over ranks; the factor `world` makes that a sum
            sums = dict.fromkeys(("loss", "pair_accuracy", "chosen_log_ratio", "rejected_log_ratio"), 0.0)
            for rows in batch[local_rows].split(size):
                chunk, ref = [pairs[row] for row in rows], reference[rows]  # [rows, 2]
                logprobs = pair_logprobs(policy, tokenizer, chunk)  # [rows, 2]
                if loss_name == "dpo":
                    loss = dpo_loss(*logprobs.unbind(1), *ref.unbind(1), beta)  # [rows]
                else:
                    desirable = torch.tensor([pair["desirable"] for pair in chunk], device=device) > 0
                    loss = kto_loss(logprobs, ref, desirable, z_0, beta, 1.0, w_undesirable).mean(1)  # [rows]
                (loss.sum() / args.batch_size * world).backward()
                chosen, rejected = (logprobs.detach() - ref).unbind(1)
                for name, value in zip(sums, (loss.detach(), chosen > rejected, chosen, rejected), strict=True):
                    sums[name] += value.sum()

            # 5. The update; one with gradients that are not finite is skipped, and the third in a row ends the run
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
            skip = not math.isfinite(grad_norm)
            skipped, skipped_in_a_row = skipped + skip, skipped_in_a_row + 1 if skip else 0
            if skip:
                say(f"stage {stage}, step {step}: gradients are not finite, update skipped")
            else:
                optimizers["policy"].step()
            if skipped_in_a_row == 3:
                raise UserError("three updates in a row had gradients that are not finite; lower --learning-rate")
            optimizers["policy"].zero_grad()

            # 6. Log
            sums = global_sum(stopped=len(stop), **sums)
            stopped, figures = sums.pop("stopped"), {name: total / args.batch_size for name, total in sums.items()}
            bar.set_postfix_str(f"loss {figures['loss']:.3f}, accuracy {figures['pair_accuracy']:.1%}")
            figures |= {"grad_norm": grad_norm, "learning_rate": schedule.get_last_lr()[0], "skipped_updates": skipped}
            metrics = {f"stage{stage}": figures | ({"z_0": z_0} if loss_name == "kto" else {})}
            schedule.step()
            if step % steps_per_epoch == 0:
                log_ratios = all_logprobs(policy, tokenizer, held_out, size) - held_out_reference  # [pairs, 2]
                chosen, rejected = log_ratios.unbind(1)
                result = {"pair_accuracy": (chosen > rejected).float().mean().item()}
                result |= {"chosen_log_ratio": chosen.mean().item(), "rejected_log_ratio": rejected.mean().item()}
                metrics[f"stage{stage}"] |= {f"eval_{name}": value for name, value in result.items()}
            place = {"stage": stage, "preference": preference, "step": step, "epoch": step / steps_per_epoch}
            log_metrics(folder, writer, steps_before + step, place, metrics)

            # 7. Save what the run needs to continue
            if step < steps and (stopped or (args.save_every and step % args.save_every == 0)):
                state = {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row, "results": results}
                state |= {"seconds": time.time() - start_time}
                save_checkpoint(folder, steps_before + step, training_state(trained, optimizers), state)
                if stopped:
                    say(f"stopped in stage {stage} after step {step}; to continue, add --resume --output-dir {folder}")
                    return 128 + (stop or [signal.SIGTERM])[0]  # the status that shells give to the signal

        save_model(policy, tokenizer, folder / f"stage{stage}")
        results.append({"preference": preference, "loss": loss_name, "beta": beta, "pairs": len(pairs), "eval": result})
        rows = [place | pair | {"log_ratios": row} for pair, row in zip(held_out, log_ratios.tolist(), strict=True)]
        append_json(folder / "eval.jsonl", [{name: row[name] for name in row if name != "ids"} for row in rows])

    # ---- The most probable answers to three held-out prompts, before and after. Every rank computes all of them
    prompts = [held_out[i]["prompts"][0] for i in sorted({0, len(held_out) // 3, 2 * len(held_out) // 3})]
    ids, mask = pad(tokenizer, encode(tokenizer, prompts), "left", device)
    how = transformers.GenerationConfig(do_sample=False, eos_token_id=sorted(ends), max_length=longest + 1)
    models = load_model(AutoModelForCausalLM, args.model, "--model", **options), policy.eval()
    answers = [model.generate(ids, attention_mask=mask, generation_config=how, synced_gpus=True) for model in models]

    # ---- P-SACPO: each rank mixes its own shards
    if args.merge_q:
        one = load_model(AutoModelForCausalLM, str(folder / "stage1"), "--merge-q", **options).state_dict()
        two = {name: value.to_local().to("cpu", copy=True) for name, value in policy.state_dict().items()}
    for q in args.merge_q:
        for name, value in policy.state_dict().items():
            value.to_local().copy_((1 - q) * one[name].to_local() + q * two[name].to(device))
        save_model(policy, tokenizer, folder / "merged" / f"q{q:g}")
    if rank == 0:
        (folder / "model").unlink(missing_ok=True)
        (folder / "model").symlink_to(f"stage{len(results)}")  # the result of a run has one name in all scripts
        writer.close()
        summary = {"algorithm": "sacpo", "stages": results, "merged": [f"merged/q{q:g}" for q in args.merge_q]}
        summary |= {"skipped_updates": skipped, "data": {"dataset": count, "eval_dataset": len(held_out)}}
        summary |= environment(args, device, start_time, "pairs", (steps_before + steps) * args.batch_size)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        for result in results:
            print("{preference}, {loss}: held-out pair accuracy {eval[pair_accuracy]:.1%}, chance 50%".format(**result))
        for texts in zip(*(tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in answers), strict=True):
            print("\nbefore  {}\nafter   {}".format(*texts))
        print(f"\n{summary['wall_seconds']:.0f} s; written to {folder}")
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


def load_pairs(args: Args, name, split, flag, preference: str, loss: str, tokenizer, loaded: dict) -> list[dict]:
    """Pairs of a stage as {prompts, responses, ids, desirable}, an entry per response each, the chosen one's first.

    desirable: KTO's label, 1 or 0. Two rows of one response (KTO's form) make a pair. loaded: keeps the examples."""
    limits, counts = (args.max_prompt_length, args.max_length), (1, 2) if loss == "kto" else (2,)
    if (flag, name, counts) not in loaded:
        loaded[flag, name, counts] = load_examples(args, name, split, flag, tokenizer, limits, counts)
    pairs, source = [], f"{flag} {name}"
    column = "better_response_id" if preference == "helpful" else "safer_response_id"
    for example in loaded[flag, name, counts]:
        row, alone = example["row"], len(example["ids"]) == 1
        chosen = 0 if alone else read_label(row, column, source)
        labels = [read_label(row, "label", source)] if alone else [1 - chosen, chosen]
        if (preference, loss, alone) == ("safe", "kto", False):
            labels = [read_label(row, f"is_response_{i}_safe", source) for i in (0, 1)]
        texts = zip([example["prompt"]] * len(labels), example["responses"], example["ids"], labels, strict=True)
        pairs.append(list(texts)[:: -1 if chosen else 1])
    if len(pairs[0]) == 1:  # a desirable response goes with an undesirable one, where there is one
        pairs.sort(key=lambda texts: -texts[0][-1])
        pairs = [one + other for one, other in zip(pairs[: len(pairs) // 2], pairs[-(len(pairs) // 2) :], strict=False)]
    if flag == "--dataset" and 0 < args.train_size < len(pairs):
        drawn = torch.randperm(len(pairs), generator=random_generator(args.seed, "subset"))[: args.train_size]
        pairs = [pairs[i] for i in sorted(drawn.tolist())]
    if loss == "kto" and len({text[-1] for texts in pairs for text in texts}) < 2:
        raise UserError(f"{flag} {name} has only desirable or only undesirable responses; the loss kto needs both")
    names = ("prompts", "responses", "ids", "desirable")
    return [dict(zip(names, zip(*texts, strict=True), strict=True)) for texts in pairs]


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
