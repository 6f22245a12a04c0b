"""preference_models.py: both losses, whole updates by hand, what both kinds learn, and the files they write."""

import math

import by_hand
import pytest
import tiny
import torch
from helpers import assert_near, read_back, read_lines, read_summary, recorded_updates
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import preference_models

ROUNDING = 2e-5
EVERY_KIND = pytest.mark.parametrize("kind", ["reward", "cost"])


def first_of(row: dict, kind: str) -> int:
    """The response that comes first: the better one, or the more harmful one."""
    return row["better_response_id"] if kind == "reward" else 1 - row["safer_response_id"]


def test_losses_and_their_gradients():
    """Numbers of one pair, and derivatives by the closed form, with σ(x) = 1 / (1 + exp(-x))."""
    scores = torch.tensor([[1.5, -0.5, 3e4], [-0.5, 1.0, -3e4]], dtype=torch.float64, requires_grad=True)
    losses = preference_models.reward_loss(*scores, 0.1)
    (gradient,) = torch.autograd.grad(losses[:2].sum(), scores)
    for i, (better, worse) in enumerate([(1.5, -0.5), (-0.5, 1.0)]):
        wrong = 1 / (1 + math.exp(better - worse))
        expected = math.log(1 + math.exp(worse - better)) + 0.1 * (better**2 + worse**2) / 2
        assert losses[i].item() == pytest.approx(expected)
        assert gradient[:, i].tolist() == pytest.approx([0.1 * better - wrong, 0.1 * worse + wrong])
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]])
    losses = preference_models.cost_loss(*scores, *signs, 0.0)
    (gradient,) = torch.autograd.grad(losses[:2].sum(), scores)
    for i, (unsafer, safer, sign) in enumerate([(1.5, -0.5, 1), (-0.5, 1.0, -1)]):
        terms = [(unsafer - safer, (1, -1)), (sign * unsafer, (sign, 0)), (-safer, (0, -1))]
        assert losses[i].item() == pytest.approx(sum(math.log(1 + math.exp(-x)) for x, _ in terms))
        slopes = [sum(-by[j] / (1 + math.exp(x)) for x, by in terms) for j in (0, 1)]
        assert gradient[:, i].tolist() == pytest.approx(slopes)
    assert losses[2].item() == 0  # no overflow in the exponentials


@EVERY_KIND
def test_updates_by_hand(run, files, tmp_path, kind):
    """One batch of all 40 pairs, in micro-batches of 7, two epochs; texts are read one by one in float64."""
    flags = dict(kind=kind, batch_size=40, micro_batch_size=7, epochs=2, regularization=0.1, max_grad_norm=0.5)
    with recorded_updates() as updates:
        assert run(preference_models, output_dir=tmp_path / "run", model=files.cost, **flags).code == 0
    metrics, tokenizer = read_lines(tmp_path / "run" / "metrics.jsonl"), tiny.make_tokenizer()
    masters = [value.double().requires_grad_() for value in updates[0][0]]
    optimizer = torch.optim.AdamW(masters, betas=(0.9, 0.95), weight_decay=0.1)
    for step, (parameters, gradients) in enumerate(updates):
        model, total, right = by_hand.plain_scorer(files.cost, parameters), 0.0, 0
        for row in read_lines(files.train):
            order = (first_of(row, kind), 1 - first_of(row, kind))
            texts = [tokenizer(f"{row['prompt']} {row[f'response_{i}']}")["input_ids"] + [1] for i in order]
            scores = [by_hand.token_scores(model, ids)[-1] for ids in texts]
            total = total - logsigmoid(scores[0] - scores[1]) + 0.1 * (scores[0] ** 2 + scores[1] ** 2) / 2
            right += scores[0].item() > scores[1].item()
            for i, score in zip(order, scores, strict=True) if kind == "cost" else ():
                total = total - logsigmoid(-score if row[f"is_response_{i}_safe"] else score)
        assert_near(parameters, [value.detach() for value in masters], ROUNDING)
        assert_near(gradients, torch.autograd.grad(total / 40, model.parameters()), ROUNDING)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.double()
        norm = torch.nn.utils.clip_grad_norm_(masters, 0.5).item()
        rate = optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 2)) / 2
        optimizer.step()
        expected = dict(loss=total.item() / 40, pair_accuracy=right / 40, grad_norm=norm, learning_rate=rate)
        assert {name: metrics[step][name] for name in expected} == pytest.approx(expected, rel=ROUNDING)


def test_the_row_of_eos_is_trained_where_it_is_also_the_pad_token(run, tmp_path):
    """The gradients of all rows of the embedding are those with another pad token in the configuration."""
    source, gradients = tiny.make_model(tmp_path / "model", tokenizer=tiny.make_tokenizer(pad=False)), []
    for pad in (1, 60):
        folder = tiny.copy_model(source, tmp_path / f"pad {pad}", pad_token_id=pad)
        with recorded_updates() as updates:
            assert run(preference_models, output_dir=tmp_path / f"run {pad}", model=folder).code == 0
        gradients.append(updates[0][1])
    assert all(map(torch.equal, *gradients)) and gradients[0][0][1].abs().max() > 1e-4


@EVERY_KIND
def test_a_run_learns_and_writes_its_files(run, files, tmp_path, kind):
    """Length decides what is better, one word what is unsafe. The library's model gives the logged scores."""
    train, test = (tiny.write_rows(tmp_path / f"{n}.jsonl", tiny.make_pairs(n, seed=n)) for n in (600, 101))
    flags = dict(dataset=train, eval_dataset=test, epochs=3, batch_size=20, micro_batch_size=20, learning_rate=1e-2)
    folder = tmp_path / "run"
    outcome = run(preference_models, kind=kind, output_dir=folder, **flags)
    assert outcome.code == 0
    (metrics, rows), summary = (
        (read_lines(folder / f"{log}.jsonl") for log in ("metrics", "eval")),
        read_summary(folder),
    )
    assert [line["step"] for line in metrics] == list(range(1, 91))
    assert [line["step"] for line in metrics if "eval_loss" in line] == [30, 60, 90]
    assert summary.items() >= {"seed": 1, "pairs": 1800, "skipped_updates": 0, "dtype": "float32"}.items()
    scores = [score for row in rows for score in row["scores"]]
    expected = {
        "pair_accuracy": sum(row["scores"][0] > row["scores"][1] for row in rows) / 101,
        "loss": sum(row["loss"] for row in rows) / 101,
        "score_mean": sum(scores) / 202,
    }
    if kind == "cost":
        unsafe = [label for row in rows for label in row["unsafe"]]
        expected["sign_accuracy"] = sum((s > 0) == label for s, label in zip(scores, unsafe, strict=True)) / 202
        most = max(sum(unsafe), 202 - sum(unsafe)) / 202
        assert f"{expected['sign_accuracy']:.1%} (always the more frequent sign: {most:.1%})" in outcome.out
    assert f"pair accuracy {expected['pair_accuracy']:.1%} (chance: 50%)" in outcome.out
    assert summary["eval"] == pytest.approx(expected)
    assert expected["pair_accuracy"] > (0.9 if kind == "reward" else 0.65) and expected.get("sign_accuracy", 1) > 0.9
    model = read_back(AutoModelForSequenceClassification, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [f"{row['prompt']} {response}" for row in rows for response in row["responses"]]
    ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    with torch.no_grad():  # the library reads the last token that is not padding
        ours = model(**tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(ours, torch.tensor(scores), rtol=1e-4, atol=1e-4)
