"""What makes the scripts faster changes no result; and what benchmark/throughput.py reads from a run."""

import statistics
import sys

import matplotlib.pyplot as plt
import pytest
import tiny
import torch
from helpers import ROOT, command, finish, read_lines, recorded_updates, start
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import ppo_lagrange
import preference_models
import repo

sys.path.append(str(ROOT / "benchmark"))
import throughput


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tiny.make_model(tmp_path_factory.mktemp("policy") / "model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "dtype, longest, plain", [("bfloat16", 128, True), ("bfloat16", 129, False), ("float32", 9, False)]
)
def test_attention_is_plain_for_short_texts_in_bfloat16_and_computes_the_same(policy, dtype, longest, plain):
    policy.set_attn_implementation("sdpa")
    ids, mask = repo.pad([[5, 6, 7], [8, 9, 10, 11, 12]], 2, "left")
    before = repo.response_logprobs(policy, ids, mask, 2, 1.0)
    repo.suit_attention(policy, getattr(torch, dtype), longest)
    plain = plain and not torch.cuda.is_available()
    assert policy.config._attn_implementation == ("eager" if plain else "sdpa")
    torch.testing.assert_close(repo.response_logprobs(policy, ids, mask, 2, 1.0), before)


def test_log_probabilities_in_chunks_are_those_of_the_whole(policy):
    """A vocabulary of 2^18 makes a chunk of every two positions of two texts."""
    logits = torch.randn(2, 6, 2**18, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = torch.randint(2**18, (2, 5), generator=torch.Generator().manual_seed(1))

    def model(**_):
        return type("Output", (), {"logits": logits})

    found = repo.response_logprobs(model, tokens, torch.ones_like(tokens), 5, 0.7)
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(10.0).view(2, 5)
    one, other = (torch.autograd.grad((weights * x).sum(), logits)[0] for x in (found, expected))
    torch.testing.assert_close(one, other)


def test_micro_batches_hold_texts_of_similar_length_and_none_of_the_padding_of_others(files, processes):
    """Long and short texts by turns: the policy sees no column that is padding in all rows. Nothing else changes."""
    policy = repo.shard(AutoModelForCausalLM.from_pretrained(files.policy).eval(), processes[1], torch.float32)
    texts = [([5] * (1 + row % 3), [6] * (9 if row % 2 else 2)) for row in range(7)]
    ids, mask, response_mask = repo.pad_texts(texts, 2)
    assert [rows.tolist() for rows in repo.micro_batches(mask, 4)] == [[0, 2, 4, 6], [1, 3, 5]]
    assert [rows.tolist() for rows in repo.micro_batches(mask, 7)] == [list(range(7))]
    shapes = []
    policy.register_forward_pre_hook(lambda *call: shapes.append((*call[2]["input_ids"].shape,)), with_kwargs=True)
    with torch.no_grad():
        found = repo.in_micro_batches(repo.response_logprobs, policy, (ids, mask), 4, 9, 1.0)
        assert shapes == [(4, 3 + 2), (3, 3 + 9)]
        for row, (prompt, response) in enumerate(texts):
            alone = torch.tensor([prompt + response])
            expected = repo.response_logprobs(policy, alone, torch.ones_like(alone), len(response), 1.0)
            torch.testing.assert_close(found[row][response_mask[row] > 0], expected[0])


@pytest.mark.parametrize("script", [repo, ppo_lagrange, preference_models], ids=lambda script: script.__name__)
def test_compiled_blocks_make_the_same_updates(script, run, graphs, tmp_path):
    """Up to rounding; and all blocks and models of a shape share a few graphs, whatever the length of their texts."""
    updates = []
    for flag in (None, True):
        with recorded_updates(script) as recorded:
            outcome = run(script, output_dir=tmp_path / str(flag), compile=flag)
        assert outcome.code == 0, outcome.err
        assert bool(graphs) == bool(flag)
        updates.append(recorded)
    assert len(graphs) <= 6
    assert len(updates[0]) == len(updates[1]) > 1
    for (_, plain), (_, compiled) in zip(*updates, strict=True):
        for name in plain:
            torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-5)


def test_compiled_code_computes_what_the_blocks_do(files, processes):
    """By torch's own compiler: values of texts of two lengths, with padding, and all gradients."""
    ids, mask = repo.pad([[5, 6, 7], [8, 9, 10, 11, 12]], 2, "left")
    found = []
    for compiled in (False, True):
        critic = repo.load_score_model(files.reward, torch.float32, "", 0, False)
        critic = repo.shard(critic, processes[1], torch.float32, compiled)
        for columns in (slice(None), slice(1, None)):
            values = repo.response_values(critic, ids[:, columns], mask[:, columns], 2)
            values.square().sum().backward()
            found.append((compiled, values.detach()))
        found.append((compiled, {name: value.grad.full_tensor() for name, value in critic.named_parameters()}))
    for (_, one), (_, other) in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_compiler_that_does_not_work_is_told_before_the_run_begins(defaults, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    outcome = finish(start([ROOT / "repo.py", *command(**defaults["repo"], output_dir=tmp_path / "run", compile=True)]))
    assert outcome.code == 2 and not (tmp_path / "run").exists()
    assert len(outcome.errors) == 1 and "--compile: torch.compile does not work here" in outcome.errors[0]


def test_the_benchmark_reads_when_steps_ended(repo_run):
    ends = throughput.step_ends(repo_run)
    assert len(ends) == len(read_lines(repo_run / "metrics.jsonl")) and ends == sorted(ends)


def test_the_benchmark_takes_turns_and_reports_ratios_of_medians(capsys):
    turns, rates = [], {"ours": iter([10.0, 40.0, 20.0]), "peer": iter([10.0, 8.0, 5.0])}

    def contestant(name):
        def run():
            turns.append(name)
            return {"rate": next(rates[name]), "memory": 1.0}

        return run

    record = {}
    throughput.in_turn("episodes", {name: contestant(name) for name in rates}, 3, record)
    assert turns == ["ours", "peer"] * 3
    row = capsys.readouterr().out.splitlines()[-1]
    assert f"| {statistics.median([10, 40, 20]) / 8:.2f} | 1.00-5.00 |" in row
    assert [run["rate"] for run in record["episodes"]["peer"]] == [10.0, 8.0, 5.0]


def test_the_figure_shows_every_run(tmp_path):
    run = {"rollout": 1.0, "scoring": 0.5, "update": 2.0}
    shapes = [(16, 64), (64, 64), (256, 64), (16, 512)]
    record = {f"batch {batch}, {tokens} tokens": run | {"all_tokens": batch * tokens} for batch, tokens in shapes}
    throughput.draw(record, tmp_path / "speed.png")
    assert plt.imread(tmp_path / "speed.png").shape[:2] == (374, 990)


@pytest.mark.parametrize("name, size", [("small", 2_621_440), ("1B", 968_884_224)])
def test_the_weights_of_a_shape_are_those_of_its_model(name, size):
    shape = throughput.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape.config))
    counted = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    assert shape.weights == counted == size


def test_the_workload_is_what_the_page_says(tmp_path):
    """Lengths of texts; and the FLOPs that shares of the machine's rate are taken of, by torch's own counter."""
    shape = throughput.SHAPES["small"]
    throughput.make_workload(tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    batch, length = 2, shape.prompt + 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy(torch.ones(batch, length, dtype=torch.long), logits_to_keep=8)
    attention = batch * 4 * 2 * (2 * length**2 * 256) / 2  # two products in each of 4 layers; the half that looks back
    assert sum(throughput.work(shape, batch, 8)) == counter.get_flop_counts()["Global"][torch.ops.aten.mm] + attention
    tokenizer = repo.load_tokenizer(str(tmp_path / "policy"), False)
    rows = repo.load_rows(str(tmp_path / "pairs.parquet"), "train", ["prompt", "response_0", "response_1"], "--dataset")
    assert {len(tokenizer(text)["input_ids"]) for text in rows["prompt"]} == {shape.prompt}
    lengths = {len(tokenizer(text)["input_ids"]) for name in ("response_0", "response_1") for text in rows[name]}
    assert lengths == set(range(8, 33))
