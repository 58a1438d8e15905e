"""Concurrent conversations: time to first token, turn by turn."""

import asyncio
import statistics
from functools import partial
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import MAX_EXCHANGES, Target, words
from bench.pairs import Plan, interleave
from bench.report import Goal, Plot, Row, Section, own_row, ratio_row, spread_lines

CONVERSATIONS = 4
TURNS = 15
WORDS = 30
NEW_TOKENS = 24
NOTE = f"""{CONVERSATIONS} concurrent conversations of {TURNS} turns, {WORDS}-word prompts,
{NEW_TOKENS} new tokens; a turn begins when all have finished the previous one. llama-server's
client sends the last {MAX_EXCHANGES} exchanges; our server keeps {MAX_EXCHANGES} to 13."""

Times = list[list[float]]
"""TTFT in ms, per turn and conversation."""


def run(plan: Plan) -> Section:
    with servers.all_targets(plan) as targets:
        pairs = uvloop.run(_measure(plan, targets))
    names = tuple(target.name for target in targets)
    plot = Plot("turns-ttft", "turn", "TTFT, ms", spread_lines(names, _by_turn(pairs)))
    return Section("turns", plan.model.stem, NOTE, names, rows(pairs), (plot,))


async def _measure(plan: Plan, targets: list[Target]) -> list[tuple[Times, ...]]:
    runs = [partial(converse, target) for target in targets]
    return await interleave("turns", runs, plan.pairs, lambda times: median(times, 5, 15))


async def converse(target: Target) -> Times:
    run = uuid4().hex
    times = []
    for _ in range(TURNS):
        asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in range(CONVERSATIONS))
        times.append([1000 * sample.ttft for sample in await asyncio.gather(*asks)])
    return times


def rows(pairs: list[tuple[Times, ...]]) -> list[Row]:
    late = [tuple(median(times, 5, 15) for times in pair) for pair in pairs]
    growth = [tuple(median(t, 11, 15) / median(t, 5, 9) for t in pair) for pair in pairs]
    return [
        ratio_row("turns 5 to 15: TTFT p50, ms", late, Goal("≤", 0.35)),
        own_row("ours: TTFT p50, turns 11 to 15 / turns 5 to 9", growth, Goal("≤", 1.3)),
    ]


def median(times: Times, first: int, last: int) -> float:
    """Return the median over the turns `first` to `last`, counted from 1, of all conversations."""
    return statistics.median(time for turn in times[first - 1 : last] for time in turn)


def _by_turn(pairs: list[tuple[Times, ...]]) -> dict[int, list[tuple[float, ...]]]:
    """Return each turn's times, with every conversation as a run of its own."""
    return {
        turn + 1: [
            conversation
            for pair in pairs
            for conversation in zip(*(times[turn] for times in pair), strict=True)
        ]
        for turn in range(TURNS)
    }
