"""
Requests that arrive at random, as those of many people do, with real text of mixed lengths:
latencies, and goodput: the share of requests that were served well enough.
"""

import asyncio
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import Sample, Target
from bench.pairs import Plan, interleave
from bench.report import Goal, Row, Section, own_row, ratio_row
from services.edge.activity import percentile

REQUESTS = 30
LOAD = 1.0  # requests that arrive while a medium one alone is answered
PROMPT_WORDS = (8, 120)
NEW_TOKENS = (8, 96)
ALONE = 5  # medium requests, one after the other
SLOWER = 4.0
TEXTS = sorted(Path("docs").glob("*.md"))
NOTE = f"""{REQUESTS} new sessions arrive by a Poisson process, {LOAD:g} in the time that a medium
one alone takes llama-server. Prompts are {PROMPT_WORDS[0]} to {PROMPT_WORDS[1]} words of this
project's documentation, answers {NEW_TOKENS[0]} to {NEW_TOKENS[1]} tokens, both distributed evenly
by their logarithm; all servers get the same. Goodput is the share of requests whose TTFT and time
per token are at most {SLOWER:g} times those of a medium one alone on llama-server. The result is
the first value divided by the second."""


class Request(NamedTuple):
    at: float  # seconds after the first one
    prompt: str
    new_tokens: int


class Latency(NamedTuple):
    """Milliseconds: to the first token, and between two tokens."""

    ttft: float
    per_token: float


def run(plan: Plan) -> Section:
    with servers.all_targets(plan) as targets:
        alone, pairs = uvloop.run(_measure(plan, targets))
    names = tuple(target.name for target in targets)
    return Section("arrivals", plan.model.stem, NOTE, names, rows(alone, pairs))


def rows(alone: Latency, pairs: Sequence[tuple[list[Latency], ...]]) -> list[Row]:
    def by_server(figure: partial[float]) -> list[tuple[float, ...]]:
        return [tuple(map(figure, pair)) for pair in pairs]

    return [
        ratio_row("TTFT p50, ms", by_server(partial(percentile_of, "ttft", 0.5)), Goal("≤", 1.0)),
        ratio_row("TTFT p90, ms", by_server(partial(percentile_of, "ttft", 0.9)), Goal("≤", 1.0)),
        ratio_row("time per token p50, ms", by_server(partial(percentile_of, "per_token", 0.5))),
        ratio_row("time per token p90, ms", by_server(partial(percentile_of, "per_token", 0.9))),
        own_row("goodput, % of requests", by_server(partial(goodput, alone))),
    ]


def percentile_of(field: str, share: float, latencies: Sequence[Latency]) -> float:
    found = percentile(sorted(getattr(latency, field) for latency in latencies), share)
    assert found is not None, "there were requests"
    return found


def goodput(alone: Latency, latencies: Sequence[Latency]) -> float:
    """Return the percentage of requests that are not much slower than one alone."""
    good = [
        latency.ttft <= SLOWER * alone.ttft and latency.per_token <= SLOWER * alone.per_token
        for latency in latencies
    ]
    return 100 * sum(good) / len(good)


def arrivals(rng: random.Random, interval: float) -> list[Request]:
    """Return requests that arrive every `interval` seconds on average."""
    at, found = 0.0, []
    for _ in range(REQUESTS):
        prompt = text(rng, log_uniform(rng, *PROMPT_WORDS))
        found.append(Request(at, prompt, log_uniform(rng, *NEW_TOKENS)))
        at += rng.expovariate(1 / interval)
    return found


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def text(rng: random.Random, count: int) -> str:
    """Return consecutive words of the documentation."""
    words = rng.choice(TEXTS).read_text().split()
    start = rng.randrange(max(1, len(words) - count))
    return " ".join(words[start : start + count])


async def _measure(
    plan: Plan, targets: list[Target]
) -> tuple[Latency, list[tuple[list[Latency], ...]]]:
    medium = [_medium(words) for words in (PROMPT_WORDS, NEW_TOKENS)]
    samples = [await _ask_alone(target, *medium) for target in targets for _ in range(ALONE)]
    theirs = samples[ALONE : 2 * ALONE]
    seconds = statistics.median(each.piece_times[-1] - each.sent_at for each in theirs)
    alone = Latency(*map(statistics.median, zip(*map(latency_of, theirs), strict=True)))
    seeds = [random.randrange(2**32) for _ in range(plan.pairs)]
    runs = [partial(_serve, target, iter(seeds), seconds / LOAD) for target in targets]
    pairs = await interleave(
        "arrivals", runs, plan.pairs, lambda found: percentile_of("ttft", 0.5, found)
    )
    return alone, pairs


def _medium(bounds: tuple[int, int]) -> int:
    return round(math.sqrt(bounds[0] * bounds[1]))


async def _ask_alone(target: Target, words: int, new_tokens: int) -> Sample:
    return await target.ask(uuid4().hex, text(random.Random(), words), new_tokens)


async def _serve(target: Target, seeds: Iterator[int], interval: float) -> list[Latency]:
    async def ask(request: Request) -> Latency:
        await asyncio.sleep(request.at)
        return latency_of(await target.ask(uuid4().hex, request.prompt, request.new_tokens))

    return await asyncio.gather(*map(ask, arrivals(random.Random(next(seeds)), interval)))


def latency_of(sample: Sample) -> Latency:
    decoding = sample.piece_times[-1] - sample.piece_times[0]
    return Latency(1000 * sample.ttft, 1000 * decoding / max(1, sample.completion_tokens - 1))
