"""Latency of rejections under overload, and of cancels."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import uvloop

from bench import servers
from bench.load import words
from bench.pairs import Plan, show
from bench.report import Goal, Row, Section, Spread
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
CONCURRENCY = 100
EXPECTED_REJECTIONS = CONCURRENCY - SLOTS - QUEUE
WORDS = 50
LONG_WORDS = 1450  # of a prompt whose prefill takes seconds
NEW_TOKENS = 64
ENDLESS = 1500
NOTE = f"""One worker with {SLOTS} slots and a queue of {QUEUE}, over NATS. {CONCURRENCY} concurrent
requests: median milliseconds from a request to its rejection. Then, while {SLOTS} answers run,
milliseconds from a cancel to the answer's end: of a running and of a waiting request, and of a
prompt of {LONG_WORDS} words in its prefill, alone. A step that computes other
requests, too, is not interrupted."""


class OverloadClient:
    """Sends requests to one worker; all events arrive in one inbox."""

    def __init__(self, bus: Bus, worker_id: str, inbox: Inbox, reply: str) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._inbox = inbox
        self._reply = reply

    async def send(self, request_id: str, length: int, tokens: int) -> float | None:
        """Return the milliseconds until the request was rejected, None if it was admitted."""
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
        """Return the milliseconds until the answer has ended."""
        began = time.monotonic()
        await self._bus.publish(subjects.cancel(subjects.OPEN_TENANT, request_id), Cancel())
        await self.wait_for(Done)
        return 1000 * (time.monotonic() - began)

    async def wait_for(self, kind: type[StreamEvent], times: int = 1) -> None:
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
    async with connected(url) as client:
        rejections, counts = [], []
        for _ in range(plan.pairs):
            found = await _overload(client)
            rejections.append(statistics.median(found))
            counts.append(float(len(found)))
            show(f"overload: {len(found)} rejected, p50 {rejections[-1]:.1f} ms")
        cancels = [await _cancels(client) for _ in range(plan.pairs)]
    running, waiting, prefill = map(Spread.of, zip(*cancels, strict=True))
    return [
        Row(
            f"rejected of {CONCURRENCY}",
            (),
            Spread.of(counts),
            Goal("≤", CONCURRENCY - SLOTS - QUEUE),
        ),
        Row("time to reject, p50, ms", (), Spread.of(rejections), Goal("≤", 50)),
        Row("cancel of a running request, ms", (), running),
        Row("cancel of a waiting request, ms", (), waiting),
        Row("cancel during prefill, ms", (), prefill, Goal("≤", 100)),
    ]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[OverloadClient]:
    workers, reply = WorkerDirectory(), f"_INBOX.{uuid4().hex}"
    async with Bus.connect(url, "bench") as bus, bus.inbox(reply) as inbox:
        await bus.subscribe(subjects.report(subjects.ANY), workers.on_report)
        while not workers.ready:
            await asyncio.sleep(0.05)
        yield OverloadClient(bus, workers.reports()[0].worker_id, inbox, reply)


async def _overload(client: OverloadClient) -> list[float]:
    asks = (client.send(uuid4().hex, WORDS, NEW_TOKENS) for _ in range(CONCURRENCY))
    rejected = [ms for ms in await asyncio.gather(*asks) if ms is not None]
    await client.wait_for(Done, CONCURRENCY - len(rejected))
    return rejected


async def _cancels(client: OverloadClient) -> tuple[float, float, float]:
    ids = [uuid4().hex for _ in range(SLOTS)]
    for request_id in ids:
        await client.send(request_id, WORDS, ENDLESS)
    await client.wait_for(Token, 20 * SLOTS)
    waiting_id = uuid4().hex
    await client.send(waiting_id, WORDS, NEW_TOKENS)
    await asyncio.sleep(0.3)
    waiting = await client.cancel(waiting_id)
    running = [await client.cancel(request_id) for request_id in ids]
    prefill_id = uuid4().hex
    await client.send(prefill_id, LONG_WORDS, NEW_TOKENS)
    await asyncio.sleep(0.5)
    return statistics.median(running), waiting, await client.cancel(prefill_id)
