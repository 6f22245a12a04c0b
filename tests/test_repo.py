"""repo.py from end to end: files, options, responses, scores, critics, and what ppo_lagrange.py shares with it."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import ROOT, changed, command, finish, load_policy, load_scores, read_lines, read_summary, start
from helpers import recorded_updates as recorded
from helpers import without_times as timeless
from safetensors.torch import load_file

import ppo_lagrange
import preference_models
import repo


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Folder of one run: three iterations, an evaluation after the second."""
    folder = tmp_path_factory.mktemp("runs") / "repo"
    assert run(repo, output_dir=folder, total_episodes=48, eval_every=2).code == 0
    return folder


def test_args_summary_and_evaluations(whole, files):
    metrics = read_lines(whole / "metrics.jsonl")
    assert [(line["iteration"], line["episodes"]) for line in metrics] == [(1, 16), (2, 32), (3, 48)]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    args, summary = json.loads((whole / "args.json").read_text()), read_summary(whole)
    assert args.keys() == repo.Args.__dataclass_fields__.keys() and args["model"] == str(files.policy)
    assert summary.items() >= {"algorithm": "repo", "seed": 1, "episodes": 48, "dtype": "float32"}.items()
    assert summary["wall_seconds"] > 0 and summary["episodes_per_second"] > 0 and summary["processes"] == 1
    assert summary["lambda"] == metrics[-1]["lambda"]
    prompts, rows = [row["prompt"] for row in read_lines(files.test)], read_lines(whole / "eval.jsonl")
    assert [(row["iteration"], row["prompt"]) for row in rows] == [(i, text) for i in (0, 2, 3) for text in prompts]
    for name, iteration in (("before", 0), ("after", 3)):
        own = [row for row in rows if row["iteration"] == iteration]
        reward, cost, length = (sum(row[key] for row in own) / 13 for key in ("reward", "cost", "length"))
        expected = dict(reward=reward, cost=cost, response_length=length)
        expected["safety_compliance"] = sum(row["cost"] <= 0 for row in own) / 13
        expected["violation"] = sum(max(row["cost"], 0) for row in own) / 13
        assert summary[name] == pytest.approx(expected)


def test_seeds_and_tracking(run, whole, tmp_path, monkeypatch):
    """A run is repeated by its seed; --track sends TensorBoard's figures."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: calls.append(settings)))
    assert run(repo, output_dir=tmp_path / "same", total_episodes=48, eval_every=2, track=True).code == 0
    assert len(calls) == 1 and calls[0]["sync_tensorboard"] and calls[0]["config"]["seed"] == 1
    assert timeless(read_summary(tmp_path / "same")) == timeless(read_summary(whole))
    for name in ("eval.jsonl", "model/model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (whole / name).read_bytes()
    assert run(repo, output_dir=tmp_path / "other", total_episodes=16, seed=2).code == 0
    assert (tmp_path / "other" / "eval.jsonl").read_bytes() != (whole / "eval.jsonl").read_bytes()


def test_every_response_has_random_numbers_of_its_own(run, tmp_path):
    """Over all rows and iterations. Evaluations have their own, always the same, and take --eval-size prompts."""
    drawn, sample_responses = [], repo.sample_responses

    def record(policy, tokenizer, prompts, uniforms, *rest):
        drawn.append(uniforms)
        return sample_responses(policy, tokenizer, prompts, uniforms, *rest)

    flags = dict(total_episodes=48, eval_size=5, learning_rate=1e-30, weight_decay=0)
    with changed(repo, sample_responses=record):
        assert run(repo, output_dir=tmp_path / "run", **flags).code == 0
    rows = torch.cat(drawn[:-1])
    assert torch.equal(drawn[0], drawn[-1]) and len(drawn[0]) == 5 and rows.min() >= 0 and rows.max() < 1
    assert rows.shape == (5 + 48, 16) and len(rows.unique(dim=0)) == len(rows)
    summary = read_summary(tmp_path / "run")
    assert summary["before"] == summary["after"]  # nothing was learnt
    first, second = drawn[:2]
    drawn.clear()
    with changed(repo, sample_responses=record):
        assert run(repo, output_dir=tmp_path / "other", **flags | dict(seed=2, total_episodes=16)).code == 0
    assert not torch.equal(drawn[0], first) and not torch.equal(drawn[1], second)


def test_each_iteration_takes_other_supervised_texts(run, tmp_path):
    """Which are found whatever column and configuration have the prompts."""
    rows = [{"prompt": f"{word}?", "response": word} for word in tiny.WORDS[:40]]
    data, taken, ptx_backward = tmp_path / "ptx", [], repo.ptx_backward
    for name in ("prompts", "ptx"):
        (tmp_path / name).mkdir()
    tiny.write_rows(data / "train.jsonl", rows)
    tiny.write_rows(tmp_path / "prompts" / "a.jsonl", [{"question": word, "prompt": 7} for word in tiny.WORDS])
    card = "---\nconfigs:\n- {config_name: one, data_files: a.jsonl}\n- {config_name: two, data_files: b.jsonl}\n---\n"
    (tmp_path / "prompts" / "README.md").write_text(card)

    def record(args, policy, tokenizer, texts):
        taken.extend(text["responses"][0] for text in texts)
        return ptx_backward(args, policy, tokenizer, texts)

    with changed(repo, ptx_backward=record):
        flags = dict.fromkeys(("dataset", "eval_dataset"), tmp_path / "prompts") | dict(prompt_column="question")
        assert run(repo, output_dir=tmp_path / "run", ptx_dataset=data, dataset_config="one", **flags).code == 0
    assert len(taken) == len(set(taken)) == 32


def test_warm_up_and_bfloat16(run, files, tmp_path):
    """The weights are trained in float32 whatever the compute type: steps this small would vanish in bfloat16."""
    flags = dict(total_episodes=16 * 6, warmup_ratio=0.3, learning_rate=1e-4, max_new_tokens=4, dtype="bfloat16")
    assert run(repo, output_dir=tmp_path / "run", **flags).code == 0
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.0, 5e-5, *(5e-5 * (1 + math.cos(math.pi * step / 4)) for step in range(4))])
    weights, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "model", files.policy))
    moved = torch.cat([(weights[name] - start[name]).abs().flatten() for name in start])
    assert moved.dtype == torch.float32 and moved.max() < 1e-3 and (moved > 0).float().mean() > 0.5


def test_a_script_runs_alone_in_another_folder(defaults, tmp_path):
    """One file and its checkpoints are all that is needed."""
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "repo.py", tmp_path / "alone")
    flags = defaults["repo"] | dict(output_dir="out", total_episodes=16)
    outcome = finish(start([tmp_path / "alone" / "repo.py", *command(**flags)], cwd=tmp_path))
    assert outcome.code == 0 and "Traceback" not in outcome.err and "Warning" not in outcome.err, outcome.err
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


PROMPTS = ["ba pi?", "ke?", "sa le ra mu?"]  # "ke" and "pi" side by side would make a new word
TEXTS = ["sa le", "pi ke mu ra ba", "? ."]


def load_scorer(files, processes, folder, prompts=PROMPTS, longest=20, **flags):
    """A score model as repo.py loads it beside the policy."""
    tokenizer = repo.load_tokenizer(str(files.policy), "--model")
    options = dict(mesh=processes[1], dtype=torch.float32, longest=longest, tokenizer=tokenizer)
    prompts = [{"prompt": prompt} for prompt in prompts]
    return repo.load_scorer(repo.Args(max_new_tokens=8, **flags), str(folder), "--reward-model", prompts, options)


def lay_out(texts, ends):
    """Responses of these texts to PROMPTS."""
    tokenizer = tiny.make_tokenizer()
    ids = [[*tokenizer(text)["input_ids"], *[1] * end] for text, end in zip(texts, ends, strict=True)]
    left, left_mask = repo.pad(tokenizer, tokenizer(PROMPTS)["input_ids"], "left", "cpu")
    right, right_mask = repo.pad(tokenizer, ids, "right", "cpu")
    both = torch.cat([left, right], 1), torch.cat([left_mask, right_mask], 1)
    return repo.Responses(*both, right_mask, torch.tensor(ends), texts, both[0])


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_score_model_with_another_tokenizer_gives_the_same_scores(files, processes, tmp_path, kind):
    """The same weights for a permuted vocabulary: prompts and responses go through their texts, EOS where one was."""
    original, tokenizer, ends = getattr(files, kind), tiny.make_tokenizer(), [True, False, True]
    responses = lay_out(TEXTS, ends)
    same = load_scorer(files, processes, original)
    other = load_scorer(files, processes, tiny.permuted_copy(original, tmp_path / "permuted"))
    assert same.shares_tokens and not other.shares_tokens
    scores, expected = (repo.score_responses(scorer, PROMPTS, responses, 2) for scorer in (other, same))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    # The templates of policy and score model differ: the tokens do, too.
    framed = load_scorer(files, processes, original, score_prompt_template="ba {prompt}")
    rows = zip(PROMPTS, TEXTS, ends, strict=True)
    rows = [tokenizer(f"ba {prompt}{text}")["input_ids"] + [1] * end for prompt, text, end in rows]
    with torch.no_grad():
        expected = [framed(torch.tensor([row]), torch.ones(1, len(row)).long())[0, -1].item() for row in rows]
    assert repo.score_responses(framed, PROMPTS, responses, 2).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_score_model_that_reads_fewer_tokens(files, processes, tmp_path, capsys):
    """Refused, where prompts and responses are too long in its own tokens; texts that lose their end are counted."""
    tiny.make_model(tmp_path / "short", "score", max_position_embeddings=14)
    folder = tiny.permuted_copy(tmp_path / "short", tmp_path / "other")
    for name, prompts in ((folder, ["ba " * 7]), (tmp_path / "short", ["ba"])):
        with pytest.raises(repo.UserError, match=f"--reward-model {name} .*reads 14 tokens, but a text may have"):
            load_scorer(files, processes, name, prompts)
    model = load_scorer(files, processes, folder)
    for texts, count in (["sa le", "pi ke mu ra ba", "? ."], 0), (["sa " * 12, "pi ke mu ra ba", "? " * 12], 2):
        scores = repo.score_responses(model, PROMPTS, lay_out(texts, [True, False, True]), 2)
        said = f"{count} of 3 responses lost their end: a score model reads 14 tokens\n"
        assert capsys.readouterr().err == (said if count else "")
    for row in (0, 2):
        ids = model.tokenizer(f"{PROMPTS[row]}{texts[row]}")["input_ids"][:14]
        assert scores[row].item() == pytest.approx(model(torch.tensor([ids]), torch.ones(1, 14).long())[0, -1].item())


@pytest.mark.parametrize("template", ["{prompt}", "chat"])
def test_a_finished_response_is_scored_as_score_models_are_trained(processes, tmp_path, template):
    """Whichever of several EOS tokens ended it: preference_models.py's tokens of the same text, and the same score."""
    plain = tiny.make_chat_tokenizer()
    folders = [tiny.make_model(tmp_path / name, name, tokenizer=plain) for name in ("policy", "score")]
    ends = [plain.get_vocab()[name] for name in ("<eos>", "<end>", "pi")]
    tiny.edit_json(folders[0] / "generation_config.json", eos_token_id=ends)
    policy, model = load_policy(folders[0], processes), load_scores(folders[1], processes)
    tokenizer = repo.load_tokenizer(str(folders[0]), "--model", template)
    assert tokenizer.end_id == ends[template == "chat"]
    prompts = [f"{word}?" for word in tiny.WORDS] * 2
    uniforms = torch.rand(len(prompts), 12, generator=torch.Generator().manual_seed(0))
    responses = repo.sample_responses(policy, tokenizer, repo.encode(tokenizer, prompts), uniforms, 1.0)
    model.shares_tokens = True
    scores = repo.score_responses(model, prompts, responses, 16)
    rows = [dict(prompt=prompts[i], chosen=text, rejected="sa") for i, text in enumerate(responses.texts)]
    data, last, compared = tmp_path / "pairs.jsonl", responses.response_mask.sum(1) - 1, []
    for i in responses.finished.nonzero()[:, 0].tolist():
        tokens = responses.sequences[i, -responses.response_mask.shape[1] :][: last[i] + 1].tolist()
        if tokens[-1] == ends[2] or not tokens[:-1] or plain(responses.texts[i])["input_ids"][1:] != tokens[:-1]:
            continue  # a word of the text that ends it, or a special token in its middle, is not in what decoding gives
        tiny.write_rows(data, [rows[i]])
        args = preference_models.Args(prompt_template=template)
        (pair,) = preference_models.load_pairs(args, str(data), "train", "--dataset", tokenizer)
        ids = torch.tensor([pair["ids"][0]])
        assert pair["ids"][0][-1] == tokenizer.end_id
        assert scores[i].item() == pytest.approx(repo.text_scores(model, ids, torch.ones_like(ids)).item(), abs=1e-5)
        compared.append(tokens[-1])
    assert {*compared} == {*ends[:2]}


def test_tokens_that_the_tokenizer_lacks_are_never_sampled(processes, tmp_path):
    """An embedding of more rows than tokens, padded for speed: those of no token count for nothing."""
    plain = tiny.make_model(tmp_path / "plain")

    def widen(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], 1e3 * torch.randn(128 - len(weights[name]), 16)])

    wide = tiny.copy_model(plain, tmp_path / "wide", widen, vocab_size=128)
    (one, tokenizer), (other, _) = (sample(folder, processes) for folder in (plain, wide))
    assert torch.equal(one.sequences, other.sequences) and one.sequences.max() < len(tokenizer)
    ids, mask = one.sequences, one.attention_mask
    policies = [load_policy(folder, processes) for folder in (plain, wide)]
    assert policies[1](ids).logits[..., len(tokenizer) :].max() > 100
    logprobs = [repo.response_logprobs(policy, ids, mask, ids.shape[1] - 1, 0.7) for policy in policies]
    torch.testing.assert_close(*logprobs)


def test_where_critics_start(run, files, tmp_path):
    """From score models that share the tokenizer, else from the policy with a fresh head of the seed."""
    reward, cost, policy = (load_file(path / "model.safetensors") for path in (files.reward, files.cost, files.policy))
    permuted, heads = tiny.permuted_copy(files.reward, tmp_path / "permuted"), []
    for flags, expected in (
        (dict(), (reward, cost)),
        (dict(reward_critic=files.cost, cost_critic=files.policy), (cost, policy)),
        (dict(reward_model=permuted), (policy, cost)),
        (dict(reward_model=permuted, seed=2), (policy, cost)),
    ):
        with recorded() as updates:
            assert run(repo, output_dir=tmp_path / f"{len(heads)}", total_episodes=16, **flags).code == 0
        for (parameters, _), weights in zip(updates[1:], expected, strict=True):
            for name in {"model.embed_tokens.weight", "score.weight"} & weights.keys():
                assert any(map(torch.equal, parameters, [weights[name]] * len(parameters))), name
        heads.append(updates[1][0][-1])
    assert heads[2].shape == (1, 16) and not torch.equal(heads[2], heads[3])


MANY = ["ba pi?", "ke", "sa le ra mu?", "pi ke?"] * 8


def sample(folder, processes, prompts=MANY, uniforms=None):
    """Sampled responses of a checkpoint, and its tokenizer."""
    policy, tokenizer = load_policy(folder, processes), repo.load_tokenizer(str(folder), "--model")
    if uniforms is None:
        uniforms = torch.rand(len(prompts), 16, generator=torch.Generator().manual_seed(0))
    return repo.sample_responses(policy, tokenizer, tokenizer(prompts)["input_ids"], uniforms, 1.0), tokenizer


def count_ended(responses, prompts, tokenizer, eos_ids):
    """Check the masks of Responses, response by response; returns how many ended."""
    length = responses.response_mask.shape[1]
    assert responses.response_mask[:, -1].any()  # sampling stops when all responses have ended
    for row, prompt in enumerate(tokenizer(prompts)["input_ids"]):
        tokens = responses.sequences[row, -length:].tolist()
        end = next((t for t, token in enumerate(tokens) if token in eos_ids), None)
        kept = length if end is None else end + 1
        left = responses.sequences.shape[1] - length - len(prompt)
        assert responses.response_mask[row].tolist() == [1] * kept + [0] * (length - kept)
        assert responses.attention_mask[row].tolist() == [0] * left + [1] * (len(prompt) + kept) + [0] * (length - kept)
        assert responses.sequences[row, left:-length].tolist() == prompt
        assert bool(responses.finished[row]) == (end is not None)
        words = tokenizer.decode([prompt[-1], *tokens[:kept]], skip_special_tokens=True)
        assert responses.texts[row] == words.removeprefix(tokenizer.decode(prompt[-1:]))  # also the blank before it
    return int(responses.finished.sum())


def test_a_response_keeps_its_eos_and_masks_what_follows(files, processes, tmp_path):
    """Whichever of several EOS tokens comes first; without a pad token, later EOS tokens are padding."""
    responses, tokenizer = sample(files.policy, processes)
    ended = count_ended(responses, MANY, tokenizer, {1})
    assert 0 < ended < len(MANY)
    uniforms = torch.rand(len(MANY), 16, generator=torch.Generator().manual_seed(0))[responses.finished]
    prompts = [prompt for prompt, finished in zip(MANY, responses.finished, strict=True) if finished]
    responses, _ = sample(files.policy, processes, prompts, uniforms)  # the longest ends in the last column
    assert count_ended(responses, prompts, tokenizer, {1}) == ended
    folder = tiny.copy_model(files.policy, tmp_path / "several")
    tiny.edit_json(folder / "generation_config.json", eos_token_id=[1, 20, 30])
    assert count_ended(sample(folder, processes)[0], MANY, tokenizer, {1, 20, 30}) > ended
    folder = tiny.make_model(tmp_path / "unpadded", tokenizer=tiny.make_tokenizer(pad=False))
    responses, tokenizer = sample(folder, processes)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert 0 < count_ended(responses, MANY, tokenizer, {1}) < len(MANY)


def test_a_response_depends_on_nothing_but_its_prompt_and_its_numbers(files, processes, tmp_path):
    """Neither on its neighbours and the padding that they cause, nor on settings for generation."""
    prompts = ["ba pi?", "ke sa le ra mu di fo?", "ke"]
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    together, _ = sample(files.policy, processes, prompts, uniforms)
    for row in range(3):
        alone, _ = sample(files.policy, processes, prompts[row : row + 1], uniforms[row : row + 1])
        assert torch.equal(together.sequences[row][together.attention_mask[row].bool()], alone.sequences[0])
    folder = tiny.copy_model(files.policy, tmp_path / "policy")
    bent = dict(temperature=3.0, top_p=0.1, top_k=2, do_sample=True, repetition_penalty=5.0, max_length=3, num_beams=3)
    tiny.edit_json(folder / "generation_config.json", **bent)
    assert torch.equal(sample(folder, processes, prompts, uniforms)[0].sequences, together.sequences)
    repo.save_model(load_policy(folder, processes), tiny.make_tokenizer(), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()).items() >= bent.items()


def run_both(run, folder, **flags):
    """The same run of both scripts: their metrics but times, answers, and weights."""
    for script in (repo, ppo_lagrange):
        assert run(script, output_dir=folder / script.__name__, **flags).code == 0
        metrics = list(map(timeless, read_lines(folder / script.__name__ / "metrics.jsonl")))
        weights = load_file(folder / script.__name__ / "model" / "model.safetensors")
        yield metrics, (folder / script.__name__ / "eval.jsonl").read_bytes(), weights


def test_where_everything_violates_both_scripts_are_one(run, tmp_path):
    """{C - d}^+ = C - d under a threshold below all costs: the same numbers to the last bit, in all files."""
    ours, theirs = run_both(run, tmp_path, cost_threshold=-100, lambda_lr=1, lambda_max=1.5, responses_per_prompt=2)
    assert ours[:2] == theirs[:2] and all(torch.equal(value, theirs[2][name]) for name, value in ours[2].items())
    assert all(line["safety_compliance"] == 0 and line["lambda"] > 1 for line in ours[0])


def test_plain_ppo_is_lambda_zero(run, tmp_path):
    """λ_init 0: λ stays 0 whatever the costs, and both scripts are PPO on the reward."""
    ours, theirs = run_both(run, tmp_path, lambda_init=0, cost_threshold=-3, lambda_lr=0.5)
    assert {line["lambda"] for line in ours[0] + theirs[0]} == {0}
    assert ours[1] == theirs[1] and all(torch.equal(value, theirs[2][name]) for name, value in ours[2].items())
