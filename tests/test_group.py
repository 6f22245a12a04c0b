"""The gradient of repo_group.py: its expectation against that of the Lagrangian, its variance beside the critics'.

On the problems of test_rectified_gradient.py, every K-tuple of responses weighted by its probability.
docs/repo_group.md has the derivations, benchmark/rectified_gradient.py prints the numbers.
"""

import itertools

import pytest
import test_rectified_gradient as tabular
import torch
from torch.nn.functional import one_hot

import repo
import repo_group

each_setting = pytest.mark.parametrize("settings", tabular.SETTINGS)
each_problem = pytest.mark.parametrize("make, k", [*itertools.product(tabular.PROBLEMS, [2, 3])])


def k_tuples(problem, k):
    """All K-tuples of responses, [tuples, K], and their probabilities, [X, tuples]."""
    tuples = torch.tensor(list(itertools.product(range(problem.costs.shape[1]), repeat=k)))
    return tuples, problem.probabilities(problem.logits)[:, tuples].prod(-1)


def group_advantages(problem, k, *, multiplier, beta, threshold, constraint="response", norm=False):
    """repo_group.py's steps 4 and 6 on every K-tuple of every prompt, [X, tuples, K, T]."""
    tuples, _ = k_tuples(problem, k)
    rewards, costs = (scores[:, tuples].flatten() for scores in (problem.rewards, problem.costs))
    log_ratio = problem.logprobs(problem.logits) - problem.logprobs(problem.ref_logits)
    log_ratio, mask = log_ratio[:, tuples].flatten(0, 2), problem.mask[tuples].flatten(0, 1)
    mask = mask.repeat(len(problem.costs), 1)
    cost_advantages, _ = repo_group.rectify_groups(costs, threshold, constraint, k, norm)
    own = repo_group.combine_advantages(repo_group.group_advantages(rewards, k, norm), cost_advantages, multiplier)
    return repo_group.token_advantages(own, log_ratio, mask, beta).view(len(problem.costs), *tuples.shape, -1)


def expected_gradient(problem, k, advantages):
    """Of policy_loss with these advantages, [X, P, V]: the sum over tokens, the mean over responses."""
    tuples, weights = k_tuples(problem, k)
    logits, old = problem.logits.clone().requires_grad_(), problem.logprobs(problem.logits)
    loss = repo_group.policy_loss(problem.logprobs(logits)[:, tuples], old[:, tuples], advantages, 0.2)
    loss = (loss * problem.mask[tuples]).sum((2, 3)) / k
    return torch.autograd.grad(-(problem.prompt_weights[:, None] * weights * loss).sum(), logits)[0]


@each_setting
@each_problem
def test_the_expected_gradient_is_that_of_the_lagrangian(make, k, settings):
    """Per response, KL included, one token and several: ∇L. Its length and direction, for K = 2 and 3."""
    problem = make()
    actual = expected_gradient(problem, k, group_advantages(problem, k, **settings))
    tabular.assert_equal(actual, tabular.lagrangian_gradient(problem, **settings))


@each_setting
@each_problem
def test_the_expected_gradient_per_prompt_is_that_of_the_critics_version(make, k, settings):
    """E_x (∇E_y[R] - λ P_{K-1}(x) ∇E_y[C]) / (1+λ) - β ∇KL. With the others' rectified costs as baseline it is not."""
    problem, (multiplier, _, threshold) = make(), settings.values()
    judged = tabular.violated_by_others(problem, threshold, k - 1)[:, None] * problem.costs
    expected = tabular.lagrangian_gradient(problem, **settings, terminal_costs=judged)
    advantages = group_advantages(problem, k, constraint="prompt", **settings)
    tabular.assert_equal(expected_gradient(problem, k, advantages), expected)

    excess = (problem.costs - threshold)[:, k_tuples(problem, k)[0]].flatten()
    rectified = torch.where(repo_group.mean_of_others(excess, k) > 0, excess, 0.0)
    right, _ = repo_group.rectify_groups(excess, 0.0, "prompt", k, False)
    wrong = repo_group.group_advantages(rectified, k, False)
    advantages = advantages + (multiplier / (1 + multiplier) * (right - wrong)).view(*advantages.shape[:3], 1)
    bias = (expected_gradient(problem, k, advantages) - expected).abs().max()
    assert (bias > 1e-3) == (multiplier > 0)


@pytest.mark.parametrize("make", tabular.PROBLEMS)
def test_where_the_kl_term_may_sit(make):
    """-β ∇KL from the sum to come in the advantage. In the loss, with the gradient stopped at the prefixes, an estimate
    of each token's KL divergence misses what a token does to later ones (½k²), or even its own (e^-k - 1 + k)."""
    problem = make()
    logits = problem.logits.clone().requires_grad_()
    weights = problem.prompt_weights[:, None, None] * problem.probabilities(problem.logits)[:, :, None] * problem.mask
    log_ratio = problem.logprobs(logits) - problem.logprobs(problem.ref_logits)  # k
    expected = tabular.gradient(problem, lambda pi, ref: (pi * (pi / ref).log()).sum(1))
    losses = {"half of the square": log_ratio**2 / 2, "e^-k - 1 + k": (-log_ratio).exp() - 1 + log_ratio}
    off = {
        name: (torch.autograd.grad((weights * loss).sum(), logits, retain_graph=True)[0] - expected).abs().max()
        for name, loss in losses.items()
    }
    assert (off["half of the square"] < 1e-9) == (make is tabular.one_token_problem)
    assert off["e^-k - 1 + k"] > 0.01


def noise(problem, k, advantages):
    """Variance of the gradient within prompts, summed over its components and per response: K times that of a group."""
    (tuples, weights), (prefixes, vocabulary) = k_tuples(problem, k), problem.logits.shape[1:]
    scores = one_hot(problem.tokens, vocabulary) - problem.logits.softmax(-1)[:, problem.prefixes]  # [X, Y, T, V]
    places = one_hot(problem.prefixes, prefixes) * problem.mask[..., None]  # [Y, T, P]
    scores = torch.einsum("xytv,ytp->xytpv", scores, places.double()).flatten(3)  # ∇ log π at the logits
    of_tuples = torch.einsum("xnkt,xnktd->xnd", advantages, scores[:, tuples]) / k
    mean = torch.einsum("xn,xnd->xd", weights, of_tuples)[:, None]
    within = torch.einsum("x,xn,xnd->", problem.prompt_weights, weights, (of_tuples - mean) ** 2)
    return k * within.item()


def noise_with_critics(problem, kind, *, multiplier, beta, threshold):
    """That of repo.py at λ_GAE = 1."""
    terminal_costs = (problem.costs - threshold).clamp(min=0)
    values = tabular.make_critics(problem, kind, beta=beta, terminal_costs=terminal_costs)
    log_ratio = (problem.logprobs(problem.logits) - problem.logprobs(problem.ref_logits)).flatten(0, 1)
    mask, parts = problem.mask.repeat(len(problem.costs), 1), []
    for terminal, weight, value in ((problem.rewards, -beta, values[0]), (terminal_costs, beta, values[1])):
        signal = repo.token_signal(terminal.flatten(), log_ratio, mask, weight)
        parts.append(repo.gae(signal, value.flatten(0, 1), mask, 1.0)[0])
    advantages = (repo.combine_advantages(*parts, multiplier) * mask).view(*problem.costs.shape, 1, -1)
    return noise(problem, 1, advantages)


@pytest.mark.parametrize("make", tabular.PROBLEMS)
def test_noise_lies_between_that_of_exact_and_of_wrong_critics(make):
    """Per response: more than with exact critics, less with each further response, far less than with wrong critics."""
    problem, settings = make(), dict(multiplier=5, beta=0.05, threshold=0)
    of_k = [noise(problem, k, group_advantages(problem, k, **settings)) for k in (2, 3)]
    exact, wrong = (noise_with_critics(problem, kind, **settings) for kind in ("exact", "random"))
    assert 1.3 * exact < of_k[1] < 0.9 * of_k[0] and of_k[0] < 3 * exact and 5 * of_k[0] < wrong


def test_noise_falls_to_that_of_exact_critics():
    """For one token without the KL term: v + c / (K - 1), with v that of exact critics."""
    problem, settings = tabular.one_token_problem(), dict(multiplier=5, beta=0, threshold=0)
    of_k = {k: noise(problem, k, group_advantages(problem, k, **settings)) for k in (2, 3, 4)}
    exact = noise_with_critics(problem, "exact", **settings)
    for k in (3, 4):
        assert of_k[k] == pytest.approx(exact + (of_k[2] - exact) / (k - 1))


def test_advantages_by_hand():
    """Two prompts of K = 2, and of K = 4 once; the second prompt's scores are all equal: zero, divided or not."""
    scores = torch.tensor([3.0, 1.0, 7.0, 7.0])
    assert repo_group.group_advantages(scores, 2, False).tolist() == [2.0, -2.0, 0.0, 0.0]
    assert repo_group.group_advantages(scores, 2, True).tolist() == pytest.approx([2**0.5, -(2**0.5), 0, 0], rel=1e-3)
    assert repo_group.group_advantages(scores, 4, False).tolist() == pytest.approx([-2, -14 / 3, 10 / 3, 10 / 3])
    for settings, *expected in (
        ((0.5, "response", 2, False), [1.5, -1.5, 0.0, 0.0], [1.5, 0.0, 0.0, 0.0]),  # of costs 2, -1, 0.5, -3
        ((0.0, "prompt", 2, False), [0.0, -3.0, 0.0, -3.5], [0.5, 0.0]),
    ):
        costs = torch.tensor([2.0, -1.0, 0.5, -3.0])
        assert [tensor.tolist() for tensor in repo_group.rectify_groups(costs, *settings)] == expected
    equal = torch.full((3,), 0.1)  # the mean of equal scores may differ from them by rounding
    assert repo_group.group_advantages(equal, 3, True).abs().max() < 1e-2
    log_ratio, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages = repo_group.token_advantages(torch.tensor([10.0, 0.0]), log_ratio, mask, 0.5)
    assert (advantages * mask).tolist() == [[8.5, 9.0, 0.0], [-6.0, -4.5, -2.5]]


def test_a_constant_added_to_the_scores_of_a_prompt_changes_nothing():
    """What critics have to learn, groups need not know: the level of a prompt. Nor does its scale count if divided."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    level = torch.tensor([5.0, -3.0, 100.0]).double().repeat_interleave(4)
    for norm in (False, True):
        expected = repo_group.group_advantages(scores, 4, norm)
        torch.testing.assert_close(repo_group.group_advantages(scores + level, 4, norm), expected)
    torch.testing.assert_close(repo_group.group_advantages(1e3 * scores, 4, True), expected, rtol=1e-3, atol=0)
