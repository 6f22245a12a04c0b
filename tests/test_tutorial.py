"""The tutorial: its diffs are what diff gives, its figures what its scripts print, its functions those of repo.py.

`python tests/test_tutorial.py` writes what its commands give into docs/from_ppo_to_repo.md.
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


def table(text: str) -> dict[str, list[float]]:
    """Reward, cost and share of safe responses in percent, by prompt."""
    rows = re.findall(r"^(\w+) +(-?[\d.]+) +(-?[\d.]+) +([\d.]+)%$", text, re.MULTILINE)
    return {name: [float(figure) for figure in figures] for name, *figures in rows}


def functions(path) -> dict[str, str]:
    source = path.read_text(encoding="utf-8")
    defined = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(source, node) for node in defined}


def test_the_page_has_a_diff_of_each_step_and_figures_of_each():
    commands = [command for command, _ in BLOCKS]
    names = [f"docs/tutorial/{path.name}" for path in STEPS]
    assert len(names) == 5
    for one, other in itertools.pairwise(names):
        assert f"diff -U 1 {one} {other} | tail -n +3" in commands
    assert {command.split()[1] for command in commands if command.startswith("python")} == set(names)


@pytest.mark.parametrize("command, shown", BLOCKS, ids=[command for command, _ in BLOCKS])
def test_each_command_of_the_page_gives_what_the_page_shows(command, shown):
    """Digit for digit but for the last, which roundings of another CPU may change."""
    numbers = re.compile(r"-?\d+\.\d+")
    given = output(command)
    assert shown, "run python tests/test_tutorial.py"
    if command.startswith("diff"):
        assert given == shown
    else:
        assert numbers.sub("#", given) == numbers.sub("#", shown)
        for one, other in zip(numbers.findall(given), numbers.findall(shown), strict=True):
            assert float(one) == pytest.approx(float(other), abs=0.02 if "." in one[-3:-2] else 0.2)


def test_the_algorithm_s_functions_are_those_of_repo_word_for_word():
    ours, before = functions(ROOT / "repo.py"), {"policy_loss"}
    for step in STEPS[1:]:
        own = functions(step)
        assert set(own) - {"score", "evaluate", "main"} == before | set(NEW[step.stem])
        before |= set(NEW[step.stem])
        assert [name for name in before if own[name] != ours[name]] == []


def test_what_the_steps_share_is_one_text():
    for name in ("score", "evaluate"):
        assert len({functions(step)[name] for step in STEPS}) == 1


def test_the_last_diff_is_that_of_ppo_lagrange_and_repo():
    """Each line of main that it takes out stands in ppo_lagrange.py, and each that it puts in stands in repo.py."""
    mains = [functions(step)["main"].splitlines() for step in STEPS[-2:]]
    for lines, others, script in ((*mains, "ppo_lagrange.py"), (*mains[::-1], "repo.py")):
        real = {line.strip() for line in (ROOT / script).read_text(encoding="utf-8").splitlines()}
        changed = [line.strip() for line in lines if line not in others]
        combined = [line for line in changed if line.startswith("advantages = ")]  # the scripts' has micro-batches
        assert len(changed) == (2 if script == "ppo_lagrange.py" else 4) and len(combined) == 1
        assert [line for line in changed if line not in real and line not in combined] == []


def test_each_step_contains_the_one_before():
    """As the page says: a multiplier of 0 is PPO, a fixed multiplier is a price."""
    assert table(output("python docs/tutorial/3_two_critics.py --lambda-init 0 --iterations 30")) == table(
        output("python docs/tutorial/2_ppo.py --iterations 30")
    )
    short = "--iterations 30 --lambda-init 0.75"
    assert output(f"python docs/tutorial/4_ppo_lagrange.py {short} --lambda-lr 0") == output(
        f"python docs/tutorial/3_two_critics.py {short}"
    )


def test_the_optima_of_the_page():
    """By linear programmes over the mean numbers of steps."""
    hazards = [0, 1, 2]
    averaged = linprog([-1 / 3] * 3, A_ub=[[h / 3 for h in hazards]], b_ub=[2.5], bounds=[(0, 4)] * 3)
    safe = [max(n for n in range(5) if h * n - 2.5 <= 0) for h in hazards]
    assert averaged.x.tolist() == pytest.approx([4, 4, 1.75])
    assert safe == [4, 2, 1]
    page = PAGE.read_text(encoding="utf-8")
    assert f"4 steps | 4 steps | 1.75 steps | {-averaged.fun:.2f} | 0.00 |" in page
    cost = sum(h * n for h, n in zip(hazards, safe, strict=True)) / 3 - 2.5
    assert f"4 steps | 2 steps | 1 step | {sum(safe) / 3:.2f} | {cost:.2f} |" in page


def test_what_the_page_says_of_the_results():
    ppo, price, cheaper, lagrange, repo, other = (
        table(output(f"python docs/tutorial/{command}"))
        for command in (
            "2_ppo.py", "3_two_critics.py", "3_two_critics.py --lambda-init 0.75", "4_ppo_lagrange.py", "5_repo.py",
            "5_repo.py --rectify advantage",
        )
    )  # fmt: skip
    slow, fast = (
        table(output(f"python docs/tutorial/{step} --iterations 30")) for step in ("1_policy_gradient.py", "2_ppo.py")
    )
    assert fast["all"][0] > slow["all"][0] + 0.5
    assert ppo["dangerous"][2] < 1 and ppo["all"][0] > 3.95
    assert price["delicate"][0] < 1 and price["all"][2] > 98  # two steps would be safe
    assert cheaper["delicate"][0] > 3.8 and cheaper["delicate"][2] < 2
    assert lagrange["all"][1] == pytest.approx(0, abs=0.1) and lagrange["all"][0] == pytest.approx(3.25, abs=0.05)
    assert lagrange["delicate"][2] < 1 and lagrange["harmless"][1] == -2.5
    assert repo["all"][0] == pytest.approx(2.33, abs=0.05) and min(row[2] for row in repo.values()) > 90
    assert other["delicate"][2] < 1


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    for found in reversed(list(SHOWN.finditer(page))):
        page = page[: found.start(2)] + output(found[1]) + page[found.end(2) :]
    PAGE.write_text(page, encoding="utf-8")
