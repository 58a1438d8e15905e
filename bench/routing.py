"""Time to first token of conversations on three workers, with and without session affinity."""

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import words
from bench.pairs import Plan, interleave
from bench.report import Goal, Section, ratio_row
from services.client.chat_client import ChatClient
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.messages import ChatRequest, Failed, ModelKind, Token
from services.runtime.bus import Bus
from tests.faults.fleet import running_fleet

WORKERS = 3
CONVERSATIONS = 2
TURNS = 8
FIRST_TURN = 3  # that is measured
WORDS = 12
NEW_TOKENS = 100
NOTE = f"""{WORKERS} workers; {CONVERSATIONS} conversations of {TURNS} turns, one request at a time,
{WORDS}-word prompts, {NEW_TOKENS} new tokens, over NATS. Without routing, a random worker gets each
request, like in a queue group: it has cached what it computed when it last had the conversation.
The median of turns {FIRST_TURN} to {TURNS}."""


class RandomDirectory(WorkerDirectory):
    """Rank the workers at random, without session affinity."""

    def rank(
        self,
        key: str,
        model: str | None,
        digest: str | None = None,
        kind: ModelKind = "chat",
    ) -> list[str]:
        found = super().rank(key, model, digest, kind)
        return random.sample(found, len(found))


def run(plan: Plan) -> Section:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_fleet(
            Path(folder),
            inference="services.inference",
            workers=WORKERS,
            MODEL_PATH=str(plan.model),
            MODEL_THREADS=str(servers.THREADS),
        ) as fleet,
    ):
        pairs = uvloop.run(_measure(plan, fleet.nats_url))
    row = ratio_row(f"turns {FIRST_TURN} to {TURNS}: TTFT p50, ms", pairs, Goal("≥", 3))
    return Section("routing", plan.model.stem, NOTE, ("without", "with"), [row])


async def _measure(plan: Plan, url: str) -> Sequence[tuple[float, ...]]:
    unrouted, routed = RandomDirectory(), WorkerDirectory()
    async with Bus.connect(url, "bench") as bus:
        for workers in (unrouted, routed):
            await bus.subscribe(subjects.report(subjects.ANY), workers.on_report)
            while len(workers.reports()) < WORKERS:
                await bus.is_responsive()
        runs = [partial(_converse, ChatClient(bus, workers=each)) for each in (unrouted, routed)]
        return await interleave("routing", runs, plan.pairs, lambda milliseconds: milliseconds)


async def _converse(client: ChatClient) -> float:
    run, times = uuid4().hex, []
    for turn in range(1, TURNS + 1):
        for conversation in range(CONVERSATIONS):
            seconds = await _ttft(client, f"{run} {conversation}")
            if turn >= FIRST_TURN:
                times.append(1000 * seconds)
    return statistics.median(times)


async def _ttft(client: ChatClient, session: str) -> float:
    request = ChatRequest(prompt=words(WORDS), session_id=session, max_tokens=NEW_TOKENS, stop=())
    began, first = time.monotonic(), 0.0
    async with aclosing(client.stream(request)) as events:
        async for event in events:
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Token) and not first:
                first = time.monotonic() - began
    return first
