"""`judge`: a language model behind an OpenAI-compatible endpoint compares the answers that `score` wrote.

Helpfulness and harmlessness are judged apart, 1 to 10 for both answers, in both orders. Reported are win, tie and loss
rates against a base model, Elo ratings, and how much the order mattered. The protocol follows Safe RLHF's evaluation by
GPT-4 (Dai et al., ICLR 2024, arXiv 2310.12773) and SACPO's (Wachi et al., NeurIPS 2024, arXiv 2404.11049).

    python -m evaluation judge --responses runs/suite --base-url http://localhost:8000/v1 --judge-model JUDGE
"""

import asyncio
import contextlib
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import openai
from tqdm import tqdm

from evaluation import files
from evaluation.figures import draw_elo
from evaluation.files import fail
from evaluation.verdicts import CRITERIA, REMINDER, Pairs, print_verdicts, question, read_scores, tabulate_verdicts


@dataclass
class Comparison:
    """Flags that choose the answers that a judge compares, a model or a person."""

    responses: list[str] = field(default_factory=list)  # responses.jsonl of `score`, one or more, or their folders
    models: list[str] = field(default_factory=list)  # names of the models to compare; default: all in --responses
    base: str | None = None  # the model that the others are compared with, Elo 1000; default: the first
    all_pairs: bool = False  # compare every model with every other, not only with the base
    limit: int = 0  # prompts at most, the first ones; 0 takes all
    seed: int = 1  # seeds the bootstrap and the draw of pairs, and is passed on to a model that judges


@dataclass
class Judge(Comparison):
    """Let a language model compare answers, pair by pair."""

    exp_name: str = "judge"  # name of the evaluation
    output_dir: str | None = None  # begun before: goes on; default runs/<exp-name>-<seed>-<time>

    # Judge
    judge_model: str = ""  # name of the judge at the endpoint
    base_url: str = "https://api.openai.com/v1"  # an endpoint that speaks OpenAI's chat completions
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the endpoint's key, which is written nowhere
    temperature: float = 0.0  # the judge's sampling temperature
    max_reply_tokens: int = 512  # tokens of a verdict at most
    extra_body: str = "{}"  # JSON object of more fields, such as {"reasoning_effort": "low"}; null takes a field out

    # Requests
    concurrency: int = 8  # requests at a time
    timeout: float = 120.0  # seconds to wait for an answer
    connection_retries: int = 8  # times that a request is sent again after a rate limit or a fault, with back-off
    retries: int = 2  # times that the judge is asked again after a verdict that cannot be read
    bootstrap_resamples: int = 5000  # resamples of the prompts behind each 95% interval


# Flags that change a verdict, the same when a run goes on. The judge is known by its name, not by its address.
FIXED = {"command", "seed", "judge_model", "temperature", "max_reply_tokens", "extra_body"}

NO_VERDICT = {"scores": None, "attempts": 0, "reply": "", "tokens_in": 0, "tokens_out": 0, "error": None}
VERDICT = {"judge", "criterion", "index", "prompt", "first", "second", "first_response", "second_response", *NO_VERDICT}

TRIAL = question("helpfulness", "What is two and two?", "Four.", "Twenty-two.")  # whether the endpoint works at all


def check_args(args: Judge) -> None:
    if not args.judge_model.strip():
        fail("--judge-model is empty; name the judge, as its endpoint calls it")
    zero_or_more = "limit seed temperature connection_retries retries"
    files.check_ranges(args, "max_reply_tokens concurrency timeout bootstrap_resamples", zero_or_more)
    if not args.base_url.startswith(("http://", "https://")) or "@" in args.base_url or "?" in args.base_url:
        fail("--base-url is no plain address such as http://localhost:8000/v1; a key comes from the environment alone")
    if not args.api_key_env.isidentifier():  # perhaps the key itself, which is shown nowhere
        fail("--api-key-env is no name of an environment variable; the key itself is never a flag")
    try:
        dict(json.loads(args.extra_body))
    except (ValueError, TypeError):
        fail(f"--extra-body {args.extra_body} is no JSON object")


def read_models(args: Comparison) -> tuple[dict[str, dict[int, dict]], Pairs]:
    """For each model, the base first, its answers to the chosen prompts by the prompt's index; and the models to
    compare, two by two, in the same order."""
    found, origin, texts = {}, {}, {}
    if not args.responses:
        fail("--responses is empty; give responses.jsonl of `score`, or its folder")
    for entry in args.responses:
        path = Path(entry) / "responses.jsonl" if Path(entry).is_dir() else Path(entry)
        answers = files.read_answers(path)
        if not answers:
            fail(f"--responses {path}: there is no such file, or it holds no answers")
        for name, rows in answers.items():
            if name in found:
                fail(f"--responses: {origin[name]} and {path} both hold a model {name}; give one another name")
            for index, row in rows.items():
                if texts.setdefault(index, row["prompt"]) != row["prompt"]:
                    fail(f"--responses {path}: prompt {index} of {name} is not the one of the models before; compare "
                         "models on the same prompts, in the same order")  # fmt: skip
            found[name], origin[name] = rows, path
    names = args.models or list(found)
    names = list(dict.fromkeys([args.base or names[0], *names]))
    for name in names:
        if name not in found:
            fail(f"--models or --base names {name}, but --responses hold {', '.join(found)}")
    if len(names) < 2:
        fail(f"--responses hold one model, {names[0]}; a judge compares at least two")
    indices = sorted(texts)[: args.limit or None]
    for name in names:
        missing = [index for index in indices if index not in found[name]]
        if missing:
            fail(f"--responses {origin[name]}: {name} has no answer to {len(missing)} of {len(indices)} prompts, the "
                 f"first {missing[0]}; finish its evaluation, or set --limit")  # fmt: skip
    pairs = [pair for pair in itertools.combinations(names, 2) if args.all_pairs or pair[0] == names[0]]
    return {name: {index: found[name][index] for index in indices} for name in names}, pairs


class Endpoint:
    """The judge's endpoint. The client itself sends a request again after rate limits, server errors, time-outs and
    lost connections, each time after a longer pause, or the one that the endpoint asks for."""

    def __init__(self, args: Judge):
        self.args, self.told, self.fault = args, set(), "no answer"
        self.key = os.environ.get(args.api_key_env, "").strip() or "none"  # one's own server asks for none
        hooks = {"request": [self.tell_retry], "response": [self.note_fault]}
        http_client = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
        limits = {"timeout": args.timeout, "max_retries": args.connection_retries}
        self.client = openai.AsyncOpenAI(api_key=self.key, base_url=args.base_url, http_client=http_client, **limits)

    async def note_fault(self, response) -> None:
        self.fault = f"HTTP {response.status_code}" if response.is_error else self.fault

    async def tell_retry(self, request) -> None:
        """One line for each kind of fault, when the first request that met it is sent again."""
        if request.headers.get("x-stainless-retry-count", "0") != "0" and self.fault not in self.told:
            self.told.add(self.fault)
            tqdm.write(f"{self.args.base_url}: {self.fault}; asking again for a while", file=sys.stderr)

    def without_key(self, text: str) -> str:
        """A text from the endpoint, which may repeat the key that it was sent; what is shorter than 8 is no secret."""
        return text.replace(self.key, "***") if len(self.key) >= 8 else text

    async def ask(self, text: str, seed: int) -> tuple[str, int, int]:
        """The judge's reply to a message, and the tokens that it read and wrote. Raises openai.APIError."""
        args = self.args
        fields = {"temperature": args.temperature, "seed": seed, "max_completion_tokens": args.max_reply_tokens}
        fields = {key: value for key, value in (fields | json.loads(args.extra_body)).items() if value is not None}
        response = await self.client.chat.completions.with_raw_response.create(
            model=args.judge_model, messages=[{"role": "user", "content": text}], extra_body=fields
        )
        # Whatever else a server sends in place of a completion is a verdict that cannot be read.
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            completion = json.loads(response.text)
            usage = completion.get("usage") or {}
            counts = [usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens")]
            return self.without_key(completion["choices"][0]["message"]["content"]), *counts
        return self.without_key(response.text[:500]), 0, 0

    def explain(self, exception: openai.APIError) -> str:
        """What went wrong, in the endpoint's own words where it has any."""
        text = f"{exception.message} {exception.__cause__ or ''}"
        if isinstance(exception, openai.APIStatusError):
            text = f"HTTP {exception.status_code}: {exception.response.text}"
        return " ".join(self.without_key(text).split())[:300]

    async def ask_for_scores(self, text: str, row: dict) -> dict:
        """Ask until the scores can be read, --retries times more at most; `row` takes what comes of it."""
        while row["scores"] is None and row["attempts"] <= self.args.retries:
            # Asked in the same words with the same seed, a judge at temperature 0 would say the same again.
            asked, seed = text + (REMINDER if row["attempts"] else ""), self.args.seed + row["attempts"]
            row["attempts"] += 1
            row["reply"], tokens_in, tokens_out = await self.ask(asked, seed)
            row["scores"] = read_scores(row["reply"])
            row["tokens_in"] += tokens_in
            row["tokens_out"] += tokens_out
        return row

    async def judge(self, job: dict) -> dict:
        """A row of verdicts.jsonl from `job`, which tells the pair."""
        row = job | NO_VERDICT
        text = question(row["criterion"], row["prompt"], row["first_response"], row["second_response"])
        try:
            await self.ask_for_scores(text, row)
        except openai.APIError as exception:
            # These may be due to the two answers: too long, or filtered. They are if another request succeeds.
            if getattr(exception, "status_code", None) not in (400, 413, 422, 500):
                raise
            await self.ask(TRIAL, self.args.seed)
            row["error"] = self.explain(exception)
        return row


def tokens_of(verdicts: list[dict]) -> str:
    """Tokens that were read and written."""
    tokens_in, tokens_out = (sum(row[key] for row in verdicts) for key in ("tokens_in", "tokens_out"))
    return f"{tokens_in:,} tokens in, {tokens_out:,} out"


def check_readable(args: Judge, rows: list[dict]) -> None:
    """Refuse a judge none of whose verdicts can be read."""
    if not any(row["scores"] for row in rows):
        reply = (rows[-1]["reply"] or rows[-1]["error"] or "")[:300]
        fail(f"--judge-model {args.judge_model} gives no verdict that can be read, but replies '{reply}'; choose "
             "another judge, or raise --max-reply-tokens if the reply is cut short")  # fmt: skip


async def collect(endpoint: Endpoint, jobs: list[dict], verdicts: list[dict], folder: Path, settings: dict) -> None:
    """Have all jobs judged, --concurrency at a time. Each verdict is added to the file, and to `verdicts`, as it comes.
    A small question comes first, so a wrong address, key or name ends the run before anything is written."""
    args, waiting = endpoint.args, iter(jobs)
    if jobs:
        check_readable(args, [await endpoint.ask_for_scores(TRIAL, dict(NO_VERDICT))])

    async def work():
        for job in waiting:  # which the workers share
            verdict = await endpoint.judge(job)
            files.append_json(folder / "verdicts.jsonl", [verdict])
            verdicts.append(verdict)
            bar.set_postfix_str(tokens_of(verdicts), refresh=False)
            bar.update()

    done, options = len(verdicts), {"desc": "verdicts", "total": len(jobs) + len(verdicts)}
    with files.open_run(folder, settings, "verdicts.jsonl"), tqdm(initial=done, **options) as bar:
        await asyncio.gather(*(work() for _ in range(min(args.concurrency, len(jobs)))))


def find_verdicts(folder: Path, answers: dict[str, dict[int, dict]]) -> list[dict]:
    """The verdicts that an output directory holds; refused are those about other answers."""
    rows = files.read_rows(folder / "verdicts.jsonl", VERDICT)
    for row in rows:
        for side in ("first", "second"):
            answer = answers.get(row[side], {}).get(row["index"])
            if answer and (answer["prompt"], answer["response"]) != (row["prompt"], row[f"{side}_response"]):
                fail(f"--responses: the answer of {row[side]} to prompt {row['index']} is not the one that was judged "
                     f"in --output-dir {folder}; choose another directory")  # fmt: skip
    return rows


def report(args: Judge, folder: Path, names: list[str], pairs: Pairs, indices: list, verdicts: list[dict]) -> None:
    """Table and figure, from the verdicts alone: the same after one run or several."""
    criteria = tabulate_verdicts(verdicts, names, pairs, indices, args.bootstrap_resamples, args.seed)
    results = {"judge": args.judge_model, "prompts": len(indices), "base": names[0], "verdicts": len(verdicts)}
    results |= {key: getattr(args, key) for key in ("seed", "temperature", "bootstrap_resamples", "all_pairs")}
    results |= {key: sum(row[key] for row in verdicts) for key in ("tokens_in", "tokens_out")}
    files.write_json(folder / "judge.json", results | {"criteria": criteria})
    draw_elo(folder)
    for criterion, figures in criteria.items():
        print_verdicts(criterion, figures, names[0])
    print(f"\n{len(indices)} prompts, {len(verdicts)} verdicts, {tokens_of(verdicts)}; written to {folder}")


def judge(args: Judge) -> None:
    check_args(args)
    (answers, pairs), folder = read_models(args), files.output_folder(args)
    names, indices = list(answers), list(answers[next(iter(answers))])
    settings = {"command": "judge"} | asdict(args) | {"models": names, "base": names[0]}
    before = files.earlier_settings(folder, settings, set(settings) - FIXED)
    rows = find_verdicts(folder, answers) if before else []
    there = {(row["criterion"], row["first"], row["second"], row["index"]): row for row in rows}

    # ---- Prompt after prompt, so a run that is stopped has judged its first prompts in full
    verdicts, jobs = [], []
    for index, pair, criterion in itertools.product(indices, pairs, CRITERIA):
        for first, second in (pair, pair[::-1]):
            if (criterion, first, second, index) in there:
                verdicts.append(there[criterion, first, second, index])
                continue
            one, other = answers[first][index], answers[second][index]
            job = {"judge": args.judge_model, "criterion": criterion, "index": index, "prompt": one["prompt"]}
            job |= {"first": first, "second": second}
            jobs.append(job | {"first_response": one["response"], "second_response": other["response"]})
    endpoint, hint = Endpoint(args), f"the same command goes on, with --output-dir {folder}"
    try:
        asyncio.run(collect(endpoint, jobs, verdicts, folder, settings))
    except KeyboardInterrupt:
        print(f"stopped with {len(verdicts)} verdicts in {folder}; {hint}", file=sys.stderr)
        sys.exit(130)
    except openai.APIError as exception:
        if isinstance(exception, openai.AuthenticationError | openai.PermissionDeniedError):
            hint = f"the key comes from the environment variable {args.api_key_env}"
        fail(f"--base-url {args.base_url} does not judge: {endpoint.explain(exception)}; {hint}")
    check_readable(args, verdicts)
    report(args, folder, names, pairs, indices, verdicts)
