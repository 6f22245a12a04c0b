"""Data as people have them: repositories of the Hub as folders, file types, slices, forms of the columns."""

import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest
import tiny

import preference_models
import repo
import sacpo

TOKENIZER = tiny.make_tokenizer()
PAIRS = [row | {"harm": {"Violence": False}, "level": 0} for row in tiny.make_pairs(20, seed=5)]
EOS = TOKENIZER.eos_token_id
CARD = """---
configs:
- {config_name: default, data_files: [{split: train, path: data/train-*}, {split: test, path: data/test-*}]}
- {config_name: alpaca-7b, data_files: [{split: train, path: alpaca-7b/train-*}]}
---
"""


def make_data(folder: Path, form: str) -> Path:
    """15 rows of training data and five of test data, or the training data alone, in the form."""
    train, test = PAIRS[:15], PAIRS[15:]
    if form == "repository":  # as on the Hub: a card with configurations, and Parquet files by split, in parts
        parts = {"data/train-0": train[:7], "data/train-1": train[7:], "data/test-0": test, "alpaca-7b/train-0": test}
        for name, rows in parts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
        (folder / "README.md").write_text(CARD)
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


def load_pairs(name, split="train", **flags):
    args = preference_models.Args(**dict(kind="cost") | flags)
    return preference_models.load_pairs(args, str(name), split, "--dataset", TOKENIZER)


def load_prompts(name, split="train", **flags):
    return repo.load_prompts(repo.Args(**flags), str(name), split, "--dataset", TOKENIZER)


def load_supervised(name, **flags):
    """Pairs of texts, as the tokens say: prompt and response."""
    texts = repo.load_supervised(repo.Args(ptx_dataset=str(name), **flags), TOKENIZER)
    return [tuple(" ".join(TOKENIZER.convert_ids_to_tokens(part)) for part in (ids[:n], ids[n:])) for ids, n in texts]


SLICES = {"train[:10]": slice(10), "train[-4:]": slice(-4, None), "train[20%:]": slice(3, None), "train": slice(None)}


@pytest.mark.parametrize("form", ["repository", "parquet", "jsonl", "json", "csv", "one gz", "gz", "xz"])
def test_forms_of_data_and_slices_of_a_split(processes, tmp_path, form):
    """A file by itself is whatever split is asked for. Columns that nobody asks for may hold what they like."""
    name = make_data(tmp_path, form)
    for split, chosen in SLICES.items():
        expected = [row["prompt"] for row in PAIRS[:15][chosen]]
        assert [pair["prompt"] for pair in load_pairs(name, split)] == expected
        if name.is_file():
            assert [text for text, _ in load_prompts(name, split.replace("train", "test"))] == expected
    if name.is_dir():
        assert [pair["prompt"] for pair in load_pairs(name, "test")] == [row["prompt"] for row in PAIRS[15:]]


@pytest.mark.parametrize("make", [bool, float, int], ids=lambda make: make.__name__)
def test_pairs_are_ordered_by_their_labels(processes, tmp_path, make):
    """true and 1.0 are 1: a csv file or a table with gaps turns integers into one of them."""
    rows = [row | {name: make(row[name]) for name in row if name.endswith(("_id", "_safe"))} for row in PAIRS]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    for row, cost, reward in zip(PAIRS, load_pairs(data), load_pairs(data, kind="reward"), strict=True):
        for pair, first in ((reward, row["better_response_id"]), (cost, 1 - row["safer_response_id"])):
            order = (first, 1 - first)
            assert pair["responses"] == [row[f"response_{i}"] for i in order]
            texts = [TOKENIZER(f"{row['prompt']} {text}")["input_ids"] for text in pair["responses"]]
            assert pair["ids"] == [[*ids, EOS] for ids in texts]
        assert cost["unsafe"] == [not row[f"is_response_{i}_safe"] for i in order]
    cut = load_pairs(data, max_length=4, prompt_template="ba {prompt} pi ")
    assert cut[0]["ids"][0] == TOKENIZER(f"ba {rows[0]['prompt']}")["input_ids"][:4]


def test_prompts_count_once_and_long_ones_are_dropped(processes, tmp_path, capsys):
    """The first of equal prompts stays in its place, and prompts that differ in white space are different."""
    rows = [dict(question=text, prompt=7) for text in ("ba pi?", "ke", "ba pi?", "ke ", "sa le ra mu", "ke")]
    data = tiny.write_rows(tmp_path / "prompts.csv", rows)
    flags = dict(prompt_column="question", prompt_template="ba ba {prompt} sa")
    prompts = load_prompts(data, **flags)
    assert [text for text, _ in prompts] == ["ba pi?", "ke", "ke ", "sa le ra mu"]
    assert prompts[1][1] == TOKENIZER("ba ba ke sa")["input_ids"]
    assert load_prompts(data, max_prompt_length=6, **flags) == prompts[:3]
    assert "kept 3 of 4 " in capsys.readouterr().err


ALPACA = [
    dict(instruction="ba pi", input="", output="ke sa."),
    dict(instruction="ba", input="le ra", output="mu"),
    dict(instruction="fo", input="", output=""),
    dict(instruction="ba", input="le ra", output="mu"),
    dict(instruction="ba le", input="ra", output="mu"),
    dict(instruction="ke", input=None, output="ba pi ke sa le ra mu fo di"),
    dict(instruction="ba pi ke sa le", input="", output="ra"),
]


def test_supervised_texts(processes, tmp_path):
    """Alpaca's columns: equal texts count once, also where instruction and input part a prompt elsewhere."""
    data = tiny.write_rows(tmp_path / "alpaca.json", ALPACA)
    assert load_supervised(data, max_prompt_length=4, max_new_tokens=5, prompt_template="{prompt} ") == [
        ("ba pi", "ke sa . <eos>"),
        ("ba le ra", "mu <eos>"),
        ("ke", "ba pi ke sa le ra mu fo"),  # nine tokens together, without EOS as the end is cut off
    ]
    rows = [dict(prompt="ba?", response="pi ke"), dict(prompt="sa le", response="ra <eos>")]
    data = tiny.write_rows(tmp_path / "texts.jsonl", [row | dict(instruction="x") for row in rows])
    expected = [("mu ba ? fo", "pi ke <eos>"), ("mu sa le fo", "ra <eos>")]
    assert load_supervised(data, prompt_template="mu {prompt} fo ") == expected
    # A prompt's last token that joins with the response is one the policy would not have sampled after that prompt.
    joined = load_supervised(tiny.write_rows(tmp_path / "joined.jsonl", [dict(prompt="ba k", response="e sa")]))
    assert joined == [("ba", "ke sa <eos>")]
    for row, part in (
        (dict(prompt="ba"), "no column 'response'"),
        (dict(instruction=" ", input="", output="ba"), "row 0 has .* as 'prompt'"),
        (dict(prompt="ba", response=3), "row 0 has .* as 'response'"),
        (dict(prompt="ba " * 99, response="pi"), "no prompt is within --max-prompt-length"),
    ):
        with pytest.raises(repo.UserError, match=f"--ptx-dataset .*{part}"):
            load_supervised(tiny.write_rows(tmp_path / "bad.jsonl", [row]))


def test_sacpos_lengths_and_subset(files, processes):
    """Long prompts are dropped, long texts lose their end; a subset is random and the same in both stages."""

    def load(size=0, **flags):
        args = sacpo.Args(**flags)
        return sacpo.load_pairs(args, str(files.train), "train", "--dataset", TOKENIZER, ["dpo", "dpo"], size)

    plain, places = load(), {}
    short = [pair for pair in plain["safe"] if len(pair["ids"][0][0]) <= 5]
    cut = load(max_prompt_length=5, max_length=9)["safe"]
    assert [pair["ids"] for pair in cut] == [[(x, y[: 9 - len(x)]) for x, y in pair["ids"]] for pair in short]
    for seed in (1, 2):
        subset = load(size=9, seed=seed)
        places[seed] = [plain["safe"].index(pair) for pair in subset["safe"]]
        assert places[seed] == [plain["helpful"].index(pair) for pair in subset["helpful"]]
        assert len(set(places[seed])) == 9 and places[seed] == sorted(places[seed]) != list(range(9))
    assert places[1] != places[2] and load(size=99) == plain
