"""repo.py from end to end on tiny checkpoints and data: files, options, responses, score models and critics.

And what ppo_lagrange.py shares with it run for run, with plain PPO as a setting of it.
"""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import ROOT, changed, command, finish, load_policy, read_back, read_lines, read_summary, start
from helpers import recorded_updates as recorded
from helpers import without_times as timeless
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo_lagrange
import repo


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Folder of one run: three iterations, an evaluation after the second."""
    folder = tmp_path_factory.mktemp("runs") / "repo"
    assert run(repo, output_dir=folder, total_episodes=48, eval_every=2).code == 0
    return folder


def test_metrics_and_tensorboard(whole):
    metrics = read_lines(whole / "metrics.jsonl")
    assert [(line["iteration"], line["episodes"]) for line in metrics] == [(1, 16), (2, 32), (3, 48)]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    board = EventAccumulator(str(whole / "tensorboard")).Reload()  # its names are held to the page in test_docs.py
    expected = [(i, pytest.approx(line["lambda"])) for i, line in enumerate(metrics, 1)]
    assert [(event.step, event.value) for event in board.Scalars("safety/lambda")] == expected


def test_args_summary_and_evaluations(whole, files):
    args, summary = json.loads((whole / "args.json").read_text()), read_summary(whole)
    assert args.keys() == repo.Args.__dataclass_fields__.keys() and args["model"] == str(files.policy)
    assert summary.items() >= {"algorithm": "repo", "seed": 1, "episodes": 48, "dtype": "float32"}.items()
    assert summary["wall_seconds"] > 0 and summary["episodes_per_second"] > 0 and summary["processes"] == 1
    assert summary["lambda"] == read_lines(whole / "metrics.jsonl")[-1]["lambda"]
    prompts, rows = [row["prompt"] for row in read_lines(files.test)], read_lines(whole / "eval.jsonl")
    assert [(row["iteration"], row["prompt"]) for row in rows] == [(i, text) for i in (0, 2, 3) for text in prompts]
    for name, iteration in (("before", 0), ("after", 3)):
        own = [row for row in rows if row["iteration"] == iteration]
        reward, cost, length = (sum(row[key] for row in own) / 13 for key in ("reward", "cost", "length"))
        expected = dict(reward=reward, cost=cost, response_length=length)
        expected["safety_compliance"] = sum(row["cost"] <= 0 for row in own) / 13
        expected["violation"] = sum(max(row["cost"], 0) for row in own) / 13
        assert summary[name] == pytest.approx(expected)


def test_the_model_loads_and_has_learnt(whole, files):
    assert {path.suffix for path in (whole / "model").iterdir()} <= {".json", ".safetensors"}
    start, end = (read_back(AutoModelForCausalLM, path).state_dict() for path in (files.policy, whole / "model"))
    assert start.keys() == end.keys() and all((start[name] != end[name]).any() for name in start)
    text = "ba pi ke? sa"
    assert AutoTokenizer.from_pretrained(whole / "model")(text) == AutoTokenizer.from_pretrained(files.policy)(text)


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
    rows = [{"prompt": f"{word}?", "response": word} for word in tiny.WORDS[:40]]
    data, taken, ptx_backward = tiny.write_rows(tmp_path / "ptx.jsonl", rows), [], repo.ptx_backward

    def record(args, policy, tokenizer, texts):
        taken.extend(tuple(ids) for ids, _ in texts)
        return ptx_backward(args, policy, tokenizer, texts)

    with changed(repo, ptx_backward=record):
        assert run(repo, output_dir=tmp_path / "run", ptx_dataset=data, total_episodes=32).code == 0
    assert len(taken) == len(set(taken)) == 32


@pytest.mark.parametrize(
    "flag, value", [("learning_rate", "inf"), ("lambda_init", -1), ("temperature", 0), ("kl_coef", "nan")]
)
def test_numbers_that_make_no_sense(run, tmp_path, flag, value):
    outcome = run(repo, output_dir=tmp_path / "run", **{flag: value})
    assert outcome.code == 2 and len(outcome.errors) == 1 and not (tmp_path / "run" / "model").exists()


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


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_score_model_with_another_tokenizer_gives_the_same_scores(files, processes, tmp_path, kind):
    """The same weights for a permuted vocabulary: prompts and responses go through their texts, EOS where one was."""

    def load(folder, **flags):
        options = dict(mesh=processes[1], dtype=torch.float32, longest=0)
        policy_tokenizer = repo.load_tokenizer(str(files.policy), "--model")
        return repo.load_scorer(repo.Args(**flags), str(folder), "--reward-model", policy_tokenizer, options)

    original, tokenizer, ends = getattr(files, kind), tiny.make_tokenizer(), [True, False, True]
    ids = [[*tokenizer(text)["input_ids"], *[1] * end] for text, end in zip(TEXTS, ends, strict=True)]
    left, left_mask = repo.pad(tokenizer, tokenizer(PROMPTS)["input_ids"], "left", "cpu")
    right, right_mask = repo.pad(tokenizer, ids, "right", "cpu")
    both = torch.cat([left, right], 1), torch.cat([left_mask, right_mask], 1)
    responses = repo.Responses(*both, right_mask, torch.tensor(ends), TEXTS)
    same, other = load(original), load(tiny.permuted_copy(original, tmp_path / "permuted"))
    assert same.shares_tokens and not other.shares_tokens
    scores, expected = (repo.score_responses(scorer, PROMPTS, responses, 2) for scorer in (other, same))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    # The templates of policy and score model differ: the tokens do, too.
    framed, rows = load(original, score_prompt_template="ba {prompt}"), zip(PROMPTS, TEXTS, ends, strict=True)
    rows = [tokenizer(f"ba {prompt}{text}")["input_ids"] + [1] * end for prompt, text, end in rows]
    with torch.no_grad():
        expected = [framed(torch.tensor([row]), torch.ones(1, len(row)).long())[0, -1].item() for row in rows]
    assert repo.score_responses(framed, PROMPTS, responses, 2).tolist() == pytest.approx(expected, abs=1e-5)


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
        assert responses.texts[row] == tokenizer.decode(tokens[:kept], skip_special_tokens=True)
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
    """Neither on its neighbours and the padding that they cause, nor on dropout and settings for generation."""
    prompts = ["ba pi?", "ke sa le ra mu di fo?", "ke"]
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    together, _ = sample(files.policy, processes, prompts, uniforms)
    for row in range(3):
        alone, _ = sample(files.policy, processes, prompts[row : row + 1], uniforms[row : row + 1])
        assert torch.equal(together.sequences[row][together.attention_mask[row].bool()], alone.sequences[0])
    folder = tiny.copy_model(files.policy, tmp_path / "policy", attention_dropout=0.5)
    bent = dict(temperature=3.0, top_p=0.1, top_k=2, do_sample=True, repetition_penalty=5.0, max_length=3, num_beams=3)
    tiny.edit_json(folder / "generation_config.json", **bent)
    assert torch.equal(sample(folder, processes, prompts, uniforms)[0].sequences, together.sequences)
    policy, ids = load_policy(folder, processes).train(), torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    repo.save_model(policy, tiny.make_tokenizer(), tmp_path / "saved")
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
    ours, theirs = run_both(run, tmp_path, cost_threshold=-100, lambda_lr=1e-4, responses_per_prompt=2)
    assert ours[:2] == theirs[:2] and all(torch.equal(value, theirs[2][name]) for name, value in ours[2].items())
    assert all(line["safety_compliance"] == 0 and line["lambda"] > 1 for line in ours[0])


def test_plain_ppo_is_lambda_zero(run, tmp_path):
    """λ_init 0: λ stays 0 whatever the costs, and both scripts are PPO on the reward."""
    ours, theirs = run_both(run, tmp_path, lambda_init=0, cost_threshold=-3, lambda_lr=0.5)
    assert {line["lambda"] for line in ours[0] + theirs[0]} == {0}
    assert ours[1] == theirs[1] and all(torch.equal(value, theirs[2][name]) for name, value in ours[2].items())
