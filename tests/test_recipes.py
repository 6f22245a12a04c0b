"""benchmark/alpaca_7b.sh and llama_3b.sh: their commands against the command lines of the scripts, and whole runs."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import tyro
from helpers import ROOT, read_lines, read_summary
from torch.distributed.run import parse_args as parse_torchrun
from transformers import AutoModelForCausalLM

import evaluate
import ppo_lagrange
import preference_models
import repo
import sacpo

SCRIPTS = {f"{script.__name__}.py": script for script in (evaluate, ppo_lagrange, preference_models, repo, sacpo)}
BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"
# https://huggingface.co/datasets/tatsu-lab/alpaca, column `text`, of a row without input
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
RL = dict(
    dataset="PKU-Alignment/PKU-SafeRLHF", dataset_split="train",
    eval_dataset="PKU-Alignment/PKU-SafeRLHF", eval_split="test",
    batch_size=8 * 16, micro_batch_size=16, max_prompt_length=256, max_new_tokens=256, responses_per_prompt=1,
    update_epochs=1, temperature=1, learning_rate=1e-5, weight_decay=0.01, warmup_ratio=0.03, critic_learning_rate=5e-6,
    kl_coef=0.01, lambda_init=1, lambda_lr=0.1, lambda_max=5, cost_threshold=0, gae_lambda=0.95, clip_coef=0.2,
    value_clip_coef=5, ptx_dataset="tatsu-lab/alpaca", ptx_coef=16, dtype="auto", gradient_checkpointing=True,
    resume=True, total_episodes=40000, save_every=50, seed=1,
)  # fmt: skip
PREFERENCES = dict(
    dataset="PKU-Alignment/PKU-SafeRLHF", epochs=2, batch_size=8 * 16, micro_batch_size=16, learning_rate=2e-5,
    weight_decay=0.1, warmup_ratio=0.03, max_length=512, regularization=0.001, gradient_checkpointing=True, resume=True,
)  # fmt: skip
SACPO = dict(
    dataset="PKU-Alignment/PKU-SafeRLHF-30K", eval_dataset="PKU-Alignment/PKU-SafeRLHF-30K", train_size=0, epochs=3,
    batch_size=8 * 16 * 2, micro_batch_size=16, learning_rate=2e-5, warmup_ratio=0.03, max_prompt_length=128,
    max_length=512, stages=("helpful", "safe"), loss=("dpo",), beta=0.1, beta_over_lambda=0.025,
    merge_q=(0.25, 0.5, 0.75), gradient_checkpointing=True, resume=True,
)  # fmt: skip
SUITES = ["I-MaliciousInstructions", "I-CoNa", "I-Controversial", "I-PhysicalSafetyUnsafe", "I-PhysicalSafetySafe"]
SUITES += ["Q-Harm", "I-Alpaca"]


def environment(**settings) -> dict[str, str]:
    """The test's environment with variables of the recipe; torchrun is the one beside this python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | {name: str(value) for name, value in settings.items()}


def start(recipe: str, *words: str, **settings) -> subprocess.CompletedProcess:
    command = [str(ROOT / "benchmark" / recipe), *words]
    return subprocess.run(command, env=environment(**settings), capture_output=True, text=True, timeout=300)


def printed(recipe: str, **settings) -> list[list[str]]:
    """The commands that --dry-run prints, in words: bash reads them with functions in the place of the programs."""
    outcome = start(recipe, "--dry-run", **settings)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    functions = "".join(
        f'{name}() {{ printf "%s\\0" {name} "$@" END; }}\n' for name in ["torchrun", "trl", "git", "mv", "rm"]
    )
    words = subprocess.run(["bash"], input=functions + outcome.stdout, capture_output=True, text=True, check=True)
    assert words.stderr == ""
    commands = [[]]
    for word in words.stdout.split("\0")[:-1]:
        commands[-1].append(word) if word != "END" else commands.append([])
    return commands[:-1]


def launched(commands: list[list[str]]) -> dict[str, tuple]:
    """What torchrun would start, by output directory: (its own settings, the script's name, the script's Args)."""
    found = {}
    for _, *words in (command for command in commands if command[0] == "torchrun"):
        launcher = parse_torchrun(words)
        path = Path(launcher.training_script)
        assert path == ROOT / path.name
        args = tyro.cli(SCRIPTS[path.name].Args, args=launcher.training_script_args)
        assert args.output_dir not in found
        found[args.output_dir] = (launcher, path.name, args)
    return found


def holds(args, **settings) -> None:
    assert {name: getattr(args, name) for name in settings} == settings


def test_the_commands_for_alpaca_have_the_settings_of_the_papers():
    commands = printed("alpaca_7b.sh")
    runs = launched(commands)
    out = "runs/alpaca_7b-1"
    assert list(runs) == [f"{out}/{name}" for name in ("repo", "ppo_lagrange", "sacpo-dpo", "evaluate/saferlhf")] + [
        f"{out}/evaluate/{name}" for name in [*SUITES, "xstest"]
    ]
    policy = dict(model="PKU-Alignment/alpaca-7b-reproduced", prompt_template=BEAVER)
    scores = dict(reward_model="PKU-Alignment/beaver-7b-v1.0-reward", cost_model="PKU-Alignment/beaver-7b-v1.0-cost")
    for name in ("repo", "ppo_lagrange"):
        launcher, script, args = runs[f"{out}/{name}"]
        assert script == f"{name}.py"
        assert (launcher.nproc_per_node, launcher.nnodes, launcher.standalone) == ("8", "1:1", True)
        assert launcher.shutdown_timeout == 1800
        holds(args, **RL, **policy, **scores, score_prompt_template=BEAVER)
    holds(runs[f"{out}/repo"][2], constraint="response", rectify="cost")
    _, script, args = runs[f"{out}/sacpo-dpo"]
    assert script == "sacpo.py"
    holds(args, **SACPO, **policy)
    models = [f"sft={policy['model']}", f"repo={out}/repo/model", f"ppo-lagrange={out}/ppo_lagrange/model"]
    models.append(f"sacpo-dpo={out}/sacpo-dpo/model")
    for name in ["saferlhf", *SUITES]:
        _, script, args = runs[f"{out}/evaluate/{name}"]
        assert script == "evaluate.py"
        data = f"{out}/safety-tuned-llamas/data/evaluation/{name}.json" if name in SUITES else RL["dataset"]
        holds(args, **scores, models=models, prompt_template=BEAVER, score_prompt_template=BEAVER, dataset=data)
        holds(args, dataset_split="test", max_prompt_length=256, max_new_tokens=256, temperature=1, eval_size=0)
    holds(runs[f"{out}/evaluate/xstest"][2], **scores, models=models, suites=["xstest=Paul/XSTest"])
    clone = ["git", "clone", "--quiet", "--depth", "1", "https://github.com/vinid/safety-tuned-llamas"]
    assert [*clone, f"{out}/safety-tuned-llamas.part"] == commands[1]


def test_the_commands_for_llama_train_its_own_score_models_and_ask_beaver_in_the_end():
    commands = printed("llama_3b.sh", SEED=3)
    runs = launched(commands)
    out = "runs/llama_3b-3"
    program, stage, *words = commands[0]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert (program, stage, flags["--model_name_or_path"]) == ("trl", "sft", "meta-llama/Llama-3.2-3B")
    assert (flags["--dataset_name"], flags["--dataset_text_field"]) == ("tatsu-lab/alpaca", "text")
    assert commands[1] == ["mv", flags["--output_dir"], f"{out}/sft"]
    for kind in ("reward", "cost"):
        _, script, args = runs[f"{out}/{kind}"]
        assert script == "preference_models.py"
        holds(args, **PREFERENCES, kind=kind, model=f"{out}/sft", prompt_template=ALPACA, seed=3)
    scores = dict(reward_model=f"{out}/reward/model", cost_model=f"{out}/cost/model")
    for name in ("repo", "ppo_lagrange"):
        args = runs[f"{out}/{name}"][2]
        holds(args, **RL | dict(seed=3), **scores, model=f"{out}/sft", prompt_template=ALPACA)
        assert args.score_prompt_template == ALPACA
    holds(runs[f"{out}/sacpo-dpo"][2], **SACPO, model=f"{out}/sft", prompt_template=ALPACA)
    args = runs[f"{out}/evaluate/Q-Harm"][2]
    holds(args, prompt_template=ALPACA, score_prompt_template=BEAVER, cost_model="PKU-Alignment/beaver-7b-v1.0-cost")
    assert args.models[0] == f"sft={out}/sft"


def test_variables_of_the_environment_reach_the_commands(tmp_path):
    """A path with a space and a quote, several nodes, fewer stages, more flags, of which the last counts."""
    out = f"{tmp_path}/it's here"
    nodes = dict(NNODES=2, NODE_RANK=1, RDZV_ENDPOINT="host0:29500", GPUS=4)
    commands = printed("alpaca_7b.sh", OUT=out, STAGES="cost repo", RL_EXTRA="--cpu-offload --kl-coef 0.02", **nodes)
    runs = launched(commands)
    assert list(runs) == [f"{out}/cost", f"{out}/repo"]
    launcher, _, args = runs[f"{out}/repo"]
    holds(launcher, nnodes="2", node_rank=1, rdzv_backend="c10d", rdzv_endpoint="host0:29500", nproc_per_node="4")
    assert not launcher.standalone and launcher.rdzv_id == "repo"
    holds(args, cpu_offload=True, kl_coef=0.02, cost_model=f"{out}/cost/model", batch_size=128)
    assert args.reward_model == "PKU-Alignment/beaver-7b-v1.0-reward"
    assert not Path(out).exists()
    # One's own fine-tuned model takes the place of the stage; the other nodes leave the cloning to the first one.
    commands = printed(
        "llama_3b.sh", OUT=out, MODEL="mine", STAGES="sft evaluate", SUITE_NAMES="Q-Harm", XSTEST="", **nodes
    )
    assert [command[0] for command in commands] == ["torchrun"] * 2
    assert launched(commands)[f"{out}/evaluate/Q-Harm"][2].models == ["sft=mine"]


@pytest.mark.parametrize("recipe", ["alpaca_7b.sh", "llama_3b.sh"])
@pytest.mark.parametrize(
    "words, settings, said",
    [
        (["--dryrun"], {}, "error: there is no flag --dryrun, only --dry-run"),
        ([], {"STAGES": "repo ppo"}, "error: STAGES: there is no stage ppo"),
        ([], {"GPUS": "all"}, "error: GPUS is 'all'"),
        ([], {"NNODES": "2"}, "error: NNODES is 2: give RDZV_ENDPOINT"),
        ([], {"SUITES": "nowhere", "STAGES": "evaluate"}, "error: SUITES: there is no nowhere/I-MaliciousInstructions"),
    ],
)
def test_mistakes_are_told_before_anything_runs(recipe, words, settings, said, tmp_path):
    outcome = start(recipe, *words, **{"OUT": tmp_path / "out", "STAGES": "repo"} | settings)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(said) and outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""


# Like torchrun it listens to SIGINT, too, even where a shell starts it deaf to it.
TORCHRUN = """#!{python}
import os, signal, sys, time

def hear(number, frame):
    print(signal.Signals(number).name, "heard", file=log)
    time.sleep(0.5)
    print("saved", file=log)
    sys.exit(1)

log = open({log!r}, "a", buffering=1)
signal.signal(signal.SIGINT, hear)
signal.signal(signal.SIGTERM, hear)
print(os.getpid(), file=log)
while True:
    time.sleep(0.05)
"""


class Started:
    """A recipe in a terminal of its own, with a torchrun that waits for a signal and then saves for a while."""

    def __init__(self, folder: Path):
        self.log, self.out, programs = folder / "log", folder / "out", folder / "bin"
        programs.mkdir()
        self.log.touch()
        (programs / "torchrun").write_text(TORCHRUN.format(python=sys.executable, log=str(self.log)))
        (programs / "torchrun").chmod(0o755)
        settings = dict(OUT=self.out, STAGES="repo ppo_lagrange", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
        self.terminal, inside = pty.openpty()
        take = "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        # Tests that run behind nohup or `&` are deaf to these, and so would be the recipe.
        take += "[signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)]; "
        self.process = subprocess.Popen(
            [sys.executable, "-c", take + "os.execv(sys.argv[1], sys.argv[1:])", ROOT / "benchmark" / "alpaca_7b.sh"],
            env=environment() | {name: str(value) for name, value in settings.items()},
            stdin=inside, stdout=inside, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(inside)
        while "\n" not in self.log.read_text():
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)
        self.torchrun = int(self.log.read_text().split()[0])

    def end(self) -> tuple[int, str]:
        _, told = self.process.communicate(timeout=30)
        os.close(self.terminal)
        return self.process.returncode, told


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "Ctrl-C"])
def test_whatever_stops_a_recipe_lets_the_stage_save(how, tmp_path):
    recipe = Started(tmp_path)
    for _ in range(2):  # the second one does not cut the saving short
        os.write(recipe.terminal, b"\x03") if how == "Ctrl-C" else recipe.process.send_signal(getattr(signal, how))
        time.sleep(0.2)
    code, told = recipe.end()
    assert code == 143 and "stopping: the stage saves" in told and "ppo_lagrange.py" not in told
    assert recipe.log.read_text() == f"{recipe.torchrun}\nSIGTERM heard\nsaved\n"


def test_a_stop_in_the_moment_that_a_stage_starts_in_reaches_it(tmp_path, monkeypatch):
    """The stage is there, and the recipe does not know its number yet: it must not end and leave the stage alone."""
    hang_up = """set -o functrace
trap '[[ $BASH_COMMAND != "child=\\$!" ]] || { until [[ -s LOG ]]; do sleep 0.02; done; kill -HUP $$; }' DEBUG"""
    (tmp_path / "environment").write_text(hang_up.replace("LOG", str(tmp_path / "log")))
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "environment"))
    recipe = Started(tmp_path)
    try:
        code, told = recipe.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(recipe.torchrun, signal.SIGKILL)
    assert code == 143 and "stopping: the stage saves" in told
    assert recipe.log.read_text() == f"{recipe.torchrun}\nSIGTERM heard\nsaved\n"


def test_nothing_starts_beside_a_stage_that_has_outlived_its_recipe(tmp_path):
    recipe = Started(tmp_path)
    recipe.process.kill()
    recipe.process.wait()
    try:
        outcome = start("alpaca_7b.sh", OUT=recipe.out)
        assert (outcome.returncode, outcome.stdout) == (2, "")
        assert outcome.stderr.startswith(f"error: a recipe is already at work in {recipe.out}")
    finally:
        os.kill(recipe.torchrun, signal.SIGTERM)
        recipe.end()


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs: tiny models and data in the Hub's formats
# ----------------------------------------------------------------------------------------------------------------------
def make_beaver(source: Path, folder: Path) -> Path:
    """A score model with the names of Safe RLHF's code, which scripts must read in the Hub's own checkpoints."""

    def change(weights):
        weights["score_head.weight"], weights["score_head.bias"] = (
            weights.pop("score.weight"),
            weights.pop("score.bias"),
        )
        weights["normalizer.mean"], weights["normalizer.var"] = torch.zeros(1), torch.ones(1)
        weights["normalizer.count"] = torch.tensor(1)

    return tiny.copy_model(source, folder, change, architectures=["LlamaForScore"], score_type="cost", bias=True)


@pytest.fixture(scope="module")
def small(files, tmp_path_factory) -> SimpleNamespace:
    """Variables that make the recipes small: nothing of their text changes."""
    folder = tmp_path_factory.mktemp("recipes")
    reward = make_beaver(files.cost, folder / "beaver-reward")
    supervised = [
        {"instruction": row["prompt"], "input": "ba be" if i % 2 else "", "output": row["response_0"]}
        for i, row in enumerate(tiny.make_pairs(20, seed=4))
    ]
    suite = folder / "suites" / "data" / "evaluation" / "Q-Harm.json"
    suite.parent.mkdir(parents=True)
    texts = [row["prompt"] for row in tiny.make_pairs(6, seed=5)]
    xstest = folder / "xstest.csv"
    xstest.write_text(
        "prompt,label\n" + "".join(f"{text},{('safe', 'unsafe')[i % 2]}\n" for i, text in enumerate(texts))
    )
    suite.write_text(json.dumps({"instructions": texts, "inputs": [""] * len(texts)}), encoding="utf-8")
    git = ["git", "-C", str(folder / "suites"), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "suites"]):
        subprocess.run(git + words, check=True)
    settings = dict(
        GPUS=1, DTYPE="float32", DATASET=files.train, EVAL_DATASET=files.test, SACPO_DATASET=files.train,
        SACPO_EVAL_DATASET=files.test, PTX_DATASET=tiny.write_rows(folder / "alpaca.json", supervised),
        SUITES_REPOSITORY=f"file://{folder / 'suites'}", SUITE_NAMES="Q-Harm", XSTEST=xstest, EPISODES=24,
        BATCH_SIZE=8, MICRO_BATCH_SIZE=4, SACPO_BATCH_SIZE=16, MAX_PROMPT_LENGTH=64, MAX_NEW_TOKENS=8, MAX_LENGTH=80,
        SACPO_PROMPT_LENGTH=64, EVAL_SIZE=4, SACPO_EPOCHS=1, PREFERENCE_EPOCHS=1, SCORE_SIZE=5, SCORE_BATCH_SIZE=8,
        SAVE_EVERY=1, PREFERENCE_SAVE_EVERY=2, EVALUATE_EXTRA="--bootstrap-resamples 20",
    )  # fmt: skip
    scores = dict(REWARD_MODEL=reward, COST_MODEL=make_beaver(files.cost, folder / "beaver-cost"))
    return SimpleNamespace(settings=settings, scores=scores, folder=folder)


def test_alpaca_runs_to_its_end_and_goes_on_where_it_was_stopped(files, small, tmp_path):
    out = tmp_path / "out"
    settings = small.settings | small.scores | dict(OUT=out, MODEL=files.policy)

    # Stopped in its first stage, it saves what it has and says nothing of later stages.
    command = [str(ROOT / "benchmark" / "alpaca_7b.sh")]
    stopped = subprocess.Popen(
        command, env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 240
    while not (out / "repo" / "metrics.jsonl").exists() and stopped.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    told, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 143, told
    assert "stopping: the stage saves" in told and "stopped by SIGTERM after iteration" in told
    assert list((out / "repo" / "checkpoints").glob("[0-9]*[0-9]")) and not (out / "ppo_lagrange").exists()

    outcome = start("alpaca_7b.sh", **settings)
    assert outcome.returncode == 0, outcome.stderr
    assert "resuming the run in" in outcome.stderr
    for name in ("repo", "ppo_lagrange"):
        assert read_summary(out / name)["episodes"] == 24
        assert len(read_lines(out / name / "metrics.jsonl")) == 3
    assert [stage["beta"] for stage in read_summary(out / "sacpo-dpo")["stages"]] == [0.1, 0.025]
    for folder in ("repo/model", "ppo_lagrange/model", "sacpo-dpo/model", "sacpo-dpo/merged/q0.25"):
        AutoModelForCausalLM.from_pretrained(out / folder)
    for name, prompts in (("saferlhf", 5), ("Q-Harm", 5), ("xstest", 5)):
        table = json.loads((out / "evaluate" / name / "table.json").read_text(encoding="utf-8"))
        assert table["prompts"] == prompts and list(table["models"]) == ["sft", "repo", "ppo-lagrange", "sacpo-dpo"]
    assert table["suites"]["xstest"]["to_answer"] == 3 and table["suites"]["xstest"]["models"]["repo"]["over_refusal"]

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    outcome = start("alpaca_7b.sh", **settings | dict(STAGES="repo ppo_lagrange sacpo"))
    assert outcome.returncode == 0, outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == written
    for name in ("repo", "ppo_lagrange", "sacpo-dpo"):
        assert f"the run in {out / name} is finished" in outcome.stdout


def test_llama_is_fine_tuned_by_trl_once_and_its_score_models_follow(files, small, tmp_path):
    """TRL is not among the requirements: a stand-in for its command copies a tiny policy to where it is told to."""
    stand_in = tmp_path / "bin" / "trl"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/calls\nwhile [[ $1 != --output_dir ]]; do shift; done\n'
        f'mkdir -p "$2" && cp {files.policy}/* "$2"\n'
    )
    stand_in.chmod(0o755)
    out = tmp_path / "out"
    # An earlier try has left a checkpoint of step 90 and one of step 100; a third one was cut short.
    for name in (
        "checkpoint-90/trainer_state.json",
        "checkpoint-100/trainer_state.json",
        "checkpoint-110/optimizer.pt",
    ):
        (out / "sft.part" / name).parent.mkdir(parents=True)
        (out / "sft.part" / name).touch()
    path = f"{stand_in.parent}{os.pathsep}{environment()['PATH']}"
    settings = small.settings | dict(OUT=out, PATH=path, STAGES="sft reward")
    outcome = start("llama_3b.sh", **settings)
    assert outcome.returncode == 0, outcome.stderr
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert f"--resume_from_checkpoint {out}/sft.part/checkpoint-100" in call
    assert not (out / "sft.part").exists()
    AutoModelForCausalLM.from_pretrained(out / "sft")
    assert "pair_accuracy" in read_summary(out / "reward")["eval"]
    assert (out / "reward" / "model" / "config.json").exists()
    # The next start neither fine-tunes again nor takes other score models.
    commands = printed("llama_3b.sh", **settings | dict(STAGES="sft repo"))
    assert [command[0] for command in commands] == ["torchrun"]
    holds(launched(commands)[f"{out}/repo"][2], reward_model=f"{out}/reward/model", model=f"{out}/sft")
    shutil.rmtree(out)
