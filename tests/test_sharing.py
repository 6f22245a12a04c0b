"""Model cards, pushing to the Hub, Weights & Biases.

A server on this machine speaks as much of the Hub's protocol as uploads and downloads need. W&B writes its offline
runs, which its own reader (`wandb leet inspect`) reads back.
"""

import base64
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest
import tiny
import torch
from helpers import ROOT, changed, command, contents, finish, read_lines, read_summary, run_main, start
from huggingface_hub import ModelCard
from test_data import COMMIT, Answer, Hub
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo_lagrange
import preference_models
import repo
import sacpo

SCRIPTS = (repo, ppo_lagrange, sacpo, preference_models)
TOKEN, READER = "hf_thetokenthatmaywrite", "hf_thetokenthatonlyreads"


# ---- A Hub that can be written to


class Writable(Hub):
    """A Hub with repositories below a folder; `fail` is the part of a path that it answers with 500."""

    def __init__(self, folder: Path):
        super().__init__({})
        self.RequestHandlerClass = Writing
        self.folder, self.fail, self.visibility, self.lfs, self.large = folder, "", {}, {}, True

    def create(self, name: str) -> Path:
        self.repositories["models", name] = self.folder / name
        self.repositories["models", name].mkdir(parents=True, exist_ok=True)
        return self.repositories["models", name]


class Writing(Answer):
    """One request to it: what changes a repository here, the rest as a Hub that is read."""

    def do_PUT(self):
        self.answer()

    def answer(self):
        hub, address = self.server, urlsplit(self.path)
        words = address.path.strip("/").split("/")
        name = "/".join(words[2:4]) if words[0] == "api" else "/".join(words[:2]).removesuffix(".git")
        rest = words[4:] if words[0] == "api" else words[2:]
        reads = (self.command in ("GET", "HEAD") and "auth-check" not in rest) or rest[:1] == ["paths-info"]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if reads and token in ("", TOKEN, READER):
            return super().answer()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, address.path.strip("/")))
        if hub.fail and hub.fail in address.path:
            return self.send(500, b'{"error": "the disk is on fire"}')
        if words[0] == "store":  # presigned: the address is the permission
            assert hashlib.sha256(body).hexdigest() == words[1]
            hub.lfs[words[1]] = body
            return self.send(200, b"")
        if token not in (TOKEN, READER):
            return self.send(401, b'{"error": "Invalid username or password."}')
        if token == READER:
            return self.send(403, b'{"error": "You do not have the rights to write."}')
        if words[1:] == ["repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if ("models", name) in hub.repositories:
                return self.reply({"error": "You already created this model repo"}, 409)
            hub.visibility[name] = wanted.get("visibility") or wanted.get("private")
            hub.create(name)
            return self.reply({"url": f"{hub.address}/{name}", "id": name})
        if words[1:] == ["validate-yaml"]:
            assert json.loads(body)["content"].startswith("---\n")
            return self.reply({"errors": [], "warnings": []})
        folder = hub.repositories.get(("models", name))
        if folder is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["auth-check"]:
            return self.reply({})
        if rest[:1] == ["preupload"]:
            large = [hub.large and file["path"].endswith(".safetensors") for file in json.loads(body)["files"]]
            modes = zip(json.loads(body)["files"], large, strict=True)
            files = [
                {"path": file["path"], "uploadMode": "lfs" if big else "regular", "shouldIgnore": False, "oid": None}
                for file, big in modes
            ]
            return self.reply({"files": files})
        if rest[-1:] == ["batch"]:
            objects = [
                wanted | {"actions": {"upload": {"href": f"{hub.address}/store/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self.reply({"objects": objects, "transfer": "basic"})
        assert rest[:1] == ["commit"] and not parse_qs(address.query), self.path
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] != "header":
                content = hub.lfs[value["oid"]] if entry["key"] == "lfsFile" else base64.b64decode(value["content"])
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / value["path"]).write_bytes(content)
        self.reply({"commitUrl": f"{hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def reply(self, value: dict, status: int = 200):
        self.send(status, json.dumps(value).encode())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub to write to, for this process and for those that it starts, with a token that may."""
    server = Writable(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    online = dict(HF_ENDPOINT=server.address, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
    for name, value in (online | dict(HF_HOME=tmp_path / "cache", DISABLE_SAFETENSORS_CONVERSION="1")).items():
        monkeypatch.setenv(name, str(value))
    constants = huggingface_hub.constants  # read when the library was imported
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


# ---- W&B


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """Folder of W&B's offline runs; nothing of this machine's settings or keys is seen."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    values = dict(WANDB_DIR=tmp_path, WANDB_MODE="offline", WANDB_CONSOLE="off", WANDB_SILENT="true", HOME=tmp_path)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    wandb.teardown()
    yield tmp_path / "wandb"
    wandb.teardown()


def inspect(folder: Path) -> list[dict]:
    """The records of the one offline run in a folder, by W&B's own reader."""
    (file,) = folder.glob("run-*.wandb")
    from wandb.util import get_core_path  # the program behind `wandb leet inspect`

    words = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, folder.parent]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def history(records: list[dict]) -> list[dict]:
    """The figures that were logged, one dictionary a step."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]


# ---- Cards


def read_card(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md")
    text = str(card)
    for heading in ("Results", "Method", "Settings", "How it was made", "Limits", "Licence", "Citation"):
        assert f"\n## {heading}\n" in text
    assert card.data.license is None and card.data.library_name == "transformers"
    assert {"rlhf", "safe-rlhf"} <= set(card.data.tags)
    assert str(ROOT) not in text  # a default is named by its path in the project
    return card


def cells(card: ModelCard, first: str) -> list[str]:
    """The cells of the row of a table that begins with a name."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \| (.*) \|$", card.text, re.MULTILINE)
    return row.split(" | ")


def test_the_cards_of_the_policies(repo_run, lagrange_run, files):
    """Figures are those of summary.json; settings those of args.json, but for what does not change the result."""
    ids = {repo: "2410.19933", ppo_lagrange: "2310.12773"}
    for script, folder in ((repo, repo_run), (ppo_lagrange, lagrange_run)):
        card, summary = read_card(folder / "model"), read_summary(folder)
        assert card.data.pipeline_tag == "text-generation" and card.data.tags[0] == script.__name__.replace("_", "-")
        assert card.data.base_model is None and card.data.datasets is None  # paths are no ids
        for name in ("reward", "cost", "safety_compliance", "violation", "response_length"):
            expected = [f"{summary[when][name]:.4g}" for when in ("before", "after")]
            assert cells(card, name.replace("_", " ")) == expected
        args = json.loads((folder / "args.json").read_text())
        for name, value in args.items():
            row = f"| `--{name.replace('_', '-')}` |"
            assert (row in card.text) == (name not in script.MAY_CHANGE.split() and value is not None), name
        assert cells(card, "`--model`") == [f"`{files.policy}`"] and cells(card, "`--lambda-init`") == ["`1.0`"]
        assert f"[arXiv {ids[script]}](https://arxiv.org/abs/{ids[script]})" in card.text
        assert f"python {script.__name__}.py --dataset {files.train}" in card.text
        assert cells(card, "seed") == ["1"] and cells(card, "processes") == ["1"] and cells(card, "device") == ["CPU"]
        assert cells(card, "computed in") == ["float32, weights in float32"]
        assert f"torch {torch.__version__}" in card.text and "went on from checkpoint" not in card.text
        assert f"{summary['wall_seconds']:.0f} s" == cells(card, "wall time")[0]
    assert "{C - d}^+" in read_card(repo_run / "model").text.partition("## Method")[2]


def test_ids_of_the_hub_are_named_and_paths_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    ids = ("PKU-Alignment/alpaca-7b-reproduced", "gpt2")
    others = ("some/model", str(tmp_path), "/gone/model", "a/b/c", "no id", "double--dash", "x.git", "", None)
    for script in SCRIPTS:
        assert [name for name in (*ids, *others) if script.is_hub_id(name)] == [*ids]


@pytest.fixture
def card_of(processes, tmp_path, monkeypatch):
    """card_of(args, results): the card that repo.py writes beside a model's configuration."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')

    def card_of(args=None, results=None, saved=None, words=()):
        monkeypatch.setattr(sys, "argv", ["/home/somebody/secret/repo.py", *words])
        settings = (torch.bfloat16, 59.6, saved or {})
        repo.write_card(args or repo.Args(), tmp_path / "model", "aligned", "Means.", results or {}, *settings)
        return read_card(tmp_path / "model")

    return card_of


def test_a_card_names_base_and_data_by_their_ids(card_of):
    names = dict(model="org/base", dataset="org/prompts", eval_dataset="org/prompts", ptx_dataset="org/texts")
    card = card_of(repo.Args(**names), words=["--model", "org/base"])
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/prompts", "org/texts"]
    assert card.data.pipeline_tag == "text-generation" and "# base: aligned\n" in card.text
    assert "python repo.py --model org/base\n" in card.text and "somebody" not in str(card)


def test_a_card_of_odd_figures_and_settings(card_of):
    """Figures that are not finite, a template with everything that Markdown could take for its own, a resumed run."""
    template = "<|user|>\n{prompt} `x` ```y"
    results = {"before": {"reward": math.nan, "cost": -1.0}, "after": {"reward": 1.23456, "cost": math.inf}}
    saved = {"checkpoint": "runs/x/checkpoints/00000030"}
    card = card_of(repo.Args(prompt_template=template), results, saved, ["--prompt-template", template, "--resume"])
    assert cells(card, "reward") == ["not finite", "1.235"] and cells(card, "cost") == ["-1", "not finite"]
    assert cells(card, "`--prompt-template`") == ["```` <\\|user\\|>\\n{prompt} `x` ```y ````"]
    assert cells(card, "went on from checkpoint") == ["30; the time is that of all parts"]
    assert cells(card, "wall time") == ["60 s"] and cells(card, "computed in") == ["bfloat16, weights in float32"]
    assert cells(card, "`--model`") == ["`toy/policy`"] and card.text.count("````bash") == 1


def test_a_card_that_fails_ends_no_run(card_of, tmp_path, capsys):
    (tmp_path / "model" / "README.md").mkdir()
    repo.write_card(repo.Args(), tmp_path / "model", "aligned", "", {}, torch.float32, 1.0, {})
    message = capsys.readouterr().err
    assert message.startswith(f"the model card of {tmp_path / 'model'} could not be written: ")
    assert len(message.splitlines()) == 1


def test_a_run_that_is_given_up_leaves_a_card(run, tmp_path, files):
    def broken(weights):
        weights["score.weight"][:] = math.nan

    reward = tiny.copy_model(files.reward, tmp_path / "reward", broken)
    outcome = run(repo, output_dir=tmp_path / "run", reward_model=reward)
    assert outcome.code == 2 and "not finite" in outcome.errors[0]
    assert "the run was given up in iteration 2" in read_card(tmp_path / "run" / "model").text


def test_the_scripts_agree_on_what_may_change():
    assert len({script.MAY_CHANGE for script in SCRIPTS}) == 1
    names = set(repo.MAY_CHANGE.split())
    assert names <= {field.name for field in dataclasses.fields(repo.Args)}


# ---- Pushing


def test_two_processes_push_and_track(defaults, files, hub, offline_wandb, tmp_path):
    """The bytes on the Hub are those on disk, and loaded from there they are the same model; one rank speaks to W&B."""
    flags = defaults["repo"] | dict(output_dir=tmp_path / "run", push_to_hub="me/aligned", track=True)
    outcome = finish(start([ROOT / "repo.py", *command(**flags)], processes=2, cwd=tmp_path))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(f"pushed to {hub.address}/me/aligned") == 1
    assert contents(hub.folder / "me" / "aligned") == contents(tmp_path / "run" / "model")
    assert hub.visibility == {"me/aligned": "private"} and len(hub.lfs) == 1
    assert cells(read_card(tmp_path / "run" / "model"), "processes") == ["2"]
    assert "torchrun --nproc_per_node 2 repo.py --dataset" in (tmp_path / "run" / "model" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained("me/aligned", cache_dir=tmp_path / "cache").state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    tokenizer = AutoTokenizer.from_pretrained("me/aligned", cache_dir=tmp_path / "cache")
    assert tokenizer.get_vocab() == tiny.make_tokenizer().get_vocab()
    check_tracked(tmp_path / "run", offline_wandb)
    # The token is in no file of the run, and in none of W&B.
    for folder in (tmp_path / "run", offline_wandb, hub.folder):
        assert not [name for name, content in contents(folder).items() if TOKEN.encode() in content]


def check_tracked(folder: Path, offline_wandb: Path) -> None:
    """The one offline run holds the flags, and line for line the figures of metrics.jsonl."""
    (tracked,) = offline_wandb.glob("offline-run-*")
    records = inspect(tracked)
    assert [record["type"] for record in records].count("exit") == 1  # it has come to its end
    (begun,) = [record["run"] for record in records if record["type"] == "run"]
    assert begun["run_id"] == (folder / "wandb_id").read_text().strip() == tracked.name.rpartition("-")[2]
    assert begun["display_name"] == folder.name and begun["project"] == "safe-rlhf"
    args = json.loads((folder / "args.json").read_text())
    config = begun["config"]["update"]
    assert {name: config[name] for name in args} == args and set(config) - set(args) <= {"_wandb"}
    metrics = read_lines(folder / "metrics.jsonl")
    logged = history(records)
    assert len(logged) == len(metrics) == 2
    for ours, theirs in zip(metrics, logged, strict=True):
        assert theirs["_step"] == ours["iteration"]
        assert {name: theirs[name] for name in ours} == pytest.approx(ours)


@pytest.mark.parametrize(
    "case, parts",
    [
        ("offline", ["HF_HUB_OFFLINE is set"]),
        ("no token", ["needs a token", "hf auth login", "HF_TOKEN"]),
        ("no namespace", ["--push-to-hub aligned is not the id of a repository", "namespace/name"]),
        ("no id", ["--push-to-hub me/../x is not the id"]),
        ("unknown token", ["401", "Invalid username or password"]),
        ("reader", ["403", "rights to write"]),
        ("somebody's", ["403", "rights to write"]),
        ("no server", ["--push-to-hub me/aligned", "refused"]),
    ],
)
def test_what_cannot_be_pushed_is_told_before_any_work(run, hub, tmp_path, monkeypatch, case, parts):
    name = {"no namespace": "aligned", "no id": "me/../x"}.get(case, "me/aligned")
    if case == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if case == "no token":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    if case == "no server":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    if case == "somebody's":  # it is there and may be read
        hub.create(name)
    monkeypatch.setenv("HF_TOKEN", {"unknown token": "hf_x", "reader": READER, "somebody's": READER}.get(case, TOKEN))
    with changed(repo, load_tokenizer=None):  # nothing is loaded before
        outcome = run(repo, output_dir=tmp_path / "run", push_to_hub=name)
    assert outcome.code == 2 and outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1, outcome.err
    assert all(part in outcome.err for part in parts) and "hf_" not in outcome.err, outcome.err
    assert not (tmp_path / "run").exists() and not hub.visibility


def test_an_upload_that_fails_leaves_a_finished_run(run, hub, tmp_path):
    """It says how to push by hand; --resume pushes, too, and changes nothing else. Flags of pushing may be others."""
    hub.fail, folder = "/commit/", tmp_path / "run"
    outcome = run(repo, output_dir=folder, push_to_hub="me/aligned", no_hub_private=True)
    assert outcome.code == 2 and len(outcome.errors) == 1 and "Traceback" not in outcome.err, outcome.err
    assert "500" in outcome.err and f"hf upload me/aligned {folder / 'model'} ." in outcome.errors[0]
    assert read_summary(folder)["episodes"] == 32 and hub.visibility == {"me/aligned": "public"}
    AutoModelForCausalLM.from_pretrained(folder / "model")
    before, hub.fail = contents(folder), ""
    outcome = run(repo, output_dir=folder, resume=True, push_to_hub="me/other")
    assert outcome.code == 0 and "is finished" in outcome.out and "pushed to" in outcome.out, outcome.err
    assert contents(folder) == before and contents(hub.folder / "me" / "other") == contents(folder / "model")


def test_sacpo_pushes_its_last_stage_and_its_mixtures(processes, defaults, hub, tmp_path, files):
    flags = {name: defaults["repo"][name] for name in ("dataset", "eval_dataset", "eval_split", "dtype", "model")}
    flags |= dict(batch_size=16, output_dir=tmp_path / "run", merge_q=0.5, push_to_hub="me/steps")
    outcome = run_main(sacpo, processes, command(**flags))
    assert outcome.code == 0, outcome.err
    pushed = hub.folder / "me" / "steps"
    mixture = {f"merged/q0.5/{name}": content for name, content in contents(tmp_path / "run/merged/q0.5").items()}
    assert contents(pushed) == contents(tmp_path / "run" / "stage2") | mixture
    results = read_summary(tmp_path / "run")["stages"]
    for stage, result in enumerate(results, start=1):
        card = read_card(tmp_path / "run" / f"stage{stage}")
        assert f": stage {stage} of SACPO, {('helpful', 'safe')[stage - 1]} by DPO\n" in card.text
        assert cells(card, "chosen log ratio") == [f"{result['eval']['chosen_log_ratio']:.4g}"]
    assert "P-SACPO, 0.5 of stage 1 and 0.5 of stage 2" in read_card(tmp_path / "run/merged/q0.5").text


def test_a_score_model_is_pushed_by_the_librarys_default_way(run, files, hub, tmp_path, monkeypatch):
    """With hf_xet, as it is installed: commits in batches. (A server of xet itself is out of reach: all is small.)"""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.large = False
    for kind, model, head in (("reward", files.policy, "Sequence"), ("cost", files.cost, "Token")):  # has a bias
        folder = tmp_path / kind
        outcome = run(preference_models, kind=kind, model=model, output_dir=folder, push_to_hub=f"me/{kind}")
        assert outcome.code == 0 and not hub.lfs, outcome.err
        assert contents(hub.folder / "me" / kind) == contents(folder / "model")
        card, result = read_card(folder / "model"), read_summary(folder)["eval"]
        assert card.data.pipeline_tag == "text-classification" and f": {kind} model\n" in card.text
        assert f"`AutoModelFor{head}Classification`" in card.text
        assert cells(card, "pair accuracy") == [f"{result['pair_accuracy']:.4g}"]
        assert ("\n| sign accuracy |" in card.text) == (kind == "cost")


# ---- W&B


class CutOff(Exception):
    """Stands for a kill."""


def test_a_resumed_run_goes_on_in_the_same_wandb_run(run, offline_wandb, tmp_path):
    folder, saves, save = tmp_path / "run", [], repo.save_checkpoint
    import wandb

    def save_checkpoint(*args):
        save(*args)
        saves.append(args)
        if len(saves) == 1:
            raise CutOff

    flags = dict(output_dir=folder, save_every=1, track=True, total_episodes=48)
    with changed(repo, save_checkpoint=save_checkpoint), pytest.raises(CutOff):
        run(repo, **flags)
    wandb.teardown()  # the end of the process
    name = (folder / "wandb_id").read_text()
    outcome = run(repo, **flags, resume=True)
    assert outcome.code == 0, outcome.err
    assert (folder / "wandb_id").read_text() == name
    parts = [inspect(place) for place in sorted(offline_wandb.glob("offline-run-*"))]
    assert {record["run"]["run_id"] for part in parts for record in part if record["type"] == "run"} == {name.strip()}
    logged = [row for part in parts for row in history(part)]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [row["_step"] for row in logged] == [1, 2, 3] == [row["iteration"] for row in metrics]
    assert [row["kl"] for row in logged] == pytest.approx([row["kl"] for row in metrics])
    assert cells(read_card(folder / "model"), "went on from checkpoint")[0].startswith("1;")


def test_an_absent_server_stops_nothing(run, offline_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    outcome = run(repo, output_dir=tmp_path / "run", track=True)
    assert outcome.code == 0, outcome.err
    assert "--track: W&B cannot be reached and goes offline" in outcome.err
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    check_tracked(tmp_path / "run", offline_wandb)
    assert b"0" * 40 not in b"".join(contents(tmp_path / "run").values())


def test_tracking_online_without_a_key_is_told_before_any_work(run, offline_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with changed(repo, load_tokenizer=None):
        outcome = run(repo, output_dir=tmp_path / "run", track=True)
    assert outcome.code == 2 and len(outcome.errors) == 1, outcome.err
    assert "wandb login" in outcome.errors[0] and "WANDB_MODE=offline" in outcome.errors[0]
    assert not (tmp_path / "run").exists()


def test_the_stages_of_sacpo_stand_apart_in_wandb(processes, defaults, offline_wandb, tmp_path):
    flags = {name: defaults["repo"][name] for name in ("dataset", "eval_dataset", "eval_split", "dtype", "model")}
    outcome = run_main(sacpo, processes, command(**flags, batch_size=16, output_dir=tmp_path / "run", track=True))
    assert outcome.code == 0, outcome.err
    (tracked,) = offline_wandb.glob("offline-run-*")
    logged = [(row["_step"], *[name for name in row if name.endswith("/loss")]) for row in history(inspect(tracked))]
    assert logged == [(1, "stage1/loss"), (2, "stage1/loss"), (3, "stage2/loss"), (4, "stage2/loss")]
