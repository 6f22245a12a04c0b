"""repo.py from end to end on tiny checkpoints and data: files, options, and what the scripts make of checkpoints."""

import json
import math
import shutil

import pytest
import tiny
import torch
from helpers import (
    ROOT,
    changed,
    command,
    contents,
    finish,
    read_lines,
    read_summary,
    recorded_updates,
    start,
    without_times,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config
from transformers.models.llama.modeling_llama import LlamaMLP

import preference_models
import repo

METRICS = """
    iteration episodes reward cost safety_compliance violation excess lambda kl response_length finished policy_loss
    reward_value_loss cost_value_loss clip_fraction policy_grad_norm reward_critic_grad_norm cost_critic_grad_norm
    learning_rate skipped_updates seconds_rollout seconds_scoring seconds_update
""".split()  # noqa: SIM905


# ---- Files


def test_a_run_writes_its_files(repo_run, files):
    names = {path.name for path in repo_run.iterdir()}
    assert names >= {"args.json", "metrics.jsonl", "eval.jsonl", "summary.json", "model", "tensorboard"}
    assert not [name for name in names if name.endswith(".part")]
    args = json.loads((repo_run / "args.json").read_text())
    assert args["model"] == str(files.policy) and args["total_episodes"] == 48 and args["seed"] == 1
    assert set(args) == set(repo.Args.__dataclass_fields__)


def test_metrics_and_tensorboard(repo_run):
    metrics = read_lines(repo_run / "metrics.jsonl")
    assert [line["iteration"] for line in metrics] == [1, 2, 3]
    assert [line["episodes"] for line in metrics] == [16, 32, 48]
    assert all(list(line) == METRICS for line in metrics)
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    board = EventAccumulator(str(repo_run / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == set(METRICS)
    for name in ("lambda", "policy_loss"):
        assert [event.value for event in board.Scalars(name)] == pytest.approx([line[name] for line in metrics])


def test_summary_and_evaluations(repo_run, files):
    summary, rows = read_summary(repo_run), read_lines(repo_run / "eval.jsonl")
    assert summary.items() >= {"algorithm": "repo", "seed": 1, "episodes": 48, "dtype": "float32"}.items()
    assert summary["wall_seconds"] > 0 and summary["episodes_per_second"] > 0
    assert summary["lambda"] == read_lines(repo_run / "metrics.jsonl")[-1]["lambda"]
    prompts = [row["prompt"] for row in read_lines(files.test)]
    for iteration in (0, 2, 3):
        assert [row["prompt"] for row in rows if row["iteration"] == iteration] == prompts
    assert len(rows) == 39
    assert all(set(row) >= {"iteration", "prompt", "response", "reward", "cost", "length"} for row in rows)
    for name, iteration in (("before", 0), ("after", 3)):
        own = [row for row in rows if row["iteration"] == iteration]
        assert summary[name]["reward"] == pytest.approx(sum(row["reward"] for row in own) / 13)
        assert summary[name]["cost"] == pytest.approx(sum(row["cost"] for row in own) / 13)
        assert summary[name]["safety_compliance"] == pytest.approx(sum(row["cost"] <= 0 for row in own) / 13)
        assert summary[name]["violation"] == pytest.approx(sum(max(row["cost"], 0) for row in own) / 13)


def test_evaluations_use_the_same_random_numbers(run, tmp_path):
    """With no learning at all, before and after are one: they differ by the policy alone."""
    assert run(repo, output_dir=tmp_path / "run", learning_rate=1e-30, weight_decay=0).code == 0
    summary = read_summary(tmp_path / "run")
    assert summary["before"] == summary["after"]


def test_every_response_has_random_numbers_of_its_own(run, tmp_path):
    """Over all rows and iterations; evaluations have their own, and take --eval-size prompts."""
    drawn, sample_responses = [], repo.sample_responses

    def record(policy, tokenizer, prompts, uniforms, *rest):
        drawn.append(uniforms)
        return sample_responses(policy, tokenizer, prompts, uniforms, *rest)

    with changed(repo, sample_responses=record):
        assert run(repo, output_dir=tmp_path / "run", total_episodes=48, eval_size=5).code == 0
    before, *rollouts, after = drawn
    assert torch.equal(before, after) and len(before) == 5
    rows = torch.cat([before, *rollouts])
    assert rows.shape == (5 + 48, 16) and len(rows.unique(dim=0)) == len(rows)
    assert rows.min() >= 0 and rows.max() < 1
    prompts = [row["prompt"] for row in read_lines(tmp_path / "run" / "eval.jsonl")]
    assert len(prompts) == 10 and prompts[:5] == prompts[5:]


def test_the_model_loads_and_has_learnt(repo_run, files):
    assert {path.suffix for path in (repo_run / "model").iterdir()} <= {".json", ".safetensors", ".md"}
    model, info = AutoModelForCausalLM.from_pretrained(repo_run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    start, end = AutoModelForCausalLM.from_pretrained(files.policy).state_dict(), model.state_dict()
    assert start.keys() == end.keys()
    assert all(end[name].dtype == torch.float32 for name in end)
    assert all((start[name] != end[name]).any() for name in start)
    text = "ba pi ke? sa"
    assert AutoTokenizer.from_pretrained(repo_run / "model")(text) == AutoTokenizer.from_pretrained(files.policy)(text)


def test_a_run_is_repeated_by_its_seed(run, repo_run, tmp_path):
    assert run(repo, output_dir=tmp_path / "same", total_episodes=48, eval_every=2).code == 0
    assert run(repo, output_dir=tmp_path / "other", total_episodes=16, seed=2).code == 0
    assert without_times(read_summary(tmp_path / "same")) == without_times(read_summary(repo_run))
    first, same, other = (
        without_times(read_lines(folder / "metrics.jsonl")[0])
        for folder in (repo_run, tmp_path / "same", tmp_path / "other")
    )
    assert first == same and first["reward"] != other["reward"]


def test_a_second_run_into_the_same_folder_is_refused(run, repo_run):
    before = contents(repo_run)
    outcome = run(repo, output_dir=repo_run, total_episodes=16)
    assert outcome.code == 2 and "finished run" in outcome.err
    assert contents(repo_run) == before


# ---- Options


@pytest.mark.parametrize(
    "flags",
    [
        dict(constraint="prompt", responses_per_prompt=2),
        dict(rectify="advantage"),
        dict(update_epochs=2),
        dict(dtype="bfloat16"),
        dict(lambda_init=0),
        dict(cost_threshold=-0.5, kl_coef=0, gae_lambda=1),
    ],
    ids=lambda flags: ",".join(flags),
)
def test_options_run_and_change_the_update(run, files, repo_run, tmp_path, flags):
    outcome = run(repo, output_dir=tmp_path / "run", total_episodes=16, **flags)
    assert outcome.code == 0, outcome.err
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["policy_grad_norm"] != read_lines(repo_run / "metrics.jsonl")[0]["policy_grad_norm"]
    if "lambda_init" in flags:
        assert metrics["lambda"] == 0
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    # The weights are trained in float32 whatever the compute type: steps this small would vanish in bfloat16.
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights.values())
    start = load_file(files.policy / "model.safetensors")
    moved = torch.cat([(weights[name] - start[name]).abs().flatten() for name in start])
    assert moved.max() < 1e-2 and (moved > 0).float().mean() > 0.5


def test_the_learning_rate_warms_up_and_falls_to_zero(run, tmp_path):
    outcome = run(repo, output_dir=tmp_path / "run", total_episodes=16 * 6, warmup_ratio=0.3, learning_rate=0.1)
    assert outcome.code == 0, outcome.err
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    cosine = [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([0.0, 0.05, *cosine])


def test_gradient_checkpointing_computes_blocks_again_with_the_same_result(run, tmp_path, monkeypatch):
    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    counts, updates = [], []
    for name, flag in (("plain", None), ("checkpointed", True)):
        calls.clear()
        with recorded_updates(repo) as recorded:
            outcome = run(repo, output_dir=tmp_path / name, total_episodes=16, gradient_checkpointing=flag)
        assert outcome.code == 0, outcome.err
        counts.append(len(calls))
        updates.append(recorded)
    # 3 models of 2 blocks, 2 micro-batches: each block is computed once more in the backward pass.
    assert counts[1] - counts[0] == 3 * 2 * 2
    for (_, one), (_, other) in zip(*updates, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    plain, checkpointed = (read_summary(tmp_path / name) for name in ("plain", "checkpointed"))
    assert plain["after"] == pytest.approx(checkpointed["after"], rel=1e-4)


def test_cpu_offload_changes_no_figure(run, repo_run, tmp_path):
    outcome = run(repo, output_dir=tmp_path / "run", total_episodes=48, eval_every=2, cpu_offload=True)
    assert outcome.code == 0, outcome.err
    assert without_times(read_summary(tmp_path / "run")) == without_times(read_summary(repo_run))


def test_prompts_are_put_into_the_template(run, files, tmp_path):
    """Prompts count once, the template stands around them, and those that are too long are dropped and counted."""
    rows = [dict(question=text) for text in ("ba pi?", "ke", "ba pi?", "sa le ra mu", "ke")]
    data = tiny.write_rows(tmp_path / "prompts.jsonl", rows)
    flags = dict(dataset=data, eval_dataset=data, prompt_column="question", prompt_template="ba ba {prompt} sa")
    outcome = run(repo, output_dir=tmp_path / "run", max_prompt_length=6, total_episodes=16, **flags)
    assert outcome.code == 0, outcome.err
    assert "--dataset: dropped 1 of 3 prompts" in outcome.out and "--eval-dataset: dropped 1 of 3" in outcome.out
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    assert [row["prompt"] for row in rows if row["iteration"] == 0] == ["ba pi?", "ke"]
    args = repo.Args(prompt_column="question", prompt_template="ba ba {prompt} sa", max_prompt_length=9)
    prompts = repo.load_prompts(args, str(data), "train", "--dataset", tiny.make_tokenizer())
    assert prompts[1] == ("ke", tiny.make_tokenizer()("ba ba ke sa")["input_ids"])


# ---- Score models and critics


def load_scorer(files, name, **flags):
    args = repo.Args(**flags)
    scorer = repo.load_scorer(args, str(name), "", repo.load_tokenizer(str(files.policy), False), torch.float32)
    repo.shard(scorer.model, repo.init_device_mesh("cpu", (1,)), torch.float32)
    return scorer


def make_responses(prompts, texts, finished):
    """Responses of a policy with the tiny tokenizer, from texts."""
    tokenizer = tiny.make_tokenizer()
    prompt_ids = tokenizer(prompts)["input_ids"]
    ids = [row + [1] * end for row, end in zip(tokenizer(texts)["input_ids"], finished, strict=True)]
    left, right = repo.pad(prompt_ids, 2, "left"), repo.pad(ids, 2, "right")
    mask = torch.cat([left[1], right[1]], 1)
    return repo.Responses(torch.cat([left[0], right[0]], 1), mask, right[1], torch.tensor(finished))


PROMPTS = ["ba pi?", "ke?", "sa le ra mu?"]  # "ke" and "pi" side by side would make a new word
TEXTS = ["sa le", "pi ke mu ra ba", "? ."]


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_score_model_with_another_tokenizer_gives_the_same_scores(files, processes, tmp_path, kind):
    """The same weights for a permuted vocabulary: prompts and responses go through their texts, EOS where one was."""
    original = getattr(files, kind)
    permuted = tiny.permuted_copy(original, tmp_path / "permuted")
    responses = make_responses(PROMPTS, TEXTS, [True, False, True])
    same, other = load_scorer(files, original), load_scorer(files, permuted)
    assert same.shares_tokens and not other.shares_tokens
    scores, expected = (repo.score_responses(scorer, responses, PROMPTS, TEXTS, 2) for scorer in (other, same))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    # The templates of policy and score model differ: the tokens do, too.
    framed = load_scorer(files, original, score_prompt_template="ba {prompt}", prompt_template="{prompt}")
    assert not framed.shares_tokens
    plain = AutoTokenizer.from_pretrained(original)
    with torch.no_grad():
        ids = [
            plain("ba " + prompt + text)["input_ids"] + [1] * end
            for prompt, text, end in zip(PROMPTS, TEXTS, [1, 0, 1], strict=True)
        ]
        expected = [framed.model(torch.tensor([row]), torch.ones(1, len(row)).long())[0, -1].item() for row in ids]
    assert repo.score_responses(framed, responses, PROMPTS, TEXTS, 2).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_run_with_score_models_of_another_tokenizer(run, files, repo_run, tmp_path):
    """Scores agree with the run on shared tokens, save for responses that a text cannot hold (a sampled <unk>)."""
    names = {f"{kind}_model": tiny.permuted_copy(getattr(files, kind), tmp_path / kind) for kind in ("reward", "cost")}
    outcome = run(repo, output_dir=tmp_path / "run", total_episodes=16, **names)
    assert outcome.code == 0, outcome.err
    rows, compared = read_lines(tmp_path / "run" / "eval.jsonl"), 0
    for row, expected in zip(rows[:13], read_lines(repo_run / "eval.jsonl")[:13], strict=True):
        assert row["response"] == expected["response"]
        if len(row["response"].split()) == row["length"] - (row["length"] < 16):  # shorter ones ended in EOS
            assert (row["reward"], row["cost"]) == pytest.approx((expected["reward"], expected["cost"]), abs=1e-4)
            compared += 1
    assert compared > 3


def backbone(model):
    return {name.removeprefix("model.model."): value for name, value in model.named_parameters() if "score" not in name}


def test_critics_start_from_score_models_that_share_the_tokenizer(files, processes, tmp_path):
    tokenizer = repo.load_tokenizer(str(files.policy), False)
    permuted = tiny.permuted_copy(files.reward, tmp_path / "permuted")
    args = repo.Args(model=str(files.policy))
    reward, cost, policy = (
        load_file(folder / "model.safetensors") for folder in (files.reward, files.cost, files.policy)
    )
    for name, scorer, expected in (
        (None, files.reward, reward),
        (None, files.cost, cost),
        (None, permuted, policy),
        (files.cost, files.reward, cost),
        (files.policy, files.reward, policy),
    ):
        critic = repo.load_critic(args, name and str(name), str(scorer), "--reward-critic", tokenizer)
        assert all(value.dtype == torch.float32 for value in critic.parameters())
        for key, value in backbone(critic).items():
            assert torch.equal(value, expected[f"model.{key}"])
        if "score.weight" in expected:
            assert torch.equal(critic.model.score.weight, expected["score.weight"])
    # A critic from the policy: a fresh head that the seed decides.
    heads = [
        repo.load_critic(repo.Args(model=str(files.policy), seed=seed), None, str(permuted), "", tokenizer)
        for seed in (1, 1, 2)
    ]
    heads = [critic.model.score.weight for critic in heads]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_biased_head_counts_in_a_run(run, files, repo_run, tmp_path):
    """A cost model whose bias is raised by 100 finds every response unsafe by 100 more."""

    def change(weights):
        weights["score.bias"] += 100.0

    cost_model = tiny.copy_model(files.cost, tmp_path / "cost", change)
    assert run(repo, output_dir=tmp_path / "run", total_episodes=16, cost_model=cost_model).code == 0
    before, expected = read_summary(tmp_path / "run")["before"], read_summary(repo_run)["before"]
    assert before["cost"] == pytest.approx(expected["cost"] + 100, abs=1e-3)
    assert before["safety_compliance"] == 0 and before["reward"] == pytest.approx(expected["reward"])


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_other_architectures(run, tmp_path, kind):
    """An output layer that shares the embedding's weights, and learnt positions: score models and policy."""
    tokenizer = tiny.make_tokenizer()
    folder = tmp_path / "policy"
    if kind == "tied":
        tiny.make_model(folder, tie_word_embeddings=True)
    else:
        sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64)
        config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1, pad_token_id=2, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    outcome = run(preference_models, output_dir=tmp_path / "scores", model=folder)
    assert outcome.code == 0, outcome.err
    scores = tmp_path / "scores" / "model"
    flags = dict(model=folder, reward_model=scores, cost_model=scores, total_episodes=16)
    outcome = run(repo, output_dir=tmp_path / "run", **flags)
    assert outcome.code == 0, outcome.err
    assert abs(read_lines(tmp_path / "run" / "metrics.jsonl")[0]["kl"]) < 1e-5
    for name, cls in (("scores", AutoModelForSequenceClassification), ("run", AutoModelForCausalLM)):
        model, info = cls.from_pretrained(tmp_path / name / "model", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_dropout_is_off(files, tmp_path):
    folder = tiny.copy_model(files.policy, tmp_path / "policy", attention_dropout=0.5)
    policy = repo.load_pretrained(AutoModelForCausalLM, str(folder), torch.float32, "--model", False).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(policy(ids).logits, policy(ids).logits)


# ---- Responses


def sample(processes, folder, prompts, count=16, seed=0, temperature=1.0):
    """Sampled responses of a checkpoint, the tokenizer, and the EOS ids they may end in."""
    policy = repo.shard(AutoModelForCausalLM.from_pretrained(folder).eval(), processes[1], torch.float32)
    tokenizer = repo.load_tokenizer(str(folder), False)
    uniforms = torch.rand(len(prompts), count, generator=torch.Generator().manual_seed(seed))
    ids = tokenizer(prompts)["input_ids"]
    return repo.sample_responses(policy, tokenizer, ids, uniforms, temperature, processes[0]), tokenizer


def check_responses(responses, prompts, tokenizer, eos_ids):
    """The masks of Responses, response by response; returns how many ended."""
    length = responses.response_mask.shape[1]
    for row, prompt in enumerate(tokenizer(prompts)["input_ids"]):
        tokens = responses.sequences[row, -length:].tolist()
        end = next((t for t, token in enumerate(tokens) if token in eos_ids), None)
        kept = length if end is None else end + 1
        assert responses.response_mask[row].tolist() == [1] * kept + [0] * (length - kept)
        assert bool(responses.finished[row]) == (end is not None)
        assert responses.sequences[row, :-length].tolist()[-len(prompt) :] == prompt
        left = responses.sequences.shape[1] - length - len(prompt)
        assert responses.attention_mask[row].tolist() == [0] * left + [1] * (len(prompt) + kept) + [0] * (length - kept)
    return int(responses.finished.sum())


MANY = ["ba pi?", "ke", "sa le ra mu?", "pi ke?"] * 16


def test_a_response_keeps_its_eos_and_masks_what_follows(files, processes):
    responses, tokenizer = sample(processes, files.policy, MANY)
    assert 0 < check_responses(responses, MANY, tokenizer, {1}) < 64
    kept = responses.response_mask.sum(1)
    assert (responses.sequences.gather(1, (responses.sequences.shape[1] - 16 + kept - 1)[:, None])[:, 0] == 1).sum() > 0
    texts = repo.decode(tokenizer, responses)
    assert all("<eos>" not in text and "<pad>" not in text for text in texts)
    expected = responses.sequences[0, -16:][: kept[0]]
    assert texts[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_response_that_is_only_eos(files, processes):
    """All uniform numbers at the point of the distribution function where EOS, the second token, lies."""
    policy = repo.shard(AutoModelForCausalLM.from_pretrained(files.policy).eval(), processes[1], torch.float32)
    tokenizer = repo.load_tokenizer(str(files.policy), False)
    ids = tokenizer(["ba pi?"])["input_ids"]
    with torch.no_grad():
        distribution = policy(torch.tensor(ids)).logits[0, -1].softmax(-1)
    point = distribution[0] + distribution[1] / 2
    responses = repo.sample_responses(policy, tokenizer, ids, point.expand(1, 8), 1.0, processes[0])
    assert responses.response_mask.tolist() == [[1]] and responses.finished.tolist() == [True]
    assert repo.decode(tokenizer, responses) == [""]


def test_pad_may_be_eos(files, processes, tmp_path):
    """A tokenizer without a pad token: every EOS after the first is padding, the first belongs to the response."""
    tokenizer = tiny.make_tokenizer(pad=False)
    folder = tiny.make_model(tmp_path / "policy", tokenizer=tokenizer)
    responses, loaded = sample(processes, folder, MANY)
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    assert 0 < check_responses(responses, MANY, loaded, {1}) < 64


def test_a_run_where_pad_is_eos(run, tmp_path):
    tokenizer = tiny.make_tokenizer(pad=False)
    names = {
        name: tiny.make_model(tmp_path / name, kind, seed, tokenizer)
        for seed, (name, kind) in enumerate(
            dict(model="policy", reward_model="score", cost_model="biased_score").items()
        )
    }
    outcome = run(repo, output_dir=tmp_path / "run", total_episodes=16, **names)
    assert outcome.code == 0, outcome.err
    assert abs(read_lines(tmp_path / "run" / "metrics.jsonl")[0]["kl"]) < 1e-5
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), names["model"]
    assert model.config.eos_token_id == 1 and AutoTokenizer.from_pretrained(tokenizer).eos_token_id == 1


def test_several_eos_ids(files, processes, tmp_path):
    folder = tiny.copy_model(files.policy, tmp_path / "policy")
    tiny.edit_json(folder / "generation_config.json", eos_token_id=[1, 20, 30])
    responses, tokenizer = sample(processes, folder, MANY)
    assert check_responses(responses, MANY, tokenizer, {1, 20, 30}) > check_responses(
        sample(processes, files.policy, MANY)[0], MANY, tokenizer, {1}
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=3.0, top_p=0.1, top_k=2, do_sample=True, min_p=0.5),
        dict(repetition_penalty=5.0),
        dict(no_repeat_ngram_size=1),
        dict(suppress_tokens=list(range(5, 40))),
        dict(min_new_tokens=12),
        dict(max_length=3),
        dict(num_beams=3),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_checkpoints_own_generation_settings_do_not_bend_sampling(files, processes, tmp_path, settings):
    folder = tiny.copy_model(files.policy, tmp_path / "policy")
    tiny.edit_json(folder / "generation_config.json", **settings)
    bent, tokenizer = sample(processes, folder, MANY)
    straight, _ = sample(processes, files.policy, MANY)
    assert torch.equal(bent.sequences, straight.sequences)
    assert check_responses(bent, MANY, tokenizer, {1}) > 0


def test_generation_settings_stay_with_the_saved_model(run, files, tmp_path):
    folder = tiny.copy_model(files.policy, tmp_path / "policy")
    tiny.edit_json(folder / "generation_config.json", eos_token_id=[1, 20], repetition_penalty=1.5)
    assert run(repo, output_dir=tmp_path / "run", total_episodes=16, model=folder).code == 0
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 20] and saved["repetition_penalty"] == 1.5


def test_a_response_does_not_depend_on_its_neighbours(files, processes):
    """Its prompt's padding and the other rows may change, its uniform numbers may not."""
    policy = repo.shard(AutoModelForCausalLM.from_pretrained(files.policy).eval(), processes[1], torch.float32)
    tokenizer = repo.load_tokenizer(str(files.policy), False)
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    ids = tokenizer(["ba pi?", "ke sa le ra mu di fo?", "ke"])["input_ids"]
    together = repo.sample_responses(policy, tokenizer, ids, uniforms, 1.0, processes[0])
    for row in range(3):
        alone = repo.sample_responses(policy, tokenizer, ids[row : row + 1], uniforms[row : row + 1], 1.0, processes[0])
        kept = alone.response_mask.sum()
        length = together.response_mask.shape[1]
        assert together.response_mask[row].sum() == kept
        assert torch.equal(together.sequences[row, -length:][:kept], alone.sequences[0, len(ids[row]) :][:kept])


def test_sharded_models_go_back_to_shards_after_decoding(files, processes):
    policy = repo.shard(AutoModelForCausalLM.from_pretrained(files.policy).eval(), processes[1], torch.float32)
    with repo.unsharded(policy):
        assert not any(hasattr(value, "device_mesh") for value in policy.parameters())
    assert all(hasattr(value, "device_mesh") for value in policy.parameters())


def test_saved_models_are_whole_or_absent(files, processes, tmp_path):
    """A save that dies half-way leaves the model that was there before."""
    model = repo.shard(AutoModelForCausalLM.from_pretrained(files.policy), processes[1], torch.float32)
    tokenizer = repo.load_tokenizer(str(files.policy), False)
    repo.save_model(model, tokenizer, tmp_path / "model")
    before = contents(tmp_path / "model")

    def full(*args, **settings):
        raise OSError("no space left on device")

    with changed(model, save_pretrained=full), changed(repo, shut_down=lambda: None), pytest.raises(SystemExit):
        repo.save_model(model, tokenizer, tmp_path / "model")
    assert contents(tmp_path / "model") == before
    repo.save_model(model, tokenizer, tmp_path / "model")
    assert contents(tmp_path / "model") == before and [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- Alone


@pytest.mark.parametrize("script", ["repo", "preference_models"])
def test_a_script_runs_alone_in_another_folder(defaults, tmp_path, script):
    """One file and its checkpoints are all that is needed."""
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / f"{script}.py", tmp_path / "alone")
    flags = defaults[script] | dict(output_dir="out") | (dict(total_episodes=16) if script == "repo" else {})
    outcome = finish(start([tmp_path / "alone" / f"{script}.py", *command(**flags)], cwd=tmp_path))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert "Traceback" not in outcome.err and "Warning" not in outcome.err
    if script == "preference_models":
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
