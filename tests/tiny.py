"""Tiny random checkpoints and data sets in the formats of the Hub, made for the tests."""

import json
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]


def make_tokenizer(words=WORDS, pad=True) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark; decoding joins tokens by a space, which encoding ignores again."""
    special = ["<unk>", "<eos>", *(["<pad>"] if pad else [])]
    vocabulary = {word: i for i, word in enumerate([*special, ".", "?", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    named = dict(unk_token="<unk>", eos_token="<eos>", pad_token="<pad>" if pad else None)
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}> {{ message['content'] | trim }} <end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """It puts BOS before every text by itself, as Llama's do, and has no pad token; a turn of a chat ends in <end>."""
    tokenizer, special = make_tokenizer(pad=False), ["<system>", "<user>", "<assistant>", "<end>"]
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": special})
    own = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=own)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(tokenizer, **changes) -> LlamaConfig:
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaConfig(**(settings | changes))


def make_model(folder: Path, kind: str = "policy", seed: int = 0, tokenizer=None, **changes) -> Path:
    """kind: policy, score (one-label sequence classification), biased_score (one-label token classification)."""
    tokenizer, scores = tokenizer or make_tokenizer(), AutoModelForSequenceClassification
    classes = dict(policy=AutoModelForCausalLM, score=scores, biased_score=AutoModelForTokenClassification)
    torch.manual_seed(seed)
    labels = {} if kind == "policy" else {"num_labels": 1}
    model = classes[kind].from_config(make_config(tokenizer, **(labels | changes)), dtype=torch.float32)
    if kind == "biased_score":
        torch.nn.init.normal_(model.score.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copy_model(source: Path, folder: Path, change=None, **config) -> Path:
    """A copy of a checkpoint; `change` edits its dictionary of weights in place, `config` entries of config.json."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if change:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", **config)
    return folder


def edit_json(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries), encoding="utf-8")


def permuted_copy(source: Path, folder: Path) -> Path:
    """The same score model for a tokenizer with the words in another order: the rows of its embedding move along."""
    old, new = make_tokenizer(), make_tokenizer(WORDS[::-1])
    order = [old.get_vocab()[word] for word, _ in sorted(new.get_vocab().items(), key=lambda item: item[1])]

    def change(weights):
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][order].contiguous()

    copy_model(source, folder, change)
    new.save_pretrained(folder)
    return folder


def make_sentence(generator: torch.Generator, least: int, most: int) -> str:
    length = int(torch.randint(least, most + 1, (1,), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())


def make_pairs(count: int, seed: int = 0) -> list[dict]:
    """Rows in PKU-SafeRLHF's columns: the response with more words is better, one with the word "ba" is unsafe."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        responses = [make_sentence(generator, 1, 3), make_sentence(generator, 5, 8)]
        if torch.rand((), generator=generator) < 0.5:
            responses.reverse()
        for i in range(2):  # in half of the responses, as one word in sixty would be in few of them
            if torch.rand((), generator=generator) < 0.5:
                responses[i] += " ba"
        unsafe = ["ba" in response.split() for response in responses]
        row = {"prompt": make_sentence(generator, 2, 6) + "?", "response_0": responses[0], "response_1": responses[1]}
        row["better_response_id"] = int(len(responses[1].split()) > len(responses[0].split()))
        row["safer_response_id"] = int(unsafe[0] and not unsafe[1])
        rows.append(row | {"is_response_0_safe": not unsafe[0], "is_response_1_safe": not unsafe[1]})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as a jsonl, json, csv or parquet file, by the name's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        table = datasets.Dataset.from_list(rows)
        table.to_csv(path) if path.suffix == ".csv" else table.to_parquet(path)
    return path
