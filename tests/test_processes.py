"""The same run over one, two and four processes, of every script.

Gradients of the first update differ by the order of sums in float32 only. Adam divides a gradient by its size: the few
weights whose gradient is all rounding may move by the learning rate in either direction."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import SCRIPTS, assert_near, command, read_lines, read_summary, recorded_updates, run_main
from helpers import without_times as timeless
from safetensors.torch import load_file

import repo

# 13 held-out prompts are no multiple of 2 or 4, and 3 does not divide the responses of a process.
RUNS = {
    "response": ("repo", dict(micro_batch_size=3, cost_threshold=-0.5)),
    "prompt": ("repo", dict(constraint="prompt", responses_per_prompt=2, rectify="advantage", update_epochs=2)),
    "average": ("ppo_lagrange", dict(responses_per_prompt=2, cost_threshold=0.5, ptx_coef=4, micro_batch_size=3)),
    "group": ("repo_group", dict(constraint="prompt", responses_per_prompt=4, micro_batch_size=3, cost_threshold=0.2)),
    "cost": ("preference_models", dict(kind="cost", micro_batch_size=1)),
    "dpo": ("sacpo", dict(loss="dpo", merge_q=0.5, micro_batch_size=3)),
    "kto": ("sacpo", dict(loss="kto", stages=["safe"], micro_batch_size=3)),
}
WORLDS = {1: list(RUNS), 2: list(RUNS), 4: ["average", "group", "cost", "dpo"]}
PAIRS = [(world, name) for world, names in WORLDS.items() if world != 1 for name in names]


def main(folder, jobs):
    """What every process does: all the runs, one after the other, in one process group."""
    processes = repo.start_processes()
    for name, (script, words) in jobs.items():
        script = SCRIPTS[script]
        with recorded_updates() as updates:
            outcome = run_main(script, processes, [*words, "--output-dir", f"{folder}/{name}"])
        if outcome.code:
            sys.exit(f"{name}: {outcome}")
        models = 3 if hasattr(script.Args, "reward_critic") else 1
        if dist.get_rank() == 0:
            torch.save(updates[:models], f"{folder}/{name}/updates.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(forks, defaults, tmp_path_factory):
    """For each number of processes, a folder with its runs."""
    rows = [{"prompt": row["prompt"], "response": row["response_1"]} for row in tiny.make_pairs(25, seed=4)]
    supervised = tiny.write_rows(tmp_path_factory.mktemp("supervised") / "rows.jsonl", rows)
    found, started = {}, []
    for world, names in WORLDS.items():
        found[world], jobs = tmp_path_factory.mktemp(f"world{world}"), {}
        for name in names:
            script, flags = RUNS[name]
            flags = defaults[script] | flags | (dict(ptx_dataset=supervised) if name == "average" else {})
            jobs[name] = script, command(**flags)
        (found[world] / "jobs.json").write_text(json.dumps(jobs))
        started.append(forks.start([__file__, found[world]], world))
    for outcome in (outcome for processes in started for outcome in processes.finish(400)):
        assert outcome.code == 0, f"{outcome.out}\n{outcome.err}"
    return found


def near(line, expected, tolerance):
    """A row against another: floats and lists of them within rounding, everything else equal."""
    line, expected = timeless(line), timeless(expected)
    if line.get("step") == 1:  # a policy that is its reference has log-ratios that are zero or rounding
        line.pop("pair_accuracy"), expected.pop("pair_accuracy")
    assert line.keys() == expected.keys()
    for name, value in expected.items():
        within = name in ("scores", "log_ratios") or isinstance(value, float | dict)
        assert line[name] == (pytest.approx(value, rel=tolerance, abs=tolerance) if within else value), name


@pytest.mark.parametrize("world, name", PAIRS)
def test_a_run_over_processes_is_the_run_of_one(folders, world, name):
    """The same gradients; the same responses, word for word, in the same order, each once; weights and metrics."""
    one, other = folders[1] / name, folders[world] / name
    updates = zip(torch.load(one / "updates.pt"), torch.load(other / "updates.pt"), strict=True)
    for (parameters, gradients), (other_parameters, other_gradients) in updates:
        assert all(map(torch.equal, parameters, other_parameters))
        assert_near(other_gradients, gradients, 1e-5)
    for log, tolerance in (("metrics.jsonl", 2e-4), ("eval.jsonl", 1e-3)):
        for line, expected in zip(read_lines(other / log), read_lines(one / log), strict=True):
            near(line, expected, tolerance)
    summary, expected = read_summary(other), read_summary(one)
    assert (expected["processes"], summary["processes"]) == (1, world)
    chosen = [name for name in ("before", "after", "eval", "data", "episodes", "pairs") if name in expected]
    near({name: summary[name] for name in chosen}, {name: expected[name] for name in chosen}, 1e-3)
    weights, other_weights = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == other_weights.keys()
    differences = torch.cat([(weights[key] - other_weights[key]).abs().flatten() for key in weights])
    assert (differences > 1e-5).float().mean() < 0.01 and differences.max() <= 2 * 1e-3 * 10  # learning rate, steps


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[1], "jobs.json").read_text()))
