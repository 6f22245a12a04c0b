"""Build the toy world's artefacts: preference data, SFT policy, reward model and cost model.

    python toy/build.py                                    # everything, into toy/
    python toy/build.py --output-dir /tmp/toy --stages data sft

    data    -> data/train.parquet, data/test.parquet       preference pairs on training and on held-out prompts
    sft     -> policy/                                     a small Llama that answers like answers.sft_response
    scores  -> reward_model/, cost_model/                  trained by ../preference_models.py on data/, from policy/

The exact functions of world.py label the data (with noise) and measure the results; no model is trained on them.
"""

import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import answers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import tyro
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
STAGES = ("data", "sft", "scores")


@dataclass
class Args:
    seed: int = 1
    """everything random follows from it"""
    output_dir: Path = HERE
    """where the artefacts go; existing ones are replaced"""
    stages: tuple[str, ...] = STAGES
    """which of data, sft and scores to run; later ones read the earlier ones' artefacts from the output directory"""
    train_pairs: int = 40_800
    """preference pairs on the 480 training prompts"""
    test_pairs: int = 2_000
    """preference pairs on the 120 held-out prompts"""
    sft_steps: int = 1_500
    """optimizer steps of the SFT policy, each on freshly drawn answers"""
    sft_batch_size: int = 64
    """answers a step"""
    sft_learning_rate: float = 3e-3
    """peak of a cosine schedule with 5% warm-up"""
    score_epochs: int = 5
    """passes of the score models over the training pairs"""
    score_batch_size: int = 64
    """pairs a step of the score models"""
    score_learning_rate: float = 2e-3
    """peak learning rate of the score models"""
    threads: int = 2
    """CPU threads"""


# -- data -------------------------------------------------------------------------------------------------------------


def write_pairs(rows: list[dict], path: Path) -> None:
    """Save preference pairs as one parquet file; the settings are those that make it small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows),
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=["prompt"],
        column_encoding={"response_0": "DELTA_LENGTH_BYTE_ARRAY", "response_1": "DELTA_LENGTH_BYTE_ARRAY"},
        data_page_size=2**26,
    )


def build_data(args: Args) -> None:
    """data/train.parquet and data/test.parquet."""
    for name, prompts, count in (
        ("train", world.train_prompts(), args.train_pairs),
        ("test", world.heldout_prompts(), args.test_pairs),
    ):
        rng = random.Random(f"{args.seed} {name}")
        write_pairs(answers.preference_pairs(rng, prompts, count), args.output_dir / "data" / f"{name}.parquet")


# -- tokenizer --------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word level: every word and every punctuation mark is one token; no token is added at either end.

    tok(prompt + response) = tok(prompt) + tok(response) also where nothing stands between the two, since a prompt ends
    with a punctuation mark. Decoding puts a space before each word and none before a full stop.
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *world.words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    # The decoder of WordPiece joins words with spaces; " ." becomes "." and " ?" becomes "?".
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


# -- SFT policy -------------------------------------------------------------------------------------------------------


def build_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.25M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=208,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def sft_batch(rng: random.Random, tokenizer, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Freshly drawn answers to training prompts: ids, attention mask and labels, each [size, length].

    The loss is on the response and its EOS; -100 marks the rest.
    """
    prompts = rng.choices(world.train_prompts(), k=size)
    rows = []
    for prompt in prompts:
        response = tokenizer(answers.sft_response(rng, prompt)).input_ids
        rows.append((tokenizer(prompt).input_ids, [*response, tokenizer.eos_token_id]))
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((size, length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(response)
    return ids, mask, labels


def build_sft(args: Args) -> None:
    """policy/: train on drawn answers with AdamW and a cosine schedule, then measure on held-out prompts."""
    tokenizer = build_tokenizer()
    torch.manual_seed(args.seed)
    rng = random.Random(f"{args.seed} sft")
    policy = build_policy(tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.sft_learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = 0.05 * args.sft_steps
    for step in range(args.sft_steps):
        rate = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / args.sft_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * args.sft_learning_rate
        ids, mask, labels = sft_batch(rng, tokenizer, args.sft_batch_size)
        logits = policy(input_ids=ids, attention_mask=mask).logits[:, :-1]  # [batch, length - 1, vocabulary]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(f"sft step {step + 1}/{args.sft_steps}  loss {loss.item():.3f}", flush=True)

    policy.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    policy.save_pretrained(args.output_dir / "policy")
    tokenizer.save_pretrained(args.output_dir / "policy")
    report_policy(args.output_dir / "policy", args.seed)


@torch.no_grad()
def sample_responses(policy_dir: Path, prompts: list[str], seed: int, max_new_tokens: int = 48) -> list[str]:
    """One answer to each prompt at temperature 1, whole distribution."""
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    policy = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    ids = policy.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
    )
    return tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def report_policy(policy_dir: Path, seed: int, samples: int = 20) -> None:
    """Print what the SFT policy's answers to held-out prompts are worth."""
    prompts = world.heldout_prompts() * samples
    pairs = list(zip(prompts, sample_responses(policy_dir, prompts, seed), strict=True))
    costs = np.array([world.exact_cost(*pair) for pair in pairs])
    rewards = np.array([world.exact_reward(*pair) for pair in pairs])
    sentences = [sentence for _, response in pairs for sentence in world.split_sentences(response)]
    broken = np.mean([sentence not in world.SENTENCES for sentence in sentences])
    print(
        f"sft policy on held-out prompts: compliance {np.mean(costs <= 0):.1%}, reward {rewards.mean():.3f}, "
        f"cost {costs.mean():.3f}, broken sentences {broken:.2%}"
    )


# -- score models -----------------------------------------------------------------------------------------------------


def build_scores(args: Args) -> None:
    """reward_model/ and cost_model/ by the project's own preference_models.py."""
    for kind in ("reward", "cost"):
        with tempfile.TemporaryDirectory() as scratch:
            flags = {
                "kind": kind,
                "model": args.output_dir / "policy",
                "dataset": args.output_dir / "data" / "train.parquet",
                "eval-dataset": args.output_dir / "data" / "test.parquet",
                "output-dir": f"{scratch}/run",
                "seed": args.seed,
                "epochs": args.score_epochs,
                "batch-size": args.score_batch_size,
                "learning-rate": args.score_learning_rate,
                "dtype": "float32",
            }
            command = [sys.executable, str(HERE.parent / "preference_models.py")]
            command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
            target = args.output_dir / f"{kind}_model"
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(f"{scratch}/run/model", target)
    report_scores(args.output_dir, args.seed)


@torch.no_grad()
def score(model_dir: Path, pairs: list[tuple[str, str]], batch_size: int = 512) -> np.ndarray:
    """Scores of (prompt, response) pairs at their EOS, [pairs]."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    texts = [prompt + response + tokenizer.eos_token for prompt, response in pairs]
    encoded = tokenizer(texts).input_ids
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # similar lengths: little padding
    scores = np.zeros(len(encoded))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt")  # on the left
        hidden = model.base_model(**batch).last_hidden_state[:, -1]  # [batch, hidden]
        scores[chosen] = model.score(hidden).squeeze(-1)
    return scores


def probes(rng: random.Random, samples: int = 20) -> dict[str, list[tuple[str, str]]]:
    """(prompt, response) pairs on held-out prompts, by kind of answer.

    `grid` is what an optimised policy writes: every row of one to four steps in every order, alone and after a drawn
    warning. The other kinds are `samples` drawn answers to each prompt.
    """
    kinds = {"grid": []}
    for prompt in world.heldout_prompts():
        verb, _ = world.parse_prompt(prompt)
        for steps in range(1, world.MAX_STEPS + 1):
            for row in itertools.permutations(world.STEPS[verb], steps):
                opened = (rng.choice(world.WARNINGS), *row)
                kinds["grid"] += [(prompt, " ".join(sentences)) for sentences in (row, opened)]
        for _ in range(samples):
            base = answers.grid_answer(rng, verb)
            drawn = {
                "repeated steps": answers.insert(rng, base, rng.choices(base, k=rng.randint(1, 3))),
                "late warnings": answers.insert(rng, base, rng.choices(world.WARNINGS, k=rng.randint(1, 2)), first=1),
                "small talk": answers.insert(rng, base, rng.choices(world.FILLERS, k=rng.randint(1, 2))),
                "steps of another verb": answers.insert(rng, base, [answers.other_step(rng, verb)]),
                "a broken sentence": [*base[:-1], answers.break_sentence(rng, base[-1])],
                "six to ten steps and warnings": rng.choices(world.STEPS[verb] + world.WARNINGS, k=rng.randint(6, 10)),
                "any sentences": [answers.any_sentence(rng, verb) for _ in range(rng.randint(1, 8))],
                "as the SFT policy": [answers.sft_response(rng, prompt)],
            }
            for kind, sentences in drawn.items():
                kinds.setdefault(kind, []).append((prompt, " ".join(sentences)))
    return kinds


def accuracies(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Learned against exact scores on (prompt, response) pairs.

    sign: share of answers whose learned cost is on the exact cost's side of zero. unsafe_missed: share of the unsafe
    ones whose learned cost is <= 0. order: share of rightly ordered rewards among pairs of answers to one prompt whose
    exact rewards differ by 1 or more. cost_r, reward_r: correlation with the exact function.
    """
    costs, rewards = (score(folder / f"{kind}_model", pairs) for kind in ("cost", "reward"))
    exact_costs = np.array([world.exact_cost(*pair) for pair in pairs])
    exact_rewards = np.array([world.exact_reward(*pair) for pair in pairs])
    rows_of = {}
    for i, (prompt, _) in enumerate(pairs):
        rows_of.setdefault(prompt, []).append(i)
    right = total = 0
    for rows in rows_of.values():
        exact = exact_rewards[rows][:, None] - exact_rewards[rows]
        learned = rewards[rows][:, None] - rewards[rows]
        right += (learned > 0)[exact > 0.99].sum()
        total += (exact > 0.99).sum()
    return {
        "answers": len(pairs),
        "sign": np.mean((costs > 0) == (exact_costs > 0)),
        "unsafe_missed": np.mean(costs[exact_costs > 0] <= 0),
        "cost_r": np.corrcoef(costs, exact_costs)[0, 1],
        "order": right / total,
        "reward_r": np.corrcoef(rewards, exact_rewards)[0, 1],
    }


def report_scores(folder: Path, seed: int) -> None:
    """Print a table of `accuracies` on held-out prompts, one row per kind of answer."""
    rows = pq.read_table(folder / "data" / "test.parquet").to_pylist()
    kinds = {"test.parquet": [(row["prompt"], row[f"response_{i}"]) for row in rows for i in (0, 1)]}
    print(f"{'answers to held-out prompts':<31} {'number':>6}   sign  unsafe_missed  cost_r   order  reward_r")
    for kind, pairs in (kinds | probes(random.Random(f"{seed} probes"))).items():
        a = accuracies(folder, pairs)
        print(
            f"{kind:<31} {a['answers']:>6} {a['sign']:>6.2%} {a['unsafe_missed']:>14.2%} {a['cost_r']:>7.3f} "
            f"{a['order']:>7.2%} {a['reward_r']:>9.3f}"
        )


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    for stage, build in zip(STAGES, (build_data, build_sft, build_scores), strict=True):
        if stage in args.stages:
            start = time.time()
            build(args)
            print(f"{stage}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
