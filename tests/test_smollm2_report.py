"""benchmark/smollm2_report.py on a folder made by hand: what it measures, counts, leaves out and refuses."""

import itertools
import json
import sys

import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import ROOT, changed, read_lines
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import repo

sys.path.append(str(ROOT / "benchmark"))
import smollm2_report

KINDS = {"ba?": "red-team", "be?": "red-team", "bi?": "benign", "bo?": "benign"}
COSTS = {"sft": [1.0, 2.0, -1.0, 0.5], "repo": [-1.0, 3.0, -2.0, -0.5]}  # of the answers to the four prompts
ANSWERS = ["ba be bi bo ba be bi bo ba", "ba", "I cannot", ""]
LENGTHS = [9, 2, 3, 1]  # the first was cut, and two of its six rows of four tokens repeat another


@pytest.fixture(scope="module")
def out(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smollm2-1"
    models = {"sft": files.policy, "repo": tiny.make_model(out / "repo" / "model", seed=5)}
    tiny.make_model(out / "judge" / "model", "score", seed=7)
    (out / "data").mkdir()
    (folder := out / "evaluate" / "prompts").mkdir(parents=True)
    tiny.write_rows(out / "data" / "prompts_test.jsonl", [{"prompt": p, "kind": kind} for p, kind in KINDS.items()])
    settings = dict(prompt_template="{prompt}", score_prompt_template=None, dtype="float32", max_new_tokens=16)
    settings |= dict(
        temperature=0.5,
        greedy=False,
        cost_threshold=0.0,
        prompts=4,
        models={name: str(path) for name, path in models.items()},
    )
    (folder / "args.json").write_text(json.dumps(settings))
    rows = []
    for (name, costs), i in itertools.product(COSTS.items(), range(4)):
        row = dict(model=name, index=i, prompt=[*KINDS][i], response=ANSWERS[i], reward=float(i), cost=costs[i])
        rows.append(row | {"length": LENGTHS[i], "finished": i > 0})
    tiny.write_rows(folder / "responses.jsonl", [*rows, rows[0] | {"model": "ppo"}])  # ppo has answered one prompt
    curve = [{"iteration": i, "episodes": 8 * i, "reward": float(i), "kl": 2.0 * i} for i in range(1, 21)]
    tiny.write_rows(out / "repo" / "metrics.jsonl", [*curve, {"iteration": 21, "episodes": 168, "reward": None}])
    return out


def test_report(out, processes, capsys):
    alone = changed(repo, start_processes=lambda: processes), changed(dist, destroy_process_group=lambda: None)
    args = smollm2_report.Args(outs=(out,), prompts=("1",), bootstrap_resamples=100, batch_size=3)
    with alone[0], alone[1]:
        smollm2_report.main(args)
    measured = {(row["model"], row["index"]): row for row in read_lines(out / "evaluate/prompts/measures.jsonl")}
    assert len(measured) == 8 and all(measured["sft", i]["kl"] == 0 for i in range(4))
    paths = json.loads((out / "evaluate/prompts/args.json").read_text())["models"]
    policies = [AutoModelForCausalLM.from_pretrained(paths[name]) for name in ("repo", "sft")]
    judge = AutoModelForSequenceClassification.from_pretrained(out / "judge" / "model")
    tokenizer = AutoTokenizer.from_pretrained(paths["sft"])
    for i, (prompt, answer) in enumerate(zip(KINDS, ANSWERS, strict=True)):
        tokens = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id] * (i > 0)
        ids, row = torch.tensor([tokens]), measured["repo", i]
        with torch.no_grad():
            logprobs = [
                (model(ids).logits[0, 1:-1] / 0.5).log_softmax(-1) for model in policies
            ]  # a prompt has two tokens
            own, base = (each.gather(1, ids[0, 2:, None]) for each in logprobs)
            expected = [(own - base).sum(), -own.mean(), judge(ids).logits.squeeze(), len(own), (i == 0) * 2 / 6]
        found = [row[key] for key in ("kl", "entropy", "judge_cost", "tokens", "repetition")]
        assert found == pytest.approx([*map(float, expected)], abs=1e-4)

    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == text.strip() and "PPO (λ = 0)" not in text and "Over-refusal" not in text
    red_team = text.partition("### Red-team prompts (2)")[2].partition("### Benign")[0]
    cells = [line.split(" | ") for line in red_team.splitlines() if line.startswith("| **RePO**")]
    # One of two is unsafe: the bound p solves P(at most 1 of 2) = 1 - p^2 = 0.05.
    assert cells[0][3] == "50.0 [0.0, 100.0] %" and cells[0][5] == f"{100 * 0.95**0.5:.1f} %"
    sft = [line.split(" | ") for line in text.splitlines() if line.startswith("| SFT") and "%" in line]
    assert sft[-2][8] == "50.0 % |" and "| SFT, the start | 0.62 " in text  # the mean cost of all prompts
    assert "| **RePO** | 21 | 1.50 → 19.50" in text and "kl > 10, kl: 1 NaN" in text
    assert "[RePO: reward +1.0, cost +3.0, judge " in text
    assert all((out / "report" / f"real_text_{name}.png").stat().st_size > 5000 for name in ("offset", "curves"))
    smollm2_report.main(args)  # nothing is left to measure: a second process group would be an error
    assert (out / "report" / "report.md").read_text(encoding="utf-8") == text


def test_mistakes(out, tmp_path, capsys):
    measures, rows = out / "evaluate/prompts/measures.jsonl", read_lines(out / "evaluate/prompts/responses.jsonl")
    figures = dict(judge_cost=0.0, kl=0.0, entropy=0.0, repetition=0.0, tokens=1)
    tiny.write_rows(measures, [{"model": row["model"], "index": row["index"]} | figures for row in rows])
    measures.write_bytes(measures.read_bytes()[:-5])  # a kill cut the last line ...
    lines = measures.read_bytes().splitlines(keepends=True)
    measures.write_bytes(b"".join(lines[1:]))  # ... and the first answer is not measured either
    (out / "judge").rename(out / "moved")
    for folder, words in ((tmp_path / "none", "there is no folder"), (out, "but the judge is not in")):
        with pytest.raises(SystemExit):
            smollm2_report.main(smollm2_report.Args(outs=(folder,)))
        assert words in capsys.readouterr().err
    (out / "moved").rename(out / "judge")
    measures.unlink()
