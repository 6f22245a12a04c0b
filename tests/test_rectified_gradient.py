"""The gradient that repo.py's functions produce, in expectation, against the gradient of what they are to maximise.

Nothing is sampled: every K-tuple of responses of a small tabular problem counts by its probability. The other side of
each equation is autograd of a closed form that shares no code with repo.py; proofs: docs/rectified_gradient.md.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

import repo


@dataclass
class Problem:
    """All responses of all prompts. X prompts, Y responses to each, T tokens of the longest, P prefixes, V tokens."""

    logits: torch.Tensor  # [X, P, V], the policy: next-token logits after each prefix
    ref_logits: torch.Tensor  # [X, P, V]
    prefixes: torch.Tensor  # [Y, T], number of the prefix before each token; padding is prefix 0
    tokens: torch.Tensor  # [Y, T]
    mask: torch.Tensor  # [Y, T]
    prompt_weights: torch.Tensor  # [X], p(x)
    rewards: torch.Tensor  # [X, Y], R(x, y)
    costs: torch.Tensor  # [X, Y], C(x, y)

    def logprobs(self, logits):
        """Of each token, [X, Y, T]; what stands at padding is arbitrary and not zero."""
        return logits.log_softmax(-1)[:, self.prefixes, self.tokens]

    def probabilities(self, logits):
        """Of each response, [X, Y]: the product of its tokens' probabilities."""
        return torch.where(self.mask > 0, logits.softmax(-1)[:, self.prefixes, self.tokens], 1.0).prod(-1)


def make_problem(responses, vocabulary, prompts=4) -> Problem:
    """responses: tuples of tokens. Random rewards and costs; the last two prompts are always safe and always unsafe."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    known = {prefix: i for i, prefix in enumerate(dict.fromkeys(r[:t] for r in responses for t in range(len(r))))}
    prefixes, tokens, mask = torch.zeros(3, len(responses), max(map(len, responses)), dtype=torch.long)
    for i, response in enumerate(responses):
        for t, token in enumerate(response):
            prefixes[i, t], tokens[i, t], mask[i, t] = known[response[:t]], token, 1
    costs = normal(prompts, len(responses))
    costs[-2], costs[-1] = -costs[-2].abs() - 1, costs[-1].abs() + 1
    logits, ref_logits = normal(2, prompts, len(known), vocabulary)
    rewards = normal(prompts, len(responses)) + 1
    return Problem(logits, ref_logits, prefixes, tokens, mask, normal(prompts).softmax(0), rewards, costs)


def one_token_problem() -> Problem:
    return make_problem([(i,) for i in range(5)], 5)


def tree_problem() -> Problem:
    """Vocabulary EOS, a, b; a response ends with EOS or with its third token: 15 responses of 1 to 3 tokens."""
    paths = itertools.product(range(3), repeat=3)
    return make_problem(list(dict.fromkeys(r[: r.index(0) + 1] if 0 in r else r for r in paths)), 3)


def make_critics(problem, kind, *, beta, terminal_costs):
    """Values before each token, reward and cost, each [X, Y, T]. A value depends on prompt and prefix alone.

    exact: the expected return, E[R] - β KL and E[terminal cost] + β KL over what follows the prefix.
    """
    tables = 3 * torch.randn(2, *problem.logits.shape[:2], generator=torch.Generator().manual_seed(1)).double()
    if kind == "exact":
        tables, mass, probs = tables * 0, tables[0] * 0, problem.probabilities(problem.logits)
        log_ratio = problem.logprobs(problem.logits) - problem.logprobs(problem.ref_logits)
        for y, t in problem.mask.nonzero().tolist():
            prefix, to_go = problem.prefixes[y, t], (log_ratio[:, y, t:] * problem.mask[y, t:]).sum(1)
            mass[:, prefix] += probs[:, y]
            for table, terminal, weight in ((tables[0], problem.rewards, -beta), (tables[1], terminal_costs, beta)):
                table[:, prefix] += probs[:, y] * (terminal[:, y] + weight * to_go)
        tables = tables / mass
    return [table[:, problem.prefixes] for table in tables]


def repo_gradient(
    problem, values, *, multiplier, beta, threshold, constraint="response", estimator="cost", k=1, gae_lambda=1.0
):
    """The expected gradient of repo.py's update, [X, P, V]: its steps 4 to 6, summed over tokens, on every K-tuple."""
    logits = problem.logits.clone().requires_grad_()
    prompts, count = problem.costs.shape
    tuples = torch.tensor(list(itertools.product(range(count), repeat=k)))  # [tuples, K]
    x = torch.arange(prompts).repeat_interleave(tuples.numel())  # [batch], the K responses of a prompt are neighbours
    y = tuples.flatten().repeat(prompts)  # [batch]
    weights = problem.prompt_weights[:, None] * problem.probabilities(problem.logits)[:, tuples].prod(-1)
    weights = weights.flatten().repeat_interleave(k) / k

    old_logprobs = problem.logprobs(problem.logits)[x, y]
    log_ratio = old_logprobs - problem.logprobs(problem.ref_logits)[x, y]
    mask = problem.mask[y]
    reward_values, cost_values = (value[x, y] for value in values)
    terminal_costs, shares, _ = repo.rectify(problem.costs[x, y], threshold, constraint, estimator, k)
    token_rewards = repo.token_signal(problem.rewards[x, y], log_ratio, mask, -beta)
    token_costs = repo.token_signal(terminal_costs, log_ratio, mask, beta)
    reward_advantages, _ = repo.gae(token_rewards, reward_values, mask, gae_lambda)
    cost_advantages, _ = repo.gae(token_costs, cost_values, mask, gae_lambda)
    advantages = repo.combine_advantages(reward_advantages, cost_advantages, multiplier * shares[:, None])
    loss = repo.policy_loss(problem.logprobs(logits)[x, y], old_logprobs, advantages, 0.2)
    return torch.autograd.grad(-(weights[:, None] * loss * mask).sum(), logits)[0]


def gradient(problem, objective):
    """Autograd of objective(π [X, Y], π_ref [X, Y]), which returns one value per prompt, [X]; averaged over prompts."""
    logits = problem.logits.clone().requires_grad_()
    value = objective(problem.probabilities(logits), problem.probabilities(problem.ref_logits))
    return torch.autograd.grad((problem.prompt_weights * value).sum(), logits)[0]


def lagrangian_gradient(problem, *, multiplier, beta, threshold, terminal_costs=None):
    """∇L, L = (E[R] - λ E[{C - d}^+]) / (1 + λ) - β KL(π ‖ π_ref), or with other terminal costs than {C - d}^+."""
    terminal_costs = (problem.costs - threshold).clamp(min=0) if terminal_costs is None else terminal_costs
    score = (problem.rewards - multiplier * terminal_costs) / (1 + multiplier)
    return gradient(problem, lambda pi, ref: (pi * score).sum(1) - beta * (pi * (pi / ref).log()).sum(1))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


PROBLEMS = [one_token_problem, tree_problem]
SETTINGS = [
    dict(multiplier=multiplier, beta=beta, threshold=threshold)
    for multiplier, beta, threshold in [(0, 0.3, 0), (0.7, 0, 0), (0.7, 0.3, 0.4), (5, 0.1, -0.5), (50, 0.02, 0)]
]
each_setting = pytest.mark.parametrize("critics, settings", [*itertools.product(["exact", "random"], SETTINGS)])


@each_setting
@pytest.mark.parametrize("make", PROBLEMS)
def test_cost_is_unbiased(make, critics, settings):
    """One token, and longer responses of unequal length: ∇L, with λ_GAE = 1 whatever the critics say."""
    problem = make()
    terminal_costs = (problem.costs - settings["threshold"]).clamp(min=0)
    values = make_critics(problem, critics, beta=settings["beta"], terminal_costs=terminal_costs)
    for gae_lambda in (0.0, 0.5, 0.95, 1.0) if critics == "exact" else (1.0,):
        actual = repo_gradient(problem, values, gae_lambda=gae_lambda, **settings)
        assert_equal(actual, lagrangian_gradient(problem, **settings))


@each_setting
@pytest.mark.parametrize("make", PROBLEMS)
def test_bias_of_advantage(make, critics, settings):
    """λ/(1+λ) · E_x E_y Σ_t ∇log π(y_t) [ 1{C ≤ d} (R - V_r) + 1{C > d} V_c ], V_c the value of (C - d) + β KL."""
    problem, share = make(), settings["multiplier"] / (1 + settings["multiplier"])
    problem.costs[0, 0] = settings["threshold"]  # a cost of exactly d is safe
    excess = problem.costs - settings["threshold"]
    values = make_critics(problem, critics, beta=settings["beta"], terminal_costs=excess)

    logits = problem.logits.clone().requires_grad_()
    weights = problem.prompt_weights[:, None] * problem.probabilities(problem.logits)  # [X, Y]
    safe = (excess <= 0).double()[:, :, None]
    credit = share * (safe * (problem.rewards[:, :, None] - values[0]) + (1 - safe) * values[1])  # [X, Y, T]
    bias = (weights[:, :, None] * problem.mask * problem.logprobs(logits) * credit).sum()
    bias = torch.autograd.grad(bias, logits)[0]

    actual = repo_gradient(problem, values, estimator="advantage", **settings)
    assert_equal(actual, lagrangian_gradient(problem, **settings) + bias)
    assert (bias.abs().max() > 1e-3) == (settings["multiplier"] > 0)


def violated_by_others(problem, threshold, others):
    """P(mean cost of `others` independent responses > d | x), [X], by plain loops."""
    probs = problem.probabilities(problem.logits)
    total = torch.zeros(len(probs), dtype=torch.double)
    for chosen in itertools.product(range(probs.shape[1]), repeat=others):
        excess = sum(problem.costs[:, y] - threshold for y in chosen)
        total += torch.stack([probs[:, y] for y in chosen]).prod(0) * (excess > 0)
    return total


@each_setting
@pytest.mark.parametrize("make, k", [(one_token_problem, 2), (one_token_problem, 3), (tree_problem, 2)])
def test_prompt_constraint_goes_along_the_gradient_of_the_expected_cost(make, k, critics, settings):
    """E_x (∇E_y[R] - λ P_{K-1}(x) ∇E_y[C]) / (1+λ) - β ∇KL with any critics.

    `advantage` differs from it by λ/(1+λ) E_x[(1 - P_{K-1}(x)) ∇E_y[R]], again with any critics.
    """
    problem = make()
    multiplier, beta, threshold = settings.values()
    probability = violated_by_others(problem, threshold, k - 1)  # P_{K-1}(x)
    assert probability[-2] == 0 and probability[-1] == pytest.approx(1) and 0 < probability[:2].mean() < 0.99
    judged = probability[:, None] * problem.costs
    expected = lagrangian_gradient(problem, **settings, terminal_costs=judged)
    values = make_critics(problem, critics, beta=beta, terminal_costs=judged)
    settings = dict(settings, constraint="prompt", k=k)
    assert_equal(repo_gradient(problem, values, **settings), expected)

    share = multiplier / (1 + multiplier)
    bias = share * gradient(problem, lambda pi, ref: (1 - probability) * (pi * problem.rewards).sum(1))
    assert_equal(repo_gradient(problem, values, estimator="advantage", **settings), expected + bias)


def test_costs_of_exactly_the_threshold_are_safe():
    assert repo.rectify(torch.full((4,), 0.5), 0.5, "prompt", "advantage", 2)[1].tolist() == [0.0] * 4


def test_multiplier_by_hand():
    assert repo.update_multiplier(0.0, 0.5, 100.0, 20.0) == 0.0
    assert repo.update_multiplier(3.0, 0.0, 100.0, 20.0) == 3.0  # λ_lr = 0: a fixed penalty
    assert repo.update_multiplier(1.0, 0.1, 1e9, 20.0) == 20.0  # no overflow
    # 1 -> e^(1 · ln 2) = 2 -> 2 e^(2 · ln 2) = 8 -> 8 e^0 = 8 -> 8 e^(-8 · ln 2 / 8) = 4 -> the cap
    multiplier, trajectory = 1.0, []
    for excess in (1.0, 1.0, 0.0, -1 / 8, 10.0):
        multiplier = repo.update_multiplier(multiplier, math.log(2), excess, 20.0)
        trajectory.append(multiplier)
    assert trajectory == pytest.approx([2.0, 8.0, 8.0, 4.0, 20.0])
