"""A conversation that outgrows the model's context window."""

import asyncio
import statistics
from functools import partial
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import Sample, Target, words
from bench.pairs import Plan, interleave
from bench.report import Row, Section, ratio_row

TURNS = 20
FIRST_CUT = 9  # the first turn whose prompt does not fit
PAUSE_SECONDS = 3  # in which a user reads the answer and types
WORDS = 50
NEW_TOKENS = 150
NOTE = f"""One conversation of {TURNS} turns, {WORDS}-word prompts, {NEW_TOKENS} new tokens; eight
such exchanges fit the context window of 2,048 tokens. The next prompt comes {PAUSE_SECONDS} s after
an answer, or at once. Of turns {FIRST_CUT} to {TURNS}; the result is the value with pauses divided
by that without."""


def run(plan: Plan) -> Section:
    with servers.whole_stack(plan.model) as up:
        pairs = uvloop.run(_measure(plan, servers.stack_target(up)))
    return Section("window", plan.model.stem, NOTE, ("with pauses", "without"), rows(pairs))


async def _measure(plan: Plan, target: Target) -> list[tuple[list[Sample], ...]]:
    runs = [partial(_converse, target, pause) for pause in (PAUSE_SECONDS, 0)]
    return await interleave("window", runs, plan.pairs, longest)


async def _converse(target: Target, pause: float) -> list[Sample]:
    session, samples = uuid4().hex, []
    for _ in range(TURNS):
        samples.append(await target.ask(session, words(WORDS), NEW_TOKENS))
        await asyncio.sleep(pause)
    return samples[FIRST_CUT - 1 :]


def rows(pairs: list[tuple[list[Sample], ...]]) -> list[Row]:
    values = {
        "TTFT p50, ms": median,
        "longest TTFT, ms": longest,
        "prefilled tokens per turn": prefilled,
    }
    return [
        ratio_row(what, [tuple(value(samples) for samples in pair) for pair in pairs])
        for what, value in values.items()
    ]


def median(samples: list[Sample]) -> float:
    return statistics.median(1000 * sample.ttft for sample in samples)


def longest(samples: list[Sample]) -> float:
    return max(1000 * sample.ttft for sample in samples)


def prefilled(samples: list[Sample]) -> float:
    """Return the mean number of prompt tokens that were not cached."""
    return statistics.mean(sample.prompt_tokens - sample.cached_tokens for sample in samples)
