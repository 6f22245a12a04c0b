"""Data as people have them: repositories of the Hub as folders, forms of the columns, slices, and the Hub itself."""

import contextlib
import gzip
import hashlib
import http.server
import json
import lzma
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import datasets
import pytest
import tiny
import torch
from helpers import ROOT, command, finish, read_lines, read_summary, start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ppo_lagrange
import preference_models
import repo
import sacpo

TOKENIZER = tiny.make_tokenizer()
PAIRS = tiny.make_pairs(20, seed=5)
EOS = TOKENIZER.eos_token_id

CARD = """---
license: cc-by-nc-4.0
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: alpaca-7b
  data_files:
  - split: train
    path: alpaca-7b/train-*
---
# A data set
"""


def safe_rlhf_row(row: dict) -> dict:
    """A row with the other columns of PKU-SafeRLHF, numbers and structures among them."""
    more = {"prompt_source": "a", "response_0_source": "b", "response_1_source": "c"}
    for i in range(2):
        safe = row[f"is_response_{i}_safe"]
        more |= {f"response_{i}_harm_category": {"Violence": not safe, "Privacy": False}}
        more |= {f"response_{i}_severity_level": 0 if safe else 2, f"response_{i}_sha256": "0" * 8}
    return row | more


def make_repository(folder: Path, train: list[dict], test: list[dict]) -> Path:
    """A folder as a data set lies on the Hub: a card with configurations, and Parquet files by split, in parts."""
    half = len(train) // 2
    parts = {"data/train-00000-of-00002": train[:half], "data/train-00001-of-00002": train[half:]}
    parts |= {"data/test-00000-of-00001": test, "alpaca-7b/train-00000-of-00001": train[:1]}
    for name, rows in parts.items():
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(file)
    (folder / "README.md").write_text(CARD)
    return folder


def packed(path: Path, rows: list[dict]) -> Path:
    """JSON lines in a file packed by gzip or xz, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes({".gz": gzip, ".xz": lzma}[path.suffix].compress(text))
    return path


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    rows = [safe_rlhf_row(row) for row in PAIRS]
    return make_repository(tmp_path_factory.mktemp("data") / "PKU-SafeRLHF", rows[:15], rows[15:])


def load_pairs(name, split="train", **flags):
    args = preference_models.Args(**flags)
    return preference_models.load_pairs(args, str(name), split, "--dataset", TOKENIZER)


def load_prompts(name, split="train", **flags):
    return repo.load_prompts(repo.Args(**flags), str(name), split, "--dataset", TOKENIZER)


def load_supervised(name, **flags):
    return repo.load_supervised(repo.Args(ptx_dataset=str(name), **flags), TOKENIZER)


def words(ids: list[int]) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(ids))


# ---- Repositories of the Hub as folders, slices


def test_a_repository_in_a_folder(repository, processes):
    """Each split is its own; a column that nobody asks for may hold what it likes."""
    train, test = load_pairs(repository, kind="cost"), load_pairs(repository, "test", kind="cost")
    assert [pair["prompt"] for pair in train] == [row["prompt"] for row in PAIRS[:15]]
    assert [pair["prompt"] for pair in test] == [row["prompt"] for row in PAIRS[15:]]
    for pair, row in zip(train + test, PAIRS, strict=True):
        safer = row["safer_response_id"]
        assert pair["responses"] == [row[f"response_{1 - safer}"], row[f"response_{safer}"]]
        assert pair["signs"] == [1 - 2 * row[f"is_response_{i}_safe"] for i in (1 - safer, safer)]
        for text, ids in zip(pair["responses"], pair["ids"], strict=True):
            assert ids == [*TOKENIZER(row["prompt"] + text)["input_ids"], EOS]


SLICES = {
    "train[:10]": slice(10),
    "train[-4:]": slice(-4, None),
    "train[50%:]": slice(8, None),  # 15 rows: the library rounds 7.5 to the closest even number
    "train[3:7]": slice(3, 7),
    "train": slice(None),
}


@pytest.mark.parametrize("split", SLICES)
@pytest.mark.parametrize("form", ["repository", "parquet", "jsonl", "folder", "xz"])
def test_slices_of_a_split(repository, processes, tmp_path, form, split):
    rows, name = PAIRS[:15], repository
    if form in ("jsonl", "parquet"):
        name = tiny.write_rows(tmp_path / f"some.{form}", rows)
    elif form == "folder":
        tiny.write_rows(tmp_path / "train.jsonl", rows)
        name = tmp_path
    elif form == "xz":
        packed(tmp_path / "train.jsonl.xz", rows)
        name = tmp_path
    expected = [row["prompt"] for row in rows[SLICES[split]]]
    assert [pair["prompt"] for pair in load_pairs(name, split)] == expected
    assert [text for text, _ in load_prompts(name, split)] == expected
    if form in ("jsonl", "parquet"):  # a file by itself is whatever split is asked for
        assert [text for text, _ in load_prompts(name, split.replace("train", "test"))] == expected
    args = sacpo.Args(dataset=str(name), stages=("helpful", "safe"))
    pairs = sacpo.load_preferences(args, str(name), split, "--dataset", TOKENIZER)
    assert [pair.prompt for pair in pairs["safe"]] == [pair.prompt for pair in pairs["helpful"]] == expected


def test_a_folder_with_splits_in_packed_files(processes, tmp_path):
    """The older layout of PKU-SafeRLHF: JSON lines by split in folders, packed by xz, and no card."""
    for number in range(2):
        packed(tmp_path / f"round{number}" / "train.jsonl.xz", PAIRS[number * 5 : number * 5 + 5])
        packed(tmp_path / f"round{number}" / "test.jsonl.xz", PAIRS[10 + number : 11 + number])
    assert [pair["prompt"] for pair in load_pairs(tmp_path)] == [row["prompt"] for row in PAIRS[:10]]
    assert [pair["prompt"] for pair in load_pairs(tmp_path, "test")] == [row["prompt"] for row in PAIRS[10:12]]


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


def test_slices_and_configurations_that_are_not_there(refused, repository, tmp_path):
    for split, part in (("train[20:]", "has no rows"), ("validation", "validation"), ("train[", "train[")):
        for script in (repo, preference_models):
            refused(script, f"--dataset {repository}", part, dataset=repository, dataset_split=split)
    folder = make_repository(tmp_path / "data", PAIRS, PAIRS)
    (folder / "README.md").write_text(CARD.replace("default", "deepseek"))
    refused(repo, f"--dataset {folder}", "Config name is missing", dataset=folder)


# ---- Prompts


def test_prompts_of_another_column_count_once(processes, tmp_path):
    """The first of equal prompts stays in its place, and prompts that differ in white space are different."""
    texts = ["ba pi?", "ke", "ba pi?", "ke ", "sa le", "ke"]
    rows = [dict(question=text, prompt=7) for text in texts]
    data = tiny.write_rows(tmp_path / "prompts.csv", rows)
    prompts = load_prompts(data, prompt_column="question")
    assert [text for text, _ in prompts] == ["ba pi?", "ke", "ke ", "sa le"]
    assert [words(ids) for _, ids in prompts] == ["ba pi ?", "ke", "ke", "sa le"]


def test_prompts_only_are_enough_for_a_run_and_not_for_pairs(run, refused, tmp_path):
    data = tiny.write_rows(tmp_path / "prompts.jsonl", [dict(text=row["prompt"]) for row in PAIRS])
    flags = dict(dataset=data, eval_dataset=data)
    for script in (repo, ppo_lagrange):
        folder = tmp_path / script.__name__
        outcome = run(script, output_dir=folder, total_episodes=16, prompt_column="text", **flags)
        assert outcome.code == 0, outcome.err
        assert len(read_lines(folder / "eval.jsonl")) == 2 * len({row["prompt"] for row in PAIRS})
    refused(repo, "no column 'prompt'; the columns are text", **flags)
    refused(preference_models, "no column 'prompt' (nor all of chosen, rejected); the columns are text", **flags)


# ---- Dialogues of hh-rlhf


def dialogue(*turns: str) -> str:
    """Turns of a human and an assistant, the last of which answers."""
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


# The rejected dialogue may part from the chosen one before the last answer.
DIALOGUES = [
    dict(chosen=dialogue("ba pi?", "ke sa"), rejected=dialogue("ba pi?", "le")),
    dict(chosen=dialogue("mu", "ra", "fo?", "di ke ba"), rejected=dialogue("mu", "ra", "fo?", "te")),
    dict(chosen=dialogue("sa?", ""), rejected=dialogue("sa?", "ba")),
    dict(chosen=dialogue("le?", "ba"), rejected=dialogue("le?", " ")),
    dict(chosen=dialogue("re", "ne", "se", "me"), rejected=dialogue("re", "le")),
]


@pytest.mark.parametrize("form", ["jsonl", "gz", "parquet"])
def test_dialogues_for_a_reward_model(processes, tmp_path, capsys, form):
    """Whole dialogues are read as they are, without a template; those with an empty answer are left out."""
    name = tmp_path / "harmless-base"
    if form == "gz":  # as in the real repository
        packed(name / "train.jsonl.gz", DIALOGUES)
        packed(name / "test.jsonl.gz", DIALOGUES[:1])
        assert len(load_pairs(name, "test")) == 1
    else:
        name.mkdir()
        name = tiny.write_rows(name / f"train.{form}", DIALOGUES)
    pairs = load_pairs(name)
    assert "--dataset: dropped 2 of 5 pairs, whose answer is empty" in capsys.readouterr().out
    assert [pair["responses"] for pair in pairs] == [[" ke sa", " le"], [" di ke ba", " te"], [" me", " le"]]
    assert pairs[1]["prompt"] == dialogue("mu", "ra", "fo?", "")[:-1]
    kept = [DIALOGUES[row] for row in (0, 1, 4)]
    for pair, row in zip(pairs, kept, strict=True):
        assert pair["ids"] == [[*TOKENIZER(row[column])["input_ids"], EOS] for column in ("chosen", "rejected")]
    short = load_pairs(name, max_length=6)
    assert [ids for pair in short for ids in pair["ids"]] == [ids[:6] for pair in pairs for ids in pair["ids"]]


def test_a_file_may_be_packed(tmp_path):
    packed(tmp_path / "train.jsonl.gz", DIALOGUES)
    assert len(load_pairs(tmp_path / "train.jsonl.gz")) == 3


def test_a_reward_model_of_dialogues(run, tmp_path):
    """A run from end to end; the chosen answer is the one with a higher score to learn."""
    answers = [tiny.make_sentence(torch.Generator().manual_seed(i), 2, 5) for i in range(96)]
    rows = [dict(chosen=dialogue("pi?", f"ba {a}"), rejected=dialogue("pi?", a)) for a in answers]
    train, test = (tiny.write_rows(tmp_path / f"{i}.jsonl", part) for i, part in enumerate((rows[16:], rows[:16])))
    flags = dict(dataset=train, eval_dataset=test, epochs=4, learning_rate=1e-2)
    outcome = run(preference_models, output_dir=tmp_path / "run", **flags)
    assert outcome.code == 0, outcome.err
    assert read_summary(tmp_path / "run")["eval"]["pair_accuracy"] > 0.9
    row = read_lines(tmp_path / "run" / "eval.jsonl")[0]
    assert row["prompt"] == dialogue("pi?", "")[:-1]
    assert row["responses"] == [f" ba {answers[0]}", f" {answers[0]}"]


def test_dialogues_that_cannot_be_read(refused, tmp_path):
    data = tiny.write_rows(tmp_path / "data.jsonl", DIALOGUES)
    flags = dict(dataset=data, eval_dataset=data)
    refused(preference_models, "no column 'prompt'; the columns are chosen, rejected", kind="cost", **flags)
    refused(preference_models, "leave --prompt-template out", prompt_template="ba {prompt}", **flags)
    for number, row in enumerate(
        (dict(chosen="ba", rejected="pi"), DIALOGUES[0] | dict(rejected="pi"), DIALOGUES[0] | dict(chosen=None))
    ):
        broken = tiny.write_rows(tmp_path / f"broken{number}.jsonl", [DIALOGUES[0], row])
        refused(preference_models, "row 1", "'\\n\\nAssistant:'", dataset=broken)
    empty = tiny.write_rows(tmp_path / "empty.jsonl", DIALOGUES[2:4])
    refused(preference_models, "all answers are empty", dataset=empty)


# ---- Supervised texts for the PTX term


ALPACA = [
    dict(instruction="ba pi", input="", output="ke sa."),
    dict(instruction="ba", input="le ra", output="mu"),
    dict(instruction="fo", input="", output=""),
    dict(instruction="ba", input="le ra", output="mu"),
    dict(instruction="ba le", input="ra", output="mu"),
    dict(instruction="ke", input=None, output="  "),
    dict(instruction="ke", input=None, output="ba pi ke sa le ra mu fo di"),
    dict(instruction="ba pi ke sa le", input="", output="ra"),
]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_alpacas_columns(processes, tmp_path, capsys, form):
    """Equal texts count once, also where instruction and input part a prompt elsewhere; what is dropped is counted."""
    data = tiny.write_rows(tmp_path / f"alpaca.{form}", ALPACA)
    texts = load_supervised(data, max_prompt_length=4, max_new_tokens=5, prompt_template="{prompt} ")
    assert [(words(prompt), words(response)) for prompt, response in texts] == [
        ("ba pi", "ke sa . <eos>"),
        ("ba le ra", "mu <eos>"),
        ("ke", "ba pi ke sa le ra mu fo"),  # nine tokens together, without EOS as the end is cut off
    ]
    assert "--ptx-dataset: dropped 5 of 8 texts" in capsys.readouterr().out
    assert len(load_supervised(data, max_prompt_length=5, ptx_split="train[1:]", prompt_template="{prompt} ")) == 3


def test_prompts_and_responses_in_a_template(processes, tmp_path):
    """The prompt's part is the template around it, whatever stands behind the prompt; the response's ends in EOS."""
    rows = [dict(prompt="ba?", response="pi ke"), dict(prompt="sa le", response="ra <eos>")]
    data = tiny.write_rows(tmp_path / "texts.jsonl", [row | dict(instruction="x") for row in rows])
    texts = load_supervised(data, prompt_template="mu {prompt} fo ")
    expected = [("mu ba ? fo", "pi ke <eos>"), ("mu sa le fo", "ra <eos>")]
    assert [(words(prompt), words(response)) for prompt, response in texts] == expected
    # A prompt's last token that joins with the response is one the policy would not have sampled after that prompt.
    joined = load_supervised(tiny.write_rows(tmp_path / "joined.jsonl", [dict(prompt="ba k", response="e sa")]))
    assert [(words(prompt), words(response)) for prompt, response in joined] == [("ba", "ke sa <eos>")]
    # One whose only token joins leaves nothing that the response's first token could be predicted from.
    with pytest.raises(repo.UserError, match="no token of the prompt 'k' comes before its response"):
        load_supervised(tiny.write_rows(tmp_path / "alone.jsonl", [dict(prompt="k", response="e sa")]))


def test_supervised_texts_as_tensors():
    """Prompts end and responses begin at the same column; the mask counts the responses with their EOS."""
    texts = [([5, 6, 7], [8, 1]), ([9], [10, 11, 12, 1])]
    sequences, attention_mask, response_mask = repo.pad_texts(texts, 2)
    assert sequences.tolist() == [[5, 6, 7, 8, 1, 2, 2], [2, 2, 9, 10, 11, 12, 1]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert response_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_the_ptx_loss_of_a_run(run, files, tmp_path):
    """The first loss of a run is the mean over the response tokens of the library's own next-token loss."""
    rows = [ALPACA[0], ALPACA[1]]  # of the 16 texts of a batch eight are each of the two
    data = tiny.write_rows(tmp_path / "alpaca.jsonl", rows)
    flags = dict(ptx_dataset=data, ptx_coef=3, prompt_template="{prompt} ")
    outcome = run(repo, output_dir=tmp_path / "run", total_episodes=16, **flags)
    assert outcome.code == 0, outcome.err
    plain, loss_sum, tokens = AutoModelForCausalLM.from_pretrained(files.policy).eval(), 0.0, 0
    for prompt, response in (("ba pi", "ke sa."), ("ba le ra", "mu")):
        start, ids = len(prompt.split()), [*TOKENIZER(f"{prompt} {response}")["input_ids"], EOS]
        labels = torch.tensor([[-100] * start + ids[start:]])
        count = len(ids) - start
        with torch.no_grad():
            loss_sum += plain(torch.tensor([ids]), labels=labels).loss.item() * count
        tokens += count
    found = read_lines(tmp_path / "run" / "metrics.jsonl")[0]["ptx_loss"]
    assert found == pytest.approx(loss_sum / tokens, rel=1e-5)


def test_data_with_both_forms_are_read_in_the_first(processes, tmp_path):
    """Data that have all the columns a script asks for are never taken for the other form."""
    row = dict(prompt="ba", response="pi", instruction="ke", input="", output="sa")
    data = tiny.write_rows(tmp_path / "both.jsonl", [row])
    others = ("instruction", "input", "output")
    rows = repo.load_rows(str(data), "train", ["prompt", "response"], "--ptx-dataset", others)
    assert rows == dict(prompt=["ba"], response=["pi"])
    rows = repo.load_rows(str(data), "train", ["prompt", "answer"], "--ptx-dataset", others)
    assert rows == dict(instruction=["ke"], input=[""], output=["sa"])


def test_supervised_texts_that_cannot_be_used(refused, tmp_path):
    cases = [
        ([dict(prompt="ba")], "no column 'response' (nor all of instruction, input, output); the columns are prompt"),
        ([dict(instruction="ba", output="pi")], "no column 'prompt' (nor all of instruction, input, output)"),
        ([dict(prompt="ba", response=" ")], "no text has a response"),
        ([dict(prompt="", response="ba")], "row 0 has an empty 'prompt'"),
        ([dict(instruction=" ", input="", output="ba")], "row 0 has an empty 'prompt'"),
        ([dict(prompt="ba", response=3)], "response"),
    ]
    for number, (rows, part) in enumerate(cases):
        data = tiny.write_rows(tmp_path / f"{number}.jsonl", rows)
        refused(repo, f"--ptx-dataset {data}", part, ptx_dataset=data)


# ---- The Hub itself


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub's interface as loading needs, on this machine: {("models", id): folder}, one revision each."""

    daemon_threads = True

    def __init__(self, repositories: dict[tuple[str, str], Path]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.requests = repositories, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Answer(http.server.BaseHTTPRequestHandler):
    """One request to the Hub."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing on standard error."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.requests.append((self.command, "/".join(words)))
        if words[0] == "api":
            kind, name, rest = words[1], "/".join(words[2:4]), words[4:]
        else:
            kind = words.pop(0) if words[0] == "datasets" else "models"
            name, rest = "/".join(words[:2]), words[2:]
            kind, rest = (kind, rest) if rest[:1] == ["resolve"] else ("", rest)
        folder = self.server.repositories.get((kind, name))
        if folder is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if rest[:1] == ["resolve"]:
            if rest[1] not in ("main", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            file = files.get("/".join(rest[2:]))
            if file is None:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        entries = [
            {"type": "file", "oid": "0" * 40, "size": file.stat().st_size, "path": path} for path, file in files.items()
        ]
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            chosen = [entry for entry in entries if not below or entry["path"].startswith(f"{below}/")]
            folders = {str(parent) for entry in entries for parent in Path(entry["path"]).parents} - {"."}
            chosen += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
            if below and not chosen:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self.send(200, json.dumps(chosen).encode())
        if rest[:1] == ["paths-info"]:
            wanted = set(json.loads(body)["paths"])
            return self.send(200, json.dumps([entry for entry in entries if entry["path"] in wanted]).encode())
        if rest and rest[0] != "revision":
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        info = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        info |= {
            "downloads": 0,
            "likes": 0,
            "lastModified": "2024-01-01T00:00:00.000Z",
            "createdAt": "2024-01-01T00:00:00.000Z",
        }
        info["siblings"] = [{"rfilename": path} for path in files]
        return self.send(200, json.dumps(info).encode())

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def as_safe_rlhf(folder: Path) -> Path:
    """A score model's weights under the names of Safe RLHF's own class, each in a file of its own."""
    names = {"score.weight": "score_head.weight", "score.bias": "score_head.bias"}
    weights = load_file(folder / "model.safetensors") | {"normalizer.mean": torch.zeros(1)}
    where = {
        names.get(name, name): f"model-{i:05}-of-{len(weights):05}.safetensors" for i, name in enumerate(weights, 1)
    }
    for (name, file), value in zip(where.items(), weights.values(), strict=True):
        save_file({name: value}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    tiny.edit_json(folder / "config.json", architectures=["LlamaForScore"], do_normalize=False)
    return folder


@pytest.fixture
def online(files, repository, tmp_path, monkeypatch):
    """A Hub with a policy, a score model of Safe RLHF in several files, a cost model and pairs; nothing is cached."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    hub = Hub(
        {
            ("models", "some/policy"): files.policy,
            ("models", "some/beaver"): as_safe_rlhf(tiny.copy_model(files.cost, tmp_path / "beaver")),
            ("models", "some/cost"): files.cost,
            ("datasets", "some/PKU-SafeRLHF"): repository,
        }
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # it would ask a service for a file that is not there
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()

    def close():
        hub.shutdown()
        hub.server_close()
        thread.join()

    with contextlib.ExitStack() as stack:
        stack.callback(close)
        yield SimpleNamespace(hub=hub, close=lambda: stack.pop_all().close())


NAMES = dict(model="some/policy", reward_model="some/beaver", cost_model="some/cost")
DATA = dict(dataset="some/PKU-SafeRLHF", eval_dataset="some/PKU-SafeRLHF", dataset_split="train[:80%]")


def begin(defaults, folder: Path, processes: int | None = None, **flags):
    """Start repo.py beside no file of that name; its output goes to `folder`."""
    flags = defaults["repo"] | dict(eval_split="test", total_episodes=16, output_dir=folder) | DATA | flags
    return start([ROOT / "repo.py", *command(**flags)], processes=processes, cwd=folder.parent)


def test_a_run_of_models_and_data_of_the_hub(run, defaults, files, repository, online, tmp_path, monkeypatch):
    """Two processes download at once; without the Hub a run goes by the cache. The figures are those of local files."""
    # Names that nobody has end at once, and leave the cache to the run beside them.
    absent = [
        begin(defaults, tmp_path / "out", **NAMES | flags) for flags in (dict(model="some/none"), dict(dataset="x/y"))
    ]
    first = begin(defaults, tmp_path / "first", processes=2, **NAMES)
    for process, part in zip(
        absent, ("--model some/none: there is no path", "--dataset x/y: there is no path"), strict=True
    ):
        outcome = finish(process)
        assert outcome.code == 2 and len(outcome.errors) == 1 and part in outcome.err, outcome.err
        assert "RepositoryNotFoundError" in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
    outcome = finish(first)
    assert outcome.code == 0, outcome.err
    fetched = {path.rpartition("/")[2] for verb, path in online.hub.requests if verb == "GET"}
    assert {"model-00002-of-00023.safetensors", "train-00001-of-00002.parquet"} <= fetched
    online.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = finish(begin(defaults, tmp_path / "second", **NAMES))
    assert outcome.code == 0, outcome.err
    local = dict(dataset=repository, eval_dataset=repository, eval_split="test", dataset_split="train[:80%]")
    outcome = run(repo, output_dir=tmp_path / "local", total_episodes=16, reward_model=files.cost, **local)
    assert outcome.code == 0, outcome.err
    expected = read_lines(tmp_path / "local" / "eval.jsonl")
    for name in ("first", "second"):
        rows = read_lines(tmp_path / name / "eval.jsonl")
        assert len(rows) == len(expected) == 10
        for row, other in zip(rows[:5], expected[:5], strict=True):
            assert row == other | {key: pytest.approx(other[key], abs=1e-4) for key in ("reward", "cost")}
            assert row["reward"] == pytest.approx(row["cost"], abs=1e-4)  # the same model under other names
