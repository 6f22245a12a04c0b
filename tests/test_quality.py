"""Style, spelling and types, each by its own tool with the settings of pyproject.toml."""

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
# Types of a pure function's parameters and result
PLAIN = {"torch", "Tensor", "Generator", "device", "dtype", "float", "int", "str", "bool", "None", "list", "dict"}
PLAIN |= {"tuple", "set", "Literal", "Path", "Counter", "Sequence", "Callable", "Iterator"}


def call(tool: str, *words: str) -> subprocess.CompletedProcess:
    """A program of this environment, whether or not that is activated."""
    program = shutil.which(tool, path=sysconfig.get_path("scripts")) or shutil.which(tool)
    assert program, f"{tool} is not installed: pip install -r tests/requirements.txt"
    return subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("words", (["check"], ["format", "--check"]), ids=" ".join)
def test_ruff_has_nothing_to_say(words):
    result = call("ruff", *words, ".")
    assert result.returncode == 0, result.stdout + result.stderr


def test_spelling():
    result = call("codespell", ".")
    assert result.returncode == 0, result.stdout + result.stderr


def pure_functions() -> dict[tuple[str, str], range]:
    """Lines of each function of the scripts whose hints are complete and name tensors, numbers and texts only."""
    found = {}
    for path in SCRIPTS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                each = node.args
                parameters = [*each.args, *each.kwonlyargs, *filter(None, [each.vararg, each.kwarg])]
                hints = [*(parameter.annotation for parameter in parameters), node.returns]
                parts = [part for hint in hints if hint for part in ast.walk(hint)]
                names = {part.id for part in parts if isinstance(part, ast.Name)}
                names |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
                if all(hints) and names <= PLAIN:
                    found[path.name, node.name] = range(node.lineno, node.end_lineno + 1)
    return found


def test_types_of_the_pure_functions():
    words = ["--python-interpreter-path", sys.executable, "--output-format", "json"]
    result = call("pyrefly", "check", *words, *(path.name for path in SCRIPTS))
    errors = json.loads(result.stdout)["errors"]
    functions = pure_functions()
    wrong = [
        f"{name}:{error['line']} {function}: {error['concise_description']}"
        for error in errors
        for (name, function), lines in functions.items()
        if Path(error["path"]).name == name and error["line"] in lines
    ]
    assert wrong == []
    # The net is not empty: the algorithms' own functions are in it, and pyrefly does read the libraries.
    names = {function for _, function in functions}
    assert names >= {
        "rectify",
        "gae",
        "policy_loss",
        "dpo_loss",
        "kto_loss",
        "cost_loss",
        "bootstrap",
        "pad",
        "load_rows",
    }
    assert errors and not [error for error in errors if error["name"] == "missing-import"]


def test_each_pure_section_is_checked():
    """Every function below a ruled heading that says "pure functions" has complete hints."""
    functions, missing, sections = pure_functions(), [], 0
    for path in SCRIPTS:
        lines = path.read_text(encoding="utf-8").splitlines()
        rules = [i for i, line in enumerate(lines) if line == "# " + "=" * 118]
        for start, end in zip(rules[::2], [*rules[2::2], len(lines)], strict=True):
            if "pure functions" in lines[start + 1] and "then" not in lines[start + 1]:
                sections += 1
                inside = [line[4:].partition("(")[0] for line in lines[start:end] if line.startswith("def ")]
                missing += [(path.name, name) for name in inside if (path.name, name) not in functions]
    assert missing == [] and sections >= 3
