"""Many more sessions than slots: how much of their prompts is found in the prefix cache."""

import random
from contextlib import closing
from typing import NamedTuple
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import Sample, Target, gather_limited, words
from bench.pairs import Plan, show
from bench.report import Goal, Row, Section, Spread
from services.inference.engine.llama import Llama

SESSIONS = 200
SLOTS = 8
TURNS = 6  # fewer than the 10 exchanges that a prompt keeps
WORDS = 30
NEW_TOKENS = 24
OPENING = f"<|im_start|>system\n{servers.SYSTEM}<|im_end|>\n<|im_start|>user\n"
NOTE = f"""{SESSIONS} sessions have {TURNS} turns each on {SLOTS} slots, in random order, at most
{SLOTS} concurrently; {WORDS}-word prompts, {NEW_TOKENS} new tokens. Known tokens were computed
before: of a session's first prompt the system prompt, of a later one the previous prompt and its
answer."""


class Shares(NamedTuple):
    """Cached prompt tokens, in % of known tokens cached tokens and of all tokens."""

    of_known: float
    of_all: float


def run(plan: Plan) -> Section:
    opening = opening_tokens(plan)
    with servers.whole_stack(plan.model, MODEL_PARALLEL=str(SLOTS)) as up:
        sessions = uvloop.run(_rotate(servers.stack_target(up), opening))
    known, of_all = shares(sessions, opening)
    rows = [
        Row("known prompt tokens cached, %", (), Spread.of([known]), Goal("≥", 90)),
        Row("all prompt tokens cached, %", (), Spread.of([of_all])),
    ]
    return Section("rotation", plan.model.stem, NOTE, (), rows)


async def _rotate(target: Target, opening: int) -> list[list[Sample]]:
    """Return the samples of each session."""
    run = uuid4().hex
    await target.ask(f"{run} before", words(WORDS), NEW_TOKENS)
    sessions: list[list[Sample]] = [[] for _ in range(SESSIONS)]

    async def ask(i: int) -> None:
        sessions[i].append(await target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS))

    for turn in range(TURNS):
        await gather_limited(SLOTS, map(ask, random.sample(range(SESSIONS), SESSIONS)))
        so_far = shares(sessions, opening)
        show(
            f"rotation, turn {turn + 1} of {TURNS}: {so_far.of_known:.1f} % of known tokens cached"
        )
    return sessions


def shares(sessions: list[list[Sample]], opening: int) -> Shares:
    """Return the cached shares; all prompts share their first `opening` tokens."""
    known = known_cached = prompt = cached = 0
    for samples in sessions:
        before = opening
        for sample in samples:
            known += before
            known_cached += min(sample.cached_tokens, before)
            prompt += sample.prompt_tokens
            cached += sample.cached_tokens
            # the last token of an answer is never decoded, as nothing follows it
            before = sample.prompt_tokens + sample.completion_tokens - 1
    return Shares(100 * known_cached / known, 100 * cached / prompt)


def opening_tokens(plan: Plan) -> int:
    model = Llama(
        plan.model,
        context=64,
        parallel=1,
        threads=1,
        gpu_layers=0,
        on_progress=lambda share: True,
    )
    with closing(model):
        return len(model.tokenize(OPENING, special=True))
