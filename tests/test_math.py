"""The pure functions, sampling, and the readings of the models, against plain loops in float64 (by_hand.py)."""

import math
from types import SimpleNamespace

import by_hand
import pytest
import tiny
import torch
from helpers import changed
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import repo

LENGTHS = [1, 2, 5, 7, 7, 3]


def close(one, other, rtol=1e-6, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(one).double(), torch.as_tensor(other).double(), rtol=rtol, atol=atol)


MASK = torch.tensor([[1] * n + [0] * (7 - n) for n in LENGTHS])  # responses of different lengths
ONE = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kl_weight", [-0.1, 0.1, 0.0])
def test_token_signal_puts_the_score_on_the_last_token_and_clamps(kl_weight):
    terminal, log_ratio = torch.tensor([1.0, -2.0, 70.0, -70.0, 0.5, 3.0], dtype=torch.float64), ONE.clone()
    log_ratio[4, 2], log_ratio[4, 3] = 1e4, -1e4
    signal = repo.token_signal(terminal, log_ratio, MASK, kl_weight)
    for row, n in enumerate(LENGTHS):
        close(signal[row, :n], by_hand.token_signal(terminal[row].item(), log_ratio[row, :n].tolist(), kl_weight))
    assert (signal[MASK == 0] == 0).all() and signal.max() == 50 and signal.min() == -50


def test_clipped_losses_and_their_gradients():
    """Only a move that already went too far stops: ratio or value beyond either bound, on the way there or back."""
    logprobs = torch.tensor([math.log(1.5), math.log(0.5)] * 2 + [0.0], requires_grad=True)
    losses = repo.policy_loss(logprobs, torch.zeros(5), torch.tensor([2.0, 2.0, -2.0, -2.0, 1.0]), 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    close(losses, [-2.4, -1.0, 3.0, 1.6, -1.0])
    close(gradient, [0.0, -1.0, 3.0, 0.0, -1.0])
    values = torch.tensor([2.0, 2.0, 0.1], requires_grad=True)  # old value 0, clipped at 0.5
    losses = repo.value_loss(values, torch.zeros(3), torch.tensor([3.0, 0.0, 1.0]), 0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    close(losses, [3.125, 2.0, 0.405])  # ½(0.5 - 3)², ½ 2², ½ 0.9²
    close(gradient, [0.0, 2.0, -0.9])


def test_repeated_4_grams_by_hand():
    """One row per text: (its tokens, the 4-grams that repeat an earlier one, all 4-grams). Padding may be any token."""
    texts = [([1, 2, 3], 0, 0), ([1, 2, 3, 4], 0, 1), ([7] * 6, 2, 3), ([1, 2, 3, 1, 2, 3, 1, 2, 3], 3, 6)]
    texts += [([1, 2, 3, 4, 1, 2, 3, 4], 1, 5), ([1, 2, 3, 1, 2, 3, 1], 1, 4), ([1, 2, 3, 4, 5, 6, 7, 8], 0, 5)]
    expected = [repeated / max(ngrams, 1) for _, repeated, ngrams in texts]
    for width, padding in ((9, 7), (12, 0)):  # 7 would go on as the third text does
        tokens = torch.tensor([text + [padding] * (width - len(text)) for text, *_ in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text, *_ in texts])
        close(repo.repeated_ngrams(tokens, mask), expected)
    close(repo.repeated_ngrams(torch.tensor([[5, 5, 5]]), torch.tensor([[1, 1, 0]])), [0.0])  # a batch under 4 tokens
    assert [by_hand.repetition(text) for text, *_ in texts] == pytest.approx(expected)


def test_backward_adds_the_gradient_of_a_mean_over_all_tokens(processes):
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [100.0, 100.0]]])
    for times in (1, 2):  # micro-batches add up
        part = repo.backward(features @ weight, mask, token_count=5.0)
        close(part, (2.0 + 3.0 + 5.0) / 5)
        close(weight.grad, [times * 2 / 5] * 2)
    weight.grad = None
    with changed(repo.dist, get_world_size=lambda: 4):  # FSDP will divide by it
        close(repo.backward(features @ weight, mask, token_count=5.0), (2.0 + 3.0 + 5.0) / 5)
    close(weight.grad, [8 / 5, 8 / 5])


@pytest.mark.parametrize("rows, batch, k", [(10, 4, 1), (10, 6, 2), (3, 8, 1), (7, 7, 1), (5, 12, 3)])
def test_every_row_comes_once_per_epoch_with_its_copies_side_by_side(rows, batch, k):
    def indices(seed, iteration):
        return repo.batch_indices(seed, "prompts", iteration, batch, rows, repeats=k)

    stream = []
    for iteration in range(1, 4 * rows + 1):
        chosen = indices(5, iteration)
        assert len(chosen) == batch and all(len(set(chosen[i : i + k])) == 1 for i in range(0, batch, k))
        stream += chosen[::k]
    epochs = [stream[i : i + rows] for i in range(0, len(stream) - rows + 1, rows)]
    assert len(epochs) > 3 and all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert indices(5, 1) == indices(5, 1) and any(indices(5, i) != indices(6, i) for i in (1, 2, 3))


def test_micro_batches_hold_texts_of_similar_length_and_little_padding():
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
    found = [[value.tolist() for value in part[:3]] + [part[3]] for part in repo.micro_batches(5 * mask, mask, 2, 3)]
    assert found[0] == [[2, 3], [[0, 5], [5, 5]], [[0, 1], [1, 1]], 1] and found[1][::3] == [[0, 1], 3]
    assert next(repo.micro_batches(mask, mask, 4))[0].tolist() == [0, 1, 2, 3]  # where all fit, in their own order


class Table(nn.Module):
    """A language model whose next token never depends on anything."""

    device, generation_config = torch.device("cpu"), SimpleNamespace(eos_token_id=None)
    set_reshard_after_forward = nn.Module.train  # takes a flag, and changes nothing here

    def forward(self, input_ids, **_):
        return CausalLMOutputWithPast(logits=self.logits.expand(len(input_ids), 1, -1), past_key_values=())


def draw(logits, uniforms, temperature=1.0):
    """The tokens that are sampled after a prompt of one token, [batch, tokens]."""
    policy, tokenizer = Table(), tiny.make_tokenizer()
    policy.logits, policy.vocabulary = torch.as_tensor(logits), len(logits)
    tokenizer.end_id = tokenizer.eos_token_id
    responses = repo.sample_responses(policy, tokenizer, [[9]] * len(uniforms), uniforms, temperature)
    return responses.sequences[:, 1:]


def test_samples_follow_the_tempered_softmax():
    logits, count = torch.tensor([0.3, -1.0, 2.0, -math.inf, 0.0, 1.1]), 5_000
    # An even grid of uniform numbers leaves nothing to chance but the ends of the intervals.
    grid = (torch.arange(count, dtype=torch.float64) + 0.5)[:, None] / count
    for temperature in (0.5, 1.0, 2.0):
        shares = torch.bincount(draw(logits, grid, temperature).flatten(), minlength=6) / count
        close(shares, (logits.double() / temperature).softmax(0), rtol=0, atol=1.01 / count)
    shares = torch.bincount(draw(logits.bfloat16(), grid).flatten(), minlength=6) / count  # summed in float64
    close(shares, logits.bfloat16().double().softmax(0), rtol=0, atol=1.01 / count)
    # The ends of the unit interval draw possible tokens, and each token uses its own uniform number.
    ends = torch.tensor([[0.0], [torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()]])
    assert draw([-math.inf, 1.0, -math.inf, 0.0, -math.inf], ends).tolist() == [[1], [3]]
    assert draw([0.0, -math.inf, -2.0], ends).tolist() == [[0], [2]]
    numbers = torch.tensor([[0.1, 0.9, 0.1], [0.9, 0.1, 0.9]])
    assert draw([0.0, -math.inf, 0.0], numbers).tolist() == [[0, 2, 0], [2, 0, 2]]


def test_log_probabilities_in_chunks_are_those_of_the_whole():
    """A vocabulary of 2^18 makes a chunk of every two positions of two texts."""
    logits = torch.randn(2, 6, 2**18, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = torch.randint(2**18, (2, 5), generator=torch.Generator().manual_seed(1))

    def model(**_):
        return SimpleNamespace(logits=logits)

    model.vocabulary = 2**18
    found = repo.response_logprobs(model, tokens, torch.ones_like(tokens), 5, 0.7)
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(10.0).view(2, 5)
    one, other = (torch.autograd.grad((weights * x).sum(), logits)[0] for x in (found, expected))
    torch.testing.assert_close(one, other)
