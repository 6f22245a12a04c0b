"""The same run over one, two and four processes, over two nodes of two, and in other micro-batches, by torchrun.

Compared are the gradients of the first update, which differ by the order of sums in float32 only, then all metrics,
responses and weights. Weights get a test of their own: Adam divides a gradient by its size, so that an entry whose
gradient is all rounding may move by the learning rate in either direction. Those entries are few, and are counted.
"""

import contextlib
import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    changed,
    command,
    finish,
    read_lines,
    read_summary,
    recorded_updates,
    run_main,
    start,
    start_nodes,
    without_times,
)
from safetensors.torch import load_file

import ppo_lagrange
import preference_models
import repo

# 13 held-out prompts are no multiple of 2 or 4, and 3 does not divide the responses of a process.
RUNS = {
    "response": ("repo", dict(micro_batch_size=3, cost_threshold=-0.5)),
    "larger": ("repo", dict(micro_batch_size=8, cost_threshold=-0.5)),
    "prompt": (
        "repo",
        dict(constraint="prompt", responses_per_prompt=2, rectify="advantage", update_epochs=2, temperature=0.8),
    ),
    "average": ("ppo_lagrange", dict(responses_per_prompt=2, cost_threshold=0.5, ptx_coef=4, micro_batch_size=3)),
    "cost": ("preference_models", dict(kind="cost", micro_batch_size=1)),
}
WORLDS = [1, 2, 4, "2x2"]
# What changes nothing may differ between the worlds: how sampling gathers the policy, what shares its shards, and
# whether blocks, here with their shards, are compiled.
CHANGES = {
    4: dict(response=dict(no_whole_rollout=True), cost=dict(compile=True)),
    "2x2": dict(average=dict(shard_over="world")),
}
NUMBERS = {"reward", "cost", "scores", "loss"}


def main(folder, jobs):
    """What every process of torchrun does: all the runs, one after the other, in one process group."""
    processes = repo.start_processes()
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # spares the time of a C++ compiler
    for name, (script, words) in jobs.items():
        module = {"repo": repo, "ppo_lagrange": ppo_lagrange, "preference_models": preference_models}[script]
        meshes, shard = [], module.shard

        def recorded(model, mesh, *settings, meshes=meshes, shard=shard):
            sharded = shard(model, mesh, *settings)
            meshes.append(list(next(sharded.parameters()).device_mesh.shape))
            return sharded

        # Two processes have copies of these models, as they are small; the others shard them like large ones.
        held = {"shard": recorded, "is_small": lambda model: dist.get_world_size() == 2}
        with recorded_updates(module) as updates, changed(module, **held):
            outcome = run_main(module, processes, [*words, "--output-dir", f"{folder}/{name}"])
        if outcome.code:
            sys.exit(f"{name}: {outcome}")
        if dist.get_rank() == 0:
            torch.save(updates[:3], f"{folder}/{name}/updates.pt")
            Path(folder, name, "mesh.json").write_text(json.dumps(meshes))
    repo.shut_down()


@pytest.fixture(scope="module")
def folders(defaults, tmp_path_factory):
    """For each number of processes, a folder with all runs; two processes make the first run twice."""
    rows = [{"prompt": row["prompt"], "response": row["response_1"]} for row in tiny.make_pairs(25, seed=4)]
    supervised = tiny.write_rows(tmp_path_factory.mktemp("supervised") / "rows.jsonl", rows)
    started = {}
    for world in WORLDS:
        folder, jobs = tmp_path_factory.mktemp(f"world{world}"), {}
        for name, (script, flags) in RUNS.items():
            flags = defaults[script] | flags | (dict(ptx_dataset=supervised) if name == "average" else {})
            jobs[name] = script, command(**flags | CHANGES.get(world, {}).get(name, {}))
        if world == 2:
            jobs["again"] = jobs["response"]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        program = dict(program=[__file__, folder], python_path=ROOT)
        started[world] = (
            folder,
            (start_nodes(2, 2, **program) if world == "2x2" else [start(processes=world, **program)]),
        )
    with contextlib.ExitStack() as stack:
        for _, processes in started.values():
            for process in processes:
                stack.callback(process.terminate)
        for folder, processes in started.values():
            for process in processes:
                outcome = finish(process, seconds=400)
                assert outcome.code == 0, f"{folder}:\n{outcome.out}\n{outcome.err}"
    yield {world: folder for world, (folder, _) in started.items()}
    for folder, _ in started.values():
        shutil.rmtree(folder)


PAIRS = [(1, name, world, name) for name in RUNS for world in WORLDS[1:]]
PAIRS += [(1, "response", 1, "larger")]
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "{}-{} {}-{}".format(*pair))


def both(folders, pair):
    world, name, other_world, other_name = pair
    return folders[world] / name, folders[other_world] / other_name


@EVERY_PAIR
def test_gradients_of_the_first_update_are_equal(folders, pair):
    """Entry by entry, to a hundred-thousandth of the largest entry of the model's gradient."""
    one, other = (torch.load(folder / "updates.pt") for folder in both(folders, pair))
    for (one_state, one_gradients), (other_state, other_gradients) in list(zip(one, other, strict=True)):
        if pair[1] == "cost" and one_state is not one[0][0]:
            break  # later ones are later steps
        assert one_gradients.keys() == other_gradients.keys()
        scale = max(gradient.abs().max() for gradient in one_gradients.values())
        for name, gradient in one_gradients.items():
            assert torch.equal(one_state[name], other_state[name]), name
            assert (gradient - other_gradients[name]).abs().max() <= 1e-5 * scale, name
        assert scale > 1e-3


@EVERY_PAIR
def test_metrics_are_equal(folders, pair):
    one, other = (read_lines(folder / "metrics.jsonl") for folder in both(folders, pair))
    assert len(one) == len(other) > 1
    for line, expected in zip(other, one, strict=True):
        assert without_times(line) == pytest.approx(without_times(expected), rel=1e-4, abs=1e-5)


@EVERY_PAIR
def test_evaluations_are_equal(folders, pair):
    """The same responses, word for word, in the same order, each once; scores within rounding."""
    one, other = both(folders, pair)
    rows, expected_rows = read_lines(other / "eval.jsonl"), read_lines(one / "eval.jsonl")
    assert len(rows) == len(expected_rows) == (13 if pair[1] == "cost" else 26)
    for row, expected in zip(rows, expected_rows, strict=True):
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, abs=1e-4) if name in NUMBERS else value)
    summary, expected = (without_times(read_summary(folder)) for folder in (other, one))
    processes = summary.pop("processes", None), expected.pop("processes", None)
    assert processes in ((4 if pair[2] == "2x2" else pair[2], pair[0]), (None, None))
    for name, value in expected.items():
        assert summary[name] == (pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, dict | float) else value)


@EVERY_PAIR
def test_weights_are_equal(folders, pair):
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in both(folders, pair))
    assert one.keys() == other.keys()
    differences = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
    learning_rate, steps = 1e-3, 5
    assert (differences > 1e-3 * learning_rate).float().mean() < 0.01
    assert differences.max() <= 2 * learning_rate * steps


def test_several_nodes_shard_inside_each_and_replicate_across(folders):
    """Every model of a run, on a mesh of [copies, processes that share one], unless all processes shall share one."""
    expected = [("2x2", "response", [2, 2]), ("2x2", "average", [4]), (4, "response", [4]), (2, "response", [2, 1])]
    for world, name, shape in expected:
        models = json.loads((folders[world] / name / "mesh.json").read_text())
        assert models == [shape] * 6


def test_two_runs_with_one_seed_are_the_same(folders):
    one, other = folders[2] / "response", folders[2] / "again"
    assert without_times(read_summary(one)) == without_times(read_summary(other))
    for name in ("eval.jsonl", "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[1], "jobs.json").read_text()))
