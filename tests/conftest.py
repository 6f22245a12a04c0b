"""What all tests share: one process group in this process, tiny checkpoints and data, and a way to run the scripts."""

import functools
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before the libraries are imported: nothing is looked up on the Hub, and no cache outlives the tests.
cache = tempfile.TemporaryDirectory(prefix="tests-cache-", ignore_cleanup_errors=True)
os.environ |= {"HF_HOME": cache.name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for one another
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ.pop("HF_HUB_CACHE", None)

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from helpers import command, run_main  # noqa: E402

import ppo_lagrange  # noqa: E402
import preference_models  # noqa: E402
import repo  # noqa: E402

transformers.logging.disable_progress_bar()


# Files of few tests that take long; first of all, so that neither worker waits for the other at the end.
LONGEST = ("test_recipes.py", "test_processes.py", "test_resume.py", "test_memory.py", "test_data.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def processes():
    """(device, mesh) of a group of one process, for everything that needs one."""
    yield repo.start_processes()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> SimpleNamespace:
    """Tiny checkpoints and data that no test changes."""
    folder = tmp_path_factory.mktemp("files")
    return SimpleNamespace(
        policy=tiny.make_model(folder / "policy"),
        reward=tiny.make_model(folder / "reward", "score", seed=1),
        cost=tiny.make_model(folder / "cost", "biased_score", seed=2),
        train=tiny.write_rows(folder / "train.jsonl", tiny.make_pairs(40)),
        test=tiny.write_rows(folder / "test.jsonl", tiny.make_pairs(13, seed=1)),
    )


@pytest.fixture(scope="session")
def defaults(files) -> dict[str, dict]:
    """Flags of a short run of each script on the tiny files."""
    shared = dict(dataset=files.train, eval_dataset=files.test, eval_split="train", dtype="float32", warmup_ratio=0)
    rl = dict(model=files.policy, reward_model=files.reward, cost_model=files.cost, max_new_tokens=16)
    rl |= dict(total_episodes=32, batch_size=16, micro_batch_size=8, eval_every=0)
    pairs = dict(kind="reward", model=files.policy, epochs=1, batch_size=8, micro_batch_size=4)
    return {
        "repo": shared | rl,
        "ppo_lagrange": shared | rl | dict(lambda_max=20),  # as in repo.py
        "preference_models": shared | pairs,
    }


@pytest.fixture(scope="session")
def run(processes, defaults):
    """run(script, **flags): main() of a script in this process on the tiny files. Returns an Outcome."""

    def run(script, **flags):
        return run_main(script, processes, command(**defaults[script.__name__] | flags))

    return run


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The graphs that torch.compile traces from now on, their gradients with them; they run without a C++ compiler."""
    found, run = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        found.append(graph)
        return run(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield found
    torch.compiler.reset()


@pytest.fixture(scope="session")
def repo_run(run, tmp_path_factory) -> Path:
    """Folder of one run of repo.py: three iterations, an evaluation after the second."""
    folder = tmp_path_factory.mktemp("runs") / "repo"
    outcome = run(repo, output_dir=folder, total_episodes=48, eval_every=2)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="session")
def lagrange_run(run, tmp_path_factory) -> Path:
    """Folder of one run of ppo_lagrange.py: three iterations under a threshold that all costs keep, so that λ falls."""
    folder = tmp_path_factory.mktemp("runs") / "ppo_lagrange"
    outcome = run(ppo_lagrange, output_dir=folder, total_episodes=48, eval_every=2, cost_threshold=2, lambda_lr=0.1)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="session")
def preference_runs(run, tmp_path_factory) -> dict[str, Path]:
    """Folders of one run of preference_models.py of each kind, long enough to learn something."""
    folder = tmp_path_factory.mktemp("runs")
    train = tiny.write_rows(folder / "train.jsonl", tiny.make_pairs(600, seed=2))
    test = tiny.write_rows(folder / "test.jsonl", tiny.make_pairs(101, seed=3))
    long = dict(dataset=train, eval_dataset=test, epochs=3, batch_size=20, micro_batch_size=20, learning_rate=1e-2)
    for kind in ("reward", "cost"):
        outcome = run(preference_models, kind=kind, output_dir=folder / kind, **long)
        assert outcome.code == 0, outcome.err
    return {kind: folder / kind for kind in ("reward", "cost")}
