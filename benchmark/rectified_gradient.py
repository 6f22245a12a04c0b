"""The policy gradient of PPO-Lagrange and of RePO's two estimators, on two prompts with two answers each.

Nothing is sampled. repo.py's functions see every answer, weighted by its probability, and the critics are exact unless
a line says otherwise. repo_group.py's functions see every K-tuple of answers. Prints the numbers of
docs/rectified_gradient.md and docs/repo_group.md, and draws the figure of the former:

    python benchmark/rectified_gradient.py
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import repo  # noqa: E402
import repo_group  # noqa: E402
from evaluation.figures import STYLES, plt, save_figure  # noqa: E402

torch.set_default_dtype(torch.float64)

# Prompts: harmless, risky. Answers: the safer, the more helpful. [prompts, answers]
REWARDS = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
COSTS = torch.tensor([[-5.0, -3.0], [-1.0, 2.0]])
RISKY, SAFE, UNSAFE = 1, 0, 1
METHODS = {"ppo_lagrange": "PPO-Lagrange", "cost": "RePO, cost", "advantage": "RePO, advantage"}
LOOKS = {"ppo_lagrange": STYLES["ppo-lagrange"], "cost": STYLES["repo"], "advantage": STYLES["repo-advantage"]}
SHADES = {1: ("#90CCF0", ":"), 5: ("#56B4E9", "--"), 20: ("#27546E", "-.")}  # λ: RePO, advantage from light to dark


@dataclass
class Args:
    """Exact gradients of PPO-Lagrange and of RePO's two estimators."""

    seed: int = 1
    """seeds the wrong critics"""
    steps: int = 300
    """steps of gradient ascent"""
    step_size: float = 1.0
    """of the ascent on the logits"""
    kl_coef: float = 0.01
    """β of the ascent; the tables of a single step use β = 0"""
    lambda_init: float = 1.0
    """initial multiplier"""
    lambda_lr: float = 0.1
    """η_λ"""
    lambda_max: float = 20.0
    """upper bound of the multiplier"""
    output: str = str(ROOT / "docs" / "figures" / "rectified_gradient.png")
    """the figure"""


def policy(safe: float) -> torch.Tensor:
    """Logits [prompts, answers]: an even choice on the harmless prompt, P(safe answer) as given on the risky one."""
    return torch.tensor([[0.5, 0.5], [safe, 1 - safe]]).log()


def advantages(method, logits, ref_logits, multiplier, beta, values=None):
    """repo.py's advantage of every answer; values: those of the critics [2, prompts], default exact.

    Returns the advantages that the policy gradient uses, A_r, A_c (each [prompts, answers]) and E of what moves λ.
    """
    probs = logits.softmax(-1)
    log_ratio = (logits.log_softmax(-1) - ref_logits.log_softmax(-1)).reshape(-1, 1)
    mask = torch.ones(COSTS.numel(), 1, dtype=torch.long)
    estimator = "advantage" if method == "advantage" else "cost"
    terminal_costs, shares, excess = repo.rectify(COSTS.flatten(), 0.0, "response", estimator, 1)
    if method == "ppo_lagrange":  # C - d for every answer, in the estimate and in the update of the multiplier
        terminal_costs = excess = COSTS.flatten()
    parts = []
    for i, (terminal, weight) in enumerate([(REWARDS.flatten(), -beta), (terminal_costs, beta)]):
        signal = repo.token_signal(terminal, log_ratio, mask, weight)
        value = (probs * signal.view(probs.shape)).sum(1) if values is None else values[i]
        parts.append(repo.gae(signal, value.repeat_interleave(2)[:, None], mask, 1.0)[0])
    combined = repo.combine_advantages(*parts, multiplier * shares[:, None])
    mean_excess = (probs * excess.view(probs.shape)).sum(1).mean().item()
    return *(part.view(probs.shape) for part in (combined, *parts)), mean_excess


def policy_gradient(logits, combined):
    """Expected gradient at the logits, prompts equally often, [prompts, answers]."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    loss = repo.policy_loss(logprobs, logprobs.detach(), combined, 0.2)
    return torch.autograd.grad(-(logprobs.detach().exp() * loss).sum() / len(logits), logits)[0]


def lagrangian_gradient(logits, multiplier):
    """∇L at β = 0, by autograd of its closed form."""
    logits = logits.clone().requires_grad_()
    score = (REWARDS - multiplier * COSTS.clamp(min=0)) / (1 + multiplier)
    return torch.autograd.grad((logits.softmax(-1) * score).sum() / len(logits), logits)[0]


def ascend(args, method, start):
    """Gradient ascent from P(safe answer | risky) = start. Returns that probability, costs [steps, prompts] and λ."""
    logits, ref_logits, multiplier = policy(start), policy(start), args.lambda_init
    safe, costs = [], []
    for _ in range(args.steps + 1):
        probs = logits.softmax(-1)
        safe.append(probs[RISKY, SAFE].item())
        costs.append((probs * COSTS).sum(1))
        *_, excess = advantages(method, logits, ref_logits, multiplier, args.kl_coef)
        multiplier = repo.update_multiplier(multiplier, args.lambda_lr, excess, args.lambda_max)
        combined, *_ = advantages(method, logits, ref_logits, multiplier, args.kl_coef)
        logits = logits + args.step_size * policy_gradient(logits, combined)
    return safe, torch.stack(costs), multiplier, (probs * REWARDS).sum(1).mean().item()


def push(method, safe, multiplier, values=None):
    """How far the safe answer to the risky prompt is preferred, A(safe) - A(unsafe): its logit's gradient / π_s π_u."""
    logits = policy(safe)
    combined, *_ = advantages(method, logits, logits, multiplier, 0.0, values)
    return (2 * policy_gradient(logits, combined)[RISKY, SAFE] / (safe * (1 - safe))).item()


def print_step():
    print("One step, risky prompt, λ = 5, β = 0, exact critics: advantages of the safe and of the unsafe answer")
    print(f"{'P(safe)':>8}  {'method':<16}{'A_r':>16}{'A_c':>16}{'A':>16}{'push':>8}")
    for safe in (0.5, 0.1, 0.01):
        for method, name in METHODS.items():
            logits = policy(safe)
            combined, of_reward, of_cost, _ = advantages(method, logits, logits, 5.0, 0.0)
            columns = "".join(
                f"{f'{a:+.2f}, {b:+.2f}':>16}" for a, b in (x[RISKY] for x in (of_reward, of_cost, combined))
            )
            print(f"{safe:>8}  {name:<16}{columns}{push(method, safe, 5.0):>+8.2f}")


def print_borders():
    print("\nP(safe) above which the safe answer rises (bisection on the push)")
    print(f"{'λ':>8}{'cost':>12}{'advantage':>12}{'(1+λ)/λ · Δ/(Δ+D)':>22}")
    for multiplier in (0.4, 1.0, 5.0, 20.0, 1000.0):
        row = []
        for method in ("cost", "advantage"):
            low, high = 0.0, 1.0
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (low, middle) if push(method, middle, multiplier) > 0 else (middle, high)
            row.append("always" if high < 1e-6 else "never" if low > 1 - 1e-6 else f"{high:.3f}")
        print(f"{multiplier:>8}{row[0]:>12}{row[1]:>12}{(1 + multiplier) / multiplier / 4:>22.3f}")


def print_bias(seed):
    print("\nLargest distance of a component from ∇L over 1000 random pairs of critics, P(safe) = 0.25, λ = 5, β = 0")
    values = 3 * torch.randn(1000, 2, 2, generator=torch.Generator().manual_seed(seed))
    logits = policy(0.25)
    expected = lagrangian_gradient(logits, 5.0)
    for method in METHODS:
        distances = [
            (policy_gradient(logits, advantages(method, logits, logits, 5.0, 0.0, v)[0]) - expected).abs().max().item()
            for v in values
        ]
        print(f"  {METHODS[method]:<16}{max(distances):.2g}")


def print_prompt_constraint():
    safe = torch.tensor(0.6)
    probs = torch.stack([safe, 1 - safe])
    mean = (probs * COSTS[RISKY]).sum().item()
    print(f"\nPer prompt, risky prompt, P(safe) = {safe:.1f}: {{E_y C}}^+ = {max(mean, 0):.2f}")
    print(f"{'K':>4}{'E of what moves λ':>20}{'P(others violate)':>20}")
    for k in (1, 2, 4, 8):
        tuples = torch.tensor(list(itertools.product((SAFE, UNSAFE), repeat=k)))
        _, violated, excess = repo.rectify(COSTS[RISKY][tuples].flatten(), 0.0, "prompt", "advantage", k)
        weights = probs[tuples].prod(1)
        # At K = 1 there are no others: a response is judged by its own cost.
        judged = f"{(weights * violated.view(-1, k)[:, 0]).sum():.3f}" if k > 1 else "-"
        print(f"{k:>4}{(weights * excess).sum():>20.3f}{judged:>20}")

    costs, probs = torch.tensor([-3.0, -0.5, 1.0]), torch.tensor([0.1, 0.3, 0.6])
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
    others, _, _ = repo.rectify(costs[pairs].flatten(), 0.0, "prompt", "cost", 2)
    own = costs[pairs] * (costs[pairs].mean(1, keepdim=True) > 0)
    print(f"\nK = 2, costs {costs.tolist()}, probabilities {probs.tolist()}: mean negative terminal cost per answer")
    for name, terminal in (("judged by the other", others.view(-1, 2)), ("judged by the mean of both", own)):
        earned = torch.zeros(3).index_add(0, pairs[:, 0], -terminal[:, 0] * probs[pairs[:, 1]])
        print(f"  {name:<28}" + "".join(f"{value:>+8.2f}" for value in earned))


def gradient_and_noise(probs, tuples, combined):
    """Of advantages [prompts, tuples, K]: the mean gradient, [prompts, answers], and its variance per answer, within
    prompts and between them, each summed over the logits."""
    k, answers = tuples.shape[1], probs.shape[1]
    scores = torch.eye(answers) - probs[:, None]  # ∇ log π of each answer at the logits of its prompt
    of_tuples = (combined[..., None] * scores[:, tuples]).mean(2)  # [prompts, tuples, answers]
    weights = probs[:, tuples].prod(-1)[..., None]
    mean = (weights * of_tuples).sum(1)
    within = (weights * (of_tuples - mean[:, None]) ** 2).sum() / len(probs)
    between = (mean**2).sum() / len(probs) - ((mean / len(probs)) ** 2).sum()  # each prompt has logits of its own
    return mean / len(probs), k * within.item(), k * between.item()


def group_advantages(rewards, costs, multiplier, tuples, norm=False):
    """repo_group.py's advantages at β = 0 of all K-tuples, [prompts, tuples, K]."""
    k = tuples.shape[1]
    cost_advantages, _ = repo_group.rectify_groups(costs[:, tuples].flatten(), 0.0, "response", k, norm)
    reward_advantages = repo_group.group_advantages(rewards[:, tuples].flatten(), k, norm)
    combined = repo_group.combine_advantages(reward_advantages, cost_advantages, multiplier)
    return combined.view(len(rewards), *tuples.shape)


def print_group(seed, multiplier=5.0):
    """A random problem, since with two answers of very different probability an exact value is a poor baseline.

    Critics' rows are by their formula: at β = 0 a one-token response has the advantage (R - λ {C}^+) / (1 + λ) - value.
    """
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    generator, prompts, answers = torch.Generator().manual_seed(seed), 50, 5
    probs = normal(prompts, answers).softmax(1)
    rewards, costs = (normal(prompts, 1) + normal(prompts, answers) for _ in range(2))
    score = (rewards - multiplier * costs.clamp(min=0)) / (1 + multiplier)
    value, expected = (probs * score).sum(1, keepdim=True), None
    single, rows = torch.arange(answers)[:, None], {}
    errors = normal(prompts, 1)
    for name, values in (
        ("exact critics", value),
        *((f"critics off by {size}", value + size * errors) for size in (0.25, 0.5, 1.0)),
        ("no baseline", 0 * value),
    ):
        rows[name] = gradient_and_noise(probs, single, (score - values)[..., None])
        expected = rows[name][0] if expected is None else expected
    for norm in (False, True):
        for k in (2, 3, 4, 5):
            tuples = torch.tensor(list(itertools.product(range(answers), repeat=k)))
            combined = group_advantages(rewards, costs, multiplier, tuples, norm)
            rows[f"K = {k}{', norm' * norm}"] = gradient_and_noise(probs, tuples, combined)
    print(
        f"\nWithout critics: {prompts} random prompts of {answers} answers, λ = {multiplier:g}, β = 0. Noise per answer"
    )
    print(f"{'':<22}{'from ∇L':>10}{'cosine':>9}{'within prompts':>16}{'between':>9}")
    for name, (mean, within, between) in rows.items():
        cosine = torch.cosine_similarity(mean.flatten(), expected.flatten(), 0)
        print(f"{name:<22}{(mean - expected).abs().max():>10.1g}{cosine:>9.4f}{within:>16.4f}{between:>9.4f}")
    exact, extra = rows["exact critics"][1], rows["K = 2"][1] - rows["exact critics"][1]
    print("within prompts by formula, exact + c / (K - 1):", end=" ")
    print(", ".join(f"K = {k}: {exact + extra / (k - 1):.4f}" for k in (3, 4, 5, 8, 16)))
    of_error = (rows["critics off by 1.0"][1] - exact) ** 0.5  # noise grows with the square of the critics' error
    print("critics as noisy as a group are off by:", end=" ")
    print(", ".join(f"K = {k}: {(extra / (k - 1)) ** 0.5 / of_error:.2f}" for k in (2, 4, 8)))

    print("λ above which the safe answer to the risky prompt rises, P(safe) = 0.25 (bisection)")
    for norm in (False, True):
        borders = []
        for k in (2, 4, 8):
            low, high, tuples = 0.0, 8.0, torch.tensor(list(itertools.product((SAFE, UNSAFE), repeat=k)))
            for _ in range(40):
                middle = (low + high) / 2
                combined = group_advantages(REWARDS, COSTS, middle, tuples, norm)
                mean, *_ = gradient_and_noise(policy(0.25).softmax(1), tuples, combined)
                low, high = (low, middle) if mean[RISKY, SAFE] > 0 else (middle, high)
            borders.append(f"K = {k}: {high:.3f}")
        print(f"  {'--advantage-norm' if norm else 'default':<20}{', '.join(borders)}")


def print_runs(args, runs):
    print(f"\nAfter {args.steps} steps of exact gradients, β = {args.kl_coef}")
    print(f"{'':<24}{'':>9}{'mean cost':>30}")
    print(f"{'start':>6}  {'method':<16}{'P(safe)':>9}{'harmless':>12}{'risky':>9}{'both':>9}{'reward':>9}{'λ':>9}")
    for (method, start), (safe, costs, multiplier, reward) in runs.items():
        harmless, risky = costs[-1].tolist()
        print(
            f"{start:>6}  {METHODS[method]:<16}{safe[-1]:>9.3f}{harmless:>12.2f}{risky:>9.2f}"
            f"{(harmless + risky) / 2:>9.2f}{reward:>9.2f}{multiplier:>9.2f}"
        )


def draw(args, runs):
    figure, ((above, costs_axis), (push_axis, bias_axis)) = plt.subplots(2, 2, figsize=(7.5, 6.4))
    step = max(1, args.steps // 6)

    for i, ((method, start), (safe, costs, *_)) in enumerate(runs.items()):
        color, marker, line = LOOKS[method]
        # The marks are at other steps of every curve: curves that end together are all seen.
        style = dict(color=color, ls=line, marker=marker, markevery=(i * step // len(runs), step), ms=5, mew=0.8)
        above.plot(safe, lw=1.8, label=METHODS[method] if start == 0.1 else None, **style)
        if start == 0.1:
            costs_axis.plot(costs[:, RISKY], lw=1.8, **style)
            costs_axis.plot(costs.mean(1), lw=1, mfc="white", **style)
    above.set(xlabel="step of gradient ascent", ylabel="probability of the safe answer")
    above.set_title("(a) The risky prompt, from 0.5 and from 0.1")
    for width, fill, label in ((1.8, "0.3", "risky prompt"), (1, "white", "mean of both prompts")):
        costs_axis.plot([], [], color="0.3", lw=width, marker="o", ms=5, mfc=fill, label=label)
    costs_axis.axhline(0, color="0.3", lw=0.8)
    costs_axis.set(xlabel="step of gradient ascent", ylabel="mean cost (unsafe above 0)")
    costs_axis.set_title("(b) Cost from 0.1, methods as in (a)")

    grid = torch.linspace(0.005, 0.995, 100).tolist()
    for multiplier, (color, line) in SHADES.items():
        values = [push("advantage", q, multiplier) for q in grid]
        push_axis.plot(grid, values, color=color, lw=2, ls=line, label=f"RePO, advantage, λ = {multiplier}")
    cost_style = dict(color=LOOKS["cost"][0], lw=2, label="RePO, cost, λ = 5")
    push_axis.plot(grid, [push("cost", q, 5) for q in grid], **cost_style)
    borders = [(1 + multiplier) / multiplier / 4 for multiplier in SHADES]
    push_axis.plot(borders, [0] * len(borders), ".", color="black", ms=9, label="border by the formula")
    push_axis.axhline(0, color="0.3", lw=0.8)
    push_axis.set(xlabel="probability of the safe answer to the risky prompt", ylabel="A(safe) − A(unsafe)")
    push_axis.set_ylim(-1.3, 4)
    push_axis.set_title("(c) Below its border the safe answer sinks")

    value_grid = torch.linspace(-1, 2, 13).tolist()
    for multiplier, (color, line) in SHADES.items():
        base = push("cost", 0.25, multiplier)
        biases = [push("advantage", 0.25, multiplier, torch.tensor([[0, 2.75], [0, v]])) - base for v in value_grid]
        bias_axis.plot(value_grid, biases, color=color, lw=2, ls=line, label=f"RePO, advantage, λ = {multiplier}")
    values = [push("cost", 0.25, 5, torch.tensor([[0, 2.75], [0, v]])) - push("cost", 0.25, 5) for v in value_grid]
    bias_axis.plot(value_grid, values, **cost_style)
    bias_axis.axvline(1.25, color="0.3", lw=0.8, ls=":", label="exact value")
    bias_axis.set(xlabel="cost critic's value of the risky prompt", ylabel="bias of A(safe) − A(unsafe)")
    bias_axis.set_title("(d) Bias at a probability of 0.25")
    bias_axis.set_ylim(-3.4, 0.6)
    places = {above: (1, 0.5), costs_axis: (1, 0.75), push_axis: (0.7, 0.8), bias_axis: (0.7, 0.2)}  # beside the curves
    for axis, place in places.items():
        axis.legend(loc="center right", bbox_to_anchor=place, handlelength=4, frameon=False)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, args.output)


def main() -> None:
    args = tyro.cli(Args)
    print_step()
    print_borders()
    print_bias(args.seed)
    print_prompt_constraint()
    print_group(args.seed)
    runs = {(method, start): ascend(args, method, start) for start in (0.5, 0.1) for method in METHODS}
    print_runs(args, runs)
    draw(args, runs)
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
