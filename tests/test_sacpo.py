"""sacpo.py: both losses, pairs and their tokens, whole updates by hand, stages, merging, files, mistakes, processes."""

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import by_hand
import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    changed,
    command,
    contents,
    finish,
    read_lines,
    read_summary,
    recorded_updates,
    run_main,
    start,
    without_times,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import sacpo

TOKENIZER = tiny.make_tokenizer()
EOS = TOKENIZER.eos_token_id
CHOICES = {"helpful": "better_response_id", "safe": "safer_response_id"}
# Float32 against float64: a few units in the last place, relative to the largest entry of each gradient.
ROUNDING = 2e-5


def words(**flags) -> list[str]:
    """Like helpers.command, and a list gives a flag several values."""
    several = {name: value for name, value in flags.items() if isinstance(value, list)}
    line = command(**{name: value for name, value in flags.items() if name not in several})
    for name, values in several.items():
        line += [f"--{name.replace('_', '-')}", *map(str, values)]
    return line


def short_run(files) -> dict:
    """Flags of a short run on the tiny files: five steps a stage."""
    return dict(
        model=files.policy, dataset=files.train, eval_dataset=files.test, eval_split="train", dtype="float32",
        warmup_ratio=0, batch_size=8, micro_batch_size=4, learning_rate=5e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def align(processes, files):
    """align(folder, **flags): main() in this process on the tiny files; an Outcome."""

    def align(folder, **flags):
        return run_main(sacpo, processes, words(**short_run(files) | dict(output_dir=folder) | flags))

    return align


ORDERS = {
    "helpful first": dict(stages=["helpful", "safe"], loss=["dpo", "kto"], merge_q=[0, 0.25, 1]),
    "safe first": dict(stages=["safe", "helpful"], loss=["dpo", "kto"], merge_q=[0.5]),
}


@pytest.fixture(scope="module")
def runs(align, tmp_path_factory):
    """Folders of one run of each order, two epochs a stage."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in ORDERS.items():
        outcome = align(folder / name, epochs=2, beta=0.2, beta_over_lambda=0.05, **flags)
        assert outcome.code == 0, outcome.err
    return {name: folder / name for name in ORDERS}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same_weights(one, other) -> bool:
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- The losses, one number at a time

# log π and log π_ref of chosen and rejected responses; the labels and z_0 of KTO take them as six responses.
CHOSEN, REJECTED = [-12.5, -30.25, -7.0], [-14.0, -21.5, -9.75]
REF_CHOSEN, REF_REJECTED = [-13.0, -28.0, -8.5], [-12.25, -24.0, -9.5]
LABELS = [True, True, False, False, False, True]


def dpo_by_hand(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Loss of a pair and its derivatives by both log-probabilities of the policy."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    slope = beta * by_hand.sigmoid(-margin)
    return -by_hand.log_sigmoid(margin), -slope, slope


def kto_by_hand(logprob, ref_logprob, desirable, z_0, beta, w_desirable, w_undesirable):
    """Loss of a response and its derivative by the policy's log-probability."""
    weight, sign = (w_desirable, 1) if desirable else (w_undesirable, -1)
    value = by_hand.sigmoid(sign * beta * (logprob - ref_logprob - z_0))
    return weight * (1 - value), -weight * sign * beta * value * (1 - value)


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_dpo_loss_and_gradient(beta):
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED))
    losses = sacpo.dpo_loss(chosen, rejected, torch.tensor(REF_CHOSEN), torch.tensor(REF_REJECTED), beta)
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), (chosen, rejected))
    for i, row in enumerate(zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, strict=True)):
        expected = dpo_by_hand(*row, beta)
        assert [losses[i].item(), by_chosen[i].item(), by_rejected[i].item()] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta, z_0", [(0.1, 0.0), (0.5, 1.25), (3.0, 0.5)])
def test_kto_loss_and_gradient(beta, z_0):
    logprobs = torch.tensor(CHOSEN + REJECTED, dtype=torch.float64, requires_grad=True)
    ref = REF_CHOSEN + REF_REJECTED
    losses = sacpo.kto_loss(logprobs, torch.tensor(ref), torch.tensor(LABELS), z_0, beta, 1.25, 0.75)
    (slopes,) = torch.autograd.grad(losses.sum(), logprobs)
    for i, row in enumerate(zip(CHOSEN + REJECTED, ref, LABELS, strict=True)):
        expected = kto_by_hand(*row, z_0, beta, 1.25, 0.75)
        assert [losses[i].item(), slopes[i].item()] == pytest.approx(expected, rel=1e-9)


def test_losses_are_those_of_a_well_known_library():
    """TRL 1.16.0 on the same log-probabilities: DPOTrainer with loss_type sigmoid, KTOTrainer with loss_type kto."""
    pairs = [torch.tensor(x) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    logprobs, ref = torch.cat(pairs[:2]), torch.cat(pairs[2:])
    # KTOTrainer's z_0 from log-ratios of mismatched responses 1.5, 0.5, -1.0, 1.75, -0.25 and 0.5.
    z_0, labels = 0.5, torch.tensor(LABELS)
    for beta, dpo, kto in TRL:
        assert sacpo.dpo_loss(*pairs, beta).mean().item() == pytest.approx(dpo, rel=1e-6)
        assert sacpo.kto_loss(logprobs, ref, labels, z_0, beta, 1.0, 0.75).mean().item() == pytest.approx(kto, rel=1e-6)


TRL = [
    (0.1, 0.7183404564857483, 0.45436015725135803),
    (0.5, 1.0311779975891113, 0.5149676203727722),
]  # β, loss of DPOTrainer, loss of KTOTrainer with weights 1 and 0.75


def test_merge_is_linear_and_exact_at_its_ends():
    one, two = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.equal(sacpo.merge(one, two, 0.0), one) and torch.equal(sacpo.merge(one, two, 1.0), two)
    torch.testing.assert_close(sacpo.merge(one, two, 0.25), 0.75 * one + 0.25 * two)


def test_beta_belongs_to_the_preference():
    for stages in (("helpful", "safe"), ("safe", "helpful"), ("safe",)):
        args = sacpo.Args(stages=stages, loss=("kto",), beta=0.3, beta_over_lambda=0.02)
        betas = {"helpful": 0.3, "safe": 0.02}
        assert sacpo.plan(args) == [(preference, "kto", betas[preference]) for preference in stages]
    args = sacpo.Args(loss=("dpo", "kto"))
    assert [(preference, loss) for preference, loss, _ in sacpo.plan(args)] == [("helpful", "dpo"), ("safe", "kto")]


# ---- KTO's labels, weights and other prompts


def make_pair(prompt, name=""):
    ids = [([len(prompt), 5, 6], [7, ord(name or "a"), EOS]), ([len(prompt), 5], [6, 8, EOS])]
    return sacpo.Pair(prompt, [f"{name}0", f"{name}1"], ids, [True, False])


@pytest.mark.parametrize("prompts", ["xxyxzz", "xy", "xxxxy", "yxxxx", "abcdef"])
def test_responses_are_read_after_the_next_other_prompt(prompts):
    batch = [make_pair(prompt * (1 + ord(prompt) % 7), name) for prompt, name in zip(prompts, "abcdef", strict=False)]
    crossed = sacpo.mismatched(batch, 100)
    assert [pair.responses for pair in crossed] == [pair.responses for pair in batch]
    for i, (pair, other) in enumerate(zip(batch, crossed, strict=True)):
        place = i
        while batch[place].prompt == pair.prompt:
            place = (place + 1) % len(batch)
        assert other.prompt == batch[place].prompt != pair.prompt
        assert other.ids == [(batch[place].ids[k][0], pair.ids[k][1]) for k in (0, 1)]


def test_a_batch_with_one_prompt_has_no_other_prompt_and_texts_are_cut():
    assert sacpo.mismatched([make_pair("x", "a"), make_pair("x", "b")], 100) == []
    crossed = sacpo.mismatched([make_pair("x", "a"), make_pair("yy", "b")], 4)
    assert crossed[0].ids == [([2, 5, 6], [7]), ([2, 5], [6, 8])]


def test_undesirable_weight_balances_both_labels():
    pairs = [sacpo.Pair("", [], [], labels) for labels in ([True, True], [True, False], [False, True], [True, True])]
    assert sacpo.undesirable_weight(pairs, "") == 3.0
    for label in (True, False):
        with pytest.raises(sacpo.UserError, match="unsafe" if not label else "are safe"):
            sacpo.undesirable_weight([sacpo.Pair("", [], [], [label, label])], "--dataset x")


# ---- Pairs and their tokens


def load(name, size=0, **flags):
    args = sacpo.Args(dataset_split="train", **flags)
    return sacpo.load_preferences(args, str(name), "train", "--dataset", TOKENIZER, size)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_pairs_are_ordered_by_their_labels(files, processes, loss):
    rows = read_lines(files.train)
    for preference, pairs in load(files.train, loss=(loss,)).items():
        for row, pair in zip(rows, pairs, strict=True):
            order = (row[CHOICES[preference]], 1 - row[CHOICES[preference]])
            prompt = TOKENIZER(row["prompt"])["input_ids"]
            answers = [TOKENIZER(row[f"response_{i}"])["input_ids"] for i in order]
            assert pair.prompt == row["prompt"] and pair.responses == [row[f"response_{i}"] for i in order]
            assert pair.ids == [(prompt, [*answer, EOS]) for answer in answers]
            safe = [row[f"is_response_{i}_safe"] for i in order]
            assert pair.desirable == (safe if (preference, loss) == ("safe", "kto") else [True, False])
    labels = [pair.desirable for pair in load(files.train, loss=("kto",))["safe"]]
    assert [True, True] in labels and [False, False] in labels


def test_only_needed_columns_are_asked_for(files, tmp_path, processes):
    rows = [
        {name: value for name, value in row.items() if name in ("prompt", "response_0", "response_1", CHOICES["safe"])}
        for row in read_lines(files.train)
    ]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    assert load(data, stages=("safe",)) == load(files.train, stages=("safe",))
    for flags, column in (
        (dict(), "better_response_id"),
        (dict(stages=("safe",), loss=("kto",)), "is_response_0_safe"),
    ):
        with pytest.raises(sacpo.UserError, match=f"no column '{column}'"):
            load(data, **flags)


def test_template_and_length(files, processes):
    plain, framed = load(files.train)["helpful"], load(files.train, prompt_template="ba {prompt} pi ")["helpful"]
    ba, pi = TOKENIZER("ba pi")["input_ids"]
    assert framed[0].ids == [([ba, *prompt, pi], response) for prompt, response in plain[0].ids]
    for pair, cut in zip(plain, load(files.train, max_prompt_length=8, max_length=9)["helpful"], strict=True):
        assert cut.ids == [(prompt, response[: 9 - len(prompt)]) for prompt, response in pair.ids]


def test_long_prompts_are_dropped_and_counted(files, processes, capsys):
    everything = load(files.train)["safe"]
    kept = load(files.train, max_prompt_length=5)
    assert kept["safe"] == [pair for pair in everything if len(pair.ids[0][0]) <= 5] and len(kept["safe"]) < 40
    dropped = 40 - len(kept["safe"])
    assert f"--dataset: dropped {dropped} of 40 pairs" in capsys.readouterr().out
    with pytest.raises(sacpo.UserError, match="all prompts are over --max-prompt-length 1"):
        load(files.train, max_prompt_length=1)


def test_a_subset_is_random_and_the_same_in_both_stages(files, processes):
    whole = load(files.train)
    subsets = {seed: load(files.train, size=9, seed=seed) for seed in (1, 2)}
    places = {}
    for seed, subset in subsets.items():
        assert subset == load(files.train, size=9, seed=seed)
        places[seed] = [whole["safe"].index(pair) for pair in subset["safe"]]
        assert places[seed] == [whole["helpful"].index(pair) for pair in subset["helpful"]]
        assert len(set(places[seed])) == 9 and places[seed] == sorted(places[seed]) != list(range(9))
    assert places[1] != places[2]
    assert load(files.train, size=40) == load(files.train, size=99) == whole


def test_a_text_is_parted_where_it_leaves_the_prompt():
    assert sacpo.part([3, 4, 5, 6, 1], [3, 4]) == ([3, 4], [5, 6, 1])
    assert sacpo.part([3, 9, 6, 1], [3, 4]) == ([3], [9, 6, 1])  # the prompt's last token joined the response's first
    assert sacpo.part([3, 4], [3, 4]) == ([3], [4])  # nothing after the prompt: its end is the response


@pytest.mark.parametrize("size", [1, 3, 40])
def test_logprobs_are_sums_over_the_tokens_of_a_response(files, processes, size):
    """Of texts read one by one, without padding; all_logprobs keeps the order of the pairs."""
    plain = AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float64)
    policy = AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float32)
    pairs = load(files.train)["helpful"]
    with torch.no_grad():
        expected = torch.tensor([[by_hand.logprobs(plain, *ids, 1.0).sum() for ids in pair.ids] for pair in pairs])
    logprobs = sacpo.all_logprobs(policy, pairs, size, TOKENIZER.pad_token_id, torch.device("cpu"))
    assert logprobs.dtype == torch.float32 and logprobs.shape == (40, 2)
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-5, atol=1e-4)
    few = sacpo.pair_logprobs(policy, pairs[:3], TOKENIZER.pad_token_id, torch.device("cpu"))
    torch.testing.assert_close(few.detach(), logprobs[:3], rtol=1e-5, atol=1e-4)


def test_a_pad_token_that_cannot_be_leaves_no_nan(files):
    """Some models give their padding a logit of minus infinity."""
    policy = AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float32)
    pad_id = TOKENIZER.pad_token_id

    def never(*args, **kwargs):
        output = policy(*args, **kwargs)
        output.logits = output.logits.index_fill(2, torch.tensor([pad_id]), -math.inf)
        return output

    logprobs = sacpo.pair_logprobs(never, load(files.train)["helpful"], pad_id, torch.device("cpu"))
    assert logprobs.isfinite().all()
    assert all(value.isfinite().all() for value in torch.autograd.grad(logprobs.sum(), policy.parameters()))


def test_batches_hold_all_pairs_in_a_new_order_each_epoch():
    batches = sacpo.stage_batches(3, "safe", 2, 11, 4)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4]
    for one, two in (batches[:2], batches[2:]):
        assert len({*one, *two}) == 8 and {*one, *two} <= set(range(11))
    assert batches[0] != batches[2] and batches != sacpo.stage_batches(4, "safe", 2, 11, 4)
    assert batches != sacpo.stage_batches(3, "helpful", 2, 11, 4) and batches == sacpo.stage_batches(
        3, "safe", 2, 11, 4
    )


# ---- Whole updates by hand


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("preference", ["helpful", "safe"])
def test_updates_by_hand(align, tmp_path, files, preference, loss):
    """Two epochs of two batches, four pairs a prompt; texts are read one by one by an unsharded float64 model."""
    rows = tiny.make_pairs(20, seed=4)
    for i in range(20):
        rows[i]["prompt"] = rows[i // 4 * 4]["prompt"]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    flags = dict(dataset=data, stages=[preference], loss=[loss], beta=0.4, beta_over_lambda=0.7, epochs=2)
    flags |= dict(batch_size=10, micro_batch_size=3, learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.05)
    with recorded_updates(sacpo) as updates:
        outcome = align(tmp_path / "run", **flags)
    assert outcome.code == 0, outcome.err
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(updates) == len(metrics) == 4

    def logprob(model, prompt, response):
        ids = [TOKENIZER(text)["input_ids"] for text in (prompt, response)]
        return by_hand.logprobs(model, ids[0], [*ids[1], EOS], 1.0).sum()

    beta = 0.4 if preference == "helpful" else 0.7
    labels = []
    for row in rows:
        better = row[CHOICES[preference]]
        labels.append([row[f"is_response_{i}_safe"] if preference == "safe" else i == better for i in (0, 1)])
    good = sum(map(sum, labels))
    reference = AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float64).requires_grad_(False)
    order = [torch.randperm(20, generator=sacpo.random_generator(1, "pairs", preference, e)).tolist() for e in (0, 1)]
    raw, neighbours = [], 0
    optimizer = None
    for step, (state, gradients) in enumerate(updates):
        model = AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float64)
        model.load_state_dict(state)

        def log_ratio(prompt, response, model=model):
            return logprob(model, prompt, response) - logprob(reference, prompt, response)

        batch = order[step // 2][10 * (step % 2) :][:10]
        ratios = [[log_ratio(rows[i]["prompt"], rows[i][f"response_{k}"]) for k in (0, 1)] for i in batch]
        if loss == "dpo":
            total = 0.0
            for i, pair in zip(batch, ratios, strict=True):
                better = rows[i][CHOICES[preference]]
                total = total - torch.nn.functional.logsigmoid(beta * (pair[better] - pair[1 - better]))
            total = total / 10
        else:
            mismatched = []
            for place, i in enumerate(batch):
                other = place
                while rows[batch[other]]["prompt"] == rows[i]["prompt"]:
                    other = (other + 1) % 10
                neighbours += other != (place + 1) % 10
                prompt = rows[batch[other]]["prompt"]
                mismatched += [log_ratio(prompt, rows[i][f"response_{k}"]).item() for k in (0, 1)]
            raw.append(sum(mismatched) / 20)
            z_0, total = max(0.0, raw[-1]), 0.0
            for i, pair in zip(batch, ratios, strict=True):
                for ratio, label in zip(pair, labels[i], strict=True):
                    if label:
                        total = total + (1 - torch.sigmoid(beta * (ratio - z_0)))
                    else:
                        total = total + good / (40 - good) * (1 - torch.sigmoid(beta * (z_0 - ratio)))
            total = total / 20
            assert metrics[step]["z_0"] == pytest.approx(z_0, rel=1e-4, abs=1e-5)

        derived = dict(zip(state, torch.autograd.grad(total, model.parameters()), strict=True))
        scale = max(gradient.abs().max().item() for gradient in derived.values())
        for name, gradient in gradients.items():
            assert (gradient.double() - derived[name]).abs().max() <= 5 * ROUNDING * scale, name
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
        rate = 0.02 * (1 + math.cos(math.pi * step / 4)) / 2
        chosen = [pair[rows[i][CHOICES[preference]]].item() for i, pair in zip(batch, ratios, strict=True)]
        rejected = [pair[1 - rows[i][CHOICES[preference]]].item() for i, pair in zip(batch, ratios, strict=True)]
        expected = {
            "loss": total.item(),
            "chosen_log_ratio": sum(chosen) / 10,
            "rejected_log_ratio": sum(rejected) / 10,
            "grad_norm": norm,
            "learning_rate": rate,
        }
        assert {name: metrics[step][name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if step:
            right = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / 10
            assert metrics[step]["pair_accuracy"] == pytest.approx(right)

        # The optimizer's step from the recorded gradients: with those by hand Adam would magnify rounding.
        if optimizer is None:
            parameters = {name: value.double().requires_grad_() for name, value in state.items()}
            optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), weight_decay=0.1)
        optimizer.param_groups[0]["lr"] = rate
        for name, value in parameters.items():
            value.grad = gradients[name].double() * min(1.0, 0.05 / (norm + 1e-6))
        optimizer.step()
        if step < 3:
            for name, value in parameters.items():
                assert (updates[step + 1][0][name] - value).abs().max() <= 1e-4, name
    assert loss == "dpo" or neighbours > 0  # prompts did meet themselves
    if loss == "kto":
        assert raw[0] == pytest.approx(0, abs=1e-6) and max(map(abs, raw)) > 0.01


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_z_0_is_the_mean_log_ratio_cut_at_zero(align, tmp_path, shift):
    """A reference that gives every text e^shift times less: at the first step all log-ratios are the shift."""
    all_logprobs = sacpo.all_logprobs
    with changed(sacpo, all_logprobs=lambda *args: all_logprobs(*args) - shift):
        outcome = align(tmp_path / "run", stages=["helpful"], loss=["kto"], beta=0.7)
    assert outcome.code == 0, outcome.err
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["z_0"] == pytest.approx(max(0.0, shift), abs=1e-5)
    losses = [kto_by_hand(shift, 0.0, label, max(0.0, shift), 0.7, 1.0, 1.0)[0] for label in (True, False)]
    assert first["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_micro_batches_checkpointing_and_compiling_do_not_change_an_update(align, graphs, tmp_path, loss):
    recorded = {}
    for size, flags in ((8, {}), (3, dict(compile=True)), (1, dict(gradient_checkpointing=True))):
        with recorded_updates(sacpo) as updates:
            folder = tmp_path / str(size)
            outcome = align(folder, stages=["safe"], loss=[loss], micro_batch_size=size, max_grad_norm=0.1, **flags)
        assert outcome.code == 0, outcome.err
        assert bool(graphs) == (size < 8)
        recorded[size] = updates[:2], read_lines(folder / "metrics.jsonl")
    for size in (3, 1):
        for (_, one), (_, other) in zip(recorded[8][0], recorded[size][0], strict=True):
            scale = max(gradient.abs().max() for gradient in one.values())
            assert all((one[name] - other[name]).abs().max() <= 1e-3 * scale for name in one)
        (_, one), (_, other) = recorded[8][0][0], recorded[size][0][0]
        scale = max(gradient.abs().max() for gradient in one.values())
        assert all((one[name] - other[name]).abs().max() <= ROUNDING * scale for name in one)
        for line, expected in zip(recorded[size][1][:2], recorded[8][1][:2], strict=True):
            numbers = set(line) - {"preference", "pair_accuracy"}  # at the first step all log-ratios are 0 or rounding
            one, other = ({name: entry[name] for name in numbers} for entry in (line, expected))
            assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_a_batch_of_one_prompt_has_z_0_zero(align, files, tmp_path):
    rows = [row | dict(prompt="ba?") for row in read_lines(files.train)]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    outcome = align(tmp_path / "run", dataset=data, loss=["kto"], stages=["helpful"], learning_rate=0.05)
    assert outcome.code == 0, outcome.err
    assert [line["z_0"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0.0] * 5


# ---- Stages


@pytest.mark.parametrize("name", ORDERS)
def test_the_second_stage_is_an_alignment_of_the_first_result(runs, align, files, tmp_path, name):
    """Bit for bit: its policy, its reference, a fresh optimizer and schedule, its own β, loss and order."""
    stages, losses = ORDERS[name]["stages"], ORDERS[name]["loss"]
    for stage, model in ((1, files.policy), (2, runs[name] / "stage1")):
        flags = dict(model=model, stages=[stages[stage - 1]], loss=[losses[stage - 1]])
        outcome = align(tmp_path / f"{stage}", epochs=2, beta=0.2, beta_over_lambda=0.05, **flags)
        assert outcome.code == 0, outcome.err
        assert same_weights(tmp_path / f"{stage}" / "stage1", runs[name] / f"stage{stage}")
        assert not (tmp_path / f"{stage}" / "stage2").exists()
        own = [line | dict(stage=stage) for line in read_lines(tmp_path / f"{stage}" / "metrics.jsonl")]
        assert own == [line for line in read_lines(runs[name] / "metrics.jsonl") if line["stage"] == stage]


@pytest.mark.parametrize("name", ORDERS)
def test_a_stage_starts_at_its_reference(runs, name):
    for line in read_lines(runs[name] / "metrics.jsonl"):
        if line["step"] == 1:
            assert line["chosen_log_ratio"] == pytest.approx(0, abs=1e-4)
            assert line["rejected_log_ratio"] == pytest.approx(0, abs=1e-4)
            start_loss = math.log(2) if "z_0" not in line else None
            assert start_loss is None or line["loss"] == pytest.approx(start_loss, abs=1e-4)
    lines = [line for line in read_lines(runs[name] / "metrics.jsonl") if line["step"] == 10]
    assert all(line["chosen_log_ratio"] > line["rejected_log_ratio"] + 0.1 for line in lines)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_reference_is_read_once(align, tmp_path, files, loss):
    """Every text once without gradients before the first update, and no second model."""
    read, updates, models = [], [], []
    pair_logprobs, clip_gradients, load_pretrained = sacpo.pair_logprobs, sacpo.clip_gradients, sacpo.load_pretrained

    def record_reading(policy, pairs, *rest):
        if not updates and not torch.is_grad_enabled():
            read.extend((pair.prompt, response) for pair in pairs for response in pair.responses)
        return pair_logprobs(policy, pairs, *rest)

    recorders = dict(
        pair_logprobs=record_reading,
        clip_gradients=lambda *args: updates.append(1) or clip_gradients(*args),
        load_pretrained=lambda *args: models.append(1) or load_pretrained(*args),
    )
    with changed(sacpo, **recorders):
        outcome = align(tmp_path / "run", stages=["helpful"], loss=[loss], epochs=3)
    assert outcome.code == 0, outcome.err
    rows = read_lines(files.train) + read_lines(files.test)
    texts = [(row["prompt"], row[f"response_{i}"]) for row in rows for i in (0, 1)]
    assert len(models) == 1 and len(updates) == 15
    if loss == "dpo":
        assert sorted(read) == sorted(texts)
    else:  # also each response of the three epochs after another prompt; then z_0 of the first batch
        assert len(read) == len(texts) + 3 * 80 + 16
        crossed = read[len(texts) :]
        assert not set(crossed) & set(texts)
        assert sorted(response for _, response in crossed[: 3 * 80]) == sorted(r for _, r in texts[:80] * 3)


# ---- Merging and files


def test_merged_weights_lie_between_the_stages(runs):
    helpful_first = runs["helpful first"]
    assert same_weights(helpful_first / "merged" / "q0", helpful_first / "stage1")
    assert same_weights(helpful_first / "merged" / "q1", helpful_first / "stage2")
    assert not same_weights(helpful_first / "stage1", helpful_first / "stage2")
    for folder, q in ((helpful_first / "merged" / "q0.25", 0.25), (runs["safe first"] / "merged" / "q0.5", 0.5)):
        one, two = (weights_of(folder.parent.parent / name) for name in ("stage1", "stage2"))
        for name, value in weights_of(folder).items():
            torch.testing.assert_close(value, (1 - q) * one[name] + q * two[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ORDERS)
def test_a_run_writes_its_files(runs, name):
    folder = runs[name]
    names = {path.name for path in folder.iterdir()}
    expected = {"args.json", "metrics.jsonl", "eval.jsonl", "summary.json", "tensorboard"}
    assert names == expected | {"stage1", "stage2", "merged", "model"}
    assert {path.name for path in (folder / "merged").iterdir()} == {f"q{q}" for q in ORDERS[name]["merge_q"]}
    assert os.readlink(folder / "model") == "stage2"
    for path in (folder / "model", folder / "stage1", *(folder / "merged").iterdir()):
        assert {file.suffix for file in path.iterdir()} <= {".json", ".safetensors", ".md"}
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in model.parameters())
        assert AutoTokenizer.from_pretrained(path).get_vocab() == TOKENIZER.get_vocab()
    args = json.loads((folder / "args.json").read_text())
    assert set(args) == set(sacpo.Args.__dataclass_fields__)
    assert args["stages"] == ORDERS[name]["stages"] and args["merge_q"] == ORDERS[name]["merge_q"]


@pytest.mark.parametrize("name", ORDERS)
def test_metrics_and_summary(runs, name):
    stages, losses = ORDERS[name]["stages"], ORDERS[name]["loss"]
    metrics, summary = read_lines(runs[name] / "metrics.jsonl"), read_summary(runs[name])
    assert [(line["stage"], line["step"]) for line in metrics] == [(s, i) for s in (1, 2) for i in range(1, 11)]
    assert all(line["preference"] == stages[line["stage"] - 1] for line in metrics)
    assert [line["step"] for line in metrics if "eval_pair_accuracy" in line] == [5, 10] * 2
    assert [line["epoch"] for line in metrics[:10]] == pytest.approx([i / 5 for i in range(1, 11)])
    assert all(("z_0" in line) == (losses[line["stage"] - 1] == "kto") for line in metrics)
    board = EventAccumulator(str(runs[name] / "tensorboard")).Reload()
    logged = {f"stage{line['stage']}/{key}" for line in metrics for key in line if key not in ("stage", "preference")}
    assert set(board.Tags()["scalars"]) == logged
    facts = {"algorithm": "sacpo", "seed": 1, "dtype": "float32", "processes": 1, "pairs": 160, "eval_pairs": 13}
    facts |= {"skipped_updates": 0, "merged": [f"merged/q{q}" for q in ORDERS[name]["merge_q"]]}
    assert summary.items() >= facts.items() and summary["pairs_per_second"] > 0
    betas = {"helpful": 0.2, "safe": 0.05}
    for stage, entry in enumerate(summary["stages"], start=1):
        preference = stages[stage - 1]
        about = {"preference": preference, "loss": losses[stage - 1], "beta": betas[preference]}
        assert entry.items() >= about.items()
        last = [line for line in metrics if line["stage"] == stage][-1]
        assert {f"eval_{key}": value for key, value in entry["eval"].items()}.items() <= last.items()


@pytest.mark.parametrize("name", ORDERS)
def test_eval_rows_are_log_ratios_of_a_stage_to_the_one_before(runs, files, name):
    summary, rows = read_summary(runs[name]), read_lines(runs[name] / "eval.jsonl")
    given = read_lines(files.test)
    folders = [files.policy, runs[name] / "stage1", runs[name] / "stage2"]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]
    assert len(rows) == 26
    for i, row in enumerate(rows):
        stage, source = 1 + i // 13, given[i % 13]
        preference, loss = (ORDERS[name][key][stage - 1] for key in ("stages", "loss"))
        first = source[CHOICES[preference]]
        assert (row["stage"], row["preference"], row["prompt"]) == (stage, preference, source["prompt"])
        assert row["responses"] == [source[f"response_{k}"] for k in (first, 1 - first)]
        for response, value in zip(row["responses"], row["log_ratios"], strict=True):
            ids = [TOKENIZER(text)["input_ids"] for text in (row["prompt"], response)]
            with torch.no_grad():
                new, old = (by_hand.logprobs(models[k], ids[0], [*ids[1], EOS], 1.0).sum() for k in (stage, stage - 1))
            assert value == pytest.approx((new - old).item(), abs=1e-4)
        safe = [source[f"is_response_{k}_safe"] for k in (first, 1 - first)]
        assert row["desirable"] == (safe if (preference, loss) == ("safe", "kto") else [True, False])
    for stage in (1, 2):
        ratios = [row["log_ratios"] for row in rows if row["stage"] == stage]
        expected = {
            "pair_accuracy": sum(chosen > rejected for chosen, rejected in ratios) / 13,
            "chosen_log_ratio": sum(chosen for chosen, _ in ratios) / 13,
            "rejected_log_ratio": sum(rejected for _, rejected in ratios) / 13,
        }
        assert summary["stages"][stage - 1]["eval"] == pytest.approx(expected, rel=1e-5)


def test_options_run_and_seeds_repeat(align, tmp_path):
    names = dict(plain={}, same={}, seed=dict(seed=2), low=dict(dtype="bfloat16"))
    losses = {}
    for name, flags in names.items():
        outcome = align(tmp_path / name, stages=["helpful"], train_size=24, **flags)
        assert outcome.code == 0, outcome.err
        losses[name] = [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
    assert losses["same"] == losses["plain"] != losses["seed"] and len(losses["plain"]) == 3
    assert losses["low"] == pytest.approx(losses["plain"], rel=0.1) and losses["low"] != losses["plain"]
    same, plain = (without_times(read_summary(tmp_path / name)) for name in ("same", "plain"))
    assert same == plain and read_summary(tmp_path / "low")["dtype"] == "bfloat16"
    assert same_weights(tmp_path / "same" / "model", tmp_path / "plain" / "model")


def test_pad_may_be_eos(align, tmp_path):
    model = tiny.make_model(tmp_path / "policy", tokenizer=tiny.make_tokenizer(pad=False))
    outcome = align(tmp_path / "run", model=model, stages=["safe"])
    assert outcome.code == 0, outcome.err
    trained, start = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (tmp_path / "run" / "model", model)
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in read_lines(tmp_path / "run" / "eval.jsonl")[:3]:
        ids = [tokenizer(text)["input_ids"] for text in (row["prompt"], row["responses"][0])]
        with torch.no_grad():
            new, old = (by_hand.logprobs(m, ids[0], [*ids[1], 1], 1.0).sum().item() for m in (trained, start))
        assert row["log_ratios"][0] == pytest.approx(new - old, abs=1e-4)


# ---- Mistakes


def refused(outcome, folder, *parts):
    line = outcome.err.strip()
    assert outcome.code == 2 and line.startswith("error: ") and len(line.splitlines()) == 1, outcome
    assert "Traceback" not in outcome.out and not folder.exists()
    for part in parts:
        assert str(part) in line, f"{part!r} is not in: {line}"


@pytest.mark.parametrize(
    "flags, parts",
    [
        (dict(bath_size=8), ["bath-size"]),
        (dict(loss=["ppo"]), ["loss", "ppo"]),
        (dict(loss=["dpo", "kto", "dpo"]), ["--loss dpo kto dpo", "one for each"]),
        (dict(loss=["dpo", "kto"], stages=["safe"]), ["--loss dpo kto"]),
        (dict(stages=["safe", "safe"]), ["--stages safe safe", "each once"]),
        (dict(stages=["harmless"]), ["stages", "harmless"]),
        (dict(beta=0), ["--beta is 0"]),
        (dict(beta_over_lambda="inf"), ["--beta-over-lambda is inf"]),
        (dict(epochs=0), ["--epochs is 0"]),
        (dict(batch_size=0), ["--batch-size is 0"]),
        (dict(batch_size=41), ["--batch-size 41", "40 training pairs"]),
        (dict(train_size=7), ["--batch-size 8", "7 training pairs"]),
        (dict(train_size=-1), ["--train-size is -1"]),
        (dict(batch_size=1, loss=["kto"]), ["--batch-size is 1", "kto"]),
        (dict(micro_batch_size=-1), ["--micro-batch-size is -1"]),
        (dict(learning_rate="nan"), ["--learning-rate is nan"]),
        (dict(warmup_ratio=1.5), ["--warmup-ratio is 1.5"]),
        (dict(weight_decay=-1), ["--weight-decay is -1"]),
        (dict(max_grad_norm=0), ["--max-grad-norm is 0"]),
        (dict(seed=2**70), ["--seed"]),
        (dict(merge_q=[0.5, 1.5]), ["--merge-q 1.5", "from 0 to 1"]),
        (dict(merge_q=["nan"]), ["--merge-q nan"]),
        (dict(merge_q=[0.5, 0.5]), ["--merge-q 0.5 0.5", "once"]),
        (dict(merge_q=[0.5], stages=["safe"]), ["--merge-q", "two --stages"]),
        (dict(prompt_template="Q:"), ["--prompt-template", "{prompt}"]),
        (dict(max_length=64), ["--max-length 64", "--max-prompt-length 64"]),
        (dict(max_prompt_length=1), ["--dataset", "all prompts", "--max-prompt-length 1"]),
        (dict(model="nobody/nothing"), ["--model nobody/nothing", os.path.abspath("nobody/nothing")]),
        (dict(dataset="nobody/nothing"), ["--dataset nobody/nothing"]),
        (dict(eval_dataset="nobody/nothing"), ["--eval-dataset nobody/nothing"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_flags(align, tmp_path, flags, parts):
    refused(align(tmp_path / "out", **flags), tmp_path / "out", *parts)


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(prompt=""), "'prompt'"),
        (dict(response_1=" "), "'response_1'"),
        (dict(better_response_id=2), "better_response_id 2"),
        (dict(safer_response_id=None), "safer_response_id None"),
        (dict(is_response_0_safe=None), "is_response_0_safe None; it must be true or false"),
    ],
)
def test_rows(align, files, tmp_path, change, part):
    rows = read_lines(files.train)
    rows[3] |= change
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    for flag in ("dataset", "eval_dataset"):
        outcome = align(tmp_path / "out", loss=["kto"], **{flag: data})
        refused(outcome, tmp_path / "out", f"--{flag.replace('_', '-')} {data}", "row 3", part)


def test_kto_needs_both_labels(align, files, tmp_path):
    rows = [row | dict(is_response_0_safe=True, is_response_1_safe=True) for row in read_lines(files.train)]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    refused(align(tmp_path / "out", dataset=data, loss=["kto"]), tmp_path / "out", data, "all responses are safe")


@pytest.mark.parametrize("loss, row, longest", [("dpo", 1, 17), ("kto", 0, 16)])
def test_texts_longer_than_the_model_reads(align, tmp_path, loss, row, longest):
    """KTO also joins the longest prompt with the longest response."""
    model = tiny.make_model(tmp_path / "model", max_position_embeddings=longest - 1)
    rows = [pair | dict(prompt="ba pi?", response_0="ba", response_1="pi") for pair in tiny.make_pairs(16)]
    rows[0] |= dict(prompt="ba " * 7)
    rows[row] |= dict(prompt="ba " * 7)
    rows[1] |= dict(response_0="pi " * 9 if loss == "dpo" else "pi " * 8)
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    outcome = align(tmp_path / "out", model=model, dataset=data, eval_dataset=data, loss=[loss])
    refused(outcome, tmp_path / "out", f"{longest} tokens", f"--max-length to {longest - 1}")


def test_batches_are_split_evenly():
    message = r"--batch-size 16 .* 3 processes.* multiple of 3"
    with changed(sacpo.dist, get_world_size=lambda: 3), pytest.raises(sacpo.UserError, match=message):
        sacpo.check_args(sacpo.Args(batch_size=16))


def test_a_folder_with_a_run_is_refused(align, runs):
    folder = runs["safe first"]
    before = contents(folder)
    outcome = align(folder)
    assert outcome.code == 2 and "finished run" in outcome.err and contents(folder) == before


def test_updates_that_are_not_finite(align, files, tmp_path):
    """Five in a row end the run; one is skipped and counted, and the policy stays."""

    def broken(weights):
        weights["model.norm.weight"].fill_(math.nan)

    model = tiny.copy_model(files.policy, tmp_path / "model", broken)
    outcome = align(tmp_path / "out", model=model)
    assert outcome.code == 2 and len(outcome.errors) == 1 and "5 updates in a row" in outcome.errors[0]
    assert outcome.err.count("update skipped") == 5

    calls, dpo_loss = [], sacpo.dpo_loss

    def second_is_broken(*args):
        calls.append(1)
        return dpo_loss(*args) * (math.nan if len(calls) == 3 else 1)  # two micro-batches a step

    with changed(sacpo, dpo_loss=second_is_broken), recorded_updates(sacpo) as updates:
        outcome = align(tmp_path / "one", stages=["helpful"])
    assert outcome.code == 0 and outcome.err.count("update skipped") == 1
    assert read_summary(tmp_path / "one")["skipped_updates"] == 1
    assert [line["skipped_updates"] for line in read_lines(tmp_path / "one" / "metrics.jsonl")] == [0, 1, 1, 1, 1]
    (before, _), (after, gradients) = updates[1:3]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


# ---- What the page says

PAGE = ROOT / "docs" / "sacpo.md"


def test_each_metric_is_documented_and_each_documented_one_is_logged(runs):
    text = PAGE.read_text(encoding="utf-8").partition("## Logged metrics")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    logged = {name for folder in runs.values() for line in read_lines(folder / "metrics.jsonl") for name in line}
    assert set(documented) == logged and len(documented) == len(logged)


def test_the_keys_of_the_summary_and_of_the_rows_are_documented(runs):
    text, folder = PAGE.read_text(encoding="utf-8"), runs["safe first"]
    summary = read_summary(folder)
    names = [*summary, *summary["stages"][0], *summary["stages"][0]["eval"], *read_lines(folder / "eval.jsonl")[0]]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", [PAGE, ROOT / "sacpo.py", ROOT / "README.md"], ids=lambda path: path.name)
def test_commands_use_flags_that_exist(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(sacpo.Args)} | {"--help"}
    for line in re.findall(r"sacpo\.py( [^\n;|&#]*)", text):
        assert set(re.findall(r" (--[a-z][a-z-]+)", line)) <= flags, line


# ---- Processes


def worker(folder, jobs):
    """What every process of torchrun does: all the runs, one after the other."""
    processes = sacpo.start_processes()
    for name, line in jobs.items():
        copies = name == "kto"  # else every model is sharded
        with recorded_updates(sacpo) as updates, changed(sacpo, is_small=lambda model, copies=copies: copies):
            outcome = run_main(sacpo, processes, [*line, "--output-dir", f"{folder}/{name}"])
        if outcome.code:
            sys.exit(f"{name}: {outcome}")
        if dist.get_rank() == 0:
            torch.save(updates[0], f"{folder}/{name}/updates.pt")
    sacpo.shut_down()


def test_two_processes_do_what_one_does(processes, files, tmp_path):
    """Gradients, metrics, rows and merged weights, up to the order of sums. 13 held-out pairs are no multiple of 2."""
    jobs = {
        name: words(**short_run(files) | flags | dict(micro_batch_size=3, learning_rate=1e-3, merge_q=[0.5]))
        for name, flags in {"dpo": dict(loss=["dpo"]), "kto": dict(loss=["kto"], stages=["safe", "helpful"])}.items()
    }
    (tmp_path / "two").mkdir()
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    started = start([__file__, tmp_path / "two", tmp_path / "jobs.json"], processes=2, python_path=ROOT)
    for name, line in jobs.items():
        with recorded_updates(sacpo) as updates:
            assert run_main(sacpo, processes, [*line, "--output-dir", str(tmp_path / "one" / name)]).code == 0
        torch.save(updates[0], tmp_path / "one" / name / "updates.pt")
    outcome = finish(started, seconds=400)
    assert outcome.code == 0, f"{outcome.out}\n{outcome.err}"
    for name in jobs:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        (_, expected), (_, gradients) = (torch.load(folder / "updates.pt") for folder in (one, two))
        scale = max(gradient.abs().max() for gradient in expected.values())
        assert all((gradients[key] - expected[key]).abs().max() <= 1e-5 * scale for key in expected)
        for file in ("metrics.jsonl", "eval.jsonl"):
            lines = zip(read_lines(two / file), read_lines(one / file), strict=True)
            for line, expected_line in lines:
                numbers = {key: value for key, value in expected_line.items() if isinstance(value, float | list)}
                for key, value in expected_line.items():
                    if "accuracy" in key and line["step"] == 1:
                        continue  # all log-ratios are 0 or rounding
                    within = key in numbers and key not in ("responses", "desirable")
                    assert line[key] == (pytest.approx(value, rel=2e-3, abs=2e-3) if within else value), key
        summaries = [without_times(read_summary(folder)) for folder in (two, one)]
        assert [summary["processes"] for summary in summaries] == [2, 1]
        for folder in ("stage1", "stage2", "merged/q0.5", "model"):
            weights, expected = weights_of(two / folder), weights_of(one / folder)
            assert weights.keys() == expected.keys()
            differences = torch.cat([(weights[key] - expected[key]).abs().flatten() for key in expected])
            # Adam divides a gradient by its size: an entry that is all rounding may go either way.
            assert (differences > 1e-4).float().mean() < 0.01 and differences.max() <= 2 * 1e-3 * 10


if __name__ == "__main__":
    worker(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
