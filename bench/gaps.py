"""Running streams, beside which a long prompt is read: how long their readers wait for a token."""

import asyncio
import math
import statistics
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from uuid import uuid4

import uvloop

from bench import servers
from bench.bars import Bar
from bench.load import Sample, Target
from bench.pairs import Plan, interleave
from bench.report import Row, Section, compared, own
from bench.words import words

STREAMS = (1, 4, 8)
WORDS = 50
STREAM_TOKENS = 1800  # more than come before it is cut off, and few enough for the context
STEADY = 5  # pieces of each stream, after which its gaps count
BEFORE = 3.0  # seconds
PROMPT = 1450  # letters: with the system prompt and the template, 1,500 tokens
NEW_TOKENS = 8
MOST = Bar("≤", 2.5)
NOTE = """A prompt of 1,500 tokens comes while so many streams run. The gaps between two pieces of
these while it is read, by their median gap before it came; the result is ours."""


class Gaps(NamedTuple):
    relative: dict[str, float]  # while the prompt was read, by the median gap before
    first_token: float  # of the prompt, ms


def run(plan: Plan) -> Section:
    with servers.all_of(plan._replace(peers=())) as targets:
        measured = uvloop.run(_measure(plan, targets))
    names = tuple(target.name for target in targets)
    return Section("gaps", plan.model.stem, NOTE, names, measured)


async def _measure(plan: Plan, targets: list[Target]) -> list[Row]:
    measured = []
    for streams in STREAMS:
        pairs = await interleave(
            f"gaps, {streams} streams",
            [partial(_disturb, target, streams) for target in targets],
            plan.pairs,
            lambda gaps: gaps.relative["mean"],
        )
        measured += rows(streams, pairs)
    return measured


async def _disturb(target: Target, streams: int) -> Gaps:
    run = uuid4().hex
    samples = [Sample() for _ in range(streams)]
    tasks = [
        asyncio.create_task(target.ask(f"{run} {i}", words(WORDS), STREAM_TOKENS, sample))
        for i, sample in enumerate(samples)
    ]
    while any(len(sample.pieces) < STEADY for sample in samples):
        await asyncio.sleep(0.02)
    await asyncio.sleep(BEFORE)
    long = await target.ask(f"{run} long", words(PROMPT), NEW_TOKENS)
    await _cut_off(tasks)
    return gaps(samples, long)


async def _cut_off(tasks: list[asyncio.Task[Sample]]) -> None:
    if any(task.done() for task in tasks):
        raise RuntimeError("a stream ended before the prompt was read: its gaps are not known")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0.5)  # until the server has noticed


def gaps(streams: list[Sample], long: Sample) -> Gaps:
    before, during = [], []
    for stream in streams:
        for start, end in pairwise(stream.pieces[STEADY - 1 :]):
            if end <= long.asked:
                before.append(end - start)
            elif start < long.pieces[0]:
                during.append(end - start)
    usual = statistics.median(before)
    measures = {
        "median": statistics.median(during),
        "mean": statistics.mean(during),
        "95th percentile": _p95(during),
        "longest": max(during),
    }
    return Gaps({what: gap / usual for what, gap in measures.items()}, 1000 * long.first)


def _p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def rows(streams: int, pairs: list[tuple[Gaps, ...]]) -> list[Row]:
    first = [tuple(gaps.first_token for gaps in pair) for pair in pairs]
    return [
        *(
            own(
                f"{streams} running: {what} gap",
                [tuple(gaps.relative[what] for gaps in pair) for pair in pairs],
                MOST,
            )
            for what in pairs[0][0].relative
        ),
        compared(f"{streams} running: TTFT of the long prompt, ms", first),
    ]
