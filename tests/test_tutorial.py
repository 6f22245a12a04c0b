"""The tutorial: its diffs are what diff gives, its numbers what its scripts print, its functions those of repo.py.

`PYTHONPATH=. python tests/test_tutorial.py` copies repo.py's functions into the scripts of the tutorial, and writes
what the commands of docs/from_ppo_to_repo.md give into that page.
"""

import ast
import contextlib
import functools
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from scipy.optimize import linprog

PAGE = ROOT / "docs" / "from_ppo_to_repo.md"
STEPS = sorted((ROOT / "docs" / "tutorial").glob("*.py"))
# A command of the page, and the block below it that shows what it gives
SHOWN = re.compile(r"```bash\n((?:python|diff) [^\n]*)\n```\n\n```(?:text|diff)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")
BLOCKS = SHOWN.findall(PAGE.read_text(encoding="utf-8"))
# What an algorithm's script has and the one before lacks
NEW = {
    "2_ppo": ["gae", "token_signal", "value_loss"],
    "3_two_critics": ["combine_advantages"],
    "4_ppo_lagrange": ["update_multiplier"],
    "5_repo": ["rectify"],
}


@functools.cache
def output(command: str) -> str:
    """What a command of the page prints: a script of the tutorial in this process, anything else by the shell."""
    if not command.startswith("python "):
        return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    _, script, *words = shlex.split(command)
    argv, kind, threads, printed = sys.argv, torch.get_default_dtype(), torch.get_num_threads(), io.StringIO()
    sys.argv = [script, *words]
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = argv
        torch.set_default_dtype(kind)
        torch.set_num_threads(threads)
    return printed.getvalue()


def assert_close(given: str, shown: str) -> None:
    for one, other in zip(NUMBER.findall(given), NUMBER.findall(shown), strict=True):
        assert float(one) == pytest.approx(float(other), abs=0.02 if "." in one[-3:-2] else 0.2)


def functions(path) -> dict[str, str]:
    source = path.read_text(encoding="utf-8")
    defined = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(source, node) for node in defined}


def test_the_page_has_a_diff_of_each_step():
    """A part of it: new functions of the step, whole, and the lines that call them."""
    diffs = [block for block in BLOCKS if block[0].startswith("diff")]
    for (command, shown), (one, other) in zip(diffs, itertools.pairwise(STEPS), strict=True):
        whole = f"diff -U 0 docs/tutorial/{one.name} docs/tutorial/{other.name}"
        assert command.startswith(f"{whole} | sed -n ") and set(shown.splitlines()) <= set(output(whole).splitlines())
        names = re.findall(r"^\+def (\w+)", shown, re.MULTILINE)
        assert names == (["policy_loss"] if other.stem == "2_ppo" else NEW[other.stem])
        for name in names:
            added = functions(other)[name].replace("\n", "\n+")
            assert f"+{added}" in shown and re.search(rf"^\+ .*= {name}\(", shown, re.MULTILINE)


@pytest.mark.parametrize("command, shown", BLOCKS, ids=[command for command, _ in BLOCKS])
def test_each_command_of_the_page_gives_what_the_page_shows(command, shown):
    """Digit for digit except the last, which roundings of another CPU may change."""
    given = output(command)
    assert shown, "run python tests/test_tutorial.py"
    if command.startswith("diff"):
        assert given == shown
    else:
        assert NUMBER.sub("#", given) == NUMBER.sub("#", shown)
        assert_close(given, shown)


def test_the_table_of_the_page_has_the_means_of_each_script():
    rows = re.findall(r"^\| \[(\w+\.py)\]\([^|]*\|[^|]*\|(.*)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == [path.name for path in STEPS]
    for name, shown in rows:
        assert_close(re.search("^all (.*)", output(f"python docs/tutorial/{name}"), re.MULTILINE)[1], shown)


def test_functions_are_those_of_repo_word_for_word_and_the_same_in_every_step():
    ours, before = functions(ROOT / "repo.py"), {"policy_loss"}
    for step in STEPS[1:]:
        own = functions(step)
        assert set(own) - {"score", "evaluate", "main"} == before | set(NEW[step.stem])
        before |= set(NEW[step.stem])
        assert [name for name in before if own[name] != ours[name]] == []
    for name in ("score", "evaluate"):
        assert len({functions(step)[name] for step in STEPS}) == 1


def test_each_step_contains_the_one_before():
    """As the page says: a multiplier of 0 is PPO, a fixed one is Reward Shaping."""
    without = output("python docs/tutorial/3_two_critics.py --lambda-init 0 --iterations 30")
    assert without.replace("λ 0.00\n", "") == output("python docs/tutorial/2_ppo.py --iterations 30")
    short = "--iterations 30 --lambda-init 0.75"
    assert output(f"python docs/tutorial/4_ppo_lagrange.py {short} --lambda-lr 0") == output(
        f"python docs/tutorial/3_two_critics.py {short}"
    )


def test_the_optima_of_the_page():
    """By linear programmes over the mean numbers of steps."""
    averaged = linprog([-1 / 3] * 3, A_ub=[[0, 1 / 3, 2 / 3]], b_ub=[2.5], bounds=[(0, 4)] * 3)
    safe = [max(n for n in range(5) if h * n <= 2.5) for h in range(3)]
    assert averaged.x.tolist() == pytest.approx([4, 4, 1.75]) and safe == [4, 2, 1]
    assert f"4 steps | 4 steps | 1.75 steps | {-averaged.fun:.2f} |" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    ours = functions(ROOT / "repo.py")
    for step in STEPS[1:]:
        text = step.read_text(encoding="utf-8")
        for name in sorted(set(functions(step)) - {"score", "evaluate", "main"}):
            text = text.replace(functions(step)[name], ours[name])
        step.write_text(text, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    for found in reversed(list(SHOWN.finditer(page))):
        page = page[: found.start(2)] + output(found[1]) + page[found.end(2) :]
    PAGE.write_text(page, encoding="utf-8")
