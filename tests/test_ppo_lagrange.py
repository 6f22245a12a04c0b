"""ppo_lagrange.py: what it shares with repo.py run for run, its multiplier, and the two baselines that are settings."""

import math

import pytest
import torch
from helpers import read_lines, read_summary, recorded_updates, without_times
from safetensors.torch import load_file

import ppo_lagrange
import repo


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_writes_its_files(lagrange_run):
    names = {path.name for path in lagrange_run.iterdir()}
    assert names >= {"args.json", "metrics.jsonl", "eval.jsonl", "summary.json", "model", "tensorboard"}
    assert read_summary(lagrange_run)["algorithm"] == "ppo_lagrange"


def test_the_multiplier_falls_where_the_mean_cost_is_below_the_threshold(lagrange_run):
    """Its trajectory by hand from the logged costs: λ ← λ exp(η λ (mean cost - d)), from 1, d = 2, η = 0.1."""
    multiplier = 1.0
    for row in read_lines(lagrange_run / "metrics.jsonl"):
        assert row["excess"] == pytest.approx(row["cost"] - 2) and row["excess"] < 0
        multiplier *= math.exp(0.1 * multiplier * (row["cost"] - 2))
        assert row["lambda"] == pytest.approx(multiplier, rel=1e-6)
    assert multiplier < 0.9


def test_the_multiplier_rises_to_its_cap(run, tmp_path):
    flags = dict(total_episodes=64, cost_threshold=-5, lambda_lr=0.1, lambda_max=3)
    assert run(ppo_lagrange, output_dir=tmp_path / "run", **flags).code == 0
    rows, multiplier = read_lines(tmp_path / "run" / "metrics.jsonl"), 1.0
    for row in rows:
        multiplier = min(multiplier * math.exp(0.1 * multiplier * (row["cost"] + 5)), 3.0)
        assert row["lambda"] == pytest.approx(multiplier, rel=1e-6)
    assert 1 < rows[0]["lambda"] < 3 == rows[-1]["lambda"]


def test_safe_answers_pay_for_unsafe_ones_here_and_not_in_repo(lagrange_run):
    """`violation` is what RePO would hold at zero; the excess of the mean is below it wherever anything is safe."""
    for row in read_lines(lagrange_run / "metrics.jsonl"):
        assert row["violation"] >= 0 > row["excess"]


def test_where_everything_violates_both_scripts_are_one(run, tmp_path):
    """{C - d}^+ = C - d under a threshold below all costs: the same numbers to the last bit, in all files."""
    flags = dict(total_episodes=48, cost_threshold=-100, lambda_lr=1e-4, responses_per_prompt=2)
    for script in (repo, ppo_lagrange):
        assert run(script, output_dir=tmp_path / script.__name__, **flags).code == 0
    one, other = tmp_path / "repo", tmp_path / "ppo_lagrange"
    assert (one / "eval.jsonl").read_bytes() == (other / "eval.jsonl").read_bytes()
    for row, expected in zip(read_lines(other / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True):
        assert without_times(row) == without_times(expected)
        assert row["safety_compliance"] == 0 and row["lambda"] > 1
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_plain_ppo_is_lambda_zero(run, tmp_path):
    """λ_init 0: λ stays 0 whatever the costs, and another cost model changes no weight of the policy."""
    for name, flags in (("one", dict()), ("other", dict(cost_threshold=-3, lambda_lr=0.5))):
        assert run(ppo_lagrange, output_dir=tmp_path / name, lambda_init=0, total_episodes=48, **flags).code == 0
        assert {row["lambda"] for row in read_lines(tmp_path / name / "metrics.jsonl")} == {0}
    assert run(repo, output_dir=tmp_path / "repo", lambda_init=0, total_episodes=48).code == 0
    one, other, theirs = (weights(tmp_path / name) for name in ("one", "other", "repo"))
    assert all(torch.equal(one[name], other[name]) and torch.equal(one[name], theirs[name]) for name in one)


def test_reward_shaping_is_a_fixed_multiplier(run, tmp_path):
    """λ_lr 0: λ = ν throughout; it is PPO on (R - νC)/(1 + ν), since the advantages are linear in the signals."""
    nu = 1.7
    with recorded_updates(ppo_lagrange) as updates:
        flags = dict(lambda_init=nu, lambda_lr=0, total_episodes=48)
        assert run(ppo_lagrange, output_dir=tmp_path / "run", **flags).code == 0
    assert len(updates) == 9
    assert {row["lambda"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")} == {nu}

    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    mask = (torch.arange(6) < torch.randint(1, 7, (20, 1), generator=generator)).long()
    rewards, costs, log_ratio = normal(20), normal(20), normal(20, 6)
    values, cost_values, beta = normal(20, 6), normal(20, 6), 0.05

    def advantages(signal, values):
        return ppo_lagrange.gae(signal, values, mask, 0.95)[0]

    def signal(terminal, weight):
        return ppo_lagrange.token_signal(terminal, log_ratio, mask, weight)

    combined = ppo_lagrange.combine_advantages(
        advantages(signal(rewards, -beta), values), advantages(signal(costs, beta), cost_values), nu
    )
    # One reward (R - νC)/(1 + ν), one critic, and the KL weight β: Safe RLHF's baseline has β(1 + ν) beside R - νC.
    shaped = advantages(signal((rewards - nu * costs) / (1 + nu), -beta), (values - nu * cost_values) / (1 + nu))
    assert torch.allclose(combined, shaped, rtol=1e-12, atol=1e-12)


def test_it_has_no_flags_of_the_rectifier(run, tmp_path):
    for flag in ("rectify", "constraint"):
        outcome = run(ppo_lagrange, output_dir=tmp_path / "run", **{flag: "cost"})
        assert outcome.code == 2 and len(outcome.errors) == 1 and flag in outcome.err
    assert not (tmp_path / "run").exists()
