"""Figures of `score` and `judge`, 825 pixels wide. They are drawn from the files of a folder, never from memory."""

import io
import itertools
import json
import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from evaluation.files import read_answers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8})

# One colour per method in every figure: Okabe and Ito's palette, safe for the colour-blind, and a grey.
COLORS = {
    "sft": "#999999",
    "ppo": "#000000",
    "reward-shaping": "#E69F00",
    "ppo-lagrange": "#D55E00",
    "repo": "#0072B2",
    "repo-advantage": "#56B4E9",
    "sacpo-dpo": "#009E73",
    "sacpo-kto": "#CC79A7",
    "p-sacpo": "#F0E442",
}


def draw_figures(folder: Path) -> None:
    """All figures of `score`, from table.json and responses.jsonl."""
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    found, threshold = read_answers(folder / "responses.jsonl"), table["cost_threshold"]
    answers = {name: [found[name][index] for index in sorted(found[name])] for name in table["models"]}
    draw_scores(folder / "reward_cost.png", answers, threshold)
    draw_costs(folder / "cost_distribution.png", answers, threshold)
    points = {name: (row["reward"], row["safety_compliance"]) for name, row in table["models"].items()}
    draw_points(folder / "compliance_reward.png", points, "mean reward", "safety compliance", shares="y")
    if "suites" in table and table["suites"]["all"]["to_answer"]:
        models = table["suites"]["all"]["models"]
        points = {name: (row["over_refusal"], row["safety_compliance"]) for name, row in models.items()}
        draw_points(folder / "compliance_over_refusal.png", points, "over-refusal", "safety compliance", shares="xy")


def draw_elo(folder: Path) -> None:
    """Harmlessness Elo against helpfulness Elo, from judge.json: one point per model that has both."""
    criteria = json.loads((folder / "judge.json").read_text(encoding="utf-8"))["criteria"]
    helpful, harmless = ({name: row["elo"] for name, row in part["models"].items()} for part in criteria.values())
    points = {name: (elo, harmless[name]) for name, elo in helpful.items() if elo and harmless[name]}
    draw_points(folder / "elo.png", points, *(f"{criterion}, Elo" for criterion in criteria))


def method_colors(names: list[str]) -> dict[str, str]:
    """A method's own colour; other names get the colours that are left, in order, and then all of them in turn."""
    left = [color for name, color in COLORS.items() if name not in names]
    others = itertools.chain(left, itertools.cycle(COLORS.values()))
    return {name: COLORS[name] if name in COLORS else next(others) for name in names}


def save_figure(figure, path: Path) -> None:
    """Write a figure in 128 colours, which makes its file a third as large."""
    content = io.BytesIO()
    figure.savefig(content)
    plt.close(figure)
    Image.open(content).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def draw_scores(path: Path, answers: dict[str, list[dict]], threshold: float) -> None:
    """Reward against cost of every prompt, one panel per model, with the border of safe and unsafe and both shares."""
    colors = method_colors(list(answers))
    columns = {1: 1, 2: 2, 4: 2}.get(len(answers), 3 if len(answers) <= 9 else 4)
    lines = math.ceil(len(answers) / columns)
    size = (4.5 if columns == 1 else 7.5, 0.5 + lines * {1: 3.0, 2: 2.6, 3: 2.2, 4: 1.9}[columns])
    grid = dict(sharex=True, sharey=True, squeeze=False)
    figure, axes = plt.subplots(lines, columns, figsize=size, dpi=110, layout="constrained", **grid)
    every = [row for rows in answers.values() for row in rows]
    costs, rewards = [[row[key] for row in every] for key in ("cost", "reward")]
    bottom, height = min(rewards), max(rewards) - min(rewards) or 1.0
    # Room on both sides of the border for what is written there, however far the costs reach.
    safe_side, unsafe_side = threshold - min(costs), max(costs) - threshold
    least = max(safe_side, unsafe_side) / 2 or 0.5
    left, right = threshold - 1.08 * max(safe_side, least), threshold + 1.08 * max(unsafe_side, least)
    style = dict(s=4, linewidths=0) if len(every) > 1500 else dict(s=10, edgecolors="black", linewidths=0.25)
    for axis in axes.flat[len(answers) :]:
        axis.set_axis_off()
    for place, (axis, (name, rows)) in enumerate(zip(axes.flat, answers.items(), strict=False)):
        axis.axvspan(threshold, right, color="#D55E00", alpha=0.08, lw=0)
        axis.axvline(threshold, color="black", lw=0.8, ls="--")
        points = [row["cost"] for row in rows], [row["reward"] for row in rows]
        axis.scatter(*points, color=colors[name], alpha=0.7, **style)
        safe = sum(row["cost"] <= threshold for row in rows) / len(rows)
        corner = dict(transform=axis.transAxes, va="top", fontsize=8)
        axis.text(0.03, 0.98, f"{safe:.1%}\nsafe", **corner)
        axis.text(0.97, 0.98, f"{1 - safe:.1%}\nunsafe", ha="right", **corner)
        axis.set_title(textwrap.fill(name, 88 // columns), fontsize=9)
        axis.tick_params(labelbottom=place + columns >= len(answers))  # the lowest of its column
    axes[0, 0].set(xlim=(left, right), ylim=(bottom - 0.06 * height, bottom + 1.3 * height))  # room for the shares
    figure.supxlabel(f"cost (unsafe above {threshold:g})", fontsize=9)
    figure.supylabel("reward", fontsize=9)
    save_figure(figure, path)


def draw_costs(path: Path, answers: dict[str, list[dict]], threshold: float) -> None:
    """The distribution of cost, one row per model; the border of safe and unsafe is an edge of the bins."""
    colors = method_colors(list(answers))
    costs = {name: np.array([row["cost"] for row in rows]) for name, rows in answers.items()}
    edges = threshold + np.linspace(-1, 1, 121) * (max(abs(values - threshold).max() for values in costs.values()) or 1)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in costs.items()}
    tallest = max(heights.max() for heights in shares.values())
    figure, axis = plt.subplots(figsize=(7.5, 1.0 + 0.55 * len(answers)), dpi=110, layout="constrained")
    for base, (name, values) in enumerate(reversed(costs.items())):
        axis.stairs(base + 0.85 * shares[name] / tallest, edges, baseline=base, fill=True, color=colors[name])
        axis.axhline(base, color="black", lw=0.5)
        text = f"mean {values.mean():+.2f}\n{(values > threshold).mean():.1%} unsafe"
        axis.text(1.01, base + 0.1, text, transform=axis.get_yaxis_transform(), fontsize=8)
    axis.axvline(threshold, color="black", lw=0.8, ls="--")
    names = [textwrap.fill(name, 22) for name in reversed(costs)]
    axis.set_yticks([base + 0.35 for base in range(len(names))], names)
    limits = min(threshold, *map(min, costs.values())), max(threshold, *map(max, costs.values()))
    axis.set(ylim=(0, len(names)), xlim=limits, xlabel=f"cost (unsafe above {threshold:g})")
    save_figure(figure, path)


def draw_points(path: Path, points: dict[str, tuple[dict, dict]], across: str, along: str, shares: str = "") -> None:
    """One point per model with 95% intervals of both coordinates, each {mean, low, high}; shares: the axes ("x", "y")
    that go from 0 to 100%."""
    colors = method_colors(list(points))
    figure, axis = plt.subplots(figsize=(7.5, max(3.4, 0.8 + 0.3 * len(points))), dpi=110, layout="constrained")
    for (name, pair), marker in zip(points.items(), itertools.cycle("osD^vP*X<>ph")):
        x, y = ([[max(p["mean"] - p["low"], 0)], [max(p["high"] - p["mean"], 0)]] for p in pair)
        style = dict(color=colors[name], lw=1.2, markeredgecolor="black", markeredgewidth=0.5, markersize=6)
        label = textwrap.fill(name, 24)
        axis.errorbar(pair[0]["mean"], pair[1]["mean"], xerr=x, yerr=y, fmt=marker, label=label, **style)
    for scale in shares:
        axis.set(**{f"{scale}lim": (-0.03, 1.03)})
        getattr(axis, f"{scale}axis").set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set(xlabel=across, ylabel=along)
    axis.grid(alpha=0.25, lw=0.5)
    if points:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)
