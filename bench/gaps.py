"""Inter-token latency of running streams while a long prompt is prefilled."""

import asyncio
import math
import statistics
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import Sample, Target, words
from bench.pairs import Plan, interleave
from bench.report import Goal, Row, Section, own_row, ratio_row

STREAMS = (1, 4, 8)
WORDS = 50
STREAM_TOKENS = 1800  # never reached: the streams are cancelled; fits the context window
STEADY = 5  # pieces of a stream, after which its gaps count
BEFORE_SECONDS = 3.0
PROMPT_WORDS = 1450  # with system prompt and template 1,500 tokens
NEW_TOKENS = 8
GAP_GOAL = Goal("≤", 2.5)
NOTE = """A prompt of 1,500 tokens arrives while streams run. Gaps between two pieces of a stream
during its prefill, divided by the median gap before; the result is ours."""


class Gaps(NamedTuple):
    relative: dict[str, float]  # gaps during the prefill / median gap before
    ttft: float  # of the prompt, ms


def run(plan: Plan) -> Section:
    with servers.all_targets(plan._replace(peers=())) as targets:
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
    while any(len(sample.piece_times) < STEADY for sample in samples):
        await asyncio.sleep(0.02)
    await asyncio.sleep(BEFORE_SECONDS)
    long = await target.ask(f"{run} long", words(PROMPT_WORDS), NEW_TOKENS)
    await _cancel(tasks)
    return gaps(samples, long)


async def _cancel(tasks: list[asyncio.Task[Sample]]) -> None:
    if any(task.done() for task in tasks):
        raise RuntimeError("a stream ended before the long prompt was prefilled")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0.5)  # until the server has freed the slots


def gaps(streams: list[Sample], long: Sample) -> Gaps:
    before, during = [], []
    for stream in streams:
        for start, end in pairwise(stream.piece_times[STEADY - 1 :]):
            if end <= long.sent_at:
                before.append(end - start)
            elif start < long.piece_times[0]:
                during.append(end - start)
    usual_gap = statistics.median(before)
    measures = {
        "median": statistics.median(during),
        "mean": statistics.mean(during),
        "95th percentile": _p95(during),
        "longest": max(during),
    }
    return Gaps({what: gap / usual_gap for what, gap in measures.items()}, 1000 * long.ttft)


def _p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def rows(streams: int, pairs: list[tuple[Gaps, ...]]) -> list[Row]:
    ttfts = [tuple(gaps.ttft for gaps in pair) for pair in pairs]
    return [
        *(
            own_row(
                f"{streams} streams: {what} gap",
                [tuple(gaps.relative[what] for gaps in pair) for pair in pairs],
                GAP_GOAL,
            )
            for what in pairs[0][0].relative
        ),
        ratio_row(f"{streams} streams: TTFT of the long prompt, ms", ttfts),
    ]
