"""Each flag is documented in one place, its docstring, which --help prints by tyro."""

import dataclasses
import inspect
import re

import pytest
from helpers import ROOT, run_main

import evaluate
import ppo_lagrange
import preference_models
import repo
import sacpo

RL, PAIRS = ("repo", "ppo_lagrange"), ("preference_models", "sacpo")
COMMANDS = {script.__name__: (script, script.Args, []) for script in (repo, ppo_lagrange, preference_models, sacpo)}
COMMANDS |= {
    f"evaluate {name.lower()}": (evaluate, member, [name.lower()])
    for name, member in vars(evaluate).items()
    if inspect.isclass(member) and member in getattr(evaluate.Args, "__args__", ())
}

# Flags whose text is not the same in all scripts, and why. An entry that is one text everywhere fails.
OWN_TEXT = {
    "exp_name": "an evaluation is no run",
    "seed": "what is random differs",
    "output_dir": "an evaluation goes on by itself, a run by --resume",
    "model": "what becomes of it differs",
    "models": "given by path, or named in files of answers",
    "dtype": "an evaluation has no masters",
    "cpu_offload": "an evaluation holds other models",
    "dataset": "prompts, pairs, or suites",
    "dataset_split": "prompts or pairs",
    "eval_dataset": "prompts or pairs",
    "eval_split": "prompts or pairs",
    "eval_size": "an evaluation takes all by default",
    "score_prompt_template": "an evaluation has several policies",
    "max_prompt_length": "what is dropped differs: prompts, pairs, or prompts for all models",
    "temperature": "an evaluation takes no log-probabilities",
    "batch_size": "what is counted differs: responses or pairs, an update or a writing to disk",
    "micro_batch_size": "what is counted differs: responses or pairs",
    "save_every": "what is counted differs: iterations or optimizer steps",
    "epochs": "SACPO has two stages",
    "learning_rate": "RL trains critics besides, which have their own",
    "warmup_ratio": "what is counted differs: iterations or optimizer steps",
    "weight_decay": "RL's is the policy's alone",
    "max_grad_norm": "RL trains several models",
}


def documentation(cls) -> dict[str, str]:
    """The text below each field of a dataclass, as it stands in the source."""
    found = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""$', inspect.getsource(cls), re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


TEXTS = {command: documentation(cls) for command, (_, cls, _) in COMMANDS.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_well_at_100_columns(command, processes, monkeypatch):
    """Every flag once, in the order of the source, with its whole text and its default; nothing too wide."""
    script, cls, words = COMMANDS[command]
    monkeypatch.setenv("COLUMNS", "100")
    outcome = run_main(script, processes, [*words, "--help"])
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert [line for line in lines if len(line) > 100] == []
    assert " ".join(inspect.getdoc(cls).split()) in " ".join(outcome.out.split())
    flags = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
    assert flags == ["--" + field.name.replace("_", "-") for field in dataclasses.fields(cls)]
    said = re.sub(r"\s+", "", outcome.out)  # a long word may be broken at a hyphen
    for name, text in TEXTS[command].items():
        assert re.sub(r"\s+", "", text) in said, name
    for field in dataclasses.fields(cls):
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"(default:{field.default})" in said, field.name


def test_help_without_a_command_names_the_commands(processes):
    outcome = run_main(evaluate, processes, ["--help"])
    assert outcome.code == 0
    assert all(command.split()[1] in outcome.out for command in COMMANDS if command.startswith("evaluate "))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_flag_has_a_text_in_one_style(command):
    """A phrase, not a sentence: no capital unless it is a name, no full stop."""
    texts = TEXTS[command]
    assert list(texts) == [field.name for field in dataclasses.fields(COMMANDS[command][1])]
    assert {name: text for name, text in texts.items() if text.endswith(".") or len(text) < 10} == {}
    names = ("AdamW", "K,", "P-SACPO", "Hub", "JSON", "W&B", "OpenAI", "URL", "EOS", "CSV", "HTML")
    assert {name: text for name, text in texts.items() if text[0] in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            and not text.startswith(names)} == {}  # fmt: skip


def test_a_flag_of_two_scripts_has_one_text():
    names = {name for texts in TEXTS.values() for name in texts}
    differ = {name for name in names if len({texts[name] for texts in TEXTS.values() if name in texts}) > 1}
    shared = {name for name in names if sum(name in texts for texts in TEXTS.values()) > 1}
    assert differ == set(OWN_TEXT) & shared
    for group in (RL, PAIRS):
        one, other = (TEXTS[command] for command in group)
        shared = {"epochs", "model", "dataset", "seed", "micro_batch_size"} if group is PAIRS else set()
        assert {name for name in one if name in other and one[name] != other[name]} <= shared


def test_no_page_repeats_a_flag_text():
    """The pages explain and link; what a flag means stands in its docstring alone."""
    paths = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    paths.remove(ROOT / "docs" / "bad_inputs.md")  # what the scripts say
    pages = {path.name: re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8")) for path in paths}  # no code
    long = {text for texts in TEXTS.values() for text in texts.values() if len(text) > 40}
    assert [(page, text) for page, content in pages.items() for text in long if text in " ".join(content.split())] == []
    # ... nor has a table with a row for each flag
    tables = {page: re.findall(r"^\| `--[a-z-]+` \|", content, re.MULTILINE) for page, content in pages.items()}
    assert {page: rows for page, rows in tables.items() if len(rows) > 1} == {}
