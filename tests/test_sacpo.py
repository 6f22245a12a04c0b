"""sacpo.py: both losses, whole updates by hand, stages, merging, files."""

import math
import os
import re

import by_hand
import pytest
import tiny
import torch
from helpers import assert_near, changed, read_back, read_lines, read_summary, recorded_updates
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import sacpo

TOKENIZER, EOS = tiny.make_tokenizer(), 1
CHOICES = {"helpful": "better_response_id", "safe": "safer_response_id"}
ROUNDING = 1e-4  # float32 against float64, through sums over responses


# log π and log π_ref of chosen and rejected responses; KTO takes them as six responses
CHOSEN, REJECTED = [-12.5, -30.25, -7.0], [-14.0, -21.5, -9.75]
REF_CHOSEN, REF_REJECTED = [-13.0, -28.0, -8.5], [-12.25, -24.0, -9.5]
LABELS = [True, True, False, False, False, True]


@pytest.mark.parametrize("beta, dpo, kto", [(0.1, 0.7183404564857483, 0.45436015725135803),
                                            (0.5, 1.0311779975891113, 0.5149676203727722)])  # fmt: skip
def test_losses_are_those_of_a_well_known_library(beta, dpo, kto):
    """TRL 1.16.0's DPOTrainer (sigmoid), and KTOTrainer with z_0 0.5, weights 1 and 0.75; gradients in closed form."""
    pairs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED)]
    ref = [torch.tensor(x, dtype=torch.float64) for x in (REF_CHOSEN, REF_REJECTED)]
    losses = sacpo.dpo_loss(*pairs, *ref, beta)
    assert losses.mean().item() == pytest.approx(dpo, rel=1e-6)
    slopes = torch.stack(torch.autograd.grad(losses.sum(), pairs))
    margins = beta * ((pairs[0] - ref[0]) - (pairs[1] - ref[1])).detach()
    expected = beta / (1 + margins.exp())
    torch.testing.assert_close(slopes, torch.stack([-expected, expected]))
    logprobs, labels = torch.cat(pairs), torch.tensor(LABELS)
    losses = sacpo.kto_loss(logprobs, torch.cat(ref), labels, 0.5, beta, 1.0, 0.75)
    assert losses.mean().item() == pytest.approx(kto, rel=1e-6)
    (slopes,) = torch.autograd.grad(losses.sum(), logprobs)
    sign = torch.where(labels, 1.0, -1.0).double()
    value = torch.sigmoid(sign * beta * (logprobs - torch.cat(ref) - 0.5)).detach()
    torch.testing.assert_close(slopes, -torch.where(labels, 1.0, 0.75) * sign * beta * value * (1 - value))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("preference", ["helpful", "safe"])
def test_updates_by_hand(run, tmp_path, files, preference, loss):
    """Two epochs of two batches, four pairs per prompt; texts are read one by one by an unsharded float64 model."""
    rows = tiny.make_pairs(20, seed=4)
    rows = [row | {"prompt": rows[i // 4 * 4]["prompt"]} for i, row in enumerate(rows)]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    flags = dict(dataset=data, stages=preference, loss=loss, beta=0.4, beta_over_lambda=0.7, epochs=2, batch_size=10)
    flags |= dict(micro_batch_size=3, learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.05)
    with recorded_updates() as updates:
        assert run(sacpo, output_dir=tmp_path / "run", **flags).code == 0
    metrics, beta = read_lines(tmp_path / "run" / "metrics.jsonl"), 0.4 if preference == "helpful" else 0.7
    ids = {text: TOKENIZER(text)["input_ids"] for row in rows for text in row.values() if isinstance(text, str)}
    safe, column = preference == "safe", CHOICES[preference]
    labels = [[row[f"is_response_{k}_safe"] if safe else k == row[column] for k in (0, 1)] for row in rows]
    good, reference = sum(map(sum, labels)), by_hand.plain_policy(files.policy).requires_grad_(False)
    order = [torch.randperm(20, generator=sacpo.random_generator(1, "pairs", preference, e)).tolist() for e in (0, 1)]
    masters, means, neighbours = [value.double().requires_grad_() for value in updates[0][0]], [], 0
    optimizer = torch.optim.AdamW(masters, betas=(0.9, 0.95), weight_decay=0.1)
    assert len(updates) == len(metrics) == 4
    for step, (parameters, gradients) in enumerate(updates):
        model, batch = by_hand.plain_policy(files.policy, parameters), order[step // 2][10 * (step % 2) :][:10]

        def log_ratio(prompt, response, model=model):
            return by_hand.log_ratio(model, reference, ids[prompt], [*ids[response], EOS])

        ratios = [[log_ratio(rows[i]["prompt"], rows[i][f"response_{k}"]) for k in (0, 1)] for i in batch]
        better = [rows[i][column] for i in batch]
        chosen, rejected = (torch.stack([r[b ^ k] for r, b in zip(ratios, better, strict=True)]) for k in (0, 1))
        expected = {"chosen_log_ratio": chosen.mean().item(), "rejected_log_ratio": rejected.mean().item()}
        if loss == "dpo":
            total = -logsigmoid(beta * (chosen - rejected)).mean()
        else:
            mismatched = []
            for place, i in enumerate(batch):
                others = [j for j in batch[place:] + batch[:place] if rows[j]["prompt"] != rows[i]["prompt"]]
                neighbours += others[0] != batch[(place + 1) % 10]
                mismatched += [log_ratio(rows[others[0]]["prompt"], rows[i][f"response_{k}"]).item() for k in (0, 1)]
            means.append(sum(mismatched) / 20)
            z_0, terms = max(0.0, means[-1]), []
            for i, pair in zip(batch, ratios, strict=True):
                for ratio, label in zip(pair, labels[i], strict=True):
                    weight, sign = (1.0, 1) if label else (good / (40 - good), -1)
                    terms.append(weight * (1 - torch.sigmoid(sign * beta * (ratio - z_0))))
            total, expected["z_0"] = torch.stack(terms).mean(), z_0
        assert_near(parameters, [value.detach() for value in masters], ROUNDING)
        assert_near(gradients, torch.autograd.grad(total, model.parameters()), ROUNDING)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.double()
        expected |= {"loss": total.item(), "grad_norm": torch.nn.utils.clip_grad_norm_(masters, 0.05).item()}
        expected["learning_rate"] = optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.step()
        assert {name: metrics[step][name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert step == 0 or metrics[step]["pair_accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    assert loss == "dpo" or (neighbours > 0 and abs(means[0]) < 1e-6 and max(map(abs, means)) > 0.01)


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_z_0_is_the_mean_log_ratio_cut_at_zero(run, tmp_path, shift):
    """A reference that gives every text e^shift times less: at the first step all log-ratios are the shift."""
    all_logprobs = sacpo.all_logprobs
    with changed(sacpo, all_logprobs=lambda *args: all_logprobs(*args) - shift):
        assert run(sacpo, output_dir=tmp_path / "run", stages="helpful", loss="kto", beta=0.7).code == 0
    first, z_0 = read_lines(tmp_path / "run" / "metrics.jsonl")[0], max(0.0, shift)
    values = [1 - 1 / (1 + math.exp(-sign * 0.7 * (shift - z_0))) for sign in (1, -1)]
    assert (first["z_0"], first["loss"]) == pytest.approx((z_0, sum(values) / 2), abs=1e-5)


def test_mismatched_texts_take_the_next_other_prompt():
    ids = [([4], [7, 8, 9]), ([4], [9])]
    pairs = [{"prompts": (a, b), "ids": [([i], y) for _, y in ids]} for i, (a, b) in enumerate(("aa", "aa", "bb"))]
    crossed = sacpo.mismatch(pairs, 3)
    assert ["".join(pair["prompts"]) for pair in crossed] == ["bb", "bb", "aa"]
    assert crossed[0]["ids"] == [([2], [7, 8]), ([2], [9])]  # up to three tokens
    assert sacpo.mismatch(pairs[:2], 3) == []


ORDERS = {
    "helpful first": dict(stages=["helpful", "safe"], loss=["dpo", "kto"], merge_q=[0, 0.25, 1]),
    "safe first": dict(stages=["safe", "helpful"], loss=["dpo", "kto"], merge_q=[0.5]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_stages_merging_and_files(run, files, tmp_path, name):
    """The second stage is an alignment of the first result, bit for bit, with its own β, loss and reference."""
    both, flags, order = tmp_path / "both", dict(epochs=2, beta=0.2, beta_over_lambda=0.05), ORDERS[name]
    outcome = run(sacpo, output_dir=both, **flags | order)
    assert outcome.code == 0
    metrics, rows, summary = read_lines(both / "metrics.jsonl"), read_lines(both / "eval.jsonl"), read_summary(both)
    weights = {path.name: load_file(path / "model.safetensors") for path in (both / "stage1", both / "stage2")}
    models = [files.policy, both / "stage1", both / "stage2"]
    for stage in (1, 2):
        preference, loss = order["stages"][stage - 1], order["loss"][stage - 1]
        alone, more = tmp_path / f"{stage}", dict(model=models[stage - 1], stages=preference, loss=loss)
        assert run(sacpo, output_dir=alone, **flags | more).code == 0
        theirs = load_file(alone / "stage1" / "model.safetensors")
        assert all(torch.equal(value, theirs[key]) for key, value in weights[f"stage{stage}"].items())
        lines = [line for line in metrics if line["stage"] == stage]
        assert lines == [line | {"stage": stage} for line in read_lines(alone / "metrics.jsonl")]
        assert lines[0]["chosen_log_ratio"] == pytest.approx(0, abs=1e-4)  # it starts at its reference
        assert lines[-1]["chosen_log_ratio"] > lines[-1]["rejected_log_ratio"] + 0.1
        assert [line["step"] for line in lines if "eval_pair_accuracy" in line] == [5, 10]
        entry = summary["stages"][stage - 1]
        beta = {"helpful": 0.2, "safe": 0.05}[preference]
        assert (entry["preference"], entry["loss"], entry["beta"]) == (preference, loss, beta)
        new, old = (by_hand.plain_policy(models[i]) for i in (stage, stage - 1))
        for row, source in zip(rows[13 * (stage - 1) :][:13], read_lines(files.test), strict=True):
            first = source[CHOICES[preference]]
            assert row["responses"] == [source[f"response_{k}"] for k in (first, 1 - first)]
            for prompt, response, value in zip(row["prompts"], row["responses"], row["log_ratios"], strict=True):
                texts = TOKENIZER(prompt)["input_ids"], [*TOKENIZER(response)["input_ids"], EOS]
                with torch.no_grad():
                    assert value == pytest.approx(by_hand.log_ratio(new, old, *texts).item(), abs=1e-4)
        accuracy = sum(row["log_ratios"][0] > row["log_ratios"][1] for row in rows if row["stage"] == stage) / 13
        assert entry["eval"]["pair_accuracy"] == pytest.approx(accuracy)
        assert f"{preference}, {loss}: held-out pair accuracy {accuracy:.1%}, chance 50%" in outcome.out
    shown = re.findall(r"^before  (.*)\nafter   (.*)", outcome.out, re.MULTILINE)
    for row, texts in zip([read_lines(files.test)[i] for i in (0, 4, 8)], shown, strict=True):
        for folder, text in zip((models[0], models[2]), texts, strict=True):  # each prompt alone, without padding
            ids = TOKENIZER(row["prompt"], return_tensors="pt")["input_ids"]
            answer = AutoModelForCausalLM.from_pretrained(folder).generate(ids, do_sample=False, max_new_tokens=24)[0]
            answer = TOKENIZER.decode(answer, skip_special_tokens=True)
            assert len(text) > len(row["prompt"]) and (answer.startswith(text) or text.startswith(answer))
    for q in order["merge_q"]:
        for key, value in load_file(both / "merged" / f"q{q}" / "model.safetensors").items():
            one, two = weights["stage1"][key], weights["stage2"][key]
            torch.testing.assert_close(value, (1 - q) * one + q * two, rtol=0, atol=0 if q in (0, 1) else 1e-7)
    assert summary["merged"] == [f"merged/q{q}" for q in order["merge_q"]] and summary["pairs"] == 160
    assert os.readlink(both / "model") == "stage2"
    read_back(AutoModelForCausalLM, both / "merged" / f"q{q}")
    assert AutoTokenizer.from_pretrained(both / "model").get_vocab() == TOKENIZER.get_vocab()
