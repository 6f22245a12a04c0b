"""Figures of `score` and `judge`, 825 pixels wide. They are drawn from the files of a folder, never from memory."""

import json
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from evaluation.files import read_answers

plt.rcParams.update({"backend": "agg", "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 8})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.labelsize": 9})

# Colour, marker and line of every method in all figures: Okabe and Ito's palette, some colours of Tol's and a brown.
STYLES = {
    "sft": ("#999999", "p", ":"),
    "ppo": ("#000000", "X", "-"),
    "reward-shaping": ("#E69F00", "D", "--"),
    "rectified-penalty": ("#882255", "P", (0, (3, 1, 1, 1, 1, 1))),
    "ppo-lagrange": ("#D55E00", "s", (0, (5, 1))),
    "repo": ("#0072B2", "o", "-"),
    "repo-advantage": ("#56B4E9", "^", "-."),
    "repo-group": ("#332288", "v", (0, (1, 1))),
    "repo-noisy": ("#8B5A2B", "d", (0, (8, 3))),
    "repo-low-kl": ("#AA4499", "*", (0, (4, 1, 1, 1))),
    "sacpo-dpo": ("#009E73", ">", "--"),
    "sacpo-kto": ("#CC79A7", "<", "-."),
    "p-sacpo": ("#CCBB44", "h", ":"),
}
COLORS = {name: color for name, (color, _, _) in STYLES.items()}


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
    draw_points(folder / "elo.png", points, *(f"{criterion} (Elo)" for criterion in criteria))


def method_styles(names: list[str]) -> dict[str, tuple]:
    """Colour, marker and line of every name, no two alike: a method's own, for a variant such as p-sacpo-0.5 too unless
    another name has it. Other names get the styles that are left, and then the colours again with other markers."""
    known, found = [*STYLES.values()], {}
    left = [(color, known[i - turn][1], line) for turn in range(len(known)) for i, (color, _, line) in enumerate(known)]
    methods = {name: [key for key in STYLES if f"{name}-".startswith(f"{key}-")] for name in names}
    for name in sorted(names, key=lambda name: (name not in STYLES, not methods[name])):
        own = STYLES.get(max(methods[name], key=len, default=None))
        found[name] = left.pop(left.index(own) if own in left else 0)
    return found


def method_colors(names: list[str]) -> dict[str, str]:
    return {name: color for name, (color, _, _) in method_styles(names).items()}


def save_figure(figure, path: Path) -> None:
    """Write a figure in 256 colours, which makes its file a third as large."""
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    image = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)


def draw_scores(path: Path, answers: dict[str, list[dict]], threshold: float) -> None:
    """Reward against cost of every prompt, one panel per model, with the border of safe and unsafe and both shares."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(answers), 3 if len(answers) <= 9 else 4)
    lines = (len(answers) - 1) // columns + 1
    size = (4.5 if columns == 1 else 7.5, 0.5 + lines * (3.4 - 0.4 * columns))
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    reach = 1.08 * max(abs(row["cost"] - threshold) for rows in answers.values() for row in rows) or 1.0
    area, styles = (5 if sum(map(len, answers.values())) > 1500 else 14), method_styles(list(answers))
    for axis in axes.flat[len(answers) :]:
        axis.set_axis_off()
    for i, (axis, (name, rows)) in enumerate(zip(axes.flat, answers.items(), strict=False)):
        axis.axvspan(threshold, threshold + reach, color="0.93", lw=0)
        axis.axvline(threshold, color="black", lw=0.8, ls="--")
        (color, marker, _), points = styles[name], ([row["cost"] for row in rows], [row["reward"] for row in rows])
        axis.scatter(*points, s=area, marker=marker, color=color, edgecolors="black", linewidths=area / 50, alpha=0.7)
        safe = sum(row["cost"] <= threshold for row in rows) / len(rows)
        axis.set_title(f"{safe:.1%} safe", loc="left", fontsize=8)
        axis.set_title(f"{1 - safe:.1%} unsafe", loc="right", fontsize=8)
        axis.set_title(textwrap.fill(name, 88 // columns) + "\n", fontsize=9)
        axis.tick_params(labelbottom=i + columns >= len(answers))  # the lowest of its column
    axes[0, 0].set_xlim(threshold - reach, threshold + reach)
    figure.supxlabel(f"cost (unsafe above {threshold:g})", fontsize=9)
    figure.supylabel("reward", fontsize=9)
    save_figure(figure, path)


def draw_costs(path: Path, answers: dict[str, list[dict]], threshold: float) -> None:
    """The distribution of cost, one row per model; the border of safe and unsafe is an edge of the bins."""
    costs = {name: np.array([row["cost"] for row in rows]) for name, rows in reversed(answers.items())}
    edges = threshold + np.linspace(-1, 1, 121) * (max(abs(values - threshold).max() for values in costs.values()) or 1)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in costs.items()}
    tallest, colors = max(map(max, shares.values())), method_colors(list(answers))
    figure, axis = plt.subplots(figsize=(7.5, 1.0 + 0.55 * len(answers)))
    for base, (name, values) in enumerate(costs.items()):
        axis.stairs(base + 0.85 * shares[name] / tallest, edges, baseline=base, fill=True, color=colors[name])
        axis.axhline(base, color="black", lw=0.5)
        text = f"mean {values.mean():+.2f}\n{(values > threshold).mean():.1%} unsafe"
        axis.text(1.01, base + 0.1, text, transform=axis.get_yaxis_transform())
    axis.axvline(threshold, color="black", lw=0.8, ls="--")
    axis.set_yticks(np.arange(len(costs)) + 0.35, [textwrap.fill(name, 22) for name in costs])
    label = f"cost (unsafe above {threshold:g}). Height of a bar: share of the answers"
    axis.set(ylim=(0, len(costs)), xlim=(edges[0], edges[-1]), xlabel=label)
    save_figure(figure, path)


def draw_points(path: Path, points: dict[str, tuple[dict, dict]], across: str, along: str, shares: str = "") -> None:
    """A point per model with the intervals of {mean, low, high}; shares: the axes ("x", "y") that go from 0 to 100%."""
    styles = method_styles(list(points))
    figure, axis = plt.subplots(figsize=(7.5, max(3.4, 0.8 + 0.3 * len(points))))
    for i, (name, pair) in enumerate(points.items()):
        (color, marker, _), size = styles[name], 10 - 4 * i / len(points)  # a mark does not hide those behind it
        x, y = ([[max(p["mean"] - p["low"], 0)], [max(p["high"] - p["mean"], 0)]] for p in pair)
        style = dict(color=color, lw=1.2, mfc=(color, 0.4), mec="black", ms=size, label=textwrap.fill(name, 24))
        axis.errorbar(pair[0]["mean"], pair[1]["mean"], xerr=x, yerr=y, fmt=marker, **style)
    for scale in shares:
        axis.set(**{f"{scale}lim": (-0.05, 1.05)})
        getattr(axis, f"{scale}axis").set_major_formatter("{x:.0%}")
    axis.set(xlabel=across, ylabel=along)
    axis.grid(alpha=0.25, lw=0.5)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False, title="95% intervals")
    save_figure(figure, path)
