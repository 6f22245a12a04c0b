"""The mathematics a second time, for the tests to compare with: one response at a time, no padding, float64."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification as AutoModelWithBiasedHead


def clamp(value, low, high):
    return min(max(value, low), high)


def token_signal(terminal: float, log_ratio: list[float], kl_weight: float) -> list[float]:
    signal = [kl_weight * k for k in log_ratio]
    signal[-1] += terminal
    return [clamp(value, -50.0, 50.0) for value in signal]


def repetition(tokens: list[int]) -> float:
    starts = range(len(tokens) - 3)
    repeats = [any(tokens[j : j + 4] == tokens[i : i + 4] for j in range(i)) for i in starts]
    return sum(repeats) / len(repeats) if repeats else 0.0


def gae(rewards: list[float], values: list[float], gae_lambda: float) -> tuple[list[float], list[float]]:
    """Advantages as the sum of all later temporal differences, weighted by powers of λ_GAE; and the returns."""
    following = [*values[1:], 0.0]
    deltas = [r + after - before for r, after, before in zip(rewards, following, values, strict=True)]
    advantages = [sum(gae_lambda ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


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
    terminal = [c - threshold if v or estimator == "advantage" else 0.0 for c, v in zip(costs, violated, strict=True)]
    return terminal, [float(v or estimator == "cost") for v in violated], excesses


def group_advantage(i: int, scores: list[float], args, cost: bool = False) -> float:
    """Of response i: its score minus the mean of the others to its prompt; of costs, the rectified ones."""
    k = args.responses_per_prompt
    others = [j for j in range(i // k * k, i // k * k + k) if j != i]
    if cost:
        scores = [score - args.cost_threshold for score in scores]
        if args.constraint == "response":
            scores = [max(score, 0.0) for score in scores]
        elif sum(scores[j] for j in others) <= 0:
            return 0.0
    group = [scores[j] for j in (i, *others)]
    mean = sum(group) / k
    spread = (sum((score - mean) ** 2 for score in group) / (k - 1)) ** 0.5 + 1e-4 if args.advantage_norm else 1.0
    return (scores[i] - sum(scores[j] for j in others) / (k - 1)) / spread


def plain_policy(folder, parameters=None, dtype=torch.float64):
    """The library's model, with other parameters in the order of its own."""
    return with_parameters(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), parameters)


def plain_scorer(folder, parameters=None, dtype=torch.float64):
    biased = "TokenClassification" in AutoConfig.from_pretrained(folder).architectures[0]
    cls = AutoModelWithBiasedHead if biased else AutoModelForSequenceClassification
    return with_parameters(cls.from_pretrained(folder, dtype=dtype).eval(), parameters)


@torch.no_grad()
def with_parameters(model, parameters):
    for own, given in zip(model.parameters(), parameters or model.parameters(), strict=True):
        own.copy_(given)
    model.get_input_embeddings().padding_idx = None  # the pad token is a token that a policy may sample
    return model


def logprobs(policy, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """log π(y_t | x, y_<t) of every token of a response, [tokens]."""
    logits = policy(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    rows = []
    for t, token in enumerate(response):
        before = logits[len(prompt) + t - 1]
        rows.append(before[token] - torch.logsumexp(before, 0))
    return torch.stack(rows)


def log_ratio(policy, other, prompt: list[int], response: list[int]) -> torch.Tensor:
    return logprobs(policy, prompt, response, 1.0).sum() - logprobs(other, prompt, response, 1.0).sum()


def token_scores(model, ids: list[int]) -> torch.Tensor:
    """Score of every token of a text by a score model of the library's classes, [tokens]."""
    hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
    return model.score(hidden)[0, :, 0]


def values(critic, prompt: list[int], response: list[int]) -> torch.Tensor:
    """V_t before every token of a response, [tokens]: the first is read at the prompt's last token."""
    return token_scores(critic, prompt + response)[len(prompt) - 1 : -1]
