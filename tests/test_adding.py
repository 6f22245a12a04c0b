"""docs/adding_an_algorithm.md, done: copy a script, apply the page's patch, hold the result to the page.

`PYTHONPATH=. python tests/test_adding.py` makes the page's patch anew where ppo_lagrange.py has moved on.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT, command, read_lines, read_summary, run_main

PATH = ROOT / "docs" / "adding_an_algorithm.md"
PAGE = PATH.read_text(encoding="utf-8")
PATCH = re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture(scope="module")
def added(tmp_path_factory, processes, defaults):
    """run(name, **flags): the script of the page, made by the page's steps, on the tiny files."""
    folder = tmp_path_factory.mktemp("adding")
    shutil.copy(ROOT / "ppo_lagrange.py", folder / "ppo_pi.py")
    (folder / "pi.diff").write_text(PATCH, encoding="utf-8")
    applied = subprocess.run(["git", "apply", "pi.diff"], cwd=folder, capture_output=True, text=True)
    assert applied.returncode == 0, f"the page's patch does not fit, run python tests/test_adding.py: {applied.stderr}"
    spec = importlib.util.spec_from_file_location("ppo_pi", folder / "ppo_pi.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = dict(total_episodes=64, cost_threshold=0.3, lambda_lr=0.05, lambda_gain=0.2, lambda_max=20, save_every=2)

    def run(name, **others):
        words = command(**defaults["ppo_lagrange"] | flags | others, output_dir=name)
        assert run_main(script, processes, words).code == 0
        return name

    return run


def test_the_new_script_runs_and_a_resumed_run_continues_with_its_state(added, tmp_path):
    folder = added(tmp_path / "run")
    rows, integral = read_lines(folder / "metrics.jsonl"), 1.0
    assert len(rows) == 4 and any(row["excess"] != rows[0]["excess"] for row in rows)
    for row in rows:
        integral = min(max(integral + 0.05 * row["excess"], 0), 20)
        assert row["lambda"] == pytest.approx(min(max(integral + 0.2 * row["excess"], 0), 20))
    assert read_summary(folder)["algorithm"] == "ppo_pi"
    # Cut back to its first checkpoint, it comes to the same end: the state that the page adds is whole.
    (folder / "summary.json").unlink()
    for checkpoint in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    state = json.loads(next((folder / "checkpoints").glob("*2/state.json")).read_text(encoding="utf-8"))
    assert state["integral"] != pytest.approx(state["lambda"], abs=1e-6)
    added(folder, resume=True)
    assert [row["lambda"] for row in read_lines(folder / "metrics.jsonl")] == [row["lambda"] for row in rows]


def test_the_page_names_what_there_is():
    for name, path in re.findall(r"`(\w+)` in \[[\w/.]+\]\(\.\./([\w/.]+)\)", PAGE):
        assert re.search(rf"^\s*(def )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for name in ("a", "b"):
            Path(place, name).mkdir()
            shutil.copy(ROOT / "ppo_lagrange.py", Path(place, name, "ppo_pi.py"))
        subprocess.run(["patch", "-p1", "--fuzz", "3", "-d", f"{place}/b"], input=PATCH, text=True, check=True)
        files = ["--label", "a/ppo_pi.py", "a/ppo_pi.py", "--label", "b/ppo_pi.py", "b/ppo_pi.py"]
        made = subprocess.run(["diff", "-U", "1", *files], cwd=place, capture_output=True, text=True).stdout
    PATH.write_text(PAGE.replace(PATCH, made), encoding="utf-8")
