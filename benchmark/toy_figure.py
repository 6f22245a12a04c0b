"""Draw learning curves of runs on the toy world by its exact functions: docs/figures/toy_repo.png.

    for seed in 1 2 3 4 5; do python repo.py --seed $seed --output-dir runs/repo-$seed --eval-every 5; done
    python benchmark/toy_figure.py runs/repo-*

Each run's eval.jsonl is read; lines are means over the runs, bands 95% t-intervals of the mean.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "toy"))
import world  # noqa: E402

COLOURS = {"harmless": "#009E73", "delicate": "#E69F00", "dangerous": "#D55E00", "all": "#0072B2"}  # Okabe and Ito's


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]] = field(default_factory=list)
    """output directories of runs on the toy world that evaluated at the same iterations"""
    output: Path = ROOT / "docs" / "figures" / "toy_repo.png"
    """where the figure goes"""


def curves(run: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Iterations [evaluations], and for each hazard and for all prompts reward and compliance, [evaluations, 2]."""
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    iterations = sorted({row["iteration"] for row in rows})
    points = {name: {i: [] for i in iterations} for name in COLOURS}
    for row in rows:
        text = (row["prompt"], row["response"])
        point = (world.exact_reward(*text), world.exact_cost(*text) <= 0)
        for name in ("all", world.HAZARDS[world.hazard(row["prompt"])]):
            points[name][row["iteration"]].append(point)
    return np.array(iterations), {
        name: np.array([np.mean(points[name][i], axis=0) for i in iterations]) for name in COLOURS
    }


def draw(axis, x: np.ndarray, values: np.ndarray, name: str, width: float = 1.5) -> None:
    """A line with its band; values: [runs, evaluations]."""
    mean = values.mean(0)
    axis.plot(x, mean, color=COLOURS[name], lw=width, label=f"{name} prompts")
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(x, mean - half, mean + half, color=COLOURS[name], alpha=0.2, lw=0)


def main(args: Args) -> None:
    runs = [curves(run) for run in args.runs]
    batch = json.loads((args.runs[0] / "args.json").read_text())["batch_size"]
    episodes = runs[0][0] * batch
    optimum = {
        name: world.per_response_optimum([p for p in world.heldout_prompts() if world.HAZARDS[world.hazard(p)] == name])
        for name in world.HAZARDS
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=110, layout="constrained")
    for name in COLOURS:
        values = np.stack([run[1][name] for run in runs])  # [runs, evaluations, 2]
        draw(left, episodes, 100 * values[..., 1], name, 2.5 if name == "all" else 1.3)
        if name != "all":
            draw(right, episodes, values[..., 0], name)
            right.axhline(optimum[name].reward, color=COLOURS[name], ls=":", lw=1.2)
    left.set(title="Safe answers to held-out prompts", ylabel="exact safety compliance, %", ylim=(-3, 103))
    right.set(title="Helpfulness (dotted: the safe optimum)", ylabel="exact reward")
    for axis in (left, right):
        axis.set_xlabel("episodes")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.5)
    left.legend(frameon=False, fontsize=8)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    print(f"{len(runs)} runs drawn to {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
