"""evaluate.py judge: real servers on loopback, faults, verdicts that survive a kill, and statistics by other means."""

import collections
import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path

import kills
import numpy as np
import pytest
import tiny
import torch
import world
from helpers import ROOT, changed, command, contents, finish, read_lines, run_main, start
from scipy import optimize
from transformers import AutoModelForCausalLM

import evaluate

KEY = "sk-Wq3-the-key-of-the-tests"
PROMPTS = world.heldout_prompts()[:12]


def asked(text: str) -> tuple[str, str, str, str]:
    """The criterion, the prompt and both answers of a question."""
    pattern = ".*".join(f"<{part}>\n(.*)\n</{part}>" for part in ("request", "first_answer", "second_answer"))
    (criterion,) = (name for name, words in evaluate.CRITERIA.items() if words in text)
    return (criterion, *re.search(pattern, text, re.DOTALL).groups())


class JudgeServer(http.server.ThreadingHTTPServer):
    """An endpoint on loopback. reply(text, number) of the number-th request is a text or None for a completion's
    content, bytes are another body, (status, headers, text) is a fault, "drop" no answer, and "cut" half of one."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.busy = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((time.monotonic(), self.headers, body))
            number = len(server.requests)
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            reply = server.reply(body["messages"][0]["content"], number)
            status, headers = 200, {}
            if reply in ("drop", "cut"):
                self.close_connection = True
                if reply == "cut":
                    self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(reply, tuple):
                status, headers, reply = reply
                content = reply.encode()
            elif isinstance(reply, bytes):
                content = reply
            else:
                message = {"role": "assistant", "content": reply}
                usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                completion = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"]}
                content = json.dumps(completion | {"choices": [choice], "usage": usage}).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        finally:
            with server.lock:
                server.busy -= 1

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """serve(reply): an endpoint that replies so. Returns the server."""
    with contextlib.ExitStack() as stack:

        def serve(reply):
            server = JudgeServer(reply)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(lambda: (server.shutdown(), thread.join(), server.server_close()))
            return server

        yield serve


def scores(first: float, second: float) -> str:
    return json.dumps({"reason": "so it seems {to me}", "first": first, "second": second})


def exact_scores(text: str, number: int = 0) -> str:
    """The toy world as a judge: reward or cost of both answers, on a scale of 1 to 10."""
    criterion, prompt, *answers = asked(text)
    if prompt == "What is two and two?":
        return scores(9, 1)
    if criterion == "helpfulness":  # from -8 to 4
        return scores(*(1 + 9 * (world.exact_reward(prompt, answer) + 8) / 12 for answer in answers))
    return scores(*(10 - 9 * (world.exact_cost(prompt, answer) + 1.5) / 8 for answer in answers))  # from -1.5 to 6.5


def toy_answers(seed: int, careful: float) -> list[str]:
    """Answers to PROMPTS: a warning with probability `careful`, then steps and small talk by chance."""
    chance = random.Random(seed)
    answers = []
    for prompt in PROMPTS:
        verb, _ = world.parse_prompt(prompt)
        sentences = [chance.choice(world.WARNINGS)] if chance.random() < careful else []
        sentences += chance.sample(world.STEPS[verb], chance.randint(0, 4))
        sentences += chance.sample(world.FILLERS, chance.randint(0, 1))
        answers.append(" ".join(sentences) or world.REFUSALS[0])
    return answers


def write_answers(path: Path, answers: dict[str, list[str]], prompts=PROMPTS) -> Path:
    """responses.jsonl as `score` writes it."""
    rows = [
        {"model": name, "index": i, "prompt": prompt, "response": response, "reward": 0.5, "cost": -0.5}
        | {"length": 3, "finished": True}
        for name, responses in answers.items()
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=False))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny.write_rows(path, rows)


MODELS = {"sft": toy_answers(1, 0.2), "ppo": toy_answers(2, 0.0), "repo": toy_answers(3, 1.0)}


@pytest.fixture(scope="module")
def responses(tmp_path_factory) -> Path:
    return write_answers(tmp_path_factory.mktemp("answers") / "responses.jsonl", MODELS)


@pytest.fixture
def judge(processes, responses, monkeypatch, tmp_path):
    """judge(url, *words, **flags): `evaluate.py judge` in this process; writes to tmp_path/out. Returns an Outcome."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def judge(url, *words, draw=False, **flags):
        defaults = dict(judge_model="oracle", base_url=url, output_dir=tmp_path / "out", bootstrap_resamples=50)
        if not any(word == "--responses" for word in words):
            words = ("--responses", responses, *words)
        with changed(evaluate, **({} if draw else {"draw_elo": lambda *args: None})):
            words = ["judge", *command(**defaults | flags), *map(str, words)]
            return run_main(evaluate, processes, words)

    return judge


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def results(folder: Path) -> dict:
    return json.loads((folder / "judge.json").read_text())


def keys(folder: Path) -> list[tuple]:
    rows = read_lines(folder / "verdicts.jsonl")
    return [(row["criterion"], row["index"], row["first"], row["second"]) for row in rows]


def all_keys(pairs, prompts=range(12)) -> list[tuple]:
    return [
        (criterion, index, *order)
        for index in prompts
        for pair in pairs
        for criterion in evaluate.CRITERIA
        for order in (pair, pair[::-1])
    ]


AGAINST_SFT = [("sft", "ppo"), ("sft", "repo")]


# ---- The toy world as a judge


def test_rates_and_elo_agree_with_the_exact_functions(judge, serve, out):
    """Counted from reward and cost of the answers themselves; Elo by another optimizer."""
    server = serve(exact_scores)
    outcome = judge(server.url, all_pairs=True, draw=True)
    assert outcome.code == 0, outcome
    names = list(MODELS)
    exact = {
        "helpfulness": lambda prompt, answer: world.exact_reward(prompt, answer),
        "harmlessness": lambda prompt, answer: -world.exact_cost(prompt, answer),
    }
    for criterion, value in exact.items():
        values = {name: [value(*pair) for pair in zip(PROMPTS, MODELS[name], strict=True)] for name in names}
        wins = np.zeros((3, 3))
        for i, one in enumerate(names):
            for j, other in enumerate(names):
                for a, b in zip(values[one], values[other], strict=True):
                    wins[i, j] += (i != j) * (0.5 if abs(a - b) < 1e-9 else a > b)
        figures = results(out)["criteria"][criterion]
        assert figures["excluded_pairs"] == 0 and figures["pairs"] == 36
        assert figures["position_bias"] == {"pairs": 36, "flipped": 0, "differing": 0, "first_advantage": 0}
        for i, name in enumerate(names[1:], start=1):
            row = figures["models"][name]
            compared = list(zip(values[name], values["sft"], strict=True))
            assert row["wins"]["mean"] == pytest.approx(sum(a > b + 1e-9 for a, b in compared) / 12)
            assert row["ties"]["mean"] == pytest.approx(sum(abs(a - b) < 1e-9 for a, b in compared) / 12)
            assert sum(row[key]["mean"] for key in ("wins", "ties", "losses")) == pytest.approx(1)
            assert row["wins"]["mean"] + row["ties"]["mean"] / 2 == pytest.approx(wins[i, 0] / 12)
        expected = scipy_elo(wins + 0.5 - 0.5 * np.eye(3))
        assert [row["elo"]["mean"] for row in figures["models"].values()] == pytest.approx(expected, abs=1e-3)
        ordered = sorted(names, key=lambda name: figures["models"][name]["elo"]["mean"])
        assert ordered == sorted(names, key=lambda name: wins[names.index(name)].sum())
    assert sorted(keys(out)) == sorted(all_keys([("sft", "ppo"), ("sft", "repo"), ("ppo", "repo")]))
    picture = (out / "elo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and 2_000 < len(picture) < 100_000


def test_what_is_sent_and_what_is_written(judge, serve, out, responses):
    server = serve(exact_scores)
    flags = dict(temperature=0.25, seed=7, max_reply_tokens=99, limit=3, price_in=2.0, price_out=10.0)
    outcome = judge(server.url, **flags, extra_body='{"top_p": 0.5, "seed": null}')
    assert outcome.code == 0, outcome
    (_, headers, body), *others = server.requests
    assert headers["Authorization"] == f"Bearer {KEY}"
    expected = {"model": "oracle", "temperature": 0.25, "max_completion_tokens": 99, "top_p": 0.5}
    assert {key: value for key, value in body.items() if key != "messages"} == expected
    assert len(others) == len(read_lines(out / "verdicts.jsonl")) == 24  # the first was a check
    for row in read_lines(out / "verdicts.jsonl"):
        assert set(row) == set(evaluate.VERDICT)
        assert row["judge"] == "oracle" and row["attempts"] == 1 and row["error"] is None
        assert row["prompt"] == PROMPTS[row["index"]]
        assert row["first_response"] == MODELS[row["first"]][row["index"]]
        assert row["second_response"] == MODELS[row["second"]][row["index"]]
        text = evaluate.question(row["criterion"], row["prompt"], row["first_response"], row["second_response"])
        assert text in [request[2]["messages"][0]["content"] for request in server.requests]
        assert row["reply"] == exact_scores(text) and row["scores"] == evaluate.read_scores(row["reply"])
        assert (row["tokens_in"], row["tokens_out"]) == (100, 7)
    assert f"2,400 tokens in, 168 out, cost {(2400 * 2 + 168 * 10) / 1e6:.2f}" in outcome.out
    assert "24/24" in outcome.err and outcome.err.rstrip().endswith("2,400 tokens in, 168 out, cost 0.01]")
    assert (results(out)["tokens_in"], results(out)["tokens_out"]) == (2400, 168)
    args = json.loads((out / "args.json").read_text())
    fields = {field.name for field in dataclasses.fields(evaluate.Judge)}
    assert set(args) == fields | {"command", "questions_sha256"}
    assert args["command"] == "judge" and args["responses"] == [str(responses)] and args["base"] == "sft"
    assert [line for line in outcome.out.splitlines() if line.startswith("| repo")] != []


def test_requests_at_a_time_are_limited(judge, serve):
    """The first three after the check are answered when all of them are there; never is there a fourth."""
    all_there = threading.Barrier(3, timeout=60)

    def reply(text, number):
        if 2 <= number <= 4:
            all_there.wait()
        time.sleep(0.01)
        return scores(5, 5)

    server = serve(reply)
    assert judge(server.url, concurrency=3, limit=4).code == 0
    assert server.most == 3


def test_two_files_and_the_choice_of_models(judge, serve, out, tmp_path):
    """A folder stands for its responses.jsonl; models of both files are compared; the base comes first."""
    one = write_answers(tmp_path / "one" / "responses.jsonl", {name: MODELS[name] for name in ("sft", "ppo")})
    write_answers(tmp_path / "two" / "responses.jsonl", {"repo": MODELS["repo"], "other": MODELS["sft"]})
    words = ("--responses", one, tmp_path / "two", "--models", "ppo", "repo")
    server = serve(exact_scores)
    assert judge(server.url, *words, base="repo", limit=4).code == 0
    assert sorted(keys(out)) == sorted(all_keys([("repo", "ppo")], range(4)))
    assert list(results(out)["criteria"]["helpfulness"]["models"]) == ["repo", "ppo"]
    assert judge(server.url, *words[:3], limit=4).code == 0  # goes on with all models of both files
    assert len(keys(out)) == len(set(keys(out))) == 16 * 4
    assert list(results(out)["criteria"]["helpfulness"]["models"]) == ["sft", "ppo", "repo", "other"]
    row = results(out)["criteria"]["harmlessness"]["models"]["other"]
    assert row["ties"]["mean"] == 1 and row["elo"]["mean"] == pytest.approx(1000)


# ---- transformers' own server


def verdict_model(folder: Path, words: list[str]) -> Path:
    """A language model that answers everything with these words: each token names the next one, attention nothing."""
    tokenizer = tiny.make_tokenizer(["assistant", *words])
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}assistant"
    config = tiny.make_config(tokenizer, num_hidden_layers=1, max_position_embeddings=1024, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    chain = [*tokenizer.convert_tokens_to_ids(["assistant", *words]), tokenizer.eos_token_id]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(itertools.pairwise(chain)):
            model.model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[following, place] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chatty_model(folder: Path) -> Path:
    """A random language model with a chat template."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    return tiny.make_model(folder, tokenizer=tokenizer, max_position_embeddings=1024)


def test_transformers_server(judge, out, tmp_path):
    """One model whose every verdict is 8 to 3, so that all pairs are ties and all winners flip; one that babbles."""
    steady = verdict_model(tmp_path / "steady", ['{"first":', "8,", '"second":', "3}"])
    babbling = chatty_model(tmp_path / "babbling")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ["-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    server = start(program)
    try:
        while True:
            assert server.poll() is None, finish(server)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.1)
        url, flags = f"http://127.0.0.1:{port}/v1", dict(limit=2, max_reply_tokens=12, retries=1, concurrency=2)
        outcome = judge(url, judge_model=steady, **flags)
        assert outcome.code == 0, outcome
        for row in read_lines(out / "verdicts.jsonl"):
            assert row["scores"] == [8, 3] and row["reply"] == '{"first": 8, "second": 3}' and row["attempts"] == 1
            assert row["tokens_in"] > 100 and row["tokens_out"] == 5
        for figures in results(out)["criteria"].values():
            assert figures["position_bias"] == {"pairs": 4, "flipped": 1, "differing": 1, "first_advantage": 5}
            assert all(figures["models"][name]["ties"]["mean"] == 1 for name in ("ppo", "repo"))
        outcome = judge(url, judge_model=babbling, output_dir=out / "babbling", **flags, draw=True)
        assert outcome.code == 0, outcome
        rows = read_lines(out / "babbling" / "verdicts.jsonl")
        assert len(rows) == 16 and all(row["scores"] is None and row["attempts"] == 2 for row in rows)
        assert all(len(row["reply"].split()) > 3 for row in rows)
        for figures in results(out / "babbling")["criteria"].values():
            assert figures["pairs"] == figures["excluded_pairs"] == 4 and figures["unreadable_verdicts"] == 8
            assert figures["models"]["repo"]["wins"]["mean"] is None
            assert figures["models"]["repo"]["elo"]["mean"] is None
    finally:
        kills.kill(server)


# ---- Faults


FAULTS = {
    "rate limit": (429, {"Retry-After": "1"}, "slow down"),
    "server error": (500, {}, "oh no"),
    "unavailable": (503, {"Content-Type": "text/html"}, "<html>"),
    "dropped connection": "drop",
    "dropped answer": "cut",
}
UNREADABLE = {
    "nonsense": "I like the first one better, 7 steps against 3.",
    "half a character": "nothing \ud800",
    "empty": "",
    "null": None,
    "no choices": b"{}",
    "no choice": b'{"choices": [], "usage": 3}',
    "no JSON": b"<html>",
    "broken JSON": b'"',
    "another type": b"[1]",
}


def test_requests_that_fail_once_are_sent_again(judge, serve, out):
    """All at once, after the check; the one that met the rate limit not before it is asked to."""

    def reply(text, number):
        return [*FAULTS.values()][number - 2] if 2 <= number <= 6 else exact_scores(text)

    server = serve(reply)
    outcome = judge(server.url, limit=1, concurrency=5)
    assert outcome.code == 0, outcome
    rows = read_lines(out / "verdicts.jsonl")
    assert len(rows) == 8 and all(row["scores"] and row["attempts"] == 1 and row["error"] is None for row in rows)
    assert len(server.requests) == 1 + 5 + 8
    for number, name in enumerate(FAULTS, start=1):
        when, _, body = server.requests[number]
        again = [later for later, _, other in server.requests[6:] if other == body]
        assert len(again) == 1 and again[0] - when > (1.0 if name == "rate limit" else 0.3), name


def test_unreadable_verdicts_are_asked_for_again(judge, serve, out):
    """In other words and with another seed, since a judge at temperature zero would repeat itself."""

    def reply(text, number):  # after the check each second reply is of no use, while there are such
        place = number // 2 - 1
        return [*UNREADABLE.values()][place] if number % 2 == 0 and place < len(UNREADABLE) else exact_scores(text)

    server = serve(reply)
    outcome = judge(server.url, limit=2, concurrency=1, seed=5)
    assert outcome.code == 0, outcome
    rows = read_lines(out / "verdicts.jsonl")
    assert [row["attempts"] for row in rows] == [2] * 9 + [1] * 7 and all(row["scores"] for row in rows)
    for place, (name, fault) in enumerate(UNREADABLE.items()):
        first, second = (request[2] for request in server.requests[1 + 2 * place : 3 + 2 * place])
        assert second["seed"] == first["seed"] + 1 == 6, name
        assert second["messages"][0]["content"] == first["messages"][0]["content"] + evaluate.REMINDER
        expected = (100, 7) if isinstance(fault, bytes) else (200, 14)
        assert (rows[place]["tokens_in"], rows[place]["tokens_out"]) == expected, name


def test_verdicts_that_stay_unreadable_are_excluded_and_counted(judge, serve, out):
    """One order of one pair: the whole pair is out, of the rates and of Elo, and of what is left nothing changes."""
    server = serve(lambda text, number: "7 is what I think" if 2 <= number <= 4 else exact_scores(text))
    outcome = judge(server.url, limit=2, concurrency=1)
    assert outcome.code == 0, outcome
    rows = read_lines(out / "verdicts.jsonl")
    assert rows[0]["scores"] is None and rows[0]["attempts"] == 3 and rows[0]["reply"] == "7 is what I think"
    assert all(row["scores"] for row in rows[1:])
    helpful, harmless = results(out)["criteria"].values()
    assert (helpful["pairs"], helpful["excluded_pairs"], helpful["unreadable_verdicts"]) == (4, 1, 1)
    assert (harmless["pairs"], harmless["excluded_pairs"], harmless["unreadable_verdicts"]) == (4, 0, 0)
    assert helpful["models"]["ppo"]["pairs"] == 1 and helpful["models"]["repo"]["pairs"] == 2
    reward = [world.exact_reward(PROMPTS[1], MODELS[name][1]) for name in ("ppo", "sft")]
    assert helpful["models"]["ppo"]["wins"]["mean"] == float(reward[0] > reward[1])
    assert "excluded: 1 of 4 pairs, for 1 unreadable verdicts" in outcome.out


@pytest.mark.parametrize("status", [400, 422])
def test_a_pair_that_the_endpoint_always_refuses_is_excluded_and_counted(judge, serve, out, status):
    """A text may be too long, or filtered. Other requests succeed, so the run goes on; started again, it is done."""

    def reply(text, number):
        if asked(text)[1] == PROMPTS[1]:
            return status, {}, json.dumps({"error": {"message": f"this text is too long, {KEY}"}})
        return exact_scores(text)

    server = serve(reply)
    outcome = judge(server.url, limit=3)
    assert outcome.code == 0, outcome
    rows = read_lines(out / "verdicts.jsonl")
    assert all((row["scores"] is None) == (row["index"] == 1) == (row["error"] is not None) for row in rows)
    assert "too long, ***" in rows[8]["error"] and f"HTTP {status}" in rows[8]["error"]
    for figures in results(out)["criteria"].values():
        assert (figures["excluded_pairs"], figures["refused_verdicts"], figures["unreadable_verdicts"]) == (2, 4, 0)
    assert "and 4 that the endpoint refused" in outcome.out
    count = len(server.requests)
    assert judge(server.url, limit=3).code == 0 and len(server.requests) == count


@pytest.mark.parametrize(
    "fault, parts",
    [
        ((401, {}, json.dumps({"error": {"message": f"wrong key {KEY}"}})), ["HTTP 401", "OPENAI_API_KEY"]),
        ((403, {}, "{}"), ["HTTP 403", "OPENAI_API_KEY"]),
        ((404, {}, "no such model"), ["HTTP 404: no such model"]),
        ((400, {}, "temperature must be 1"), ["HTTP 400: temperature must be 1"]),
        ((429, {"Retry-After": "3600"}, "come back in an hour"), ["HTTP 429", "goes on"]),
    ],
    ids=["wrong key", "forbidden", "unknown model", "unknown field", "long wait"],
)
def test_an_endpoint_that_refuses_everything_ends_the_run_at_once(judge, serve, out, fault, parts):
    server = serve(lambda text, number: fault)
    outcome = judge(server.url)
    assert outcome.code == 2 and len(server.requests) == 1 and not out.exists()
    assert outcome.err.startswith("error: --base-url") and len(outcome.err.splitlines()) == 1
    assert KEY not in outcome.out + outcome.err
    for part in parts:
        assert part in outcome.err


def test_an_endpoint_that_fails_on_the_way_keeps_what_was_judged(judge, serve, out):
    """A key that expires, a server that stays away: one line, and the same command goes on."""
    failing = True

    def reply(text, number):
        return (401, {}, "expired") if failing and number > 10 else exact_scores(text)

    server = serve(reply)
    outcome = judge(server.url, concurrency=2)
    assert outcome.code == 2 and outcome.errors and "HTTP 401: expired" in outcome.errors[0]
    assert 8 <= len(read_lines(out / "verdicts.jsonl")) <= 9
    failing = False
    assert judge(server.url).code == 0
    assert sorted(keys(out)) == sorted(all_keys(AGAINST_SFT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    outcome = judge(nobody, output_dir=out / "none", connection_retries=1)
    assert outcome.code == 2 and "Connection error" in outcome.errors[0] and not (out / "none").exists()


def test_servers_errors_that_stay_are_one_pairs_only_if_others_succeed(judge, serve, out):
    def reply(text, number):
        return (500, {}, "out of memory") if asked(text)[1] == PROMPTS[0] else exact_scores(text)

    outcome = judge(serve(reply).url, limit=2, connection_retries=0)
    assert outcome.code == 0 and results(out)["criteria"]["helpfulness"]["refused_verdicts"] == 4
    broken = serve(lambda text, number: exact_scores(text) if number < 4 else (500, {}, "out of memory"))
    outcome = judge(broken.url, limit=2, connection_retries=0, output_dir=out / "broken", concurrency=1)
    assert outcome.code == 2 and "HTTP 500: out of memory" in outcome.errors[0]
    assert len(read_lines(out / "broken" / "verdicts.jsonl")) == 2


def test_slow_answers_time_out(judge, serve, out):
    def reply(text, number):
        if number == 2:
            time.sleep(1.5)
        return exact_scores(text)

    server = serve(reply)
    outcome = judge(server.url, limit=1, concurrency=1, timeout=0.5)
    assert outcome.code == 0 and all(row["scores"] for row in read_lines(out / "verdicts.jsonl"))
    assert server.requests[1][2] == server.requests[2][2]


# ---- The key


def test_the_key_is_written_nowhere(judge, serve, out, monkeypatch):
    """Not even by an endpoint that sends it back in replies and errors."""

    def reply(text, number):
        if asked(text)[1] == PROMPTS[1]:
            return 400, {}, f"bad key {KEY}"
        return f"{scores(6, 4)} for {KEY}" if number % 2 else f"nothing for {KEY}"

    outcome = judge(serve(reply).url, limit=3, retries=1, draw=True)
    assert outcome.code == 0, outcome
    assert any(row["scores"] for row in read_lines(out / "verdicts.jsonl"))
    assert any(row["reply"].endswith("for ***") for row in read_lines(out / "verdicts.jsonl"))
    monkeypatch.setenv("ANOTHER_KEY", KEY)
    outcomes = [outcome, judge(serve(reply).url, limit=3, retries=1, api_key_env="ANOTHER_KEY")]
    outcomes.append(judge("http://127.0.0.1:9/v1", api_key_env=KEY))
    assert [each.code for each in outcomes] == [0, 0, 2]
    assert all(KEY not in each.out + each.err for each in outcomes)
    found = contents(out)
    assert {"args.json", "verdicts.jsonl", "judge.json", "elo.png"} <= set(found)
    assert [name for name, content in found.items() if KEY.encode() in content] == []


def test_a_server_of_ones_own_needs_no_key(judge, serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(exact_scores)
    assert judge(server.url, limit=1).code == 0
    refusing = serve(lambda text, number: (401, {}, "no key"))
    outcome = judge(refusing.url, limit=1, output_dir=None)
    assert outcome.code == 2 and "OPENAI_API_KEY, which is not set" in outcome.errors[0]


# ---- Going on


def stalling(full: int, workers: int, then=lambda: None):
    """(reply, event): an endpoint that answers the check and `full` questions, and then lets all workers wait."""
    go_on = threading.Event()

    def reply(text, number):
        if number > 1 + full:
            if number == 1 + full + workers:
                then()
            go_on.wait(60)
        return exact_scores(text)

    return reply, go_on


def test_a_run_that_was_killed_goes_on(serve, judge, responses, out):
    """SIGKILL while requests are open, and the last line torn: no verdict is missing and none is there twice."""
    reply, go_on = stalling(30, workers=4)
    server = serve(reply)
    flags = command(base_url=server.url, judge_model="oracle", output_dir=out, concurrency=4, bootstrap_resamples=50)
    process = start([ROOT / "evaluate.py", "judge", "--responses", responses, *flags])
    kills.wait_until(lambda: len(server.requests) == 35, process)
    assert process.poll() is None, finish(process)
    kills.kill(process)
    go_on.set()
    before = (out / "verdicts.jsonl").read_bytes()
    (out / "verdicts.jsonl").write_bytes(before[:-25])
    whole = before[: before.rindex(b"\n", 0, -1) + 1]
    assert whole.count(b"\n") == 29 and not (out / "judge.json").exists()
    outcome = judge(server.url, concurrency=4)
    assert outcome.code == 0, outcome
    assert (out / "verdicts.jsonl").read_bytes().startswith(whole)
    assert sorted(keys(out)) == sorted(all_keys(AGAINST_SFT))
    assert len(server.requests) == 35 + 1 + 96 - 29  # the check and the missing ones
    first = contents(out)
    assert judge(server.url).code == 0 and len(server.requests) == 35 + 1 + 96 - 29  # nothing is missing: no request
    assert all(contents(out)[name] == first[name] for name in ("verdicts.jsonl", "judge.json"))
    assert judge(server.url, output_dir=out / "whole").code == 0
    assert (out / "whole" / "judge.json").read_bytes() == first["judge.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_leave_whole_lines(judge, serve, out, number):
    reply, go_on = stalling(18, workers=3, then=lambda: os.kill(os.getpid(), number))
    outcome = judge(serve(reply).url, concurrency=3)
    go_on.set()
    assert outcome.code == 128 + number
    assert f"stopped with 18 verdicts in {out}; the same command goes on" in outcome.err
    assert len(keys(out)) == 18 and not (out / "judge.json").exists()
    assert judge(serve(exact_scores).url).code == 0
    assert sorted(keys(out)) == sorted(all_keys(AGAINST_SFT))


def test_signals_stop_the_check(judge, serve, out):
    reply, go_on = stalling(-1, workers=1, then=lambda: os.kill(os.getpid(), signal.SIGINT))
    outcome = judge(serve(reply).url)
    go_on.set()
    assert outcome.code == 128 + signal.SIGINT and "stopped with 0 verdicts" in outcome.err and not out.exists()


def test_the_default_directory_is_named_by_what_goes_on(judge, serve, tmp_path, monkeypatch):
    """It bears the time: the same words alone would begin another one and pay for every verdict again."""
    monkeypatch.chdir(tmp_path)
    reply, go_on = stalling(18, workers=3, then=lambda: os.kill(os.getpid(), signal.SIGINT))
    outcome = judge(serve(reply).url, concurrency=3, output_dir=None)
    go_on.set()
    (folder,) = Path("runs").iterdir()
    assert outcome.err.rstrip().endswith(f"the same command goes on, with --output-dir {folder}")
    assert judge(serve(exact_scores).url, output_dir=folder).code == 0
    assert sorted(keys(folder)) == sorted(all_keys(AGAINST_SFT)) and len(list(Path("runs").iterdir())) == 1


def test_a_directory_that_another_process_writes_is_refused(judge, serve, out):
    """Two would ask, and pay, for the same verdicts twice."""
    server = serve(exact_scores)
    assert judge(server.url, limit=1).code == 0
    with evaluate.open_evaluation(out, json.loads((out / "args.json").read_text()), "verdicts.jsonl"):
        before = contents(out)
        outcome = judge(server.url)
        assert outcome.code == 2 and f"--output-dir {out} is in use by another process" in outcome.errors[0]
        assert contents(out) == before
    assert judge(server.url).code == 0
    assert sorted(keys(out)) == sorted(all_keys(AGAINST_SFT))


def test_more_prompts_more_models_and_other_addresses_go_on(judge, serve, out):
    assert judge(serve(exact_scores).url, "--models", "sft", "repo", limit=2).code == 0
    server = serve(exact_scores)
    flags = dict(all_pairs=True, concurrency=2, retries=5, price_in=1.0, bootstrap_resamples=20)
    assert judge(server.url, limit=3, **flags).code == 0
    pairs = [("sft", "ppo"), ("sft", "repo"), ("ppo", "repo")]
    assert sorted(keys(out)) == sorted(all_keys(pairs, range(3)))
    assert len(server.requests) == 36 - 8 + 1


@pytest.fixture(scope="module")
def judged(processes, responses, tmp_path_factory):
    """Folder of a judged comparison that no test changes."""
    folder = tmp_path_factory.mktemp("judged") / "out"
    server = JudgeServer(exact_scores)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    flags = dict(base_url=server.url, judge_model="oracle", output_dir=folder, limit=2, bootstrap_resamples=20)
    outcome = run_main(evaluate, processes, ["judge", "--responses", str(responses), *command(**flags)])
    server.shutdown()
    thread.join()
    server.server_close()
    assert outcome.code == 0, outcome
    return folder


@pytest.fixture
def refused(judge, out):
    """refused(*parts, words=(), **flags): one line that holds the parts, status 2, and nothing changed."""

    def refused(*parts, words=(), **flags):
        folder = Path(flags.get("output_dir") or out)
        before = contents(folder) if folder.is_dir() else None
        outcome = judge("http://127.0.0.1:9/v1", *words, **dict(connection_retries=0) | flags)
        line = outcome.err.strip()
        assert outcome.code == 2 and outcome.out == "", outcome
        assert line.startswith("error: ") and len(line.splitlines()) == 1, outcome.err
        for part in parts:
            assert str(part) in line, f"{part!r} is not in: {line}"
        assert (contents(folder) if folder.is_dir() else None) == before

    return refused


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(judge_model="another"), "--judge-model is another"),
        (dict(seed=2), "--seed is 2"),
        (dict(temperature=0.5), "--temperature is 0.5"),
        (dict(max_reply_tokens=8), "--max-reply-tokens is 8"),
        (dict(extra_body='{"top_p": 1}'), "--extra-body is"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_settings_do_not_go_on(refused, judged, flags, part):
    refused(part, judged, output_dir=judged, **flags)


def test_other_answers_and_questions_do_not_go_on(refused, judged, tmp_path):
    answers = MODELS | {"repo": ["Mind your fingers.", *MODELS["repo"][1:]]}
    other = write_answers(tmp_path / "responses.jsonl", answers)
    refused("the answer of repo to prompt 0", words=("--responses", other), output_dir=judged)
    with changed(evaluate, QUESTION=evaluate.QUESTION.replace("two answers", "both answers")):
        refused("other questions", output_dir=judged)


def test_folders_of_others_are_refused(refused, judge, serve, judged, repo_run, tmp_path):
    refused("another script's run", output_dir=repo_run)
    shutil.copytree(judged, tmp_path / "bare")
    (tmp_path / "bare" / "args.json").unlink()
    refused("verdicts.jsonl", "no args.json", output_dir=tmp_path / "bare")
    shutil.copytree(judged, tmp_path / "broken")
    path = tmp_path / "broken" / "verdicts.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + '{"judge": "oracle"}\n')
    refused("line 17 is no verdict", output_dir=tmp_path / "broken")
    path.write_text(json.dumps(json.loads(lines[0]) | {"scores": [0, "a"]}) + "\n")
    refused("no verdict's", output_dir=tmp_path / "broken")
    (tmp_path / "file").write_text("a file")
    outcome = judge(serve(exact_scores).url, output_dir=tmp_path / "file" / "out")
    assert outcome.code == 2 and outcome.errors[0].startswith("error: --output-dir") and len(outcome.errors) == 1
    refused("--output-dir is empty", output_dir="")


def test_a_directory_of_score_is_refused(refused, tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "args.json").write_text('{"command": "score"}')
    refused("another script's run", output_dir=tmp_path / "suite")


# ---- Mistakes


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(judge_model=None), "--judge-model is empty"),
        (dict(judge_model=" "), "--judge-model is empty"),
        (dict(base_url="localhost:8000"), "--base-url is no address"),
        (dict(base_url="http://"), "--base-url is no address"),
        (dict(base_url="http://a:99999/v1"), "--base-url is no address"),
        (dict(base_url="http://me:secret@a/v1"), "--base-url has more in it"),
        (dict(base_url="http://a/v1?key=secret"), "--base-url has more in it"),
        (dict(api_key_env="sk-1234"), "--api-key-env is no name"),
        (dict(api_key_env="NOT_SET_ANYWHERE"), "--api-key-env names"),
        (dict(temperature=-1), "--temperature is -1"),
        (dict(temperature="nan"), "--temperature is nan"),
        (dict(max_reply_tokens=0), "--max-reply-tokens is 0"),
        (dict(concurrency=0), "--concurrency is 0"),
        (dict(timeout=0), "--timeout is 0"),
        (dict(timeout="inf"), "--timeout is inf"),
        (dict(retries=-1), "--retries is -1"),
        (dict(connection_retries=-1), "--connection-retries is -1"),
        (dict(price_in=-1), "--price-in is -1"),
        (dict(price_out="nan"), "--price-out is nan"),
        (dict(bootstrap_resamples=0), "--bootstrap-resamples is 0"),
        (dict(limit=-1), "--limit is -1"),
        (dict(seed=-1), "--seed is -1"),
        (dict(seed=2**63 - 2), "--seed is"),
        (dict(extra_body="{"), "--extra-body { is no JSON object"),
        (dict(extra_body="[]"), "--extra-body"),
        (dict(extra_body='{"messages": []}'), "--extra-body"),
        (dict(base="nobody"), "--base nobody"),
        (dict(juge_model="x"), "juge-model"),
    ],
    ids=lambda value: ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else "",
)
def test_flags(refused, flags, part):
    refused(part, **flags)


def test_keys_that_no_header_takes(refused, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    refused("OPENAI_API_KEY holds characters")


def test_answers_that_cannot_be_compared(refused, responses, tmp_path):
    refused("--responses is empty", words=("--responses",))
    refused("there is no file", words=("--responses", tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    refused("holds no answers", words=("--responses", tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"model": "a"}\n')
    refused("line 1 is no answer", words=("--responses", tmp_path / "broken.jsonl"))
    refused("both hold a model sft", words=("--responses", responses, responses))
    one = write_answers(tmp_path / "one.jsonl", {"other": MODELS["sft"]})
    refused("hold one model, other", words=("--responses", one))
    shifted = write_answers(tmp_path / "shifted.jsonl", {"other": MODELS["sft"]}, [*PROMPTS[1:], PROMPTS[0]])
    refused("prompt 0 of other is not the one", words=("--responses", responses, shifted))
    short = write_answers(tmp_path / "short.jsonl", {"other": MODELS["sft"][:7]})
    refused("other has no answer to 5 of 12", "first 7", "--limit", words=("--responses", responses, short))
    refused("--models nobody", words=("--models", "sft", "nobody"))
    refused("--models: sft is there twice", words=("--models", "sft", "sft"))
    refused("hold one model, sft", words=("--models", "sft"))
    half = write_answers(tmp_path / "half.jsonl", {"other": ["\ud800", *MODELS["sft"][1:]]})
    refused("prompt 0 of other", "surrogate", words=("--responses", responses, half))


def test_several_processes_are_refused(processes, responses, monkeypatch):
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: 2)
    args = evaluate.Judge(responses=[str(responses)], judge_model="oracle")
    with pytest.raises(evaluate.UserError, match="without torchrun"):
        evaluate.check_args(args)


# ---- Reading a reply


@pytest.mark.parametrize(
    "reply, expected",
    [
        ('{"reason": "x", "first": 7, "second": 4}', [7, 4]),
        ('```json\n{"first": 7.5, "second": "4"}\n```', [7.5, 4]),
        ('Sure! {"First": "7/10", "Second": 10} Anything else?', [7, 10]),
        ('{"first": 1, "second": 2} No, I correct myself: {"second": 3, "first": 4}', [4, 3]),
        ('{"reason": "it says {\\"first\\": 9}", "first": 2, "second": 1}', [2, 1]),
        ('<think>{"first": 1, "second": 9}</think> {"first": 8, "second": 2}', [8, 2]),
        ("First answer: 7/10\nSecond answer: 4/10", [7, 4]),
        ("**First:** 7, **Second:** 4.", [7, 4]),
        ("The first answer's score = 7.5\nThe second answer's score = 10", [7.5, 10]),
        ("7 4", [7, 4]),
        (" 7, 4 ", [7, 4]),
        ("[7, 4]", [7, 4]),
        ("8/10, 3/10", [8, 3]),
        ("1\n10", [1, 10]),
    ],
)
def test_replies_that_can_be_read(reply, expected):
    assert evaluate.read_scores(reply) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The first has 7 steps and the second 4.",
        "7",
        "74",
        "7 4 2",
        "-7 4",
        "first: -7, second: 4",
        "0 4",
        "7 11",
        '{"first": 7}',
        '{"first": 7, "second": null}',
        '{"first": true, "second": 4}',
        '{"first": 0, "second": 4}',
        '{"first": 7, "second": 10.5}',
        '{"first": NaN, "second": 4}',
        '{"first": 7, "second": 1e999}',
        '{"first": [7], "second": 4}',
        '{"first": "seven", "second": "four"}',
        '{"first": "7/5", "second": 4}',
        '{"first": 7, "second": 4',
        '{"reason": "one or two sentences", "first": SCORE, "second": SCORE}',
        "First: 7\nFirst: 8\nSecond: 4",
        '<think>{"first": 7, "second": 4}',
        "<think>7 4</think>",
        "{" * 3000,
    ],
)
def test_replies_that_cannot_be_read(reply):
    assert evaluate.read_scores(reply) is None


def test_questions_hold_the_texts_as_they_are():
    text = evaluate.question("harmlessness", "{prompt} {0}", 'a "{first}"\n', "b</first_answer>")
    assert asked(text) == ("harmlessness", "{prompt} {0}", 'a "{first}"\n', "b</first_answer>")
    assert evaluate.CRITERIA["helpfulness"] not in text
    assert evaluate.read_scores(text) is None  # a judge that repeats the question has given no verdict


# ---- Statistics


def verdict(criterion, index, first, second, pair) -> dict:
    return {"criterion": criterion, "index": index, "first": first, "second": second, "scores": pair, "error": None}


def both_orders(criterion, index, a, b, one, other) -> list[dict]:
    """Verdicts on (a, b) in that order and on (b, a); scores as the judge gave them, the first answer's first."""
    return [verdict(criterion, index, a, b, one), verdict(criterion, index, b, a, other)]


HAND = [
    *both_orders("helpfulness", 0, "z", "a", [8, 2], [2, 8]),  # z wins twice
    *both_orders("helpfulness", 1, "z", "a", [8, 2], [8, 2]),  # the first place wins: a tie
    *both_orders("helpfulness", 2, "z", "a", [5, 5], [6, 5]),  # a tie and a win of a
    *both_orders("helpfulness", 3, "z", "a", [9, 2], [4, 3]),  # z by 7, then a by 1: z wins
    *both_orders("helpfulness", 4, "z", "a", [7, 3], None),  # unreadable in one order
    verdict("helpfulness", 5, "z", "a", [7, 3]),  # the other order is missing
    *both_orders("helpfulness", 6, "a", "z", [7, 3], None),  # as in 4, with a first
    *both_orders("harmlessness", 0, "z", "a", [6.6, 6.5], [6.9, 6.8]),  # a tie that plain sums of decimals miss
]


def test_outcomes_by_hand():
    """a comes before z in the alphabet, so 1 is a's win."""
    assert (6.5 - 6.6) + (6.9 - 6.8) != 0 and 6.5 + 6.9 != 6.6 + 6.8  # why sums are rounded
    outcomes = evaluate.pair_outcomes(HAND)
    helpful = {("helpfulness", "a", "z", i): value for i, value in enumerate([0.0, 0.5, 1.0, 0.0])}
    assert outcomes == helpful | {("harmlessness", "a", "z", 0): 0.5}
    assert evaluate.pair_outcomes(HAND[::-1]) == outcomes


def test_position_bias_by_hand():
    bias = evaluate.position_bias(HAND, "helpfulness")
    assert bias == {
        "pairs": 4,
        "flipped": 2 / 4,  # prompts 1 and 3
        "differing": 3 / 4,  # and 2
        "first_advantage": (0 + 6 + 0.5 + 4) / 4,
    }


def tabulated(verdicts, names, indices, resamples=50, all_pairs=False):
    pairs = [(names[0], name) for name in names[1:]]
    if all_pairs:
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    generator = torch.Generator().manual_seed(0)
    return evaluate.tabulate_verdicts(verdicts, names, pairs, indices, resamples, generator)


@pytest.mark.parametrize("names", [["z", "a"], ["a", "z"]])
def test_rates_by_hand(names):
    """a wins prompt 2, ties prompt 1 and loses prompts 0 and 3; 4, 5 and 6 are out."""
    figures = tabulated(HAND, names, range(7))["helpfulness"]
    a_is_other = names[1] == "a"
    row = figures["models"][names[1]]
    means = [row[key]["mean"] for key in ("wins", "ties", "losses")]
    assert means == ([1 / 4, 1 / 4, 2 / 4] if a_is_other else [2 / 4, 1 / 4, 1 / 4])
    assert row["pairs"] == 4 and figures["pairs"] == 7 and figures["excluded_pairs"] == 3
    assert figures["unreadable_verdicts"] == 2 and figures["refused_verdicts"] == 0
    base = figures["models"][names[0]]
    assert base == {"wins": None, "ties": None, "losses": None, "elo": {"mean": 1000, "low": 1000, "high": 1000}}
    odds = (1.5 + 0.5) / (2.5 + 0.5)  # with the virtual tie
    expected = 1000 + 400 * np.log10(odds if a_is_other else 1 / odds)
    assert row["elo"]["mean"] == pytest.approx(expected)
    assert row["elo"]["low"] < expected < row["elo"]["high"]


def scipy_elo(wins: np.ndarray) -> list[float]:
    """Maximum likelihood by a general optimizer on the plain likelihood, with the first model held."""

    def loss(strength):
        strength = np.append(0, strength)
        return (wins * np.logaddexp(0, strength[None, :] - strength[:, None])).sum()

    found = optimize.minimize(loss, np.zeros(len(wins) - 1), method="BFGS", options={"gtol": 1e-9})
    return (1000 + np.append(0, found.x) * 400 / np.log(10)).tolist()


def test_elo_is_the_maximum_of_the_likelihood():
    """On random tables of two to seven models, all pairs or a star, up to 200 games each; at once and one by one."""
    generator = np.random.default_rng(0)
    for number in range(60):
        models = int(generator.integers(2, 8))
        games = generator.integers(1, 200, (models, models)) * (generator.random((models, models)) < 0.7)
        games[0, 1:] = generator.integers(1, 200, models - 1)  # each is joined to the first
        if number % 3 == 0:
            games[1:] = 0
        games = np.triu(games, 1)
        won = games * generator.beta(0.5, 0.5, games.shape)
        wins = won + (games - won).T + 0.5 * (games + games.T > 0)
        table = torch.from_numpy(wins)
        elo = evaluate.elo_ratings(table)
        assert elo.tolist() == pytest.approx(scipy_elo(wins), abs=0.02)
        # The optimizer above is worth four digits; at the maximum expected wins are the wins, to rounding.
        chance = 1 / (1 + 10 ** ((elo[None, :] - elo[:, None]) / 400))
        assert ((table + table.mT) * chance).sum(1).tolist() == pytest.approx(table.sum(1).tolist(), abs=1e-7)
        batch = evaluate.elo_ratings(torch.stack([table, table.mT, 1000 * table]))
        assert torch.allclose(batch[0], elo) and torch.allclose(batch[2], elo)
        if models == 2:
            assert batch[1].tolist() == pytest.approx([1000, 2000 - elo[1].item()])


def test_elo_of_two_models_is_the_odds():
    elo = evaluate.elo_ratings(torch.tensor([[0.0, 10.0], [100.0, 0.0]], dtype=torch.float64))
    assert elo.tolist() == pytest.approx([1000, 1400])
    extreme = evaluate.elo_ratings(torch.tensor([[0.0, 0.5], [99999.5, 0.0]], dtype=torch.float64))
    assert extreme[1].item() == pytest.approx(1000 + 400 * np.log10(199999))


def test_models_that_nothing_joins_to_the_base_have_no_elo():
    wins = torch.zeros(4, 4, dtype=torch.float64)
    wins[0, 1], wins[1, 0], wins[2, 3], wins[3, 2] = 1.0, 3.0, 5.0, 2.0
    elo = evaluate.elo_ratings(wins)
    assert elo[:2].tolist() == pytest.approx([1000, 1000 + 400 * np.log10(3)]) and elo[2:].isnan().all()


def test_a_model_that_always_wins_has_a_finite_elo():
    """The virtual tie bounds it by the number of games; without it there is no maximum."""
    verdicts = [row for i in range(20) for row in both_orders("helpfulness", i, "base", "best", [2, 9], [9, 2])]
    row = tabulated(verdicts, ["base", "best"], range(20))["helpfulness"]["models"]["best"]
    expected = 1000 + 400 * np.log10(20.5 / 0.5)
    assert row["elo"] == {key: pytest.approx(expected) for key in ("mean", "low", "high")}
    assert row["wins"] == {"mean": 1, "low": 1, "high": 1}


def test_without_a_readable_verdict_there_are_no_figures():
    verdicts = [row for i in range(3) for row in both_orders("helpfulness", i, "base", "best", None, [1, 2])]
    figures = tabulated(verdicts, ["base", "best"], range(3))
    row = evaluate.finite(figures["helpfulness"]["models"]["best"])
    assert row["pairs"] == 0 and row["wins"]["mean"] is None and row["elo"]["mean"] is None
    assert figures["helpfulness"]["unreadable_verdicts"] == 3 and figures["helpfulness"]["excluded_pairs"] == 3
    assert figures["harmlessness"]["excluded_pairs"] == 3 and figures["harmlessness"]["unreadable_verdicts"] == 0


def test_a_judge_that_likes_the_first_place_makes_ties():
    verdicts = [row for i in range(9) for row in both_orders("harmlessness", i, "base", "other", [8, 3], [8, 3])]
    figures = tabulated(verdicts, ["base", "other"], range(9))["harmlessness"]
    assert figures["position_bias"] == {"pairs": 9, "flipped": 1, "differing": 1, "first_advantage": 5}
    assert figures["models"]["other"]["ties"]["mean"] == 1
    assert figures["models"]["other"]["elo"] == {key: pytest.approx(1000) for key in ("mean", "low", "high")}


def test_intervals_are_those_of_the_normal_approximation():
    """Rates: p ± 1.96 sqrt(p(1 - p)/n). Elo of two models: 400/ln 10 times that of the log odds, the delta method."""
    chance, count = random.Random(0), 600
    results = [chance.choices(["win", "tie", "loss"], [0.5, 0.2, 0.3])[0] for _ in range(count)]
    pair = {"win": [2, 9], "tie": [5, 5], "loss": [9, 2]}
    verdicts = [
        row
        for i, name in enumerate(results)
        for row in both_orders("helpfulness", i, "a", "b", pair[name], pair[name][::-1])
    ]
    row = tabulated(verdicts, ["a", "b"], range(count), resamples=4000)["helpfulness"]["models"]["b"]
    shares = collections.Counter(results)
    for key, name in (("wins", "win"), ("ties", "tie"), ("losses", "loss")):
        p = shares[name] / count
        half = 1.96 * (p * (1 - p) / count) ** 0.5
        assert row[key]["mean"] == pytest.approx(p)
        assert row[key]["low"] == pytest.approx(p - half, abs=0.08 * half)
        assert row[key]["high"] == pytest.approx(p + half, abs=0.08 * half)
    values = np.array([{"win": 1.0, "tie": 0.5, "loss": 0.0}[name] for name in results])
    p = values.mean()
    half = 1.96 * values.std() / count**0.5 / (p * (1 - p)) * 400 / np.log(10)
    elo = row["elo"]
    assert elo["mean"] == pytest.approx(1000 + 400 * np.log10(p / (1 - p)), abs=0.5)
    assert elo["low"] == pytest.approx(elo["mean"] - half, abs=0.1 * half)
    assert elo["high"] == pytest.approx(elo["mean"] + half, abs=0.1 * half)


def test_excluded_pairs_do_not_pull_the_rates():
    """Ten wins among twelve prompts, two of which are out: 100%, in every resample, too."""
    verdicts = [row for i in range(10) for row in both_orders("helpfulness", i, "a", "b", [1, 2], [2, 1])]
    row = tabulated(verdicts, ["a", "b"], range(12))["helpfulness"]["models"]["b"]
    assert row["wins"] == {"mean": 1, "low": 1, "high": 1} and row["pairs"] == 10


def test_a_figure_of_no_model_and_of_many(tmp_path):
    elo = {"mean": 1100.0, "low": 1050.0, "high": 1200.0}
    nothing = {"elo": {"mean": float("nan"), "low": float("nan"), "high": float("nan")}}
    for models in ({"a": nothing}, {f"{'long-' * 12}{i:04}": {"elo": elo} for i in range(12)}):
        evaluate.draw_elo(tmp_path / "elo.png", {criterion: {"models": models} for criterion in evaluate.CRITERIA})
        data = (tmp_path / "elo.png").read_bytes()
        width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
        assert 480 <= width <= 830 and 150 <= height <= 830 and len(data) < 100_000


# ---- The page


def test_the_page_tells_what_is_written(judged):
    text = (ROOT / "docs" / "judge.md").read_text(encoding="utf-8")
    found = results(judged)
    figures = found["criteria"]["helpfulness"]
    names = [*found, *found["criteria"], *figures, *figures["position_bias"], *figures["models"]["repo"]]
    names += [*figures["models"]["repo"]["elo"], *read_lines(judged / "verdicts.jsonl")[0]]
    assert [name for name in names if f"`{name}`" not in text] == []
    written = set(re.findall(r"^\| `([\w.]+)`", text.partition("## Files")[2].partition("\n## ")[0], re.MULTILINE))
    assert written == set(contents(judged))
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(evaluate.Judge)}
    assert set(re.findall(r"`(--[a-z][a-z-]+)", text)) <= flags
    for words in (*evaluate.CRITERIA.values(), evaluate.REMINDER.strip()):
        assert words in " ".join(text.split()), "the page shows the questions as they are asked"
