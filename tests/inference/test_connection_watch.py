"""What a worker does after a silence: of NATS, or its own."""

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from uuid import uuid4

import pytest

from services.contract import subjects
from services.contract.codec import encode
from services.contract.messages import Cancel, ChatRequest, Done, Failed, Token
from services.inference.chat_service import ConnectionWatch
from services.inference.limits import InferenceLimits
from tests.inference.scripted import FAST, StartWorker, Worker, read, rest_of, text

LIMIT = InferenceLimits().disconnected_seconds
BUSY = replace(FAST, disconnected_seconds=0.2)


@dataclass
class FakeBus:
    """A connection whose pings take `ping_seconds`; `answered`: the server replies to them."""

    now: float = 0.0
    confirmed_at: float = 0.0
    answered: bool = True
    ping_seconds: float = 0.0
    reconnected_at: float = -math.inf
    on_ping: Callable[[], object] = lambda: None
    losses: list[float] = field(default_factory=list)

    async def is_responsive(self) -> bool:
        sent_at, self.now = self.now, self.now + self.ping_seconds
        self.on_ping()
        if self.answered:
            self.confirmed_at = sent_at
        return self.answered

    @property
    def seconds_since_reconnect(self) -> float:
        return self.now - self.reconnected_at

    def watch(self) -> ConnectionWatch:
        return ConnectionWatch(
            self, lambda: self.losses.append(self.now), InferenceLimits(), lambda: self.now
        )


async def test_disconnected_when_nats_is_silent_for_too_long() -> None:
    bus = FakeBus(ping_seconds=1.0)
    watch = bus.watch()
    await watch.step()
    bus.answered = False
    for _ in range(20):
        await watch.step()
    first, *others = bus.losses
    assert LIMIT < first <= LIMIT + 2 and all(later - first > LIMIT for later in others)


async def test_late_answers_to_pings_are_no_disconnection() -> None:
    bus = FakeBus(ping_seconds=1.5, answered=False)
    watch = bus.watch()
    for _ in range(20):
        await watch.step()
        bus.confirmed_at = bus.now - 1.5
    assert bus.losses == []


async def test_own_silence_is_no_disconnection() -> None:
    """A worker that was busy or suspended asks NATS before anything else."""
    bus = FakeBus()
    watch = bus.watch()
    bus.now = 100.0
    await watch.confirm()
    assert bus.losses == [] and bus.confirmed_at == 100.0


async def test_silence_with_another_connection_is_a_disconnection() -> None:
    """Messages that came meanwhile are lost, for example cancels."""
    bus = FakeBus()
    watch = bus.watch()
    bus.now, bus.reconnected_at = 100.0, 99.0
    await asyncio.gather(watch.confirm(), watch.confirm())
    assert bus.losses == [100.0]
    await watch.confirm()
    assert bus.losses == [100.0]


async def test_silence_before_a_reconnect_is_a_disconnection() -> None:
    """The worker was busy, lost the connection, and a ping was answered over the new one."""
    bus = FakeBus()
    watch = bus.watch()
    bus.now, bus.reconnected_at, bus.confirmed_at = 100.0, 99.0, 99.5
    await watch.step()
    await watch.step()
    assert bus.losses == [100.0]


async def test_short_reconnect_is_no_disconnection() -> None:
    bus = FakeBus()
    watch = bus.watch()
    for seconds in range(1, 20):
        bus.now, bus.reconnected_at = seconds, seconds - 0.5
        await watch.step()
    assert bus.losses == []


async def test_others_wait_for_the_answer_of_nats() -> None:
    bus = FakeBus(answered=False)
    watch, answered = bus.watch(), asyncio.Event()
    bus.now = 100.0

    async def is_responsive() -> bool:
        await answered.wait()
        return False

    bus.is_responsive = is_responsive  # type: ignore[method-assign]
    confirms = [asyncio.create_task(watch.confirm()) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not any(confirm.done() for confirm in confirms) and bus.losses == []
    answered.set()
    await asyncio.gather(*confirms)
    assert bus.losses == [100.0]


async def test_reconnect_during_the_question_is_a_disconnection() -> None:
    bus = FakeBus(ping_seconds=0.5)
    bus.on_ping = lambda: setattr(bus, "reconnected_at", bus.now)
    watch = bus.watch()
    bus.now = 100.0
    await watch.confirm()
    assert bus.losses == [100.5]


@pytest.fixture
async def worker(start_worker: StartWorker) -> AsyncIterator[Worker]:
    """A worker that counts as disconnected after 0.2 s, and computes a step in 10 ms."""
    async with start_worker(step_seconds=0.01, limits=BUSY) as worker:
        yield worker


async def test_busy_worker_goes_on_with_its_answers(worker: Worker) -> None:
    events = []
    async for event in worker.events(ChatRequest(prompt="long", session_id="s", max_tokens=60)):
        events.append(event)
        if isinstance(event, Token) and len(events) < 5:
            time.sleep(2 * BUSY.disconnected_seconds)
    done = events[-1]
    assert isinstance(done, Done) and done.stored == "log"
    assert done.usage.completion_tokens == 60 and len(text(events)) == 60


async def test_answer_that_a_reader_gave_up_meanwhile_is_dropped(
    worker: Worker, history_url: str
) -> None:
    reply = f"_INBOX.{uuid4().hex}"
    kept = asyncio.create_task(
        worker.ask("long", "kept", max_tokens=60, request_id="kept", timeout_s=20)
    )
    async with worker.bus.inbox(reply) as inbox:
        request = ChatRequest(prompt="long", session_id="given up", request_id="lost")
        await worker.bus.publish(subjects.request(worker.tenant), request, reply=reply)
        while not isinstance(read((await inbox.next(10)).data), Token):
            pass
        publish(history_url, subjects.cancel(worker.tenant, "lost"), encode(Cancel(reply=reply)))
        time.sleep(2 * BUSY.disconnected_seconds)
        assert isinstance((await kept)[-1], Done)
        assert not any(isinstance(event, Done | Failed) for event in await rest_of(inbox))
    assert not (await worker.context("given up")).turns
    assert len((await worker.context("kept")).turns) == 1


def publish(url: str, subject: str, data: bytes) -> None:
    """Publish from another connection, without the event loop."""
    host, port = url.removeprefix("nats://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as server,
        server.makefile("rb") as replies,
    ):
        server.sendall(b'CONNECT {"verbose":false}\r\n')
        server.sendall(b"PUB %b %d\r\n%b\r\nPING\r\n" % (subject.encode(), len(data), data))
        while replies.readline() != b"PONG\r\n":
            pass
