"""New sessions that come at once, and share a long system prompt that was read before."""

import asyncio
import statistics
from functools import partial
from uuid import uuid4

import uvloop

from bench import servers
from bench.bars import Bar
from bench.load import FineTune, OpenAI, Target
from bench.pairs import Plan, interleave
from bench.report import Section, compared
from bench.words import words

SESSIONS = 8
SYSTEM_WORDS = 500
WORDS = 30
NEW_TOKENS = 24
WHAT = f"{SESSIONS} new sessions: TTFT p50, ms"
SOON = Bar("≤", 0.1)
NOTE = f"""{SESSIONS} new sessions at once with one {SYSTEM_WORDS}-word system prompt, {WORDS}-word
prompts, {NEW_TOKENS} new tokens. One session more had been answered with that system prompt just
before, by both servers. llama-server gets another system prompt in each pair of runs; ours is a
setting (`CHAT_SYSTEM_PROMPT`), and stays the same over the pairs."""


def run(plan: Plan) -> Section:
    with (
        servers.whole_stack(plan.model, CHAT_SYSTEM_PROMPT=words(SYSTEM_WORDS)) as up,
        servers.llama_server(plan.model) as theirs,
    ):
        pairs = uvloop.run(_measure(plan, servers.client(up), theirs))
    row = compared(WHAT, pairs, SOON)
    return Section("prefix", plan.model.stem, NOTE, (FineTune.name, theirs.name), [row])


async def _measure(plan: Plan, ours: FineTune, theirs: OpenAI) -> list[tuple[float, ...]]:
    return await interleave(
        "prefix",
        [partial(_first_token, ours), partial(with_new_system, theirs)],
        plan.pairs,
        lambda first: first,
    )


async def with_new_system(server: OpenAI) -> float:
    return await _first_token(server.with_system(words(SYSTEM_WORDS)))


async def _first_token(target: Target) -> float:
    """The median, in ms."""
    run = uuid4().hex
    await target.ask(f"{run} before", words(WORDS), NEW_TOKENS)
    asks = (target.ask(f"{run} {i}", words(WORDS), NEW_TOKENS) for i in range(SESSIONS))
    return 1000 * statistics.median(sample.first for sample in await asyncio.gather(*asks))
