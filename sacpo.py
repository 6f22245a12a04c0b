"""SACPO: stepwise alignment, safe RLHF without score models: first one preference, then the other.

A policy π_θ should be helpful (reward R) and safe (cost C). The optimum of the Lagrangian with multiplier λ,

    maximise  E_x E_y [R(x, y) - λ C(x, y)] - β KL(π_θ ‖ π_ref),    π* ∝ π_ref exp((R - λ C) / β)
                                                                       ∝ (π_ref exp(R / β)) exp(-C / (β/λ)),

is the result of two alignments in a row: one to helpfulness from π_ref with β, then one to safety from that policy with
β/λ. The other order gives the same product. Each stage learns from pairs of responses. Its reference is the policy it
starts from. With r(y) = log π_θ(y | x) - log π_ref(y | x) a stage minimises one of

    DPO     -log σ( b (r(y_chosen) - r(y_rejected)) )                                mean over pairs
    KTO     w_D (1 - σ( b (r(y) - z_0) ))  where y is desirable,                     mean over responses
            w_U (1 - σ( b (z_0 - r(y)) ))  where it is not; z_0 = {mean of r over responses to OTHER prompts}^+

where b is β (--beta) if the stage is about helpfulness and β/λ (--beta-over-lambda) if it is about safety, in either
order. P-SACPO gives policies between the stages without training: weights (1 - q) θ_stage1 + q θ_stage2.

Sources: SACPO and P-SACPO (Wachi et al., NeurIPS 2024, arXiv 2404.11049); DPO (Rafailov et al., arXiv 2305.18290); KTO
(Ethayarajh et al., arXiv 2402.01306).

Without flags it runs on the embedded toy world: on a laptop, offline, in about a minute. At the paper's scale:

    torchrun --nproc_per_node 8 sacpo.py --model PKU-Alignment/alpaca-7b-reproduced \
        --dataset PKU-Alignment/PKU-SafeRLHF-30K --eval-dataset PKU-Alignment/PKU-SafeRLHF-30K \
        --prompt-template "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" \
        --stages helpful safe --loss dpo --beta 0.1 --beta-over-lambda 0.025 --merge-q 0.25 0.5 0.75 \
        --train-size 0 --epochs 3 --batch-size 256 --micro-batch-size 16 --learning-rate 2e-5 \
        --max-prompt-length 128 --max-length 512 --gradient-checkpointing
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ...     # on each node
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
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, get_cosine_schedule_with_warmup

TOY = Path(__file__).resolve().parent / "toy"


@dataclass
class Args:
    """Align a language model stepwise with two preferences (SACPO)."""

    exp_name: str = "sacpo"  # name of the run
    seed: int = 1  # seeds everything random
    output_dir: str | None = None  # where the run is written; default runs/<exp-name>-<seed>-<time>
    track: bool = False  # also log to Weights & Biases (needs the wandb package)
    save_every: int = 0  # steps between checkpoints, the newest two are kept; 0 saves only when interrupted
    resume: bool = False  # continue the run in --output-dir from its newest checkpoint, or start it there
    model: str = str(TOY / "policy")  # language model after supervised fine-tuning: the policy and first reference
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where the hardware has it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    dataset: str = str(TOY / "data" / "train.parquet")  # training pairs: jsonl, json, csv, parquet, folder or Hub id
    dataset_split: str = "train"  # split of the training pairs, or a slice such as train[:1000]
    eval_dataset: str = str(TOY / "data" / "test.parquet")  # held-out pairs
    eval_split: str = "test"  # split of the held-out pairs
    train_size: int = 8192  # training pairs at most, drawn at random, the same in both stages; 0 takes all
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


def kto_loss(
    logprobs: Tensor, ref_logprobs: Tensor, desirable: Tensor, z_0: float, beta: float, w_d: float, w_u: float
) -> Tensor:
    """Kahneman-Tversky optimization (arXiv 2402.01306): the loss of each response, judged by itself against z_0.

    logprobs, ref_logprobs: log π(y | x) in nats; desirable: KTO's labels; all of one shape. z_0: the reference point,
    one number for the global batch, without gradient. w_d, w_u: weights of (un)desirable responses.
    """
    log_ratio = logprobs - ref_logprobs
    desirable_loss = w_d * (1 - F.sigmoid(beta * (log_ratio - z_0)))
    undesirable_loss = w_u * (1 - F.sigmoid(beta * (z_0 - log_ratio)))
    return torch.where(desirable, desirable_loss, undesirable_loss)


def mismatch(batch: list[dict], max_length: int) -> list[dict]:
    """Each pair's responses after the batch's next different prompt, for KTO's z_0; [] if all prompts are equal."""
    crossed = []
    for i, pair in enumerate(batch if len({pair["prompt"] for pair in batch}) > 1 else []):
        other = next(other for other in batch[i:] + batch[:i] if other["prompt"] != pair["prompt"])
        ids = [(x, y[: max_length - len(x)]) for (x, _), (_, y) in zip(other["ids"], pair["ids"], strict=True)]
        crossed.append(pair | {"prompt": other["prompt"], "ids": ids})
    return crossed


def response_logprobs(policy, ids: Tensor, mask: Tensor, length: int, temperature: float) -> Tensor:
    """Log-probabilities of the last `length` tokens under the tempered distribution, [batch, length]."""
    inputs = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
    logits = policy(input_ids=ids, logits_to_keep=length + 1, **inputs).logits[:, :-1]  # [batch, length, vocabulary]
    # A few positions at a time, recomputed in the backward pass: float32 logits of a whole batch would take gigabytes.
    # On a CPU, smaller chunks are fastest because they stay in its cache.
    step = max(1, (2**24 if logits.is_cuda else 2**20) // (logits.shape[0] * logits.shape[2]))
    chunks = zip(logits.split(step, 1), ids[:, -length:].split(step, 1), strict=True)
    return torch.cat([checkpoint(token_logprobs, *chunk, temperature, use_reentrant=False) for chunk in chunks], 1)


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
    logprobs = response_logprobs(policy, ids, attention_mask, mask.shape[1], 1.0)  # [2 pairs, response]
    return logprobs.masked_fill(mask == 0, 0.0).sum(1).unflatten(0, (-1, 2))


@torch.no_grad()
def all_logprobs(policy, tokenizer, pairs: list[dict], micro_batch_size: int) -> Tensor:
    """pair_logprobs of many pairs, [pairs, 2]: every rank reads its share, and all get the whole."""
    rank, world, count = dist.get_rank(), dist.get_world_size(), len(pairs)
    order = torch.tensor([max(len(x) + len(y) for x, y in pair["ids"]) for pair in pairs]).argsort(stable=True)
    # FSDP2 needs equally many passes from each rank, so the last pairs of some are repeats, which do not count.
    places = torch.arange(rank, rank + math.ceil(count / world) * world, world)
    parts = order[places % count].split(micro_batch_size)  # texts of similar length together: little padding
    values = torch.cat([pair_logprobs(policy, tokenizer, [pairs[row] for row in rows]) for rows in parts])
    logprobs, own = torch.zeros(count, 2, device=policy.device), places < count
    logprobs[order[places[own]]] = values[own]
    dist.all_reduce(logprobs)
    reshard(policy)
    return logprobs


def main(args: Args, device: torch.device, mesh) -> int:
    start_time = time.time()
    rank, world = dist.get_rank(), dist.get_world_size()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # the instruction sets it supports
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if fast else "float32"
    losses = args.loss * len(args.stages) if len(args.loss) == 1 else args.loss
    if not 0 < len(set(args.stages)) == len(args.stages) == len(losses) or len(args.stages) < 1 + bool(args.merge_q):
        raise UserError("--stages takes helpful, safe or both, each once; --loss one, or one per stage; --merge-q both")

    # ---- Pairs, output directory, model
    say(f"loading data and model; computing in {args.dtype} on {device.type}")
    tokenizer = load_tokenizer(args.model, "--model")
    train_pairs = load_pairs(args, args.dataset, args.dataset_split, "--dataset", tokenizer, losses, args.train_size)
    eval_pairs = load_pairs(args, args.eval_dataset, args.eval_split, "--eval-dataset", tokenizer, losses)
    count = len(train_pairs[args.stages[0]])
    least = 2 if "kto" in losses else 1
    if args.batch_size % world or not least <= args.batch_size <= count or min(args.epochs, args.micro_batch_size) < 1:
        limits = f"a multiple of {world} (processes) from {least} to {count} (training pairs)"
        raise UserError(f"--batch-size must be {limits}, --micro-batch-size and --epochs at least 1")
    for preference, loss_name in zip(args.stages, losses, strict=True):
        if loss_name == "kto" and len({label for pair in train_pairs[preference] for label in pair["desirable"]}) < 2:
            raise UserError("--dataset has only safe or only unsafe responses, and the loss kto needs both; use dpo")
    folder, saved, writer = open_run(args)
    if saved is None:
        say(f"the run in {folder} is finished")
        return 0
    ids = [ids for pairs in (train_pairs, eval_pairs) for pair in pairs[args.stages[0]] for ids in pair["ids"]]
    longest = max(len(x) + len(y) for x, y in ids)
    if "kto" in losses:  # z_0 is read on other combinations
        longest = min(args.max_length, max(len(x) for x, _ in ids) + max(len(y) for _, y in ids))
    options = dict(mesh=mesh, dtype=getattr(torch, args.dtype), longest=longest)
    policy = load_model(AutoModelForCausalLM, args.model, "--model", **options).train()  # there is no dropout
    if args.gradient_checkpointing:
        (getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable)()
    local, size = args.batch_size // world, args.micro_batch_size
    local_rows = slice(rank * local, (rank + 1) * local)  # this rank's part of a global batch
    steps_per_epoch = count // args.batch_size
    steps = args.epochs * steps_per_epoch
    stages_done, done = divmod(saved.get("step", 0), steps)
    skipped, skipped_in_a_row = saved.get("skipped", 0), saved.get("skipped_in_a_row", 0)
    start_time, results = start_time - saved.get("seconds", 0.0), saved.get("results", [])
    stop, alone = [], "RANK" not in os.environ  # SIGTERM and the first Ctrl-C save and stop; torchrun repeats Ctrl-C
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(130) if stop and alone else stop.append(number))

    for stage, preference, loss_name in list(zip((1, 2), args.stages, losses, strict=False))[stages_done:]:
        # 1. The batches of this stage: a new order every epoch, whose last incomplete batch is left out
        beta = args.beta if preference == "helpful" else args.beta_over_lambda
        pairs, held_out, batches = train_pairs[preference], eval_pairs[preference], []
        for epoch in range(args.epochs):
            order = torch.randperm(count, generator=random_generator(args.seed, "pairs", preference, epoch))
            batches += order[: steps_per_epoch * args.batch_size].split(args.batch_size)
        labels = [label for pair in pairs for label in pair["desirable"]]
        w_undesirable = sum(labels) / (len(labels) - sum(labels))  # desirable responses per undesirable one

        # 2. The reference is the policy that the stage starts from: read once, before the first update
        say(f"stage {stage}: reading the log-probabilities of the reference")
        shapes = {"pairs": (len(pairs), 2), "held_out": (len(held_out), 2)}
        shapes |= {"crossed": (len(batches), args.batch_size, 2)} if loss_name == "kto" else {}
        reference = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        stored = {f"reference.{name}": value for name, value in reference.items()}
        group = {"params": list(policy.parameters()), "initial_lr": args.learning_rate}
        adam = dict(lr=args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
        trained, optimizers = {"policy": policy}, {"policy": torch.optim.AdamW([group], **adam)}
        if done:
            reader = dcp.HuggingFaceStorageReader(saved["checkpoint"])
            dcp.load(training_state(trained, optimizers) | stored, storage_reader=reader)
        else:
            reference["pairs"].copy_(all_logprobs(policy, tokenizer, pairs, size))
            reference["held_out"].copy_(all_logprobs(policy, tokenizer, held_out, size))
            for batch, logprobs in zip(batches, reference.get("crossed", ()), strict=False):
                if crossed := mismatch([pairs[i] for i in batch], args.max_length):
                    logprobs.copy_(all_logprobs(policy, tokenizer, crossed, size))
        warmup = min(math.ceil(args.warmup_ratio * steps), steps - 1)  # the first warm-up step has rate 0
        schedule = get_cosine_schedule_with_warmup(optimizers["policy"], warmup, steps, last_epoch=done - 1)

        title = f"stage {stage}: {preference}, {loss_name}"
        bar = tqdm(range(done + 1, steps + 1), title, steps, initial=done, disable=rank != 0)
        for step in bar:
            # 3. KTO's reference point, over the global batch
            batch, z_0, log_ratio_sum = batches[step - 1], 0.0, 0.0
            if loss_name == "kto" and (crossed := mismatch([pairs[i] for i in batch], args.max_length)):
                for rows in torch.arange(args.batch_size)[local_rows].split(size):
                    with torch.no_grad():
                        logprobs = pair_logprobs(policy, tokenizer, [crossed[row] for row in rows])
                    log_ratio_sum += (logprobs - reference["crossed"][step - 1][rows]).sum().item()
                z_0 = max(0.0, global_sum(z_0=log_ratio_sum)["z_0"] / (2 * args.batch_size))

            # 4. Losses and gradients. FSDP averages gradients over ranks; the factor `world` makes that a sum
            sums = dict.fromkeys(("loss", "pair_accuracy", "chosen_log_ratio", "rejected_log_ratio"), 0.0)
            for rows in batch[local_rows].split(size):
                chunk, ref = [pairs[row] for row in rows], reference["pairs"][rows]  # [rows, 2]
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
                log_ratios = all_logprobs(policy, tokenizer, held_out, size) - reference["held_out"]  # [pairs, 2]
                chosen, rejected = log_ratios.unbind(1)
                result = {"pair_accuracy": (chosen > rejected).float().mean().item()}
                result |= {"chosen_log_ratio": chosen.mean().item(), "rejected_log_ratio": rejected.mean().item()}
                metrics[f"stage{stage}"] |= {f"eval_{name}": value for name, value in result.items()}
            place = {"stage": stage, "preference": preference, "step": step, "epoch": step / steps_per_epoch}
            log_metrics(folder, writer, (stage - 1) * steps + step, place, metrics)

            # 7. Save what the run needs to continue
            if step < steps and (stopped or (args.save_every and step % args.save_every == 0)):
                state = {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row, "results": results}
                state |= {"seconds": time.time() - start_time}
                save_checkpoint(folder, (stage - 1) * steps + step, training_state(trained, optimizers) | stored, state)
                if stopped:
                    say(f"stopped in stage {stage} after step {step}; to continue, add --resume --output-dir {folder}")
                    return 128 + (stop or [signal.SIGTERM])[0]  # the status that shells give to the signal

        done = 0
        save_model(policy, tokenizer, folder / f"stage{stage}")
        results.append({"preference": preference, "loss": loss_name, "beta": beta, "eval": result})
        shown = [{name: value for name, value in pair.items() if name != "ids"} for pair in held_out]
        rows = [place | pair | {"log_ratios": row} for pair, row in zip(shown, log_ratios.tolist(), strict=True)]
        append_json(folder / "eval.jsonl", rows)

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
        summary = {"algorithm": "sacpo", "skipped_updates": skipped, "stages": results, "eval_pairs": len(held_out)}
        data, merged = {"dataset": count, "eval_dataset": len(held_out)}, [f"merged/q{q:g}" for q in args.merge_q]
        summary |= {"data": data, "merged": merged}
        summary |= environment(args, device, start_time, "pairs", len(results) * steps * args.batch_size)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        for result in results:
            figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result["eval"].items())
            print(f"{result['preference']} by {result['loss']}: held-out {figures}")
        print(f"{summary['wall_seconds']:.0f} s; written to {folder}")
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


def load_pairs(args: Args, name: str, split: str, flag: str, tokenizer, losses, size: int = 0) -> dict[str, list[dict]]:
    """For each preference the same pairs, in the same order; with `size`, so many drawn at random.

    A pair is {prompt, responses, ids, desirable}; the last three have an entry per response, the chosen one's first.
    ids: tokens of the prompt, tokens of the response with EOS. desirable: KTO's label, 1 or 0.
    """
    rows, source, limit = load_rows(name, split, flag), f"{flag} {name}", args.max_prompt_length
    prompts, *responses = (read_column(rows, column, source) for column in ("prompt", "response_0", "response_1"))
    heads = encode(tokenizer, args.prompt_template, prompts)
    kept = [row for row, head in enumerate(heads) if 0 < len(head) <= limit]
    say(f"{flag}: kept {len(kept)} of {len(rows)} pairs, dropped those with prompts over --max-prompt-length {limit}")
    if not kept:
        raise UserError(f"{source}: all prompts are over --max-prompt-length {limit}")
    if 0 < size < len(kept):
        drawn = torch.randperm(len(kept), generator=random_generator(args.seed, "subset"))[:size]
        kept = [kept[i] for i in sorted(drawn.tolist())]
    encoded, pairs = [{}, {}], {}  # ids of both responses by row
    for i in (0, 1):
        texts = [prompts[row] for row in kept], [responses[i][row] for row in kept]
        for row, ids in zip(kept, encode(tokenizer, args.prompt_template, *texts), strict=True):
            ids = ids[: args.max_length]  # a tokenizer may join the end of a prompt with what follows
            start = min(len(os.path.commonprefix([ids, heads[row]])), len(ids) - 1)
            encoded[i][row] = (ids[:start], ids[start:])
    for preference, loss in zip(args.stages, losses, strict=True):
        column = "better_response_id" if preference == "helpful" else "safer_response_id"
        chosen, pairs[preference] = read_column(rows, column, source, labels=True), []
        labels = [[1 - value for value in chosen], chosen]  # KTO's, for both responses
        if (preference, loss) == ("safe", "kto"):
            labels = [read_column(rows, f"is_response_{i}_safe", source, labels=True) for i in (0, 1)]
        for row in kept:
            order = (int(chosen[row]), 1 - int(chosen[row]))
            columns = {"responses": responses, "ids": encoded, "desirable": labels}
            both = {name: [values[i][row] for i in order] for name, values in columns.items()}
            pairs[preference].append({"prompt": prompts[row]} | both)
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
