"""benchmark/alpaca_7b.sh and llama_3b.sh: their commands against the command lines of the scripts, and whole runs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tyro
from helpers import ROOT, SCRIPTS, read_json, read_lines, read_summary
from torch.distributed.run import parse_args as parse_torchrun
from transformers import AutoModelForCausalLM

from evaluation.score import Score

BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"
BEAVER_SCORES = {f"{kind}_model": f"PKU-Alignment/beaver-7b-v1.0-{kind}" for kind in ("reward", "cost")}
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
    resume=True, total_episodes=40000, save_every=50,
)  # fmt: skip
PREFERENCES = dict(
    dataset="PKU-Alignment/PKU-SafeRLHF", epochs=2, batch_size=8 * 16, micro_batch_size=16, learning_rate=2e-5,
    weight_decay=0.1, warmup_ratio=0.03, max_length=512, regularization=0.001, gradient_checkpointing=True, resume=True,
)  # fmt: skip
SACPO = dict(
    dataset=("PKU-Alignment/PKU-SafeRLHF-30K",), eval_dataset=("PKU-Alignment/PKU-SafeRLHF-30K",), train_size=0,
    batch_size=8 * 16 * 2, micro_batch_size=16, learning_rate=2e-5, warmup_ratio=0.03, max_prompt_length=128,
    epochs=3, max_length=512, stages=("helpful", "safe"), loss=("dpo",), beta=0.1, beta_over_lambda=0.025,
    merge_q=(0.25, 0.5, 0.75), gradient_checkpointing=True, resume=True,
)  # fmt: skip
SUITES = ["I-MaliciousInstructions", "I-CoNa", "I-Controversial", "I-PhysicalSafetyUnsafe", "I-PhysicalSafetySafe"]
SUITES += ["Q-Harm", "I-Alpaca"]


def environment(**settings) -> dict[str, str]:
    """The test's environment with variables of the recipe; torchrun is the one beside this python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | {name: str(value) for name, value in settings.items()}


def start(recipe: str, *words: str, **settings) -> subprocess.CompletedProcess:
    options = dict(env=environment(**settings), capture_output=True, text=True, timeout=300)
    return subprocess.run([str(ROOT / "benchmark" / recipe), *words], **options)


def printed(recipe: str, **settings) -> list[list[str]]:
    """The commands that --dry-run prints, in words: bash reads them with functions in the place of the programs."""
    outcome = start(recipe, "--dry-run", **settings)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    programs = ["torchrun", "python3", "trl", "git", "mv", "rm"]
    functions = [f'{name}() {{ printf "%s\\0" {name} "$@" END; }}\n' for name in programs]
    shell = dict(input="".join(functions) + outcome.stdout, capture_output=True, text=True, check=True)
    return [command.split("\0")[:-1] for command in subprocess.run(["bash"], **shell).stdout.split("END\0")[:-1]]


def launched(commands: list[list[str]]) -> dict[str, tuple]:
    """What torchrun would start, by output directory: (its own settings, the script's name, the script's Args)."""
    found = {}
    for _, *words in (command for command in commands if command[0] == "torchrun"):
        launcher = parse_torchrun(words)
        path, rest = Path(launcher.training_script), launcher.training_script_args
        if launcher.module:
            assert (str(path), rest[0]) == ("evaluation", "score")
            args = tyro.cli(Score, args=rest[1:])
        else:
            assert path == ROOT / path.name
            args = tyro.cli(SCRIPTS[path.stem].Args, args=rest)
        assert args.output_dir not in found
        found[args.output_dir] = (launcher, path.name, args)
    return found


def holds(args, **settings) -> None:
    assert {name: getattr(args, name) for name in settings} == settings


def test_the_commands_for_alpaca_have_the_settings_of_the_papers():
    commands = printed("alpaca_7b.sh")
    runs, out = launched(commands), "runs/alpaca_7b-1"
    names = ["repo", "ppo_lagrange", "sacpo-dpo", *(f"evaluate/{name}" for name in ["saferlhf", *SUITES, "xstest"])]
    assert list(runs) == [f"{out}/{name}" for name in names]
    policy = dict(model="PKU-Alignment/alpaca-7b-reproduced", prompt_template=BEAVER, seed=1)
    for name in ("repo", "ppo_lagrange"):
        launcher, script, args = runs[f"{out}/{name}"]
        assert script == f"{name}.py"
        holds(launcher, nproc_per_node="8", nnodes="1:1", standalone=True, shutdown_timeout=1800)
        holds(args, **RL, **policy, **BEAVER_SCORES, score_prompt_template=BEAVER)
    holds(runs[f"{out}/repo"][2], constraint="response", rectify="cost")
    assert runs[f"{out}/sacpo-dpo"][1] == "sacpo.py"
    holds(runs[f"{out}/sacpo-dpo"][2], **SACPO, **policy)
    models = [f"sft={policy['model']}", f"repo={out}/repo/model", f"ppo-lagrange={out}/ppo_lagrange/model"]
    models.append(f"sacpo-dpo={out}/sacpo-dpo/model")
    for name in ["saferlhf", *SUITES]:
        args = runs[f"{out}/evaluate/{name}"][2]
        data = f"{out}/safety-tuned-llamas/data/evaluation/{name}.json" if name in SUITES else RL["dataset"]
        holds(args, **BEAVER_SCORES, models=models, prompt_template=BEAVER, score_prompt_template=BEAVER, dataset=data)
        holds(args, dataset_split="test", max_prompt_length=256, max_new_tokens=256, temperature=1, eval_size=0)
    holds(runs[f"{out}/evaluate/xstest"][2], **BEAVER_SCORES, models=models, suites=["xstest=Paul/XSTest"])
    clone = ["git", "clone", "--quiet", "--depth", "1", "https://github.com/vinid/safety-tuned-llamas"]
    assert [*clone, f"{out}/safety-tuned-llamas.part"] == commands[1]


def test_the_commands_for_llama_train_its_own_score_models_and_ask_beaver_in_the_end(tmp_path):
    # An earlier try has left a checkpoint of step 90 and one of step 100; a third one was cut short.
    for name in ("90/trainer_state.json", "100/trainer_state.json", "110/optimizer.pt"):
        (path := tmp_path / "sft.part" / f"checkpoint-{name}").parent.mkdir(parents=True)
        path.touch()
    commands, out = printed("llama_3b.sh", SEED=3, OUT=tmp_path, SUITE_NAMES="Q-Harm", XSTEST=""), str(tmp_path)
    program, stage, *words = commands[0]
    flags, runs = dict(zip(words[::2], words[1::2], strict=True)), launched(commands)
    assert (program, stage, flags["--model_name_or_path"]) == ("trl", "sft", "meta-llama/Llama-3.2-3B")
    assert (flags["--dataset_name"], flags["--dataset_text_field"]) == ("tatsu-lab/alpaca", "text")
    assert flags["--resume_from_checkpoint"] == f"{out}/sft.part/checkpoint-100"
    assert commands[1] == ["mv", flags["--output_dir"], f"{out}/sft"]
    own = dict(model=f"{out}/sft", prompt_template=ALPACA, seed=3)
    for kind in ("reward", "cost"):
        holds(runs[f"{out}/{kind}"][2], **PREFERENCES, **own, kind=kind)
    scores = dict(reward_model=f"{out}/reward/model", cost_model=f"{out}/cost/model", score_prompt_template=ALPACA)
    for name in ("repo", "ppo_lagrange"):
        holds(runs[f"{out}/{name}"][2], **RL, **scores, **own)
    holds(runs[f"{out}/sacpo-dpo"][2], **SACPO, **own)
    args = runs[f"{out}/evaluate/Q-Harm"][2]
    holds(args, **BEAVER_SCORES, prompt_template=ALPACA, score_prompt_template=BEAVER)
    assert args.models[0] == f"sft={out}/sft"
    # The next start neither fine-tunes again nor takes other score models.
    for name in ("sft", "reward/model", "cost/model"):
        (tmp_path / name).mkdir(parents=True)
    commands = printed("llama_3b.sh", SEED=3, OUT=tmp_path, STAGES="sft repo")
    assert [command[0] for command in commands] == ["torchrun"]
    holds(launched(commands)[f"{out}/repo"][2], **RL, **scores, **own)


def test_variables_of_the_environment_reach_the_commands(tmp_path):
    """A path with a space and a quote, several nodes, fewer stages, more flags, of which the last counts."""
    out = f"{tmp_path}/it's here"
    nodes = dict(NNODES=2, NODE_RANK=1, RDZV_ENDPOINT="host0:29500", GPUS=4, OUT=out)
    runs = launched(printed("alpaca_7b.sh", STAGES="cost repo", RL_EXTRA="--cpu-offload --kl-coef 0.02", **nodes))
    assert list(runs) == [f"{out}/cost", f"{out}/repo"] and not Path(out).exists()
    launcher, _, args = runs[f"{out}/repo"]
    holds(launcher, nnodes="2", node_rank=1, rdzv_backend="c10d", rdzv_endpoint="host0:29500", nproc_per_node="4")
    holds(launcher, standalone=False, rdzv_id="repo")
    holds(args, cpu_offload=True, kl_coef=0.02, cost_model=f"{out}/cost/model", batch_size=128)
    assert args.reward_model == BEAVER_SCORES["reward_model"]
    # A model that is fine-tuned already takes the place of the stage; the first node alone clones the suites.
    commands = printed("llama_3b.sh", MODEL="mine", STAGES="sft evaluate", SUITE_NAMES="Q-Harm", XSTEST="", **nodes)
    assert [command[0] for command in commands] == ["torchrun"] * 2
    assert [models for _, _, args in launched(commands).values() for models in args.models] == ["sft=mine"] * 2


@pytest.mark.parametrize(
    "recipe, words, settings, said",
    [
        ("alpaca_7b.sh", ["--dryrun"], {}, "error: there is no flag --dryrun, only --dry-run"),
        ("llama_3b.sh", [], {"STAGES": "repo ppo"}, "error: STAGES: there is no stage ppo"),
        ("alpaca_7b.sh", [], {"GPUS": "all"}, "error: GPUS is 'all'"),
        ("llama_3b.sh", [], {"NNODES": "2"}, "error: NNODES is 2: give RDZV_ENDPOINT"),
        ("llama_3b.sh", [], {"SUITES": "nowhere", "STAGES": "evaluate"}, "error: SUITES: there is no nowhere/I-Mal"),
    ],
)
def test_mistakes_are_told_before_anything_runs(recipe, words, settings, said, tmp_path):
    outcome = start(recipe, *words, **{"OUT": tmp_path / "out", "STAGES": "repo"} | settings)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(said) and outcome.stderr.count("\n") == 1


# Like torchrun it listens to SIGINT, too, even where a shell starts it deaf to it.
TORCHRUN = """#!{python} -IS
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


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_whatever_stops_a_recipe_lets_the_stage_save(number, status, tmp_path):
    """With a torchrun that waits for a signal and then saves for a while."""
    log, program = tmp_path / "log", tmp_path / "torchrun"
    log.touch()
    program.write_text(TORCHRUN.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)

    def hear():  # behind nohup or `&` the tests are deaf to these, and so would be the recipe
        for each in (signal.SIGHUP, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    options = dict(env=environment(OUT=tmp_path / "out", STAGES="repo ppo_lagrange", PATH=path), text=True)
    options |= dict(start_new_session=True, preexec_fn=hear, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    recipe = subprocess.Popen([ROOT / "benchmark" / "alpaca_7b.sh"], **options)
    while "\n" not in log.read_text():
        assert recipe.poll() is None, recipe.stderr.read()
        time.sleep(0.02)
    torchrun = int(log.read_text())
    for _ in range(2):  # the second one does not cut the saving short
        os.killpg(recipe.pid, number)  # as a terminal does for Ctrl-C
        time.sleep(0.2)
    try:
        _, told = recipe.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(torchrun, signal.SIGKILL)
    assert recipe.returncode == status and "stopping: the stage saves" in told and "ppo_lagrange.py" not in told
    assert log.read_text() == f"{torchrun}\nSIGTERM heard\nsaved\n"


@pytest.mark.slow
def test_alpaca_runs_to_its_end_and_continues_where_it_was_stopped(files, tmp_path):
    """Tiny models and data make the recipe small: nothing of its text changes."""
    out, pairs = tmp_path / "out", tiny.make_pairs(20, seed=4)
    supervised = [{"instruction": row["prompt"], "input": "", "output": row["response_0"]} for row in pairs]
    labelled = [{"prompt": row["prompt"], "label": ("safe", "unsafe")[i % 2]} for i, row in enumerate(pairs[:6])]
    settings = dict(
        OUT=out, GPUS=1, DTYPE="float32", MODEL=files.policy, REWARD_MODEL=files.reward, COST_MODEL=files.cost,
        DATASET=files.train, EVAL_DATASET=files.test, SACPO_DATASET=files.train, SACPO_EVAL_DATASET=files.test,
        PTX_DATASET=tiny.write_rows(tmp_path / "alpaca.json", supervised), EPISODES=24, BATCH_SIZE=8, SUITE_NAMES="",
        XSTEST=tiny.write_rows(tmp_path / "xstest.csv", labelled), MICRO_BATCH_SIZE=4, SACPO_BATCH_SIZE=16,
        MAX_PROMPT_LENGTH=64, MAX_NEW_TOKENS=8, MAX_LENGTH=80, SACPO_PROMPT_LENGTH=64, EVAL_SIZE=4, SACPO_EPOCHS=1,
        SCORE_SIZE=5, SCORE_BATCH_SIZE=8, SAVE_EVERY=1, EVALUATE_EXTRA="--bootstrap-resamples 20",
    )  # fmt: skip
    options = dict(env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stopped = subprocess.Popen([ROOT / "benchmark" / "alpaca_7b.sh"], **options)
    end, log = time.monotonic() + 240, out / "repo" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and stopped.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    told, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 143 and "stopped after iteration" in told, told
    assert list((out / "repo" / "checkpoints").glob("[0-9]*[0-9]")) and not (out / "ppo_lagrange").exists()
    outcome = start("alpaca_7b.sh", **settings)
    assert outcome.returncode == 0, outcome.stderr
    for name in ("repo", "ppo_lagrange"):
        assert [row["iteration"] for row in read_lines(out / name / "metrics.jsonl")] == [1, 2, 3]
    assert [stage["beta"] for stage in read_summary(out / "sacpo-dpo")["stages"]] == [0.1, 0.025]
    for folder in ("repo/model", "ppo_lagrange/model", "sacpo-dpo/model", "sacpo-dpo/merged/q0.25"):
        AutoModelForCausalLM.from_pretrained(out / folder)
    for name in ("saferlhf", "xstest"):
        table = read_json(out / "evaluate" / name / "table.json")
        assert table["prompts"] == 5 and list(table["models"]) == ["sft", "repo", "ppo-lagrange", "sacpo-dpo"]
    outcome = start("alpaca_7b.sh", **settings | dict(STAGES="repo ppo_lagrange sacpo"))
    assert outcome.returncode == 0 and outcome.stderr.count("is finished") == 3, outcome.stderr
