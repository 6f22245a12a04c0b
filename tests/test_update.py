"""Whole iterations of repo.py and ppo_lagrange.py a second time, by hand: losses, gradients of all three models,
optimizer steps, metrics.

What the script sampled and the parameters it had are recorded; everything after that is computed anew, text by text,
with unsharded float64 models and the loops of by_hand.py.
"""

import contextlib
import math
from types import SimpleNamespace

import by_hand
import pytest
import tiny
import torch
from helpers import changed, read_lines, recorded_updates
from transformers import AutoModelForCausalLM

import ppo_lagrange
import preference_models
import repo

# Float32 against float64: a few units in the last place, relative to the largest entry of each gradient.
ROUNDING = 2e-5

COMMON = dict(
    temperature=0.7, kl_coef=0.3, gae_lambda=0.8, clip_coef=0.1, value_clip_coef=0.05, max_grad_norm=0.5,
    lambda_init=0.9, lambda_lr=0.3, lambda_max=1.5, cost_threshold=0.1, learning_rate=0.02, critic_learning_rate=0.01,
    weight_decay=0.02, micro_batch_size=5, total_episodes=32, update_epochs=2,
)  # fmt: skip
RUNS = {
    "response, cost": (repo, dict()),
    "response, advantage": (repo, dict(rectify="advantage")),
    "prompt, cost": (repo, dict(constraint="prompt", responses_per_prompt=4)),
    "prompt, advantage": (
        repo,
        dict(constraint="prompt", responses_per_prompt=2, rectify="advantage", update_epochs=1),
    ),
    "PPO-Lagrange": (ppo_lagrange, dict(cost_threshold=1.0)),  # above the mean cost: λ falls
    "PPO-Lagrange, K = 2": (ppo_lagrange, dict(responses_per_prompt=2, update_epochs=1, cost_threshold=-1.0)),
}


@contextlib.contextmanager
def recorded_rollouts(script):
    """Record every call of sample_responses: a list of (prompts, responses) of token ids, EOS included."""
    rollouts, original = [], script.sample_responses

    def sample_responses(policy, tokenizer, prompts, *rest):
        sampled = original(policy, tokenizer, prompts, *rest)
        responses = []
        for row in sampled.sequences[:, max(map(len, prompts)) :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            responses.append(row[:end])
        rollouts.append((list(prompts), responses))
        return sampled

    with changed(script, sample_responses=sample_responses):
        yield rollouts


def plain_policy(files, state=None):
    policy = AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float64)
    if state:
        policy.load_state_dict(state)
    return policy


def plain_scorer(name, state=None):
    model = repo.load_score_model(str(name), torch.float64, "", 0, False).model
    if state:
        model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    return model


def rectified(a, costs):
    if isinstance(a, ppo_lagrange.Args):
        excess = [cost - a.cost_threshold for cost in costs]
        return excess, [1.0] * len(costs), excess
    return by_hand.rectify(costs, a.cost_threshold, a.constraint, a.rectify, a.responses_per_prompt)


def targets(a, files, prompts, responses, policy, critics, multiplier):
    """Everything that is fixed before the update, one entry a response, and the metrics that follow from it."""
    with torch.no_grad():
        texts = list(zip(prompts, responses, strict=True))
        rewards, costs = (
            [by_hand.token_scores(model, x + y)[-1].item() for x, y in texts]
            for model in (plain_scorer(files.reward), plain_scorer(files.cost))
        )
        old = [by_hand.logprobs(policy, x, y, a.temperature).tolist() for x, y in texts]
        ref_policy = plain_policy(files)
        ref = [by_hand.logprobs(ref_policy, x, y, a.temperature).tolist() for x, y in texts]
        values = [[by_hand.values(critic, x, y).tolist() for x, y in texts] for critic in critics]
    terminal_costs, weights, excesses = rectified(a, costs)
    excess = sum(excesses) / len(excesses)
    multiplier = min(multiplier * math.exp(a.lambda_lr * multiplier * excess), a.lambda_max)
    advantages, returns = [], ([], [])
    for i in range(len(texts)):
        log_ratio = [p - q for p, q in zip(old[i], ref[i], strict=True)]
        signals = (
            by_hand.token_signal(rewards[i], log_ratio, -a.kl_coef),
            by_hand.token_signal(terminal_costs[i], log_ratio, a.kl_coef),
        )
        (by_reward, reward_returns), (by_cost, cost_returns) = (
            by_hand.gae(signal, values[critic][i], a.gae_lambda) for critic, signal in enumerate(signals)
        )
        returns[0].append(reward_returns)
        returns[1].append(cost_returns)
        own = multiplier if weights[i] else 0.0
        advantages.append([(r - own * c) / (1 + own) for r, c in zip(by_reward, by_cost, strict=True)])
    count, tokens = len(texts), sum(map(len, responses))
    metrics = {
        "reward": sum(rewards) / count,
        "cost": sum(costs) / count,
        "safety_compliance": sum(cost <= a.cost_threshold for cost in costs) / count,
        "violation": sum(max(cost - a.cost_threshold, 0) for cost in costs) / count,
        "excess": excess,
        "lambda": multiplier,
        "kl": (sum(map(sum, old)) - sum(map(sum, ref))) / count,
        "response_length": tokens / count,
        "finished": sum(response[-1] == 1 for response in responses) / count,
    }
    return SimpleNamespace(old=old, values=values, advantages=advantages, returns=returns, metrics=metrics)


def losses(a, prompts, responses, policy, critics, fixed):
    """The three losses, means over all tokens of the batch, and the share of clipped ratios."""
    tokens = sum(map(len, responses))
    total, clipped = [torch.zeros((), dtype=torch.float64) for _ in range(3)], 0
    for i, (x, y) in enumerate(zip(prompts, responses, strict=True)):
        ratios = (by_hand.logprobs(policy, x, y, a.temperature) - torch.tensor(fixed.old[i]).double()).exp()
        advantages = torch.tensor(fixed.advantages[i]).double()
        near = ratios.clamp(1 - a.clip_coef, 1 + a.clip_coef)
        total[0] = total[0] - torch.min(ratios * advantages, near * advantages).sum()
        clipped += int(((ratios - 1).abs() > a.clip_coef).sum())
        for j, critic in enumerate(critics):
            old, target = (torch.tensor(rows[j][i]).double() for rows in (fixed.values, fixed.returns))
            values = by_hand.values(critic, x, y)
            near = old + (values - old).clamp(-a.value_clip_coef, a.value_clip_coef)
            total[1 + j] = total[1 + j] + 0.5 * torch.max((values - target) ** 2, (near - target) ** 2).sum()
    return [loss / tokens for loss in total], clipped / tokens


def close(value, expected, scale=1.0):
    assert value == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING * scale)


def close_tensors(values, expected, scale):
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert (value.double() - expected[name]).abs().max() <= ROUNDING * scale, name


def norm(gradients):
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


@pytest.mark.parametrize("script, flags", RUNS.values(), ids=RUNS)
def test_two_iterations_by_hand(run, files, tmp_path, script, flags):
    flags = COMMON | flags
    with recorded_updates(script) as updates, recorded_rollouts(script) as rollouts:
        outcome = run(script, output_dir=tmp_path / "run", **flags)
    assert outcome.code == 0, outcome.err
    a = script.Args(batch_size=16, **flags)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    epochs, iterations, multiplier = a.update_epochs, 2, a.lambda_init
    assert len(updates) == 3 * epochs * iterations
    optimizers = [AdamW() for _ in range(3)]

    for iteration in range(iterations):
        prompts, responses = rollouts[1 + iteration]  # the first call is the evaluation before
        assert len(prompts) == 16
        logged = metrics[iteration]
        means = [0.0] * 4
        for epoch in range(epochs):
            recorded = updates[3 * (epochs * iteration + epoch) :][:3]
            states = [state for state, _ in recorded]
            policy = plain_policy(files, states[0])
            critics = [plain_scorer(files.reward, states[1]), plain_scorer(files.cost, states[2])]
            if epoch == 0:
                fixed = targets(a, files, prompts, responses, policy, critics, multiplier)
                multiplier = fixed.metrics["lambda"]
            expected, clipped = losses(a, prompts, responses, policy, critics, fixed)
            means = [
                mean + new / epochs
                for mean, new in zip(means, [*(loss.item() for loss in expected), clipped], strict=True)
            ]
            for j, (model, (state, gradients)) in enumerate(zip([policy, *critics], recorded, strict=True)):
                prefix = "" if j == 0 else "model."
                parameters = {prefix + name: value for name, value in model.named_parameters()}
                derived = torch.autograd.grad(expected[j], parameters.values())
                scale = max(gradient.abs().max().item() for gradient in derived)
                close_tensors(gradients, dict(zip(parameters, derived, strict=True)), scale)
                # The optimizer's step, from the recorded gradients: with those by hand Adam would magnify rounding.
                rate = a.critic_learning_rate if j else a.learning_rate * (1 + math.cos(math.pi * iteration / 2)) / 2
                after = optimizers[j].step(state, gradients, a.max_grad_norm, rate, 0 if j else a.weight_decay)
                following = updates[3 * (epochs * iteration + epoch + 1) :][:3]
                if following:
                    close_tensors(following[j][0], after, scale=1.0)
        for name, value in fixed.metrics.items():
            close(logged[name], value)
        for name, value in zip(("policy", "reward_value", "cost_value"), means[:3], strict=True):
            close(logged[f"{name}_loss"], value)
        close(logged["clip_fraction"], means[3])
        for name, (_, gradients) in zip(("policy", "reward_critic", "cost_critic"), recorded, strict=True):
            close(logged[f"{name}_grad_norm"], norm(gradients))
        close(logged["learning_rate"], a.learning_rate * (1 + math.cos(math.pi * iteration / 2)) / 2)
    # What the run was made for happened: lengths that differ, both sides of the constraint, a KL term, and clipping
    # where ratios can move.
    assert metrics[0]["response_length"] < 16 and 0 < metrics[0]["safety_compliance"] < 1 and abs(logged["kl"]) > 0.01
    assert abs(metrics[0]["kl"]) < 1e-5  # the reference is the policy, at the temperature of sampling, too
    assert (logged["clip_fraction"] > 0) == (epochs > 1)
    falls = script is ppo_lagrange and a.cost_threshold > 0.1
    assert metrics[0]["lambda"] < a.lambda_init if falls else metrics[0]["lambda"] > a.lambda_init
    assert metrics[1]["lambda"] <= a.lambda_max and (script is ppo_lagrange or metrics[0]["excess"] > 0)


class AdamW:
    """AdamW after clipping to a norm, betas 0.9 and 0.95, as its authors wrote it (arXiv 1711.05101)."""

    def __init__(self):
        self.steps, self.first, self.second = 0, {}, {}

    def step(self, state, gradients, max_grad_norm, rate, weight_decay):
        self.steps += 1
        factor = min(1.0, max_grad_norm / (norm(gradients) + 1e-6))
        after = {}
        for name, value in state.items():
            gradient = gradients[name].double() * factor
            self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * gradient
            self.second[name] = 0.95 * self.second.get(name, 0.0) + 0.05 * gradient**2
            mean = self.first[name] / (1 - 0.9**self.steps)
            deviation = (self.second[name] / (1 - 0.95**self.steps)).sqrt()
            after[name] = value.double() * (1 - rate * weight_decay) - rate * mean / (deviation + 1e-8)
        return after


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_preference_update_by_hand(run, files, tmp_path, kind):
    """One batch of all 40 pairs, in micro-batches of 7."""
    flags = dict(kind=kind, batch_size=40, micro_batch_size=7, epochs=2, regularization=0.1, max_grad_norm=0.5)
    with recorded_updates(preference_models) as updates:
        outcome = run(preference_models, output_dir=tmp_path / "run", **flags)
    assert outcome.code == 0, outcome.err
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    tokenizer = tiny.make_tokenizer()
    optimizer = AdamW()
    for step, (state, gradients) in enumerate(updates):
        model = plain_scorer(files.reward, state)
        total, right = 0.0, 0
        for row in read_lines(files.train):
            first = row["better_response_id"] if kind == "reward" else 1 - row["safer_response_id"]
            scores, signs = [], []
            for i in (first, 1 - first):
                ids = tokenizer(row["prompt"] + row[f"response_{i}"])["input_ids"] + [tokenizer.eos_token_id]
                scores.append(by_hand.token_scores(model, ids)[-1])
                signs.append(-1 if row[f"is_response_{i}_safe"] else 1)
            right += scores[0].item() > scores[1].item()
            total = total - torch.nn.functional.logsigmoid(scores[0] - scores[1])
            total = total + 0.1 * (scores[0] ** 2 + scores[1] ** 2) / 2
            if kind == "cost":
                for sign, score in zip(signs, scores, strict=True):
                    total = total - torch.nn.functional.logsigmoid(sign * score)
        parameters = {f"model.{name}": value for name, value in model.named_parameters()}
        derived = torch.autograd.grad(total / 40, parameters.values())
        scale = max(gradient.abs().max().item() for gradient in derived)
        close_tensors(gradients, dict(zip(parameters, derived, strict=True)), scale)
        rate = 1e-3 * (1 + math.cos(math.pi * step / 2)) / 2
        after = optimizer.step(state, gradients, 0.5, rate, 0.1)
        if step == 0:
            close_tensors(updates[1][0], after, scale=1.0)
        close(metrics[step]["loss"], total.item() / 40)
        close(metrics[step]["pair_accuracy"], right / 40)
        close(metrics[step]["grad_norm"], norm(gradients))
        close(metrics[step]["learning_rate"], rate)


def test_padding_columns_do_not_change_an_update(run, tmp_path):
    """More columns on both sides of the responses, filled with a token of the vocabulary: the same update."""

    def with_more_columns(*args):
        sampled = sample_responses(*args)
        rows = len(sampled.sequences)

        def widen(tensor, left, right, value):
            return torch.nn.functional.pad(tensor, (left, right), value=value)

        return repo.Responses(
            widen(sampled.sequences, 3, 4, 20),
            widen(sampled.attention_mask, 3, 4, 0),
            widen(sampled.response_mask, 0, 4, 0),
            sampled.finished.view(rows),
        )

    sample_responses, recorded = repo.sample_responses, []
    for name, function in (("narrow", sample_responses), ("wide", with_more_columns)):
        with recorded_updates(repo) as updates, changed(repo, sample_responses=function):
            assert run(repo, output_dir=tmp_path / name, total_episodes=16, max_grad_norm=0.5).code == 0
        recorded.append(updates)
    for (narrow_state, narrow), (wide_state, wide) in zip(*recorded, strict=True):
        close_tensors(wide_state, {name: value.double() for name, value in narrow_state.items()}, 0.0)
        scale = max(gradient.abs().max().item() for gradient in narrow.values())
        close_tensors(wide, {name: value.double() for name, value in narrow.items()}, scale)
    narrow, wide = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("narrow", "wide"))
    for name in narrow:
        if "seconds" not in name:
            close(wide[name], narrow[name])


@pytest.mark.parametrize("script", [repo, ppo_lagrange])
def test_the_ptx_term_by_hand(run, files, tmp_path, script):
    """With as many supervised texts as an iteration takes, all are in the first one; the gradients add up."""
    rows = [{"prompt": row["prompt"], "response": row["response_1"]} for row in tiny.make_pairs(16, seed=7)]
    data = tiny.write_rows(tmp_path / "supervised.jsonl", rows)
    recorded, flags = {}, COMMON | dict(update_epochs=1, total_episodes=16)
    for name, more in (("without", dict()), ("with", dict(ptx_dataset=data, ptx_coef=3.0))):
        with recorded_updates(script) as updates:
            assert run(script, output_dir=tmp_path / name, **flags | more).code == 0
        recorded[name] = [gradients for _, gradients in updates]
    policy = plain_policy(files)
    tokenizer = tiny.make_tokenizer()
    texts = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["response"])["input_ids"] + [1]) for row in rows]
    assert tokenizer.eos_token_id == 1 and len({len(y) for _, y in texts}) > 3
    logprobs = torch.cat([by_hand.logprobs(policy, x, y, 1.0) for x, y in texts])  # at no other temperature
    derived = torch.autograd.grad(-3.0 * logprobs.mean(), policy.parameters())
    scale = max(gradient.abs().max().item() for gradient in derived)
    for (name, _), gradient in zip(policy.named_parameters(), derived, strict=True):
        difference = recorded["with"][0][name] - recorded["without"][0][name]
        assert (difference.double() - gradient).abs().max() <= 10 * ROUNDING * scale, name
    for critic in (1, 2):
        for name, gradient in recorded["without"][critic].items():
            assert torch.equal(gradient, recorded["with"][critic][name])
    (line,) = read_lines(tmp_path / "with" / "metrics.jsonl")
    close(line["ptx_loss"], -logprobs.mean().item())
    assert "ptx_loss" not in read_lines(tmp_path / "without" / "metrics.jsonl")[0]
