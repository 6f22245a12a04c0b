"""The gradient that repo.py's functions produce, in expectation, against the gradient of what they are to maximise.

Nothing is sampled: every response (for K > 1 every K-tuple of responses) of a small tabular problem goes through
rectify, token_signal, gae, combine_advantages and policy_loss, weighted by its probability. The other side of each
equation is autograd of a closed form that shares no code with repo.py. docs/rectified_gradient.md has the proofs.
"""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

import repo

CRITICS = ["exact", "random", "zero"]


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
        """Of each response, [X, Y]: the product of its tokens' probabilities, by a plain loop."""
        probs = logits.softmax(-1)
        columns = []
        for prefixes, tokens, mask in zip(self.prefixes, self.tokens, self.mask, strict=True):
            column = torch.ones(len(logits), dtype=torch.double)
            for t in range(int(mask.sum())):
                column = column * probs[:, prefixes[t], tokens[t]]
            columns.append(column)
        return torch.stack(columns, 1)


def make_problem(responses, vocabulary, prompts=4, seed=0) -> Problem:
    """responses: tuples of tokens. Random rewards and costs; the last two prompts are always safe and always unsafe."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    longest = max(map(len, responses))
    known = {prefix: i for i, prefix in enumerate(dict.fromkeys(r[:t] for r in responses for t in range(len(r))))}
    prefixes, tokens, mask = torch.zeros(3, len(responses), longest, dtype=torch.long)
    for i, response in enumerate(responses):
        for t, token in enumerate(response):
            prefixes[i, t], tokens[i, t], mask[i, t] = known[response[:t]], token, 1
    costs = normal(prompts, len(responses))
    costs[-2], costs[-1] = -costs[-2].abs() - 1, costs[-1].abs() + 1
    shape = (prompts, len(known), vocabulary)
    return Problem(
        normal(*shape), normal(*shape), prefixes, tokens, mask,
        normal(prompts).softmax(0), normal(prompts, len(responses)) + 1, costs,
    )  # fmt: skip


def one_token_problem(seed=0) -> Problem:
    return make_problem([(i,) for i in range(5)], 5, seed=seed)


def tree_problem(seed=0) -> Problem:
    """Vocabulary EOS, a, b; a response ends with EOS or with its third token: 15 responses of 1 to 3 tokens."""
    responses = [
        r[: r.index(0) + 1] if 0 in r else r
        for r in itertools.product(range(3), repeat=3)
        if 0 not in r or not any(r[r.index(0) :])
    ]
    return make_problem(responses, 3, seed=seed)


def make_critics(problem, kind, *, beta, terminal_costs):
    """Values before each token, reward and cost, each [X, Y, T]. A value depends on prompt and prefix alone.

    exact: the expected return, E[R] - β KL and E[terminal cost] + β KL over what follows the prefix.
    """
    shape = problem.logits.shape[:2]  # [X, P]
    if kind == "zero":
        tables = torch.zeros(2, *shape, dtype=torch.double)
    elif kind == "random":
        tables = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    else:
        tables = torch.zeros(2, *shape, dtype=torch.double)
        mass = torch.zeros(shape, dtype=torch.double)
        probs = problem.probabilities(problem.logits)
        log_ratio = problem.logprobs(problem.logits) - problem.logprobs(problem.ref_logits)
        for y in range(len(problem.tokens)):
            for t in range(int(problem.mask[y].sum())):
                to_go = (log_ratio[:, y, t:] * problem.mask[y, t:]).sum(1)
                mass[:, problem.prefixes[y, t]] += probs[:, y]
                for table, terminal, weight in zip(
                    tables, (problem.rewards, terminal_costs), (-beta, beta), strict=True
                ):
                    table[:, problem.prefixes[y, t]] += probs[:, y] * (terminal[:, y] + weight * to_go)
        tables = tables / mass
    return [table[:, problem.prefixes] for table in tables]


def repo_gradient(
    problem, values, *, multiplier, beta, threshold,
    constraint="response", estimator="cost", responses_per_prompt=1, gae_lambda=1.0, rectify=repo.rectify,
):  # fmt: skip
    """The expected gradient of repo.py's update, [X, P, V]: its steps 4 to 6, summed over tokens, on every K-tuple."""
    logits = problem.logits.clone().requires_grad_()
    prompts, count = problem.costs.shape
    tuples = torch.tensor(list(itertools.product(range(count), repeat=responses_per_prompt)))  # [tuples, K]
    x = torch.arange(prompts).repeat_interleave(tuples.numel())  # [batch], a prompt's K responses next to each other
    y = tuples.flatten().repeat(prompts)  # [batch]
    weights = problem.prompt_weights[:, None] * problem.probabilities(problem.logits)[:, tuples].prod(-1)
    weights = weights.flatten().repeat_interleave(responses_per_prompt) / responses_per_prompt

    old_logprobs = problem.logprobs(problem.logits)[x, y]
    log_ratio = old_logprobs - problem.logprobs(problem.ref_logits)[x, y]
    mask = problem.mask[y]
    reward_values, cost_values = (value[x, y] for value in values)
    terminal_costs, shares, _ = rectify(problem.costs[x, y], threshold, constraint, estimator, responses_per_prompt)
    token_rewards = repo.token_signal(problem.rewards[x, y], log_ratio, mask, -beta)
    token_costs = repo.token_signal(terminal_costs, log_ratio, mask, beta)
    reward_advantages, _ = repo.gae(token_rewards, reward_values, mask, gae_lambda)
    cost_advantages, _ = repo.gae(token_costs, cost_values, mask, gae_lambda)
    advantages = repo.combine_advantages(reward_advantages, cost_advantages, multiplier * shares[:, None])
    loss = repo.policy_loss(problem.logprobs(logits)[x, y], old_logprobs, advantages, 0.2)
    return torch.autograd.grad(-(weights[:, None] * loss * mask).sum(), logits)[0]


def gradient(problem, objective):
    """Autograd of objective(π [X, Y], π_ref [X, Y]), which returns a value a prompt, [X]; averaged over prompts."""
    logits = problem.logits.clone().requires_grad_()
    value = objective(problem.probabilities(logits), problem.probabilities(problem.ref_logits))
    return torch.autograd.grad((problem.prompt_weights * value).sum(), logits)[0]


def lagrangian_gradient(problem, *, multiplier, beta, threshold):
    """∇L, L = (E[R] - λ E[{C - d}^+]) / (1 + λ) - β KL(π ‖ π_ref)."""
    score = (problem.rewards - multiplier * (problem.costs - threshold).clamp(min=0)) / (1 + multiplier)
    return gradient(problem, lambda pi, ref: (pi * score).sum(1) - beta * (pi * (pi / ref).log()).sum(1))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def differ(a, b):
    return (a - b).abs().max() > 1e-3


SETTINGS = [
    dict(multiplier=multiplier, beta=beta, threshold=threshold)
    for multiplier, beta, threshold in [(0, 0.3, 0), (0.7, 0, 0), (0.7, 0.3, 0.4), (5, 0.1, -0.5), (50, 0.02, 0)]
]


# ---- Estimator `cost`: unbiased
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("critics", CRITICS)
@pytest.mark.parametrize("make", [one_token_problem, tree_problem])
def test_cost_is_unbiased(make, critics, settings):
    """One token, and longer responses of unequal length with λ_GAE = 1: ∇L whatever the critics say."""
    problem = make()
    terminal_costs = (problem.costs - settings["threshold"]).clamp(min=0)
    values = make_critics(problem, critics, beta=settings["beta"], terminal_costs=terminal_costs)
    assert_equal(repo_gradient(problem, values, **settings), lagrangian_gradient(problem, **settings))


@pytest.mark.parametrize("settings", SETTINGS)
def test_cost_is_unbiased_at_any_gae_lambda_with_exact_critics(settings):
    problem = tree_problem()
    terminal_costs = (problem.costs - settings["threshold"]).clamp(min=0)
    values = make_critics(problem, "exact", beta=settings["beta"], terminal_costs=terminal_costs)
    for gae_lambda in (0.0, 0.5, 0.95):
        actual = repo_gradient(problem, values, gae_lambda=gae_lambda, **settings)
        assert_equal(actual, lagrangian_gradient(problem, **settings))


def test_conditions_of_the_theorem_are_needed():
    """Wrong critics with λ_GAE < 1 bias longer responses; a score beyond the ±50 clamp counts as 50."""
    settings = dict(multiplier=2.0, beta=0.0, threshold=0.0)
    problem = tree_problem()
    values = make_critics(problem, "random", beta=0.0, terminal_costs=None)
    actual = repo_gradient(problem, values, gae_lambda=0.95, **settings)
    assert differ(actual, lagrangian_gradient(problem, **settings))

    problem.rewards[0, 0], problem.costs[1, 1] = 80.0, 90.0
    actual = repo_gradient(problem, values, **settings)
    assert differ(actual, lagrangian_gradient(problem, **settings))
    problem.rewards[0, 0], problem.costs[1, 1] = 50.0, 50.0
    assert_equal(actual, lagrangian_gradient(problem, **settings))


def test_after_the_first_update_the_surrogate_is_clipped():
    """By hand, ratios 0.5, 1, 1.5 and A = 1, -1: a ratio moved too far the way A points has a constant loss."""
    logprobs = torch.tensor([0.5, 1.0, 1.5]).log().expand(2, 3).clone().requires_grad_()
    loss = repo.policy_loss(logprobs, torch.zeros(2, 3), torch.tensor([[1.0], [-1.0]]), 0.2)
    assert loss.flatten().tolist() == pytest.approx([-0.5, -1.0, -1.2, 0.8, 1.0, 1.5])
    loss.sum().backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([-0.5, -1.0, 0.0, 0.0, 1.0, 1.5])


@pytest.mark.parametrize("estimator", ["cost", "advantage"])
def test_critics_are_taught_the_exact_values(estimator):
    """At λ_GAE = 1 the mean of gae's returns over what follows a prefix is the exact value of that prefix."""
    problem, beta, threshold = tree_problem(), 0.3, 0.2
    excess = problem.costs - threshold
    terminal_costs = excess.clamp(min=0) if estimator == "cost" else excess
    probs = problem.probabilities(problem.logits)
    log_ratio = problem.logprobs(problem.logits) - problem.logprobs(problem.ref_logits)
    guesses = make_critics(problem, "random", beta=beta, terminal_costs=None)
    exact = make_critics(problem, "exact", beta=beta, terminal_costs=terminal_costs)
    for x in range(len(problem.logits)):
        learned, _, _ = repo.rectify(problem.costs[x], threshold, "response", estimator, 1)
        for terminal, weight, guess, value in zip(
            (problem.rewards[x], learned), (-beta, beta), guesses, exact, strict=True
        ):
            signal = repo.token_signal(terminal, log_ratio[x], problem.mask, weight)
            _, returns = repo.gae(signal, guess[x], problem.mask, 1.0)
            for y, t in problem.mask.nonzero().tolist():
                same = (problem.prefixes == problem.prefixes[y, t]) & (problem.mask > 0)  # [Y, T]
                mass = (probs[x][:, None] * same).sum()
                assert_equal((probs[x][:, None] * same * returns).sum() / mass, value[x, y, t])


# ---- Estimator `advantage`: its bias
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("critics", CRITICS)
@pytest.mark.parametrize("make", [one_token_problem, tree_problem])
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
    if settings["multiplier"]:
        assert differ(bias, torch.zeros(()))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("critics", CRITICS)
def test_bias_of_advantage_by_the_probability_of_a_violation(critics, settings):
    """One token: λ/(1+λ) · E_x{ ∇E_y[1{C ≤ d} R] + (V_r + V_c) ∇P(C > d | x) }: the weight is V_c, not V_c - d."""
    problem, share = one_token_problem(), settings["multiplier"] / (1 + settings["multiplier"])
    unsafe = (problem.costs > settings["threshold"]).double()
    values = make_critics(problem, critics, beta=settings["beta"], terminal_costs=problem.costs - settings["threshold"])
    reward_value, cost_value = (value[:, 0, 0] for value in values)  # [X]

    def bias(weight):
        return share * gradient(
            problem,
            lambda pi, ref: (pi * (1 - unsafe) * problem.rewards).sum(1) + weight * (pi * unsafe).sum(1),
        )

    actual = repo_gradient(problem, values, estimator="advantage", **settings)
    actual = actual - lagrangian_gradient(problem, **settings)
    assert_equal(actual, bias(reward_value + cost_value))
    if settings["threshold"]:
        assert differ(actual, bias(reward_value + cost_value - settings["threshold"]))


@pytest.mark.parametrize("multiplier", [0.4, 5.0, 1e6])
def test_advantage_pushes_a_rare_safe_answer_down(multiplier):
    """One safe and one unsafe answer, exact critics, β = 0, Δ = R_u - R_s, D = C_u - C_s. The safe answer rises under

    `cost` where λ > Δ / (C_u - d), whatever its probability q; under `advantage` where q > (1+λ)/λ · Δ / (Δ + D).
    """
    problem = make_problem([(0,), (1,)], 2, prompts=3)
    problem.rewards[:] = torch.tensor([2.0, 3.0])
    problem.costs[:] = torch.tensor([-1.0, 2.0])
    border = (1 + multiplier) / multiplier / (1 + 3)  # Δ = 1, D = 3
    for q in (0.001, border - 0.01, border + 0.01, 0.9):
        problem.logits[:] = torch.tensor([[math.log(q), math.log(1 - q)]])
        settings = dict(multiplier=multiplier, beta=0.0, threshold=0.0)
        values = make_critics(problem, "exact", beta=0.0, terminal_costs=problem.costs)
        rises = repo_gradient(problem, values, estimator="advantage", **settings)[:, 0, 0] > 0
        assert rises.tolist() == [q > border] * 3
        values = make_critics(problem, "exact", beta=0.0, terminal_costs=problem.costs.clamp(min=0))
        rises = repo_gradient(problem, values, estimator="cost", **settings)[:, 0, 0] > 0
        assert rises.tolist() == [multiplier > 1 / 2] * 3


# ---- Constraint a prompt
def violated_by_others(problem, threshold, others):
    """P(mean cost of `others` independent responses > d | x), [X], by plain loops."""
    probs = problem.probabilities(problem.logits)
    total = torch.zeros(len(probs), dtype=torch.double)
    for chosen in itertools.product(range(probs.shape[1]), repeat=others):
        excess = sum(problem.costs[:, y] - threshold for y in chosen)
        total += torch.stack([probs[:, y] for y in chosen]).prod(0) * (excess > 0)
    return total


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("critics", CRITICS)
@pytest.mark.parametrize(
    "make, responses_per_prompt", [(one_token_problem, 2), (one_token_problem, 3), (tree_problem, 2)]
)
def test_prompt_constraint_goes_along_the_gradient_of_the_expected_cost(make, responses_per_prompt, critics, settings):
    """E_x (∇E_y[R] - λ P_{K-1}(x) ∇E_y[C]) / (1+λ) - β ∇KL with any critics.

    `advantage` differs from it by λ/(1+λ) E_x[(1 - P_{K-1}(x)) ∇E_y[R]], again with any critics.
    """
    problem = make()
    multiplier, beta, threshold = settings.values()
    probability = violated_by_others(problem, threshold, responses_per_prompt - 1)  # P_{K-1}(x)
    assert (
        probability[-2] == 0 and probability[-1] == pytest.approx(1) and ((probability > 0) & (probability < 1)).any()
    )
    paid = probability[:, None] * problem.costs
    score = (problem.rewards - multiplier * paid) / (1 + multiplier)
    expected = gradient(problem, lambda pi, ref: (pi * score).sum(1) - beta * (pi * (pi / ref).log()).sum(1))
    values = make_critics(problem, critics, beta=beta, terminal_costs=paid)
    settings = dict(settings, constraint="prompt", responses_per_prompt=responses_per_prompt)
    assert_equal(repo_gradient(problem, values, **settings), expected)

    share = multiplier / (1 + multiplier)
    bias = share * gradient(problem, lambda pi, ref: (1 - probability) * (pi * problem.rewards).sum(1))
    assert_equal(repo_gradient(problem, values, estimator="advantage", **settings), expected + bias)


def rectify_by_own_mean(costs, threshold, constraint, estimator, responses_per_prompt):
    """What repo.rectify avoids: a response is judged by a mean that holds its own cost."""
    groups = (costs - threshold).view(-1, responses_per_prompt)
    violated = (groups.mean(1, keepdim=True) > 0).expand_as(groups).flatten()
    return torch.where(violated, costs - threshold, 0.0), torch.ones_like(costs), None


@pytest.mark.parametrize("responses_per_prompt", [2, 3])
def test_own_cost_in_the_mean_would_reward_the_mildly_safe(responses_per_prompt):
    """Equal rewards; answers very safe, mildly safe, unsafe. A direction's credit for y is ∂/∂logit_y / π(y)."""
    problem = make_problem([(0,), (1,), (2,)], 3, prompts=3)
    problem.rewards[:] = 0.0
    problem.costs[:] = torch.tensor([-3.0, -0.5, 1.0])
    problem.logits[:] = torch.tensor([[0.1, 0.3, 0.6]]).double().log()
    probs = problem.probabilities(problem.logits)
    values = make_critics(problem, "zero", beta=0.0, terminal_costs=None)
    settings = dict(multiplier=1.0, beta=0.0, threshold=0.0, constraint="prompt")
    settings["responses_per_prompt"] = responses_per_prompt
    down = -gradient(problem, lambda pi, ref: (pi * problem.costs).sum(1)).flatten(1)

    leave_one_out = repo_gradient(problem, values, **settings).flatten(1)
    own_mean = repo_gradient(problem, values, rectify=rectify_by_own_mean, **settings).flatten(1)
    very_safe, mildly_safe, unsafe = (leave_one_out / probs).T
    assert (very_safe > mildly_safe).all() and (mildly_safe > unsafe).all()
    assert_equal(torch.cosine_similarity(leave_one_out, down), torch.ones(3, dtype=torch.double))
    very_safe, mildly_safe, _ = (own_mean / probs).T
    assert (very_safe < mildly_safe).all()
    assert (torch.cosine_similarity(own_mean, down) < 0.95).all()


def test_violation_of_a_prompt_is_biased_upwards_at_small_k():
    """The mean of what moves the multiplier: exact a response, above {E_y C - d}^+ a prompt, less so as K grows."""
    costs = torch.tensor([-1.5, -0.3, 0.9, 2.0], dtype=torch.double)
    probs, threshold = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.double), -0.5
    exact = (probs * (costs - threshold)).sum().clamp(min=0)
    means = []
    for k in (1, 2, 4, 6):
        tuples = torch.tensor(list(itertools.product(range(4), repeat=k)))
        _, _, excess = repo.rectify(costs[tuples].flatten(), threshold, "prompt", "cost", k)
        by_hand = (costs[tuples].mean(1) - threshold).clamp(min=0)
        assert_equal(excess, by_hand)
        means.append((probs[tuples].prod(1) * excess).sum().item())
    _, _, excess = repo.rectify(costs, threshold, "response", "cost", 1)
    assert (probs * excess).sum().item() == pytest.approx(means[0])
    assert means == sorted(means, reverse=True) and means[-1] > exact > 0


# ---- Identities on random batches
def random_batch(costs, estimator, multiplier, constraint, responses_per_prompt, threshold=0.3):
    """Random signals, critics and lengths. Returns repo.py's advantages, A_r, and A_c by terminal cost."""
    generator = torch.Generator().manual_seed(2)
    size, length = len(costs), 6

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    mask = (torch.arange(length) < torch.randint(1, length + 1, (size, 1), generator=generator)).long()
    rewards, log_ratio, reward_values, cost_values = normal(size), normal(size, length), *normal(2, size, length)

    def advantages(terminal, values, weight):
        return repo.gae(repo.token_signal(terminal, log_ratio, mask, weight), values, mask, 0.95)[0]

    terminal_costs, shares, _ = repo.rectify(costs, threshold, constraint, estimator, responses_per_prompt)
    of_reward = advantages(rewards, reward_values, -0.05)
    of_cost = advantages(terminal_costs, cost_values, 0.05)
    combined = repo.combine_advantages(of_reward, of_cost, multiplier * shares[:, None])
    return combined, of_reward, lambda terminal: advantages(terminal, cost_values, 0.05)


@pytest.mark.parametrize("estimator", ["cost", "advantage"])
@pytest.mark.parametrize("constraint, k", [("response", 1), ("response", 4), ("prompt", 1), ("prompt", 4)])
def test_identities(estimator, constraint, k):
    uniform = torch.rand(24, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    unsafe, safe, mixed = uniform + 0.301, uniform - 0.701, 3 * uniform - 1  # d = 0.3

    combined, of_reward, of_cost = random_batch(unsafe, estimator, 1.7, constraint, k)
    assert_equal(combined, (of_reward - 1.7 * of_cost(unsafe - 0.3)) / 2.7)  # all unsafe: PPO-Lagrange's

    combined, of_reward, of_cost = random_batch(safe, estimator, 1.7, constraint, k)
    if estimator == "advantage":
        assert_equal(combined, of_reward)  # all safe: PPO's
    else:
        assert_equal(combined, (of_reward - 1.7 * of_cost(torch.zeros_like(safe))) / 2.7)  # all safe: nothing to pay

    combined, of_reward, _ = random_batch(mixed, estimator, 0.0, constraint, k)
    assert_equal(combined, of_reward)  # λ = 0: PPO's


@pytest.mark.parametrize("estimator", ["cost", "advantage"])
def test_one_response_a_prompt_makes_both_constraints_the_same(estimator):
    costs = torch.randn(24, generator=torch.Generator().manual_seed(3))
    for a, b in zip(*(repo.rectify(costs, 0.3, c, estimator, 1) for c in ("response", "prompt")), strict=True):
        assert torch.equal(a, b)


def test_rectify_by_hand():
    costs = torch.tensor([2.0, -1.0, 0.5, -3.0])
    terminal, shares, excess = repo.rectify(costs, 0.5, "response", "cost", 2)
    assert terminal.tolist() == [1.5, 0.0, 0.0, 0.0]
    assert shares.tolist() == [1.0] * 4
    assert excess.tolist() == [1.5, 0.0, 0.0, 0.0]
    terminal, shares, excess = repo.rectify(costs, 0.5, "response", "advantage", 2)
    assert terminal.tolist() == [1.5, -1.5, 0.0, -3.5]
    assert shares.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert excess.tolist() == [1.5, 0.0, 0.0, 0.0]
    # Prompt 1: each is judged by the other, so the safe answer is the one that earns its negative cost.
    terminal, shares, excess = repo.rectify(costs, 0.0, "prompt", "cost", 2)
    assert terminal.tolist() == [0.0, -1.0, 0.0, -3.0]
    assert shares.tolist() == [1.0] * 4
    assert excess.tolist() == [0.5, 0.0]
    terminal, shares, excess = repo.rectify(costs, 0.0, "prompt", "advantage", 2)
    assert terminal.tolist() == [2.0, -1.0, 0.5, -3.0]
    assert shares.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert excess.tolist() == [0.5, 0.0]
    limit = torch.full((4,), 0.5)
    assert repo.rectify(limit, 0.5, "prompt", "advantage", 2)[1].tolist() == [0.0] * 4  # d itself is safe


# ---- The multiplier
def test_multiplier_by_hand():
    assert repo.update_multiplier(0.0, 0.5, 100.0, 20.0) == 0.0
    assert repo.update_multiplier(3.0, 0.0, 100.0, 20.0) == 3.0  # λ_lr = 0: a fixed penalty
    assert repo.update_multiplier(2.0, 0.1, 0.5, 20.0) == pytest.approx(2 * math.exp(0.1))
    assert repo.update_multiplier(2.0, 0.1, -0.5, 20.0) == pytest.approx(2 * math.exp(-0.1))
    assert repo.update_multiplier(1.0, 0.1, 1e9, 20.0) == 20.0  # no overflow
    # 1 -> e^(1 · ln 2) = 2 -> 2 e^(2 · ln 2) = 8 -> 8 e^0 = 8 -> 8 e^(-8 · ln 2 / 8) = 4 -> the cap
    multiplier, trajectory = 1.0, []
    for excess in (1.0, 1.0, 0.0, -1 / 8, 10.0):
        multiplier = repo.update_multiplier(multiplier, math.log(2), excess, 20.0)
        trajectory.append(multiplier)
    assert trajectory == pytest.approx([2.0, 8.0, 8.0, 4.0, 20.0])


def test_multiplier_never_decreases_with_rectified_excesses():
    generator, multiplier = torch.Generator().manual_seed(0), 0.5
    for _ in range(300):
        costs = torch.randn(8, generator=generator)
        _, _, excess = repo.rectify(costs, 0.0, "response", "cost", 1)
        after = repo.update_multiplier(multiplier, 0.1, excess.mean().item(), 5.0)
        assert multiplier <= after <= 5.0
        multiplier = after
    assert multiplier == 5.0
