"""Memory of one GPU in each phase of an iteration of repo.py or repo_group.py, at sizes from 1B to 13B, without a GPU.

    python benchmark/memory.py                                  # the table of docs/scale.md: some minutes on one core
    python benchmark/memory.py --sizes 7B --gpus 8 --cpu-offload
    python benchmark/memory.py --configs FOLDER_OR_HUB_ID --gpus 8                              # your own model
    python benchmark/memory.py --sizes 7B --gpus 4 --script repo_group.py                       # without critics
    python benchmark/memory.py --write                          # ... and put the table into docs/scale.md

RePO holds six models of one size. Policy, reward critic and cost critic are trained: weights, gradients and the two
moments of AdamW are float32 shards. Reference, reward model and cost model are frozen: bfloat16 shards. The forward and
backward passes are bfloat16. repo_group.py is the same without the critics: four models, one of them trained.

How it counts. repo.py's own functions (load_model, sample_responses, response_logprobs, score_responses,
response_values, policy_loss, value_loss, backward) run one iteration of one process on tensors that have a shape and no
content (FakeTensorMode), in a process group that sends nothing. torch.distributed's FSDPMemTracker adds up the storages
that are alive. All layers, all six models and all gathers are run and nothing is extrapolated, with one exception: of
the rollout only the prompt's pass and the last token are run, since the cache grows in between. The order is scoring,
update, rollout, as in the second iteration: what a phase leaves behind counts in the next.

The mesh is one of CPUs, since FSDP2 asks a GPU's mesh for streams; the sizes are the same. Attention on CPUs (flash)
and on GPUs under a mask of padding (memory-efficient) hold the same tensors: the output and a float32 log-sum-exp of
each head and position. A mask is always there, as if the batch had padding. With
--cpu-offload the frozen shards are left out, and scoring gets one unit's shard more, for its way to the GPU.

What the count cannot see: the CUDA context, NCCL's buffers, cuBLAS's workspaces, and free memory that the caching
allocator cannot hand out (fragmentation). For the first three the table takes off ALLOWANCE, an assumption; the last
has to fit into what is spare then. Rounding of storages to 512 bytes is not counted, nor is the loading and saving of
models, tensor by tensor. Figures are GiB (2**30 bytes) of one GPU; a GPU of 80 GB is taken as 80e9 bytes = 74.5 GiB,
though H100 and A100 report between 79 and 80 GiB, so that some more is left.
"""

import contextlib
import copy
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
import transformers
import tyro
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BatchEncoding,
    LlamaConfig,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import repo  # noqa: E402

GIB = 2**30
CAPACITY = 80 * 10**9  # bytes of a GPU of 80 GB
# CUDA context, NCCL ("a few GB", github.com/pytorch/pytorch/issues/144397), cuBLAS: assumed, not worked out
ALLOWANCE = 3 * GIB

# hidden, layers, heads, key-value heads, intermediate, vocabulary, tied embeddings
SHAPES = {
    "1B": (2048, 22, 32, 4, 5632, 32000, False),  # TinyLlama 1.1B
    "3B": (3072, 28, 24, 8, 8192, 128256, True),  # Llama 3.2 3B
    "7B": (4096, 32, 32, 32, 11008, 32001, False),  # Llama 7B with Alpaca's pad token: alpaca-7b-reproduced
    "13B": (5120, 40, 40, 40, 13824, 32000, False),  # Llama 2 13B
}
TRAINED = ("policy", "reward critic", "cost critic")
FROZEN = ("reference", "reward model", "cost model")
UPDATES = {name: f"update of {name}" for name in TRAINED}


@dataclass
class Args:
    """Memory of one GPU in each phase of an iteration of repo.py or repo_group.py."""

    script: Literal["repo.py", "repo_group.py"] = "repo.py"
    """the script; repo_group.py has no critics"""
    sizes: tuple[Literal["1B", "3B", "7B", "13B"], ...] = tuple(SHAPES)
    """sizes to work out"""
    configs: tuple[str, ...] = ()
    """folders or Hub ids of models to work out instead; only their config.json is read"""
    gpus: int | None = None
    """GPUs that share each model: those of all nodes; default: 1 for 1B, else 8"""
    batch: int = 16
    """prompts of one GPU"""
    micro_batch: int = 16
    """repo.py's --micro-batch-size"""
    prompt_length: int = 256
    """tokens of every prompt"""
    response_length: int = 256
    """tokens of every response"""
    gradient_checkpointing: bool = True
    """repo.py's --gradient-checkpointing"""
    cpu_offload: bool = False
    """repo.py's --cpu-offload"""
    ptx: bool = False
    """whether repo.py has a --ptx-dataset; its texts are taken to be as long as prompts and responses"""
    json: str | None = None
    """also write the figures, in bytes, to this file"""
    write: bool = False
    """also put the table, which is that of the defaults, into docs/scale.md"""


def trained_by(args: Args) -> tuple[str, ...]:
    return TRAINED if args.script == "repo.py" else TRAINED[:1]


def llama(hidden, layers, heads, key_value_heads, intermediate, vocabulary, tied) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


class Numbers(TorchDispatchMode):
    """Where code asks a fake tensor for a number (`.item()`, `if tensor`), the answer is 0; 1 for the result of `any`.

    So no mask counts as full, and sampling goes on to the last token, since some response is always running.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # down to the shards first
        if func is torch.ops.aten._local_scalar_dense.default:
            return getattr(args[0], "of_any", 0)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.any.default:
            result.of_any = 1
        return result


class Tokenizer:
    """What repo.py asks of a tokenizer while it loads models and samples; every id of the embedding is a token."""

    pad_token_id, eos_token_id, end_id = 0, 1, 1

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return {"last": self.vocabulary - 1}

    def pad(self, batch: dict, **_) -> BatchEncoding:
        shape = len(batch["input_ids"]), max(map(len, batch["input_ids"]))
        ids, mask = (torch.ones(shape, dtype=torch.long) for _ in range(2))
        mask[1:, 0] = 0  # as before a shorter prompt; without padding there would be no mask in attention
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def batch_decode(self, rows: list, **_) -> list[str]:
        return [""] * len(rows)


class FromConfig:
    """In place of a class of the library: "loads" a model that has a configuration and no weights."""

    def __init__(self, cls):
        self.cls = cls

    def from_pretrained(self, name: str, config, dtype: torch.dtype, **_) -> tuple[nn.Module, dict]:
        report = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
        return self.cls.from_config(config, dtype=dtype), report


class Models(nn.Module):
    """All models under one roof, for the tracker follows one module; it is never called itself."""

    def __init__(self, models: dict[str, nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models.values())

    def forward(self):
        raise NotImplementedError


class Tracker:
    """Peaks of the memory by phase, in bytes."""

    def __init__(self, models: dict[str, nn.Module], mesh, optimizers: dict[str, torch.optim.Optimizer]):
        self.tracker = FSDPMemTracker(fully_shard(Models(models), mesh=mesh))
        for optimizer in optimizers.values():
            self.tracker.track_inputs(tuple(states_of(optimizer)))
        self.roots, self.peaks = set(models.values()), {}
        with self.tracker:  # takes the shards in
            pass

    def held(self, kind: str = "Total", when: str = "current") -> int:
        """Bytes of all tensors or of one of the tracker's kinds, now or at the peak."""
        snapshots = self.tracker.get_tracker_snapshot(when).values()
        return sum(
            size for snapshot in snapshots for key, size in snapshot.items() if kind == getattr(key, "value", key)
        )

    @contextlib.contextmanager
    def phase(self, name: str):
        hook = register_module_forward_pre_hook(self.forget)
        with self.tracker:
            yield
        hook.remove()
        self.peaks[name] = max(self.peaks.get(name, 0), self.held(when="peak"))

    def forget(self, module: nn.Module, _) -> None:
        """Before each forward pass: the tracker refuses one while it has statistics of the same model's last."""
        if module in self.roots and module in self.tracker.memory_tracking:
            self.tracker.reset_mod_stats()

    def restart(self) -> None:
        """Inside a phase: forget its peak so far."""
        self.tracker.__exit__(None, None, None)
        self.tracker.__enter__()  # begins with what is held now


@contextlib.contextmanager
def pretended(processes: int):
    """Tensors without content and a process group that sends nothing; yields a mesh over it."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        mesh = init_device_mesh("cpu", (processes,))
        with FakeTensorMode(), Numbers():
            yield mesh
    finally:
        dist.destroy_process_group()
        gc.collect()


def full_length(ids: torch.Tensor, mask: torch.Tensor, size: int, length: int = 0) -> list[tuple]:
    """repo.py's micro-batches if all texts have the same length: the worst case. Reads no content, which fakes lack."""
    return [(rows, ids[rows], mask[rows], length) for rows in torch.arange(len(ids)).split(size)]


def load_models(config, mesh, args: Args) -> dict[str, nn.Module]:
    """The six models, or four, loaded and sharded by repo.py."""
    labelled = copy.deepcopy(config)
    labelled.num_labels = 1
    models, options = {}, dict(mesh=mesh, dtype=torch.bfloat16, tokenizer=Tokenizer(config.vocab_size))
    options["longest"] = 129  # for shorter texts repo.py would take another attention on CPUs
    # Weights without content need not be read, sent to the other processes or moved from the meta device.
    skipped = [
        mock.patch.object(nn.Module, "to_empty", lambda module, **_: module),
        mock.patch.object(dist, "broadcast_object_list"),
        mock.patch.object(
            repo, "sum", lambda sizes: 2**24, create=True
        ),  # tiny models of tests are sharded by block, too
        mock.patch.object(repo, "set_model_state_dict"),
        mock.patch.object(repo, "encode", lambda tokenizer, texts: [[2]]),
    ]
    with contextlib.ExitStack() as stack:
        for patch in skipped:
            stack.enter_context(patch)
        for name in trained_by(args) + FROZEN:
            dtype = torch.float32 if name in TRAINED else torch.bfloat16
            language_model = name in ("policy", "reference")
            cls = FromConfig(AutoModelForCausalLM if language_model else AutoModelForSequenceClassification)
            own = dict(config=config if language_model else labelled, loading={"dtype": dtype})
            model = repo.load_model(cls, name, "", offload=args.cpu_offload and name in FROZEN, **own, **options)
            if not language_model:
                model.forward = repo.token_scores.__get__(model)
                model.shares_tokens = True
            models[name] = model.requires_grad_(name in TRAINED)
    if args.gradient_checkpointing:
        for name in trained_by(args):
            model = models[name]
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
            # Inputs' gradients are wanted by adapters; the tracker's hooks would keep the embedded tokens alive.
            model.disable_input_require_grads()
    return models


def make_optimizers(models: dict[str, nn.Module], args: Args) -> dict[str, torch.optim.Optimizer]:
    """repo.py's optimizers, with their states, which come with the first step.

    That step and its clipping are not tracked: DTensor works out new operations on tensors of the global shape, which
    a tracker in the same FakeTensorMode would count; afterwards it knows them.
    """
    optimizers = {}
    for name in trained_by(args):
        optimizers[name] = torch.optim.AdamW(models[name].parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
        for parameter in models[name].parameters():
            parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(models[name].parameters(), 1.0).full_tensor()
        optimizers[name].step()
        optimizers[name].zero_grad()
    return optimizers


def states_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def storage_bytes(tensors) -> int:
    """Bytes that tensors hold in this process, shards with their padding."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in local}.values())


def largest_unit(model: nn.Module) -> int:
    """Bytes of the largest shard that is gathered at once: a block's, or all that is outside of blocks."""
    blocks = [storage_bytes(unit.parameters()) for unit in model.modules() if isinstance(unit, FSDPModule)][1:]
    return max(*blocks, storage_bytes(model.parameters()) - sum(blocks))


def rollout(tracker: Tracker, policy, args: Args, skip: bool) -> dict[str, int]:
    """The rollout of this GPU's prompts. Returns what the policy and its cache take when the last token begins, bytes.

    skip: leave out the tokens between the first and the last, whose cache is filled by a longer prompt instead.
    """
    parts = {}

    def sample(prompt_length: int, tokens: int, only_last: bool) -> None:
        passes = 0
        before = {kind: tracker.held(kind) for kind in ("Total", "Unsharded Param")}

        def begin(*_) -> None:
            """Before each forward pass of the policy, whose logits are those of one token."""
            nonlocal passes
            passes += 1
            if passes == tokens:
                parts["policy"] = tracker.held("Unsharded Param") - before["Unsharded Param"]
                parts["cache"] = tracker.held() - before["Total"] - parts["policy"]
                if only_last:
                    tracker.restart()

        hook = policy.register_forward_pre_hook(begin, prepend=True)
        prompts = [[2] * prompt_length] * args.batch
        uniforms = torch.zeros(args.batch, tokens)
        with tracker.phase("rollout"):
            repo.sample_responses(policy, Tokenizer(policy.vocabulary), prompts, uniforms, 1.0)
        hook.remove()
        assert passes == tokens

    if skip and args.response_length > 2:
        sample(args.prompt_length, 1, only_last=False)
        sample(args.prompt_length + args.response_length - 2, 2, only_last=True)
    else:
        sample(args.prompt_length, args.response_length, only_last=False)
    return parts


def measure(config, gpus: int, args: Args, skip: bool = True) -> dict:
    """Bytes of one of `gpus` GPUs: at rest by model, and the peak of each phase."""
    trained = trained_by(args)
    with pretended(gpus) as mesh, mock.patch.object(repo, "micro_batches", full_length):
        models = load_models(config, mesh, args)
        optimizers = make_optimizers(models, args)
        tracker = Tracker(models, mesh, optimizers)
        counts = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
        at_rest = {
            name: {"shards": storage_bytes(model.parameters()), "optimizer": 0} for name, model in models.items()
        }
        for name, optimizer in optimizers.items():
            at_rest[name]["optimizer"] = storage_bytes(states_of(optimizer))
        offloaded = sum(at_rest[name]["shards"] for name in FROZEN) if args.cpu_offload else 0
        rest = tracker.held() - offloaded

        policy = models["policy"]
        batch, length, size = args.batch, args.response_length, args.micro_batch
        sequences = torch.zeros(batch, args.prompt_length + length, dtype=torch.long)
        response_mask = torch.ones(batch, length, dtype=torch.long)
        attention_mask = torch.ones_like(sequences)
        attention_mask[1:, 0] = 0  # padding, as in Tokenizer.pad
        responses = repo.Responses(sequences, attention_mask, response_mask, response_mask.any(1), [], sequences)
        window = dict(length=length, temperature=1.0)
        figures = torch.zeros(batch, length)  # advantages, old values and the like

        for name in FROZEN[1:]:
            with tracker.phase("scoring"):
                repo.score_responses(models[name], [], responses, size)
        with tracker.phase("scoring"):
            reference = models["reference"]
            for _, ids, mask, _ in repo.micro_batches(sequences, attention_mask, size):
                repo.response_logprobs(reference, ids, mask, **window)

        for name in trained:
            models[name].train()
        for rows, ids, mask, _ in repo.micro_batches(sequences, attention_mask, size):
            used = response_mask[rows]
            with tracker.phase(UPDATES["policy"]):
                logprobs = repo.response_logprobs(policy, ids, mask, **window)
            values = {}
            for name in trained[1:]:
                with tracker.phase(UPDATES[name]):
                    values[name] = repo.response_values(models[name], ids, mask, length)
            with tracker.phase(UPDATES["policy"]):
                loss = repo.policy_loss(logprobs, figures[rows], figures[rows], 0.2)
                repo.backward(loss, used, 1.0)
            for name in trained[1:]:
                with tracker.phase(UPDATES[name]):
                    loss = repo.value_loss(values[name], figures[rows], figures[rows], 5.0)
                    repo.backward(loss, used, 1.0)
            if args.ptx:
                with tracker.phase(UPDATES["policy"]):
                    repo.backward(-repo.response_logprobs(policy, ids, mask, **window), used, 1.0)
        with tracker.phase("optimizer step"):
            for name in trained:
                nn.utils.clip_grad_norm_(models[name].parameters(), 1.0).full_tensor().item()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        for name in trained:
            models[name].eval()
        parts = rollout(tracker, policy, args, skip)

        # As the phases follow one another in an iteration
        phases = ("rollout", "scoring", *(UPDATES[name] for name in trained), "optimizer step")
        peaks = {name: tracker.peaks[name] - offloaded for name in phases}
        if args.cpu_offload:
            peaks["scoring"] += max(largest_unit(models[name]) for name in FROZEN)
    peak = max(peaks.values())
    return {
        "gpus": gpus,
        "parameters": counts,
        "at_rest": at_rest,
        "offloaded": offloaded,
        "total_at_rest": rest,
        "phases": peaks,
        "rollout_parts": parts,
        "peak": peak,
        "spare": 1 - peak / CAPACITY,
        "spare_after_allowance": 1 - (peak + ALLOWANCE) / CAPACITY,
    }


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def table(rows: list[dict]) -> str:
    """Markdown; figures are GiB of one GPU."""
    phases = list(rows[0]["phases"])
    each = "policy, critics, each" if len(phases) > 4 else "policy"
    heads = ["models", "GPUs", each, "frozen, each", "at rest", *phases, "peak", "spare"]
    heads += [f"spare after {ALLOWANCE // GIB} GiB"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        at_rest = {name: sum(sizes.values()) for name, sizes in row["at_rest"].items()}
        # The largest of its kind: a score model lacks the language model's head.
        trained, frozen = (max(at_rest.get(name, 0) for name in names) for names in (TRAINED, FROZEN))
        cells = [row["name"], str(row["gpus"]), gib(trained), "0 (CPU)" if row["offloaded"] else gib(frozen)]
        cells += [gib(row["total_at_rest"]), *(gib(row["phases"][phase]) for phase in phases)]
        cells += [gib(row["peak"]), f"{row['spare']:.0%}", f"{row['spare_after_allowance']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def insert(path: Path, name: str, text: str) -> None:
    """Put text between the lines `<!-- name -->` and `<!-- end -->` of a page."""
    head, mark, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    if not mark or not end:
        raise SystemExit(f"error: {path} has no lines <!-- {name} --> and <!-- end -->")
    path.write_text(f"{head}{mark}{text}\n{end}{tail}", encoding="utf-8")


def main(args: Args) -> None:
    transformers.logging.set_verbosity_error()
    if args.write and replace(args, write=False, json=None) != Args():
        raise SystemExit("error: --write is for the table of the defaults; leave the other flags out")
    if args.configs:
        configs = {name: AutoConfig.from_pretrained(name) for name in args.configs}
    else:
        configs = {name: llama(*SHAPES[name]) for name in args.sizes}
    rows = []
    for name, config in configs.items():
        start = time.time()
        rows.append({"name": name} | measure(config, args.gpus or (1 if name == "1B" else 8), args))
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if args.json:
        figures = {"capacity": CAPACITY, "allowance": ALLOWANCE, "settings": asdict(args), "rows": rows}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.write:
        insert(ROOT / "docs" / "scale.md", "memory", text)


if __name__ == "__main__":
    main(tyro.cli(Args))
