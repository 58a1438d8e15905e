"""
Bursts of concurrent chats with different prompts: total tokens/s, and time to first token. The load
`idle` is the same beside a hundred idle sessions whose prefixes are cached.
"""

import asyncio
import statistics
from functools import partial
from typing import NamedTuple
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import Sample, Target, gather_limited, words
from bench.pairs import Plan, interleave, show
from bench.report import Goal, Plot, Row, Section, ratio_row, spread_lines

CHATS = (1, 2, 4, 8, 16)
WORDS = 50
NEW_TOKENS = 64
THROUGHPUT_GOALS = {chats: Goal("≥", 1.1) for chats in CHATS} | {16: Goal("≥", 1.0)}
TTFT_GOALS = {16: Goal("≤", 0.6)}
IDLE_SESSIONS = 100
IDLE_TURNS = 2
IDLE_TOKENS = 16
NOTE = f"""Up to {CHATS[-1]} concurrent chats, {WORDS}-word prompts, {NEW_TOKENS} new tokens. The
result is our value divided by llama-server's: the median over the pairs of runs, with the lowest
and the highest."""
IDLE_NOTE = f"""{NOTE}
Before that, {IDLE_SESSIONS} sessions had {IDLE_TURNS} turns each on our server."""


class Burst(NamedTuple):
    tokens_per_second: float
    ttft: float  # median, ms


Pairs = dict[int, list[tuple[Burst, ...]]]  # by the number of chats


def run(plan: Plan) -> Section:
    return _run(plan, "burst", NOTE, idle_sessions=0)


def run_idle(plan: Plan) -> Section:
    return _run(plan, "idle", IDLE_NOTE, IDLE_SESSIONS)


def _run(plan: Plan, load: str, note: str, idle_sessions: int) -> Section:
    with servers.all_targets(plan) as targets:
        pairs = uvloop.run(_bursts(plan, load, targets, idle_sessions))
    names = tuple(target.name for target in targets)
    return Section(load, plan.model.stem, note, names, _rows(pairs), _plots(load, names, pairs))


async def _bursts(plan: Plan, load: str, targets: list[Target], idle_sessions: int) -> Pairs:
    for target in targets:
        await burst(target, 2)  # warm up
    await _converse(targets[0], idle_sessions)
    return {
        chats: await interleave(
            f"{load}, {chats} chats",
            [partial(burst, target, chats) for target in targets],
            plan.pairs,
            lambda found: found.tokens_per_second,
        )
        for chats in CHATS
    }


async def burst(target: Target, chats: int) -> Burst:
    run = uuid4().hex
    asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in range(chats))
    return summarize(await asyncio.gather(*asks))


async def _converse(target: Target, sessions: int) -> None:
    for turn in range(IDLE_TURNS if sessions else 0):
        show(f"idle: turn {turn + 1} of {IDLE_TURNS} of {sessions} sessions")
        asks = (target.ask(f"idle {i}", words(WORDS), IDLE_TOKENS) for i in range(sessions))
        await gather_limited(servers.SLOTS, asks)


def summarize(samples: list[Sample]) -> Burst:
    began = min(sample.sent_at for sample in samples)
    ended = max(sample.piece_times[-1] for sample in samples)
    tokens = sum(sample.completion_tokens for sample in samples)
    return Burst(tokens / (ended - began), 1000 * statistics.median(s.ttft for s in samples))


def _rows(pairs: Pairs) -> list[Row]:
    rows = []
    for chats, bursts in pairs.items():
        speed = [tuple(burst.tokens_per_second for burst in pair) for pair in bursts]
        first = [tuple(burst.ttft for burst in pair) for pair in bursts]
        rows.append(ratio_row(f"{chats} concurrent: tokens/s", speed, THROUGHPUT_GOALS[chats]))
        rows.append(ratio_row(f"{chats} concurrent: TTFT p50, ms", first, TTFT_GOALS.get(chats)))
    return rows


def _plots(load: str, names: tuple[str, ...], pairs: Pairs) -> tuple[Plot, ...]:
    speed = {c: [tuple(b.tokens_per_second for b in pair) for pair in pairs[c]] for c in pairs}
    first = {c: [tuple(b.ttft for b in pair) for pair in pairs[c]] for c in pairs}
    return (
        Plot(f"{load}-throughput", "concurrent chats", "tokens/s", spread_lines(names, speed)),
        Plot(f"{load}-ttft", "concurrent chats", "TTFT p50, ms", spread_lines(names, first)),
    )
