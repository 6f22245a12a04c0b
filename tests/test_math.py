"""The pure functions and the readings of the models, against plain loops in float64 (by_hand.py)."""

import math
from types import SimpleNamespace

import by_hand
import pytest
import tiny
import torch
from helpers import changed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import preference_models
import repo

LENGTHS = [1, 2, 5, 7, 7, 3]


def close(one, other, rtol=1e-6, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(one).double(), torch.as_tensor(other).double(), rtol=rtol, atol=atol)


@pytest.fixture
def batch():
    """Random numbers of six responses of different lengths: one tensor a name and the mask, [6, 7]."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in LENGTHS])
    names = ("rewards", "values", "old_values", "logprobs", "old_logprobs", "advantages")
    return {name: torch.randn(6, 7, generator=generator, dtype=torch.float64) for name in names} | {"mask": mask}


# ---- Signals and advantages


def test_gae_is_the_sum_of_later_differences_and_ignores_padding(batch):
    for gae_lambda in (0.0, 0.5, 0.95, 1.0):
        advantages, returns = repo.gae(batch["rewards"], batch["values"], batch["mask"], gae_lambda)
        for row, n in enumerate(LENGTHS):
            rewards, values = batch["rewards"][row, :n].tolist(), batch["values"][row, :n].tolist()
            expected_advantages, expected_returns = by_hand.gae(rewards, values, gae_lambda)
            close(advantages[row, :n], expected_advantages)
            close(returns[row, :n], expected_returns)


def test_gae_with_lambda_one_returns_the_sum_of_rewards_to_come(batch):
    _, returns = repo.gae(batch["rewards"], batch["values"], batch["mask"], 1.0)
    for row, n in enumerate(LENGTHS):
        close(returns[row, :n], [batch["rewards"][row, t:n].sum() for t in range(n)])


def test_token_signal_puts_the_score_on_the_last_token_and_clamps(batch):
    terminal = torch.tensor([1.0, -2.0, 70.0, -70.0, 0.5, 3.0], dtype=torch.float64)
    log_ratio = batch["logprobs"].clone()
    log_ratio[4, 2], log_ratio[4, 3] = 1e4, -1e4
    for kl_weight in (-0.1, 0.1, 0.0):
        signal = repo.token_signal(terminal, log_ratio, batch["mask"], kl_weight)
        for row, n in enumerate(LENGTHS):
            expected = by_hand.token_signal(terminal[row].item(), log_ratio[row, :n].tolist(), kl_weight)
            close(signal[row, :n], expected)
            assert (signal[row, n:] == 0).all()
    assert signal.max() == 50 and signal.min() == -50


def test_the_kl_penalty_has_one_weight_whatever_the_multiplier(batch):
    """-β k in the rewards and +β k in the costs: (A_r - λ A_c) / (1 + λ) holds -β k again, for exact critics."""
    zero, values = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 7, dtype=torch.float64)
    rewards = repo.token_signal(zero, batch["logprobs"], batch["mask"], -0.1)
    costs = repo.token_signal(zero, batch["logprobs"], batch["mask"], 0.1)
    by_reward, by_cost = (repo.gae(signal, values, batch["mask"], 0.95)[0] for signal in (rewards, costs))
    close(repo.combine_advantages(by_reward, by_cost, 7.0), by_reward)


# ---- Losses: numbers and derivatives


def test_policy_loss_and_its_gradient(batch):
    logprobs = batch["logprobs"].requires_grad_()
    losses = repo.policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    for index in torch.cartesian_prod(torch.arange(6), torch.arange(7)).tolist():
        one = [batch[name][tuple(index)].item() for name in ("logprobs", "old_logprobs", "advantages")]
        loss, slope = by_hand.policy_loss(*one, 0.2)
        close([losses[tuple(index)].item(), gradient[tuple(index)].item()], [loss, slope])
    assert (gradient == 0).any() and (gradient != 0).any()


def test_policy_loss_in_each_corner():
    """Ratio beyond either bound, advantage of either sign: only the two moves that already went too far stop."""
    logprobs = torch.tensor([math.log(1.5), math.log(0.5)] * 2, requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0])
    losses = repo.policy_loss(logprobs, torch.zeros(4), advantages, 0.2)
    losses.sum().backward()
    close(losses, [-2.4, -1.0, 3.0, 1.6])
    close(logprobs.grad, [0.0, -1.0, 3.0, 0.0])


def test_value_loss_and_its_gradient(batch):
    values = (3 * batch["values"]).requires_grad_()
    losses = repo.value_loss(values, batch["old_values"], batch["rewards"], 0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    for row, column in torch.cartesian_prod(torch.arange(6), torch.arange(7)).tolist():
        at = (row, column)
        expected = by_hand.value_loss(
            values[at].item(), batch["old_values"][at].item(), batch["rewards"][at].item(), 0.5
        )
        close([losses[at].item(), gradient[at].item()], expected)
    assert (gradient == 0).any() and (gradient != 0).any()


def test_reward_loss_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    scores = (4 * torch.randn(2, 50, generator=generator, dtype=torch.float64)).requires_grad_()
    losses = preference_models.reward_loss(*scores, 0.01)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    for pair in range(50):
        expected = by_hand.reward_loss(scores[0, pair].item(), scores[1, pair].item(), 0.01)
        close([losses[pair].item(), *gradient[:, pair].tolist()], expected)
    close(preference_models.reward_loss(torch.zeros(1), torch.zeros(1), 0.01), [math.log(2)])


def test_cost_loss_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    scores = (4 * torch.randn(2, 50, generator=generator, dtype=torch.float64)).requires_grad_()
    signs = torch.randint(2, (2, 50), generator=generator).double() * 2 - 1
    losses = preference_models.cost_loss(*scores, *signs, 0.01)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    for pair in range(50):
        expected = by_hand.cost_loss(*scores[:, pair].tolist(), *signs[:, pair].tolist(), 0.01)
        close([losses[pair].item(), *gradient[:, pair].tolist()], expected)
    far = preference_models.cost_loss(*torch.tensor([[3e4], [-3e4], [1.0], [-1.0]]), 0.0)
    close(far, [0.0])  # no overflow in the exponentials


def test_backward_adds_the_gradient_of_a_mean_over_all_tokens(processes):
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [100.0, 100.0]]])
    part = repo.backward(features @ weight, mask, tokens=5.0)
    close(part, (2.0 + 3.0 + 5.0) / 5)
    assert not part.requires_grad
    close(weight.grad, [2 / 5, 2 / 5])
    repo.backward(features @ weight, mask, tokens=5.0)
    close(weight.grad, [4 / 5, 4 / 5])  # micro-batches add up
    weight.grad = None
    with changed(repo.dist, get_world_size=lambda: 4):  # FSDP will divide by it
        close(repo.backward(features @ weight, mask, tokens=5.0), (2.0 + 3.0 + 5.0) / 5)
    close(weight.grad, [8 / 5, 8 / 5])


def test_summarize():
    rows = [dict(reward=r, cost=c, length=n) for r, c, n in ((1.0, 0.5, 3), (2.0, -1.0, 5), (6.0, 2.0, 4))]
    expected = dict(reward=3.0, cost=0.5, safety_compliance=2 / 3, violation=0.5, response_length=4.0)
    assert repo.summarize(rows, 0.5) == pytest.approx(expected)  # a cost equal to the threshold is safe


# ---- Random numbers and the order of the prompts


def test_random_generators_depend_on_nothing_but_their_key():
    def draw(*key):
        return torch.rand(4, generator=repo.random_generator(*key)).tolist()

    first = draw(1, "rollout", 1)
    torch.manual_seed(123)
    draw(1, "rollout", 7)
    assert draw(1, "rollout", 1) == first
    keys = [
        (1, "rollout", 1),
        (1, "rollout", 2),
        (2, "rollout", 1),
        (1, "evaluate"),
        (1, "prompts", 1),
        (1, "pairs", 1),
    ]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("prompts, batch, k", [(10, 4, 1), (10, 6, 2), (3, 8, 1), (7, 7, 1), (5, 12, 3)])
def test_every_prompt_comes_once_an_epoch_with_its_copies_side_by_side(prompts, batch, k):
    stream = []
    for iteration in range(1, 4 * prompts + 1):
        indices = repo.prompt_indices(5, iteration, batch, k, prompts)
        assert len(indices) == batch
        assert all(len(set(indices[i : i + k])) == 1 for i in range(0, batch, k))
        stream += indices[::k]
    epochs = [stream[i : i + prompts] for i in range(0, len(stream) - prompts + 1, prompts)]
    assert len(epochs) > 3 and all(sorted(epoch) == list(range(prompts)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert repo.prompt_indices(5, 1, batch, k, prompts) == repo.prompt_indices(5, 1, batch, k, prompts)
    assert any(
        repo.prompt_indices(5, i, batch, k, prompts) != repo.prompt_indices(6, i, batch, k, prompts) for i in (1, 2, 3)
    )


# ---- Sampling


def draw(logits, uniforms, temperature):
    """Tokens that the sampler leaves possible, one for each uniform number."""
    rows = len(uniforms)
    sampler = repo.InverseSampler(uniforms[:, None], prompt_length=3, temperature=temperature)
    left = sampler(torch.zeros(rows, 3, dtype=torch.long), logits.expand(rows, -1))
    assert ((left == 0).sum(1) == 1).all() and (left[left != 0] == -math.inf).all()
    return left.argmax(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, -math.inf, 0.0, 1.1])
    expected = (logits.double() / temperature).softmax(0)
    # An even grid of uniform numbers leaves nothing to chance but the ends of the intervals.
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    shares = torch.bincount(draw(logits, grid, temperature), minlength=6) / count
    close(shares, expected, rtol=0, atol=1.01 / count)
    # And random ones: Pearson's statistic has 4 degrees of freedom; it exceeds 23.5 with probability 1e-4.
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits, uniforms, temperature), minlength=6).double()
    likely = expected > 0
    assert (((counts - count * expected) ** 2)[likely] / (count * expected)[likely]).sum() < 23.5


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    uniforms = torch.tensor([0.0, below_one])
    impossible = -math.inf
    for logits, first, last in (
        ([impossible, 1.0, impossible, 0.0, impossible], 1, 3),
        ([0.0, impossible, -2.0], 0, 2),
        ([impossible, impossible, 5.0], 2, 2),
    ):
        assert draw(torch.tensor(logits), uniforms, 1.0).tolist() == [first, last]


def test_each_step_uses_its_own_uniform_number():
    uniforms = torch.tensor([[0.1, 0.9, 0.1], [0.9, 0.1, 0.9]])
    sampler = repo.InverseSampler(uniforms, prompt_length=4, temperature=1.0)
    drawn = [sampler(torch.zeros(2, 4 + t, dtype=torch.long), torch.zeros(2, 2)).argmax(1).tolist() for t in range(3)]
    assert drawn == [[0, 1], [1, 0], [0, 1]]


def test_logprobs_are_those_of_the_sampled_distribution(files, processes):
    """One token after one prompt, an even grid of uniform numbers: frequencies are the exponentials of logprobs."""
    device, mesh = processes
    policy = repo.shard(AutoModelForCausalLM.from_pretrained(files.policy).eval(), mesh, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(files.policy)
    count = 2000
    grid = (torch.arange(count) + 0.5)[:, None] / count
    prompt = tokenizer("ba pi ke?")["input_ids"]
    responses = repo.sample_responses(policy, tokenizer, [prompt] * count, grid, 0.6, device)
    with torch.no_grad():
        logprobs = repo.response_logprobs(policy, responses.sequences, responses.attention_mask, 1, 0.6)
    shares = torch.bincount(responses.sequences[:, -1], minlength=len(tokenizer)) / count
    close(shares[responses.sequences[:, -1]], logprobs[:, 0].exp(), rtol=0, atol=1.01 / count)
    assert len(set(responses.sequences[:, -1].tolist())) > 20


# ---- Readings: log-probabilities, values, scores


@pytest.fixture
def texts():
    """Prompts and responses of token ids with lengths that differ."""
    generator = torch.Generator().manual_seed(4)
    lengths = [(3, 5), (6, 1), (1, 4), (4, 5)]
    ids = [[torch.randint(3, 65, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    return [list(column) for column in zip(*ids, strict=True)]


def lay_out(prompts, responses, pad_id=2, extra=(0, 0)):
    """The layout of Responses: prompts padded on the left, responses on the right, `extra` columns on either side."""
    left, left_mask = repo.pad(prompts, pad_id, "left")
    right, right_mask = repo.pad(responses, pad_id, "right")
    rows = len(prompts)
    ids = [torch.full((rows, extra[0]), pad_id), left, right, torch.full((rows, extra[1]), pad_id)]
    mask = [torch.zeros(rows, extra[0]), left_mask, right_mask, torch.zeros(rows, extra[1])]
    length = right.shape[1] + extra[1]
    return torch.cat(ids, 1), torch.cat(mask, 1).long(), length


# Padding changes the order of sums in float32 and nothing else: a few units in the last place of numbers around one.
ROUNDING = dict(rtol=1e-5, atol=2e-5)
LAYOUTS = [dict(), dict(extra=(5, 0)), dict(extra=(0, 3)), dict(extra=(2, 4), pad_id=1), dict(pad_id=40)]


class Logits(nn.Module):
    """A language model that is only a table of logits, in bfloat16."""

    def __init__(self, rows, length, vocabulary):
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, length + 1, vocabulary, dtype=torch.bfloat16))

    def forward(self, logits_to_keep, **inputs):
        return SimpleNamespace(logits=self.table[:, -logits_to_keep:])


class LargestFloat32(TorchDispatchMode):
    """Watches every operation for the largest float32 tensor that it returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_logprobs_need_no_float32_tensor_of_all_logits():
    """Neither forwards nor backwards; value and gradient are those of the plain formula."""
    torch.manual_seed(0)
    rows, length, vocabulary = 3, 40, 300_000
    model = Logits(rows, length, vocabulary)
    tokens = torch.randint(vocabulary, (rows, length))
    mask = torch.ones(rows, length, dtype=torch.long)
    weights = torch.randn(rows, length)
    with LargestFloat32() as watch:
        logprobs = repo.response_logprobs(model, tokens, mask, length, 0.7)
        (logprobs * weights).sum().backward()
    assert 0 < watch.largest <= 2**24 < rows * length * vocabulary / 2
    for row in range(rows):
        logits = (model.table.detach()[row, :-1].double() / 0.7).requires_grad_()
        expected = logits.log_softmax(-1).gather(1, tokens[row][:, None]).squeeze(1)
        close(logprobs[row], expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad((expected * weights[row]).sum(), logits)
        torch.testing.assert_close(model.table.grad[row, :-1].double() * 0.7, gradient, rtol=0.02, atol=1e-6)
    assert (model.table.grad[:, -1] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_a_plain_loop_over_the_logits(files, processes, texts, layout, temperature):
    plain = AutoModelForCausalLM.from_pretrained(files.policy, dtype=torch.float64)
    policy = repo.shard(AutoModelForCausalLM.from_pretrained(files.policy).eval(), processes[1], torch.float32)
    ids, mask, length = lay_out(*texts, **layout)
    with torch.no_grad():
        logprobs = repo.response_logprobs(policy, ids, mask, length, temperature)
        assert logprobs.shape == (4, length)
        for row, (prompt, response) in enumerate(zip(*texts, strict=True)):
            logits = plain(torch.tensor([prompt + response])).logits[0].tolist()
            for t, token in enumerate(response):
                before = [logit / temperature for logit in logits[len(prompt) + t - 1]]
                expected = before[token] - math.log(sum(math.exp(logit) for logit in before))
                close(logprobs[row, t].item(), expected, **ROUNDING)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_values_are_read_before_the_token_and_scores_after_the_last(files, processes, texts, layout, kind):
    name = str(getattr(files, kind))
    plain = repo.load_score_model(name, torch.float64, "", 0, False).model
    model = repo.shard(repo.load_score_model(name, torch.float32, "", 0, False).eval(), processes[1], torch.float32)
    ids, mask, length = lay_out(*texts, **layout)
    with torch.no_grad():
        values = repo.response_values(model, ids, mask, length)
        scores = repo.text_scores(model, ids, mask)
        for row, (prompt, response) in enumerate(zip(*texts, strict=True)):
            close(values[row, : len(response)], by_hand.values(plain, prompt, response), **ROUNDING)
            close(scores[row], by_hand.token_scores(plain, prompt + response)[-1], **ROUNDING)


def test_a_value_knows_the_tokens_before_it_only(files, processes, texts):
    model = repo.load_score_model(str(files.reward), torch.float32, "", 0, False).eval()
    ids, mask, length = lay_out(*texts)
    with torch.no_grad():
        before = repo.response_values(model, ids, mask, length)
        ids[0, -length + 2] = 3 if ids[0, -length + 2] != 3 else 4  # the third token of the first response
        after = repo.response_values(model, ids, mask, length)
    assert (before[0] == after[0]).tolist() == [True, True, True, False, False]
    assert (before[1:] == after[1:]).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [2, 1])
def test_scores_do_not_depend_on_the_side_of_the_padding(files, processes, texts, side, pad_id):
    """pad_id 1 is EOS, which stands at the end of every text, too."""
    model = repo.load_score_model(str(files.cost), torch.float32, "", 0, False).eval()
    sequences = [prompt + response + [1] for prompt, response in zip(*texts, strict=True)]
    with torch.no_grad():
        scores = repo.text_scores(model, *repo.pad(sequences, pad_id, side))
        for row, ids in enumerate(sequences):
            close(scores[row], by_hand.token_scores(model.model, ids)[-1], **ROUNDING)


def test_last_scores_and_positions_follow_the_mask():
    scores = torch.arange(12.0).view(3, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert repo.last_scores(scores, mask).tolist() == [3.0, 5.0, 11.0]
    assert repo.positions(mask)[:, 1:].tolist() == [[0, 0, 1], [1, 1, 1], [1, 2, 3]]
    assert (repo.positions(mask)[:, 0] == 0).all()


def test_encode_scored_ends_in_one_eos_and_cuts_the_end():
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer("ba pi? sa le")["input_ids"]
    assert repo.encode_scored(tokenizer, ["ba pi?"], ["sa le"], "{prompt} ", 99) == [[*ids, 1]]
    assert repo.encode_scored(tokenizer, ["ba pi?"], ["sa le <eos>"], "{prompt} ", 99) == [[*ids, 1]]
    assert repo.encode_scored(tokenizer, ["ba pi?"], ["sa le"], "{prompt} ", 3) == [ids[:3]]
    assert repo.encode_scored(tokenizer, ["pi?"], ["sa le"], "ba {prompt}", 99) == [[*ids, 1]]
    assert repo.encode_scored(tokenizer, [], [], "{prompt}", 9) == []


def test_a_score_head_may_have_a_bias(files):
    """The bias of a cost model moves the border of safe and unsafe: it counts at every token."""
    model = repo.load_score_model(str(files.cost), torch.float32, "", 0, False)
    assert isinstance(model.model.score, nn.Linear) and model.model.score.bias.item() != 0
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids, torch.ones_like(ids))
        model.model.score.bias += 1.5
        close(model(ids, torch.ones_like(ids)), before + 1.5)
    unbiased = repo.load_score_model(str(files.reward), torch.float32, "", 0, False).model
    assert isinstance(unbiased, type(AutoModelForSequenceClassification.from_pretrained(files.reward)))
    assert unbiased.score.bias is None
