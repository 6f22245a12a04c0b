"""Preference models for safe RLHF: a reward model and a cost model, trained on pairs of responses.

A score model reads a prompt x with its response y and gives one number at the last token. Two of them are needed:

    reward  R(x, y): how helpful.   Bradley-Terry on the more helpful response w of each pair (w, l):
            loss = -log σ(R_w - R_l) + μ · mean(R²)
    cost    C(x, y): how harmful, C ≤ 0 is safe.   Bradley-Terry on the less safe response u of each pair (u, s), and a
            sign for each response by itself, which makes zero the border (sign +1 for unsafe, -1 for safe):
            loss = -log σ(C_u - C_s) - log σ(sign_u · C_u) - log σ(sign_s · C_s) + μ · mean(C²)

Source: Safe RLHF (Dai et al., ICLR 2024, arXiv 2310.12773).

The data have PKU-SafeRLHF's columns.

    python preference_models.py --kind cost                                 # the embedded toy world, on a laptop
    torchrun --nproc_per_node 8 preference_models.py --kind cost --model PKU-Alignment/alpaca-7b-reproduced \
        --dataset PKU-Alignment/PKU-SafeRLHF --eval-dataset PKU-Alignment/PKU-SafeRLHF \
        --prompt-template "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" \
        --batch-size 128 --micro-batch-size 16 --learning-rate 2e-5 --gradient-checkpointing
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 preference_models.py ...
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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    get_cosine_schedule_with_warmup,
)

TOY = Path(__file__).resolve().parent / "toy"


@dataclass
class Args:
    """Train a reward model or a cost model on pairs of responses."""

    kind: Literal["reward", "cost"] = "reward"
    """what the model learns: helpfulness (reward) or harmfulness with zero as the border of safe and unsafe (cost)"""
    model: str = str(TOY / "policy")
    """language model whose backbone the score model starts from, or a score model to train on (folder or Hub id)"""
    dataset: str = str(TOY / "data" / "train.parquet")
    """training pairs in PKU-SafeRLHF's columns (jsonl, json, csv or parquet file, folder, or Hub id); for --kind reward
    also hh-rlhf's columns chosen and rejected, whole dialogues"""
    dataset_split: str = "train"
    """split of the training pairs; slices such as train[:1000] are allowed"""
    eval_dataset: str = str(TOY / "data" / "test.parquet")
    """held-out pairs, same columns"""
    eval_split: str = "test"
    """split of the held-out pairs"""
    prompt_template: str = "{prompt}"
    """text put around a prompt, the response follows it directly; "chat" takes the tokenizer's chat template"""
    output_dir: str | None = None
    """where the run is written; default runs/<exp-name>-<seed>-<time>"""
    save_every: int = 0
    """optimizer steps between checkpoints, of which two are kept; 0 writes one only when SIGTERM ends the run"""
    resume: bool = False
    """go on from the newest whole checkpoint in --output-dir, or start there if it holds nothing"""
    exp_name: str = "preference_models"
    """name of the run"""
    seed: int = 1
    """seeds the order of the pairs and the fresh score head"""
    epochs: int = 2
    """passes over the training pairs"""
    batch_size: int = 128
    """pairs an optimizer step, over all processes"""
    micro_batch_size: int = 64
    """pairs a process takes through one forward and backward pass"""
    max_length: int = 512
    """tokens of prompt and response together; longer texts lose their end"""
    learning_rate: float = 1e-3
    """peak learning rate; cosine schedule down to zero"""
    warmup_ratio: float = 0.03
    """share of the optimizer steps spent warming up"""
    weight_decay: float = 0.1
    """AdamW's weight decay"""
    regularization: float = 0.001
    """μ, the weight of the mean squared score"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute type; auto: bfloat16 on CUDA and on CPUs with instructions for it, else float32; masters stay float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    compile: bool = False
    """compile the transformer blocks (torch.compile): faster and less memory, after a minute or so of compiling"""
    shard_over: Literal["node", "world"] = "node"
    """processes that share one copy of a model: those of each node (hybrid sharding) or all; the same on one node"""
    track: bool = False
    """also log to Weights & Biases (needs the wandb package)"""
    push_to_hub: str | None = None
    """repository of the Hub (namespace/name) that the finished run's model is uploaded to, with its card"""
    hub_private: bool = True
    """make that repository private if it is not there yet"""
    trust_remote_code: bool = False
    """run model code that comes with a checkpoint; off, such checkpoints are refused"""


# ======================================================================================================================
# The two losses: pure functions
# ======================================================================================================================
def reward_loss(better: torch.Tensor, worse: torch.Tensor, regularization: float) -> torch.Tensor:
    """Bradley-Terry loss of the reward model (arXiv 2310.12773).

    better, worse: scores of the more and the less helpful response of each pair, [pairs].
    Returns the loss of each pair, [pairs].
    """
    return -F.logsigmoid(better - worse) + regularization * (better**2 + worse**2) / 2


def cost_loss(
    unsafer: torch.Tensor,
    safer: torch.Tensor,
    unsafer_sign: torch.Tensor,
    safer_sign: torch.Tensor,
    regularization: float,
) -> torch.Tensor:
    """Loss of the cost model: the pair's order, and each response's own side of zero (arXiv 2310.12773).

    unsafer, safer: scores of the more and the less harmful response of each pair, [pairs].
    unsafer_sign, safer_sign: +1 where that response is labelled unsafe, -1 where safe, [pairs].
    Returns the loss of each pair, [pairs].
    """
    order = -F.logsigmoid(unsafer - safer)
    border = -F.logsigmoid(unsafer_sign * unsafer) - F.logsigmoid(safer_sign * safer)
    return order + border + regularization * (unsafer**2 + safer**2) / 2


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
def check_args(args: Args) -> None:
    for name in ("epochs", "batch_size", "micro_batch_size", "max_length", "learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    for name in ("regularization", "weight_decay", "warmup_ratio", "save_every"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 0 or more")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; it must be from 0 to 2**63 - 1")
    if args.warmup_ratio > 1:
        raise UserError(f"--warmup-ratio is {args.warmup_ratio}; it must be at most 1")
    if args.batch_size % dist.get_world_size():
        raise UserError(
            f"--batch-size {args.batch_size} does not divide among {dist.get_world_size()} processes; "
            f"give a multiple of {dist.get_world_size()}"
        )
    if "{prompt}" not in args.prompt_template and args.prompt_template != "chat":
        raise UserError(f"--prompt-template '{args.prompt_template}' has no {{prompt}} in it")


def load_pairs(args: Args, name: str, split: str, flag: str, tokenizer) -> list[dict]:
    """Pairs with their tokens, the better (reward) or the more harmful (cost) response first.

    Each is {prompt, responses, ids, signs}, the last three holding one entry a response; signs are +1 unsafe, -1 safe.
    """
    preference = "better_response_id" if args.kind == "reward" else "safer_response_id"
    safety = [] if args.kind == "reward" else ["is_response_0_safe", "is_response_1_safe"]
    others = ("chosen", "rejected") if args.kind == "reward" else ()
    columns = load_rows(name, split, ["prompt", "response_0", "response_1", preference, *safety], flag, others)
    if "chosen" in columns:
        return load_dialogues(args, columns, name, flag, tokenizer)
    check_texts(columns["prompt"], "prompt", name, flag)
    ids = []
    for column in ("response_0", "response_1"):
        check_texts(columns[column], column, name, flag)
        ids.append(encode_scored(tokenizer, columns["prompt"], columns[column], args.prompt_template, args.max_length))
    pairs = []
    for row in range(len(ids[0])):
        choice = columns[preference][row]
        if choice not in (0, 1):
            raise UserError(f"{flag} {name}: row {row} has {preference} {choice!r}; it must be 0 or 1")
        choice = int(choice)  # some readers make 0.0 or False of it
        safe = [columns[column][row] for column in safety] or [True, True]
        if not all(label in (True, False) for label in safe):
            raise UserError(f"{flag} {name}: row {row} has a safety label that is neither true nor false")
        order = (choice, 1 - choice) if args.kind == "reward" else (1 - choice, choice)
        pairs.append(
            {
                "prompt": columns["prompt"][row],
                "responses": [columns[f"response_{i}"][row] for i in order],
                "ids": [ids[i][row] for i in order],
                "signs": [-1.0 if safe[i] else 1.0 for i in order],
            }
        )
    return pairs


def load_dialogues(args: Args, columns: dict[str, list], name: str, flag: str, tokenizer) -> list[dict]:
    """Pairs of whole dialogues that end in an answer, the chosen one first; those with an empty answer are dropped."""
    turn = "\n\nAssistant:"
    if args.prompt_template != "{prompt}":
        raise UserError(f"{flag} {name}: its dialogues are read as they are; leave --prompt-template out")
    pairs, kept = [], []
    for row, texts in enumerate(zip(columns["chosen"], columns["rejected"], strict=True)):
        if not all(isinstance(text, str) and turn in text for text in texts):
            raise UserError(f"{flag} {name}: row {row} has a dialogue without '{turn}'".replace("\n", "\\n"))
        (prompt, _, chosen), (_, _, rejected) = (text.rpartition(turn) for text in texts)
        if chosen.strip() and rejected.strip():
            pairs.append({"prompt": prompt + turn, "responses": [chosen, rejected], "signs": [-1.0, -1.0]})
            kept.append(texts)
    dropped = len(columns["chosen"]) - len(pairs)
    if dropped and dist.get_rank() == 0:
        print(f"{flag}: dropped {dropped} of {dropped + len(pairs)} pairs, whose answer is empty")
    if not pairs:
        raise UserError(f"{flag} {name}: all answers are empty")
    empty = [""] * len(kept)
    ids = [encode_scored(tokenizer, texts, empty, "{prompt}", args.max_length) for texts in zip(*kept, strict=True)]
    return [pair | {"ids": list(both)} for pair, *both in zip(pairs, *ids, strict=True)]


def score_pairs(model: ScoreModel, pairs: list[dict], pad_id: int, device) -> torch.Tensor:
    """Scores of both responses of each pair, [pairs, 2], in the order load_pairs gave them."""
    ids, mask = pad([ids for pair in pairs for ids in pair["ids"]], pad_id, side="right")
    ids, mask = ids.to(device), mask.to(device)
    return text_scores(model, ids, mask).view(-1, 2)


def pair_losses(kind: str, scores: torch.Tensor, pairs: list[dict], regularization: float) -> torch.Tensor:
    """Loss of each pair, [pairs], from scores [pairs, 2]."""
    if kind == "reward":
        return reward_loss(scores[:, 0], scores[:, 1], regularization)
    signs = torch.tensor([pair["signs"] for pair in pairs], device=scores.device)
    return cost_loss(scores[:, 0], scores[:, 1], signs[:, 0], signs[:, 1], regularization)


@torch.no_grad()
def evaluate(args: Args, model: ScoreModel, pairs: list[dict], pad_id: int, device) -> tuple[dict, list[dict]]:
    """Held-out loss and accuracies, and a row a pair; every rank scores its share. Whole on rank 0 only."""
    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i]["ids"])))  # similar lengths: little padding
    mine = [order[i] for i in my_share(len(order))]
    rows = {}
    for start in range(0, len(mine), args.micro_batch_size):
        chosen = mine[start : start + args.micro_batch_size]
        batch = [pairs[i] for i in chosen]
        scores = score_pairs(model, batch, pad_id, device)
        losses = pair_losses(args.kind, scores, batch, args.regularization)
        for i, pair, score, loss in zip(chosen, batch, scores.tolist(), losses.tolist(), strict=True):
            rows[i] = {"prompt": pair["prompt"], "responses": pair["responses"], "scores": score, "loss": loss}
            if args.kind == "cost":
                rows[i]["unsafe"] = [sign > 0 for sign in pair["signs"]]
    rows = gather_rows(rows)
    if not rows:
        return {}, []
    result = {
        "loss": sum(row["loss"] for row in rows) / len(rows),
        "pair_accuracy": sum(row["scores"][0] > row["scores"][1] for row in rows) / len(rows),
        "score_mean": sum(sum(row["scores"]) for row in rows) / (2 * len(rows)),
    }
    if args.kind == "cost":
        right = sum((row["scores"][i] > 0) == row["unsafe"][i] for row in rows for i in (0, 1))
        result["sign_accuracy"] = right / (2 * len(rows))
    return result, rows


def main(device: torch.device, mesh) -> None:
    args = read_args(Args, check_args)
    start_time = time.time()
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = compute_dtype(args.dtype, device)
    if args.shard_over == "world":
        mesh = init_device_mesh(device.type, (world,))

    # ---- Data and model: everything a mistake may hide in comes before the output directory is made
    folder, saved = find_run(args, dtype)
    with agreed():
        if args.compile:
            check_compiler(device)
        locate(args.model, "model", "--model")
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        train_pairs = load_pairs(args, args.dataset, args.dataset_split, "--dataset", tokenizer)
        eval_pairs = load_pairs(args, args.eval_dataset, args.eval_split, "--eval-dataset", tokenizer)
        steps_per_epoch = len(train_pairs) // args.batch_size
        if steps_per_epoch == 0:
            raise UserError(f"--batch-size {args.batch_size} is more than the {len(train_pairs)} pairs of --dataset")
        model = load_score_model(
            args.model, torch.float32, "--model", args.seed, args.trust_remote_code, fresh_head=True
        )
        longest = max(len(ids) for pair in train_pairs + eval_pairs for ids in pair["ids"])
        limit = getattr(model.model.config, "max_position_embeddings", None) or longest
        if longest > limit:
            raise UserError(f"a text has {longest} tokens, but --model reads {limit}: lower --max-length to {limit}")
    suit_attention(model, dtype, longest)
    shard(model.train(), mesh, dtype, args.compile)
    if args.gradient_checkpointing:
        recompute_activations(model.model)
    data = fingerprints(dataset=train_pairs, eval_dataset=eval_pairs)
    writer, tracker = open_run(args, folder, saved, data)
    group = {"params": list(model.parameters()), "initial_lr": args.learning_rate}
    optimizer = torch.optim.AdamW(
        [group], lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    steps = args.epochs * steps_per_epoch
    warmup = min(math.ceil(args.warmup_ratio * steps), steps - 1)  # a warm-up begins at zero
    done, skipped = saved.get("step", 0), saved.get("skipped", 0)
    skipped_in_a_row = saved.get("skipped_in_a_row", 0)
    start_time -= saved.get("seconds", 0.0)
    if saved:
        load_checkpoint(saved, training_state(model=(model, optimizer)))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps, last_epoch=done - 1)
    local = args.batch_size // world  # pairs of this rank in each batch
    stop = heed_sigterm()

    # ---- Training
    bar = tqdm(total=steps, initial=done, desc=f"{args.kind} model", disable=rank != 0)
    for epoch in range(args.epochs):
        order = torch.randperm(len(train_pairs), generator=random_generator(args.seed, "pairs", epoch)).tolist()
        for batch_index in range(steps_per_epoch):
            step = epoch * steps_per_epoch + batch_index + 1
            if step <= done:
                continue
            start = batch_index * args.batch_size + rank * local
            batch = [train_pairs[i] for i in order[start : start + local]]
            loss_sum, right = 0.0, 0
            for micro in range(0, local, args.micro_batch_size):
                pairs = batch[micro : micro + args.micro_batch_size]
                scores = score_pairs(model, pairs, tokenizer.pad_token_id, device)
                losses = pair_losses(args.kind, scores, pairs, args.regularization)
                # FSDP averages gradients over ranks; times the number of ranks it is the mean over the global batch.
                (losses.sum() / args.batch_size * world).backward()
                loss_sum += losses.sum().item()
                right += (scores[:, 0] > scores[:, 1]).sum().item()
            grad_norm = clip_gradients(model, args.max_grad_norm)
            if math.isfinite(grad_norm):
                optimizer.step()
                skipped_in_a_row = 0
            else:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                if rank == 0:
                    tqdm.write(f"step {step}: gradients are not finite, update skipped", file=sys.stderr)
            optimizer.zero_grad()
            if skipped_in_a_row == min(5, steps):
                bar.close()
                fail(
                    f"{skipped_in_a_row} updates in a row had gradients that are not finite (step {step}); "
                    f"try a lower --learning-rate"
                )
            loss_sum, right, stopped = global_sum(loss_sum, right, stop.is_set(), device=device)
            metrics = {
                "step": step,
                "epoch": step / steps_per_epoch,
                "loss": loss_sum / args.batch_size,
                "pair_accuracy": right / args.batch_size,
                "grad_norm": grad_norm,
                "learning_rate": schedule.get_last_lr()[0],
                "skipped_updates": skipped,
            }
            schedule.step()
            if batch_index + 1 == steps_per_epoch:
                result, rows = evaluate(args, model, eval_pairs, tokenizer.pad_token_id, device)
                metrics |= {f"eval_{name}": value for name, value in result.items()}
            with agreed(), written(folder):
                if rank == 0:
                    log_metrics(folder, writer, tracker, metrics, step)
            if rank == 0:
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", pair_accuracy=f"{metrics['pair_accuracy']:.3f}")
                bar.update()
            if step < steps and (stopped or (args.save_every and step % args.save_every == 0)):
                state = {"step": step, "skipped": skipped, "skipped_in_a_row": skipped_in_a_row}
                state |= {"seconds": time.time() - start_time, "data": data}
                save_checkpoint(folder, step, training_state(model=(model, optimizer)), dtype, state)
                if stopped:
                    bar.close()
                    stop_run(folder, f"step {step} of {steps}")
    bar.close()

    # ---- Files
    save_model(model, tokenizer, folder / "model")
    if rank == 0:
        seconds = time.time() - start_time
        summary = {
            "algorithm": f"{args.kind} model",
            "seed": args.seed,
            "dtype": str(dtype).removeprefix("torch."),
            "pairs": steps * args.batch_size,
            "pairs_per_second": steps * args.batch_size / seconds,
            "wall_seconds": seconds,
            "skipped_updates": skipped,
            "eval_pairs": len(eval_pairs),
            "eval": result,
        }
        measured = (
            f"On {len(eval_pairs)} held-out pairs of `--eval-dataset`: mean loss, share of pairs in the right order, "
            "mean score, and for a cost model the share of responses whose score has the sign of their label."
        )
        what = f"{args.kind} model"
        write_card(args, folder / "model", what, measured, {"held-out pairs": result}, dtype, seconds, saved)
    with agreed(), written(folder):
        if rank == 0:
            append_json(folder / "eval.jsonl", rows)
            writer.close()
            write_json(folder / "summary.json", summary)
    if rank == 0:
        if tracker:
            tracker.finish()
        accuracy = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items())
        print(f"{args.kind} model on {len(eval_pairs)} held-out pairs: {accuracy}\nwritten to {folder}")

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if args.push_to_hub is not None:
        push_models(args, folder)


if __name__ == "__main__":
    main(*start_processes())
    shut_down()
