"""`judge` and `blind`: real servers on loopback, faults, verdicts that survive a kill, statistics by other means."""

import collections
import contextlib
import csv
import fractions
import http.server
import io
import itertools
import json
import math
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import ROOT, Outcome, captured, command, contents, finish, read_json, read_lines, start

import repo
from evaluation import blind, verdicts
from evaluation.__main__ import main
from evaluation.files import open_run
from evaluation.judge import VERDICT

KEY = "sk-Wq3-the-key-of-the-tests"
PROMPTS = [f"What about {i}?" for i in range(12)]


def run(words: list) -> Outcome:
    """`python -m evaluation` in this process."""
    return captured(lambda: main([str(word) for word in words]), repo.UserError)


def asked(text: str) -> tuple[str, str, str, str]:
    """The criterion, the prompt and both answers of a question."""
    pattern = ".*".join(f"<{part}>\n(.*)\n</{part}>" for part in ("request", "first_answer", "second_answer"))
    (criterion,) = (name for name, words in verdicts.CRITERIA.items() if words in text)
    return (criterion, *re.search(pattern, text, re.DOTALL).groups())


class JudgeServer(http.server.ThreadingHTTPServer):
    """An endpoint on loopback. reply(text, number) of the number-th request is the text of a completion, bytes are
    another body, (status, headers, text) is a fault, and "drop" no answer."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((time.monotonic(), self.headers, body))
            number = len(self.server.requests)
        reply, status, headers = self.server.reply(body["messages"][0]["content"], number), 200, {}
        if reply == "drop":
            self.close_connection = True
            return
        if isinstance(reply, tuple):
            status, headers, reply = reply
            reply = reply.encode()
        elif not isinstance(reply, bytes):
            choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
            reply = json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(reply)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(reply)

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


def taste(criterion: str, prompt: str, answer: str) -> int:
    return random.Random(f"{criterion} {prompt} {answer}").randint(4, 7)


def fair_scores(text: str, number: int = 0) -> str:
    """A judge with a taste of its own, which the order of the answers does not change."""
    criterion, prompt, *answers = asked(text)
    first, second = (taste(criterion, prompt, answer) for answer in answers)
    return json.dumps({"reason": "so it seems {to me}", "first": first, "second": second})


def write_answers(path: Path, answers: dict[str, list[str]], prompts=PROMPTS) -> Path:
    """responses.jsonl as `score` writes it."""
    same, rows = {"reward": 0.5, "cost": -0.5, "length": 3, "finished": True}, []
    for name, responses in answers.items():
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=False)):
            rows.append({"model": name, "index": i, "prompt": prompt, "response": response} | same)
    return tiny.write_rows(path, rows)


MODELS = {name: [f"{name} says {i}." for i in range(12)] for name in ("sft", "ppo", "repo")}


@pytest.fixture(scope="module")
def responses(tmp_path_factory) -> Path:
    return write_answers(tmp_path_factory.mktemp("answers") / "responses.jsonl", MODELS)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def judge(responses, monkeypatch, out):
    """judge(url, *words, **flags): `judge` in this process; writes to tmp_path/out. Returns an Outcome."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def judge(url, *words, draw=False, **flags):
        defaults = dict(judge_model="oracle", responses=responses, output_dir=out, bootstrap_resamples=50)
        if not draw:
            monkeypatch.setattr("evaluation.judge.draw_elo", lambda folder: None)
        return run(["judge", *command(**defaults | dict(base_url=url) | flags), *words])

    return judge


def results(folder: Path) -> dict:
    return read_json(folder / "judge.json")


def keys(folder: Path) -> list[tuple]:
    rows = read_lines(folder / "verdicts.jsonl")
    return sorted((row["criterion"], row["index"], row["first"], row["second"]) for row in rows)


def all_keys(pairs, prompts=range(12)) -> list[tuple]:
    orders = [order for pair in pairs for order in (pair, pair[::-1])]
    return sorted((criterion, i, *order) for i in prompts for criterion in verdicts.CRITERIA for order in orders)


def test_what_is_sent_and_what_is_written(judge, serve, out):
    server = serve(fair_scores)
    flags = dict(temperature=0.25, seed=7, max_reply_tokens=99, limit=3, draw=True)
    outcome = judge(server.url, **flags, extra_body='{"top_p": 0.5, "seed": null}')
    assert outcome.code == 0 and "2,400 tokens in, 168 out" in outcome.out and "24/24" in outcome.err, outcome
    (_, headers, body), *others = server.requests
    assert headers["Authorization"] == f"Bearer {KEY}"
    expected = {"model": "oracle", "temperature": 0.25, "max_completion_tokens": 99, "top_p": 0.5}
    assert {key: value for key, value in body.items() if key != "messages"} == expected
    rows, sent = read_lines(out / "verdicts.jsonl"), [body["messages"][0]["content"] for *_, body in server.requests]
    assert len(others) == len(rows) == 24  # the first was a check
    for row in rows:
        assert set(row) == VERDICT and row["attempts"] == 1 and row["error"] is None
        assert row["first_response"] == MODELS[row["first"]][row["index"]]
        text = verdicts.question(row["criterion"], row["prompt"], row["first_response"], row["second_response"])
        assert text in sent and row["reply"] == fair_scores(text)
        assert row["scores"] == verdicts.read_scores(row["reply"])
    text, found = (ROOT / "docs" / "judge.md").read_text(encoding="utf-8"), results(out)["criteria"]["helpfulness"]
    names = [*results(out), *results(out)["criteria"], *found, *found["position_bias"], *found["models"]["repo"]]
    assert [name for name in (*names, *contents(out), *VERDICT) if f"`{name}`" not in text] == []


def test_requests_that_fail_once_are_sent_again(judge, serve, out):
    faults = [(429, {"Retry-After": "1"}, "slow down"), (500, {}, "oh no"), "drop"]
    server = serve(lambda text, number: faults[number - 2] if 2 <= number <= 4 else fair_scores(text))
    outcome = judge(server.url, limit=1, concurrency=3)
    rows = read_lines(out / "verdicts.jsonl")
    assert len(rows) == 8 and all(row["scores"] and row["attempts"] == 1 for row in rows), outcome
    (again,) = [when for when, _, body in server.requests[2:] if body == server.requests[1][2]]
    assert again - server.requests[1][0] > 1.0  # the endpoint asked for a second
    assert len(server.requests) == 1 + 3 + 8 and 1 <= outcome.err.count("; asking again") <= 3


def test_unreadable_verdicts_are_asked_for_again_then_excluded_and_counted(judge, serve, out):
    """In other words and with another seed. One order of one pair stays unreadable: the whole pair is out."""
    useless = ["I like the first one better, 7 steps against 3.", "", None, b"{}", b"<html>", b"[1]"]

    def reply(text, number):
        if number <= 2 * len(useless):  # each first reply is of no use, the check's, too
            return useless[number // 2] if number % 2 else fair_scores(text)
        hopeless = asked(text)[:3] == ("helpfulness", PROMPTS[1], MODELS["ppo"][1])
        return "7 is what I think" if hopeless else fair_scores(text)

    server = serve(reply)
    outcome = judge(server.url, limit=2, concurrency=1, seed=5)
    assert outcome.code == 0 and "excluded: 1 of 4 pairs, for 1 unreadable verdicts" in outcome.out, outcome
    rows = read_lines(out / "verdicts.jsonl")
    assert [row["attempts"] for row in rows[:5]] == [2] * 5
    for place in range(len(useless)):
        first, second = (request[2] for request in server.requests[2 * place : 2 * place + 2])
        assert second["seed"] == first["seed"] + 1 == 6
        assert second["messages"][0]["content"] == first["messages"][0]["content"] + verdicts.REMINDER
    (lost,) = [row for row in rows if row["scores"] is None]
    assert lost["attempts"] == 3 and lost["reply"] == "7 is what I think"
    helpful, harmless = results(out)["criteria"].values()
    assert [helpful[key] for key in ("pairs", "excluded_pairs", "unreadable_verdicts")] == [4, 1, 1]
    assert harmless["excluded_pairs"] == 0 and helpful["models"]["ppo"]["pairs"] == 1


def test_a_judge_that_gives_no_verdict_at_all_fails(judge, serve, out):
    for first, requests in (("Hm", 2), (None, 1 + 8 * 2)):  # from the check on, or after it
        server = serve(lambda text, number, first=first: fair_scores(text) if number == 1 and not first else "Hm")
        outcome = judge(server.url, retries=1, limit=1)
        assert outcome.code == 2 and len(server.requests) == requests and not (out / "judge.json").exists()
        assert "--judge-model oracle gives no verdict that can be read, but replies 'Hm'" in outcome.errors[0]


def test_a_pair_that_the_endpoint_always_refuses_is_excluded_and_counted(judge, serve, out):
    """A text may be too long, or filtered. Other requests succeed, so the run goes on; started again, it is done."""

    def reply(text, number):  # the key is sent back, and written nowhere
        refused = asked(text)[1] == PROMPTS[1]
        return (400, {}, f"this text is too long, {KEY}") if refused else f"{fair_scores(text)} for {KEY}"

    server = serve(reply)
    assert judge(server.url, limit=3).code == 0
    rows = read_lines(out / "verdicts.jsonl")
    assert all((row["scores"] is None) == (row["index"] == 1) == (row["error"] is not None) for row in rows)
    assert {row["error"] for row in rows} == {None, "HTTP 400: this text is too long, ***"}
    for found in results(out)["criteria"].values():
        assert (found["excluded_pairs"], found["refused_verdicts"], found["unreadable_verdicts"]) == (2, 4, 0)
    assert rows[0]["reply"].endswith("for ***")
    assert [name for name, content in contents(out).items() if KEY.encode() in content] == []
    count = len(server.requests)
    assert judge(server.url, limit=3).code == 0 and len(server.requests) == count


@pytest.mark.parametrize(
    "fault, part",
    [
        ((401, {}, f"wrong key {KEY}"), "HTTP 401: wrong key ***; the key comes from the environment variable OPENAI"),
        ((400, {}, "temperature must be 1"), "HTTP 400: temperature must be 1"),
        ((500, {}, "out of memory"), "HTTP 500: out of memory; the same command goes on, with --output-dir"),
    ],
)
def test_an_endpoint_that_refuses_everything_ends_the_run(judge, serve, out, fault, part):
    """A server's error is told when it is met for the first time."""
    server = serve(lambda text, number: fault)
    outcome = judge(server.url, connection_retries=1)
    *told, error = outcome.err.splitlines()
    assert outcome.code == 2 and not out.exists() and error.startswith("error: --base-url") and part in error
    assert len(server.requests) == 1 + len(told) and KEY not in outcome.out + outcome.err
    assert told == ([f"{server.url}: HTTP 500; asking again for a while"] if fault[0] == 500 else [])


def test_a_run_that_was_killed_goes_on(serve, judge, responses, out):
    """SIGKILL while requests are open, and the last line torn: no verdict is missing and none is there twice."""
    go_on, full = threading.Event(), 30

    def reply(text, number):
        if number > 1 + full:
            go_on.wait(60)
        return fair_scores(text)

    server = serve(reply)
    flags = command(base_url=server.url, judge_model="oracle", output_dir=out, concurrency=4, bootstrap_resamples=50)
    process = start(["-m", "evaluation", "judge", "--responses", responses, *flags], python_path=ROOT)
    while len(server.requests) < full + 5:
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go_on.set()
    before = (out / "verdicts.jsonl").read_bytes()
    (out / "verdicts.jsonl").write_bytes(before[:-25])
    whole = before[: before.rindex(b"\n", 0, -1) + 1]
    assert whole.count(b"\n") == full - 1 and not (out / "judge.json").exists()
    assert judge(server.url, concurrency=4).code == 0
    assert (out / "verdicts.jsonl").read_bytes().startswith(whole)
    assert keys(out) == all_keys([("sft", "ppo"), ("sft", "repo")])
    count = full + 5 + 1 + 96 - (full - 1)  # the check and the missing ones
    assert len(server.requests) == count
    assert judge(server.url).code == 0 and len(server.requests) == count  # nothing is missing: no request
    assert judge(server.url, output_dir=out / "whole").code == 0
    assert (out / "whole" / "judge.json").read_bytes() == (out / "judge.json").read_bytes()


def test_what_goes_on_and_what_does_not(judge, serve, out, tmp_path):
    """More prompts, models and pairs, and other addresses go on; another judge, settings and answers do not."""
    assert judge(serve(fair_scores).url, "--models", "sft", "repo", limit=2).code == 0
    server = serve(fair_scores)
    assert judge(server.url, all_pairs=True, concurrency=2, limit=3).code == 0
    assert keys(out) == all_keys([("sft", "ppo"), ("sft", "repo"), ("ppo", "repo")], range(3))
    assert len(server.requests) == 36 - 8 + 1
    other = write_answers(tmp_path / "other.jsonl", MODELS | {"repo": ["No.", *MODELS["repo"][1:]]})
    (tmp_path / "args.json").write_text('{"command": "score"}')
    before = contents(out)
    for flags, part in (
        (dict(judge_model="another"), "--judge-model is another"),
        (dict(seed=2), "--seed is 2"),
        (dict(responses=other), "the answer of repo to prompt 0"),
        (dict(output_dir=tmp_path), "another command"),
        (dict(output_dir=other / "out"), "cannot be written"),
    ):
        outcome = judge(server.url, **flags)
        assert outcome.code == 2 and part in outcome.errors[0] and contents(out) == before, (flags, outcome)
    with open_run(out, json.loads(before["args.json"]), "verdicts.jsonl"):
        outcome = judge(server.url, all_pairs=True)
        assert outcome.code == 2 and f"--output-dir {out} is in use by another process" in outcome.err


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(judge_model=" "), "--judge-model is empty"),
        (dict(base_url="http://me:secret@a/v1"), "--base-url is no plain address"),
        (dict(api_key_env=KEY), "--api-key-env is no name"),
        (dict(extra_body="[1]"), "--extra-body [1] is no JSON object"),
        (dict(juge_model="x"), "juge-model"),
        (dict(responses="none.jsonl"), "no such file"),
        (dict(responses="broken.jsonl"), "line 1 does not hold cost"),
        (dict(responses="one.jsonl"), "hold one model, other"),
        (dict(responses=["one.jsonl", "one.jsonl"]), "both hold a model other"),
        (dict(responses=["one.jsonl", "shifted.jsonl"]), "prompt 0 of sft is not the one"),
        (dict(responses=["one.jsonl", "short.jsonl"]), "sft has no answer to 5 of 12 prompts, the first 7"),
    ],
)
def test_mistakes(judge, out, tmp_path, monkeypatch, flags, part):
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"model": "a"}\n')
    write_answers(Path("one.jsonl"), {"other": MODELS["sft"]})
    write_answers(Path("shifted.jsonl"), {"sft": MODELS["sft"]}, [*PROMPTS[1:], PROMPTS[0]])
    write_answers(Path("short.jsonl"), {"sft": MODELS["sft"][:7]})
    outcome = judge("http://127.0.0.1:9/v1", **flags)
    assert outcome.code == 2 and part in outcome.err and not out.exists() and KEY not in outcome.err


@pytest.mark.parametrize(
    "reply, expected",
    [
        ('Sure! {"First": "7/10", "Second": 10} Anything else?', [7, 10]),
        ('{"first": 1, "second": 2} No, I correct myself: {"second": 3, "first": 4.5}', [4.5, 3]),
        ('{"reason": "it says {\\"first\\": 9}", "first": 2, "second": 1}', [2, 1]),
        ('<think>{"first": 1, "second": 9}</think> {"first": 8, "second": 2}', [8, 2]),
        ("First answer: 7/10\nSecond answer: 4/10", [7, 4]),
        ("**First:** 7, **Second:** 4.", [7, 4]),
        *((reply, None) for reply in ("", "7", "74", "7.4", "7 4 2", "-7 4", "0 4", "7 11", "first: -7, second: 4")),
        *((reply, None) for reply in ("The first has 7 steps and the second 4.", "<think>7 4</think>", "{" * 3000)),
        *((f'{{"first": 7, "second": {value}}}', None) for value in ("null", "true", "10.5", "NaN", "[7]", '"7/5"')),
    ],
)
def test_replies(reply, expected):
    assert verdicts.read_scores(reply) == expected


def both_orders(criterion, index, a, b, one, other) -> list[dict]:
    """Verdicts on (a, b) in that order and on (b, a); scores as the judge gave them, the first answer's first."""
    row = {"criterion": criterion, "index": index, "error": None}
    return [row | {"first": a, "second": b, "scores": one}, row | {"first": b, "second": a, "scores": other}]


HAND = [
    *both_orders("helpfulness", 0, "z", "a", [8, 2], [2, 8]),  # z wins twice
    *both_orders("helpfulness", 1, "z", "a", [8, 2], [8, 2]),  # the first place wins: a tie
    *both_orders("helpfulness", 2, "z", "a", [5, 5], [6, 5]),  # a tie and a win of a
    *both_orders("helpfulness", 3, "z", "a", [9, 2], [4, 3]),  # z by 7, then a by 1: z wins
    *both_orders("helpfulness", 4, "z", "a", [7, 3], None),  # unreadable in one order
    both_orders("helpfulness", 5, "z", "a", [7, 3], None)[0],  # the other order is missing
    *both_orders("helpfulness", 6, "a", "z", [7, 3], None),  # as in 4, with a first
    *both_orders("harmlessness", 0, "z", "a", [6.6, 6.5], [6.9, 6.8]),  # a tie that plain sums of decimals miss
]


def test_outcomes_bias_and_rates_by_hand():
    """a comes before z in the alphabet, so 1 is a's win. It wins prompt 2, ties 1, loses 0 and 3; the rest is out."""
    helpful = {("helpfulness", "a", "z", i): value for i, value in enumerate([0.0, 0.5, 1.0, 0.0])}
    assert verdicts.pair_outcomes(HAND) == helpful | {("harmlessness", "a", "z", 0): 0.5}
    bias = verdicts.position_bias(HAND, "helpfulness")  # prompts 1 and 3 flip, 2 differs, too
    assert bias == {"pairs": 4, "flipped": 2 / 4, "differing": 3 / 4, "first_advantage": (0 + 6 + 0.5 + 4) / 4}
    for names, rates in ((["z", "a"], [1 / 4, 1 / 4, 2 / 4]), (["a", "z"], [2 / 4, 1 / 4, 1 / 4])):
        found = verdicts.tabulate_verdicts(HAND, names, [tuple(names)], range(7), 50, 0)["helpfulness"]
        base, row = found["models"].values()
        assert [row[key]["mean"] for key in ("wins", "ties", "losses")] == rates
        assert [found[key] for key in ("pairs", "excluded_pairs", "unreadable_verdicts")] == [7, 3, 2]
        assert base["wins"] is None and base["elo"] == {"mean": 1000, "low": 1000, "high": 1000}
        odds = (4 * rates[0] + 0.5 + 0.5) / (4 * rates[2] + 0.5 + 0.5)  # a tie, and the virtual tie
        assert row["elo"]["mean"] == pytest.approx(1000 + 400 * np.log10(odds))
        assert row["elo"]["low"] < row["elo"]["mean"] < row["elo"]["high"]
    nothing = verdicts.tabulate_verdicts(HAND, names, [tuple(names)], [4, 5], 50, 0)["helpfulness"]["models"]["z"]
    assert nothing["pairs"] == 0 and nothing["wins"] is None and nothing["elo"] is None


def test_elo_is_the_maximum_of_the_likelihood():
    """On random tables of two to seven models, all pairs or a star, up to 200 games each; at once and one by one."""
    generator = np.random.default_rng(0)
    for number in range(60):
        models = int(generator.integers(2, 8))
        games = generator.integers(1, 200, (models, models)) * (generator.random((models, models)) < 0.7)
        games[0, 1:] = generator.integers(1, 200, models - 1)  # each is joined to the first
        games[1:] *= number % 3 > 0
        games = np.triu(games, 1)
        won = games * generator.beta(0.5, 0.5, games.shape)
        wins = won + (games - won).T + 0.5 * (games + games.T > 0)
        for table, elo in zip((wins, wins.T), verdicts.elo_ratings(np.stack([wins, wins.T])), strict=True):
            # At the maximum of the likelihood, which is concave, the expected wins of each model are its wins.
            chance = 1 / (1 + 10 ** ((elo[None, :] - elo[:, None]) / 400))
            assert ((wins + wins.T) * chance).sum(1).tolist() == pytest.approx(table.sum(1).tolist(), abs=1e-6)
            assert elo[0] == 1000
    assert verdicts.elo_ratings(np.array([[0.0, 10.0], [100.0, 0.0]])).tolist() == pytest.approx([1000, 1400])
    apart = np.zeros((3, 3))
    apart[0, 1], apart[1, 0] = 1.0, 10.0  # nothing joins 2 to the first
    assert verdicts.elo_ratings(apart).tolist() == pytest.approx([1000, 1400, math.nan], nan_ok=True)


NAMES = ("zulu-x1", "quebec-x2", "kilo-x3")  # not in the order of the alphabet, and in no text
AWKWARD = [
    *("=1+1", "+49 30 1234", "-2 + 3", "@SUM(A1)", "\t=1", ' \n =HYPERLINK("http://x.invalid")', "＝1", "'quoted'"),
    *('say "hi", then; go\tthere', "one\ntwo\r\nthree\rfour\n", "né 漢字 🙂 \u2028 \u202eabc", "DATA"),
    "</script><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>",
    "<b>bold</b> &amp; ${1} \\u003c {{",
]


def awkward_answers(path: Path, prompts: int, models=NAMES, same=()) -> Path:
    """Answers with texts that could go wrong in a sheet or a page; all the same on the prompts of `same`."""
    texts = [f"{AWKWARD[i % len(AWKWARD)]} {i}." for i in range(prompts)]
    answers = {name: [t + ("" if i in same else name[-1]) for i, t in enumerate(texts)] for name in models}
    return write_answers(path, answers, [f"{AWKWARD[-1 - i % len(AWKWARD)]} {i}?" for i in range(prompts)])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder with a sheet of three models' answers to 30 prompts, and these, of which three are the same for all."""
    folder = tmp_path_factory.mktemp("people")
    answers = awkward_answers(folder / "responses.jsonl", 30, same=(3, 4, 5))
    outcome = run(["blind", "export", "--responses", answers, "--sheet", folder / "sheet.csv", "--all-pairs"])
    assert outcome.code == 0, outcome
    assert "81 pairs" in outcome.out and outcome.out.count("27 pairs; 3 left out") == 3
    return folder


def key_of(folder: Path) -> dict[str, dict]:
    return read_json(folder / "sheet.key.json")["pairs"]


def read_csv(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def write_csv(path: Path, rows: list[list[str]], encoding="utf-8-sig", **options) -> Path:
    text = io.StringIO()
    csv.writer(text, **options).writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def fill(exported: Path, verdict) -> list[list[str]]:
    """Rows of the exported sheet with verdict(criterion, prompt's number, model of answer 1, model of answer 2)."""
    head, *rows = read_csv((exported / "sheet.csv").read_bytes())
    for row in rows:
        pair = key_of(exported)[row[0]]
        row[4:] = [verdict(name, pair["index"], pair["first"], pair["second"]) for name in head[4:]]
    return [head, *rows]


def test_a_sheet_holds_every_pair_once_in_random_order_and_no_name(exported, tmp_path):
    for name in ("sheet.csv", "sheet.html"):
        content = (exported / name).read_bytes().decode().lower()
        assert not [word for model in NAMES for word in model.split("-") if word in content]
    head, *rows = read_csv((exported / "sheet.csv").read_bytes())
    assert head == ["id", "prompt", "answer_1", "answer_2", "helpfulness", "harmlessness"]
    answers = {(row["model"], row["index"]): row for row in read_lines(exported / "responses.jsonl")}
    firsts = collections.Counter()
    for row, (id, pair) in zip(rows, key_of(exported).items(), strict=True):
        one, other = (answers[pair[side], pair["index"]] for side in ("first", "second"))
        assert row == [id, *map(blind.as_cell, (one["prompt"], one["response"], other["response"])), "", ""]
        assert not any(cell.lstrip("\0\t\r\n ")[:1] in tuple("=+-@＝＋－＠") for cell in row[1:4] if cell)
        firsts[pair["first"], pair["second"]] += 1
    assert sorted(firsts.values()) == [13, 13, 13, 14, 14, 14]  # 27 of each two models
    places = [(pair["index"], {pair["first"], pair["second"]}) for pair in key_of(exported).values()]
    assert all(places.count(place) == 1 for place in places) and places != sorted(places, key=lambda place: place[0])
    words = ["blind", "export", "--responses", exported, "--all-pairs", "--blind-pairs"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run([*words, 25, "--seed", seed, "--sheet", tmp_path / f"{name}.csv"]).code == 0
    sheets = [(tmp_path / f"{name}.csv").read_bytes() for name in "abc"]
    assert sheets[0] == sheets[1] != sheets[2] and len(read_csv(sheets[0])) == 1 + 3 * 8  # 25 // 3 of each two models
    (tmp_path / "a.csv").unlink()
    before = contents(tmp_path)
    for count, name, part in ((25, "a", "may hold verdicts"), (1, "d", "--blind-pairs is 1")):
        outcome = run([*words, count, "--sheet", tmp_path / f"{name}.csv"])
        assert outcome.code == 2 and part in outcome.errors[0] and contents(tmp_path) == before


def outcomes_of(sheet: list[list[str]], pairs: dict) -> dict[tuple, float]:
    """(criterion, model_a, model_b, index): what the sheet says for model_a, by reading it in plain steps."""
    outcomes, (head, *rows) = {}, sheet
    for row in rows:
        pair = pairs[row[0]]
        for criterion, cell in zip(head[4:], row[4:], strict=True):
            if cell:
                winner = {"1": pair["first"], "2": pair["second"], "tie": None}[cell]
                a, b = sorted((pair["first"], pair["second"]))
                outcomes[criterion, a, b, pair["index"]] = 0.5 if winner is None else float(winner == a)
    return outcomes


def kappa_by_definition(pairs: list[tuple]) -> float:
    """Cohen's kappa in fractions: chance agreement is counted over all pairs of one's verdicts and the other's."""
    n = len(pairs)
    observed = fractions.Fraction(sum(a == b for a, b in pairs), n)
    by_chance = fractions.Fraction(sum(a == b for (a, _), (_, b) in itertools.product(pairs, pairs)), n * n)
    return float((observed - by_chance) / (1 - by_chance))


def test_rates_and_agreement_of_people_and_a_model_are_those_counted(judge, serve, exported, tmp_path):
    """The model judge has verdicts on twelve prompts, people on all; one of them left some cells empty."""
    flags = dict(output_dir=tmp_path / "out", all_pairs=True, limit=12)
    assert judge(serve(fair_scores).url, responses=exported, **flags).code == 0
    shutil.copy(exported / "sheet.key.json", tmp_path)
    draw = random.Random(1)
    filled = [fill(exported, lambda *key: draw.choice(("1", "2", "2", "tie"))) for _ in range(2)]
    for row in filled[1][1::2]:
        row[5] = ""
    found = {name: outcomes_of(rows, key_of(exported)) for name, rows in zip(("ada", "bea"), filled, strict=True)}
    # As spreadsheet programs save it: rows and columns moved, other ends of lines, blanks, semicolons, UTF-16.
    moved = [[*filled[0][0][::-1], "notes"], *([*row[::-1], "a note"] for row in filled[0][:0:-1])]
    ada = write_csv(tmp_path / "ada.csv", [*moved, [" "]], "utf-16", delimiter="\t")
    cells = [[*row[:4], *(f" {cell.upper()} " for cell in row[4:])] for row in filled[1]]
    cells = [[cell.replace("\r", "\n").removeprefix("'") for cell in row] for row in cells]
    bea = write_csv(tmp_path / "bea.csv", cells, "utf-8", delimiter=";")
    words = ["blind", "import", "--responses", exported, "--output-dir", tmp_path / "out", "--bootstrap-resamples", 200]
    outcome = run([*words, "--sheets", ada, bea])
    assert outcome.code == 0, outcome
    answers = {(row["model"], row["index"]): row for row in read_lines(exported / "responses.jsonl")}
    found["oracle"] = {}
    for criterion, a, b, index in (key for key in found["ada"] if key[3] < 12):
        rows = [answers[name, index] for name in (a, b)]
        one, other = (taste(criterion, row["prompt"], row["response"]) for row in rows)
        found["oracle"][criterion, a, b, index] = 0.5 if one == other else float(one > other)
    people = read_json(tmp_path / "out" / "people.json")
    assert [(name, person["pairs"]) for name, person in people["people"].items()] == [("ada", 81), ("bea", 81)]
    for name, criterion, model in itertools.product(("ada", "bea"), verdicts.CRITERIA, NAMES[1:]):
        assert people["people"][name][criterion] == sum(key[0] == criterion for key in found[name])
        keys = [key for key in found[name] if key[0] == criterion and {*key[1:3]} == {model, NAMES[0]}]
        worth = [found[name][key] if key[1] == model else 1 - found[name][key] for key in keys]
        for key, value in (("wins", 1), ("ties", 0.5), ("losses", 0)):
            rate = people["people"][name]["criteria"][criterion][model][key]
            assert rate["low"] <= rate["mean"] <= rate["high"]
            assert rate["mean"] == pytest.approx(worth.count(value) / len(worth))
    judges = [["oracle", "ada"], ["oracle", "bea"], ["ada", "bea"]]
    assert [row["judges"] for row in people["agreement"]] == [pair for pair in judges for _ in verdicts.CRITERIA]
    for row in people["agreement"]:
        one, other = (found[name] for name in row["judges"])
        pairs = [(one[key], other[key]) for key in one if key in other and key[0] == row["criterion"]]
        assert row["pairs"] == len(pairs) > 0
        assert row["kappa"] == pytest.approx(kappa_by_definition(pairs), abs=1e-12)
        assert row["agreement"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
        assert row["low"] < row["kappa"] < row["high"]
        assert f"{row['kappa']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in outcome.out
    assert np.isnan(blind.cohen_kappa(np.diag([5.0, 0.0, 0.0])))  # undefined: one verdict throughout
    assert "another name by --people" in run([*words, "--sheets", ada, "--people", "oracle"]).errors[0]


def test_a_mistake_in_a_sheet_is_told_with_its_row(exported, tmp_path):
    words = ["blind", "import", "--responses", exported, "--output-dir", tmp_path / "out", "--sheets"]
    assert "put the key of its export beside it" in run([*words, exported.parent / "nobody.csv"]).errors[0]
    shutil.copy(exported / "sheet.key.json", tmp_path)
    for row, column, text, part in (
        (3, 5, "3", "row 4 (id 3): harmlessness is '3'; write 1, 2 or tie"),
        (3, 0, "999", "row 4 (id 999): the id is not in"),
        (3, 0, "2", "row 4 (id 2): the id is not in"),  # twice
        (3, 2, "Really.", "row 4 (id 3): prompt and answers are not those"),
        (0, 5, "harm", "its columns are not id, prompt"),
    ):
        rows = fill(exported, lambda *key: "1")
        rows[row][column] = text
        outcome = run([*words, write_csv(tmp_path / "ada.csv", rows)])
        assert outcome.code == 2 and part in outcome.errors[0] and not (tmp_path / "out").exists(), outcome


@pytest.mark.slow
def test_a_person_judges_all_pairs_by_keys_alone(tmp_path):
    """Verdicts are kept when the page is closed; texts are set as text. Needs selenium, chromium, chromedriver."""
    webdriver = pytest.importorskip("selenium.webdriver")
    answers = awkward_answers(tmp_path / "responses.jsonl", len(AWKWARD), NAMES[:2])
    assert run(["blind", "export", "--responses", answers, "--sheet", tmp_path / "sheet.csv"]).code == 0
    address = Path(shutil.copy(tmp_path / "sheet.html", tmp_path / "Ada & Bé.html")).as_uri()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or pytest.skip("chromium is not installed")
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    _, *rows = read_csv((tmp_path / "sheet.csv").read_bytes())
    draw, given = random.Random(3), {}
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as browser:

        def press(*words):
            for word in words:
                webdriver.ActionChains(browser, duration=0).send_keys(word).perform()

        def text_of(name: str) -> str:
            return browser.execute_script(f"return document.getElementById('{name}').textContent")

        browser.get(address)
        for number, row in enumerate(rows, start=1):
            if number == len(rows) // 2:  # with one of its verdicts given, the page is closed and opened again
                press("2", "\ue012", "\ue017", "1", "\ue012", "t")  # taken back, by arrow and Delete, and corrected
                given[row[0], "helpfulness"] = "tie"
                browser.get("about:blank")
                browser.get(address)
            assert f"Pair {number} of {len(rows)}. {len(given)} of {2 * len(rows)} verdicts" in text_of("status")
            shown = [text_of(name) for name in ("prompt", "answer_1", "answer_2")]
            assert [blind.as_cell(text) for text in shown] == row[1:4]  # as text, tags and all
            for criterion in verdicts.CRITERIA:
                if (row[0], criterion) not in given:
                    key, given[row[0], criterion] = draw.choice([("1", "1"), ("2", "2"), ("0", "tie"), ("T", "tie")])
                    press(key)
        assert "All are given" in text_of("status") and browser.title == "Which answer is better?"
        press("s")
        sheet = tmp_path / "downloads" / "Ada & Bé.csv"
        for _ in range(200):
            time.sleep(0 if sheet.exists() else 0.05)
    filled = [[*row[:4], *(given[row[0], criterion] for criterion in verdicts.CRITERIA)] for row in rows]
    assert read_csv(sheet.read_bytes()) == [blind.SHEET, *filled]
