"""How long a token takes when repo.py samples, and how long it could take on this machine.

    python benchmark/decoding.py --model FOLDER --batch-size 16 64
    python benchmark/decoding.py --model toy/policy --prompt-length 16 --new-tokens 32     # on a CPU

- repo.py: its own `sample_responses`, token by token through FSDP2's hooks, with a cache that grows;
- no hooks: the same loop over a copy of the model without hooks, on the gathered weights themselves;
- static cache: the same with the library's `StaticCache`, all of whose memory is there from the start;
- CUDA graph: the step with that cache, captured once per rollout and replayed for every token.

All draw by the same uniform numbers. *Equal tokens* is the share of tokens that equal repo.py's. In bfloat16 it is
below 100% where two caches round differently: after the first other token, a response is another one. In float32 it
should be 100%. The first pass over the prompts is left out of the times. *Floor* is the time to read the weights and
the cache of an average token once, at the machine's measured rate.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, StaticCache

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import throughput  # noqa: E402
from watched import write_json  # noqa: E402

import repo  # noqa: E402


@dataclass
class Args:
    """Compare ways to decode."""

    model: str
    """language model: folder or Hub id"""
    batch_size: tuple[int, ...] = (16, 64)
    """prompts at a time"""
    prompt_length: int = 256
    """tokens of a prompt"""
    new_tokens: int = 64
    """tokens that are sampled, at least 4; the first comes from the pass over the prompts"""
    repeats: int = 3
    """rollouts per way after one to warm up; the median counts"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute type"""
    seed: int = 1
    """prompts and uniform numbers"""
    json: str | None = None
    """file for the figures"""


def without_hooks(policy) -> torch.nn.Module:
    """The modules of a gathered FSDP2 model without hooks. It holds the same tensors, so nothing is copied."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy.config).eval()
    model.load_state_dict(dict(policy.named_parameters()), strict=False, assign=True)
    model.tie_weights()
    model.vocabulary = policy.vocabulary
    for name, buffer in policy.named_buffers():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, buffer)
    return model


class Step:
    """One token for each row: tokens, positions, mask and cache are tensors that every step updates in place."""

    def __init__(self, model, prompts: torch.Tensor, uniforms: torch.Tensor, static: bool):
        batch, length = prompts.shape
        self.model, self.prompts, self.static, device = model, prompts, static, prompts.device
        self.cache = StaticCache(config=model.config, max_cache_len=length + uniforms.shape[1]) if static else None
        self.mask = torch.ones(batch, length, dtype=torch.long, device=device)
        if static:  # columns of tokens to come are 0 until they are there
            self.mask = torch.cat([self.mask, torch.zeros_like(self.mask[:, :1]).repeat(1, uniforms.shape[1])], 1)
        self.points = uniforms[:, :1].double().to(device).contiguous()
        self.position = torch.full((batch, 1), length, device=device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def prompt(self) -> None:
        """The pass over the prompts, which draws the first token."""
        positions = torch.arange(self.prompts.shape[1], device=self.prompts.device).expand_as(self.prompts)
        self.draw(self.prompts, positions)

    def __call__(self) -> None:
        if self.static:
            self.mask.scatter_(1, self.position, 1)
        else:
            self.mask = torch.cat([self.mask, torch.ones_like(self.position)], 1)
        self.draw(self.tokens, self.position)
        self.position.add_(1)

    def draw(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        inputs = dict(attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, logits_to_keep=1)
        output = self.model(input_ids=ids, use_cache=True, **inputs)
        self.cache = output.past_key_values
        cumulative = output.logits[:, -1, : self.model.vocabulary].double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, self.points * cumulative[:, -1:], right=True)
        self.tokens.copy_(drawn.clamp(max=cumulative.shape[1] - 1))


@torch.no_grad()
def rollout(model, way: str, prompts: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Sampled tokens, [batch, new tokens], and the seconds of a token after the first."""
    columns, sampled, graph = uniforms.double().to(prompts.device).split(1, dim=1), [], None
    step = Step(model, prompts, uniforms, static=way != "no hooks")
    step.prompt()
    sampled.append(step.tokens.clone())
    if way == "CUDA graph":  # the next tokens warm up; on a side stream, as capturing demands
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for points in columns[1:3]:
                step.points.copy_(points)
                step()
                sampled.append(step.tokens.clone())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Records what a step does, and does none of it. Other threads, such as NCCL's, may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    if prompts.is_cuda:
        torch.cuda.synchronize()
    start, left = time.perf_counter(), columns[len(sampled) :]
    for points in left:
        step.points.copy_(points)
        graph.replay() if graph else step()
        sampled.append(step.tokens.clone())
    if prompts.is_cuda:
        torch.cuda.synchronize()
    return torch.cat(sampled, 1), (time.perf_counter() - start) / len(left)


def through_hooks(policy, tokenizer, prompts: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The same by repo.py: the time of a whole rollout without that of a rollout of one token."""

    def seconds(count: int) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        responses = repo.sample_responses(policy, tokenizer, prompts.tolist(), uniforms[:, :count], 1.0)
        if prompts.is_cuda:
            torch.cuda.synchronize()
        return responses.sequences[:, prompts.shape[1] :], time.perf_counter() - start

    (_, first), (tokens, whole) = seconds(1), seconds(uniforms.shape[1])
    return tokens, (whole - first) / (tokens.shape[1] - 1)


def report(figures: dict, batch: int, way: str, expected, floor: float, repeats: int, function, *inputs):
    """Time a way to decode, print its row and note its figures. Returns its tokens, None where it fails."""
    try:
        results = [function(*inputs) for _ in range(repeats + 1)][1:]
    except Exception as error:  # the library's cache, or the capture, may not take this model
        figures[f"batch {batch}, {way}"] = reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"| {batch} | {way} | {reason} | - | - |", flush=True)
        return None
    tokens, seconds = results[-1][0], statistics.median(seconds for _, seconds in results)
    found = {"ms per token": 1000 * seconds, "% of the floor's rate": 100 * floor / seconds}
    if expected is not None:
        found["equal tokens, %"] = 100 * (tokens == expected).double().mean().item()
    figures.update({f"batch {batch}, {way}: {name}": value for name, value in found.items()})
    cells = [f"{value:.3g}" for value in found.values()] + ["-"] * (expected is None)
    print(f"| {batch} | {way} | {' | '.join(cells)} |", flush=True)
    return tokens


def main(args: Args, device: torch.device, mesh) -> None:
    throughput.DEVICE = device
    dtype = throughput.auto_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    tokenizer, longest = repo.load_tokenizer(args.model, "--model"), args.prompt_length + args.new_tokens
    options = dict(mesh=mesh, dtype=dtype, longest=longest, tokenizer=tokenizer)
    policy = repo.load_model(AutoModelForCausalLM, args.model, "--model", **options).eval()
    # No token that can be drawn ends a response here, so all rows go on to the last token.
    tokenizer.eos_token = policy.generation_config.eos_token_id = None
    tokenizer.end_id = policy.vocabulary
    config, reading = policy.config, throughput.machine_rates(dtype)[1]
    width = dtype.itemsize
    weights = width * sum(parameter.numel() for parameter in policy.parameters())
    if not config.tie_word_embeddings:  # of the input's embeddings, only the rows of the tokens are read
        weights -= width * policy.get_input_embeddings().weight.numel()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    figures = {"dtype": str(dtype), "reading memory, GB/s": reading / 1e9}
    ways = ["no hooks", "static cache", *(["CUDA graph"] if device.type == "cuda" else [])]
    print("| prompts | way | ms per token | % of the floor's rate | equal tokens |\n| --- | --- | --- | --- | --- |")
    for batch in args.batch_size:
        generator = torch.Generator().manual_seed(args.seed)
        shape = (batch, args.prompt_length)
        prompts = torch.randint(policy.vocabulary, shape, generator=generator).to(device)
        drawn = prompts, torch.rand(batch, args.new_tokens, generator=generator)
        cache = 2 * width * batch * config.num_hidden_layers * heads * size * (args.prompt_length + args.new_tokens / 2)
        floor = (weights + cache) / reading

        tokens = report(figures, batch, "repo.py", None, floor, args.repeats, through_hooks, policy, tokenizer, *drawn)
        units = [unit for unit in policy.modules() if isinstance(unit, repo.FSDPModule)]
        for unit in units:
            unit.unshard()
        plain = without_hooks(policy)
        for way in ways:
            if report(figures, batch, way, tokens, floor, args.repeats, rollout, plain, way, *drawn) is None:
                ways = [other for other in ways if other != way]  # a failed capture may leave its stream current
            if args.json:
                write_json(Path(args.json), figures)
        for unit in units:
            unit.reshard()


if __name__ == "__main__":
    main(tyro.cli(Args), *repo.start_processes())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
