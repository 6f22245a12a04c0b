"""Data as people have them: files, folders and slices; every format for every use; what is dropped, cut and said."""

import contextlib
import functools
import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pytest
import tiny
from helpers import SCRIPTS, changed, read_lines

import preference_models
import repo
import sacpo

TOKENIZER = tiny.make_tokenizer()
PAIRS = [row | {"harm": {"Violence": False}, "level": 0} for row in tiny.make_pairs(20, seed=5)]
ERRORS = tuple(script.UserError for script in SCRIPTS.values())


def write_card(folder: Path, **files: str) -> None:
    """A card as the Hub has them: configurations and the files of their splits train and test."""
    rows = [f"{{config_name: {name}, data_files: [{text}]}}" for name, text in files.items()]
    (folder / "README.md").write_text("---\nconfigs:\n- " + "\n- ".join(rows) + "\n---\n")


@pytest.fixture(scope="module")
def tokenizers(files, processes, tmp_path_factory):
    """tokenizers(template): as the scripts load one, the chat template's with roles and an end of a turn."""
    chat = tiny.make_model(tmp_path_factory.mktemp("chat"), tokenizer=tiny.make_chat_tokenizer())

    @functools.cache
    def get(template="{prompt}"):
        return repo.load_tokenizer(str(chat if template == "chat" else files.policy), "--model", template)

    return get


def load(use: str, name, tokenizer, split="train", flag="--dataset", limits=(64, 96), **flags) -> list[dict]:
    """Examples for a use: prompts, supervised, reward, cost, or a preference and a loss of SACPO."""
    if use in ("reward", "cost"):
        args = preference_models.Args(kind=use, max_length=limits[1], **flags)
        return preference_models.load_pairs(args, str(name), split, flag, tokenizer)
    if use not in ("prompts", "supervised"):
        args = sacpo.Args(max_prompt_length=limits[0], max_length=limits[1], **flags)
        return sacpo.load_pairs(args, str(name), split, flag, *use.split(), tokenizer, {})
    counts = (1,) if use == "supervised" else ()
    return repo.load_examples(repo.Args(**flags), str(name), split, flag, tokenizer, limits, counts)


def make_data(folder: Path, form: str) -> Path:
    """15 rows of training data and five of test data, or the training data alone, in the form."""
    train, test = PAIRS[:15], PAIRS[15:]
    if form == "repository":  # as on the Hub: a card with configurations, and Parquet files by split, in parts
        for name, rows in {"train-0": train[:7], "train-1": train[7:], "test-0": test, "alpaca-7b": test}.items():
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
        both = "{split: train, path: train-*}, {split: test, path: test-*}"
        write_card(folder, default=both, alpaca="{split: train, path: alpaca-7b.parquet}")
    elif form in ("gz", "xz"):  # the older layout of PKU-SafeRLHF: by split in folders, and no card
        pack = {"gz": gzip, "xz": lzma}[form].compress
        for name, rows in {"round0/train": train[:7], "round1/train": train[7:], "round0/test": test}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / f"{name}.jsonl.{form}").write_bytes(pack("".join(json.dumps(r) + "\n" for r in rows).encode()))
    elif form == "one gz":
        (folder / "some.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, train)).encode()))
        return folder / "some.jsonl.gz"
    else:
        return tiny.write_rows(folder / f"some.{form}", train)
    return folder


SLICES = {"train[:10]": slice(10), "train[-4:]": slice(-4, None), "train[20%:]": slice(3, None), "train": slice(None)}


@pytest.mark.parametrize("form", ["repository", "parquet", "jsonl", "json", "csv", "one gz", "gz", "xz"])
def test_forms_of_data_and_slices_of_a_split(tokenizers, tmp_path, capsys, form):
    """A file by itself is whatever split is asked for. Columns that nobody asks for may hold what they like."""
    name = make_data(tmp_path, form)
    for split, chosen in SLICES.items():
        expected = [row["prompt"] for row in PAIRS[:15][chosen]]
        assert [pair["prompt"] for pair in load("cost", name, tokenizers(), split)] == expected
        if name.is_file():
            examples = load("prompts", name, tokenizers(), split.replace("train", "test"))
            assert [example["prompt"] for example in examples] == expected
    if name.is_dir():
        held_out = [pair["prompt"] for pair in load("cost", name, tokenizers(), "test")]
        assert held_out == [row["prompt"] for row in PAIRS[15:]]
    read = {"repository": "train-0.parquet, train-1.parquet", "one gz": "some.jsonl.gz"}.get(form, f"some.{form}")
    read = f"train.jsonl.{form}, train.jsonl.{form}" if form in ("gz", "xz") else read
    assert f": PKU-SafeRLHF data from {read}, kept 10 of 10 rows, cut 0 texts, dropped none" in capsys.readouterr().err


def test_the_right_files_are_read(tokenizers, tmp_path, capsys):
    """A configuration that is named; of several types in a folder one; a new file under an old name."""
    write_card(tmp_path, **{name: f"{{split: train, path: {name}.jsonl}}" for name in ("one", "two")})
    for name in ("one", "two"):
        tiny.write_rows(tmp_path / f"{name}.jsonl", [dict(prompt=name)])
    for name in ("one", "two"):
        for script in SCRIPTS.values():
            rows, form, read = script.load_rows(str(tmp_path), name, "train", "--dataset")
            assert (rows, form, read) == ([dict(prompt=name)], "prompt", f"{name}.jsonl")
    for config, said in ((None, "Config name is missing.*one.*two"), ("six", "'six' not found.*one.*two")):
        with pytest.raises(repo.UserError, match=f"(?s)--dataset {tmp_path}: .*{said}"):
            load("prompts", tmp_path, tokenizers(), dataset_config=config)
    (tmp_path / "data").mkdir()
    data = tiny.write_rows(tmp_path / "data" / "train.jsonl", [dict(prompt="ba", response="pi")])
    tiny.write_rows(tmp_path / "data" / "train.csv", [dict(prompt="ke", response="pi")])
    capsys.readouterr()
    assert load("prompts", data.parent, tokenizers())[0]["prompt"] == "ba"
    for number in range(2, 6):
        tiny.write_rows(tmp_path / "data" / f"train-{number}.jsonl", [dict(prompt=f"ba {number}", response="pi")])
    assert len(load("prompts", data.parent, tokenizers())) == 5
    first, second = capsys.readouterr().err.splitlines()
    assert " data from train.jsonl, kept 1 of 1 " in first and " and 2 more, kept 5 of 5 " in second
    before, read = data.stat(), repo.load_rows(str(data), None, "train", "--dataset")
    tiny.write_rows(data, [dict(prompt="le", response="pi")])
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read[0][0] == dict(prompt="ba", response="pi")
    for script in SCRIPTS.values():
        assert script.load_rows(str(data), None, "train", "--dataset")[0][0] == dict(prompt="le", response="pi")
    datasets.Dataset.from_list([dict(prompt="sa")]).save_to_disk(tmp_path / "saved")
    assert load("prompts", tmp_path / "saved", tokenizers())[0]["prompt"] == "sa"


def messages(*turns: str) -> list[dict]:
    return [dict(zip(("role", "content"), turn.split(" ", 1), strict=True)) for turn in turns]


TURNS = ["system sa.", "user ba?", "assistant ke", "user pi?"]
PROMPT, LE, MU = messages(*TURNS), messages("assistant le"), messages("assistant mu")
HH, SHARE = "\n\nHuman: ba?\n\nAssistant: ke\n\nHuman: pi?\n\nAssistant:", [("human", "ba?"), ("gpt", "le")]
PKU = dict(prompt="ba?", response_0="le", response_1="mu", better_response_id=0, safer_response_id=1)
PKU |= dict(is_response_0_safe=False, is_response_1_safe=True)
UNSAFE = PKU | dict(prompt="ke", is_response_1_safe=False)
ULTRA = dict(prompt="ba?", chosen=messages("user ba?") + LE, rejected=messages("user ba?") + MU, score_chosen=8.5)
SAFE = dict(is_chosen_safe=True, is_rejected_safe=False)
KTO = [dict(prompt="ba?", completion="le", label=True), dict(prompt="ba?", completion="mu", label=False)]
FORMATS = {  # what the format is called, its group below, the prompt, rows
    "PKU-SafeRLHF": ("PKU-SafeRLHF", "ba?", [PKU, UNSAFE]),
    "texts": ("preference", "ba?", [dict(prompt="ba?", chosen="le", rejected="mu")]),
    "labelled texts": ("preference with labels", "ba?", [dict(prompt="ba?", chosen="le", rejected="mu", **SAFE)]),
    "messages and answers": ("preference", "TURNS", [dict(prompt=PROMPT, chosen=LE, rejected=MU)]),
    "whole dialogues": ("preference", "TURNS", [dict(chosen=PROMPT + LE, rejected=PROMPT + MU)]),
    "UltraFeedback": ("preference", "ba?", [ULTRA]),
    "hh-rlhf": ("preference", "HH", [dict(chosen=f"{HH} le", rejected=f"{HH} mu")]),
    "KTO": ("completion", "ba?", KTO),
    "KTO with messages": ("completion", "TURNS", [dict(prompt=PROMPT, completion=x, label=x == LE) for x in (LE, MU)]),
    "dialogues": ("messages", "TURNS", [dict(messages=PROMPT + LE)]),
    "ShareGPT": ("ShareGPT", "ba?", [dict(conversations=[{"from": who, "value": text} for who, text in SHARE])]),
    "Alpaca": ("Alpaca", "ba? ke", [dict(instruction="ba?", input="ke", output="le")]),
    "Alpaca without input": ("Alpaca", "ba?", [dict(instruction="ba?", input=None, output="le")]),
    "a response": ("response", "ba?", [dict(prompt="ba?", response="le")]),
    "a prompt": ("prompt", "ba?", [dict(prompt="ba?", input=[1], instruction={"of": "others"})]),
    "prompts of messages": ("prompt", "TURNS", [dict(prompt=PROMPT)]),
    "prompts of hh-rlhf": ("prompt", "HH", [dict(prompt=HH)]),
}
USES = ["prompts", "supervised", "reward", "cost", "helpful dpo", "safe dpo", "helpful kto", "safe kto"]
# What each use makes of a group, where X is the prompt, + and - are labels, and other words are in the refusal
CHOSEN, BETTER = "X le+ X mu-", "X le+ X mu-; ke le+ ke mu-"
ALL = ["X; ke", "(2 responses)", "X le mu; ke le mu", "X le- mu+; ke le- mu-", BETTER, "X mu+ X le-; ke mu+ ke le-"]
BY_GROUP = {
    "PKU-SafeRLHF": [*ALL, BETTER, "X mu+ X le-; ke mu- ke le-"],
    "preference": ["X", "(2 responses)", "X le mu", "is_response_0_safe", *[CHOSEN] * 3, "is_response_0_safe"],
    "preference with labels": ["X", "(2 responses)", "X le mu", "X mu- le+", *[CHOSEN] * 4],
    "completion": ["X", "X le", *["(1 responses)"] * 4, CHOSEN, CHOSEN],
    "prompt": ["X", *["(0 responses)"] * 7],
}
SINGLE = ["X", "X le", *["(1 responses)"] * 4, "'label'", "'label'"]
BY_GROUP |= dict.fromkeys(("messages", "ShareGPT", "Alpaca", "response"), SINGLE)


def shown(prompt) -> str:
    """A prompt as FORMATS names it."""
    names = {str(PROMPT): "TURNS", str(PROMPT[1:]): "HH"}
    return prompt if isinstance(prompt, str) else names[str(prompt)]


def told(example: dict) -> str:
    """An example as BY_GROUP writes it."""
    marks = ["+" if label else "-" for label in example.get("desirable", [])]
    marks = marks or ["-" if unsafe else "+" for unsafe in example.get("unsafe", [])] or ["", ""]
    if "prompts" in example:
        texts = zip(map(shown, example["prompts"]), example["responses"], marks, strict=True)
        return " ".join(f"{prompt} {text}{mark}" for prompt, text, mark in texts)
    return " ".join([shown(example["prompt"]), *map("".join, zip(example["responses"], marks, strict=False))])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_for_every_use(tokenizers, tmp_path, name):
    """The right prompts, responses, order, labels, and tokens, those of the chat template; or a refusal."""
    group, prompt, rows = FORMATS[name]
    data, plain = tiny.write_rows(tmp_path / "data.jsonl", rows), tiny.make_chat_tokenizer()
    loaded = repo.load_rows(str(data), None, "train", "--dataset")
    assert loaded[1] == group.removesuffix(" with labels")
    for use, expected in zip(USES, BY_GROUP[group], strict=True):
        with contextlib.ExitStack() as stack:
            for script in (repo, sacpo, preference_models):  # read once
                stack.enter_context(changed(script, load_rows=lambda *_: loaded))
            try:
                examples = load(use, data, tokenizers("chat"))
            except ERRORS as error:
                assert expected in str(error) and "X" not in expected and str(error).startswith("--dataset"), use
                continue
        assert "; ".join(map(told, examples)) == expected.replace("X", prompt), use
        for example in examples:
            for i, text in enumerate(example["responses"] or [""]):
                turns = example["prompts"][i] if "prompts" in example else example["prompt"]
                turns = turns if isinstance(turns, list) else [{"role": "user", "content": turns}]
                options = dict(tokenize=True, add_generation_prompt=True, return_dict=False)
                head = plain.apply_chat_template(turns, **options)
                ids = [*head, *plain.convert_tokens_to_ids([text, "<end>"])] if text else head
                found = example["ids"][i] if text else example["head"]
                assert (found if use in ("prompts", "reward", "cost") else found[0] + found[1]) == ids, use
    if prompt in ("TURNS", "HH"):  # a template of one's own has room for one message
        for use in ("prompts", "reward", "helpful dpo") if group == "preference" else ("prompts",):
            with pytest.raises(ERRORS, match=r"a prompt of several messages does not fit the template"):
                load(use, data, tokenizers())


def test_data_of_sacpos_stages(run, tokenizers, tmp_path, files):
    """One per stage, or one for both; a form that the loss of a stage cannot use is refused, in whatever stage."""
    names = {}
    for name, better, count in (("helpful", "ba", 16), ("safe", "ke", 9)):
        rows = [dict(prompt=f"{word}?", chosen=better, rejected="mu") for word in tiny.WORDS[:count]]
        names[name] = tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
    both = [names["safe"], names["helpful"]]
    flags = dict(stages=["safe", "helpful"], dataset=both, eval_dataset=both, output_dir=tmp_path / "run")
    assert run(sacpo, **flags).code == 0
    metrics, rows = (read_lines(tmp_path / "run" / f"{log}.jsonl") for log in ("metrics", "eval"))
    expected = [("safe", ["ke", "mu"])] * 9 + [("helpful", ["ba", "mu"])] * 16
    assert [(row["preference"], row["responses"]) for row in rows] == expected
    assert [line["stage"] for line in metrics] == [1, 2, 2]  # 9 and 16 pairs in batches of 8
    kto = tiny.write_rows(tmp_path / "kto.jsonl", [row | dict(prompt=f"{i}?") for i in range(8) for row in KTO])
    for losses, data in ((["dpo", "kto"], kto), (["kto", "dpo"], kto), (["kto", "dpo"], [kto, kto])):
        outcome = run(sacpo, dataset=data, eval_dataset=files.test, loss=losses, output_dir=tmp_path / "no")
        assert outcome.code == 2 and "does not fit (1 responses)" in outcome.errors[0], outcome
    outcome = run(sacpo, dataset=[kto] * 3, output_dir=tmp_path / "no")
    assert outcome.code == 2 and "data sets one or one each" in outcome.errors[0]


@pytest.mark.parametrize(
    "labels, coupled", [("10", "+-"), ("1101", "+- ++"), ("0001", "+- --"), ("01010", "+- +-"), ("11101", "+- ++")]
)
def test_single_responses_are_coupled(tokenizers, tmp_path, labels, coupled):
    """A desirable one with an undesirable one where there is one; an odd one out is left out."""
    rows = [dict(prompt=f"{word}?", completion=word, label=int(x)) for word, x in zip(tiny.WORDS, labels, strict=False)]
    pairs = load("helpful kto", tiny.write_rows(tmp_path / "kto.jsonl", rows), tokenizers())
    marks = ["".join("-+"[label] for label in pair["desirable"]) for pair in pairs]
    assert sorted(marks) == sorted(coupled.split())
    texts = [text for pair in pairs for text in zip(pair["prompts"], pair["responses"], pair["desirable"], strict=True)]
    given = {(row["prompt"], row["completion"], row["label"]) for row in rows}
    assert len(set(texts)) == len(rows) // 2 * 2 and set(texts) <= given
    for label in (0, 1):
        data = tiny.write_rows(tmp_path / "same.jsonl", [row | dict(label=label) for row in rows])
        with pytest.raises(sacpo.UserError, match="only desirable or only undesirable"):
            load("safe kto", data, tokenizers())
    for seed in range(4):  # a subset of one couple may have one label, too
        with contextlib.suppress(sacpo.UserError):
            (pair,) = load("helpful kto", tmp_path / "kto.jsonl", tokenizers(), train_size=1, seed=seed)
            assert {*pair["desirable"]} == {0, 1}


LONG, TURNED = "ba " * 12, "\n\nHuman: di?\n\nAssistant: "
OTHER = dict(chosen=TURNED + "le", rejected=TURNED.replace("di?", "da?") + "mu")
MESSY = [  # pairs, and why they are dropped
    (dict(prompt="ba?", chosen="le", rejected="mu"), None),
    (dict(prompt="ba?", chosen="le", rejected="mu"), None),  # pairs may be repeated
    (dict(prompt="ke?", chosen="le " * 9, rejected="mu " * 8), None),  # both are cut, to texts that differ
    (dict(prompt="pi sa?", chosen="le", rejected=""), "without a response at the end"),
    (dict(prompt="di?", chosen=TURNED + "le\n\nHuman: ba", rejected=TURNED + "mu"), "without a response at the end"),
    (dict(prompt=None, chosen="le", rejected="mu"), "without a prompt that ends with the user"),
    (dict(prompt=" \n", chosen="le", rejected="mu"), "without a prompt that ends with the user"),
    (dict(prompt=messages("user ba?", "assistant ", "user ke"), chosen="le", rejected="mu"), "with an empty message"),
    (dict(prompt="fo?", chosen="le <eos>", rejected="mu"), "with a special token in the text"),
    (dict(prompt="fo <pad> sa?", chosen="le", rejected="mu"), "with a special token in the text"),
    (OTHER, "whose responses answer different prompts"),
    (dict(prompt="pi?", chosen=LONG + "le", rejected=LONG + "mu"), "whose responses are empty or equal at 8 tokens"),
    (dict(prompt=LONG, chosen="le", rejected="mu"), "with an empty prompt or one over 7 tokens"),
]


def test_what_is_dropped_and_cut_is_counted_and_said(tokenizers, tmp_path, capsys):
    """In the same words by all scripts; preference_models.py has one limit for prompts and texts."""
    rows, reasons = zip(*MESSY, strict=True)
    data = tiny.write_rows(tmp_path / "messy.jsonl", rows)
    for use in ("helpful dpo", "helpful kto", "reward"):
        pairs, found = load(use, data, tokenizers(), limits=(7, 8)), [*filter(None, reasons)]
        dropped = ", ".join(f"{found.count(reason)} {reason}" for reason in dict.fromkeys(found))
        dropped = dropped.replace("over 7", "over 8") if use == "reward" else dropped
        told = f"preference data from messy.jsonl, kept 3 of 13 rows, cut 2 texts, dropped {dropped}\n"
        assert capsys.readouterr().err == f"--dataset {data}: {told}"
        assert [(pair.get("prompts") or [pair["prompt"]])[0] for pair in pairs] == ["ba?", "ba?", "ke?"]
        with pytest.raises(ERRORS, match=r"kept 0 of 1 rows, .* dropped 1 whose responses are empty or equal"):
            load(use, tiny.write_rows(tmp_path / "bad.jsonl", rows[11:12]), tokenizers(), limits=(7, 8))


@pytest.mark.parametrize("kind", ["cost", "reward"])
def test_labels_of_other_types(tokenizers, tmp_path, kind):
    """true and 1.0 are 1: a csv file or a table with gaps turns integers into one of them."""
    loaded = []
    for make in (int, bool, float):
        rows = [row | {name: make(row[name]) for name in row if name.endswith(("_id", "_safe"))} for row in PAIRS]
        loaded.append(load(kind, tiny.write_rows(tmp_path / "data.jsonl", rows), tokenizers()))
    assert loaded[0] == loaded[1] == loaded[2]


def test_prompts_count_once_and_long_ones_are_dropped(tokenizers, tmp_path, capsys):
    """The first of equal prompts stays in its place, and prompts that differ in white space are different."""
    rows = [dict(question=text, prompt=7) for text in ("ba pi?", "ke", "ba pi?", "ke ", "sa le ra mu", "ke")]
    data, tokenizer = tiny.write_rows(tmp_path / "prompts.csv", rows), tokenizers("ba ba {prompt} sa")
    prompts = load("prompts", data, tokenizer, prompt_column="question")
    assert [prompt["prompt"] for prompt in prompts] == ["ba pi?", "ke", "ke ", "sa le ra mu"]
    assert prompts[1]["head"] == TOKENIZER("ba ba ke sa")["input_ids"]
    assert load("prompts", data, tokenizer, limits=(6, 9), prompt_column="question") == prompts[:3]
    dropped = "dropped 2 that repeat another, 1 with an empty prompt or one over 6 tokens\n"
    assert capsys.readouterr().err.endswith(f"kept 3 of 6 rows, cut 0 texts, {dropped}")
    data = tiny.write_rows(tmp_path / "special.jsonl", [dict(prompt="ba <pad> pi")])
    with pytest.raises(repo.UserError, match=r"kept 0 of 1 rows, .*1 with a special token in the text"):
        load("prompts", data, tokenizer)


def test_supervised_texts(tokenizers, tmp_path, capsys):
    """Alpaca's columns: equal texts count once, also where instruction and input part a prompt elsewhere."""

    def read(*place, **options):
        texts = [example["ids"][0] for example in load("supervised", *place, flag="--ptx-dataset", **options)]
        return [tuple(" ".join(TOKENIZER.convert_ids_to_tokens(part)) for part in text) for text in texts]

    texts = [("ba pi", "", "ke sa."), ("ba", "le ra", "mu"), ("fo", "", ""), ("ba", "le ra", "mu")]
    texts += [("ba le", "ra", "mu"), ("ke", None, "ba pi ke sa le ra mu fo di"), ("ba pi ke sa le", "", "ra")]
    rows = [dict(zip(("instruction", "input", "output"), text, strict=True)) for text in texts]
    data = tiny.write_rows(tmp_path / "alpaca.json", rows)
    assert read(data, tokenizers("{prompt} "), limits=(4, 9)) == [
        ("ba pi", "ke sa . <eos>"),
        ("ba le ra", "mu <eos>"),
        ("ke", "ba pi ke sa le ra mu fo"),  # nine tokens together, without EOS as the end is cut off
    ]
    told = "dropped 1 without a response at the end, 2 that repeat another, 1 with an empty prompt or one over 4 tokens"
    assert f"Alpaca data from alpaca.json, kept 3 of 7 rows, cut 1 texts, {told}\n" in capsys.readouterr().err
    rows = [dict(prompt=text, response="None") for text in ("NA", "null", "nan", "ba?")]  # texts, in whatever file
    rows += [dict(prompt="N/A", response="#N/A")]
    for name in ("rows.csv", "rows.jsonl"):
        examples = load("supervised", tiny.write_rows(tmp_path / name, rows), tokenizers(), split="train")
        assert [(example["prompt"], *example["responses"]) for example in examples] == [tuple(r.values()) for r in rows]
    # A prompt's last token that joins with the response is one the policy would not have sampled after that prompt.
    data = tiny.write_rows(tmp_path / "joined.jsonl", [dict(prompt="ba k", response="e sa", instruction="x")])
    assert read(data, tokenizers("mu {prompt}")) == [("mu ba", "ke sa <eos>")]
    for row, part in (
        (dict(prompt="ba"), r"of a form that does not fit \(0 responses\); the first row is {'prompt': 'ba'}"),
        (dict(instruction=" ", input="", output="ba"), "without a prompt that ends with the user"),
        (dict(prompt="ba", response=3), "without a response at the end"),
        (dict(prompt="ba", response="pi <eos>"), "with a special token in the text"),
        (dict(prompt="ba " * 99, response="pi"), "with an empty prompt or one over 64 tokens"),
        (dict(prompt="ba", completion="pi", label=False), "with an undesirable response"),
    ):
        with pytest.raises(repo.UserError, match=f"--ptx-dataset .*kept 0 of 1 rows, .*1 {part}"):
            read(tiny.write_rows(tmp_path / "bad.jsonl", [row]), tokenizers())


def test_sacpos_lengths_and_subset(files, tokenizers):
    """Long prompts are dropped, long texts lose their end; a subset is random and the same in both stages."""

    def read(use, size=0, **options):
        return load(use, files.train, tokenizers(), train_size=size, **options)

    plain, places = {use: read(use) for use in ("safe dpo", "helpful dpo")}, {}
    short = [pair for pair in plain["safe dpo"] if len(pair["ids"][0][0]) <= 5]
    cut = read("safe dpo", limits=(5, 9))
    assert [pair["ids"] for pair in cut] == [tuple((x, y[: 9 - len(x)]) for x, y in pair["ids"]) for pair in short]
    for seed in (1, 2):
        subset = {use: read(use, 9, seed=seed) for use in plain}
        places[seed] = [plain["safe dpo"].index(pair) for pair in subset["safe dpo"]]
        assert places[seed] == [plain["helpful dpo"].index(pair) for pair in subset["helpful dpo"]]
        assert len(set(places[seed])) == 9 and places[seed] == sorted(places[seed]) != list(range(9))
    assert places[1] != places[2] and read("safe dpo", 99) == plain["safe dpo"]
