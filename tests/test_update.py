"""Whole iterations of the RL scripts by hand: losses, gradients of all trained models, optimizer steps, metrics.

What the script sampled and its parameters are recorded. All after that is computed anew, text by text, in float64."""

import contextlib
import math
from types import SimpleNamespace

import by_hand
import pytest
import tiny
import torch
from helpers import assert_near, changed, read_lines, recorded_updates, without_times
from torch.nn.functional import pad

import ppo_lagrange
import repo
import repo_group

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
    "group, response": (repo_group, dict(responses_per_prompt=4)),
    "group, prompt": (repo_group, dict(constraint="prompt", responses_per_prompt=2, advantage_norm=True)),
    "PPO-Lagrange, K = 2": (ppo_lagrange, dict(responses_per_prompt=2, update_epochs=1, cost_threshold=-1.0)),
}
MODELS = ("policy", "reward_critic", "cost_critic")  # repo_group.py trains the first alone
ONLY_CRITICS = ("gae_lambda", "value_clip_coef", "critic_learning_rate")


def flags_of(script, flags: dict) -> dict:
    """COMMON and others, without those that the script lacks."""
    flags = COMMON | flags
    return {name: value for name, value in flags.items() if script is not repo_group or name not in ONLY_CRITICS}


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


def rectified(a, costs):
    if isinstance(a, ppo_lagrange.Args):
        excess = [cost - a.cost_threshold for cost in costs]
        return excess, [1.0] * len(costs), excess
    estimator = getattr(a, "rectify", "cost")
    return by_hand.rectify(costs, a.cost_threshold, a.constraint, estimator, a.responses_per_prompt)


@torch.no_grad()
def targets(a, files, prompts, responses, policy, critics, multiplier):
    """Everything that is fixed before the update, one entry per response, and the metrics that follow from it."""
    texts = list(zip(prompts, responses, strict=True))
    scorers = map(by_hand.plain_scorer, (files.reward, files.cost))
    policies = policy, by_hand.plain_policy(files.policy)
    rewards, costs = ([by_hand.token_scores(model, x + y)[-1].item() for x, y in texts] for model in scorers)
    old, ref = ([by_hand.logprobs(model, x, y, a.temperature).tolist() for x, y in texts] for model in policies)
    values = [[by_hand.values(critic, x, y).tolist() for x, y in texts] for critic in critics]
    terminal_costs, shares, excesses = rectified(a, costs)
    excess = sum(excesses) / len(excesses)
    multiplier = min(multiplier * math.exp(a.lambda_lr * multiplier * excess), a.lambda_max)
    advantages, returns = [], ([], [])
    for i in range(len(texts)):
        log_ratio = [p - q for p, q in zip(old[i], ref[i], strict=True)]
        if not critics:
            own = by_hand.group_advantage(i, rewards, a) - multiplier * by_hand.group_advantage(i, costs, a, cost=True)
            to_come = [sum(log_ratio[t:]) for t in range(len(log_ratio))]
            advantages.append([own / (1 + multiplier) - a.kl_coef * sum_ for sum_ in to_come])
            continue
        terms = (rewards[i], -a.kl_coef), (terminal_costs[i], a.kl_coef)
        signals = [by_hand.token_signal(score, log_ratio, kl_weight) for score, kl_weight in terms]
        of_critic = [by_hand.gae(signal, values[j][i], a.gae_lambda) for j, signal in enumerate(signals)]
        for j in (0, 1):
            returns[j].append(of_critic[j][1])
        own = multiplier * shares[i]
        advantages.append([(r - own * c) / (1 + own) for r, c in zip(of_critic[0][0], of_critic[1][0], strict=True)])
    count, tokens = len(texts), sum(map(len, responses))
    metrics = {
        "reward": sum(rewards) / count,
        "cost": sum(costs) / count,
        "safety_compliance": sum(cost <= a.cost_threshold for cost in costs) / count,
        "violation": sum(max(cost - a.cost_threshold, 0) for cost in costs) / count,
        "excess": excess,
        "lambda": multiplier,
        "kl": (sum(map(sum, old)) - sum(map(sum, ref))) / count,
        "entropy": -sum(map(sum, old)) / tokens,
        "repetition": sum(map(by_hand.repetition, responses)) / count,
        "response_length": tokens / count,
        "finished": sum(response[-1] == 1 for response in responses) / count,
    }
    return SimpleNamespace(old=old, values=values, advantages=advantages, returns=returns, metrics=metrics)


def losses(a, prompts, responses, policy, critics, fixed):
    """The three losses, means over all tokens of the batch, and the share of clipped ratios."""
    tokens, total, clipped = sum(map(len, responses)), [torch.zeros(())] * 3, 0
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


@pytest.mark.parametrize("script, flags", RUNS.values(), ids=RUNS)
def test_two_iterations_by_hand(run, files, tmp_path, script, flags):
    flags, count = flags_of(script, flags), 1 if script is repo_group else 3
    with recorded_updates() as updates, recorded_rollouts(script) as rollouts:
        assert run(script, output_dir=tmp_path / "run", **flags).code == 0
    a = script.Args(batch_size=16, **flags)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    epochs, multiplier = a.update_epochs, a.lambda_init
    assert len(updates) == count * epochs * 2
    masters, optimizers = [], []
    for j, (parameters, _) in enumerate(updates[:count]):
        masters.append([value.double().requires_grad_() for value in parameters])
        decay = a.weight_decay if j == 0 else 0.0
        optimizers.append(torch.optim.AdamW(masters[j], betas=(0.9, 0.95), eps=1e-8, weight_decay=decay))

    for iteration in range(2):
        prompts, responses = rollouts[1 + iteration]  # the first call is the evaluation before
        logged, means = metrics[iteration], [0.0] * 4
        rates = [a.learning_rate * (1 + math.cos(math.pi * iteration / 2)) / 2]
        rates += [a.critic_learning_rate] * 2 if count == 3 else []
        for epoch in range(epochs):
            recorded = updates[count * (epochs * iteration + epoch) :][:count]
            weights = [parameters for parameters, _ in recorded]
            models = [by_hand.plain_policy(files.policy, weights[0])]
            critics = zip((files.reward, files.cost), weights[1:], strict=count == 3)
            models += [by_hand.plain_scorer(*critic) for critic in critics]
            if epoch == 0:
                fixed = targets(a, files, prompts, responses, models[0], models[1:], multiplier)
                multiplier = fixed.metrics["lambda"]
            expected, clipped = losses(a, prompts, responses, models[0], models[1:], fixed)
            parts = [*(loss.item() for loss in expected), clipped]
            means = [mean + part / epochs for mean, part in zip(means, parts, strict=True)]
            for j, (parameters, gradients) in enumerate(recorded):
                assert_near(parameters, [value.detach() for value in masters[j]], ROUNDING)
                assert_near(gradients, torch.autograd.grad(expected[j], models[j].parameters()), ROUNDING)
                # The step from the recorded gradients: with those by hand Adam would magnify rounding.
                for master, gradient in zip(masters[j], gradients, strict=True):
                    master.grad = gradient.double()
                norm = torch.nn.utils.clip_grad_norm_(masters[j], a.max_grad_norm).item()
                assert logged[f"{MODELS[j]}_grad_norm"] == pytest.approx(norm, rel=ROUNDING) or epoch + 1 < epochs
                optimizers[j].param_groups[0]["lr"] = rates[j]
                optimizers[j].step()
        names = ("policy_loss", "reward_value_loss", "cost_value_loss", "clip_fraction")
        expected = fixed.metrics | dict(zip(names, means, strict=True)) | {"learning_rate": rates[0]}
        expected = {name: value for name, value in expected.items() if count == 3 or "value_loss" not in name}
        assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    # What the run was made for happened: lengths that differ, both sides of the constraint, a KL term, and clipping
    # where ratios can move.
    assert metrics[0]["response_length"] < 16 and 0 < metrics[0]["safety_compliance"] < 1 and abs(logged["kl"]) > 0.01
    assert abs(metrics[0]["kl"]) < 1e-5  # the reference is the policy, at the temperature of sampling, too
    assert (logged["clip_fraction"] > 0) == (epochs > 1)
    falls = script is ppo_lagrange and a.cost_threshold > 0.1
    assert metrics[0]["lambda"] < a.lambda_init if falls else metrics[0]["lambda"] > a.lambda_init


@pytest.mark.parametrize("change", [dict(micro_batch_size=3), dict(gradient_checkpointing=True), dict()], ids=str)
@pytest.mark.parametrize("script", [repo, repo_group])
def test_padding_micro_batches_and_checkpointing_do_not_change_an_update(run, tmp_path, script, change):
    recorded, flags = [], dict(total_episodes=16, micro_batch_size=16, max_grad_norm=0.5)
    original = script.sample_responses

    def widened(*args):  # more columns on both sides of the responses, filled with a token of the vocabulary
        sampled = original(*args)
        sampled.sequences, sampled.scored = (pad(ids, (3, 4), value=20) for ids in (sampled.sequences, sampled.scored))
        sampled.attention_mask = pad(sampled.attention_mask, (3, 4))
        sampled.response_mask = pad(sampled.response_mask, (0, 4))
        return sampled

    for name, more, function in (("plain", {}, original), ("changed", change, original if change else widened)):
        with recorded_updates() as updates, changed(script, sample_responses=function):
            assert run(script, output_dir=tmp_path / name, **flags | more).code == 0
        recorded.append(updates)
    for (parameters, gradients), (other_parameters, other_gradients) in zip(*recorded, strict=True):
        assert_near(other_parameters, parameters, 0.0)
        assert_near(other_gradients, gradients, ROUNDING)
    plain, other = (without_times(read_lines(tmp_path / name / "metrics.jsonl")[0]) for name in ("plain", "changed"))
    assert other == pytest.approx(plain, rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize("script", [repo, ppo_lagrange])
def test_the_ptx_term_by_hand(run, files, tmp_path, script):
    """With as many supervised texts as an iteration takes, all are in the first one; the gradients add up."""
    rows = [{"prompt": row["prompt"], "response": row["response_1"]} for row in tiny.make_pairs(16, seed=7)]
    data = tiny.write_rows(tmp_path / "supervised.jsonl", rows)
    recorded, flags = {}, COMMON | dict(update_epochs=1, total_episodes=16)
    for name, more in (("without", dict()), ("with", dict(ptx_dataset=data, ptx_coef=3.0))):
        with recorded_updates() as updates:
            assert run(script, output_dir=tmp_path / name, **flags | more).code == 0
        recorded[name] = [gradients for _, gradients in updates]
    policy, tokenizer = by_hand.plain_policy(files.policy), tiny.make_tokenizer()
    texts = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["response"])["input_ids"] + [1]) for row in rows]
    logprobs = torch.cat([by_hand.logprobs(policy, x, y, 1.0) for x, y in texts])  # at no other temperature
    derived = torch.autograd.grad(-3.0 * logprobs.mean(), policy.parameters())
    added = [one - other for one, other in zip(recorded["with"][0], recorded["without"][0], strict=True)]
    assert_near(added, derived, 10 * ROUNDING)
    for critic in (1, 2):
        assert all(map(torch.equal, recorded["without"][critic], recorded["with"][critic]))
    lines = [read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("without", "with")]
    assert "ptx_loss" not in lines[0] and lines[1]["ptx_loss"] == pytest.approx(-logprobs.mean().item(), rel=ROUNDING)
