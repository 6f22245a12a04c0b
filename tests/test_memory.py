"""benchmark/memory.py on a tiny Llama: its figures against arithmetic, and against the same count on real tensors.

The tensors without content live in a process of their own, as their process group is not that of the other tests.
"""

import contextlib
import dataclasses
import json
import os
import sys

import pytest
from helpers import ROOT, finish, start

sys.path.append(str(ROOT / "benchmark"))
import memory

HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, INTERMEDIATE, VOCABULARY = SIZES = 64, 2, 4, 2, 96, 80
WIDTH = HIDDEN // HEADS * KEY_VALUE_HEADS  # of the keys of one token
ARGS = memory.Args(batch=4, micro_batch=2, prompt_length=20, response_length=12)
BLOCKS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
POLICY = BLOCKS + 2 * VOCABULARY * HIDDEN + HIDDEN
SCORE = BLOCKS + VOCABULARY * HIDDEN + HIDDEN  # without the head, one row that stays with rank 0
MODELS = memory.TRAINED + memory.FROZEN
TENSORS = 9 * LAYERS + 3  # weights of the policy, and of a score model
COUNT = """
import json, sys
from test_memory import measure, memory

memory.transformers.logging.set_verbosity_error()
json.dump({"base": measure(2), "alone": measure(1), "group": measure(2, script="repo_group.py")}, sys.stdout)
"""


def measure(ranks, **flags) -> dict:
    return memory.measure(memory.llama(*SIZES, False), ranks, dataclasses.replace(ARGS, **flags))


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "benchmark", "."))
    done = finish(start(["-c", COUNT], python_path=paths))
    assert done.code == 0, done.err[-3000:]
    return json.loads(done.out)


@pytest.mark.parametrize(("row", "ranks"), [("base", 2), ("alone", 1)])
def test_the_models_at_rest_hold_their_bytes_per_parameter(rows, row, ranks):
    """Sharded over the ranks: 4 bytes of weights and 8 of moments for trained models, 2 for frozen ones."""
    shares = {name: POLICY / ranks if name in ("policy", "reference") else SCORE / ranks + HIDDEN for name in MODELS}
    steps = 4 * TENSORS  # AdamW counts the steps of each weight in a float32
    for name, share in shares.items():
        trained = name in memory.TRAINED
        expected = {"shards": 4 * share, "optimizer": 8 * share + steps} if trained else {"shards": 2 * share}
        assert rows[row]["at_rest"][name] == {"optimizer": 0} | expected
    buffers = 6 * 2 * 4 * HIDDEN // HEADS // 2  # frequencies of the rotary embedding, twice in each model
    assert rows[row]["total_at_rest"] == buffers + sum(sum(sizes.values()) for sizes in rows[row]["at_rest"].values())


def test_without_critics_the_other_four_models_hold_the_same(rows):
    others = {name: sizes for name, sizes in rows["base"]["at_rest"].items() if name not in memory.TRAINED[1:]}
    assert rows["group"]["at_rest"] == others
    assert all(size < rows["base"]["phases"][phase] for phase, size in rows["group"]["phases"].items())


@pytest.mark.parametrize("row", ["base", "alone"])
def test_the_rollout_holds_the_policy_whole_and_a_cache_of_all_but_the_last_token(rows, row):
    parts = rows[row]["rollout_parts"]
    assert parts["policy"] == 2 * POLICY
    tokens = ARGS.batch * (ARGS.prompt_length + ARGS.response_length - 2)
    # Beside keys and values: of the token before the logits, and their distribution function in float64; ids and masks.
    assert 0 <= parts["cache"] - 2 * LAYERS * tokens * WIDTH * 2 - 12 * ARGS.batch * VOCABULARY < 64 * tokens


def test_the_step_holds_the_gradients_of_all_models_and_so_does_every_update_of_a_second_micro_batch(rows):
    phases, gradients = rows["base"]["phases"], 4 * (POLICY / 2 + 2 * (SCORE / 2 + HIDDEN))
    # Of the frozen models there are nothing but shards.
    left = phases["optimizer step"] - rows["base"]["total_at_rest"] - gradients
    assert 0 <= left < 8 * ARGS.batch * (ARGS.prompt_length + 6 * ARGS.response_length) + 64 * 3 * TENSORS
    # In the second micro-batch all gradients are there, whichever model is updated; the activations of both critics are
    # there until the reward critic's are used.
    assert phases["update of reward critic"] > phases["update of cost critic"]


def test_tensors_with_content_take_the_same(rows, processes, monkeypatch):
    monkeypatch.setattr(memory, "pretended", lambda ranks: contextlib.nullcontext(processes[1]))
    row = measure(1)
    assert row["at_rest"] == rows["alone"]["at_rest"]
    assert row["phases"] == rows["alone"]["phases"]
