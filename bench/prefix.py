"""Concurrent new sessions that share a long system prompt, which is in the prefix cache."""

import asyncio
import statistics
from functools import partial
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import FineTuneTarget, OpenAITarget, Target, words
from bench.pairs import Plan, interleave
from bench.report import Goal, Section, ratio_row

SESSIONS = 8
SYSTEM_WORDS = 500
WORDS = 30
NEW_TOKENS = 24
ROW_TITLE = f"{SESSIONS} new sessions: TTFT p50, ms"
GOAL = Goal("≤", 0.1)
NOTE = f"""{SESSIONS} concurrent new sessions with one {SYSTEM_WORDS}-word system prompt,
{WORDS}-word prompts, {NEW_TOKENS} new tokens. Both servers have answered one other session with
that system prompt just before. llama-server gets a new system prompt in each pair of runs; ours is
a setting (`CHAT_SYSTEM_PROMPT`) and stays the same."""


def run(plan: Plan) -> Section:
    with (
        servers.whole_stack(plan.model, CHAT_SYSTEM_PROMPT=words(SYSTEM_WORDS)) as up,
        servers.llama_server(plan.model) as theirs,
    ):
        pairs = uvloop.run(_measure(plan, servers.stack_target(up), theirs))
    row = ratio_row(ROW_TITLE, pairs, GOAL)
    return Section("prefix", plan.model.stem, NOTE, (FineTuneTarget.name, theirs.name), [row])


async def _measure(
    plan: Plan, ours: FineTuneTarget, theirs: OpenAITarget
) -> list[tuple[float, ...]]:
    return await interleave(
        "prefix",
        [partial(_ttft, ours), partial(with_new_system, theirs)],
        plan.pairs,
        lambda ttft: ttft,
    )


async def with_new_system(server: OpenAITarget) -> float:
    return await _ttft(server.with_system(words(SYSTEM_WORDS)))


async def _ttft(target: Target) -> float:
    """Return the median, in ms."""
    run = uuid4().hex
    await target.ask(f"{run} before", words(WORDS), NEW_TOKENS)
    asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in range(SESSIONS))
    return 1000 * statistics.median(sample.ttft for sample in await asyncio.gather(*asks))
