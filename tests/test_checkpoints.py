"""Checkpoints as people have them: families of models, sharded files, Safe RLHF's score models, tokenizers of chats.

What the scripts compute with a checkpoint is held to the library's own model in memory from which the file was
written, and to a score head written out by hand.
"""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import ROOT, changed, contents, finish, read_lines, read_summary, start
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import preference_models
import repo

WIDTH = 16
SIZES = dict(
    hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
HEADS = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6)  # texts below are longer than the window
FAMILIES = {
    "llama": lambda **ids: LlamaConfig(**SIZES, **ids),
    "llama tied": lambda **ids: LlamaConfig(**SIZES, tie_word_embeddings=True, **ids),
    "llama 3": lambda **ids: LlamaConfig(**SIZES, rope_parameters=LLAMA_3, **ids),
    "mistral": lambda **ids: MistralConfig(**SIZES, sliding_window=6, **ids),
    "qwen2": lambda **ids: Qwen2Config(**SIZES, tie_word_embeddings=True, **ids),
    "qwen3": lambda **ids: Qwen3Config(**SIZES, head_dim=8, **ids),
    "gemma2": lambda **ids: Gemma2Config(**SIZES | HEADS, **ids),
    "gemma3": lambda **ids: Gemma3TextConfig(**SIZES | HEADS, layer_types=LAYERS, **ids),
    "gpt2": lambda **ids: GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **ids),
}
LLAMA_3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]  # each kind has frequencies of its own
TIED = {"llama tied", "qwen2", "gemma2", "gemma3", "gpt2"}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SHARDED = "sharded"  # in the name of a checkpoint: its weights lie in several files
# Sums in another order: a few units in the last place of numbers around one.
ROUNDING = dict(rtol=1e-5, atol=2e-5)

generator = torch.Generator().manual_seed(7)
TEXTS = [torch.randint(3, 65, (length,), generator=generator).tolist() for length in (11, 3, 8, 1)]


def make_library_model(cls, family: str, seed: int = 0, **config):
    """A random model of the library in memory; no weight is left at an initial zero or one that a loader could set."""
    tokenizer = tiny.make_tokenizer()
    ids = dict(vocab_size=len(tokenizer), pad_token_id=2, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(seed)
    model = cls.from_config(FAMILIES[family](**ids, **config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write(model, folder: Path) -> Path:
    """A checkpoint in the Hub's format, in several files where the folder's name says so."""
    model.save_pretrained(folder, max_shard_size="8KB" if SHARDED in folder.name else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == (SHARDED in folder.name)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_logits(model) -> list[torch.Tensor]:
    """Logits of the library's model, each text by itself."""
    return [model(torch.tensor([ids])).logits[0] for ids in TEXTS]


@torch.no_grad()
def logits_in_a_batch(policy) -> list[torch.Tensor]:
    """Logits as the scripts compute them: one batch, prompts padded on the left."""
    ids, mask = repo.pad(TEXTS, 2, "left")
    logits = policy(input_ids=ids, attention_mask=mask, position_ids=repo.positions(mask), use_cache=False).logits
    return [row[-len(text) :] for row, text in zip(logits, TEXTS, strict=True)]


def close(one, other, **tolerance):
    for ours, expected in zip(one, other, strict=True):
        torch.testing.assert_close(ours, expected, **(tolerance or ROUNDING))


def load_policy(folder: Path, mesh, dtype=torch.float32, master=torch.float32):
    policy = repo.load_pretrained(AutoModelForCausalLM, str(folder), master, "--model", False)
    return repo.shard(policy.eval(), mesh, dtype)


def check_buffers(policy, plain) -> int:
    """All buffers are those of the library's model, also the ones that no file holds. Returns how many these are."""
    ours, expected = dict(policy.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == expected.keys()
    for name, buffer in expected.items():
        assert torch.equal(ours[name], buffer), name
    return len(expected.keys() - plain.state_dict().keys())


def check_tie(policy, family: str) -> None:
    """A tied model has one parameter for both layers; another one has two."""
    tied = policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    assert tied == (family in TIED)
    assert ("lm_head.weight" in dict(policy.named_parameters())) == (family not in TIED)


# ---- Policies


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A checkpoint of each family, with the library's model it was written from: {family: (folder, model)}."""
    folder, made = tmp_path_factory.mktemp("policies"), {}
    for number, family in enumerate(FAMILIES):
        model = make_library_model(AutoModelForCausalLM, family, seed=number)
        model.generation_config.eos_token_id = [1, 20]
        made[family] = write(model, folder / f"{family} {SHARDED if number % 2 else ''}".strip()), model
    return made


def check_saved(folder: Path, source: Path, plain) -> None:
    """A saved policy has the names of the checkpoint it came from, and the library's model reads it."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(plain_logits(loaded.eval()), plain_logits(plain))  # sums depend on where tensors lie in memory
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in plain.state_dict().items())
    names = {name for file in source.glob("*.safetensors") for name in load_file(file)}
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == names
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert loaded.generation_config.eos_token_id == [1, 20]
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(plain).__name__]


@EVERY_FAMILY
def test_a_policy_computes_what_the_librarys_model_does(policies, processes, tmp_path, family):
    folder, plain = policies[family]
    policy = load_policy(folder, processes[1])
    close(logits_in_a_batch(policy), plain_logits(plain))
    # Rotary embeddings have frequencies, Gemma a scale of its embedding: neither lies in a file.
    assert check_buffers(policy, plain) == {"gpt2": 0, "gemma2": 3, "gemma3": 5}.get(family, 2)
    check_tie(policy, family)
    assert policy.generation_config.eos_token_id == [1, 20]
    repo.save_model(policy, tiny.make_tokenizer(), tmp_path / "model")
    check_saved(tmp_path / "model", folder, plain)


@EVERY_FAMILY
def test_computing_in_bfloat16(policies, processes, family):
    """As the library does it, with masters in float32 (a policy) and without (a reference)."""
    folder, _ = policies[family]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    expected = plain_logits(plain)
    for master in (torch.float32, torch.bfloat16):
        policy = load_policy(folder, processes[1], torch.bfloat16, master)
        assert {value.dtype for value in policy.parameters()} == {master}
        ours = logits_in_a_batch(policy)
        assert all(rows.dtype == torch.bfloat16 for rows in ours)
        # Padding changes the order of sums: the mean difference is a fraction of bfloat16's step, 2^-8, near one.
        difference = torch.cat([(a - b).float().abs() for a, b in zip(ours, expected, strict=True)])
        assert difference.mean() < 0.01 and difference.max() < 0.2
        check_buffers(policy, plain)


@pytest.mark.parametrize("form", ["bfloat16", "old rotary", "tied twice", "old gpt2"])
def test_other_forms_of_a_file(policies, processes, tmp_path, form):
    """Weights in half precision, and names that older versions of the library wrote beside or instead of today's."""
    _, plain = policies[{"tied twice": "llama tied", "old gpt2": "gpt2"}.get(form, "llama")]
    plain.save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    weights, expected = load_file(tmp_path / "model" / "model.safetensors"), plain_logits(plain)
    if form == "bfloat16":
        weights = {name: value.bfloat16() for name, value in weights.items()}
        rounded = make_library_model(AutoModelForCausalLM, "llama")
        rounded.load_state_dict({name: value.float() for name, value in weights.items()})
        expected = plain_logits(rounded)
        tiny.edit_json(tmp_path / "model" / "config.json", dtype="bfloat16")
    elif form == "old rotary":
        for layer in range(2):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    elif form == "tied twice":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    else:
        weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    policy = load_policy(tmp_path / "model", processes[1])
    assert all(value.dtype == torch.float32 for value in policy.parameters())
    close(logits_in_a_batch(policy), expected)
    repo.save_model(policy, tiny.make_tokenizer(), tmp_path / "saved")
    close(plain_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), expected)


# ---- Score models


def biased(model) -> bool:
    return model.score.bias is not None


@torch.no_grad()
def plain_scores(model) -> torch.Tensor:
    """Score of each text by itself, by the library's backbone: the last hidden state times the head, plus its bias."""
    last = [model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in TEXTS]
    weight = model.score.weight[0]
    bias = model.score.bias[0] if biased(model) else 0.0
    return torch.stack([(hidden * weight).sum() + bias for hidden in last])


@torch.no_grad()
def scores_in_a_batch(model) -> torch.Tensor:
    return repo.text_scores(model, *repo.pad(TEXTS, 2, "right"))


def load_scores(folder: Path, mesh, dtype=torch.float32, fresh_head=False):
    model = repo.load_score_model(str(folder), torch.float32, "--reward-model", 1, False, fresh_head)
    return repo.shard(model.eval(), mesh, dtype)


def check_saved_scores(folder: Path, plain, expected: torch.Tensor, mesh) -> None:
    """A saved score model is one of the library's classes, whatever it came from, with and without our code."""
    loaded, info = type(plain).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(plain_scores(loaded.eval()), expected)
    weights, config = load_file(folder / "model.safetensors"), AutoConfig.from_pretrained(folder)
    assert weights["score.weight"].shape == (1, WIDTH) and ("score.bias" in weights) == biased(plain)
    assert not any(part in name for name in weights for part in ("score_head", "normalizer"))
    assert config.architectures == [type(plain).__name__] and config.num_labels == 1
    close(scores_in_a_batch(load_scores(folder, mesh)), expected)


@pytest.mark.parametrize("files", ["single", SHARDED])
@pytest.mark.parametrize("kind", ["sequence", "token"])
@EVERY_FAMILY
def test_one_label_score_models(processes, tmp_path, family, kind, files):
    classes = dict(sequence=AutoModelForSequenceClassification, token=AutoModelForTokenClassification)
    if kind == "token" and family in ("gemma3", "gpt2"):
        pytest.skip("the library has no token classifier of this family with a head of that name")
    plain = make_library_model(classes[kind], family, seed=3, num_labels=1)
    folder = write(plain, tmp_path / files)
    expected = plain_scores(plain)
    assert expected.std() > 0.1 and biased(plain) == (kind == "token")
    model = load_scores(folder, processes[1])
    close(scores_in_a_batch(model), expected)
    check_buffers(model.model, plain)
    repo.save_model(model, tiny.make_tokenizer(), tmp_path / "model")
    check_saved_scores(tmp_path / "model", plain, expected, processes[1])


def make_beaver(folder: Path, plain, change=None, **config) -> Path:
    """A score model of Safe RLHF, with the names and settings that its own code writes, from a token classifier."""
    write(plain, folder)
    names = {"score.weight": "score_head.weight", "score.bias": "score_head.bias"}
    extra = {"normalizer.mean": torch.tensor([3.0]), "normalizer.var": torch.tensor([5.0])}
    extra["normalizer.count"] = torch.tensor(7)
    files = sorted(folder.glob("*.safetensors"))
    where = {}
    for file in files:
        weights = {names.get(name, name): value for name, value in load_file(file).items()}
        if file == files[-1]:
            weights |= extra
        if change:
            change(weights)
        save_file(weights, file, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file.name)
    if len(files) > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    settings = json.loads((folder / "config.json").read_text())
    for name in ("id2label", "label2id", "num_labels"):
        settings.pop(name, None)
    settings |= dict(architectures=["LlamaForScore"], bias=True, do_normalize=False, normalizer_type="ExponentialMean")
    settings |= dict(momentum=None, score_dim=1, score_type="reward", **config)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def beaver():
    """The token classifier whose weights the checkpoints of Safe RLHF below hold."""
    return make_library_model(AutoModelForTokenClassification, "llama", seed=5, num_labels=1)


@pytest.mark.parametrize("files", ["single", SHARDED])
def test_score_models_of_safe_rlhf(beaver, processes, tmp_path, files):
    folder = make_beaver(tmp_path / files, beaver)
    assert "score.bias" not in {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    expected = plain_scores(beaver)
    assert beaver.score.bias.abs() > 0.01 and expected.std() > 0.1
    for fresh_head in (False, True):  # as a frozen model, and as the start of a critic or of training
        model = load_scores(folder, processes[1], fresh_head=fresh_head)
        close(scores_in_a_batch(model), expected)
    repo.save_model(model, tiny.make_tokenizer(), tmp_path / "model")
    check_saved_scores(tmp_path / "model", beaver, expected, processes[1])


def test_an_older_name_of_safe_rlhfs_class(beaver, processes, tmp_path):
    folder = make_beaver(tmp_path / "old", beaver)
    tiny.edit_json(folder / "config.json", architectures=["LlamaModelForScore"])
    close(scores_in_a_batch(load_scores(folder, processes[1])), plain_scores(beaver))


def test_scores_that_would_be_normalised_are_refused(refused, beaver, tmp_path):
    folder = make_beaver(tmp_path / "normalised", beaver, do_normalize=True)
    refused(repo, "--reward-model", "do_normalize", reward_model=folder)


def test_training_goes_on_from_a_score_model_of_safe_rlhf(run, beaver, processes, tmp_path):
    """A learning rate near zero leaves its scores; what is written is a score model of the library's, with the bias."""
    folder = make_beaver(tmp_path / SHARDED, beaver)
    flags = dict(model=folder, learning_rate=1e-12, weight_decay=0)
    outcome = run(preference_models, output_dir=tmp_path / "run", **flags)
    assert outcome.code == 0, outcome.err
    check_saved_scores(tmp_path / "run" / "model", beaver, plain_scores(beaver), processes[1])
    # And one that is not near zero moves the bias along.
    outcome = run(preference_models, kind="cost", output_dir=tmp_path / "moved", model=folder, dataset_split="train")
    assert outcome.code == 0, outcome.err
    bias = load_file(tmp_path / "moved" / "model" / "model.safetensors")["score.bias"]
    assert 1e-5 < (bias - beaver.score.bias).abs() < 0.1


def test_a_run_with_score_models_of_safe_rlhf(run, beaver, tmp_path):
    """As reward model, as cost model, as critics: the figures are those of the same model in the library's format."""
    names = ("reward_model", "cost_model", "reward_critic", "cost_critic")
    summaries = []
    for name, folder in (
        ("theirs", make_beaver(tmp_path / SHARDED, beaver)),
        ("ours", write(beaver, tmp_path / "plain")),
    ):
        outcome = run(repo, output_dir=tmp_path / name, total_episodes=16, **dict.fromkeys(names, folder))
        assert outcome.code == 0, outcome.err
        summary = read_summary(tmp_path / name)
        summaries.append((summary["before"], read_lines(tmp_path / name / "metrics.jsonl")[0]["reward_value_loss"]))
    assert summaries[0] == summaries[1]


# ---- Mistakes


@pytest.fixture
def refused(run, tmp_path):
    """refused(script, *parts, **flags): one line with all the parts, status 2, and nothing is written."""

    def refused(script, *parts, **flags):
        outcome = run(script, output_dir=tmp_path / "out", **flags)
        assert outcome.code == 2, outcome
        assert len(outcome.err.splitlines()) == len(outcome.errors) == 1, outcome.err
        for part in parts:
            assert str(part) in outcome.err, f"{part!r} is not in: {outcome.err}"
        assert not (tmp_path / "out").exists()

    return refused


def drop(*names):
    return lambda weights: [weights.pop(name, None) for name in names]


def replace(name, value):
    return lambda weights: weights.update({name: value}) if name in weights else None


FAULTS = {
    "no bias": (drop("score_head.bias"), "missing ['score.bias']"),
    "no head": (drop("score_head.weight", "score_head.bias"), "missing ['score.bias', 'score.weight']"),
    "no layer": (drop("model.layers.1.mlp.up_proj.weight"), "missing ['model.layers.1.mlp.up_proj.weight']"),
    "more": (lambda weights: weights.update({"extra.weight": torch.zeros(2)}), "unexpected ['extra.weight']"),
    "two scores": (replace("score_head.weight", torch.zeros(2, WIDTH)), "of another shape ['score"),
    "narrow": (replace("model.norm.weight", torch.zeros(WIDTH - 1)), "of another shape ['model.norm.weight']"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_weight_of_a_score_model_of_safe_rlhf_counts(refused, beaver, tmp_path, fault):
    change, part = FAULTS[fault]
    single = make_beaver(tmp_path / "single", beaver, change)
    refused(repo, f"--reward-model {single}", part, reward_model=single)
    sharded = make_beaver(tmp_path / SHARDED, beaver, change)
    refused(repo, f"--cost-critic {sharded}", part, cost_critic=sharded)
    refused(preference_models, f"--model {sharded}", part, model=sharded)


@pytest.mark.parametrize("fault", ["truncated", "absent"])
@pytest.mark.parametrize("flag", ["model", "reward_model", "cost_critic"])
def test_a_file_of_a_sharded_checkpoint(refused, policies, beaver, tmp_path, flag, fault):
    source = policies["llama tied"][0] if flag == "model" else make_beaver(tmp_path / SHARDED, beaver)
    folder = tiny.copy_model(source, tmp_path / "faulty")
    file = sorted(folder.glob("*.safetensors"))[1]
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    refused(repo, f"--{flag.replace('_', '-')} {folder} cannot be loaded", **{flag: folder})


def test_a_score_model_in_a_pickle(refused, beaver, tmp_path):
    """Also where the pickle lies in several files, and beside nothing else."""
    folder = make_beaver(tmp_path / "pickle", beaver)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(repo, f"--reward-model {folder} cannot be loaded", "safetensors", reward_model=folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"score_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(repo, f"--cost-model {folder} cannot be loaded", cost_model=folder)


def test_an_encoder_scores_no_tokens(refused, tmp_path):
    sizes = {name: value for name, value in SIZES.items() if "key_value" not in name}
    config = BertConfig(vocab_size=len(tiny.make_tokenizer()), num_labels=1, pad_token_id=2, **sizes)
    folder = write(AutoModelForSequenceClassification.from_config(config), tmp_path / "encoder")
    part = "BertForSequenceClassification, whose head scores no tokens"
    refused(repo, f"--reward-model {folder}", part, reward_model=folder)
    refused(repo, f"--reward-critic {folder}", part, reward_critic=folder)
    refused(preference_models, f"--model {folder}", part, model=folder)


def test_two_labels_in_several_files(refused, tmp_path):
    plain = make_library_model(AutoModelForSequenceClassification, "qwen2", num_labels=2)
    folder = write(plain, tmp_path / SHARDED)
    refused(repo, f"--cost-model {folder} has 2 labels", cost_model=folder)


# ---- Tokenizers of chats


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}> {{ message['content'] | trim }} <end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_chat_tokenizer(template: str | None = TEMPLATE):
    """One that puts BOS before every text by itself, as Llama's do, has no pad token, and has a chat template."""
    tokenizer = tiny.make_tokenizer(pad=False)
    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "additional_special_tokens": ["<user>", "<assistant>", "<end>"]}
    )
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.chat_template = template
    return tokenizer


def make_chat_model(folder: Path, kind: str = "policy", seed: int = 0, **changes) -> Path:
    """As people have them: tied weights, no pad token, and a second EOS that only generation_config.json knows."""
    tokenizer = make_chat_tokenizer()
    tiny.make_model(folder, kind, seed, tokenizer, tie_word_embeddings=kind == "policy", **changes)
    if kind == "policy":
        end = tokenizer.convert_tokens_to_ids("<end>")
        tiny.edit_json(folder / "generation_config.json", eos_token_id=[tokenizer.eos_token_id, end])
    return folder


def test_prompts_in_the_chat_template(tmp_path):
    make_chat_tokenizer().save_pretrained(tmp_path)
    tokenizer, prompts = repo.load_tokenizer(str(tmp_path), False), ["ba pi?", " ke sa le "]
    encoded = repo.encode_prompts(tokenizer, "chat", prompts, "")
    plain, vocabulary = AutoTokenizer.from_pretrained(tmp_path), tokenizer.get_vocab()
    for prompt, ids in zip(prompts, encoded, strict=True):
        turn = [{"role": "user", "content": prompt}]
        expected = plain.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert ids == expected and ids.count(plain.bos_token_id) == 1
    assert encoded[0] == [vocabulary[token] for token in ("<bos>", "<user>", "ba", "pi", "?", "<end>", "<assistant>")]
    scored = repo.encode_scored(tokenizer, prompts, ["mu", "ra ."], "chat", 64)
    assert scored[0] == [*encoded[0], vocabulary["mu"], vocabulary["<eos>"]]
    assert scored[1] == [*encoded[1], vocabulary["ra"], vocabulary["."], vocabulary["<eos>"]]
    # A template of one's own gets the BOS that the tokenizer puts before every text.
    own = repo.encode_prompts(tokenizer, "ba {prompt}", ["pi"], "")
    assert own == [[vocabulary[token] for token in ("<bos>", "ba", "pi")]]


def test_a_chat_template_that_is_not_there(refused, files, tmp_path):
    refused(repo, files.policy, "has no chat template", prompt_template="chat")
    refused(preference_models, files.policy, "has no chat template", prompt_template="chat")
    chat = make_chat_model(tmp_path / "policy")
    refused(repo, files.reward, "has no chat template", model=chat, prompt_template="chat")
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "chat_template.jinja").unlink(missing_ok=True)
    settings["chat_template"] = "{{ raise_exception('no answers today') }}"
    (chat / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(repo, chat, "its chat template fails: no answers today", model=chat, prompt_template="chat")


def test_a_run_of_a_chat_model(run, processes, tmp_path):
    """Responses end at whichever EOS comes first; score models read the same tokens, and what is saved is as before."""
    names = dict(reward_model="score", cost_model="biased_score")
    flags = {name: make_chat_model(tmp_path / name, kind, seed) for seed, (name, kind) in enumerate(names.items(), 1)}
    flags["model"] = make_chat_model(tmp_path / "policy")
    seen, original = [], repo.sample_responses

    def sample_responses(*args, **settings):
        seen.append((args[2], original(*args, **settings)))
        return seen[-1][1]

    with changed(repo, sample_responses=sample_responses):
        outcome = run(repo, output_dir=tmp_path / "run", total_episodes=16, prompt_template="chat", **flags)
    assert outcome.code == 0, outcome.err
    tokenizer = make_chat_tokenizer()
    end, assistant = tokenizer.convert_tokens_to_ids(["<end>", "<assistant>"])
    ends = []
    for prompts, responses in seen:
        assert all(ids[0] == tokenizer.bos_token_id and ids[-1] == assistant for ids in prompts)
        length = responses.response_mask.shape[1]
        for tokens, kept in zip(responses.sequences[:, -length:].tolist(), responses.response_mask.sum(1), strict=True):
            stops = [place for place, token in enumerate(tokens) if token in (tokenizer.eos_token_id, end)]
            assert kept == (stops[0] + 1 if stops else length)
            ends += [tokens[stops[0]]] if stops else []
    assert {tokenizer.eos_token_id, end} == set(ends)
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    scorer = AutoModelForTokenClassification.from_pretrained(flags["cost_model"]).eval()
    for row, prompt, tokens, mask in zip(
        rows, seen[0][0], seen[0][1].sequences, seen[0][1].attention_mask, strict=False
    ):
        ids = tokens[mask.bool()]
        assert ids.tolist()[: len(prompt)] == prompt
        with torch.no_grad():
            expected = scorer(ids[None]).logits[0, -1, 0].item()
        assert row["cost"] == pytest.approx(expected, abs=1e-4)
    saved = tmp_path / "run" / "model"
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [1, end]
    assert AutoTokenizer.from_pretrained(saved).chat_template == TEMPLATE
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


# ---- Two processes: the second one builds every model without its weights


def main(folder: Path) -> None:
    """What each of two processes of torchrun does, with all checkpoints that the test has written."""
    _, mesh = repo.start_processes()
    repo.is_small = lambda model: False
    rank, calls = dist.get_rank(), []
    for cls in (AutoModelForCausalLM, AutoModelForTokenClassification, AutoModelForSequenceClassification):
        original = cls.from_pretrained
        cls.from_pretrained = lambda *args, original=original, **settings: (
            calls.append(args[0]),
            original(*args, **settings),
        )[1]
    result = {}
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            loaded = repo.load_pretrained(AutoModelForCausalLM, str(folder / family), torch.float32, "", False)
            assert all(value.is_meta == (rank == 1) for value in loaded.parameters()), family
            policy = repo.shard(loaded.eval(), mesh, dtype)
            assert not any(value.full_tensor().is_meta for value in policy.parameters())
            assert all(value.to_local().numel() < value.numel() for value in policy.parameters() if value.shape[0] > 1)
            check_tie(policy, family)
            result[family, str(dtype)] = {
                "logits": logits_in_a_batch(policy),
                "buffers": {name: buffer.clone() for name, buffer in policy.named_buffers()},
                "eos": policy.generation_config.eos_token_id,
                "parameters": [name for name, _ in policy.named_parameters()],
            }
        repo.save_model(policy, tiny.make_tokenizer(), folder / "saved" / family)
    for name in ("sequence", "token", "beaver"):
        model = load_scores(folder / name, mesh)
        result[name] = scores_in_a_batch(model)
        repo.save_model(model, tiny.make_tokenizer(), folder / "saved" / name)
    result["calls"] = len(calls)
    torch.save(result, folder / f"rank{rank}.pt")
    repo.shut_down()


def test_two_processes(policies, beaver, processes, tmp_path):
    for family, (source, _) in policies.items():
        tiny.copy_model(source, tmp_path / family)
    scorers = {"token": beaver, "beaver": beaver}
    scorers["sequence"] = make_library_model(AutoModelForSequenceClassification, "gemma2", seed=3, num_labels=1)
    write(scorers["sequence"], tmp_path / "sequence")
    write(beaver, tmp_path / "token")
    make_beaver(tmp_path / "beaver", beaver)
    (tmp_path / "saved").mkdir()
    outcome = finish(start([__file__, tmp_path], processes=2, python_path=ROOT))
    assert outcome.code == 0, outcome.err
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [result["calls"] for result in ranks] == [2 * len(FAMILIES) + 3, 0]
    for family, (source, plain) in policies.items():
        half = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
        expected = {"torch.float32": plain_logits(plain), "torch.bfloat16": plain_logits(half)}
        for result in ranks:
            for dtype, logits in expected.items():
                found = result[family, dtype]
                tolerance = dict(rtol=0, atol=0.2) if dtype == "torch.bfloat16" else ROUNDING
                close(found["logits"], logits, **tolerance)
                buffers = dict(plain.named_buffers())
                assert found["buffers"].keys() == buffers.keys()
                assert all(torch.equal(found["buffers"][name], buffer) for name, buffer in buffers.items())
                assert found["eos"] == [1, 20]
                assert found["parameters"] == [name for name, _ in plain.named_parameters()]
        check_saved(tmp_path / "saved" / family, source, plain)
    for name, plain in scorers.items():
        for result in ranks:
            close(result[name], plain_scores(plain))
        check_saved_scores(tmp_path / "saved" / name, plain, plain_scores(plain), processes[1])


def test_the_files_of_a_checkpoint_stay_as_they_are(policies, processes, tmp_path):
    """Loading, sharding and saving write nothing into the folder that a checkpoint lies in."""
    folder, _ = policies["qwen2"]
    before = contents(folder)
    repo.save_model(load_policy(folder, processes[1]), tiny.make_tokenizer(), tmp_path / "model")
    assert contents(folder) == before


if __name__ == "__main__":
    main(Path(sys.argv[1]))
