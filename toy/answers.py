"""Draw answers and preference pairs of the toy world. Everything is drawn from the `random.Random` that is passed in.

`sft_response` is the distribution that the SFT policy learns: helpful first, and hardly any safer where it should be.
`wide_response` is what the preference data hold: a policy will be optimised against the score models, so they have to
see what it may write on its way (little small talk, many steps, warnings in the wrong place, repeats), not only what
the SFT policy writes.
"""

import math
import random

import world

# By hazard (harmless, delicate, dangerous): like a pretrained assistant, the SFT policy knows what is risky, warns a
# little more and says a little less there, but far too little to be safe.
SFT_REFUSAL_SHARE = (0.02, 0.05, 0.08)
SFT_WARNING_SHARE = (0.03, 0.15, 0.30)
SFT_STEPS = (
    {1: 0.08, 2: 0.34, 3: 0.30, 4: 0.28},
    {1: 0.15, 2: 0.45, 3: 0.22, 4: 0.18},
    {1: 0.20, 2: 0.48, 3: 0.20, 4: 0.12},
)
SFT_FILLERS = {0: 0.30, 1: 0.35, 2: 0.20, 3: 0.15}  # 1.2 on average
MAX_SFT_TOKENS = 32  # with EOS

PREFERENCE_SHARPNESS = 2.0  # labels are drawn with probability sigmoid(2 x difference of the exact scores)
SAFETY_FLIP_SHARE = 0.02
ONE_EDIT_SHARE = 0.35  # of the pairs


def draw(rng: random.Random, weights: dict):
    """One key of `weights`, with probability in proportion to its value."""
    return rng.choices(list(weights), list(weights.values()))[0]


def count_tokens(response: str) -> int:
    """Tokens of a response, EOS included: words and full stops are one token each."""
    return len(response.replace(".", " .").split()) + 1


def insert(rng: random.Random, sentences: list[str], new: list[str], first: int = 0) -> list[str]:
    """A copy with each new sentence at a random place, none before position `first`."""
    sentences = list(sentences)
    for sentence in new:
        sentences.insert(rng.randint(min(first, len(sentences)), len(sentences)), sentence)
    return sentences


def clean_answer(rng: random.Random, verb: str, steps: int, warned: int) -> list[str]:
    """`steps` distinct steps of the verb in random order, after one warning if `warned`."""
    return rng.sample(world.WARNINGS, warned) + rng.sample(world.STEPS[verb], steps)


# -- the SFT policy's answers -----------------------------------------------------------------------------------------


def sft_response(rng: random.Random, prompt: str) -> str:
    """An answer of at most 32 tokens that depends on the verb and a little on the hazard; longer draws are dropped."""
    verb, _ = world.parse_prompt(prompt)
    h = world.hazard(prompt)
    while True:
        if rng.random() < SFT_REFUSAL_SHARE[h]:
            sentences, warned = [rng.choice(world.REFUSALS)], 0
        else:
            warned = int(rng.random() < SFT_WARNING_SHARE[h])
            sentences = clean_answer(rng, verb, draw(rng, SFT_STEPS[h]), warned)
        fillers = rng.sample(world.FILLERS, draw(rng, SFT_FILLERS))
        response = " ".join(insert(rng, sentences, fillers, first=warned))  # an opening warning stays in front
        if count_tokens(response) <= MAX_SFT_TOKENS:
            return response


# -- the preference data's answers ------------------------------------------------------------------------------------


def grid_answer(rng: random.Random, verb: str) -> list[str]:
    """Steps with or without an opening warning and nothing else; densest around the border of safe and unsafe."""
    warned = rng.randint(0, 1)
    steps = draw(rng, {0: 0.02 * warned, 1: 0.28, 2: 0.30, 3: 0.20, 4: 0.20})
    return clean_answer(rng, verb, steps, warned)


def other_step(rng: random.Random, verb: str) -> str:
    """A step of another verb."""
    return rng.choice([step for step, owner in world.VERB_OF_STEP.items() if owner != verb])


def any_sentence(rng: random.Random, verb: str) -> str:
    """One sentence of any kind, half of the time a step of the verb."""
    kind = draw(rng, {"step": 5, "other": 1, "warning": 2, "refusal": 0.5, "filler": 1, "broken": 1})
    if kind == "broken":
        return break_sentence(rng, any_sentence(rng, verb))
    if kind == "other":
        return other_step(rng, verb)
    return rng.choice(
        {"step": world.STEPS[verb], "warning": world.WARNINGS, "refusal": world.REFUSALS, "filler": world.FILLERS}[kind]
    )


def break_sentence(rng: random.Random, sentence: str) -> str:
    """The sentence with a word dropped, swapped or replaced, cut short, without its full stop, or random words."""
    tokens = sentence.replace(".", " .").split()
    words = tokens[:-1] or tokens
    kind = rng.choice(("drop", "swap", "replace", "replace", "cut", "merge", "random"))
    spot = rng.randrange(len(words))
    if kind == "drop":
        words = words[:spot] + words[spot + 1 :]
    elif kind == "swap":
        other = rng.randrange(len(words))
        words[spot], words[other] = words[other], words[spot]
    elif kind == "replace":
        words[spot] = rng.choice(WORDS)
    elif kind == "cut":
        words = words[: rng.randint(1, len(words))]
    elif kind == "random":
        words = rng.choices(WORDS, k=rng.randint(1, 4))
    stop = "" if kind in ("cut", "merge") else "."
    return (" ".join(words) + stop).strip()


WORDS = [word for word in world.words() if word not in ".?"]


def wide_sentences(rng: random.Random, verb: str) -> list[str]:
    """The sentences of one answer of a random kind."""
    kind = draw(
        rng,
        {
            "grid": 0.34,
            "talkative": 0.07,
            "chatter": 0.03,
            "refusal": 0.05,
            "repeats": 0.12,
            "other verb": 0.14,
            "warnings": 0.10,
            "broken": 0.08,
            "anything": 0.07,
        },
    )
    base = grid_answer(rng, verb)
    if kind == "talkative":
        return insert(rng, base, rng.choices(world.FILLERS, k=rng.randint(1, 2)))
    if kind == "chatter":
        return insert(rng, base[: rng.randint(0, len(base))], rng.choices(world.FILLERS, k=rng.randint(2, 5)))
    if kind == "refusal":
        refusals = rng.choices(world.REFUSALS, k=rng.choice((1, 1, 2)))
        return insert(rng, rng.choice(([], [], base)), refusals)
    if kind == "repeats":
        return insert(rng, base, rng.choices(base, k=draw(rng, {1: 5, 2: 3, 3: 1, 4: 1})))
    if kind == "other verb":
        base = rng.choice((base, base, base[:1], []))
        return insert(rng, base, [other_step(rng, verb) for _ in range(draw(rng, {1: 5, 2: 3, 3: 2, 4: 1}))])
    if kind == "warnings":  # twice, in the middle, at the end, or nothing else
        base = rng.choice((base, base, base, []))
        return insert(rng, base, rng.choices(world.WARNINGS, k=draw(rng, {1: 6, 2: 3, 3: 1})))
    if kind == "broken":
        for _ in range(rng.choice((1, 1, 2))):
            spot = rng.randrange(len(base))
            base[spot] = break_sentence(rng, base[spot])
        return base
    if kind == "anything":
        return [any_sentence(rng, verb) for _ in range(rng.randint(1, 8))]
    return base


def wide_response(rng: random.Random, prompt: str) -> str:
    """One non-empty answer of the preference data: SFT-like in one case out of six, else of any kind."""
    verb, _ = world.parse_prompt(prompt)
    if rng.random() < 1 / 6:
        return sft_response(rng, prompt)
    while True:
        response = " ".join(wide_sentences(rng, verb)).strip()
        if response:
            return response


def one_edit(rng: random.Random, prompt: str, response: str) -> str:
    """The answer with one sentence added, removed, replaced or moved; never empty."""
    verb, _ = world.parse_prompt(prompt)
    while True:
        sentences = world.split_sentences(response)
        spot = rng.randrange(len(sentences))
        kind = rng.choice(("add", "warn", "remove", "replace", "move"))
        if kind == "add":
            sentences.insert(rng.randint(0, len(sentences)), any_sentence(rng, verb))
        elif kind == "warn":
            sentences.insert(0, rng.choice(world.WARNINGS))
        elif kind == "remove":
            sentences.pop(spot)
        elif kind == "replace":
            sentences[spot] = any_sentence(rng, verb)
        elif kind == "move":
            sentences.insert(rng.randint(0, len(sentences) - 1), sentences.pop(spot))
        edited = " ".join(sentences).strip()
        if edited and edited != response:
            return edited


# -- preference pairs -------------------------------------------------------------------------------------------------


def prefers_first(rng: random.Random, difference: float) -> bool:
    """Bradley-Terry: True with probability sigmoid(2 x difference), where difference = score of first - of second."""
    return rng.random() < 1 / (1 + math.exp(-PREFERENCE_SHARPNESS * difference))


def preference_pair(rng: random.Random, prompt: str) -> dict:
    """One row with the columns of PKU-SafeRLHF. The labels are noisy; the exact scores decide how noisy."""
    responses = [wide_response(rng, prompt)]
    edit = rng.random() < ONE_EDIT_SHARE
    responses.append(one_edit(rng, prompt, responses[0]) if edit else wide_response(rng, prompt))
    rewards = [world.exact_reward(prompt, response) for response in responses]
    costs = [world.exact_cost(prompt, response) for response in responses]
    safe = [(cost <= 0) != (rng.random() < SAFETY_FLIP_SHARE) for cost in costs]
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "better_response_id": 0 if prefers_first(rng, rewards[0] - rewards[1]) else 1,
        "safer_response_id": 0 if prefers_first(rng, costs[1] - costs[0]) else 1,
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
    }


def preference_pairs(rng: random.Random, prompts: list[str], count: int) -> list[dict]:
    """`count` rows, prompt by prompt (which compresses well); the prompts share them as evenly as `count` allows."""
    return [preference_pair(rng, prompt) for prompt in sorted(prompts[i % len(prompts)] for i in range(count))]
