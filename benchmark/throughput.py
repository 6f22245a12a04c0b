"""How fast the scripts are, and how fast TRL is on the same workload, in turn: A B A B, and the ratio of medians.

    python benchmark/throughput.py --peer PEER/bin/python       # against TRL 1.9.0, see benchmark/trl_peers.py
    python benchmark/throughput.py --part processes             # two processes, and one with two threads
    python benchmark/throughput.py --part group                 # repo.py and repo_group.py, K = 4
    python benchmark/throughput.py --part lengths --against X   # texts of many lengths, this version and another
    python benchmark/throughput.py --part scaling               # lengths and batches; phases, floors
    python benchmark/throughput.py --part profile               # kinds of work in an update: workload and toy run
    python benchmark/throughput.py --part toy                   # the whole default run on the toy world

Workload: random Llama models of 4 layers, hidden size 256, intermediate size 512, 4 heads, vocabulary 1024; prompts of
16 tokens, 32 response tokens, 64 responses per iteration; 64 pairs per step, responses of 8 to 32 tokens. Ours
are whole processes of the scripts, `repo.py` with its six models, read from their own logs. The first three steps of
every run are warm-up and do not count. Times are wall times, so give the machine nothing else to do.

`--shape 1B` is for a GPU of 141 GB: TinyLlama's shape, prompts and responses of 256 tokens, 16 at a time. Only
`--part scaling` and `--part peers --trainer ppo` have it.
"""

import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP = 3
PHASES = ("rollout", "scoring", "update")


class Shape(NamedTuple):
    """A Llama model, and texts for it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompt: int  # tokens of a prompt
    response: int  # tokens of a response
    rows: int  # texts in a micro-batch at most

    @property
    def config(self) -> dict:
        return dict(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
        )  # fmt: skip

    @property
    def weights(self) -> int:
        """Weights of the blocks, without those of norms."""
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        return int(self.layers * (attention + 3 * self.hidden * self.intermediate))


SHAPES = {
    "small": Shape(4, 256, 512, 4, 4, 1024, prompt=16, response=32, rows=256),
    "1B": Shape(22, 2048, 5632, 32, 4, 32000, prompt=256, response=256, rows=16),
}


@dataclass
class Args:
    """Measure throughput on one machine."""

    part: Literal["peers", "processes", "group", "lengths", "scaling", "profile", "toy"] = "peers"
    """what is measured"""
    shape: Literal["small", "1B"] = "small"
    """models and texts; 1B: for a large GPU, by --part scaling, or --part peers --trainer ppo"""
    peer: str | None = None
    """python of the environment with TRL 1.9.0; without it only ours is measured"""
    trainer: Literal["all", "ppo", "reward", "dpo"] = "all"
    """which trainers of TRL; one at a time if there is little time"""
    against: str | None = None
    """folder of another version of the scripts, such as an older commit's, that runs in turn with this one"""
    rounds: int = 3
    """how often each command runs, in turn with the others"""
    steps: int = 20
    """iterations or optimizer steps of a run, the warm-up among them"""
    threads: int = 2
    """threads of all processes together"""
    figure: str | None = None
    """file for the curves of `--part scaling`"""
    json: str | None = None
    """file for every figure that was measured"""


def make_workload(folder: Path, shape: Shape = SHAPES["small"]) -> None:
    """Models with random weights, prompts and pairs, the same for every run."""
    words = [f"w{i}" for i in range(shape.vocabulary - 3)]
    ids = {word: i for i, word in enumerate([*words, "<pad>", "<eos>", "<bos>"])}
    core = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
    )
    special = dict(pad_token_id=ids["<pad>"], eos_token_id=ids["<eos>"], bos_token_id=ids["<bos>"])
    torch.manual_seed(0)
    for name in ("policy", "reward", "cost"):
        kind = LlamaForCausalLM if name == "policy" else LlamaForSequenceClassification
        labels = {} if name == "policy" else {"num_labels": 1}
        with DEVICE:
            model = kind(LlamaConfig(**shape.config, **special, **labels))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)

    def text(least: int, most: int) -> str:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())

    prompts = [text(shape.prompt, shape.prompt) for _ in range(4096)]
    Dataset.from_dict({"prompt": prompts}).to_parquet(folder / "prompts.parquet")
    pairs = [
        {"prompt": prompt, "response_0": text(8, 32), "response_1": text(8, 32), "better_response_id": i % 2}
        | {"safer_response_id": i % 2, "is_response_0_safe": i % 2 == 0, "is_response_1_safe": i % 2 == 1}
        for i, prompt in enumerate(prompts)
    ]
    Dataset.from_list(pairs).to_parquet(folder / "pairs.parquet")


def execute(command: list, threads: int) -> tuple[str, float]:
    """Run a command. Returns what it printed and its largest memory in MiB (its largest process; the GPU's if any)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=subprocess.STDOUT)
        on_gpu = 0
        while not (ended := os.wait4(process.pid, os.WNOHANG if DEVICE.type == "cuda" else 0))[0]:
            on_gpu = max(on_gpu, free - torch.cuda.mem_get_info()[0])
            time.sleep(0.2)
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{text[-3000:]}")
    return text, on_gpu / 2**20 or usage.ru_maxrss / 1024


def step_ends(run: Path, prefix: str = "") -> list[float]:
    """When the steps of a run ended, by the clock of its TensorBoard events."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    name = next(tag for tag in events.Tags()["scalars"] if tag.startswith(prefix) and tag.endswith("learning_rate"))
    return [event.wall_time for event in events.Scalars(name)]


def ours(
    script: str, folder: Path, args: Args, batch: int = 64, new_tokens: int = 0, processes: int = 1, root=ROOT, **flags
) -> dict:
    """Run a script. Returns a dictionary: episodes (pairs) per second, seconds by phase, tokens per second, memory.

    new_tokens: tokens of a response, if not those of the shape.
    """
    out, shape = Path(tempfile.mkdtemp(dir=folder)), SHAPES[args.shape]
    new_tokens = new_tokens or shape.response
    common = {"output_dir": out, "seed": 1, "batch_size": batch, "micro_batch_size": min(batch, shape.rows)}
    common |= {"learning_rate": 1e-5}
    if script in ("repo.py", "ppo_lagrange.py", "repo_group.py"):
        common |= {name: folder / name.partition("_")[0] for name in ("reward_model", "cost_model")}
        common |= {"model": folder / "policy", "dataset": folder / "prompts.parquet", "eval_split": "train"}
        common |= {"eval_dataset": folder / "prompts.parquet", "eval_size": processes, "eval_every": 0}
        common |= {"max_new_tokens": new_tokens, "total_episodes": batch * args.steps}
        common |= {"max_prompt_length": max(64, shape.prompt)}
    else:
        rows = batch * max(args.steps, 64)  # a whole epoch, over which SACPO's one reading of its reference is spread
        common |= {"model": folder / "policy", "dataset": folder / "pairs.parquet", "epochs": 1}
        common |= {"dataset_split": f"train[:{rows}]", "eval_dataset": folder / "pairs.parquet"}
        common |= {"eval_split": "train[:64]"} | ({} if script == "sacpo.py" else {"kind": "reward"})
    settings = []
    for name, value in (common | flags).items():
        settings += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    _, memory = execute([sys.executable, *launcher, root / script, *settings], max(1, args.threads // processes))
    measured = {"memory": memory}
    ends = step_ends(out, "stage1/" if script == "sacpo.py" else "")
    measured["seconds"] = statistics.median(map(operator.sub, ends[WARM_UP:], ends[WARM_UP - 1 :]))
    if script == "sacpo.py":  # reads its reference before the first step, while TRL does so in every step
        reading = ends[0] - (out / "args.json").stat().st_mtime - measured["seconds"]
        measured["seconds"] += reading / len(ends)
    if script in ("repo.py", "ppo_lagrange.py", "repo_group.py"):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
        for phase in PHASES:
            measured[phase] = statistics.median(line[f"seconds_{phase}"] for line in lines)
        measured["tokens"] = statistics.median(line["response_length"] for line in lines) * batch
        measured["tokens_per_second"] = measured["tokens"] / measured["seconds"]
        measured["all_tokens"] = batch * (shape.prompt + new_tokens)
    measured["rate"] = batch / measured["seconds"]
    return measured


def peer(trainer: str, folder: Path, args: Args, *flags: str) -> dict:
    """Run a trainer of TRL on the same workload."""
    script = ROOT / "benchmark" / "trl_peers.py"
    shape = SHAPES[args.shape]
    settings = ["--steps", args.steps, "--new-tokens", shape.response, "--micro-batch-size", min(64, shape.rows)]
    text, memory = execute([args.peer, script, trainer, folder, *settings, *flags], args.threads)
    seconds = statistics.median(json.loads(text.strip().splitlines()[-1])["steps"][WARM_UP:])
    return {"seconds": seconds, "rate": 64 / seconds, "memory": memory}


def in_turn(title: str, contestants: dict, rounds: int, record: dict) -> None:
    """A B A B ...: print the median rate of each with its range, the first one's ratio to it, and its phases."""
    results = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            results[name].append(run())
            print(f"{title}: {name}: {results[name][-1]['rate']:.1f} a second", file=sys.stderr, flush=True)
    record[title] = results
    first = [result["rate"] for result in next(iter(results.values()))]
    print(f"\n| {title} | a second | range | memory, MiB | first / this | by round | {', '.join(PHASES)}, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        rates = [run["rate"] for run in runs]
        ratios = [one / two for one, two in zip(first, rates, strict=True)]
        times = [f"{statistics.median(run[phase] for run in runs):.3f}" for phase in PHASES if phase in runs[0]]
        print(
            f"| {name} | {statistics.median(rates):.1f} | {min(rates):.1f}-{max(rates):.1f} "
            f"| {statistics.median(run['memory'] for run in runs):.0f} "
            f"| {statistics.median(first) / statistics.median(rates):.2f} | {min(ratios):.2f}-{max(ratios):.2f} "
            f"| {', '.join(times)} |",
            flush=True,
        )


def auto_dtype() -> torch.dtype:
    """What --dtype auto is on this machine, by the rule in the main of the scripts."""
    instructions = getattr(torch.cpu, "get_capabilities", dict)()
    fast = DEVICE.type == "cuda" or instructions.get("avx512_bf16") or instructions.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def machine_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Measured rate of matrix products in FLOP/s, and of reading memory in bytes/s."""

    def best(function, times=10):
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    side, numbers = (8192, 2**30) if DEVICE.type == "cuda" else (2048, 2**27)
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    large = torch.ones(numbers, device=DEVICE)
    return 2 * side**3 / best(lambda: a @ b), large.numel() * 4 / best(large.sum)


def peers(folder: Path, args: Args, record: dict) -> None:
    against = args.peer is not None
    contestants = {"repo.py, defaults, six models": lambda: ours("repo.py", folder, args)}
    half = auto_dtype() != torch.float32  # where it is emulated, a run takes minutes
    if half:
        contestants |= {"repo.py, float32": lambda: ours("repo.py", folder, args, dtype="float32")}
    if against:
        contestants |= {"TRL PPO, defaults (float32), four models": lambda: peer("ppo", folder, args)}
    if against and half:
        contestants |= {"TRL PPO, pure bfloat16": lambda: peer("ppo", folder, args, "--weights", "bfloat16")}
    if args.trainer in ("all", "ppo"):
        in_turn("episodes", contestants, args.rounds, record)
    for script, trainer in (("preference_models.py", "reward"), ("sacpo.py", "dpo")):
        if args.trainer not in ("all", trainer):
            continue
        contestants = {f"{script}, defaults": lambda script=script: ours(script, folder, args)}
        if against:
            name = {"reward": "TRL RewardTrainer", "dpo": "TRL DPOTrainer"}[trainer]
            contestants |= {
                f"{name}, defaults": lambda trainer=trainer: peer(trainer, folder, args),
                f"{name}, no recomputation": lambda trainer=trainer: peer(trainer, folder, args, "--tuned"),
            }
        in_turn(f"pairs, {script}", contestants, args.rounds, record)


def processes(folder: Path, args: Args, record: dict) -> None:
    for dtype in dict.fromkeys([str(auto_dtype()).removeprefix("torch."), "float32"]):
        contestants = {}
        for count, name in ((2, "two processes"), (1, "one process, two threads")):
            for root in (ROOT, *([Path(args.against)] if args.against else [])):
                contestants[name if root == ROOT else f"{name}, {root.name}"] = (
                    lambda count=count, root=root, dtype=dtype: ours(
                        "repo.py", folder, args, processes=count, root=root, dtype=dtype
                    )
                )
        in_turn(f"episodes, --dtype {dtype}", contestants, args.rounds, record)


def group(folder: Path, args: Args, record: dict) -> None:
    """With critics and without, on the same number of prompts."""
    contestants = {"repo.py, K = 4": lambda: ours("repo.py", folder, args, responses_per_prompt=4)}
    contestants |= {"repo_group.py, K = 4": lambda: ours("repo_group.py", folder, args)}
    in_turn("episodes", contestants, args.rounds, record)


def lengths(folder: Path, args: Args, record: dict) -> None:
    """Texts of many lengths: prompts of 16 to 64 tokens, responses of up to 256 that end at any of 16 token ids."""
    for file in (folder / "policy").iterdir():
        (folder / "endings").mkdir(exist_ok=True)
        (folder / "endings" / file.name).write_bytes(file.read_bytes())
    settings = GenerationConfig.from_pretrained(folder / "policy")
    settings.eos_token_id = [settings.eos_token_id, *range(15)]
    settings.save_pretrained(folder / "endings")
    prompts = Dataset.from_parquet(str(folder / "prompts.parquet"))["prompt"][:]
    words = " ".join(prompts).split()
    least = SHAPES["small"].prompt
    longer = [" ".join(words[row * least : (row + 1) * least + row % 49]) for row in range(len(prompts) - 3)]
    Dataset.from_dict({"prompt": longer}).to_parquet(folder / "longer.parquet")
    flags = dict(model=folder / "endings", dataset=folder / "longer.parquet", micro_batch_size=16)
    contestants = {}
    for root in (ROOT, *([Path(args.against)] if args.against else [])):
        contestants[root.name] = lambda root=root: ours("repo.py", folder, args, new_tokens=256, root=root, **flags)
    in_turn("episodes of many lengths", contestants, args.rounds, record)


def work(shape: Shape, batch: int, new: int) -> tuple[float, float]:
    """FLOPs of matrix products: of one forward pass of one model over a batch, and of the head over the responses."""
    length = shape.prompt + new
    attention = shape.layers * 2 * shape.hidden * length / 2  # keys and values, of the tokens before: half of all
    return 2 * batch * length * (shape.weights + attention), 2 * batch * new * shape.hidden * shape.vocabulary


def scaling(folder: Path, args: Args, record: dict) -> None:
    """Lengths 64 to 512, batches 16 to 256: phases, peak memory, and how far the machine's own rates are."""
    shape = SHAPES[args.shape]
    dtype = auto_dtype()
    torch.set_num_threads(args.threads)
    products, reading = machine_rates(dtype)
    print(f"\n{dtype}: {products / 1e9:.0f} GFLOP/s of matrix products, {reading / 1e9:.1f} GB/s of reading memory\n")
    record["machine"] = {"dtype": str(dtype), "products": products, "reading": reading}
    heads = ["batch", "tokens", "episodes/s", "tokens/s", "memory, MiB", *(f"{phase}, s" for phase in PHASES)]
    heads += ["scoring, of matrix rate", "update, of matrix rate", "rollout, ms a token", "floor"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    weights = dtype.itemsize * (shape.weights + shape.hidden * shape.vocabulary)  # bytes
    small = [(16, 48), (64, 48), (256, 48), (16, 112), (16, 240), (16, 496)]
    for batch, new in small if args.shape == "small" else [(16, shape.response), (64, shape.response)]:
        length = shape.prompt + new
        run = record[f"batch {batch}, {length} tokens"] = ours("repo.py", folder, args, batch, new)
        one, head = work(shape, batch, new)
        shares = [(3 * one + head) / run["scoring"] / products, 3 * (3 * one + head) / run["update"] / products]
        of_token = dtype.itemsize * 2 * shape.layers * shape.hidden * shape.kv_heads // shape.heads  # in the cache
        cache = of_token * batch * (shape.prompt + new / 2)  # bytes that a step reads on average
        floor = max((weights + cache) / reading, (one + head) / length / products)
        cells = [batch, length, *(f"{x:.0f}" for x in (run["rate"], run["rate"] * length, run["memory"]))]
        cells += [f"{run[phase]:.2f}" for phase in PHASES] + [f"{share:.0%}" for share in shares]
        cells += [f"{1000 * run['rollout'] / new:.1f}", f"{1000 * floor:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.figure and args.shape == "small":
        draw(record, Path(args.figure))


def draw(record: dict, path: Path) -> None:
    """Seconds of each phase over the tokens of an iteration, beside a line of equal seconds per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = {"rollout": ("#a50026", "o", "-"), "scoring": ("#1b9e77", "s", "--"), "update": ("#4b2e83", "^", "-.")}
    hollow = dict(markersize=9, markerfacecolor="none", markeredgewidth=1.6)  # none hides another
    runs = {name: run for name, run in record.items() if name.startswith("batch")}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.9), layout="constrained", sharey=True)
    for axis, what, kept in (
        (axes[0], "16 responses, texts of 64 to 512 tokens", "batch 16,"),
        (axes[1], "16 to 256 responses, texts of 64 tokens", ", 64 tokens"),
    ):
        chosen = [run for name, run in runs.items() if kept in name]
        tokens = [run["all_tokens"] for run in chosen]
        for phase, (color, marker, line) in looks.items():
            seconds = [run[phase] for run in chosen]
            axis.plot(tokens, seconds, color=color, marker=marker, linestyle=line, label=phase, **hollow)
        level = [chosen[0]["update"] * count / tokens[0] for count in tokens]
        axis.plot(tokens, level, color="grey", linestyle=":", label="update, if in proportion to tokens")
        axis.set(xscale="log", yscale="log", xlabel="tokens of prompts and responses per iteration", title=what)
        axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.08)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("seconds per iteration")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def profile(folder: Path, args: Args, record: dict) -> None:
    """Kinds of work in the update of iteration 8, by torch's profiler. Python: what no operation accounts for."""
    workload = {name: folder / name.partition("_")[0] for name in ("reward_model", "cost_model")}
    workload |= {"model": folder / "policy", "dataset": folder / "prompts.parquet", "eval_split": "train[:2]"}
    workload |= {"eval_dataset": folder / "prompts.parquet", "learning_rate": 1e-5, "max_new_tokens": 32}
    for name, flags in {"workload": workload, "toy run": {}}.items():
        out, settings = folder / name.replace(" ", "-"), ["--total-episodes", 8 * 64, "--eval-every", 0]
        for flag, value in flags.items():
            settings += [f"--{flag.replace('_', '-')}", value]
        command = [sys.executable, ROOT / "benchmark" / "watched.py", f"{out}-watched", "repo.py", "8", *settings]
        execute([*command, "--output-dir", out], args.threads)
        found = json.loads(Path(f"{out}-watched.profile").read_text())
        found["kinds"]["Python and waiting"] = max(0.0, found["wall"] - found["busy"])
        record[name] = found
        print(f"{name}: {1000 * found['wall']:.0f} ms with the profiler")
        for kind, seconds in sorted(found["kinds"].items(), key=lambda item: -item[1]):
            print(f"| {kind} | {1000 * seconds:.1f} ms | {seconds / sum(found['kinds'].values()):.0%} |", flush=True)


def toy(folder: Path, args: Args, record: dict) -> None:
    """The default run, from the start of the process to its end, and what it reaches."""
    runs = []
    for seed in range(1, args.rounds + 1):
        out, start = folder / f"toy-{seed}", time.perf_counter()
        execute([sys.executable, ROOT / "repo.py", "--output-dir", out, "--seed", seed], args.threads)
        after = json.loads((out / "summary.json").read_text())["after"]
        runs.append({"seconds": time.perf_counter() - start, "reward": after["reward"]})
        runs[-1]["compliance"] = after["safety_compliance"]
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in runs[-1].items()), flush=True)
    record["toy"] = runs


def main() -> None:
    args, record = tyro.cli(Args), {}
    if args.steps <= WARM_UP + 1:
        sys.exit(f"--steps {args.steps}: more than {WARM_UP + 1} are needed")
    if args.shape != "small" and (args.part, args.trainer) != ("peers", "ppo") and args.part != "scaling":
        sys.exit(f"--shape {args.shape} is for --part scaling, or --part peers --trainer ppo")
    with tempfile.TemporaryDirectory() as folder:
        make_workload(Path(folder), SHAPES[args.shape])
        parts = {"peers": peers, "processes": processes, "group": group}
        part = (parts | {"lengths": lengths, "scaling": scaling, "profile": profile, "toy": toy})[args.part]
        part(Path(folder), args, record)
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
