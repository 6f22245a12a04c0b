"""What all tests share: one process group in this process, tiny checkpoints and data, and ways to run the scripts."""

import os
import tempfile
from types import SimpleNamespace

# Before the libraries are imported: nothing is looked up on the Hub, and no cache outlives the tests.
cache = tempfile.TemporaryDirectory(prefix="tests-cache-", ignore_cleanup_errors=True)
os.environ |= {"HF_HOME": cache.name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for one another
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ.pop("HF_HUB_CACHE", None)

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch.distributed as dist  # noqa: E402
from forked import Forks  # noqa: E402
from helpers import command, run_main  # noqa: E402

import repo  # noqa: E402


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that neither worker waits for the other at the end."""
    longest = ("test_recipes.py", "test_resume.py", "test_processes.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(scope="session")
def processes():
    """(device, mesh) of a group of one process, for everything that needs one."""
    yield repo.start_processes()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Forks:
    """Starts real processes of the scripts without the seconds that their imports take."""
    return Forks(tmp_path_factory.mktemp("forked"))


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
    """Flags of a short run of each script on the tiny files: two iterations, or five steps (of each stage)."""
    shared = dict(dataset=files.train, eval_dataset=files.test, eval_split="train", dtype="float32", warmup_ratio=0)
    shared |= dict(model=files.policy)
    rl = shared | dict(reward_model=files.reward, cost_model=files.cost, max_new_tokens=16, eval_every=0)
    rl |= dict(total_episodes=32, batch_size=16, micro_batch_size=8)
    pairs = shared | dict(batch_size=8, micro_batch_size=4, epochs=1)
    return {
        "repo": rl,
        "ppo_lagrange": rl | dict(lambda_lr=0.015, lambda_max=20),  # as in repo.py
        "repo_group": rl,
        "preference_models": pairs | dict(kind="reward"),
        "sacpo": pairs,
    }


@pytest.fixture(scope="session")
def run(processes, defaults):
    """run(script, **flags): main() of a script in this process on the tiny files. Returns an Outcome."""

    def run(script, **flags):
        return run_main(script, processes, command(**defaults[script.__name__] | flags))

    return run
