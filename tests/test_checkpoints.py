"""Checkpoints as people have them: families of models, files in parts, Safe RLHF's score models, tokenizers of chats.

What the scripts compute is held to the library's own model, from which the file was written, and to a head by hand."""

import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import transformers
from helpers import SCRIPTS, load_policy, load_scores, read_back, read_json, read_lines, read_summary, recorded_updates
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

import ppo_lagrange
import preference_models
import repo
import sacpo

WIDTH = 16
PLAIN = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
SIZES = dict(PLAIN, intermediate_size=32, num_key_value_heads=1, initializer_range=0.3)
HEADS = dict(SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6)  # texts below are longer than the window
ROPE = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LAYERS = ["sliding_attention", "full_attention"]  # each kind has frequencies of its own
FAMILIES = {  # class of the configuration and its settings; a star stands for tied weights
    "llama": ("Llama", SIZES),
    "llama*": ("Llama", dict(SIZES, tie_word_embeddings=True)),
    "llama 3": ("Llama", dict(SIZES, rope_parameters=dict(ROPE, original_max_position_embeddings=16))),
    "mistral": ("Mistral", dict(SIZES, sliding_window=6)),
    "mixtral": ("Mixtral", dict(SIZES, num_local_experts=3, num_experts_per_tok=2)),
    "qwen2*": ("Qwen2", dict(SIZES, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(SIZES, head_dim=8)),
    "gemma2*": ("Gemma2", HEADS),
    "gemma3*": ("Gemma3Text", dict(HEADS, layer_types=LAYERS)),
    "gpt2*": ("GPT2", dict(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)),
    "gpt_neox": ("GPTNeoX", dict(PLAIN, intermediate_size=32, initializer_range=0.3)),
    "opt*": ("OPT", dict(PLAIN, ffn_dim=32, word_embed_proj_dim=WIDTH, init_std=0.3)),
}
LETTERS = dict(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
DROPOUT = {  # dropout by default, by functions or modules, under several names
    "OPT": ("OPT", dict(PLAIN, ffn_dim=32, word_embed_proj_dim=WIDTH, init_std=0.3)),
    "XGLM": ("XGLM", dict(d_model=WIDTH, num_layers=2, attention_heads=2, ffn_dim=32, init_std=0.3)),
    "BioGPT": ("BioGpt", dict(PLAIN, intermediate_size=32, initializer_range=0.3)),
    "Falcon": ("Falcon", dict(PLAIN, hidden_dropout=0.1, attention_dropout=0.1, initializer_range=0.3)),
    "BLOOM": ("Bloom", dict(hidden_size=WIDTH, n_layer=2, n_head=2, hidden_dropout=0.1, attention_dropout=0.1)),
    "GPT-BigCode": ("GPTBigCode", LETTERS),
}
OTHERS = {"jitter": ("Mixtral", dict(SIZES, router_jitter_noise=0.1)), "bias": ("GPTJ", dict(LETTERS, rotary_dim=4))}
BIASED = [family for family in FAMILIES if family not in ("gemma3*", "gpt2*", "gpt_neox", "opt*")]  # by the library
CLASSES = dict(sequence=AutoModelForSequenceClassification, token=AutoModelForTokenClassification)
PARTS = "parts"  # in the name of a checkpoint: its weights lie in several files

generator = torch.Generator().manual_seed(7)
TEXTS = [torch.randint(3, 65, (length,), generator=generator).tolist() for length in (11, 3, 8, 1)]
TOKENIZER = tiny.make_tokenizer()
TOKENIZER.end_id = TOKENIZER.eos_token_id


def make_library_model(cls, family: str, seed: int = 0, **config):
    """A random model of the library in memory; no weight is left at an initial zero or one that a loader could set."""
    name, settings = (FAMILIES | DROPOUT | OTHERS)[family]
    ids = dict(vocab_size=len(TOKENIZER), pad_token_id=2, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**settings, **ids, **config)
    model = cls.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write(model, folder: Path) -> Path:
    """A checkpoint in the Hub's format, in several files where the folder's name says so."""
    model.save_pretrained(folder, max_shard_size="8KB" if PARTS in folder.name else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == (PARTS in folder.name)
    TOKENIZER.save_pretrained(folder)
    return folder


def close(one, other):
    """Sums in another order: a few units in the last place of numbers around one."""
    for ours, expected in zip(one, other, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def plain_logprobs(model) -> list[torch.Tensor]:
    """Log-probabilities of all tokens but the first by the library's model, each text by itself."""
    logits = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in TEXTS]
    return [rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for rows, ids in zip(logits, TEXTS, strict=True)]


@torch.no_grad()
def logprobs_in_a_batch(policy) -> list[torch.Tensor]:
    """The same as the scripts compute them, in one batch of texts that are padded on the left."""
    ids, mask = repo.pad(TOKENIZER, TEXTS, "left", "cpu")
    logprobs = repo.response_logprobs(policy, ids, mask, ids.shape[1] - 1, 1.0)
    return [row[len(row) - len(text) + 1 :] for row, text in zip(logprobs, TEXTS, strict=True)]


class Inverse(transformers.LogitsProcessor):
    """For the library's `generate`: leaves only the token where the distribution function reaches uniforms[row, t]."""

    def __init__(self, uniforms: torch.Tensor, prompt_length: int, temperature: float):
        self.uniforms, self.prompt_length, self.temperature = uniforms, prompt_length, temperature

    def __call__(self, input_ids, scores):
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        points = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None].double() * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def check_policy(policy, plain, family: str) -> None:
    """It computes and samples what the library's model does; ties and buffers are those of the library's model."""
    close(logprobs_in_a_batch(policy), plain_logprobs(plain))
    uniforms = torch.rand(len(TEXTS), 12, generator=torch.Generator().manual_seed(0))
    ids, mask = repo.pad(TOKENIZER, TEXTS, "left", "cpu")
    options = dict(do_sample=False, max_new_tokens=12, pad_token_id=2, eos_token_id=[1, 20], attention_mask=mask)
    expected = plain.generate(ids, logits_processor=[Inverse(uniforms, ids.shape[1], 0.8)], **options)
    assert torch.equal(repo.sample_responses(policy, TOKENIZER, TEXTS, uniforms, 0.8).sequences, expected)
    tied = policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    assert tied == family.endswith("*")
    buffers = dict(plain.named_buffers())  # rotary frequencies, Gemma's scale of its embedding: in no file
    assert dict(policy.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in policy.named_buffers())
    assert policy.get_input_embeddings().padding_idx is None  # or its row would never be trained


def check_saved(folder: Path, source: Path, plain) -> None:
    """A saved policy has the names of the checkpoint it came from, and the library's model reads it."""
    loaded, weights = read_back(AutoModelForCausalLM, folder), load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert weights.keys() == {name for file in source.glob("*.safetensors") for name in load_file(file)}
    assert loaded.generation_config.eos_token_id == [1, 20]
    assert read_json(folder / "config.json")["architectures"] == [type(plain).__name__]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A checkpoint of each family, with the library's model it was written from: {family: (folder, model)}."""
    folder, made = tmp_path_factory.mktemp("policies"), {}
    for number, family in enumerate(FAMILIES):
        model = make_library_model(AutoModelForCausalLM, family, seed=number)
        model.generation_config.eos_token_id = [1, 20]
        made[family] = write(model, folder / f"{number} {PARTS if number % 2 else ''}".strip()), model
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_computes_and_samples_what_the_librarys_model_does(policies, processes, tmp_path, family):
    folder, plain = policies[family]
    policy = load_policy(folder, processes)
    check_policy(policy, plain, family)
    repo.save_model(policy, TOKENIZER, tmp_path / "model")
    check_saved(tmp_path / "model", folder, plain)
    # In bfloat16 padding changes the order of sums: the mean difference is a fraction of its step, 2^-8, near one.
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = torch.cat(logprobs_in_a_batch(load_policy(folder, processes, torch.bfloat16)))
    difference = (ours - torch.cat(plain_logprobs(plain)).float()).abs()
    assert difference.mean() < 0.03 and difference.max() < 0.3


@pytest.mark.parametrize("family", DROPOUT)
def test_there_is_no_dropout(run, tmp_path, family):
    """Before the first step policy and reference are one: a KL divergence of 0, and ln 2 as DPO's loss."""
    folder = write(make_library_model(AutoModelForCausalLM, family), tmp_path / "model")
    assert any("drop" in name and value == 0.1 for name, value in read_json(folder / "config.json").items())
    assert run(sacpo, model=folder, output_dir=tmp_path / "sacpo", stages="safe").code == 0
    first = read_lines(tmp_path / "sacpo" / "metrics.jsonl")[0]
    expected = dict(loss=math.log(2), chosen_log_ratio=0, rejected_log_ratio=0)
    assert {name: first[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    for script in (repo, ppo_lagrange):
        flags = dict(output_dir=tmp_path / script.__name__, total_episodes=16, max_new_tokens=8, eval_size=2)
        assert run(script, model=folder, **flags).code == 0
        assert abs(read_lines(tmp_path / script.__name__ / "metrics.jsonl")[0]["kl"]) < 1e-6


def test_a_model_that_reads_differently_in_training_is_refused(run, tmp_path):
    folder = write(make_library_model(AutoModelForCausalLM, "jitter"), tmp_path / "model")
    for script in SCRIPTS.values():
        outcome = run(script, model=folder, output_dir=tmp_path / "run")
        assert outcome.code == 2 and f"--model {folder} reads a text differently in training" in outcome.errors[0]


@pytest.mark.parametrize("script", [repo, sacpo])
def test_a_pad_token_that_is_impossible(run, tmp_path, script):
    """A bias of -inf for it: updates are those of a bias so low that its probability is zero, too."""
    source, recorded = write(make_library_model(AutoModelForCausalLM, "bias"), tmp_path / "model"), []
    rows = [{"prompt": row["prompt"], "response": row["response_1"]} for row in tiny.make_pairs(16)]
    more = dict(ptx_dataset=tiny.write_rows(tmp_path / "ptx.jsonl", rows)) if script is repo else {}
    for name, bias in (("low", -1e30), ("none", -math.inf)):
        folder = tiny.copy_model(source, tmp_path / name, lambda weights: weights["lm_head.bias"][2].fill_(bias))  # noqa: B023
        with recorded_updates() as updates:
            assert run(script, model=folder, output_dir=tmp_path / f"{name} run", **more).code == 0
        assert read_summary(tmp_path / f"{name} run")["skipped_updates"] == 0
        recorded.append([gradients for _, gradients in updates])
    for one, other in zip(*recorded, strict=True):
        assert all(map(torch.equal, one, other)) and all(gradient.isfinite().all() for gradient in other)


@torch.no_grad()
def plain_scores(model) -> torch.Tensor:
    """Score of each text by itself, by the library's backbone: the last hidden state times the head, plus its bias."""
    last = [model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in TEXTS]
    bias = 0.0 if model.score.bias is None else model.score.bias[0]
    return torch.stack([(hidden * model.score.weight[0]).sum() + bias for hidden in last])


@torch.no_grad()
def scores_in_a_batch(model) -> torch.Tensor:
    """Scores of padded texts, the same with padding on either side."""
    left, right = (repo.text_scores(model, *repo.pad(TOKENIZER, TEXTS, side, "cpu")) for side in ("left", "right"))
    close(left, right)
    return right


def check_saved_scores(folder: Path, plain, processes) -> None:
    """A saved score model is one of the library's classes, whatever it came from, with and without our code."""
    close(plain_scores(read_back(type(plain), folder)), plain_scores(plain))
    close(scores_in_a_batch(load_scores(folder, processes)), plain_scores(plain))
    assert read_json(folder / "config.json")["architectures"] == [type(plain).__name__]


@pytest.mark.parametrize("family, kind", [(f, "sequence") for f in FAMILIES] + [(f, "token") for f in BIASED])
def test_one_label_score_models(processes, tmp_path, family, kind):
    plain = make_library_model(CLASSES[kind], family, seed=3, num_labels=1)
    assert plain_scores(plain).std() > 0.1 and (plain.score.bias is not None) == (kind == "token")
    model = load_scores(write(plain, tmp_path / (PARTS if kind == "token" else "single")), processes)
    close(scores_in_a_batch(model), plain_scores(plain))
    repo.save_model(model, TOKENIZER, tmp_path / "model")
    check_saved_scores(tmp_path / "model", plain, processes)


def make_beaver(folder: Path, plain) -> Path:
    """A score model of Safe RLHF, with the names and settings that its own code writes, from a token classifier."""
    write(plain, folder)
    names = {"score.weight": "score_head.weight", "score.bias": "score_head.bias"}
    where, files = {}, sorted(folder.glob("*.safetensors"))
    for file in files:
        weights = {names.get(name, name): value for name, value in load_file(file).items()}
        if file == files[-1]:
            weights |= {"normalizer.mean": torch.tensor([3.0]), "normalizer.count": torch.tensor(7)}
        save_file(weights, file, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file.name)
    if len(files) > 1:
        tiny.edit_json(folder / "model.safetensors.index.json", weight_map=where)
    settings = {name: value for name, value in read_json(folder / "config.json").items() if "label" not in name}
    settings |= dict(architectures=["LlamaForScore"], bias=True, do_normalize=False, score_dim=1, score_type="reward")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def beaver():
    """The token classifier whose weights the checkpoints of Safe RLHF below hold."""
    return make_library_model(AutoModelForTokenClassification, "llama", seed=5, num_labels=1)


@pytest.mark.parametrize("where", ["single", PARTS])
def test_score_models_of_safe_rlhf(run, beaver, processes, tmp_path, where):
    """As frozen models, and as the start of a critic or of training, which goes on from them and keeps the bias."""
    folder = make_beaver(tmp_path / where, beaver)
    for options in (dict(), dict(head_seed=1)):
        close(scores_in_a_batch(load_scores(folder, processes, **options)), plain_scores(beaver))
    flags = dict(kind="cost", model=folder)
    assert run(preference_models, output_dir=tmp_path / "moved", **flags).code == 0
    bias = read_back(AutoModelForTokenClassification, tmp_path / "moved" / "model").score.bias
    assert 1e-5 < (bias - beaver.score.bias).abs() < 0.1
    assert run(preference_models, output_dir=tmp_path / "run", learning_rate=1e-12, weight_decay=0, **flags).code == 0
    check_saved_scores(tmp_path / "run" / "model", beaver, processes)
    tiny.edit_json(folder / "config.json", architectures=["LlamaModelForScore"])  # an older name
    close(scores_in_a_batch(load_scores(folder, processes)), plain_scores(beaver))


def test_prompts_in_the_chat_template_and_in_ones_own(tmp_path):
    """A tokenizer that puts BOS before every text by itself: one BOS, whoever writes it, and the end of the turn."""
    plain = tiny.make_chat_tokenizer()
    plain.save_pretrained(tmp_path)
    tiny.make_config(plain).save_pretrained(tmp_path)
    ids = plain.get_vocab()
    tokenizer = repo.load_tokenizer(str(tmp_path), "--model", "chat")
    head = [ids[token] for token in ("<bos>", "<user>", "ke", "sa", "<end>", "<assistant>")]
    assert repo.encode(tokenizer, [" ke sa "], ["ra ."]) == [[*head, ids["ra"], ids["."], ids["<end>"]]]
    for template in ("ba {prompt}", "<bos> ba {prompt}", "<bos>ba {prompt}"):
        tokenizer = repo.load_tokenizer(str(tmp_path), "--model", template)
        assert repo.encode(tokenizer, ["pi"]) == [[ids["<bos>"], ids["ba"], ids["pi"]]]
        assert repo.encode(tokenizer, ["pi"], [" ke"])[0][2:] == [ids["pi"], ids["ke"], ids["<eos>"]]
    # No end of a turn in the template: EOS. A template that is missing or fails is told of.
    for template, end in ((tiny.TEMPLATE.replace(" <end>", " "), "<eos>"), (None, None), ("{{ missing.x.y }}", None)):
        plain.chat_template = template
        plain.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").unlink() if template is None else None
        if end:
            assert repo.load_tokenizer(str(tmp_path), "--model", "chat").end_id == ids[end]
        else:
            with pytest.raises(repo.UserError, match=r"--model .* (template|undefined)"):
                repo.load_tokenizer(str(tmp_path), "--model", "chat")


def main(folder: Path) -> None:
    """What each of two processes does, with all checkpoints that the test has written."""
    processes, scores = repo.start_processes(), {}
    for family, (source, plain) in torch.load(folder / "policies.pt", weights_only=False).items():
        policy = load_policy(source, processes)
        assert all(value.to_local().numel() < value.numel() for value in policy.parameters() if len(value) > 1)
        check_policy(policy, plain, family)
        repo.save_model(policy, TOKENIZER, folder / family)
    for name in ("sequence", "beaver"):
        model = load_scores(folder / name, processes)
        scores[name] = scores_in_a_batch(model)
        repo.save_model(model, TOKENIZER, folder / f"{name} again")
    torch.save(scores, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(forks, policies, beaver, processes, tmp_path):
    torch.save(policies, tmp_path / "policies.pt")
    scorers = {"sequence": make_library_model(AutoModelForSequenceClassification, "gemma2*", seed=3, num_labels=1)}
    write(scorers["sequence"], tmp_path / "sequence")
    scorers["beaver"] = beaver
    make_beaver(tmp_path / "beaver", beaver)
    for outcome in forks.start([__file__, tmp_path], 2).finish():
        assert outcome.code == 0, outcome.err
    for family, (source, plain) in policies.items():
        check_saved(tmp_path / family, source, plain)
    for name, plain in scorers.items():
        for rank in (0, 1):
            close(torch.load(tmp_path / f"rank{rank}.pt")[name], plain_scores(plain))
        check_saved_scores(tmp_path / f"{name} again", plain, processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
