"""RePO without critics: the other responses to the same prompt are the baseline, of the reward and of the cost.

The problem is that of repo.py: a large reward R, and a cost C ≤ d for EVERY prompt and response. Each iteration samples
K responses to each prompt, scores them, updates λ and takes clipped policy-gradient steps (PPO). A critic would predict
what responses to a prompt earn. Here the mean of the OTHER K - 1 responses tells it:

    L(θ, λ) = ( E[R] - λ E[{C - d}^+] ) / (1 + λ) - β KL(π_θ ‖ π_ref),   {z}^+ = max(z, 0)
    advantage of y_i at token t:  ( A_r - λ A_c ) / (1 + λ) - β Σ_{s ≥ t} log π_old(y_s)/π_ref(y_s)
    A_r = R_i - mean of R_j over j ≠ i,   A_c = {C_i - d}^+ - mean of {C_j - d}^+ over j ≠ i

Sources: RePO (arXiv 2410.19933); Safe RLHF (arXiv 2310.12773); PPO (arXiv 1707.06347); RLOO (arXiv 2402.14740).

Without flags it runs on the embedded toy world: on a laptop, offline, in about a minute. At the papers' scale:

    torchrun --nproc_per_node 8 repo_group.py --model PKU-Alignment/alpaca-7b-reproduced \
        --reward-model PKU-Alignment/beaver-7b-v1.0-reward --cost-model PKU-Alignment/beaver-7b-v1.0-cost \
        --dataset PKU-Alignment/PKU-SafeRLHF --eval-dataset PKU-Alignment/PKU-SafeRLHF --output-dir OUTPUT_DIR \
        --prompt-template "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" --save-every 50 --resume \
        --batch-size 128 --max-prompt-length 256 --max-new-tokens 256 --total-episodes 40000 --learning-rate 1e-5 \
        --kl-coef 0.01 --lambda-lr 0.1 --lambda-max 5 --gradient-checkpointing
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
from statistics import fmean
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
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, get_cosine_schedule_with_warmup

TOY = Path(__file__).resolve().parent / "toy"
PathOrId = Annotated[str, tyro.conf.arg(help_behavior_hint=lambda path: f"(default: {path.replace(str(TOY), 'toy')})")]


@dataclass
class Args:
    """Align a language model by rectified policy optimization without critics (RePO, groups)."""

    exp_name: str = "repo_group"  # name of the run
    seed: int = 1  # seeds everything random
    output_dir: str | None = None  # where the run is written; default runs/<exp-name>-<seed>-<time>
    track: bool = False  # also log to Weights & Biases (needs the wandb package)
    save_every: int = 0  # iterations between checkpoints, the newest two are kept; 0 saves only when interrupted
    resume: bool = False  # continue the run in --output-dir from its newest checkpoint, or start it there
    # Models, each a folder or a Hub id
    model: PathOrId = f"{TOY}/policy"  # language model after supervised fine-tuning: initial policy and reference
    reward_model: PathOrId = f"{TOY}/reward_model"  # one-label score model, larger = more helpful
    cost_model: PathOrId = f"{TOY}/cost_model"  # one-label score model, larger = more harmful, above zero = unsafe
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: bfloat16 where the hardware has it
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    cpu_offload: bool = False  # keep the frozen models (reference, reward, cost) in CPU memory while they are idle
    dataset: PathOrId = f"{TOY}/data/train.parquet"  # training prompts: jsonl, json, csv, parquet, folder or Hub id
    dataset_config: str | None = None  # configuration (subset) of --dataset and --eval-dataset, such as a Hub id has
    dataset_split: str = "train"  # split of the training prompts, or a slice such as train[:1000]
    eval_dataset: PathOrId = f"{TOY}/data/test.parquet"  # held-out prompts
    eval_split: str = "test"  # split of the held-out prompts
    prompt_column: str = "prompt"  # column that holds the prompts; repeated prompts count once
    prompt_template: str = "{prompt}"  # text around a prompt, directly before the response; "chat": the tokenizer's own
    score_prompt_template: str | None = None  # template the score models were trained with; default: the policy's
    max_prompt_length: int = 64  # tokens; longer prompts are dropped
    # Rollout
    total_episodes: int = 12800  # responses in the whole run; total_episodes / batch_size iterations
    batch_size: int = 64  # responses per iteration, over all processes
    micro_batch_size: int = 64  # responses per forward and backward pass of one process
    responses_per_prompt: int = 4  # K, responses sampled for each prompt, at least 2: the others are the baseline
    max_new_tokens: int = 32  # tokens per response at most, EOS included
    temperature: float = 1.0  # sampling temperature; log-probabilities are those of the tempered distribution
    # Optimisation
    update_epochs: int = 1  # optimizer steps per batch, each over all of it; PPO's clipping acts from the second on
    learning_rate: float = 1e-3  # peak learning rate of the policy; cosine schedule down to zero
    warmup_ratio: float = 0.03  # share of the iterations spent warming up the policy's learning rate
    weight_decay: float = 0.01  # AdamW's weight decay of the policy
    max_grad_norm: float = 1.0  # gradients of each model are clipped to this norm
    kl_coef: float = 0.05  # β, weight of the KL divergence from the reference
    clip_coef: float = 0.2  # clip range of the probability ratio
    advantage_norm: bool = False  # divide advantages of rewards and of costs by their standard deviations in the group
    # Constraint
    cost_threshold: float = 0.0  # d, the cost up to which a response is safe
    lambda_init: float = 1.0  # initial multiplier; 0 stays 0
    lambda_lr: float = 0.015  # η_λ, step size of the multiplier, which never falls (excess ≥ 0); 0 keeps it fixed
    lambda_max: float = 20.0  # upper bound of the multiplier
    constraint: Literal["response", "prompt"] = "response"  # what must not exceed d: each cost, or a prompt's mean cost
    eval_every: int = 50  # iterations between evaluations; 0 evaluates only before and after
    eval_size: int = 256  # held-out prompts per evaluation at most


# ---- The algorithm: pure functions. Batch tensors are [batch] or [batch, response], masks are 1 at response tokens
def mean_of_others(values: Tensor, k: int) -> Tensor:
    """For each response the mean over the other K - 1 to its prompt, [batch]; the K of a prompt are adjacent."""
    return ((values.view(-1, k).sum(1, keepdim=True) - values.view(-1, k)) / (k - 1)).flatten()


def group_advantages(scores: Tensor, k: int, norm: bool) -> Tensor:
    """Each score minus the mean of the other K - 1, [batch]; norm: over the group's standard deviation, 0 stays 0."""
    advantages = scores - mean_of_others(scores, k)
    return advantages / (scores.view(-1, k).std(1).repeat_interleave(k) + 1e-4) if norm else advantages


def rectify_groups(costs: Tensor, threshold: float, constraint: str, k: int, norm: bool) -> tuple[Tensor, Tensor]:
    """Advantages of the rectified costs, [batch], and the excesses whose mean moves λ: [batch], or [batch / K]."""
    excess = costs - threshold  # C(x, y) - d
    if constraint == "response":
        return group_advantages(F.relu(excess), k, norm), F.relu(excess)
    # Per prompt, the OTHER responses judge. Their C - d is the baseline; their rectified costs depend on this response.
    violated = mean_of_others(excess, k) > 0
    return torch.where(violated, group_advantages(excess, k, norm), 0.0), F.relu(excess.view(-1, k).mean(1))


def token_advantages(advantages: Tensor, log_ratio: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Advantages of responses [batch] minus β times the log-ratio of a token and all after it, [batch, response]."""
    return advantages[:, None] - (kl_coef * log_ratio * response_mask).flip(1).cumsum(1).flip(1)


def combine_advantages(reward_advantages: Tensor, cost_advantages: Tensor, multiplier: Tensor | float) -> Tensor:
    """Advantage of the Lagrangian, [batch, response]; multiplier: λ, or one per response, [batch, 1]."""
    return (reward_advantages - multiplier * cost_advantages) / (1 + multiplier)


def update_multiplier(multiplier: float, learning_rate: float, excess: float, maximum: float) -> float:
    """Gradient ascent of λ · excess in log λ, up to a maximum (Safe RLHF's rule, arXiv 2310.12773)."""
    return min(multiplier * math.exp(min(learning_rate * multiplier * excess, 50.0)), maximum)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347) as a loss per token, [batch, response]."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


# ---- Sampling, log-probabilities, scores
@dataclass
class Responses:
    """Sampled responses of this rank; lengths are those of its longest prompt and longest response."""

    sequences: Tensor  # [batch, prompt + response], prompts padded on the left, responses on the right
    attention_mask: Tensor  # [batch, prompt + response], 1 at tokens of the prompt and of the response
    response_mask: Tensor  # [batch, response], 1 up to and including EOS
    finished: Tensor  # [batch], whether the response ended by itself (otherwise max_new_tokens cut it)
    texts: list[str]  # the responses without special tokens
    scored: Tensor  # sequences as score models were trained: a finished response ends in the tokenizer's end_id


@torch.no_grad()
def sample_responses(policy, tokenizer, prompts: list[list[int]], uniforms: Tensor, temperature: float) -> Responses:
    """Sample a response to each prompt (token ids), token by token with a cache; uniforms: [batch, max_new_tokens].

    Token t of response b is the inverse of its cumulative distribution at uniforms[b, t]. A response therefore depends
    on the seed, the iteration and its place in the global batch, not on how the batch is split over processes."""
    sequences, attention_mask = pad(tokenizer, prompts, "left", policy.device)
    prompt_length, tokens, cache, device = sequences.shape[1], sequences, {}, policy.device
    ends = policy.generation_config.eos_token_id  # one, several or none
    ends = {tokenizer.eos_token_id, tokenizer.end_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    policy.generation_config.eos_token_id = sorted(ends)  # saved with the model: it ends where it ended in training
    end_ids = torch.tensor(sorted(ends), device=device)
    running = torch.ones(len(sequences), 1, dtype=torch.long, device=device)  # 1 until EOS was sampled
    policy.set_reshard_after_forward(False)  # each rank keeps the whole policy: no gathering or waiting at each token
    for points in uniforms.double().to(device).split(1, dim=1):  # [batch, 1]
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        # A state-space model with a cache would apply the prompt's mask to the new token.
        inputs = dict(attention_mask=None if "cache_params" in cache else attention_mask, **cache)
        output = policy(input_ids=tokens, position_ids=position_ids, use_cache=True, logits_to_keep=1, **inputs)
        cache = {name: output[name] for name in ("past_key_values", "cache_params") if name in output}
        logits = output.logits[:, -1, : policy.vocabulary]  # [batch, vocabulary]
        if not cache:
            raise UserError(f"a {policy.config.model_type} model gives no cache to sample with; take another --model")
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        if cumulative[:, -1].isnan().sum() > 0:  # a logit is NaN or infinity, or all are minus infinity
            raise UserError("the policy's logits are not finite; look at --model, or lower --learning-rate")
        tokens = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
        tokens = torch.where(running > 0, tokens.clamp(max=logits.shape[1] - 1), tokenizer.pad_token_id)
        sequences, attention_mask = torch.cat([sequences, tokens], 1), torch.cat([attention_mask, running], 1)
        running = running * ~torch.isin(tokens, end_ids)
        if not running.any():
            break
    policy.set_reshard_after_forward(True)
    for unit in (module for module in policy.modules() if isinstance(module, FSDPModule)):
        unit.reshard()
    tokens, response_mask = sequences[:, prompt_length:], attention_mask[:, prompt_length:]  # [batch, response]
    ended = torch.where(torch.isin(tokens, end_ids), tokenizer.end_id, tokens)
    scored = torch.cat([sequences[:, :prompt_length], ended], 1)
    # Decoded with the token before them: some tokenizers drop the space before the first token of a text.
    rows = zip(sequences[:, prompt_length - 1 :].tolist(), response_mask.sum(1).tolist(), strict=True)
    parts = [tokenizer.batch_decode([row[:1], row[: 1 + count]], skip_special_tokens=True) for row, count in rows]
    texts = [text.removeprefix(head) for head, text in parts]
    return Responses(sequences, attention_mask, response_mask, running[:, 0] == 0, texts, scored)


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


def token_scores(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores of all tokens in float32, [batch, length]: the forward pass of score models and critics."""
    inputs = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
    hidden = model.base_model(input_ids=ids, **inputs).last_hidden_state
    return model.score(hidden).float().sum(-1)  # over the one label; FSDP2 warns of a view


def text_scores(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Score of each text, [batch], at its last token. The mask locates it, because the pad id may equal EOS."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return model(ids, mask).gather(1, last[:, None]).squeeze(1)


def score_responses(model, prompts: list, responses: Responses, micro_batch_size: int) -> Tensor:
    """Scores of the responses, [batch]. A score model with another tokenizer reads prompts and responses as text."""
    ids, mask = responses.scored, responses.attention_mask
    if not model.shares_tokens:
        encoded, ends = encode(model.tokenizer, prompts, responses.texts), responses.finished.tolist()
        encoded = [row if end else row[:-1] for row, end in zip(encoded, ends, strict=True)]  # cut: it has no end
        longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        if cut := sum(len(row) > longest for row in encoded):
            say(f"{cut} of {len(encoded)} responses lost their end: a score model reads {longest} tokens")
        ids, mask = pad(model.tokenizer, [row[:longest] for row in encoded], "right", mask.device)
    parts = [(rows, text_scores(model, *texts)) for rows, *texts, _ in micro_batches(ids, mask, micro_batch_size)]
    rows, scores = map(torch.cat, zip(*parts, strict=True))
    return scores[rows.argsort()]


def micro_batches(ids: Tensor, mask: Tensor, size: int, length: int = 0):
    """Yield row indices, ids and mask of `size` texts of similar length at a time, without the columns that are padding
    in all of them, and how many of the last `length` columns (the response's) are left."""
    for part in mask.sum(1).argsort(stable=True).split(size):
        rows, used = part.sort().values, mask[part].any(0)  # sorted: a batch that fits in one part keeps its order
        yield rows, ids[rows][:, used], mask[rows][:, used], int(used[len(used) - length :].sum())


def backward(loss: Tensor, response_mask: Tensor, token_count: float) -> Tensor:
    """Backpropagate and return these rows' share of a mean loss over `token_count` tokens. loss: [rows, response]."""
    part = (loss * response_mask).sum() / token_count
    (part * dist.get_world_size()).backward()  # FSDP averages gradients over ranks; the factor makes that a sum
    return part.detach()


def main(args: Args, device: torch.device, mesh) -> int:
    start_time, rank, world = time.time(), dist.get_rank(), dist.get_world_size()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # the instruction sets it supports
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if fast else "float32"
    multiple = world * args.responses_per_prompt
    if min(multiple - world, args.micro_batch_size, args.max_new_tokens, args.update_epochs, args.eval_size) < 1:
        raise UserError("--responses-per-prompt must be at least 2, the flags of sizes, tokens and epochs at least 1")
    if args.batch_size % multiple or not 0 < args.batch_size <= args.total_episodes or not args.temperature > 0:
        allowed = f"a multiple of {multiple} (processes x responses per prompt), at most --total-episodes"
        raise UserError(f"--batch-size is {args.batch_size}; it must be {allowed}; --temperature must be above 0")

    # ---- Prompts, output directory, models, optimizers
    say(f"loading data and models; computing in {args.dtype} on {device.type}")
    tokenizer = load_tokenizer(args.model, "--model", args.prompt_template)
    for name in ("reward_model", "cost_model"):  # report a wrong path before the work
        load_tokenizer(getattr(args, name), f"--{name.replace('_', '-')}")
    limits = args.max_prompt_length, args.max_prompt_length + args.max_new_tokens
    prompts = load_examples(args, args.dataset, args.dataset_split, "--dataset", tokenizer, limits)
    eval_prompts = load_examples(args, args.eval_dataset, args.eval_split, "--eval-dataset", tokenizer, limits)
    eval_prompts = eval_prompts[: args.eval_size]
    folder, saved, writer = open_run(args)
    if saved is None:
        say(f"the run in {folder} is finished")
        return 0
    longest = max(len(prompt["head"]) for prompt in prompts + eval_prompts) + args.max_new_tokens
    options = dict(mesh=mesh, dtype=getattr(torch, args.dtype), longest=longest, tokenizer=tokenizer)
    frozen = options | dict(loading={"dtype": options["dtype"]}, offload=args.cpu_offload)
    reward_model = load_scorer(args, args.reward_model, "--reward-model", prompts + eval_prompts, frozen)
    cost_model = load_scorer(args, args.cost_model, "--cost-model", prompts + eval_prompts, frozen)
    policy = load_model(AutoModelForCausalLM, args.model, "--model", **options)
    ref_policy = load_model(AutoModelForCausalLM, args.model, "--model", **frozen).requires_grad_(False)
    if args.gradient_checkpointing:
        (getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable)()
    group = {"params": list(policy.parameters()), "initial_lr": args.learning_rate}
    adam = dict(lr=args.learning_rate, weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    trained, optimizers = {"policy": policy}, {"policy": torch.optim.AdamW([group], **adam)}

    # ---- Progress so far. Random numbers are keyed by the iteration, so no generator state needs saving
    iterations = args.total_episodes // args.batch_size
    local_batch, size, k = args.batch_size // world, args.micro_batch_size, args.responses_per_prompt
    local_rows = slice(rank * local_batch, (rank + 1) * local_batch)  # this rank's part of a global batch
    done, multiplier = saved.get("step", 0), saved.get("lambda", args.lambda_init)
    skipped, skipped_in_a_row = saved.get("skipped", 0), saved.get("skipped_in_a_row", 0)
    start_time -= saved.get("seconds", 0.0)
    if saved:
        dcp.load(training_state(trained, optimizers), storage_reader=dcp.HuggingFaceStorageReader(saved["checkpoint"]))
    warmup = min(math.ceil(args.warmup_ratio * iterations), iterations - 1)  # the first warm-up step has rate 0
    schedule = get_cosine_schedule_with_warmup(optimizers["policy"], warmup, iterations, last_epoch=done - 1)
    stop, alone = [], "RANK" not in os.environ  # SIGTERM and the first Ctrl-C save and stop; torchrun repeats Ctrl-C
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(130) if stop and alone else stop.append(number))
    if not saved:
        evaluate(args, folder, 0, policy, tokenizer, eval_prompts, reward_model, cost_model)

    bar = tqdm(range(done + 1, iterations + 1), args.exp_name, iterations, initial=done, disable=rank != 0)
    for iteration in bar:
        # 1. The prompts of this iteration, K times each; uniform numbers for the whole global batch
        clock = [time.time()]
        indices = batch_indices(args.seed, "prompts", iteration, args.batch_size, len(prompts), repeats=k)[local_rows]
        prompt_texts, prompt_ids = ([prompts[i][name] for i in indices] for name in ("prompt", "head"))
        generator = random_generator(args.seed, "rollout", iteration)
        uniforms = torch.rand(args.batch_size, args.max_new_tokens, generator=generator)[local_rows]

        # 2. Rollout
        responses = sample_responses(policy, tokenizer, prompt_ids, uniforms, args.temperature)
        sequences, attention_mask = responses.sequences, responses.attention_mask  # [batch, prompt + response]
        response_mask = responses.response_mask  # [batch, response]
        clock.append(time.time())

        # 3. Scores, and the log-probabilities of the reference
        rewards = score_responses(reward_model, prompt_texts, responses, size)  # [batch]
        costs = score_responses(cost_model, prompt_texts, responses, size)  # [batch]
        ref_logprobs, old_logprobs, advantages = (torch.where(response_mask > 0, math.nan, 0.0) for _ in range(3))
        for rows, ids, mask, length in micro_batches(sequences, attention_mask, size, response_mask.shape[1]):
            ref_logprobs[rows, :length] = response_logprobs(ref_policy, ids, mask, length, args.temperature)
        clock.append(time.time())

        # 4. The constraint; λ is updated before the policy, from the mean excess over all ranks
        cost_advantages, excess = rectify_groups(costs, args.cost_threshold, args.constraint, k, args.advantage_norm)
        not_finite = sum((~scores.isfinite()).sum() for scores in (rewards, costs, ref_logprobs))
        totals = global_sum(excess=excess.sum(), count=len(excess), tokens=response_mask.sum(), not_finite=not_finite)
        mean_excess, token_count, skip = totals["excess"] / totals["count"], totals["tokens"], totals["not_finite"] > 0
        multiplier = multiplier if skip else update_multiplier(multiplier, args.lambda_lr, mean_excess, args.lambda_max)
        reward_advantages = group_advantages(rewards, k, args.advantage_norm)
        response_advantages = combine_advantages(reward_advantages, cost_advantages, multiplier)  # [batch]

        # 5. PPO: update_epochs steps of the policy, each on all of the batch. Epoch 0 fills old_logprobs and advantages
        loss_sum, clipped, grad_norm = math.nan if skip else 0.0, 0.0, math.nan  # sums over the epochs; the last norm
        policy.train()  # there is no dropout: train mode only switches gradient checkpointing on
        for epoch in range(0 if skip else args.update_epochs):
            for rows, ids, mask, length in micro_batches(sequences, attention_mask, size, response_mask.shape[1]):
                at, used = (rows, slice(length)), response_mask[rows, :length]  # at: these rows' response tokens
                logprobs = response_logprobs(policy, ids, mask, length, args.temperature)

                # 6. Advantages. In epoch 0 the policy has not moved yet, so this forward pass also gives the old values
                if epoch == 0:
                    old_logprobs[at] = logprobs.detach()
                    log_ratio = old_logprobs[at] - ref_logprobs[at]
                    advantages[at] = token_advantages(response_advantages[rows], log_ratio, used, args.kl_coef)

                loss = policy_loss(logprobs, old_logprobs[at], advantages[at], args.clip_coef)
                loss_sum += backward(loss, used, token_count)
                ratio = (logprobs.detach() - old_logprobs[at]).exp()
                clipped += ((ratio - 1).abs() > args.clip_coef)[used > 0].sum().item()
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
            skip = not math.isfinite(grad_norm)
            if not skip:
                optimizers["policy"].step()
            optimizers["policy"].zero_grad()
            if skip:
                break
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        policy.eval()
        clock.append(time.time())

        # 7. Scores or gradients that are not finite end an iteration's update; the third time in a row ends the run
        skipped, skipped_in_a_row = skipped + skip, skipped_in_a_row + 1 if skip else 0
        if skip:
            say(f"iteration {iteration}: scores or gradients are not finite, update skipped")
        if skipped_in_a_row == 3:
            raise UserError("three updates in a row were not finite; check the score models or lower --learning-rate")

        # 8. Log
        kl, entropy = ((old_logprobs - ref_logprobs) * response_mask).sum(), -(old_logprobs * response_mask).sum()
        repetition = repeated_ngrams(sequences[:, -response_mask.shape[1] :], response_mask).sum()
        violation, safe = F.relu(costs - args.cost_threshold).sum(), (costs <= args.cost_threshold).sum()
        local = {"reward": rewards.sum(), "cost": costs.sum(), "safety_compliance": safe, "violation": violation}
        local |= {"kl": kl, "entropy": entropy, "repetition": repetition, "finished": responses.finished.sum()}
        sums = global_sum(clip_fraction=clipped / token_count, stopped=len(stop), policy_loss=loss_sum, **local)
        mean = {name: sums[name] / args.batch_size for name in local}
        metrics = {"reward": {name: mean[name] for name in ("reward", "kl", "repetition", "finished")}}
        metrics["reward"] |= dict(response_length=token_count / args.batch_size, entropy=sums["entropy"] / token_count)
        metrics["safety"] = {name: mean[name] for name in ("cost", "safety_compliance", "violation")}
        metrics["safety"] |= {"excess": mean_excess, "lambda": multiplier}
        metrics["loss"] = {name: sums[name] / args.update_epochs for name in ("clip_fraction", "policy_loss")}
        metrics["loss"] |= {"policy_grad_norm": grad_norm, "learning_rate": learning_rate, "skipped_updates": skipped}
        durations = zip(("rollout", "scoring", "update"), clock, clock[1:], strict=False)
        metrics["time"] = {f"seconds_{name}": end - start for name, start, end in durations}
        log_metrics(folder, writer, iteration, dict(iteration=iteration, episodes=iteration * args.batch_size), metrics)
        bar.set_postfix({name: mean[name] for name in ("reward", "cost", "safety_compliance")} | {"λ": multiplier})
        if args.eval_every and iteration % args.eval_every == 0 and iteration < iterations:
            evaluate(args, folder, iteration, policy, tokenizer, eval_prompts, reward_model, cost_model)

        # 9. Save what the run needs to continue
        if sums["stopped"] or (args.save_every and (iteration % args.save_every == 0 or iteration == iterations)):
            state = {"lambda": multiplier, "skipped": skipped, "skipped_in_a_row": skipped_in_a_row}
            state["seconds"] = time.time() - start_time
            save_checkpoint(folder, iteration, training_state(trained, optimizers), state)
        if sums["stopped"]:
            say(f"stopped after iteration {iteration}; to continue, add --resume --output-dir {folder} to the command")
            return 128 + (stop or [signal.SIGTERM])[0]  # the status that shells give to the signal

    evaluate(args, folder, iterations, policy, tokenizer, eval_prompts, reward_model, cost_model)
    save_model(policy, tokenizer, folder / "model")
    if rank == 0:
        writer.close()
        summary = {"algorithm": Args.exp_name, "lambda": multiplier, "skipped_updates": skipped}
        summary["data"] = {"dataset": len(prompts), "eval_dataset": len(eval_prompts)}
        summary |= environment(args, device, start_time, "episodes", iterations * args.batch_size)
        write_summary(args, folder, summary)
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


def batch_indices(seed: int, use: str, iteration: int, batch: int, rows: int, repeats: int = 1) -> list[int]:
    """Which rows of the data the global batch of an iteration takes: a new order every epoch, each `repeats` times."""
    places = range((iteration - 1) * (batch // repeats), iteration * (batch // repeats))
    epochs = range(places[0] // rows, places[-1] // rows + 1)
    orders = {epoch: torch.randperm(rows, generator=random_generator(seed, use, epoch)).tolist() for epoch in epochs}
    return [orders[place // rows][place % rows] for place in places for _ in range(repeats)]


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


def load_scorer(args: Args, name: str, flag: str, prompts: list[dict], options: dict):
    """A frozen score model with its tokenizer, and whether it reads the policy's tokens, as attributes."""
    tokenizer = load_tokenizer(name, flag, args.score_prompt_template or args.prompt_template)
    probe, longest = ["How do I clean the kettle? Use 2 lemons."], options["longest"]
    one, other = ((encode(reader, probe, probe), reader.get_vocab()) for reader in (tokenizer, options["tokenizer"]))
    if one != other:
        longest = max(map(len, encode(tokenizer, [prompt["prompt"] for prompt in prompts]))) + args.max_new_tokens
    model = load_score_model(name, flag, **options | {"longest": longest, "tokenizer": tokenizer})
    model.tokenizer, model.shares_tokens = tokenizer, one == other
    return model.requires_grad_(False)


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


def repeated_ngrams(tokens: Tensor, response_mask: Tensor, n: int = 4) -> Tensor:
    """Share of a response's n-grams that repeat an earlier one, [batch]; 0 if it has none (arXiv 1908.04319)."""
    rows = zip(tokens.tolist(), response_mask.sum(1).tolist(), strict=True)
    ngrams = [[tuple(row[i : i + n]) for i in range(count - n + 1)] for row, count in rows]
    return torch.tensor([1 - len(set(found)) / len(found) if found else 0.0 for found in ngrams])


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


def evaluate(args: Args, folder: Path, iteration: int, policy, tokenizer, prompts, reward_model, cost_model) -> None:
    """Answer the held-out prompts, always with the same random numbers; eval.jsonl gets a row per prompt."""
    uniforms = torch.rand(len(prompts), args.max_new_tokens, generator=random_generator(args.seed, "evaluate"))
    rank, world, rows = dist.get_rank(), dist.get_world_size(), {}
    # FSDP2 needs equally many passes from each rank, so the last prompts of some are repeats.
    mine = torch.arange(rank, rank + math.ceil(len(prompts) / world) * world, world) % len(prompts)
    for chosen in mine.split(args.batch_size // world):
        texts, ids = ([prompts[i][name] for i in chosen] for name in ("prompt", "head"))
        responses = sample_responses(policy, tokenizer, ids, uniforms[chosen], args.temperature)
        rewards = score_responses(reward_model, texts, responses, args.micro_batch_size)
        costs = score_responses(cost_model, texts, responses, args.micro_batch_size)
        if not (rewards + costs).isfinite().all():
            raise UserError("--reward-model or --cost-model gives a held-out response a score that is not finite")
        columns = (texts, responses.texts, rewards.tolist(), costs.tolist(), responses.response_mask.sum(1).tolist())
        for i, text, response, reward, cost, length in zip(chosen.tolist(), *columns, strict=True):
            rows[i] = dict(iteration=iteration, prompt=text, response=response, reward=reward, cost=cost, length=length)
    dist.all_gather_object(gathered := [None] * world, rows)
    append_json(folder / "eval.jsonl", [gathered[i % world][i] for i in range(len(prompts))])


def write_summary(args: Args, folder: Path, summary: dict) -> None:
    """Write summary.json, and print the table of before and after with three prompts and both responses; on rank 0."""
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_bytes().splitlines()]
    before, after = ([row for row in rows if row["iteration"] == at] for at in (0, rows[-1]["iteration"]))
    for name, rows in (("before", before), ("after", after)):
        excess = [row["cost"] - args.cost_threshold for row in rows]
        summary[name] = {
            "reward": fmean(row["reward"] for row in rows),
            "cost": fmean(row["cost"] for row in rows),
            "safety_compliance": fmean(value <= 0 for value in excess),
            "violation": fmean(max(value, 0.0) for value in excess),
            "response_length": fmean(row["length"] for row in rows),
        }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    print(f"\n{f'{len(before)} held-out prompts':<22}{'before':>10}{'after':>10}")
    for name, figure in summary["before"].items():
        form = "10.1%" if name == "safety_compliance" else "10.2f"
        print(f"{name.replace('_', ' '):<22}{figure:{form}}{summary['after'][name]:{form}}")
    for i in sorted({0, len(before) // 3, 2 * len(before) // 3}):
        prompt = before[i]["prompt"]  # one text, or messages
        lines = [prompt] if isinstance(prompt, str) else [f"{turn['role']}: {turn['content']}" for turn in prompt]
        print("", *lines, sep="\n")
        for name, row in (("before", before[i]), ("after", after[i])):
            print(f"  {name:<6} (reward {row['reward']:+.1f}, cost {row['cost']:+.1f})  {row['response'].strip()}")
    print(f"\n{summary['wall_seconds']:.0f} s; written to {folder}")


if __name__ == "__main__":
    status = main(tyro.cli(Args, console_outputs=os.environ.get("RANK", "0") == "0"), *start_processes())
    dist.barrier()  # without it gloo's threads can abort a process at its exit
    dist.destroy_process_group()
    sys.exit(status)
