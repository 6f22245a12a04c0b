"""docs/adding_an_algorithm.md, done: copy a script, apply the page's patch, hold the result to the tests it names.

Where ppo_lagrange.py has changed around the patch, `PYTHONPATH=. python tests/test_adding.py` fits the page's
patch to it again.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from types import SimpleNamespace

import pytest
import test_copies
from helpers import ROOT, command, read_lines, read_summary, run_main

import ppo_lagrange

PLACE = ROOT / "docs" / "adding_an_algorithm.md"
PAGE = PLACE.read_text(encoding="utf-8")
PATCH = re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture(scope="module")
def added(tmp_path_factory, processes, defaults):
    """The script of the page, made by the page's steps, with a run of it on the tiny files."""
    folder = tmp_path_factory.mktemp("adding")
    path = folder / "ppo_pi.py"
    shutil.copy(ROOT / "ppo_lagrange.py", path)
    (folder / "pi.diff").write_text(PATCH, encoding="utf-8")
    applied = subprocess.run(["git", "apply", "pi.diff"], cwd=folder, capture_output=True, text=True)
    assert applied.returncode == 0, f"the page's patch does not fit ppo_lagrange.py any more: {applied.stderr}"
    spec = importlib.util.spec_from_file_location("ppo_pi", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = dict(total_episodes=64, cost_threshold=0.3, lambda_lr=0.05, lambda_gain=0.2, lambda_max=20, save_every=2)

    def run(name, **others):
        words = command(**defaults["ppo_lagrange"] | flags | dict(output_dir=folder / name) | others)
        return folder / name, run_main(script, processes, words)

    return SimpleNamespace(path=path, script=script, run=run)


def test_the_new_script_runs_and_its_multiplier_is_what_the_page_says(added):
    folder, outcome = added.run("run")
    assert outcome.code == 0, outcome.err
    rows, integral = read_lines(folder / "metrics.jsonl"), 1.0
    assert len(rows) == 4 and any(row["excess"] != rows[0]["excess"] for row in rows)
    for row in rows:
        integral = min(max(integral + 0.05 * row["excess"], 0), 20)
        assert row["lambda"] == pytest.approx(min(max(integral + 0.2 * row["excess"], 0), 20))
    assert read_summary(folder)["algorithm"] == "ppo_pi"
    shown = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    here = [line.strip() for line in (ROOT / "tests" / "test_adding.py").read_text(encoding="utf-8").splitlines()]
    assert [line for line in shown.splitlines() if line.strip() not in here] == []


def test_a_resumed_run_goes_on_with_the_integral(added):
    """Cut back to its first checkpoint, a run comes to the same end: the state that the page adds is whole."""
    whole, _ = added.run("whole")
    cut, _ = added.run("cut")
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "00000004")
    state = json.loads((cut / "checkpoints" / "00000002" / "state.json").read_text(encoding="utf-8"))["state"]
    assert state["integral"] != pytest.approx(state["lambda"], abs=1e-6)
    _, outcome = added.run("cut", resume=True)
    assert outcome.code == 0 and "resuming" in outcome.err
    one, other = (read_lines(folder / "metrics.jsonl") for folder in (whole, cut))
    assert [row["lambda"] for row in one] == [row["lambda"] for row in other]


def test_its_new_flag_is_checked(added):
    folder, outcome = added.run("bad", lambda_gain=-1)
    assert outcome.code == 2 and outcome.errors == ["error: --lambda-gain is -1.0; it must be 0 or more"]
    assert not folder.exists()


def test_the_test_of_copies_passes_on_it(added, monkeypatch):
    monkeypatch.setattr(test_copies, "SCRIPTS", [*test_copies.SCRIPTS, added.path])
    test_copies.texts.cache_clear()
    try:
        shared = {name for name, copies in test_copies.texts().items() if "ppo_pi.py" in copies and len(copies) > 1}
        assert len(shared) > 50
        for name in shared:
            test_copies.test_copies_are_one_text(name)
        test_copies.test_scripts_import_libraries_only(added.path)
        test_copies.test_scripts_explain_themselves(added.path)
        # ... and it can fail: a copy that drifts is told
        added.path.write_text(added.path.read_text(encoding="utf-8").replace("gae_lambda * running", "running"))
        test_copies.texts.cache_clear()
        with pytest.raises(AssertionError, match="gae differs"):
            test_copies.test_copies_are_one_text("gae")
    finally:
        monkeypatch.undo()
        test_copies.texts.cache_clear()


def test_the_page_names_what_there_is():
    """Each file and each list that the page tells to add to; ppo_pi is not in the repository."""
    for name, path in re.findall(r"`(\w+)` in \[[\w/.]+\]\(\.\./([\w/.]+)\)", PAGE):
        assert re.search(rf"^\s*(def )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name
    assert not (ROOT / "ppo_pi.py").exists()
    assert "INTENDED" in vars(test_copies) and "control_multiplier" not in vars(ppo_lagrange)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        script = shutil.copy(ROOT / "ppo_lagrange.py", folder)
        subprocess.run(["patch", "--fuzz", "3", script], input=PATCH, text=True, check=True)
        words = ["-U", "1", "--label", "a/ppo_pi.py", "--label", "b/ppo_pi.py", ROOT / "ppo_lagrange.py", script]
        fitted = subprocess.run(["diff", *words], capture_output=True, text=True).stdout
    PLACE.write_text(PAGE.replace(PATCH, fitted), encoding="utf-8")
