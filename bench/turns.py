"""Conversations side by side: time to the first token, turn by turn."""

import asyncio
import statistics
from functools import partial
from uuid import uuid4

import uvloop

from bench import servers
from bench.bars import Bar
from bench.load import KEPT, Target
from bench.pairs import Plan, interleave
from bench.plots import Plot, lines
from bench.report import Row, Section, compared, own
from bench.words import words

CONVERSATIONS = 4
TURNS = 15
WORDS = 30
NEW_TOKENS = 24
NOTE = f"""{CONVERSATIONS} conversations side by side, {TURNS} turns, {WORDS}-word prompts,
{NEW_TOKENS} new tokens; a turn begins when all have finished the last one. llama-server's client
sends the last {KEPT} exchanges along; our server keeps {KEPT} to 13."""

Times = list[list[float]]
"""To the first token in ms, of each conversation in each turn."""


def run(plan: Plan) -> Section:
    with servers.all_of(plan) as targets:
        pairs = uvloop.run(_measure(plan, targets))
    names = tuple(target.name for target in targets)
    plot = Plot("turns-ttft", "turn", "TTFT, ms", lines(names, _by_turn(pairs)))
    return Section("turns", plan.model.stem, NOTE, names, rows(pairs), (plot,))


async def _measure(plan: Plan, targets: list[Target]) -> list[tuple[Times, ...]]:
    runs = [partial(converse, target) for target in targets]
    return await interleave("turns", runs, plan.pairs, lambda times: middle(times, 5, 15))


async def converse(target: Target) -> Times:
    run = uuid4().hex
    times = []
    for _ in range(TURNS):
        asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in range(CONVERSATIONS))
        times.append([1000 * sample.first for sample in await asyncio.gather(*asks)])
    return times


def rows(pairs: list[tuple[Times, ...]]) -> list[Row]:
    late = [tuple(middle(times, 5, 15) for times in pair) for pair in pairs]
    growth = [tuple(middle(t, 11, 15) / middle(t, 5, 9) for t in pair) for pair in pairs]
    return [
        compared("turns 5 to 15: TTFT p50, ms", late, Bar("≤", 0.35)),
        own("ours: TTFT p50 of turns 11 to 15 by that of 5 to 9", growth, Bar("≤", 1.3)),
    ]


def middle(times: Times, first: int, last: int) -> float:
    """The median over some turns, which count from 1, and all conversations."""
    return statistics.median(time for turn in times[first - 1 : last] for time in turn)


def _by_turn(pairs: list[tuple[Times, ...]]) -> dict[int, list[tuple[float, ...]]]:
    """All conversations of all runs, as if each were a run of its own."""
    return {
        turn + 1: [
            conversation
            for pair in pairs
            for conversation in zip(*(times[turn] for times in pair), strict=True)
        ]
        for turn in range(TURNS)
    }
