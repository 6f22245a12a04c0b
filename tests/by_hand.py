"""The mathematics a second time, for the tests to compare with: one response at a time, no padding, float64.

A response is a list of numbers, one a token. Losses of a whole batch use unsharded models and autograd on texts that
are read one by one, so that nothing depends on masks, positions, micro-batches or processes.
"""

import math

import torch


def clamp(value, low, high):
    return min(max(value, low), high)


def token_signal(terminal: float, log_ratio: list[float], kl_weight: float) -> list[float]:
    signal = [kl_weight * k for k in log_ratio]
    signal[-1] += terminal
    return [clamp(value, -50.0, 50.0) for value in signal]


def gae(rewards: list[float], values: list[float], gae_lambda: float) -> tuple[list[float], list[float]]:
    """Advantages as the sum of all later temporal differences, weighted by powers of λ_GAE; and the returns."""
    following = [*values[1:], 0.0]
    deltas = [r + after - before for r, after, before in zip(rewards, following, values, strict=True)]
    advantages = [sum(gae_lambda ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def policy_loss(logprob: float, old_logprob: float, advantage: float, clip: float) -> tuple[float, float]:
    """Clipped surrogate of a token, and its derivative by logprob: none where the ratio has gone far enough."""
    ratio = math.exp(logprob - old_logprob)
    stopped = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    return -advantage * (clamp(ratio, 1 - clip, 1 + clip) if stopped else ratio), 0.0 if stopped else -advantage * ratio


def value_loss(value: float, old_value: float, target: float, clip: float) -> tuple[float, float]:
    """Clipped value loss of a token, and its derivative by the value."""
    clipped = old_value + clamp(value - old_value, -clip, clip)
    if (clipped - target) ** 2 > (value - target) ** 2:
        return 0.5 * (clipped - target) ** 2, 0.0  # larger than the unclipped only where the clip is active
    return 0.5 * (value - target) ** 2, value - target


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def reward_loss(better: float, worse: float, mu: float) -> tuple[float, float, float]:
    """Loss of a pair and its derivatives by both scores."""
    loss = -log_sigmoid(better - worse) + mu * (better**2 + worse**2) / 2
    slope = -sigmoid(worse - better)
    return loss, slope + mu * better, -slope + mu * worse


def cost_loss(unsafer: float, safer: float, unsafer_sign: float, safer_sign: float, mu: float):
    """Loss of a pair and its derivatives by both scores."""
    loss = -log_sigmoid(unsafer - safer) - log_sigmoid(unsafer_sign * unsafer) - log_sigmoid(safer_sign * safer)
    loss += mu * (unsafer**2 + safer**2) / 2
    slope = -sigmoid(safer - unsafer)
    by_unsafer = slope - unsafer_sign * sigmoid(-unsafer_sign * unsafer) + mu * unsafer
    by_safer = -slope - safer_sign * sigmoid(-safer_sign * safer) + mu * safer
    return loss, by_unsafer, by_safer


def rectify(costs: list[float], threshold: float, constraint: str, estimator: str, k: int):
    """Terminal costs and shares of λ, one a response; rectified excesses, one a response or one a prompt."""
    violated, excesses = [], []
    for i, cost in enumerate(costs):
        group = costs[i // k * k : i // k * k + k]
        if constraint == "response":
            violated.append(cost > threshold)
            excesses.append(max(cost - threshold, 0.0))
        else:
            others = [c for j, c in enumerate(group) if j != i % k] or group
            violated.append(sum(others) / len(others) > threshold)
            if i % k == 0:
                excesses.append(max(sum(group) / k - threshold, 0.0))
    paid = [c - threshold if v or estimator == "advantage" else 0.0 for c, v in zip(costs, violated, strict=True)]
    return paid, [float(v or estimator == "cost") for v in violated], excesses


def logprobs(policy, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """log π(y_t | x, y_<t) of every token of a response, [tokens]."""
    logits = policy(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    rows = []
    for t, token in enumerate(response):
        before = logits[len(prompt) + t - 1]
        rows.append(before[token] - torch.logsumexp(before, 0))
    return torch.stack(rows)


def token_scores(model, ids: list[int]) -> torch.Tensor:
    """Score of every token of a text by a score model of the library's classes, [tokens]."""
    hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
    return model.score(hidden)[0, :, 0]


def values(critic, prompt: list[int], response: list[int]) -> torch.Tensor:
    """V_t before every token of a response, [tokens]: the first is read at the prompt's last token."""
    return token_scores(critic, prompt + response)[len(prompt) - 1 : -1]
