"""Are the scripts right and fast on this GPU? One command, within 7 minutes, on a machine with torch and transformers:

    python benchmark/gpu.py                                # all parts; a table, and runs/gpu/gpu.json
    python benchmark/gpu.py --parts same speed --output-dir OUT
    python benchmark/gpu.py --gradient-checkpointing       # a card of 80 GB
    python benchmark/gpu.py --shape tiny --device cpu      # tries the kit itself, without a GPU

`gpu_prepare.sh` beside it packs what a machine without a network lacks. Each part has processes and a time limit of its
own, and its figures are written as they come. A part that fails does not take the others with it.

- toy: the default run on the toy world, beside the same run on the CPU;
- same: the first update in float32 on the GPU and on the CPU; kill -9 and resume; one rank under torchrun (NCCL);
- speed: six Llamas of 1.1B parameters with random weights, prompts and responses of 256 tokens: seconds by phase,
  shares of the card's measured rates, peak memory and memory.py's prediction; preference_models.py and sacpo.py too;
- profile: the update of one iteration of that run under torch's profiler;
- decode: a token of the rollout by repo.py, without FSDP's hooks, with a static cache, by a captured CUDA graph;
- peer: TRL's PPO on the same models and prompts, where trl is installed;
- real: repo.py and ppo_lagrange.py on your checkpoints, with the flags in --real="...".

The scripts run unmodified, with the flags of a command line, in processes forked after the imports (`watched.py`).
Runs of `speed` are killed when they have logged enough steps. Phases are by the host's clock.
"""

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else asking for a GPU forbids it to forked processes

import datasets
import throughput
import torch
import transformers
import tyro
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils import tensorboard  # noqa: F401 (imported before the forks, as the next line's models)
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401
from watched import THREADS, watch, write_json

GIB = 2**30
# Seconds of a part at most; a part also ends when --minutes are over
LIMITS = {"toy": 70, "same": 70, "speed": 270, "profile": 60, "decode": 75, "peer": 80, "real": 120}
RECORDED = "33 to 88 s, reward 2.41 to 2.60, compliance 97.5 to 100% (docs/speed.md)"
# Relative to a metric, or 1 if that is more, and to the norm of a model's gradient. Rounding in float32 gives less
# than 1e-6: two orders of summation on a CPU differ by up to 4e-7. TF32 keeps 10 bits, which is about 1e-3.
ROUNDING = 1e-4


@dataclass
class Args:
    """Measure the scripts on a GPU."""

    parts: tuple[Literal["toy", "same", "speed", "profile", "decode", "peer", "real"], ...] = tuple(LIMITS)
    """what is done, in this order"""
    shape: Literal["1B", "tiny"] = "1B"
    """models and texts of speed, profile, decode and peer; tiny also shortens toy and same"""
    device: Literal["cuda", "cpu"] = "cuda"
    """where the scripts compute"""
    output_dir: str = "runs/gpu"
    """folder for the runs, their logs and gpu.json"""
    minutes: float = 7.0
    """time for all parts; their own limits are in proportion"""
    gradient_checkpointing: bool = False
    """recompute activations in speed and profile, as a card of 80 GB needs"""
    real: str = ""
    """flags of repo.py and ppo_lagrange.py for the part real: --real="--model FOLDER --reward-model FOLDER ..." """


@dataclass
class Part:
    """What a part needs: where it writes, what it started and found."""

    name: str
    args: Args
    method: str  # how processes start: fork, or spawn where CUDA does not survive a fork
    started: list = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir).resolve() / self.name

    @property
    def models(self) -> Path:
        return self.folder.parent / "models"

    def note(self, what: str, figures: dict) -> None:
        self.figures |= {f"{what}: {name}": value for name, value in figures.items()}
        write_json(self.folder.with_suffix(".json"), self.figures)

    def start(self, name: str, function, *settings, **options) -> multiprocessing.Process:
        context = multiprocessing.get_context(self.method)
        self.started.append(context.Process(target=function, args=settings, kwargs=options, name=name))
        self.started[-1].start()
        return self.started[-1]

    def script(self, name: str, script: str, device: str, flags: dict, **options) -> multiprocessing.Process:
        """Start a script with flags by name; True is a flag without a value."""
        words = []
        for flag, value in flags.items():
            words += [f"--{flag.replace('_', '-')}"] + ([] if value is True else [value])
        return self.start(name, watch, self.folder / name, script, words, device, **options)

    def wait(self, *processes: multiprocessing.Process) -> None:
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"'{process.name}' ended with {process.exitcode}; see its log in {self.folder}")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]


# ---- toy
def toy(part: Part) -> None:
    flags = {"total_episodes": 128, "eval_size": 8} if part.args.shape == "tiny" else {}
    runs = {}
    for device in dict.fromkeys([part.args.device, "cpu"]):  # at the same time
        runs[device] = part.script(device, "repo.py", device, flags | {"output_dir": part.folder / device})
    part.note("cpu", {"recorded": RECORDED})
    for device, process in runs.items():
        part.wait(process)
        summary = read_json(part.folder / device / "summary.json")
        part.note(device, {"seconds": summary["wall_seconds"], "dtype": summary["dtype"]})
        part.note(f"{device}, after", summary["after"])


# ---- same
def same(part: Part) -> None:
    """Compare with the CPU; on a CPU, with another order of the sums: micro-batches of half the size."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    device, tiny = part.args.device, part.args.shape == "tiny"
    batch = 16 if tiny else 64
    common = dict(batch_size=batch, micro_batch_size=batch, save_every=1, dtype="float32", warmup_ratio=0)
    rl = common | dict(eval_every=0, eval_size=8, max_new_tokens=8 if tiny else 32)
    pairs = common | dict(eval_split="test[:16]")
    model = pairs | dict(dataset_split=f"train[:{2 * batch}]", epochs=1)
    two_steps = {
        "RePO": ("repo.py", rl | dict(total_episodes=2 * batch)),
        "PPO-Lagrange": ("ppo_lagrange.py", rl | dict(total_episodes=2 * batch)),
        "SACPO": ("sacpo.py", pairs | dict(train_size=2 * batch, stages="helpful")),
        "reward model": ("preference_models.py", model | dict(kind="reward")),
        "cost model": ("preference_models.py", model | dict(kind="cost")),
    }
    if tiny:
        two_steps = {name: two_steps[name] for name in ("RePO", "SACPO")}
    other = {} if device == "cuda" else {"micro_batch_size": batch // 2}
    running = []

    def run(name: str, script: str, place: str, flags: dict, **options) -> multiprocessing.Process:
        flags = flags | {"output_dir": part.folder / name}
        running.append(part.script(name, script, place, flags, threads=1, **options))
        return running[-1]

    for name, (script, flags) in two_steps.items():
        run(f"{name} one", script, "cpu", flags)
        run(f"{name} other", script, device, flags | other)
    dtypes = ("float32",) if tiny else ("float32", "bfloat16")
    if not tiny:
        run("torchrun", "repo.py", device, two_steps["RePO"][1] | other, torchrun=True)
    flags, victims = rl | dict(total_episodes=6 * batch), {}
    for dtype in dtypes:
        for name in ("whole",) if tiny else ("whole", "again"):  # does the device repeat itself?
            run(f"{name} {dtype}", "repo.py", device, flags | {"dtype": dtype})
        victims[dtype] = run(f"killed {dtype}", "repo.py", device, flags | {"dtype": dtype})
    for dtype, victim in victims.items():
        checkpoints = part.folder / f"killed {dtype}" / "checkpoints"
        while victim.is_alive() and not (checkpoints / "00000002").exists():
            time.sleep(0.005)
        victim.kill(), victim.join()
        running.remove(victim)
        last = max((int(place.name) for place in checkpoints.glob("*[0-9]")), default=0)
        part.note(f"kill -9, {dtype}", {"last checkpoint of 6 iterations": last})
        run(f"killed {dtype}", "repo.py", device, flags | {"dtype": dtype, "resume": True})
    part.wait(*running)

    comparisons = {name: (f"{name} one", f"{name} other") for name in two_steps}
    comparisons |= {} if tiny else {"torchrun, one rank": ("RePO other", "torchrun")}
    for name, folders in comparisons.items():
        metrics, gradients = first_difference(*(part.folder / folder for folder in folders))
        verdict = "yes" if max(metrics, gradients) <= ROUNDING else "NO"
        part.note(name, {"metrics differ by": metrics, "gradients differ by": gradients})
        part.note(name, {"equal up to float32 rounding": verdict})
    for dtype in dtypes:
        for what, name in (("killed and resumed", "killed"), *([] if tiny else [("run twice", "again")])):
            equal = outcome(part.folder / f"whole {dtype}") == outcome(part.folder / f"{name} {dtype}")
            part.note(f"{what}, {dtype}", {"equal bit for bit": "yes" if equal else "NO"})


def first_difference(*folders: Path) -> tuple[float, float]:
    """How far two runs differ after one step: in metrics, and in AdamW's first moments, which then are the gradients.

    The weights would say little: AdamW moves one with a tiny gradient as far as one with a large gradient.
    """
    first, second = (read_metrics(folder)[0] for folder in folders)
    numbers = [key for key, value in first.items() if isinstance(value, int | float) and "second" not in key]
    numbers.remove("pair_accuracy") if "stage" in first else None  # SACPO's first log-ratios are nothing but rounding
    metrics = max(abs(first[key] - second[key]) / max(1.0, abs(first[key])) for key in numbers)
    one, other = (
        {key: value.double() for file in folder.glob("checkpoints/00000001/*") if file.suffix == ".safetensors"
         for key, value in load_file(file).items() if key.endswith(".exp_avg")}
        for folder in folders
    )  # fmt: skip
    errors = []
    for model in {key.partition(".")[0] for key in one}:
        pairs = [(one[key], other[key]) for key in one if key.startswith(f"{model}.")]
        error, size = sum((a - b).square().sum() for a, b in pairs), sum(a.square().sum() for a, _ in pairs)
        errors.append(float((error / size).sqrt()))
    return metrics, max(errors)


def outcome(folder: Path) -> tuple:
    """A finished run's weights as bytes, and its metrics without times."""
    rows = [{key: value for key, value in row.items() if "second" not in key} for row in read_metrics(folder)]
    return [file.read_bytes() for file in sorted((folder / "model").glob("*.safetensors"))], rows


# ---- speed, profile, decode, peer
def make_workload(folder: Path, shape, device: str) -> None:
    """A language model and a score model with random weights, which share the file of their backbone; texts."""
    datasets.disable_progress_bars()
    words = [f"w{i}" for i in range(shape.vocabulary - 2)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<pad>", "<eos>"])}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape.config, **ids, num_labels=1)).to(torch.bfloat16)
    backbone = {name: weight.cpu().contiguous() for name, weight in model.state_dict().items()}
    score = torch.randn(1, shape.hidden, dtype=torch.bfloat16) / shape.hidden**0.5
    heads = {"policy": {"lm_head.weight": backbone.pop("lm_head.weight")}, "reward": {"score.weight": score}}
    folder.mkdir(parents=True)
    save_file(backbone, folder / "backbone.safetensors", metadata={"format": "pt"})
    for name, head in heads.items():
        (folder / name).mkdir()
        (folder / name / "backbone.safetensors").symlink_to("../backbone.safetensors")
        save_file(head, folder / name / "head.safetensors", metadata={"format": "pt"})
        places = dict.fromkeys(backbone, "backbone.safetensors") | dict.fromkeys(head, "head.safetensors")
        write_json(folder / name / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
        model.config.architectures = [f"LlamaFor{'CausalLM' if name == 'policy' else 'SequenceClassification'}"]
        model.config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def texts(length: int) -> list[str]:
        return [" ".join(words[i] for i in row) for row in torch.randint(len(words), (512, length)).tolist()]

    labels = [i % 2 for i in range(512)]
    rows = {"prompt": texts(shape.prompt), "better_response_id": labels, "safer_response_id": labels}
    datasets.Dataset.from_dict({"prompt": rows["prompt"]}).to_parquet(folder / "prompts.parquet")
    rows |= {f"response_{side}": [f" {text}" for text in texts(shape.response - 1)] for side in (0, 1)}  # and EOS
    rows |= {f"is_response_{side}_safe": [label == side for label in labels] for side in (0, 1)}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "pairs.parquet")


def measure_rates(path: Path, device: str) -> None:
    throughput.DEVICE = torch.device(device)
    torch.set_num_threads(THREADS)
    path.write_text(json.dumps(throughput.machine_rates(throughput.auto_dtype())))


def workload(part: Part) -> tuple:
    """The shape, flags for repo.py by batch size, flags for scripts that read pairs. Makes models and texts once."""
    shape, files = throughput.SHAPES["1B"], part.models
    if part.args.shape == "tiny":
        shape = throughput.Shape(2, 64, 128, 4, 2, 256, prompt=8, response=8, rows=16)
    if not files.exists():
        part.wait(part.start("workload", make_workload, files, shape, part.args.device))
    common = {"model": files / "policy", "eval_split": "train[:16]", "learning_rate": 1e-5, "warmup_ratio": 0}
    common |= {"gradient_checkpointing": True} if part.args.gradient_checkpointing else {}
    pairs = common | {name: files / "pairs.parquet" for name in ("dataset", "eval_dataset")}
    pairs |= {"epochs": 1, "batch_size": 16, "micro_batch_size": 8}

    def rl(batch: int) -> dict:
        flags = common | {name: files / "reward" for name in ("reward_model", "cost_model")}
        flags |= {name: files / "prompts.parquet" for name in ("dataset", "eval_dataset")}
        flags |= {"max_prompt_length": shape.prompt, "max_new_tokens": shape.response, "eval_size": 1, "eval_every": 0}
        return flags | {"batch_size": batch, "micro_batch_size": 16, "total_episodes": 100 * batch}

    return shape, rl, pairs


def iterate(part: Part, name: str, script: str, flags: dict, warm: int, timed: int, profiled: int = 0) -> tuple:
    """Run a script up to enough steps, and kill it. Returns seconds of a step, its log's lines, the peak of memory."""
    folder, times = part.folder / name, []
    process = part.script(name, script, part.args.device, flags | {"output_dir": folder}, profiled=profiled)
    while len(times) < warm + timed or (profiled and not Path(f"{folder}.profile").exists()):
        if not process.is_alive():
            raise RuntimeError(f"'{name}' ended early; see its log in {part.folder}")
        written = len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        times += [time.time()] * (written - len(times))
        time.sleep(0.01)
    peak = read_json(Path(f"{folder}.memory"))["peak"]
    process.kill(), process.join()
    return (times[warm + timed - 1] - times[warm - 1]) / timed, read_metrics(folder)[warm : warm + timed], peak


def speed(part: Part) -> None:
    shape, rl, pairs = workload(part)
    part.wait(part.start("rates", measure_rates, part.folder / "rates.json", part.args.device))
    products, reading = read_json(part.folder / "rates.json")
    part.note("card, measured", {"matrix products, TFLOP/s": products / 1e12, "reading memory, GB/s": reading / 1e9})
    if not (tiny := part.args.shape == "tiny"):  # the tracker takes no model under 2^28 parameters
        sizes = dict(batch=16, micro_batch=16, prompt_length=shape.prompt, response_length=shape.response)
        sizes |= dict(configs=part.models / "policy", gpus=1, json=part.folder / "predicted.json")
        sizes |= {"gradient_checkpointing" if part.args.gradient_checkpointing else "no_gradient_checkpointing": True}
        predicting = part.script("predicted", "benchmark/memory.py", "cpu", sizes, threads=1)

    def repo(batch: int, warm: int, timed: int, profiled: int) -> None:
        name = f"repo.py, batch {batch}"
        seconds, rows, peak = iterate(part, f"repo-{batch}", "repo.py", rl(batch), warm, timed, profiled)
        phases = {phase: statistics.median(row[f"seconds_{phase}"] for row in rows) for phase in throughput.PHASES}
        part.note(name, {"episodes/s": batch / seconds} | {f"{phase}, s": value for phase, value in phases.items()})
        one, head = throughput.work(shape, batch, shape.response)
        rates = {"scoring": (3 * one + head) / phases["scoring"], "update": 3 * (3 * one + head) / phases["update"]}
        part.note(name, {f"{phase}, % of the matrix rate": 100 * rate / products for phase, rate in rates.items()})
        token = phases["rollout"] / shape.response
        cache = 4 * batch * shape.layers * shape.hidden * shape.kv_heads // shape.heads  # bytes of a position
        read = 2 * (shape.weights + shape.hidden * shape.vocabulary) + cache * (shape.prompt + shape.response / 2)
        part.note(name, {"rollout, ms a token": 1000 * token})
        part.note(name, {"rollout, % of the bandwidth": 100 * read / reading / token, "peak memory, GiB": peak / GIB})
        part.note(name, {"tokens of a response": rows[-1]["response_length"]})

    repo(16, 2, 2 if tiny else 5, profiled=4 if tiny else 8)
    one, head = throughput.work(shape, 32, shape.response)  # 16 pairs
    for script, flags, products_of_step in (
        ("preference_models.py", {"kind": "reward", "dataset_split": "train[:160]"}, 3 * one),
        ("sacpo.py", {"train_size": 160, "max_prompt_length": shape.prompt}, 3 * (one + head)),
    ):
        seconds, _, peak = iterate(part, script, script, pairs | flags, 2, 5)
        part.note(script, {"pairs/s": 16 / seconds, "peak memory, GiB": peak / GIB})
        part.note(script, {"% of the matrix rate": 100 * products_of_step / seconds / products})
    repo(64, 1, 1 if tiny else 2, profiled=0)
    if not tiny:
        part.wait(predicting)
        predicted = read_json(part.folder / "predicted.json")["rows"][0]["peak"] / GIB
        part.note("repo.py, batch 16", {"peak memory predicted by memory.py, GiB": predicted})


def profile(part: Part) -> None:
    """The update that `speed` profiled, or else one of a run of its own."""
    run = part.folder.parent / "speed" / "repo-16"
    if not Path(f"{run}.profile").exists():
        run = part.folder / "repo-16"
        iterate(part, run.name, "repo.py", workload(part)[1](16), 1, 1, profiled=3)
    found, plain = read_json(Path(f"{run}.profile")), [row["seconds_update"] for row in read_metrics(run)[1:-1]]
    for kind, seconds in sorted(found["kinds"].items(), key=lambda item: -item[1]):
        part.note("update", {f"{kind}, % of the device's time": 100 * seconds / sum(found["kinds"].values())})
    part.note("update", {"sum of these, s": sum(found["kinds"].values())})
    part.note("update", {"device busy, s": found["busy"], "with the profiler, s": found["wall"]})
    if plain:
        idle = 100 * max(0.0, 1 - found["busy"] / statistics.median(plain))
        part.note("update", {"without it, s": statistics.median(plain), "Python and idle, % of that": idle})


def decode(part: Part) -> None:
    """Ways to sample a token (decoding.py)."""
    shape, figures = workload(part)[0], part.folder / "figures.json"
    flags = {"model": part.models / "policy", "json": figures, "prompt_length": shape.prompt}
    flags |= {"new_tokens": 8 if part.args.shape == "tiny" else 64}
    process = part.script("decoding", "benchmark/decoding.py", part.args.device, flags)
    while process.is_alive():
        part.note("a token", read_json(figures))
        process.join(1)
    part.note("a token", read_json(figures))
    part.wait(process)


def peer(part: Part) -> None:
    if not find_spec("trl"):
        part.note("TRL", {"status": "not carried"})
        return
    shape = workload(part)[0]
    words = f"--steps 5 --batch-size 16 --micro-batch-size 16 --new-tokens {shape.response} --weights bfloat16".split()
    script = "benchmark/trl_peers.py"
    part.wait(part.start("ppo", watch, part.folder / "ppo", script, ["ppo", part.models, *words], part.args.device))
    seconds = json.loads((part.folder / "ppo.log").read_text().strip().splitlines()[-1])["steps"][2:]
    rate, name = 16 / statistics.median(seconds), "repo.py, batch 16: episodes/s"
    part.note("TRL's PPO in bfloat16, batch 16", {"episodes/s": rate})
    if ours := read_json(part.folder.parent / "speed.json").get(name):
        part.note("repo.py", {"times as many episodes/s": ours / rate})


def real(part: Part) -> None:
    if not part.args.real:
        part.note("checkpoints", {"status": 'not carried; give --real="--model FOLDER ..."'})
    for script in ("repo.py", "ppo_lagrange.py") if part.args.real else ():
        words = [*shlex.split(part.args.real), "--output-dir", part.folder / script]
        part.wait(part.start(script, watch, part.folder / script, script, words, part.args.device))
        summary = read_json(part.folder / script / "summary.json")
        part.note(script, {"seconds": summary["wall_seconds"], "episodes/s": summary["episodes_per_second"]})
        for when in ("before", "after"):
            part.note(f"{script}, {when}", summary[when])


# ---- Parts in turn
def probe(path: Path, device: str) -> None:
    """What the machine is; fails where a process that was started so cannot compute on the device."""
    torch.zeros(8, device=device).sum().item()
    found = {"device": os.uname().machine, "cores": os.cpu_count(), "torch": torch.__version__}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["memory, GiB"] = torch.cuda.get_device_properties(0).total_memory / GIB
    write_json(path, found | {"transformers": transformers.__version__})


def work(name: str, args: Args, method: str) -> None:
    """A part at work, in a process group of its own."""
    os.setsid()
    torch.set_num_threads(1)  # threads would not survive the next fork
    part = Part(name, args, method)
    part.folder.mkdir()
    try:
        globals()[name](part)
    except Exception as error:
        (part.folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
        part.note("failed", {"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    finally:
        for process in part.started:
            process.kill()


def main(args: Args) -> int:
    start, folder, record = time.time(), Path(args.output_dir), {"args": asdict(args), "machine": {}, "parts": {}}
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"error: --output-dir {folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        process = context.Process(target=probe, args=(folder / "machine.json", args.device))
        process.start(), process.join(60)
        if process.exitcode == 0:
            break
    else:
        sys.exit(f"error: torch cannot compute on {args.device}; see above")
    record["machine"] = read_json(folder / "machine.json") | {"processes": method}
    print(f"{record['machine']}\n\n| part | figure | value |\n| --- | --- | --- |", flush=True)
    for name in args.parts:
        began = time.time()
        limit = max(0.0, min(LIMITS[name] * args.minutes / 7, start + 60 * args.minutes - began))
        process = context.Process(target=work, args=(name, args, method))
        process.start()
        try:
            process.join(limit)
            status = "failed" if process.exitcode else "done"
            status = f"stopped at its limit of {limit:.0f} s" if process.is_alive() else status
        finally:  # also at Ctrl-C, which the group does not hear
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        figures, seconds = read_json(folder / f"{name}.json"), time.time() - began
        record["parts"][name] = {"status": status, "seconds": seconds, "figures": figures}
        write_json(folder / "gpu.json", record)
        for figure, value in ({"status": f"{status}, {seconds:.0f} s"} | figures).items():
            print(f"| {name} | {figure} | {f'{value:.4g}' if isinstance(value, float) else value} |", flush=True)
    shutil.rmtree(folder / "models", ignore_errors=True)
    print(f"\n{time.time() - start:.0f} s; written to {folder / 'gpu.json'}")
    return int(any(part["status"] != "done" for part in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
