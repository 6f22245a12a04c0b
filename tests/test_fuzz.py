"""Generated data and texts: a reader gives rows or one line that says what is wrong, never another exception.

The examples are the same in every run (`derandomize`); `--hypothesis-seed` does not change them. More of them:

    FUZZ_EXAMPLES=5000 python -m pytest -n 0 tests/test_fuzz.py
"""

import csv
import gzip
import io
import json
import math
import os
from pathlib import Path

import pyarrow
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import evaluate
import preference_models
import repo
import sacpo

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


def fuzz(examples: int):
    """Settings of a test: a set number of examples without a time limit for each, as the machine may be busy."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=EXAMPLES or examples,
        suppress_health_check=list(HealthCheck),
    )


# ---- Values. Text has any character, those that end lines in some readers, and words of the tiny tokenizer among them

characters = st.characters(exclude_categories=["Cs"])
text = st.text(
    characters | st.sampled_from(["\0", "\r", "\x1c", "\x85", "\u2028", "\ufeff", "\u202e", "💣", '"', ",", " "])
)
words = st.lists(st.sampled_from([*tiny.WORDS, "?", ".", "<eos>", "<unk>", "xyz"]), max_size=8).map(" ".join)
texts = text | words
surrogate = st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(["prompt", "response", "prompt ", "Prompt", "", "instruction"]) | text
rows = st.lists(st.dictionaries(columns, values, max_size=4), max_size=5)
good_rows = st.lists(st.fixed_dictionaries({"prompt": texts, "response": texts}), min_size=1, max_size=5)


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: list[dict]) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode(errors="surrogatepass")


def as_csv(rows: list[dict]) -> bytes:
    file, names = io.StringIO(newline=""), sorted({name for row in rows for name in row})
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode(errors="surrogatepass")


def as_parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except (pyarrow.ArrowException, OverflowError, TypeError):  # no table: mixed types, 65 bits
        return b"PAR1"
    return file.getvalue()


FORMS = {"jsonl": as_jsonl, "json": as_json, "csv": as_csv, "parquet": as_parquet}


@st.composite
def broken(draw) -> tuple[str, bytes]:
    """(ending, content) of a data file: whole, cut short, with bytes replaced or put in, packed, or anything at all."""
    ending = draw(st.sampled_from(list(FORMS)))
    content = FORMS[draw(st.sampled_from([ending, ending, ending, *FORMS]))](draw(rows | good_rows))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, len(content)))
        content = content[:start] + draw(st.binary(max_size=6)) + content[end if draw(st.booleans()) else start :]
    if draw(st.integers(0, 9)) == 0:
        content = draw(st.binary(max_size=40))
    if draw(st.integers(0, 9)) == 0:
        ending, content = f"{ending}.gz", gzip.compress(content, mtime=0)[: draw(st.integers(1, 200))]
    return ending, content


# ---- Readers


@fuzz(100)
@given(broken())
@example(("jsonl", b'{"prompt": "\\ud800"}\n'))
@example(("json", b"[" * 5000))
@example(("csv", b"\xff\xfe"))
def test_data_files(tmp_path_factory, file):
    """Rows of the columns that were asked for, texts among them that can be written again, or a UserError."""
    ending, content = file
    path = tmp_path_factory.getbasetemp() / "fuzz" / f"data.{ending}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        found = repo.load_rows(str(path), "train", ["prompt"], "--dataset")
        assert set(found) == {"prompt"} and found["prompt"]
        repo.check_texts(found["prompt"], "prompt", str(path), "--dataset")
    except repo.UserError as error:
        assert str(path) in str(error) and "--dataset" in str(error)
    else:
        assert all(isinstance(prompt, str) and prompt.strip() for prompt in found["prompt"])
        json.dumps(found, ensure_ascii=False).encode()


@fuzz(60)
@given(good_rows, st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_whole_data_files_come_back_as_they_were_written(tmp_path_factory, rows, form):
    if form == "csv":  # where these are not texts but the end of a line, no value, or a number
        rows = [{name: "a" + value.replace("\r", "") + "a" for name, value in row.items()} for row in rows]
        rows = [{name: value.replace("\0", "") for name, value in row.items()} for row in rows]
    path = tmp_path_factory.getbasetemp() / f"whole.{form}"
    path.write_bytes(FORMS[form](rows))
    found = repo.load_rows(str(path), "train", ["response", "prompt"], "--dataset")
    assert found == {name: [row[name] for row in rows] for name in ("response", "prompt")}


@fuzz(40)
@given(st.text(st.sampled_from("train[:]%0129+- _eval"), max_size=14) | text)
def test_splits(files, split):
    try:
        rows = repo.load_rows(str(files.train), split, ["prompt"], "--dataset")
    except repo.UserError as error:
        assert f"split '{split}'" in str(error)
    else:
        assert 0 < len(rows["prompt"]) <= 40 * (1 + split.count("+"))


labels = st.sampled_from([0, 1, True, False, 0.0, 1.0]) | st.none() | st.integers(-1, 2) | st.floats() | text
pairs = {"prompt": texts, "response_0": texts, "response_1": texts, "better_response_id": labels}
pairs |= {"safer_response_id": labels, "is_response_0_safe": labels, "is_response_1_safe": labels}
pairs = st.lists(st.fixed_dictionaries(pairs), min_size=1, max_size=4)
good_label = st.sampled_from([0, 1])
good_pairs = {"prompt": words, "response_0": texts, "response_1": texts, "better_response_id": good_label}
good_pairs |= {
    "safer_response_id": good_label,
    "is_response_0_safe": st.booleans(),
    "is_response_1_safe": st.booleans(),
}
good_pairs = st.lists(st.fixed_dictionaries(good_pairs), min_size=1, max_size=4)


@fuzz(40)
@given(pairs | good_pairs, st.sampled_from(["jsonl", "parquet"]), st.sampled_from(["reward", "cost"]))
def test_pairs(tmp_path_factory, processes, rows, form, kind):
    """Pairs with tokens of both responses, in an order that the labels say, or a UserError."""
    path = tmp_path_factory.getbasetemp() / f"pairs.{form}"
    path.write_bytes(FORMS[form](rows))
    args = preference_models.Args(kind=kind, max_length=20)
    try:
        found = preference_models.load_pairs(args, str(path), "train", "--dataset", TOKENIZER)
    except preference_models.UserError as error:
        assert str(path) in str(error)
    else:
        assert len(found) == len(rows)
        for pair, row in zip(found, rows, strict=True):
            assert sorted(pair["responses"]) == sorted((row["response_0"], row["response_1"]))
            first = int(row["better_response_id"]) if kind == "reward" else 1 - int(row["safer_response_id"])
            assert pair["responses"][0] == row[f"response_{first}"]
            assert all(0 < len(ids) <= 20 for ids in pair["ids"])
    args = sacpo.Args(max_prompt_length=8, max_length=20)
    try:
        found = sacpo.load_preferences(args, str(path), "train", "--dataset", TOKENIZER)
    except sacpo.UserError as error:
        assert str(path) in str(error)
    else:
        assert all(prompt and len(response) > 0 for pair in found["helpful"] for prompt, response in pair.ids)
        assert all(len(prompt) + len(response) <= 20 for pair in found["safe"] for prompt, response in pair.ids)


@fuzz(60)
@given(rows | good_rows)
def test_supervised_texts(tmp_path_factory, processes, rows):
    path = tmp_path_factory.getbasetemp() / "supervised.jsonl"
    path.write_bytes(as_jsonl(rows))
    args = repo.Args(ptx_dataset=str(path), max_prompt_length=6, max_new_tokens=4)
    try:
        found = repo.load_supervised(args, TOKENIZER)
    except repo.UserError as error:
        assert str(path) in str(error)
    else:
        assert all(0 < len(prompt) <= 6 and len(prompt + response) <= 10 and response for prompt, response in found)


# ---- Templates and tokens

TOKENIZER = tiny.make_tokenizer()
template = st.tuples(texts, texts).map("{prompt}".join)


@fuzz(150)
@given(template, st.lists(texts, max_size=4), st.lists(texts, min_size=4, max_size=4))
def test_prompts_in_a_template(template, prompts, responses):
    """A prompt stands where {prompt} did, whatever it holds; a response follows it directly."""
    responses = responses[: len(prompts)]
    expected = [template.replace("{prompt}", prompt) for prompt in prompts]
    assert repo.in_template(TOKENIZER, template, prompts) == [TOKENIZER(text)["input_ids"] for text in expected]
    both = [text + response for text, response in zip(expected, responses, strict=True)]
    assert repo.in_template(TOKENIZER, template, prompts, responses) == [TOKENIZER(text)["input_ids"] for text in both]
    try:
        encoded = repo.encode_prompts(TOKENIZER, template, prompts, "--dataset data")
    except repo.UserError as error:
        assert str(error).startswith("--dataset data: the prompt ")
    else:
        assert all(encoded) and len(encoded) == len(prompts)
    for ids, text in zip(repo.encode_scored(TOKENIZER, prompts, responses, template, 6), both, strict=True):
        whole = TOKENIZER(text)["input_ids"]
        assert 0 < len(ids) <= 6 and ids == ([*whole, TOKENIZER.eos_token_id] if whole[-1:] != [1] else whole)[:6]


CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}<A>{% endif %}"


@fuzz(80)
@given(texts)
def test_prompts_in_a_chat_template(prompt):
    """Jinja's own marks in a prompt are text, not a program."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = CHAT
    for content in (prompt, prompt + "{{ 7 * 7 }}", "{% raw %}" + prompt):
        expected = tokenizer(f"<user> {content} <A>", add_special_tokens=False)["input_ids"]
        assert repo.in_template(tokenizer, "chat", [content]) == [expected]


ids = st.lists(st.integers(0, 60), max_size=6)


@fuzz(100)
@given(ids, ids)
def test_parting_a_text(prompt, rest):
    """Nothing is lost, the response holds something, and the prompt's part is the prompt's own tokens."""
    whole = [*prompt, *rest]
    if whole:
        before, after = repo.part(whole, prompt)
        assert before + after == whole and after and before == prompt[: len(before)]
        assert len(before) == min(len(prompt), len(whole) - 1)


@fuzz(100)
@given(st.lists(st.tuples(ids, ids.filter(bool)), min_size=1, max_size=4), st.integers(0, 60))
def test_padding_texts(texts, value):
    """Masks tell the tokens from the padding, also where both have one id."""
    if any(prompt for prompt, _ in texts):
        sequences, mask, response_mask = repo.pad_texts(texts, value)
        assert sequences.shape == mask.shape and response_mask.shape[1] == max(len(response) for _, response in texts)
        length = response_mask.shape[1]
        for row, (prompt, response) in enumerate(texts):
            assert sequences[row][mask[row] == 1].tolist() == prompt + response
            assert sequences[row][-length:][response_mask[row] == 1].tolist() == response
            assert (sequences[row][mask[row] == 0] == value).all()
            assert torch.equal(mask[row, -length:], response_mask[row])


# ---- Files and flags of evaluate.py


@fuzz(120)
@given(
    st.binary(max_size=60)
    | values.map(lambda value: json.dumps(value).encode())
    | surrogate.map(lambda s: json.dumps([s]).encode())
)
@example(b"[" * 100_000)
@example(b'{"instructions": ["ba", "be"]}')
def test_lists_of_texts_in_json(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "texts.json"
    path.write_bytes(content)
    try:
        found = evaluate.json_texts(path, "test", "--dataset")
    except evaluate.UserError as error:
        assert str(path) in str(error) or "--dataset-split" in str(error)
    else:
        assert found is None or isinstance(found, list)
        if found is None:
            return
        try:
            evaluate.check_texts(found, "prompt", str(path), "--dataset")
        except evaluate.UserError:
            return
        "".join(found).encode()


@fuzz(120)
@given(
    st.lists(text | st.tuples(texts, texts).map("=".join) | st.sampled_from(["a=b", "a=b=c", "a=", "=a"]), max_size=3)
)
def test_named_models(entries):
    try:
        models = evaluate.named_models(entries)
    except evaluate.UserError as error:
        assert "--models" in str(error)
    else:
        assert [f"{name}={path}" for name, path in models.items()] == entries
        assert all(Path(name).name == name and path.strip() for name, path in models.items())  # names are file names


row = {"model": st.sampled_from(["a", "b"]), "index": st.integers(0, 3), "prompt": text, "response": text}
row |= {"reward": st.floats(), "cost": st.floats(), "length": st.integers(), "finished": st.booleans()}
answers = st.lists(st.fixed_dictionaries(row), max_size=4)


@fuzz(120)
@given(answers, st.lists(st.binary(max_size=30), max_size=2), st.integers(0, 10**6))
def test_files_of_answers(tmp_path_factory, rows, more, cut):
    """What append_json wrote is read again, up to the last whole line; any other line is a UserError that names it."""
    path = tmp_path_factory.getbasetemp() / "responses.jsonl"
    path.unlink(missing_ok=True)
    evaluate.append_json(path, [row for row in rows if math.isfinite(row["reward"] + row["cost"])])
    written = path.read_bytes()
    path.write_bytes(written[: cut % (len(written) + 1)])
    found = evaluate.read_answers(path)
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].decode().split("\n")[:-1]
    expected = {(row["model"], row["index"]): row for row in map(json.loads, lines)}
    assert {(model, i): row for model, rows in found.items() for i, row in rows.items()} == expected
    for content in (*more, b"[" * 100_000):
        path.write_bytes(written + content + b"\n")
        try:
            evaluate.read_answers(path)
        except evaluate.UserError as error:
            assert str(path) in str(error)


@fuzz(60)
@given(values)
def test_json_without_nan(value):
    """Any reader takes the files, and what is finite comes back as it was."""
    once = json.dumps(repo.finite(value), allow_nan=False)
    assert repo.finite(json.loads(once)) == json.loads(once)
