"""PPO-Lagrange: Safe RLHF's constrained policy optimization, with a safety constraint that holds on average.

A policy π_θ shall be helpful (reward R) and safe (cost C ≤ d) on the AVERAGE over prompts x and responses y. Nothing is
rectified, so that a very safe response (C - d < 0) pays for an unsafe one elsewhere:

    maximise  E_x E_y [R(x, y)] - β KL(π_θ ‖ π_ref)   subject to   E_x E_y [ C(x, y) - d ] ≤ 0
    L(θ, λ) = ( E[R] - λ E[C - d] ) / (1 + λ) - β KL(π_θ ‖ π_ref)

--lambda-lr 0 keeps λ at --lambda-init: Reward Shaping, R - λ C. With --lambda-init 0 it is PPO on the reward alone.

One iteration: sample responses; score them; spread the scores over tokens with the KL penalty; estimate advantages
with a reward critic and a cost critic (GAE); move λ by the constraint; take one clipped policy-gradient step (PPO) with
the advantage (A_r - λ A_c) / (1 + λ).

Sources: RePO (Peng et al., NeurIPS 2025, arXiv 2410.19933); Safe RLHF, whose framework of two critics and a multiplier
this is (Dai et al., ICLR 2024, arXiv 2310.12773); PPO (arXiv 1707.06347); GAE (arXiv 1506.02438).

Without flags it runs on the embedded toy world: on a laptop, offline, in about a minute. At the papers' scale:

    torchrun --nproc_per_node 8 ppo_lagrange.py \
        --model PKU-Alignment/alpaca-7b-reproduced --reward-model PKU-Alignment/beaver-7b-v1.0-reward \
        --cost-model PKU-Alignment/beaver-7b-v1.0-cost --ptx-dataset tatsu-lab/alpaca \
        --dataset PKU-Alignment/PKU-SafeRLHF --eval-dataset PKU-Alignment/PKU-SafeRLHF \
        --prompt-template "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" \
        --batch-size 128 --micro-batch-size 16 --max-prompt-length 256 --max-new-tokens 256 --total-episodes 40000 \
        --learning-rate 1e-5 --critic-learning-rate 5e-6 --kl-coef 0.01 --lambda-lr 0.1 --lambda-max 5 \
        --gradient-checkpointing --output-dir OUTPUT_DIR --save-every 50 --resume
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ...     # on each node
"""

import contextlib
import dataclasses
import datetime
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import tyro
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    get_cosine_schedule_with_warmup,
)

TOY = Path(__file__).resolve().parent / "toy"


@dataclass
class Args:
    """Align a language model by PPO with a Lagrange multiplier for the mean cost (PPO-Lagrange)."""

    exp_name: str = "ppo_lagrange"
    """name of the run"""
    seed: int = 1
    """seeds everything random"""
    output_dir: str | None = None
    """where the run is written; default runs/<exp-name>-<seed>-<time>"""
    track: bool = False
    """also log to Weights & Biases (needs the wandb package)"""
    push_to_hub: str | None = None
    """repository of the Hub (namespace/name) that the finished run's model is uploaded to, with its card"""
    hub_private: bool = True
    """make that repository private if it is not there yet"""
    save_every: int = 0
    """iterations between checkpoints, the newest two of which are kept; 0 writes one only when SIGTERM ends the run"""
    resume: bool = False
    """go on from the newest whole checkpoint in --output-dir, or start there if it holds nothing"""

    # Models (a folder, or an id of the Hub)
    model: str = str(TOY / "policy")
    """the policy to align and its reference: a language model after supervised fine-tuning"""
    reward_model: str = str(TOY / "reward_model")
    """one-label score model, larger = more helpful"""
    cost_model: str = str(TOY / "cost_model")
    """one-label score model, larger = more harmful, above zero = unsafe"""
    reward_critic: str | None = None
    """start of the reward critic; default: the reward model if it shares the policy's tokenizer, else the policy"""
    cost_critic: str | None = None
    """start of the cost critic; default: the cost model if it shares the policy's tokenizer, else the policy"""
    trust_remote_code: bool = False
    """run model code that comes with a checkpoint; off, such checkpoints are refused"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute type; auto: bfloat16 on CUDA and on CPUs with instructions for it, else float32; masters stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    compile: bool = False
    """compile the transformer blocks (torch.compile): faster and less memory, after a minute or so of compiling"""
    cpu_offload: bool = False
    """keep the frozen models (reference, reward model, cost model) in CPU memory while they are not used"""
    shard_over: Literal["node", "world"] = "node"
    """processes that share one copy of a model: those of each node (hybrid sharding) or all; the same on one node"""
    whole_rollout: bool = True
    """hold the policy whole on every device while it samples; off (70B), each layer is gathered again for each token"""

    # Prompts
    dataset: str = str(TOY / "data" / "train.parquet")
    """training prompts (jsonl, json, csv or parquet file, folder, or Hub id); repeated prompts count once"""
    dataset_split: str = "train"
    """split of the training prompts; slices such as train[:1000] are allowed"""
    eval_dataset: str = str(TOY / "data" / "test.parquet")
    """held-out prompts; repeated ones count once, too"""
    eval_split: str = "test"
    """split of the held-out prompts"""
    prompt_column: str = "prompt"
    """column that holds the prompts"""
    prompt_template: str = "{prompt}"
    """text put around a prompt, the response follows it directly; "chat" takes the tokenizer's chat template"""
    score_prompt_template: str | None = None
    """template that the score models were trained with; default: the policy's"""
    max_prompt_length: int = 64
    """tokens of a prompt in its template; longer ones are dropped"""

    # Rollout
    total_episodes: int = 12800
    """responses of the whole run; the iterations are total_episodes / batch_size"""
    batch_size: int = 64
    """responses an iteration, over all processes"""
    micro_batch_size: int = 64
    """responses a process takes through one forward and backward pass"""
    responses_per_prompt: int = 1
    """K, responses sampled for each prompt"""
    max_new_tokens: int = 32
    """tokens of a response at most, EOS included"""
    temperature: float = 1.0
    """sampling temperature; log-probabilities are those of the tempered distribution"""

    # Optimisation
    update_epochs: int = 1
    """optimizer steps on one batch, each over all of it"""
    learning_rate: float = 1e-3
    """peak learning rate of the policy; cosine schedule over the iterations down to zero"""
    critic_learning_rate: float = 1e-3
    """learning rate of both critics, constant"""
    warmup_ratio: float = 0.03
    """share of the iterations spent warming up the policy's learning rate"""
    weight_decay: float = 0.01
    """AdamW's weight decay of the policy"""
    max_grad_norm: float = 1.0
    """gradients of each model are clipped to this norm"""
    kl_coef: float = 0.05
    """β, weight of the KL divergence from the reference"""
    ptx_dataset: str | None = None
    """supervised data for the PTX term: columns prompt, response or Alpaca's instruction, input, output"""
    ptx_split: str = "train"
    """split of the supervised data"""
    ptx_coef: float = 16.0
    """weight of the PTX term, the next-token loss on as many supervised responses as an iteration samples"""
    gae_lambda: float = 0.95
    """λ_GAE, bias-variance trade-off of the advantages"""
    clip_coef: float = 0.2
    """clip range of the probability ratio"""
    value_clip_coef: float = 5.0
    """clip range of a value's change within an iteration"""

    # Constraint
    cost_threshold: float = 0.0
    """d, the cost up to which a response is safe"""
    lambda_init: float = 1.0
    """initial multiplier; 0 stays 0"""
    lambda_lr: float = 0.1
    """η_λ, step size of the multiplier; 0 keeps it fixed"""
    lambda_max: float = 1.0
    """upper bound of the multiplier"""

    # Evaluation
    eval_every: int = 50
    """iterations between evaluations; 0 evaluates only before and after"""
    eval_size: int = 256
    """held-out prompts of an evaluation at most"""


# ======================================================================================================================
# The algorithm: pure functions. Batch tensors are [batch] or [batch, response], masks are 1 at response tokens
# ======================================================================================================================
def combine_advantages(
    reward_advantages: torch.Tensor, cost_advantages: torch.Tensor, multiplier: torch.Tensor | float
) -> torch.Tensor:
    """The Lagrangian's advantage, [batch, response]; multiplier: λ, or one of each response, [batch, 1]."""
    return (reward_advantages - multiplier * cost_advantages) / (1 + multiplier)


def update_multiplier(multiplier: float, learning_rate: float, excess: float, maximum: float) -> float:
    """Gradient ascent of λ · excess in log λ, up to a maximum (Safe RLHF's rule, arXiv 2310.12773)."""
    return min(multiplier * math.exp(min(learning_rate * multiplier * excess, 50.0)), maximum)


def token_signal(
    terminal: torch.Tensor, log_ratio: torch.Tensor, response_mask: torch.Tensor, kl_weight: float
) -> torch.Tensor:
    """A score at the last token plus the KL penalty at every token, their sum clamped to ±50; [batch, response].

    terminal: [batch]; log_ratio: log π_old - log π_ref of the response tokens, [batch, response].
    kl_weight: -β for rewards, +β for costs.
    """
    last = response_mask.sum(1, keepdim=True) - 1
    signal = (kl_weight * log_ratio).scatter_add(1, last, terminal[:, None])
    return signal.clamp(-50, 50) * response_mask


def gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation with γ = 1 (arXiv 1506.02438). Returns advantages and returns.

    All [batch, response]; values[:, t] is the estimate BEFORE token t, and the return after the last token is zero.
    """
    rewards, values = rewards * response_mask, values * response_mask
    following = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + following - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + gae_lambda * running
        advantages[:, t] = running
    return advantages, advantages + values


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_coef: float
) -> torch.Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347), as a loss of each token, [batch, response]."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """Squared error of the values, clipped like the policy, as a loss of each token, [batch, response]."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


# ======================================================================================================================
# Models at work: sampling, log-probabilities, values, scores
# ======================================================================================================================
class InverseSampler(LogitsProcessor):
    """Draws token t of response b at the point uniforms[b, t] of its distribution function.

    The uniform numbers are drawn beforehand for the whole global batch, so that a response depends on the seed, the
    iteration and its place in that batch, never on how the batch is split over processes.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_length: int, temperature: float):
        self.uniforms, self.prompt_length, self.temperature = uniforms, prompt_length, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: logits [batch, vocabulary]. Returns logits that leave only the drawn token possible."""
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        step = input_ids.shape[1] - self.prompt_length
        points = self.uniforms[:, step : step + 1].double() * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, tokens, 0.0)


@dataclass
class Responses:
    """Sampled responses of this rank; lengths are those of its longest prompt and longest response."""

    sequences: torch.Tensor  # [batch, prompt + response], prompts padded on the left, responses on the right
    attention_mask: torch.Tensor  # [batch, prompt + response], 1 at tokens of the prompt and of the response
    response_mask: torch.Tensor  # [batch, response], 1 up to and including EOS
    finished: torch.Tensor  # [batch], whether the response ends in EOS (else it ran into max_new_tokens)


@torch.no_grad()
def sample_responses(
    policy, tokenizer, prompts: list[list[int]], uniforms: torch.Tensor, temperature: float, device, whole: bool = True
) -> Responses:
    """Sample a response to each prompt (token ids); uniforms: [batch, max_new_tokens].

    whole: whether every rank holds all parameters meanwhile.
    """
    prompt_ids, prompt_mask = pad(prompts, tokenizer.pad_token_id, side="left")
    length = prompt_ids.shape[1]
    eos_ids = policy.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])} - {None}
    # The checkpoint's own generation settings (penalties, beams) would fill whatever is left open here and bend the
    # distribution, so they are set aside while sampling.
    config = GenerationConfig(
        max_new_tokens=uniforms.shape[1],
        do_sample=False,  # the sampler below leaves one token to choose
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    own_config, policy.generation_config = policy.generation_config, config
    # Compiled blocks (--compile) would pay for checks at every token, and for versions that read a cache.
    with torch.compiler.set_stance("force_eager"), unsharded(policy) if whole else contextlib.nullcontext():
        sequences = policy.generate(
            prompt_ids.to(device),
            attention_mask=prompt_mask.to(device),
            logits_processor=[InverseSampler(uniforms.to(device), length, temperature)],
            synced_gpus=not whole,  # with parameters that are gathered for each token, ranks must walk in step
        )
    policy.generation_config = own_config
    ends = torch.isin(sequences[:, length:], torch.tensor(sorted(eos_ids), device=device)).long()
    response_mask = (ends.cumsum(1) - ends == 0).long()  # no EOS before this token
    attention_mask = torch.cat([prompt_mask.to(device), response_mask], dim=1)
    return Responses(sequences, attention_mask, response_mask, ends.any(1))


def response_logprobs(
    policy, sequences: torch.Tensor, attention_mask: torch.Tensor, length: int, temperature: float
) -> torch.Tensor:
    """Log-probabilities of the last `length` tokens in the distribution they are sampled from, [batch, length]."""
    sequences, attention_mask, longest = crop(sequences, attention_mask, length)
    logits = policy(
        input_ids=sequences,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        use_cache=False,
        logits_to_keep=longest + 1,
    ).logits[:, :-1]
    # A few positions at a time, computed again for the gradient: the logits of a batch in float32 would be gigabytes.
    # A CPU is fastest where they stay in its cache.
    step = max(1, (2**24 if logits.is_cuda else 2**20) // (logits.shape[0] * logits.shape[2]))
    chunks = zip(logits.split(step, 1), sequences[:, -longest:].split(step, 1), strict=True)
    logprobs = [checkpoint(token_logprobs, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return F.pad(torch.cat(logprobs, dim=1), (0, length - longest))


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of tokens [batch, length] under tempered logits [batch, length, vocabulary]."""
    logits = logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def response_values(critic, sequences: torch.Tensor, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Values before each of the last `length` tokens, [batch, length]: each is read at the token that precedes it."""
    sequences, attention_mask, longest = crop(sequences, attention_mask, length)
    return F.pad(critic(sequences, attention_mask)[:, -longest - 1 : -1], (0, length - longest))


# ======================================================================================================================
# Plumbing, the same in every script: errors, processes, data, models, files
# ======================================================================================================================
class UserError(Exception):
    """Something the user can mend; its text, one line, says how."""


def shut_down() -> None:
    """Leave the process group; without the barrier gloo's threads can abort a process at its exit.

    So can groups that outlive it: models, which are cycles of references, hold those of their meshes.
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def fail(message: str) -> NoReturn:
    """End the run with one line on standard error and exit status 2. Every rank must call it; rank 0 speaks."""
    if dist.get_rank() == 0:
        for bar in list(getattr(tqdm, "_instances", ())):  # the message gets a line of its own
            bar.close()
        line = " ".join(message.split())
        if len(line) > 2000:
            line = f"{line[:1000]} ... {line[-500:]}"
        # What a terminal would obey or cannot show is escaped: names and texts may come from strangers.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        print(f"error: {line}", file=sys.stderr, flush=True)
    shut_down()
    sys.exit(2)


@contextlib.contextmanager
def agreed():
    """Hold a step that a user's mistake may end on any rank: then all ranks stop together.

    No collective operation may stand inside, since the rank that failed would leave the others waiting in it.
    """
    error = None
    try:
        yield
    except UserError as exception:
        error = str(exception)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors):
        fail(next(filter(None, errors)))


def start_processes():
    """Join the processes of torchrun, or stand alone with a group of one. Returns (device, mesh).

    The mesh is [processes], or [nodes, processes of a node] where there are several of both: FSDP2 then shards a model
    inside each node and replicates it across nodes (hybrid sharding), where the network is slower.
    """
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:  # rank 0 may be downloading while the others wait
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 1 < local < world and world % local == 0:
        return device, init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return device, init_device_mesh(device.type, (world,))


def read_args(cls, check):
    """Read the command line into the dataclass `cls`; a mistake that tyro or `check` finds is told in one line."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            args = tyro.cli(cls)
    except SystemExit as stop:
        if stop.code:
            # tyro's box is a heading, a rule, what is wrong, another rule, and help that --help gives as well.
            lines = [line.strip(" │╭╮╰╯─") for line in output.getvalue().splitlines()]
            lines = [line for line in lines if line.strip("-")]
            fail(" ".join(itertools.takewhile(lambda line: "helptext" not in line, lines[1:])) or "unknown flags")
        if dist.get_rank() == 0:
            print(output.getvalue(), end="")
        shut_down()
        sys.exit(0)
    with agreed():
        check_values(args)
        check(args)
    return args


def check_values(args) -> None:
    """Refuse what no file or tensor could hold: text that is not UTF-8, enormous numbers."""
    for name, value in vars(args).items():
        for item in value if isinstance(value, list | tuple) else [value]:
            flag = f"--{name.replace('_', '-')}"
            if isinstance(item, str) and ("\0" in item or item.encode(errors="replace").decode() != item):
                raise UserError(f"{flag} {item} is not text in UTF-8")
            if isinstance(item, int) and item >= (2**63 if name == "seed" else 2**31):
                raise UserError(f"{flag} is {item}; it must be below 2**{63 if name == 'seed' else 31}")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the forward and backward passes; `auto` is bfloat16 where the hardware multiplies in it."""
    if name != "auto":
        return getattr(torch, name)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def random_generator(*key) -> torch.Generator:
    """A random generator of its own for every use, keyed by the seed, the use and the iteration.

    Nothing random depends on what was drawn before it or on the number of processes.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def locate(name: str, kind: Literal["model", "dataset"], flag: str) -> str:
    """Check that a model or a data set is there: a path that exists is a path, anything else is a Hub id."""
    if not name.strip():
        raise UserError(f"{flag} is empty; give a path or an id of the Hub")
    if os.path.exists(name):
        if kind == "model":
            check_folder(Path(name), flag)
        return name
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=10)
    except Exception as exception:  # bad id, unknown id, no network, offline mode: the local cache may still have it
        known = False
        with contextlib.suppress(Exception):
            cached = huggingface_hub.snapshot_download(name, repo_type=kind, local_files_only=True)
            known = any(Path(cached).iterdir())
        if not known:
            raise UserError(
                f"{flag} {name}: there is no path {Path(name).absolute()}, and no {kind} '{name}' could be had from "
                f"the Hub ({type(exception).__name__})"
            ) from None
    return name


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that leads out of itself by links, or a model by the names of its files: a stranger may have
    made it, and what is read or written there must be its own. Links into the Hub's cache are the library's way."""
    root = Path(os.path.realpath(folder))
    root = root.parents[1] if root.parent.name == "snapshots" else root
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise UserError(f"{flag} {folder}: {path.relative_to(folder)} is a link that leads out of the folder")
    for path in folder.glob("*.index.json"):
        names = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # told by who loads it
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        for name in names:
            if not isinstance(name, str) or name != os.path.basename(name):
                raise UserError(f"{flag} {folder}: {path.name} names {name}, which is no file of the folder")


def load_rows(name: str, split: str, columns: list[str], flag: str, others: tuple[str, ...] = ()) -> dict[str, list]:
    """Columns of a jsonl, json, csv or parquet file, of a folder of such files, or of a data set of the Hub.

    others: the columns of another form that the data may have instead.
    """
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(locate(name, "dataset", flag))
    try:
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        if path.is_file() and suffix not in readers:
            raise ValueError(f"a data file ends in one of {', '.join(readers)}")
        if path.is_file():
            rows = datasets.load_dataset(readers[suffix], data_files={split.split("[")[0]: name}, split=split)
        else:
            rows = datasets.load_dataset(name, split=split)
        if others and not set(columns) <= set(rows.column_names) and set(others) <= set(rows.column_names):
            columns = list(others)
        values = {column: rows[column][:] for column in columns if column in rows.column_names}
    except Exception as exception:
        reason = str(exception.__cause__ or exception).strip().partition("\n")[0]
        # No first row to tell columns by, an empty slice, an empty parquet file
        if isinstance(exception, StopIteration) or re.search("corresponds to no data|BatchSize .* got 0", reason):
            reason = "it has no rows"
        raise UserError(
            f"{flag} {name}: split '{split}' cannot be read: {reason or type(exception).__name__}"
        ) from None
    missing = [column for column in columns if column not in values]
    if missing:
        expected = f" (nor all of {', '.join(others)})" if others else ""
        there = ", ".join(rows.column_names)
        raise UserError(f"{flag} {name}: no column '{missing[0]}'{expected}; the columns are {there}")
    if len(rows) == 0:
        raise UserError(f"{flag} {name}: split '{split}' has no rows")
    return values


def check_texts(texts: list, column: str, name: str, flag: str) -> None:
    """Refuse rows without text: an empty prompt or response is a mistake in the data, not something to learn from."""
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            state = "an empty" if text is None or isinstance(text, str) else "no text but a number or a list as"
            raise UserError(f"{flag} {name}: row {row} has {state} '{column}'; take such rows out of the data")


def load_tokenizer(name: str, trust_remote_code: bool):
    """The tokenizer beside a model. One without a pad token pads with EOS: masks, not ids, tell what is padding."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as exception:
        raise UserError(f"{name}: its tokenizer cannot be loaded: {exception}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad(sequences: list[list[int]], value: int, side: Literal["left", "right"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as one tensor. Returns (ids, mask), both [batch, longest]; mask is 1 at tokens, 0 at padding."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), value)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask


def crop(
    sequences: torch.Tensor, attention_mask: torch.Tensor, length: int = 0
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Leave out the columns that are padding in all rows. Returns also what is left of the last `length` columns."""
    used = attention_mask.any(0)
    return sequences[:, used], attention_mask[:, used], int(used[used.shape[0] - length :].sum())


def part(ids: list[int], prompt_ids: list[int]) -> tuple[list[int], list[int]]:
    """Tokens of a whole text as (prompt, response), parted where they first differ from the prompt's own."""
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(ids, prompt_ids, strict=False))
    start = min(len(list(same)), len(ids) - 1)  # a response has at least its EOS
    return ids[:start], ids[start:]


def pad_texts(texts: list[tuple[list[int], list[int]]], value: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts (prompt, response) as the policy samples them: prompts padded on the left, responses on the right.

    Returns sequences and attention mask, [batch, prompt + response], and response mask, [batch, response].
    """
    prompt_ids, prompt_mask = pad([prompt for prompt, _ in texts], value, side="left")
    response_ids, response_mask = pad([response for _, response in texts], value, side="right")
    return torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1), response_mask


def in_template(tokenizer, template: str, prompts: list[str], responses: list[str] | None = None) -> list[list[int]]:
    """Tokens of prompts in their template, each with its response directly behind it where responses are given.

    The template "chat" is the tokenizer's own: the prompt as the user's turn, then the head of the assistant's. It
    brings its special tokens along.
    """
    if template == "chat":
        if not tokenizer.chat_template:
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; give one with {{prompt}}")
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        try:
            texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        except Exception as exception:  # the template is a program, and may refuse
            raise UserError(f"{tokenizer.name_or_path}: its chat template fails: {exception}") from None
    else:
        texts = [template.replace("{prompt}", prompt) for prompt in prompts]
    if responses is not None:
        texts = [text + response for text, response in zip(texts, responses, strict=True)]
    return tokenizer(texts, add_special_tokens=template != "chat")["input_ids"] if texts else []


def encode_prompts(tokenizer, template: str, prompts: list[str], source: str) -> list[list[int]]:
    """Tokens of prompts in their template, for a policy to go on from; source: flag and name of the data."""
    encoded = in_template(tokenizer, template, prompts)
    # Some tokenizers end every text in EOS; a prompt that has ended would leave nothing to answer.
    encoded = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in encoded]
    if [] in encoded:
        raise UserError(f"{source}: the prompt {prompts[encoded.index([])]!r} has no tokens; take it out of the data")
    return encoded


def encode_scored(
    tokenizer, prompts: list[str], responses: list[str], template: str, max_length: int
) -> list[list[int]]:
    """Tokens of prompt, response and EOS as a score model reads them; a text over max_length tokens loses its end."""
    encoded = in_template(tokenizer, template, prompts, responses)
    eos = tokenizer.eos_token_id
    return [(ids if ids[-1:] == [eos] else [*ids, eos])[:max_length] for ids in encoded]


class ScoreModel(nn.Module):
    """A backbone with a linear head that gives every token a score; `model` is the library's class, which is saved."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.tie_weights, self.set_attn_implementation = model.tie_weights, model.set_attn_implementation

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Scores of all tokens in float32, [batch, length]; padding may stand on either side."""
        hidden = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            use_cache=False,
        ).last_hidden_state
        return self.model.score(hidden).float().sum(-1)  # over the one label; FSDP2 warns of a view


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of every token counted from the first that is not padding, [batch, length]."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def last_scores(scores: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The score at the last token of each text, [batch], found by the mask: the pad id may be a real token's (EOS)."""
    last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
    return scores.gather(1, last[:, None]).squeeze(1)


def text_scores(model: ScoreModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Score of each text, [batch]."""
    input_ids, attention_mask, _ = crop(input_ids, attention_mask)
    return last_scores(model(input_ids, attention_mask), attention_mask)


def load_pretrained(
    cls,
    name: str,
    dtype: torch.dtype,
    flag: str,
    trust_remote_code: bool,
    fresh: tuple[str, ...] = (),
    left: tuple[str, ...] = (),
    key_mapping: dict[str, str] | None = None,
    **config,
):
    """A model of the library's class `cls`: with its weights on rank 0, on the meta device elsewhere (see `shard`).

    Every weight is accounted for. fresh: weights that the checkpoint may lack; left: first letters of those that may
    stay behind; key_mapping: other names of weights. Anything else is an error. Only safetensors are read: a pickle
    could run code.
    """
    try:
        if dist.get_rank() == 0:
            model, info = cls.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them below
                key_mapping=key_mapping,
                **config,
            )
        else:
            settings = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **config)
            with torch.device("meta"):
                model = cls.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)
            info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    except Exception as exception:
        raise UserError(f"{flag} {name} cannot be loaded: {exception}") from None
    missing = sorted(set(info["missing_keys"]) - set(fresh))
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(tuple(left)))
    if missing or unexpected or info["mismatched_keys"]:
        raise UserError(
            f"{flag} {name} does not fit {cls.__name__}: weights missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"of another shape {[key for key, *_ in info['mismatched_keys']][:3]}"
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # a dropped unit would change log-probabilities between two readings
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def load_score_model(name: str, dtype: torch.dtype, flag: str, seed: int, trust_remote_code: bool, fresh_head=False):
    """A one-label score model of the library's classes, as ScoreModel.

    fresh_head: a language model may be given, too; its backbone gets a head drawn from `seed`.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as exception:
        raise UserError(f"{flag} {name} cannot be loaded: {exception}") from None
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("ForSequenceClassification", "ForTokenClassification")):
        if config.num_labels != 1:
            raise UserError(f"{flag} {name} has {config.num_labels} labels; a score model has one")
        biased = architecture.endswith("ForTokenClassification")  # the class that keeps a bias of the head
        cls = AutoModelForTokenClassification if biased else AutoModelForSequenceClassification
        model = load_pretrained(cls, name, dtype, flag, trust_remote_code)
        if not hasattr(model, "score"):
            raise UserError(f"{flag} {name} is a {architecture}, whose head scores no tokens; give a decoder's")
        return ScoreModel(model)
    if architecture.endswith("ForScore"):  # Safe RLHF's own class (arXiv 2310.12773): the head has a bias
        cls, names = AutoModelForTokenClassification, {r"^score_head\.": "score."}
        left = ("normalizer.",)  # statistics that its training kept beside the model
        if getattr(config, "do_normalize", False):
            raise UserError(f"{flag} {name} normalises its scores (do_normalize), which is not supported")
        return ScoreModel(
            load_pretrained(cls, name, dtype, flag, trust_remote_code, left=left, key_mapping=names, num_labels=1)
        )
    if not fresh_head:
        raise UserError(f"{flag} {name} is a {architecture or 'model'} without a score head; give a score model")
    torch.manual_seed(seed)
    cls, head, lm_head = AutoModelForSequenceClassification, ("score.weight",), ("lm_head.weight",)
    return ScoreModel(load_pretrained(cls, name, dtype, flag, trust_remote_code, head, lm_head, num_labels=1))


def is_small(model: nn.Module) -> bool:
    """Whether every rank holds a copy of a model: 2^28 parameters take 4 GiB with gradients and moments in float32."""
    return sum(parameter.numel() for parameter in model.parameters()) < 2**28


def shard(model: nn.Module, mesh, dtype: torch.dtype, compiled: bool = False, cpu_offload: bool = False) -> nn.Module:
    """FSDP2: each transformer block is gathered when it computes, the rest with the root.

    A small model is not sharded: every rank has a copy, and only gradients are exchanged.

    The weights are those of rank 0, the only process that ever holds them all; they reach the others tensor by tensor.
    The shards keep the type the model was loaded in; blocks compute in `dtype`, gradients are reduced in float32.
    compiled: whether the blocks are compiled when they first compute; those of one shape share the code.
    """
    weights = model.state_dict() if dist.get_rank() == 0 else {}
    # What no checkpoint holds, such as the frequencies of rotary embeddings, comes from rank 0 as well.
    buffers = {key: buffer for key, buffer in model.named_buffers() if key not in weights}
    extra = [buffers, getattr(model, "generation_config", None)]
    dist.broadcast_object_list(extra)
    model.to_empty(device="meta")
    model.tie_weights()  # moving a model between devices parts what is tied
    blocks = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or [])}
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    units = [module for module in model.modules() if type(module).__name__ in blocks] + [model]
    for block in units[:-1] if compiled else ():
        torch._dynamo.config.recompile_limit = 64  # versions of that code: models, with and without gradients, lengths
        block.compile()
    if is_small(model):  # in FSDP2's terms: shards over one rank, replicated over all
        units, shape = [model], (dist.get_world_size(), 1)
        mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
    model.to_empty(device="cpu" if cpu_offload else mesh.device_type)
    model.tie_weights()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for key, buffer in extra[0].items():
        module, _, name = key.rpartition(".")
        setattr(model.get_submodule(module), name, buffer.to(mesh.device_type))
    if extra[1] is not None:
        model.generation_config = extra[1]
    return model


def check_compiler(device: torch.device) -> None:
    """See that torch.compile works here, before anything is loaded: it needs a C++ compiler, on CUDA also Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as exception:  # none, one that fails, a cache that cannot be written
        raise UserError(f"--compile: torch.compile does not work here: {exception}") from None


def suit_attention(model: nn.Module, dtype: torch.dtype, longest: int) -> None:
    """Let attention over texts of up to `longest` tokens be plain matrix products where they are the faster way.

    On CPUs the backward pass of the fused kernel takes bfloat16 several times as long while texts are short.
    """
    if dtype == torch.bfloat16 and longest <= 128 and not torch.cuda.is_available():
        model.set_attn_implementation("eager")


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of transformer blocks for the backward pass. The library is changing its method's name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


@contextlib.contextmanager
def unsharded(model: nn.Module):
    """Hold a sharded model's parameters whole on every rank: decoding would else all-gather them once a token."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(unit is not model, recurse=False)  # FSDP2's own choice: the root stays


@contextlib.contextmanager
def writing(beside: Path):
    """Hold the writing of `beside`, NAME.part, up to its renaming; tell what cannot be written, as on a full disk."""
    try:
        yield
    except (Exception, dcp.api.CheckpointException) as exception:
        told = isinstance(exception, OSError | SafetensorError | dcp.api.CheckpointException)
        if not told and type(exception) is not Exception:  # which is what a tokenizer raises on a full disk
            raise
        shutil.rmtree(beside, ignore_errors=True)
        failures = getattr(exception, "failures", None) or {0: (exception, None)}  # of each rank
        place, reason = str(beside).removesuffix(".part"), next(iter(failures.values()))[0]
        raise UserError(f"{place} cannot be written: {reason}") from None


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer: beside the folder first, so that no half-written one is met."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    beside = folder.with_name(folder.name + ".part")
    with agreed(), writing(beside):
        if dist.get_rank() == 0:
            once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # tied ones have two names
            state = {name: value for name, value in state.items() if name in once}
            own_names = not hasattr(model, "save_pretrained")  # a ScoreModel, around the library's class
            if own_names:
                model, state = model.model, {name.removeprefix("model."): value for name, value in state.items()}
            shutil.rmtree(beside, ignore_errors=True)
            model.config.pad_token_id = tokenizer.pad_token_id
            model.save_pretrained(beside, state_dict=state, save_original_format=not own_names)  # not Safe RLHF's
            tokenizer.save_pretrained(beside)
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)


# ======================================================================================================================
# Runs: their directory, checkpoints, going on
# ======================================================================================================================
# Flags that change neither the mathematics nor the random numbers of a run
MAY_CHANGE = (
    "output_dir resume save_every eval_every track push_to_hub hub_private micro_batch_size gradient_checkpointing "
    "compile cpu_offload shard_over whole_rollout"
)


def find_run(args, dtype: torch.dtype) -> tuple[Path, dict]:
    """The directory of a run, and of one to go on with what save_checkpoint wrote; nothing for a new one.

    A directory that holds a run already is refused, but with --resume; the process ends if that run is finished.
    """
    if args.output_dir is not None and not args.output_dir.strip():
        fail("--output-dir is empty; give a directory, or leave the flag out")
    if args.resume and args.output_dir is None:
        fail("--resume goes on with a run: give its --output-dir")
    name = [args.output_dir]
    if name[0] is None:
        name = [f"runs/{args.exp_name}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"]
    dist.broadcast_object_list(name)
    folder, saved = Path(name[0]), [{}]
    with agreed():
        if dist.get_rank() == 0:
            mine = "args.json metrics.jsonl eval.jsonl summary.json model model.part checkpoints tensorboard"
            held = [entry for entry in f"{mine} stage1 stage2 merged".split() if os.path.lexists(folder / entry)]
            try:
                above = next(path for path in (folder, *folder.parents) if path.exists())
            except OSError as exception:
                raise UserError(f"--output-dir {folder} cannot be made: {exception}") from None
            if not above.is_dir():
                raise UserError(f"--output-dir {folder}: {above} is a file; choose a directory")
            if held and args.resume and held[0] == "args.json":
                try:
                    check_folder(folder, "--output-dir")
                    saved = [find_checkpoint(folder, args, dtype)]
                except OSError as exception:
                    raise UserError(f"--resume: {folder} cannot be read or written: {exception}") from None
            elif held:
                advice = "choose another directory or remove that one"
                state = f"an unfinished run or other files ({held[0]})"
                if "summary.json" in held:
                    state = "a finished run"
                elif held[0] == "args.json":
                    advice += ", or go on with the run by --resume"
                raise UserError(f"--output-dir {folder} holds {state}; {advice}")
            if saved != [None] and not os.access(above, os.W_OK):
                raise UserError(f"--output-dir {folder}: {above} cannot be written to; choose another directory")
            if args.track:
                check_tracking()
            if args.push_to_hub is not None:
                check_push(args)
    dist.broadcast_object_list(saved)
    if saved[0] is None:
        if dist.get_rank() == 0:
            print(f"the run in {folder} is finished")
        if args.push_to_hub is not None:  # the upload may be what failed
            push_models(args, folder)
        shut_down()
        sys.exit(0)
    return folder, saved[0]


@contextlib.contextmanager
def written(folder: Path):
    """Tell a full disk or a folder without permission in the user's words."""
    try:
        yield
    except OSError as exception:
        raise UserError(f"--output-dir {folder} cannot be written: {exception}") from None


def fingerprints(**data: list) -> dict[str, str]:
    """SHA-256 of each data set, by the name of its flag, over texts and tokens as the run uses them."""
    digests = {name: hashlib.sha256() for name in data}
    for name, rows in data.items():
        for row in rows:
            digests[name].update(repr(row).encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def open_run(args, folder: Path, saved: dict, data: dict[str, str]):
    """Make the output directory on rank 0, with args.json in it, once nothing can be wrong with the run any more.

    The logs of a run to go on with are cut back to its checkpoint; data (`fingerprints`) must be those it began with.
    Returns TensorBoard's writer and, with --track, the W&B run; None for both on other ranks.
    """
    with agreed(), written(folder):
        for name, digest in saved.get("data", data).items():
            if digest != data[name]:
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise UserError(f"--resume: {flag} holds other data than when the run began; restore them")
        if dist.get_rank() != 0:
            return None, None
        folder.mkdir(parents=True, exist_ok=True)
        if not args.resume or not (folder / "args.json").exists():
            with (folder / "args.json").open("x", encoding="utf-8"):  # not one that has just begun here
                write_json(folder / "args.json", dataclasses.asdict(args))
        for log in log_sizes(folder):
            size = saved.get("logs", {}).get(log, 0)
            os.truncate(folder / log, size) if size else (folder / log).unlink()
        # What its thread cannot write is raised again by the next call, which tells it: no traceback beside that.
        threading.excepthook = lambda failed: issubclass(failed.exc_type, OSError) or threading.__excepthook__(failed)
        return SummaryWriter(folder / "tensorboard"), start_tracking(args, folder) if args.track else None


def find_checkpoint(folder: Path, args, dtype: torch.dtype) -> dict | None:
    """What save_checkpoint wrote of the newest whole checkpoint, {} if there is none, None if the run is finished.

    Flags that the run did not have are refused by name, but for those that change neither the mathematics nor the
    random numbers.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(args)))  # tuples are lists in JSON
    try:
        before = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError
    except ValueError:  # killed while it was written: then nothing else is there yet
        if (folder / "checkpoints").exists():
            raise UserError(f"--resume: {folder / 'args.json'} is not what a run writes; restore it") from None
        before = settings
        write_json(folder / "args.json", settings)
    for key in [key for key in before | settings if key not in MAY_CHANGE.split()]:
        flag, value, given = f"--{key.replace('_', '-')}", before.get(key), settings.get(key)
        if value != given or (key in before) != (key in settings):
            raise UserError(f"--resume: the run in {folder} has {flag} {value}, not {given}; give the same flags")
    if (folder / "summary.json").exists():
        return None
    name, sizes = str(dtype).removeprefix("torch."), log_sizes(folder)
    for place in sorted((folder / "checkpoints").glob("[0-9]*[0-9]"), reverse=True):
        try:
            if checksums(place) != (place / "SHA256SUMS").read_text(encoding="utf-8"):
                raise ValueError("its files are not those that SHA256SUMS was made of")
            found = json.loads((place / "state.json").read_text(encoding="utf-8"))
            logs = {log: int(size) for log, size in found["logs"].items()}
            saved = found["state"] | {"checkpoint": str(place), "logs": logs}
            computed = saved["dtype"]
            for file in place.glob("*.safetensors"):
                with safe_open(file, "pt"):  # its head can be read
                    pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as exception:
            print(f"passed over the checkpoint {place}, which is not whole: {exception}", file=sys.stderr, flush=True)
            continue
        for log, size in saved["logs"].items():
            if sizes.get(log, -1) < size:
                raise UserError(f"--resume: {folder / log} has lost lines since {place} was written; restore it")
        if computed != name:
            raise UserError(f"--resume: the run in {folder} has computed in {computed}, not {name}; set --dtype")
        print(f"resuming the run in {folder} from {place}", file=sys.stderr, flush=True)
        return saved
    print(f"resuming the run in {folder} from the start, as there is no checkpoint", file=sys.stderr, flush=True)
    return {}


def log_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files of a run that grow by what is added at their end, by their names in its directory."""
    files = [folder / "metrics.jsonl", folder / "eval.jsonl", *(folder / "tensorboard").glob("*")]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files if path.is_file()}


def training_state(**trained) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of pairs (model, optimizer) by name; loading them fills these tensors in place."""
    tensors = {}
    for name, (model, optimizer) in trained.items():
        model.reshard()  # a forward pass without gradients leaves what is not in a block whole
        tensors |= {f"{name}.{key}": value.detach() for key, value in model.named_parameters()}
        fresh = not optimizer.state
        moments = get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
        )
        for moment in optimizer.state.values() if fresh else ():
            moment["step"].zero_()  # that call made the states by a step without gradients, which must not count
        tensors |= {f"{name}.{key}": value for key, value in moments.items() if torch.is_tensor(value)}
    return tensors


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], dtype: torch.dtype, state: dict) -> None:
    """Write what a run needs to go on after `step`: safetensors and JSON in folder/checkpoints. Keep the newest two.

    Every rank writes its shards. They are written beside and renamed, so that a kill at any time leaves whole ones.
    """
    place = folder / "checkpoints" / f"{step:08d}"
    beside = place.with_suffix(".part")
    # A rank copies a whole file to CPU memory before it writes it, so that the files must not be large.
    files = 1 + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) // 2**34
    numbers = {name: 1 + i * files // len(tensors) for i, name in enumerate(tensors)}
    state = state | {"dtype": str(dtype).removeprefix("torch."), "processes": dist.get_world_size()}
    with agreed(), writing(beside):
        if dist.get_rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
    with agreed(), writing(beside):  # an error of one rank becomes one of all
        writer = dcp.HuggingFaceStorageWriter(str(beside), fqn_to_index_mapping=numbers, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    with agreed(), writing(beside):
        if dist.get_rank() == 0:
            write_json(beside / "state.json", {"logs": log_sizes(folder), "state": state})
            (beside / "SHA256SUMS").write_text(checksums(beside), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
            steps = sorted(int(path.name) for path in place.parent.glob("[0-9]*[0-9]"))
            for old in [number for number in steps if number <= step][:-2]:  # later ones were passed over
                shutil.rmtree(place.with_name(f"{old:08d}"))


def checksums(folder: Path) -> str:
    """SHA-256 of the files of a checkpoint, in the form that `sha256sum --check SHA256SUMS` reads."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")

    def digest(path: Path) -> str:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path.name} is no file of its own")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # the digests of large files are computed beside each other
        digests = list(pool.map(digest, files))
    return "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))


def load_checkpoint(saved: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the tensors of a run with those of a checkpoint, from whatever number of processes it came."""
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(saved["checkpoint"]))
    except dcp.api.CheckpointException as exception:  # the same on all ranks
        reason = next(iter(exception.failures.values()))[0]
        fail(f"--resume: {saved['checkpoint']} cannot be loaded: {reason}; remove it to go on from the one before")


def heed_sigterm() -> threading.Event:
    """From now on SIGTERM only sets the event that is returned; the training loop saves and stops between two steps.

    After the last step a run is heedless of it: what is left to do is its result.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


def stop_run(folder: Path, what: str) -> NoReturn:
    """End a run that SIGTERM stopped and that has just saved a checkpoint, with the status that shells give to it."""
    if dist.get_rank() == 0:
        message = f"stopped by SIGTERM after {what}; to go on, add --resume --output-dir {folder} to the same command"
        print(message, file=sys.stderr, flush=True)
    shut_down()
    sys.exit(128 + signal.SIGTERM)


# ======================================================================================================================
# Figures: logs, sums over ranks
# ======================================================================================================================
def finite(value):
    """The same value with null for each number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value) -> None:
    """Written beside and renamed: a kill or a full disk leaves a whole file or none."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def append_json(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_metrics(folder: Path, writer: SummaryWriter, tracker, metrics: dict, step: int) -> None:
    """One line of metrics.jsonl, and the same names as TensorBoard's scalars and, with --track, W&B's."""
    append_json(folder / "metrics.jsonl", [metrics])
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    if tracker:
        tracker.log(metrics, step=step)
    writer.flush()  # tells what could not be written


def my_share(count: int) -> list[int]:
    """The indices below `count` that this rank handles. All ranks get equally many, as FSDP needs the same number of
    passes from each: the last ones may repeat an index, which gather_rows drops."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [(rank + world * i) % count for i in range(math.ceil(count / world))]


def gather_rows(rows: dict[int, dict]) -> list[dict]:
    """Rows by index from all ranks, in order, on rank 0; empty elsewhere."""
    gathered = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, gathered)
    merged = {index: row for part in gathered or [] for index, row in part.items()}
    return [merged[index] for index in sorted(merged)]


def global_sum(*values: float, device: torch.device) -> list[float]:
    """Sums of numbers over all ranks."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def clip_gradients(model: nn.Module, max_grad_norm: float) -> float:
    """Clip the gradients of a sharded model to a norm. Returns the norm before, not finite if any gradient is not."""
    return nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).full_tensor().item()


# ======================================================================================================================
# Sharing: model cards, the Hub, Weights & Biases
# ======================================================================================================================
def is_hub_id(name: str | None) -> bool:
    """Whether a name given for a model or a data set is an id of the Hub: a path that exists is a path (`locate`)."""
    if name is None or os.path.exists(name):
        return False
    with contextlib.suppress(huggingface_hub.errors.HFValidationError):
        huggingface_hub.utils.validate_repo_id(name)
        return True
    return False


def as_code(value) -> str:
    """A setting as Markdown's code in a cell of a table; the project's own files by their path in it."""
    text = value.removeprefix(f"{TOY.parent}{os.sep}") if isinstance(value, str) else json.dumps(value)
    text = text.replace("\n", "\\n").replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or text.strip() != text else f"{fence}{text}{fence}"


def as_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def as_figure(value: float | None) -> str:
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "not finite"


def write_card(args, folder: Path, what: str, measured: str, results: dict, dtype, seconds: float, saved: dict) -> None:
    """Write the card of a saved model, README.md in its folder: YAML for the Hub, then text for people.

    what: what the model is; measured: what the figures are; results: columns of figures by their names; saved: the
    checkpoint that the run has gone on from, if any. Rank 0 writes. A card that fails is told and ends no run.
    """
    if dist.get_rank() != 0:
        return
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        heads = ("SequenceClassification", "TokenClassification")
        head = next((head for head in heads if architecture.endswith(f"For{head}")), "CausalLM")
        settings = dataclasses.asdict(args)
        data = [settings.get(flag) for flag in ("dataset", "eval_dataset", "ptx_dataset")]
        card = huggingface_hub.ModelCardData(  # without a licence: the run does not know it
            base_model=args.model if is_hub_id(args.model) else None,
            datasets=list(dict.fromkeys(filter(is_hub_id, data))) or None,
            library_name="transformers",
            pipeline_tag="text-generation" if head == "CausalLM" else "text-classification",
            tags=[Args.exp_name.replace("_", "-"), "rlhf", "safe-rlhf", "safety"],
        )
        links = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", __doc__)
        method, _, sources = re.match(r"(.*)\n\n(Sources?: )(.*?)\n\n", links, re.DOTALL).groups()
        if head == "CausalLM":
            use = "It answers a prompt in the template of `--prompt-template`, directly behind it."
        else:
            use = "It reads a prompt in the template of `--prompt-template`, a response and EOS; the last score counts."
        figures = next(iter(results.values()), {})
        rows = [[name.replace("_", " "), *(as_figure(column[name]) for column in results.values())] for name in figures]
        kept = {name: value for name, value in settings.items() if value is not None and name not in MAY_CHANGE.split()}
        flags = [[f"`--{name.replace('_', '-')}`", as_code(value)] for name, value in kept.items()]
        world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        nodes = f" --nnodes {world // local}" if world > local else ""
        launcher = f"torchrun{nodes} --nproc_per_node {local}" if "RANK" in os.environ else "python"
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        made = {
            "seed": args.seed,
            "computed in": f"{str(dtype).removeprefix('torch.')}, weights in float32",
            "processes": world,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "wall time": f"{seconds:.0f} s",
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
            f"datasets {datasets.__version__}, Python {sys.version.split()[0]}",
            "finished (UTC)": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        }
        if saved:
            made["went on from checkpoint"] = f"{int(Path(saved['checkpoint']).name)}; the time is that of all parts"
        text = f"""---
{card.to_yaml()}
---

# {Path(args.model).name}: {what}

Made from {as_code(args.model)} by `{Path(__file__).name}`. `AutoModelFor{head}` and `AutoTokenizer` load it.
{use}

## Results

{measured}

{as_table(["", *results], rows) if rows else ""}

## Method

{method}

## Settings

All flags that change the result; one that is not listed was not set.

{as_table(["flag", "value"], flags)}

## How it was made

````bash
{launcher} {command}
````

{as_table(["", ""], [[name, str(value)] for name, value in made.items()])}

## Limits

"Safe" means what the cost model says of a response or, where none was used, what the labels of the data say. Where
these err, this model has learnt the error. The figures above are the run's own, on held-out data like those it learnt
from; nobody else has judged this model, and it may err, also in harmful ways.

## Licence

None is granted here: that of the base model holds, and those of the data.

## Citation

Please cite the papers of the method: {sources}
"""
        (folder / "README.md").write_text(text, encoding="utf-8")
    except Exception as exception:  # nothing about a card is worth a run
        reason = " ".join(str(exception).split())
        print(f"the model card of {folder} could not be written: {reason}", file=sys.stderr, flush=True)


def check_push(args) -> None:
    """Make the repository of --push-to-hub unless it is there, and see that this token may write to it."""
    flag = f"--push-to-hub {args.push_to_hub}"
    try:
        huggingface_hub.utils.validate_repo_id(args.push_to_hub)
        _, _ = args.push_to_hub.split("/")
    except ValueError:
        raise UserError(f"{flag} is not the id of a repository; give namespace/name") from None
    if huggingface_hub.is_offline_mode():
        raise UserError(f"{flag}: HF_HUB_OFFLINE is set, and nothing can be pushed; unset it or leave the flag out")
    if huggingface_hub.get_token() is None:
        raise UserError(f"{flag} needs a token of the Hub that may write: run hf auth login, or set HF_TOKEN")
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(args.push_to_hub, private=args.hub_private, exist_ok=True)
        hub.auth_check(args.push_to_hub, write=True)  # one that is there may be somebody else's
    except Exception as exception:  # refused, no network, anything else between here and the Hub
        raise UserError(f"{flag}: the Hub does not let this token write there: {exception}") from None


def push_models(args, folder: Path) -> None:
    """Upload a finished run's model and its card to the repository of --push-to-hub, mixtures to merged/ in it.

    Rank 0 uploads, the others wait. An upload that fails ends with the command that does it by hand.
    """
    with agreed():
        if dist.get_rank() == 0:
            for model in [folder / "model", *sorted((folder / "merged").glob("*"))]:
                place = "." if model.name == "model" else f"merged/{model.name}"
                message = f"Upload {model.name} of {folder.name}"
                try:
                    huggingface_hub.HfApi().upload_folder(
                        repo_id=args.push_to_hub,
                        folder_path=model,
                        path_in_repo=place.removeprefix("."),
                        commit_message=message,
                    )
                except Exception as exception:
                    raise UserError(
                        f"--push-to-hub {args.push_to_hub}: the run is finished and its model is in {model}, but the "
                        f"upload failed: {exception}; by hand: hf upload {args.push_to_hub} {model} {place}"
                    ) from None
            print(f"pushed to {huggingface_hub.constants.ENDPOINT}/{args.push_to_hub}")


def check_tracking() -> None:
    """Refuse --track without its package, or online without a key, before there is anything to track."""
    if not importlib.util.find_spec("wandb"):
        raise UserError("--track needs the wandb package: pip install wandb")
    import wandb

    try:
        ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as exception:
        raise UserError(f"--track: the key of Weights & Biases cannot be used: {exception}") from None
    if not ready:
        raise UserError("--track: no key of Weights & Biases; run wandb login, or set WANDB_MODE=offline")


def start_tracking(args, folder: Path):
    """The W&B run of this run, which keeps its id in wandb_id, so that --resume goes on in the same one.

    Where no server answers, W&B keeps everything on disk, for wandb sync, and the training does not wait.
    """
    import wandb

    kept = folder / "wandb_id"
    settings = dict(
        project=os.environ.get("WANDB_PROJECT", "safe-rlhf"),
        name=folder.name,
        id=kept.read_text(encoding="utf-8").strip() if kept.exists() else None,
        resume="allow",
        config=dataclasses.asdict(args),
        settings=wandb.Settings(finish_timeout=300),  # a server that is lost must not hold the end, either
    )
    try:
        run = wandb.init(**settings)
    except wandb.errors.Error as exception:
        print(f"--track: W&B cannot be reached and goes offline: {exception}", file=sys.stderr, flush=True)
        wandb.teardown()  # it would hold the id
        run = wandb.init(**settings, mode="offline")
    kept.write_text(f"{run.id}\n", encoding="utf-8")
    return run


# ======================================================================================================================
# Training
# ======================================================================================================================
@dataclass
class Scorer:
    """A frozen score model with its own tokenizer and prompt template."""

    model: ScoreModel
    tokenizer: object
    template: str
    shares_tokens: bool  # whether it reads the policy's token ids as they are


def micro_batches(attention_mask: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The rows of a batch, `size` at a time: texts of similar length together, so that `crop` leaves little padding."""
    return [rows.sort().values for rows in attention_mask.sum(1).argsort(stable=True).split(size)]


def in_micro_batches(function, model, inputs: tuple[torch.Tensor, torch.Tensor], size: int, *settings) -> torch.Tensor:
    """function(model, ids, mask, *settings) on `size` rows of inputs = (ids, mask) at a time; results by row."""
    ids, mask = inputs
    parts = micro_batches(mask, size)
    results = torch.cat([function(model, ids[rows], mask[rows], *settings) for rows in parts])
    model.reshard()  # without a backward pass FSDP2 would keep what is not in a block, embeddings and head, whole
    return results[torch.cat(parts).argsort()]


def backward(loss: torch.Tensor, response_mask: torch.Tensor, tokens: float) -> torch.Tensor:
    """Add the gradient of a loss that is a mean over the `tokens` response tokens of the global batch.

    loss, response_mask: [rows, response], this rank's part of it. FSDP averages gradients over the ranks, so that a sum
    over ranks needs their number as a factor. Returns the part of the mean that these rows make.
    """
    part = (loss * response_mask).sum() / tokens
    (part * dist.get_world_size()).backward()
    return part.detach()


def prompt_indices(
    seed: int, iteration: int, batch: int, responses_per_prompt: int, prompts: int, use: str = "prompts"
) -> list[int]:
    """Which prompts the global batch of an iteration holds: a new order every epoch, K times each; [batch]."""
    distinct = batch // responses_per_prompt
    first = (iteration - 1) * distinct
    orders = {
        epoch: torch.randperm(prompts, generator=random_generator(seed, use, epoch)).tolist()
        for epoch in range(first // prompts, (first + distinct - 1) // prompts + 1)
    }
    indices = [orders[i // prompts][i % prompts] for i in range(first, first + distinct)]
    return [i for i in indices for _ in range(responses_per_prompt)]


def decode(tokenizer, responses: Responses) -> list[str]:
    """The responses as text, without special tokens."""
    length = responses.response_mask.shape[1]
    ids = responses.sequences[:, -length:].tolist()
    kept = responses.response_mask.sum(1).tolist()
    return tokenizer.batch_decode([row[:n] for row, n in zip(ids, kept, strict=True)], skip_special_tokens=True)


@torch.no_grad()
def score_responses(
    scorer: Scorer, responses: Responses, prompts: list[str], texts: list[str], micro_batch_size: int
) -> torch.Tensor:
    """Scores of the responses, [batch]; prompts and texts are decoded, for a score model with another tokenizer."""
    ids, mask = responses.sequences, responses.attention_mask
    if not scorer.shares_tokens:
        longest = getattr(scorer.model.model.config, "max_position_embeddings", sys.maxsize)
        encoded = encode_scored(scorer.tokenizer, prompts, texts, scorer.template, sys.maxsize)
        finished = responses.finished.tolist()
        encoded = [tokens if ends else tokens[:-1] for tokens, ends in zip(encoded, finished, strict=True)]
        encoded = [tokens[:longest] for tokens in encoded]
        ids, mask = (tensor.to(ids.device) for tensor in pad(encoded, scorer.tokenizer.pad_token_id, side="right"))
    return in_micro_batches(text_scores, scorer.model, (ids, mask), micro_batch_size)


def check_args(args: Args) -> None:
    above_zero = (
        "max_prompt_length total_episodes batch_size micro_batch_size responses_per_prompt max_new_tokens temperature "
        "update_epochs learning_rate critic_learning_rate max_grad_norm clip_coef value_clip_coef eval_size"
    )
    zero_or_more = (
        "warmup_ratio weight_decay kl_coef gae_lambda lambda_init lambda_lr lambda_max eval_every save_every ptx_coef"
    )
    for name in above_zero.split() + zero_or_more.split():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not (0 < value < math.inf if name in above_zero.split() else 0 <= value < math.inf):
            raise UserError(f"{flag} is {value}; it must be {'above 0' if name in above_zero.split() else '0 or more'}")
    if not math.isfinite(args.cost_threshold):
        raise UserError(f"--cost-threshold is {args.cost_threshold}; it must be a number")
    for name in ("gae_lambda", "warmup_ratio"):
        if getattr(args, name) > 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at most 1")
    if args.lambda_init > args.lambda_max:
        raise UserError(f"--lambda-init {args.lambda_init} is above --lambda-max {args.lambda_max}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; it must be from 0 to 2**63 - 1")
    world, k = dist.get_world_size(), args.responses_per_prompt
    if args.batch_size % (world * k):
        raise UserError(
            f"--batch-size {args.batch_size} does not divide among {world} processes with {k} responses a prompt; "
            f"give a multiple of {world * k}"
        )
    if args.total_episodes < args.batch_size:
        raise UserError(f"--total-episodes {args.total_episodes} is less than --batch-size {args.batch_size}")
    for flag, template in (
        ("--prompt-template", args.prompt_template),
        ("--score-prompt-template", args.score_prompt_template or "{prompt}"),
    ):
        if "{prompt}" not in template and template != "chat":
            raise UserError(f"{flag} '{template}' has no {{prompt}} in it")


def load_prompts(args: Args, name: str, split: str, flag: str, tokenizer) -> list[tuple[str, list[int]]]:
    """Distinct prompts as (text, token ids in the template); those over --max-prompt-length are dropped and counted."""
    texts = load_rows(name, split, [args.prompt_column], flag)[args.prompt_column]
    check_texts(texts, args.prompt_column, name, flag)
    texts = list(dict.fromkeys(texts))
    encoded = encode_prompts(tokenizer, args.prompt_template, texts, f"{flag} {name}")
    prompts = [(text, ids) for text, ids in zip(texts, encoded, strict=True) if len(ids) <= args.max_prompt_length]
    dropped = len(texts) - len(prompts)
    if dropped and dist.get_rank() == 0:
        print(f"{flag}: dropped {dropped} of {len(texts)} prompts, over --max-prompt-length {args.max_prompt_length}")
    if not prompts:
        raise UserError(f"{flag} {name}: all prompts are over --max-prompt-length {args.max_prompt_length}")
    return prompts


def load_supervised(args: Args, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Distinct supervised texts as (tokens of the prompt, tokens of the response with EOS).

    Texts without a response are dropped, and those whose prompt is over --max-prompt-length; long responses lose their
    end. Alpaca's instruction and input make one prompt, as in Safe RLHF (arXiv 2310.12773).
    """
    flag = "--ptx-dataset"
    others = ("instruction", "input", "output")
    columns = load_rows(args.ptx_dataset, args.ptx_split, ["prompt", "response"], flag, others)
    for column, texts in columns.items():  # Alpaca has rows without an input or an output
        odd = [row for row, text in enumerate(texts) if not isinstance(text, str | None)]
        if odd:
            raise UserError(f"{flag} {args.ptx_dataset}: row {odd[0]} has no text but a number or a list as '{column}'")
        columns[column] = [text or "" for text in texts]
    if "output" in columns:
        questions = zip(columns["instruction"], columns["input"], strict=True)
        columns["prompt"] = [" ".join(filter(None, question)) for question in questions]
        columns["response"] = columns["output"]
    check_texts(columns["prompt"], "prompt", args.ptx_dataset, flag)
    rows = dict.fromkeys(zip(columns["prompt"], columns["response"], strict=True))
    rows = [row for row in rows if row[1].strip()]
    prompts = [prompt for prompt, _ in rows]
    heads = encode_prompts(tokenizer, args.prompt_template, prompts, f"{flag} {args.ptx_dataset}") if rows else []
    longest = args.max_prompt_length + args.max_new_tokens
    texts = encode_scored(tokenizer, prompts, [response for _, response in rows], args.prompt_template, longest)
    kept = []
    for prompt, text, head in zip(prompts, texts, heads, strict=True):
        if len(head) <= args.max_prompt_length:
            kept.append(part(text, head))
            if not kept[-1][0]:
                raise UserError(
                    f"{flag} {args.ptx_dataset}: no token of the prompt {prompt!r} comes before its response; end "
                    "--prompt-template in a space, or take it out of the data"
                )
    dropped = len(columns["prompt"]) - len(kept)
    if dropped and dist.get_rank() == 0:
        limit = f"--max-prompt-length {args.max_prompt_length}"
        print(f"{flag}: dropped {dropped} of {dropped + len(kept)} texts: repeated, without response, or over {limit}")
    if not kept:
        raise UserError(f"{flag} {args.ptx_dataset}: no text has a response and a prompt within --max-prompt-length")
    return kept


def load_scorer(args: Args, name: str, flag: str, tokenizer, dtype: torch.dtype) -> Scorer:
    """A score model, frozen; reads the policy's tokens as they are where vocabulary and template agree."""
    scorer_tokenizer = load_tokenizer(name, args.trust_remote_code)
    template = args.score_prompt_template or args.prompt_template
    in_template(scorer_tokenizer, template, ["{prompt}"])  # a tokenizer without a chat template is found here
    shares_tokens = template == args.prompt_template and same_tokens(tokenizer, scorer_tokenizer, template)
    model = load_score_model(name, dtype, flag, args.seed, args.trust_remote_code)
    return Scorer(model.requires_grad_(False), scorer_tokenizer, template, shares_tokens)


def load_critic(args: Args, name: str | None, scorer_name: str, flag: str, tokenizer) -> ScoreModel:
    """A critic starts from `name`; by default from its score model, or the policy's backbone if tokens disagree."""
    if name is None:
        agree = same_tokens(tokenizer, load_tokenizer(scorer_name, args.trust_remote_code))
        name = scorer_name if agree else args.model
    elif not same_tokens(tokenizer, load_tokenizer(name, args.trust_remote_code)):
        raise UserError(f"{flag} {name} has another tokenizer than --model; a critic reads the policy's tokens")
    return load_score_model(name, torch.float32, flag, args.seed, args.trust_remote_code, fresh_head=True)


def same_tokens(one, other, template: str = "{prompt}") -> bool:
    """Whether two tokenizers give every text in the template the same ids."""
    probe = ["How do I clean the kettle? Use 2 lemons."]
    same_vocabulary = one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id
    return same_vocabulary and in_template(one, template, probe) == in_template(other, template, probe)


def summarize(rows: list[dict], threshold: float) -> dict:
    """Mean reward, mean cost, share of safe responses, mean {C - d}^+ and mean length in tokens."""
    count = len(rows)
    return {
        "reward": sum(row["reward"] for row in rows) / count,
        "cost": sum(row["cost"] for row in rows) / count,
        "safety_compliance": sum(row["cost"] <= threshold for row in rows) / count,
        "violation": sum(max(row["cost"] - threshold, 0.0) for row in rows) / count,
        "response_length": sum(row["length"] for row in rows) / count,
    }


def main(device: torch.device, mesh) -> None:
    args = read_args(Args, check_args)
    start_time = time.time()
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = compute_dtype(args.dtype, device)
    if args.shard_over == "world":
        mesh = init_device_mesh(device.type, (world,))

    # ---- Prompts and models: everything a mistake may hide in comes before the output directory is made
    folder, saved = find_run(args, dtype)
    with agreed():
        if args.compile:
            check_compiler(device)
        named = [("--model", args.model), ("--reward-model", args.reward_model), ("--cost-model", args.cost_model)]
        named += [("--reward-critic", args.reward_critic), ("--cost-critic", args.cost_critic)]
        for flag, name in named:
            if name is not None:
                locate(name, "model", flag)
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        prompts = load_prompts(args, args.dataset, args.dataset_split, "--dataset", tokenizer)
        eval_prompts = load_prompts(args, args.eval_dataset, args.eval_split, "--eval-dataset", tokenizer)
        eval_prompts = eval_prompts[: args.eval_size]
        supervised = load_supervised(args, tokenizer) if args.ptx_dataset is not None and args.ptx_coef > 0 else []

    # One model after the other, as rank 0 reads each whole before it is sharded
    masters, frozen = (mesh, dtype, args.compile), (mesh, dtype, args.compile, args.cpu_offload)
    with agreed():
        policy = load_pretrained(AutoModelForCausalLM, args.model, torch.float32, "--model", args.trust_remote_code)
    shard(policy, *masters)
    with agreed():
        ref_policy = load_pretrained(AutoModelForCausalLM, args.model, dtype, "--model", args.trust_remote_code)
    shard(ref_policy.requires_grad_(False), *frozen)
    with agreed():
        reward_scorer = load_scorer(args, args.reward_model, "--reward-model", tokenizer, dtype)
    shard(reward_scorer.model, *frozen)
    with agreed():
        cost_scorer = load_scorer(args, args.cost_model, "--cost-model", tokenizer, dtype)
    shard(cost_scorer.model, *frozen)
    with agreed():
        reward_critic = load_critic(args, args.reward_critic, args.reward_model, "--reward-critic", tokenizer)
    shard(reward_critic, *masters)
    with agreed():
        cost_critic = load_critic(args, args.cost_critic, args.cost_model, "--cost-critic", tokenizer)
    shard(cost_critic, *masters)
    trained = (policy, reward_critic, cost_critic)
    for model in (*trained, ref_policy, reward_scorer.model, cost_scorer.model):
        model.eval()
    if args.gradient_checkpointing:
        for model in (policy, reward_critic.model, cost_critic.model):
            recompute_activations(model)

    with agreed():
        longest = max(len(ids) for _, ids in prompts + eval_prompts) + args.max_new_tokens
        readers = [("--model", policy), ("--reward-critic", reward_critic.model), ("--cost-critic", cost_critic.model)]
        readers += [
            (flag, scorer.model.model)
            for flag, scorer in (("--reward-model", reward_scorer), ("--cost-model", cost_scorer))
            if scorer.shares_tokens
        ]
        for flag, model in readers:
            limit = getattr(model.config, "max_position_embeddings", None) or longest
            if longest > limit:
                raise UserError(
                    f"the longest prompt and --max-new-tokens {args.max_new_tokens} make {longest} tokens; {flag} "
                    f"reads {limit}: lower --max-new-tokens or --max-prompt-length"
                )
    for model in (policy, ref_policy, reward_critic, cost_critic, reward_scorer.model, cost_scorer.model):
        suit_attention(model, dtype, longest)
    data = fingerprints(dataset=prompts, eval_dataset=eval_prompts, ptx_dataset=supervised)
    writer, tracker = open_run(args, folder, saved, data)

    # ---- Optimizers
    iterations = args.total_episodes // args.batch_size
    local_batch, size = args.batch_size // world, args.micro_batch_size
    local_rows = slice(rank * local_batch, (rank + 1) * local_batch)  # this rank's part of a global batch
    adam = dict(betas=(0.9, 0.95), fused=True)
    group = {"params": list(policy.parameters()), "initial_lr": args.learning_rate}
    policy_optimizer = torch.optim.AdamW([group], lr=args.learning_rate, weight_decay=args.weight_decay, **adam)
    optimizers = [policy_optimizer] + [
        torch.optim.AdamW(critic.parameters(), lr=args.critic_learning_rate, weight_decay=0.0, **adam)
        for critic in (reward_critic, cost_critic)
    ]
    warmup = min(math.ceil(args.warmup_ratio * iterations), iterations - 1)  # a warm-up begins at zero

    def resumable() -> dict[str, torch.Tensor]:
        names, parts = ("policy", "reward_critic", "cost_critic"), zip(trained, optimizers, strict=True)
        return training_state(**dict(zip(names, parts, strict=True)))

    # ---- Where the run stands. Random numbers are keyed by the iteration, so that nothing of them needs saving
    done, multiplier = saved.get("iteration", 0), saved.get("lambda", args.lambda_init)
    skipped, skipped_in_a_row = saved.get("skipped", 0), saved.get("skipped_in_a_row", 0)
    start_time -= saved.get("seconds", 0.0)
    if saved:
        load_checkpoint(saved, resumable())
    schedule = get_cosine_schedule_with_warmup(policy_optimizer, warmup, iterations, last_epoch=done - 1)
    stop = heed_sigterm()
    sampling = (args.temperature, device, args.whole_rollout)

    def evaluate(iteration: int) -> list[dict]:
        """Answer the held-out prompts, always with the same random numbers. Rows, whole on rank 0 only."""
        uniforms = torch.rand(len(eval_prompts), args.max_new_tokens, generator=random_generator(args.seed, "evaluate"))
        rows = {}
        mine = my_share(len(eval_prompts))
        for chosen in [mine[i : i + local_batch] for i in range(0, len(mine), local_batch)]:
            texts, ids = zip(*(eval_prompts[i] for i in chosen), strict=True)
            responses = sample_responses(policy, tokenizer, ids, uniforms[chosen], *sampling)
            decoded = decode(tokenizer, responses)
            rewards, costs = (
                score_responses(scorer, responses, texts, decoded, args.micro_batch_size).tolist()
                for scorer in (reward_scorer, cost_scorer)
            )
            lengths = responses.response_mask.sum(1).tolist()
            for j, i in enumerate(chosen):
                rows[i] = {"iteration": iteration, "prompt": texts[j], "response": decoded[j]}
                rows[i] |= {"reward": rewards[j], "cost": costs[j], "length": lengths[j]}
        rows = gather_rows(rows)
        with agreed(), written(folder):
            if rank == 0:
                append_json(folder / "eval.jsonl", rows)
        return rows

    if not saved:
        before = evaluate(0)
    elif rank == 0:
        before = [row for row in read_json_lines(folder / "eval.jsonl") if row["iteration"] == 0]

    # ---- Training
    bar = tqdm(range(done + 1, iterations + 1), args.exp_name, iterations, initial=done, disable=rank != 0)
    for iteration in bar:
        # 1. The prompts of this iteration, K times each; uniform numbers for the whole global batch
        clock = [time.time()]
        indices = prompt_indices(args.seed, iteration, args.batch_size, args.responses_per_prompt, len(prompts))
        batch_prompts = [prompts[i] for i in indices[local_rows]]
        prompt_texts, prompt_ids = zip(*batch_prompts, strict=True)
        generator = random_generator(args.seed, "rollout", iteration)
        uniforms = torch.rand(args.batch_size, args.max_new_tokens, generator=generator)[local_rows]
        if supervised:
            indices = prompt_indices(args.seed, iteration, args.batch_size, 1, len(supervised), use="supervised")
            texts = [supervised[i] for i in indices[local_rows]]
            *ptx_inputs, ptx_mask = (tensor.to(device) for tensor in pad_texts(texts, tokenizer.pad_token_id))

        # 2. Rollout
        responses = sample_responses(policy, tokenizer, prompt_ids, uniforms, *sampling)
        response_mask = responses.response_mask  # [batch, response]
        length = response_mask.shape[1]
        inputs = (responses.sequences, responses.attention_mask)
        clock.append(time.time())

        # 3. Scores, and what the reference says
        texts = decode(tokenizer, responses)
        rewards = score_responses(reward_scorer, responses, prompt_texts, texts, size)  # [batch]
        costs = score_responses(cost_scorer, responses, prompt_texts, texts, size)  # [batch]
        with torch.no_grad():  # [batch, response]
            ref_logprobs = in_micro_batches(response_logprobs, ref_policy, inputs, size, length, args.temperature)
        clock.append(time.time())

        # 4. The constraint; the multiplier, by the constraint over all ranks, before the policy moves
        terminal_costs = excess = costs - args.cost_threshold  # C(x, y) - d, and below d it is negative
        broken = sum((~figure.isfinite()).sum().item() for figure in (rewards, costs, ref_logprobs))
        ptx_count = ptx_mask.sum() if supervised else 0
        excess_sum, excess_count, tokens, ptx_tokens, broken = global_sum(
            excess.sum(), excess.numel(), response_mask.sum(), ptx_count, broken, device=device
        )
        if not broken:
            multiplier = update_multiplier(multiplier, args.lambda_lr, excess_sum / excess_count, args.lambda_max)

        # 5. One step of the policy and of both critics an epoch, each over the whole batch
        figures = torch.full((7, local_batch, length), math.nan, device=device)
        old_logprobs, old_reward_values, old_cost_values, log_ratio, advantages, reward_returns, cost_returns = figures
        losses = torch.zeros(4, device=device)  # policy, reward critic, cost critic, PTX
        grad_norms, clipped = [math.nan] * 3, 0.0
        for model in trained:  # there is no dropout: train mode only switches gradient checkpointing on
            model.train()
        for epoch in range(0 if broken else args.update_epochs):
            for rows in micro_batches(inputs[1], size):
                ids, mask, used = inputs[0][rows], inputs[1][rows], response_mask[rows]
                logprobs = response_logprobs(policy, ids, mask, length, args.temperature)
                reward_values = response_values(reward_critic, ids, mask, length)
                cost_values = response_values(cost_critic, ids, mask, length)

                # 6. Rewards and costs of tokens; advantages. In the first epoch no model has moved yet: what they say
                # in the pass that the gradients need is what they said of the responses as they were sampled
                if epoch == 0:
                    old_logprobs[rows], old_reward_values[rows] = logprobs.detach(), reward_values.detach()
                    old_cost_values[rows] = cost_values.detach()
                    log_ratio[rows] = old_logprobs[rows] - ref_logprobs[rows]  # k_t of the KL penalty
                    token_rewards = token_signal(rewards[rows], log_ratio[rows], used, -args.kl_coef)
                    token_costs = token_signal(terminal_costs[rows], log_ratio[rows], used, args.kl_coef)
                    reward_advantages, reward_returns[rows] = gae(
                        token_rewards, old_reward_values[rows], used, args.gae_lambda
                    )
                    cost_advantages, cost_returns[rows] = gae(token_costs, old_cost_values[rows], used, args.gae_lambda)
                    advantages[rows] = combine_advantages(reward_advantages, cost_advantages, multiplier)

                loss = policy_loss(logprobs, old_logprobs[rows], advantages[rows], args.clip_coef)
                losses[0] += backward(loss, used, tokens)
                clipped += (((logprobs - old_logprobs[rows]).exp() - 1).abs() > args.clip_coef)[used > 0].sum().item()
                loss = value_loss(reward_values, old_reward_values[rows], reward_returns[rows], args.value_clip_coef)
                losses[1] += backward(loss, used, tokens)
                loss = value_loss(cost_values, old_cost_values[rows], cost_returns[rows], args.value_clip_coef)
                losses[2] += backward(loss, used, tokens)

                if supervised:
                    ids, mask, used = ptx_inputs[0][rows], ptx_inputs[1][rows], ptx_mask[rows]
                    logprobs = response_logprobs(policy, ids, mask, ptx_mask.shape[1], 1.0)
                    losses[3] += backward(-args.ptx_coef * logprobs, used, ptx_tokens)
            grad_norms = [clip_gradients(model, args.max_grad_norm) for model in trained]
            broken = broken or not all(map(math.isfinite, grad_norms))
            for optimizer in optimizers:
                if not broken:
                    optimizer.step()
                optimizer.zero_grad()
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        for model in trained:
            model.eval()
        clock.append(time.time())

        # 7. An update with figures that are not finite is left out; five in a row, or all there are, end the run
        skipped_in_a_row = skipped_in_a_row + 1 if broken else 0
        skipped += bool(broken)
        if broken and rank == 0:
            tqdm.write(f"iteration {iteration}: scores or gradients are not finite, update skipped", file=sys.stderr)
        if skipped_in_a_row == min(5, iterations):
            bar.close()
            save_model(policy, tokenizer, folder / "model")
            measured = f"None: the run was given up in iteration {iteration}, and this is the policy before that."
            card = (dtype, time.time() - start_time, saved)
            write_card(args, folder / "model", f"given up by {Args.exp_name}.py", measured, {}, *card)
            fail(
                f"{skipped_in_a_row} updates in a row had scores or gradients that are not finite (iteration "
                f"{iteration}); the policy before them is in {folder / 'model'}; look at the score models, or lower "
                "--learning-rate"
            )

        # 8. Log
        reward_sum, cost_sum, safe, violation, kl, finished, clipped, stopped, *losses = global_sum(
            rewards.sum(),
            costs.sum(),
            (costs <= args.cost_threshold).sum(),
            F.relu(costs - args.cost_threshold).sum(),
            (log_ratio * response_mask).sum(),
            responses.finished.sum(),
            clipped,
            stop.is_set(),
            *losses,
            device=device,
        )
        metrics = {
            "iteration": iteration,
            "episodes": iteration * args.batch_size,
            "reward": reward_sum / args.batch_size,
            "cost": cost_sum / args.batch_size,
            "safety_compliance": safe / args.batch_size,
            "violation": violation / args.batch_size,
            "excess": excess_sum / excess_count,
            "lambda": multiplier,
            "kl": kl / args.batch_size,
            "response_length": tokens / args.batch_size,
            "finished": finished / args.batch_size,
            "policy_loss": losses[0] / args.update_epochs,
            "reward_value_loss": losses[1] / args.update_epochs,
            "cost_value_loss": losses[2] / args.update_epochs,
            "clip_fraction": clipped / args.update_epochs / tokens,
            "policy_grad_norm": grad_norms[0],
            "reward_critic_grad_norm": grad_norms[1],
            "cost_critic_grad_norm": grad_norms[2],
            "learning_rate": learning_rate,
            "skipped_updates": skipped,
            "seconds_rollout": clock[1] - clock[0],
            "seconds_scoring": clock[2] - clock[1],
            "seconds_update": clock[3] - clock[2],
        }
        if supervised:
            metrics["ptx_loss"] = losses[3] / args.update_epochs / args.ptx_coef
        with agreed(), written(folder):
            if rank == 0:
                log_metrics(folder, writer, tracker, metrics, iteration)
        if rank == 0:
            bar.set_postfix_str(
                f"reward {metrics['reward']:.2f}, cost {metrics['cost']:.2f}, "
                f"compliance {metrics['safety_compliance']:.1%}, λ {multiplier:.2f}"
            )
        if args.eval_every and iteration % args.eval_every == 0 and iteration < iterations:
            evaluate(iteration)

        # 9. Save what the run needs to go on
        if stopped or (args.save_every and (iteration % args.save_every == 0 or iteration == iterations)):
            state = {"iteration": iteration, "lambda": multiplier, "seconds": time.time() - start_time}
            state |= {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row, "data": data}
            save_checkpoint(folder, iteration, resumable(), dtype, state)
        if stopped:
            bar.close()
            stop_run(folder, f"iteration {iteration} of {iterations}")
    bar.close()

    # ---- After
    after = evaluate(iterations)
    save_model(policy, tokenizer, folder / "model")
    if rank == 0:
        seconds = time.time() - start_time
        summary = {
            "algorithm": Args.exp_name,  # the default, whatever this run is called
            "seed": args.seed,
            "dtype": str(dtype).removeprefix("torch."),
            "processes": world,
            "episodes": iterations * args.batch_size,
            "episodes_per_second": iterations * args.batch_size / seconds,
            "wall_seconds": seconds,
            "lambda": multiplier,
            "skipped_updates": skipped,
            "before": summarize(before, args.cost_threshold),
            "after": summarize(after, args.cost_threshold),
        }
        measured = (
            f"Means over the answers to {len(after)} held-out prompts of `--eval-dataset`, by the reward model and the "
            "cost model. Safety compliance is the share of answers with cost at most d (`--cost-threshold`), violation "
            "the mean of {C - d}^+, response length is in tokens."
        )
        results = {name: summary[name] for name in ("before", "after")}
        what = f"aligned by {__doc__.partition(':')[0]}"
        write_card(args, folder / "model", what, measured, results, dtype, seconds, saved)
    with agreed(), written(folder):
        if rank == 0:
            writer.close()
            write_json(folder / "summary.json", summary)
    if rank == 0:
        if tracker:
            tracker.finish()
        print_results(summary, before, after)
        print(f"\n{seconds:.0f} s; written to {folder}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if args.push_to_hub is not None:
        push_models(args, folder)


def print_results(summary: dict, before: list[dict], after: list[dict]) -> None:
    """The table of before and after, and three prompts with both answers."""
    names = dict(
        reward="reward", cost="cost", safety_compliance="safety compliance", violation="violation {C-d}^+",
        response_length="response length",
    )  # fmt: skip
    print(f"\n{f'{len(before)} held-out prompts':<22}{'before':>10}{'after':>10}")
    for key, name in names.items():
        form = "{:>10.1%}" if key == "safety_compliance" else "{:>10.2f}"
        print(f"{name:<22}{form.format(summary['before'][key])}{form.format(summary['after'][key])}")
    for i in sorted({0, len(before) // 3, 2 * len(before) // 3}):
        print(f"\n{before[i]['prompt']}")
        for name, row in (("before", before[i]), ("after", after[i])):
            print(f"  {name:<6} (reward {row['reward']:+.1f}, cost {row['cost']:+.1f})  {row['response']}")


if __name__ == "__main__":
    main(*start_processes())
    shut_down()
