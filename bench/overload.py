"""Requests that there is no room for, and answers that are cancelled: how soon both are told."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import uvloop

from bench import servers
from bench.bars import Bar, Spread
from bench.pairs import Plan, tell
from bench.report import Row, Section
from bench.words import words
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import (
    Cancel,
    ChatRequest,
    Done,
    Failed,
    RequestAdmitted,
    StreamEvent,
    Token,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Inbox

SLOTS, QUEUE = 8, 16
AT_ONCE = 100
WORDS = 50
LONG = 1450  # words of a prompt that takes seconds to read
NEW_TOKENS = 64
ENDLESS = 1500
NOTE = f"""One worker with {SLOTS} slots and a queue of {QUEUE}, asked over NATS. {AT_ONCE} requests
at once: milliseconds from sending them to a refusal, the median. Then a cancel, from sending it to
the answer's end, while {SLOTS} answers run: of one that runs, and of one that waits; and of a
prompt of {LONG} words that is being read, alone. It may have to wait for the step that is being
computed."""


class Asker:
    """Asks the one worker; all events come into one inbox."""

    def __init__(self, bus: Bus, worker_id: str, inbox: Inbox, reply: str) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._inbox = inbox
        self._reply = reply

    async def ask(self, request_id: str, length: int, tokens: int) -> float | None:
        """Milliseconds until the request was refused; None: it was taken."""
        request = ChatRequest(
            prompt=words(length), session_id=request_id, request_id=request_id,
            max_tokens=tokens, stop=(),
        )  # fmt: skip
        subject = subjects.worker_request(self._worker_id, subjects.OPEN_TENANT)
        headers = {subjects.REPLY_HEADER: self._reply}
        began = time.monotonic()
        try:
            await self._bus.request(subject, request, RequestAdmitted, headers=headers)
        except ServiceError as error:
            assert error.code == "overloaded", error
            return 1000 * (time.monotonic() - began)
        return None

    async def cancel(self, request_id: str) -> float:
        """Milliseconds until an answer has ended."""
        began = time.monotonic()
        await self._bus.publish(subjects.cancel(subjects.OPEN_TENANT, request_id), Cancel())
        await self.until(Done)
        return 1000 * (time.monotonic() - began)

    async def until(self, kind: type[StreamEvent], times: int = 1) -> None:
        while times:
            event: StreamEvent = decode((await self._inbox.next(60)).data, StreamEvent)  # type: ignore[arg-type]
            assert not isinstance(event, Failed), event
            times -= isinstance(event, kind)


def run(plan: Plan) -> Section:
    settings = {"MODEL_PARALLEL": str(SLOTS), "MODEL_QUEUE": str(QUEUE)}
    with servers.whole_stack(plan.model, **settings) as up:
        rows = uvloop.run(_measure(plan, f"nats://127.0.0.1:{up.nats.port}"))
    return Section("overload", plan.model.stem, NOTE, (), rows)


async def _measure(plan: Plan, url: str) -> list[Row]:
    async with asking(url) as asker:
        refusals, counts = [], []
        for _ in range(plan.pairs):
            found = await _overload(asker)
            refusals.append(statistics.median(found))
            counts.append(float(len(found)))
            tell(f"overload: {len(found)} refused, p50 {refusals[-1]:.1f} ms")
        cancels = [await _cancels(asker) for _ in range(plan.pairs)]
    running, waiting, reading = map(Spread.of, zip(*cancels, strict=True))
    return [
        Row(f"refused of {AT_ONCE}", (), Spread.of(counts), Bar("≤", AT_ONCE - SLOTS - QUEUE)),
        Row("time to refuse, p50, ms", (), Spread.of(refusals), Bar("≤", 50)),
        Row("cancel of an answer that runs, ms", (), running),
        Row("cancel of a request that waits, ms", (), waiting),
        Row("cancel of a prompt that is being read, ms", (), reading, Bar("≤", 600)),
    ]


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[Asker]:
    workers, reply = WorkerDirectory(), f"_INBOX.{uuid4().hex}"
    async with Bus.connect(url, "bench") as bus, bus.inbox(reply) as inbox:
        await bus.subscribe(subjects.report(subjects.ANY), workers.on_report)
        while not workers.ready:
            await asyncio.sleep(0.05)
        yield Asker(bus, workers.reports()[0].worker_id, inbox, reply)


async def _overload(asker: Asker) -> list[float]:
    asks = (asker.ask(uuid4().hex, WORDS, NEW_TOKENS) for _ in range(AT_ONCE))
    refused = [waited for waited in await asyncio.gather(*asks) if waited is not None]
    await asker.until(Done, AT_ONCE - len(refused))
    return refused


async def _cancels(asker: Asker) -> tuple[float, float, float]:
    ids = [uuid4().hex for _ in range(SLOTS)]
    for request_id in ids:
        await asker.ask(request_id, WORDS, ENDLESS)
    await asker.until(Token, 20 * SLOTS)
    waits = uuid4().hex
    await asker.ask(waits, WORDS, NEW_TOKENS)
    await asyncio.sleep(0.3)
    waiting = await asker.cancel(waits)
    running = [await asker.cancel(request_id) for request_id in ids]
    reads = uuid4().hex
    await asker.ask(reads, LONG, NEW_TOKENS)
    await asyncio.sleep(0.5)
    return statistics.median(running), waiting, await asker.cancel(reads)
