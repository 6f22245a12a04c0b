"""Run a script as its command line would, and see from outside its memory and where the time of an update goes.

`gpu.py` beside it starts `watch` in a process of its own, `throughput.py` starts this file:

    python benchmark/watched.py FOLDER repo.py ITERATION --flags ...     # FOLDER.profile: the update of ITERATION

The script is not changed: a thread reads the peak of memory, and a hook in torch's `Module.train` finds the update of
an iteration.
"""

import json
import os
import resource
import runpy
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parent.parent
THREADS = int(os.environ.get("OMP_NUM_THREADS", min(4, os.cpu_count() or 1)))
# Kinds of work by the beginning of an operation's name; the first that fits counts
FSDP = ("FSDP::", "fsdp::", "nccl", "c10d::", "record_param_comms", "aten::_foreach_copy")
FSDP += ("aten::split_with_sizes_copy", "aten::_chunk_cat")
OPTIMIZERS = ("Optimizer.", "aten::_fused_adamw", "aten::_foreach", "aten::linalg_vector_norm")
CALLERS = ("FSDP::", "Optimizer.")
SPANS = ("FSDP::", "Optimizer.", "nccl:", "ProfilerStep")  # on a GPU's time line, these lie over the kernels
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::matmul", "aten::linear")


def write_json(path: Path, content) -> None:
    """Under another name first: a reader never finds half of it."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.rename(path)


def watch(folder: Path, script: str, words: list, device: str, threads=THREADS, profiled=0, torchrun=False) -> None:
    """Run a script as __main__: FOLDER.log gets what it prints, FOLDER.memory its peak of memory in bytes.

    device: "cpu" hides the GPU. profiled: the number of an iteration of repo.py whose update is described in
    FOLDER.profile. torchrun: start it by torchrun, with one process, unwatched.
    """
    log = os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log, 1), os.dup2(log, 2)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv = [str(word) for word in (ROOT / script, *words)]
    if torchrun:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        os.execve(sys.executable, [*launcher, *sys.argv], os.environ | {"OMP_NUM_THREADS": str(threads)})
    torch.set_num_threads(threads)
    threading.Thread(target=note_memory, args=(Path(f"{folder}.memory"),), daemon=True).start()
    if profiled:
        profile_update(profiled, Path(f"{folder}.profile"))
    runpy.run_path(sys.argv[0], run_name="__main__")


def note_memory(path: Path) -> None:
    while True:
        cuda = torch.cuda.is_initialized()
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_json(path, {"peak": peak})
        time.sleep(0.2)


def profile_update(number: int, path: Path) -> None:
    """Profile the update of an iteration of repo.py, which lies between `policy.train()` and `policy.eval()`."""
    train, updates, started = nn.Module.train, 0, []

    def hooked(module: nn.Module, mode: bool = True) -> nn.Module:
        nonlocal updates
        if "CausalLM" in type(module).__name__ and hasattr(module, "set_reshard_after_forward"):  # the policy, whole
            cuda, kinds = torch.cuda.is_initialized(), torch.profiler.ProfilerActivity
            updating = mode and torch.is_grad_enabled()  # load_model's check of both modes needs no gradients
            updates += updating
            if updating and updates == number:
                activities = [kinds.CPU, *([kinds.CUDA] if cuda else [])]
                profiler = torch.profiler.profile(activities=activities, record_shapes=True)
                profiler.start()
                started.extend([profiler, time.time()])
            elif started and not mode:
                if cuda:
                    torch.cuda.synchronize()
                profiler, wall = started[0], time.time() - started[1]
                profiler.stop()
                write_json(path, summarise(profiler, module.config.vocab_size) | {"wall": wall})
                started.clear()
        return train(module, mode)

    nn.Module.train = hooked


def summarise(profiler, vocabulary: int) -> dict:
    """Seconds of an update by kind of work: of kernels on a GPU, of operations on a CPU; busy: without their overlaps.

    An operation's time is without that of the operations that it calls. What FSDP and the optimizers call is theirs.
    """
    cuda, kinds = torch.cuda.is_initialized(), {}
    for event in profiler.events():
        if event.device_type != DeviceType.CPU or (cuda and event.name.startswith(SPANS)):
            continue  # a kernel, which counts with the operation that launched it, or a span of other operations
        name, caller = event.name, event.cpu_parent
        while caller:
            name, caller = caller.name if caller.name.startswith(CALLERS) else name, caller.cpu_parent
        of_head = any(vocabulary in shape for shape in event.input_shapes or () if isinstance(shape, list | tuple))
        fits = {"FSDP": name.startswith(FSDP), "optimizers and clipping": name.startswith(OPTIMIZERS)}
        fits["head and cross-entropy"] = of_head or "softmax" in name or "nll_loss" in name
        fits["matrix products of the blocks"] = name.startswith(PRODUCTS)
        fits |= {"attention": "attention" in name, "element-wise and the rest": True}
        kind = next(kind for kind, fit in fits.items() if fit)
        kinds[kind] = kinds.get(kind, 0) + (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    busy, end = 0.0 if cuda else sum(kinds.values()), 0.0
    for event in sorted(profiler.events() if cuda else [], key=lambda event: event.time_range.start):
        if event.device_type != DeviceType.CPU and not event.name.startswith(SPANS):
            busy += max(0.0, event.time_range.end - max(end, event.time_range.start)) / 1e6
            end = max(end, event.time_range.end)
    return {"kinds": kinds, "busy": busy}


if __name__ == "__main__":
    watch(
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[4:],
        "cuda" if torch.cuda.is_available() else "cpu",
        profiled=int(sys.argv[3]),
    )
