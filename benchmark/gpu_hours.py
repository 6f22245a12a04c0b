"""GPU-hours of a recipe's training stages, which `alpaca_7b.sh --dry-run` prints last.

Needs no torch, and reads the recipe's settings from the environment:

    GPU_JSON=runs/gpu/gpu.json benchmark/alpaca_7b.sh --dry-run      # with the rates that gpu.py measured on your card

Matrix products take two FLOPs per weight and token in a forward pass. A training step is four forward passes: forward,
recomputed forward, and a backward pass of two. All texts have the full length. A token of the rollout takes the longer
of two times: reading the policy once, and launching its layers one after another. Not counted are loading, evaluations,
checkpoints, communication between GPUs, and the stages `sft` and `evaluate`.
"""

import json
import os
import sys
from pathlib import Path

# weights that multiply, in billions; layers
SIZES = {"7B": (6.6, 32), "3B": (3.2, 28)}
# An H100: peaks of the data sheet, and shares of them that are assumed, as nothing has been measured on one yet
PRODUCTS, SHARE, READING, READ_SHARE, LAYER = 989e12, 0.40, 3.35e12, 0.50, 0.8e-3
ASSUMED = "assumed: an H100 with 40% of 989 TFLOP/s, 50% of 3.35 TB/s, and 0.8 ms per layer and token"
PAIRS = {"reward": 74_000, "cost": 74_000, "sacpo": 27_000}  # rows of PKU-SafeRLHF and of PKU-SafeRLHF-30K


def rates() -> tuple[float, float, float, str]:
    """FLOP/s of training, bytes/s and seconds per layer of a rollout, and where they come from."""
    if not os.environ.get("GPU_JSON"):
        return PRODUCTS * SHARE, READING * READ_SHARE, LAYER, ASSUMED
    record, run = json.loads(Path(os.environ["GPU_JSON"]).read_text(encoding="utf-8")), "repo.py, batch 16"
    figures = record["parts"].get("speed", {}).get("figures", {})
    if f"{run}: rollout, ms a token" not in figures:
        print(f"# No estimate of GPU-hours: {os.environ['GPU_JSON']} has no figures of gpu.py's part speed")
        sys.exit()
    share = figures[f"{run}: update, % of the matrix rate"] / 100
    if record["args"]["gradient_checkpointing"]:
        share *= 4 / 3  # its share leaves the recomputation out, and here it is counted
    products = 1e12 * figures["card, measured: matrix products, TFLOP/s"] * share
    layer = figures[f"{run}: rollout, ms a token"] / 1000 / 22  # layers of gpu.py's shape
    source = f"measured by gpu.py with models of 1.1B parameters: {record['machine']['device']}"
    return products, 1e9 * figures["card, measured: reading memory, GB/s"], layer, source


def hours(stage: str, settings: dict, weights: float, layers: int) -> float:
    """GPU-hours of a stage."""
    training, reading, layer, _ = rates()
    length = settings["MAX_PROMPT_LENGTH"] + settings["MAX_NEW_TOKENS"]
    if stage in PAIRS:
        sacpo = stage == "sacpo"  # two stages, in which the reference is read once
        passes = 2 * (4 * settings["SACPO_EPOCHS"] + 1) if sacpo else 4 * settings["PREFERENCE_EPOCHS"]
        return 2 * weights * 2 * PAIRS[stage] * settings["MAX_LENGTH"] * passes / training / 3600
    # One pass for the prompts, three frozen models, three trained ones, and the PTX term
    flops = 2 * weights * settings["EPISODES"] * length * (1 + 3 + 3 * 4 + 4)
    token = max(2 * weights / reading, layer * layers)
    iterations = settings["EPISODES"] / settings["BATCH_SIZE"]
    gpus = settings["GPUS"] * settings["NNODES"]
    return (flops / training + iterations * gpus * settings["MAX_NEW_TOKENS"] * token) / 3600


def main() -> None:
    names = ["EPISODES", "BATCH_SIZE", "MAX_PROMPT_LENGTH", "MAX_NEW_TOKENS", "MAX_LENGTH", "GPUS", "NNODES"]
    settings = {name: int(os.environ[name]) for name in [*names, "PREFERENCE_EPOCHS", "SACPO_EPOCHS"]}
    if os.environ["SIZE"] not in SIZES:
        print(f"# No estimate of GPU-hours: SIZE is {os.environ['SIZE']}; known are {', '.join(SIZES)}")
        sys.exit()
    billions, layers = SIZES[os.environ["SIZE"]]
    stages = [stage for stage in os.environ["STAGES"].split() if stage in PAIRS or stage in ("repo", "ppo_lagrange")]
    found = {stage: hours(stage, settings, 1e9 * billions, layers) for stage in stages}
    if found:
        parts = ", ".join(f"{stage} {value:.1f}" for stage, value in found.items())
        print(f"# GPU-hours for {os.environ['SIZE']}, an estimate: {parts}; together {sum(found.values()):.0f}")
        print(f"# Rates {rates()[-1]}")


if __name__ == "__main__":
    main()
