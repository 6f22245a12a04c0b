"""benchmark/memory.py on a tiny Llama: its figures against arithmetic, and against the same count on real tensors.

The tensors without content live in a process of their own, as their process group is not that of the other tests.
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "benchmark"))
import memory
from memory import repo

HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, INTERMEDIATE, VOCABULARY = 64, 2, 4, 2, 96, 80
WIDTH = HIDDEN // HEADS * KEY_VALUE_HEADS  # of the keys of one token
ARGS = memory.Args(batch=4, micro_batch=2, prompt_length=20, response_length=12)
BLOCKS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
POLICY = BLOCKS + 2 * VOCABULARY * HIDDEN + HIDDEN
SCORE = BLOCKS + VOCABULARY * HIDDEN + HIDDEN  # without the head, one row that stays with rank 0
MODELS = memory.TRAINED + memory.FROZEN
TENSORS = 9 * LAYERS + 3  # weights of the policy, and of a score model
COUNTS = """
import dataclasses, json, sys
from unittest import mock
from test_memory import ARGS, config, efficient_attention, memory, repo

repo.is_small = lambda model: False  # shard this tiny model as the large ones are that it stands for

memory.transformers.logging.set_verbosity_error()
rows = {
    "base": memory.measure(config(), 2, ARGS),
    "alone": memory.measure(config(), 1, ARGS),
    "offload": memory.measure(config(), 2, dataclasses.replace(ARGS, cpu_offload=True)),
    "other flags": memory.measure(config(), 2, dataclasses.replace(ARGS, gradient_checkpointing=False), whole=False),
}
with mock.patch("torch.nn.functional.scaled_dot_product_attention", efficient_attention):
    rows["as on GPUs"] = memory.measure(config(), 2, ARGS, skip=False)
json.dump(rows, sys.stdout)
"""


def config():
    return memory.llama(HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, INTERMEDIATE, VOCABULARY, False)


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """What F.scaled_dot_product_attention does with a mask on CUDA."""
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-c", COUNTS],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("row", "ranks"), [("base", 2), ("alone", 1)])
def test_the_models_at_rest_hold_their_bytes_a_parameter(rows, row, ranks):
    """Sharded over the ranks: 4 bytes of masters and 8 of moments for trained models, 2 for frozen ones."""
    shares = {name: POLICY / ranks if name in ("policy", "reference") else SCORE / ranks + HIDDEN for name in MODELS}
    steps = 4 * TENSORS  # AdamW counts the steps of each weight in a float32
    for name, share in shares.items():
        trained = name in memory.TRAINED
        expected = {"shards": 4 * share, "optimizer": 8 * share + steps} if trained else {"shards": 2 * share}
        assert rows[row]["at_rest"][name] == {"optimizer": 0} | expected
    buffers = 6 * 2 * 4 * HIDDEN // HEADS // 2  # frequencies of the rotary embedding, twice in each model
    assert rows[row]["total_at_rest"] == buffers + sum(sum(sizes.values()) for sizes in rows[row]["at_rest"].values())


@pytest.mark.parametrize("row", ["base", "alone", "other flags"])
def test_the_rollout_holds_the_policy_whole_and_a_cache_of_all_but_the_last_token(rows, row):
    parts = rows[row]["rollout_parts"]
    # With --no-whole-rollout the blocks are shards again when a token begins; the root was whole before.
    assert parts["policy"] == (0 if row == "other flags" else 2 * POLICY)
    tokens = ARGS.batch * (ARGS.prompt_length + ARGS.response_length - 2)
    logits = 2 * 4 * ARGS.batch * VOCABULARY  # of the token before, and what the sampler made of them
    assert 0 <= parts["cache"] - 2 * LAYERS * tokens * WIDTH * 2 - logits < 64 * tokens  # ids and masks


def test_the_step_holds_the_gradients_of_all_models_and_so_does_every_update_of_a_second_micro_batch(rows):
    phases, gradients = rows["base"]["phases"], 4 * (POLICY / 2 + 2 * (SCORE / 2 + HIDDEN))
    # Of the frozen models there are nothing but shards.
    left = phases["optimizer step"] - rows["base"]["total_at_rest"] - gradients
    assert 0 <= left < 8 * ARGS.batch * (ARGS.prompt_length + 6 * ARGS.response_length) + 64 * 3 * TENSORS
    # In the second micro-batch all gradients are there, whichever model is updated; the activations of both critics are
    # there until the reward critic's are used.
    assert phases["update of reward critic"] > phases["update of cost critic"]


def test_gradient_checkpointing_lowers_the_peaks_of_the_updates_and_of_nothing_else(rows):
    for phase in memory.PHASES[1:]:
        saved = rows["other flags"]["phases"][phase] - rows["base"]["phases"][phase]
        assert saved > 0 if phase.startswith("update") else saved == 0


def test_offloading_takes_the_frozen_shards_away_except_one_on_its_way(rows):
    base, offload = rows["base"], rows["offload"]
    frozen = sum(base["at_rest"][name]["shards"] for name in memory.FROZEN)
    assert offload["offloaded"] == frozen == base["total_at_rest"] - offload["total_at_rest"]
    unit = 2 * BLOCKS // LAYERS // 2  # a block's shard, larger than that of embeddings and head
    for phase, peak in base["phases"].items():
        assert offload["phases"][phase] == peak - frozen + (unit if phase == "scoring" else 0)


def test_the_attention_of_gpus_and_the_tokens_left_out_of_the_rollout_change_no_peak(rows):
    for phase, peak in rows["base"]["phases"].items():
        seed = 16 if phase.startswith("update") else 0  # bytes that the GPU's kernel keeps in case of dropout
        assert rows["as on GPUs"]["phases"][phase] == peak + seed


def test_tensors_with_content_take_the_same(rows, processes, monkeypatch):
    @contextlib.contextmanager
    def real(ranks):
        yield processes[1]

    monkeypatch.setattr(memory, "pretended", real)
    monkeypatch.setattr(repo, "is_small", lambda model: False)
    row = memory.measure(config(), 1, ARGS)
    assert row["at_rest"] == rows["alone"]["at_rest"]
    assert row["phases"] == rows["alone"]["phases"]


@pytest.mark.parametrize("fits", [8, 24, 56])
@pytest.mark.parametrize("begin", [8, 24, 40, 96])
def test_the_number_of_gpus_is_the_smallest_multiple_of_8_with_enough_to_spare(monkeypatch, fits, begin):
    bytes_at = {gpus: 1000 + 54 * POLICY / gpus for gpus in range(8, 105, 8)}

    def measure(config, gpus, args, whole):
        return {"gpus": gpus, "peak": bytes_at[gpus], "total_at_rest": 42 * POLICY / gpus}

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "limit", lambda: bytes_at[fits])
    assert memory.find_gpus(config(), ARGS, True, begin)["gpus"] == fits


def test_the_table_and_its_place_in_a_page(rows, tmp_path):
    text = memory.table([{"name": "tiny", **rows["base"]}, {"name": "small", **rows["other flags"]}])
    head, _, *body = text.splitlines()
    assert all(line.count("|") == head.count("|") for line in body) and "(sharded)" in body[1]
    page = tmp_path / "scale.md"
    with pytest.raises(SystemExit, match="there is no"):
        memory.insert(page, "memory", text)
    page.write_text("before\n<!-- memory -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    memory.insert(page, "memory", text)
    assert page.read_text(encoding="utf-8") == f"before\n<!-- memory -->\n{text}\n<!-- end -->\nafter\n"
    page.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no lines"):
        memory.insert(page, "memory", text)
