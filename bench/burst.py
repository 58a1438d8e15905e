"""
Bursts: c chats at once, each with a prompt of its own; tokens a second over all, time to the first.
Once more with a hundred idle sessions on our side, whose conversations are kept warm.
"""

import asyncio
import statistics
from functools import partial
from typing import NamedTuple
from uuid import uuid4

import uvloop

from bench import servers
from bench.bars import Bar
from bench.load import Sample, Target, at_most
from bench.pairs import Plan, interleave, tell
from bench.plots import Plot, lines
from bench.report import Row, Section, compared
from bench.words import words

CHATS = (1, 2, 4, 8, 16)
WORDS = 50
NEW_TOKENS = 64
FAST = {chats: Bar("≥", 1.1) for chats in CHATS} | {16: Bar("≥", 1.0)}
SOON = {16: Bar("≤", 0.6)}
IDLE_SESSIONS = 100
IDLE_TURNS = 2
IDLE_TOKENS = 16
NOTE = f"""Up to {CHATS[-1]} chats at once, {WORDS}-word prompts, {NEW_TOKENS} new tokens. The
result is our number by llama-server's: the median of the pairs of runs (lowest to highest)."""
IDLE_NOTE = f"""{NOTE}
Before it, {IDLE_SESSIONS} sessions had {IDLE_TURNS} turns each on our side."""


class Burst(NamedTuple):
    tokens_per_second: float
    first_token: float  # median, ms


Pairs = dict[int, list[tuple[Burst, ...]]]  # by the number of chats


def run(plan: Plan) -> Section:
    return _run(plan, "burst", NOTE, idle_sessions=0)


def run_idle(plan: Plan) -> Section:
    return _run(plan, "idle", IDLE_NOTE, IDLE_SESSIONS)


def _run(plan: Plan, load: str, note: str, idle_sessions: int) -> Section:
    with servers.all_of(plan) as targets:
        pairs = uvloop.run(_bursts(plan, load, targets, idle_sessions))
    names = tuple(target.name for target in targets)
    return Section(load, plan.model.stem, note, names, _rows(pairs), _plots(load, names, pairs))


async def _bursts(plan: Plan, load: str, targets: list[Target], idle_sessions: int) -> Pairs:
    for target in targets:
        await burst(target, 2)  # warm
    await _converse(targets[0], idle_sessions)
    return {
        chats: await interleave(
            f"{load}, {chats} chats",
            [partial(burst, target, chats) for target in targets],
            plan.pairs,
            lambda burst: burst.tokens_per_second,
        )
        for chats in CHATS
    }


async def burst(target: Target, chats: int) -> Burst:
    run = uuid4().hex
    asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in range(chats))
    return sum_up(await asyncio.gather(*asks))


async def _converse(target: Target, sessions: int) -> None:
    for turn in range(IDLE_TURNS if sessions else 0):
        tell(f"idle: turn {turn + 1} of {IDLE_TURNS} of {sessions} sessions")
        asks = (target.ask(f"idle {i}", words(WORDS), IDLE_TOKENS) for i in range(sessions))
        await at_most(servers.SLOTS, asks)


def sum_up(samples: list[Sample]) -> Burst:
    began = min(sample.asked for sample in samples)
    ended = max(sample.pieces[-1] for sample in samples)
    tokens = sum(sample.completion_tokens for sample in samples)
    return Burst(tokens / (ended - began), 1000 * statistics.median(s.first for s in samples))


def _rows(pairs: Pairs) -> list[Row]:
    rows = []
    for chats, bursts in pairs.items():
        speed = [tuple(burst.tokens_per_second for burst in pair) for pair in bursts]
        first = [tuple(burst.first_token for burst in pair) for pair in bursts]
        rows.append(compared(f"{chats} at once: tokens/s", speed, FAST[chats]))
        rows.append(compared(f"{chats} at once: TTFT p50, ms", first, SOON.get(chats)))
    return rows


def _plots(load: str, names: tuple[str, ...], pairs: Pairs) -> tuple[Plot, ...]:
    speed = {c: [tuple(b.tokens_per_second for b in pair) for pair in pairs[c]] for c in pairs}
    first = {c: [tuple(b.first_token for b in pair) for pair in pairs[c]] for c in pairs}
    return (
        Plot(f"{load}-throughput", "chats at once", "tokens/s", lines(names, speed)),
        Plot(f"{load}-ttft", "chats at once", "TTFT p50, ms", lines(names, first)),
    )
