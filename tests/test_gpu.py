"""benchmark/gpu.py on a CPU, the packing for a machine without a network, the estimate of GPU-hours."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers import ROOT, read_json

sys.path.append(str(ROOT / "benchmark"))
import gpu

SHORT = "--total-episodes 8 --batch-size 8 --micro-batch-size 8 --max-new-tokens 4 --eval-size 2 --eval-every 0"


def start(*words, **variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=400)


def measure(folder, *words) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, ROOT / "benchmark" / "gpu.py", "--device", "cpu", "--output-dir", folder]
    return start(*command, *words), read_json(folder / "gpu.json")["parts"]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A run of all parts: its folder, and gpu.json's parts, all of which ended."""
    folder = tmp_path_factory.mktemp("kit")
    outcome, parts = measure(folder, "--shape", "tiny", f"--real={SHORT}")
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(gpu.LIMITS, "done"), outcome.stdout
    assert outcome.returncode == 0, outcome.stderr
    for name, part in parts.items():
        assert all(f"| {name} | {figure} | " in outcome.stdout for figure in part["figures"])
    return folder, parts


def test_an_update_that_differs_is_told_from_an_equal_one(kit, tmp_path):
    folder, parts = kit
    assert [value for figure, value in parts["same"]["figures"].items() if ": equal " in figure] == ["yes"] * 3
    one, changed = folder / "same" / "RePO one", tmp_path / "changed"
    shutil.copytree(one, changed)
    first = json.loads((changed / "metrics.jsonl").read_text().splitlines()[0])
    (changed / "metrics.jsonl").write_text(json.dumps(first | {"reward": first["reward"] + 0.01}) + "\n")
    metrics, gradients = gpu.first_difference(one, changed)
    assert metrics > gpu.ROUNDING and gradients == 0 and gpu.outcome(one) != gpu.outcome(changed)


def test_all_parts_give_sensible_figures(kit):
    toy, speed, profile, decode, peer, real = (kit[1][name]["figures"] for name in ("toy", *list(gpu.LIMITS)[2:]))
    assert "cpu, after: safety_compliance" in toy and "ppo_lagrange.py, after: reward" in real
    assert peer == {"TRL: status": "not carried"} or find_spec("trl")
    for name in ("repo.py, batch 16", "repo.py, batch 64", "preference_models.py", "sacpo.py"):
        assert all(value > 0 for figure, value in speed.items() if figure.startswith(name))
        assert 0.1 < speed[f"{name}: peak memory, GiB"] < 4
    assert speed["repo.py, batch 16: tokens of a response"] > 7  # of 8: nearly no response ends early
    shares = [value for figure, value in profile.items() if figure.endswith("% of the device's time")]
    assert sum(shares) == pytest.approx(100) and len(shares) >= 5
    assert min(value for figure, value in decode.items() if figure.endswith("equal tokens, %")) > 90


def test_a_part_that_fails_or_takes_too_long_ends_alone(tmp_path):
    outcome, parts = measure(tmp_path / "kit", "--parts", "toy", "real", "--real=--model nowhere", "--minutes", 0.25)
    assert outcome.returncode == 1 and parts["toy"]["status"].startswith("stopped at its limit of 2 s")
    assert parts["real"]["status"] != "done"


def test_the_commands_that_pack_are_printed_and_nothing_is_done(tmp_path):
    script, flags = ROOT / "benchmark" / "gpu_prepare.sh", ["--python", "3.12", "--folder", tmp_path / "wheels"]
    outcome = start(script, "--dry-run", *flags, "--torch", "2.10", "--with", "trl==1.9.0")
    assert (outcome.returncode, outcome.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert "torch==2.10.\\*" in outcome.stdout and "--python-version 3.12" in outcome.stdout
    assert outcome.stdout.count("trl==1.9.0") == 1 and outcome.stdout.count(f"{tmp_path}/wheels/*.whl") == 1
    assert start(script, "--dryrun").returncode == 2


def test_gpu_hours_follow_the_rates_of_a_card(tmp_path):
    figures = {"card, measured: matrix products, TFLOP/s": 800.0, "card, measured: reading memory, GB/s": 4000.0}
    figures |= {"repo.py, batch 16: update, % of the matrix rate": 50.0, "repo.py, batch 16: rollout, ms a token": 22.0}
    record = {"args": {"gradient_checkpointing": False}, "machine": {"device": "a card"}}
    (tmp_path / "gpu.json").write_text(json.dumps(record | {"parts": {"speed": {"figures": figures}}}))
    for file, rate, token, source in ((tmp_path / "gpu.json", 400e12, 1e-3, "a card"), ("", 395.6e12, 0.8e-3, "token")):
        outcome = start(ROOT / "benchmark" / "alpaca_7b.sh", "--dry-run", STAGES="repo", GPU_JSON=str(file))
        seconds = 2 * 6.6e9 * 40000 * 512 * 20 / rate + 40000 / 128 * 8 * 256 * 32 * token
        assert f"repo {seconds / 3600:.1f};" in outcome.stdout and outcome.stdout.endswith(f"{source}\n")
