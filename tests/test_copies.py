"""The scripts stand alone and repeat what they share: a function of one name in two scripts must have one text."""

import ast
import sys

import pytest
from helpers import ROOT

SCRIPTS = sorted(path for path in ROOT.glob("*.py"))

# Names that differ between scripts, and why. The list is held to be true: an entry that is one text everywhere fails.
INTENDED = {
    "Args": "each script has flags of its own",
    "check_args": "each script checks its own flags",
    "main": "each script is an algorithm of its own",
}

LIBRARIES = {"torch", "transformers", "datasets", "tyro", "huggingface_hub", "tqdm"}
OPTIONAL = {"wandb"}  # only on request, inside a function


def texts() -> dict[str, dict[str, str]]:
    """For each name, its text in each script that defines it at top level, decorators included."""
    found = {}
    for path in SCRIPTS:
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found.setdefault(node.name, {})[path.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("name", sorted(name for name, copies in texts().items() if len(copies) > 1))
def test_copies_are_one_text(name):
    copies = texts()[name]
    if name in INTENDED:
        assert len(set(copies.values())) > 1, f"{name} is one text in {', '.join(copies)}: take it out of INTENDED"
        return
    (first, text), *others = copies.items()
    for script, other in others:
        assert other == text, f"{name} differs between {first} and {script}"


def test_intended_differences_exist():
    shared = {name for name, copies in texts().items() if len(copies) > 1}
    assert not set(INTENDED) - shared


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_libraries_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
            assert not getattr(node, "level", 0)
            for name in (name.partition(".")[0] for name in names):
                allowed = LIBRARIES | set(sys.stdlib_module_names) | (set() if id(node) in top_level else OPTIONAL)
                assert name in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_explain_themselves(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "torchrun" in ast.get_docstring(tree)
