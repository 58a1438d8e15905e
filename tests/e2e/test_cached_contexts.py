"""A worker keeps the contexts of its sessions: real processes, with a user of NATS each."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread

import pytest
from msgspec.structs import replace

from services.contract import subjects
from services.inference.history_client import AppendResult, HistoryClient
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.e2e.stack import Stack, running_stack
from tests.history.samples import exchange
from tests.servers import wait_for

ASKED = "what is my name?"
CORRECTION = "Nice to meet you, Grace!"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("contexts")) as stack:
        yield stack


class RequestCounter:
    """Counts requests for contexts on a connection of its own, in the event loop of a thread."""

    def __init__(self, stack: Stack, loop: asyncio.AbstractEventLoop) -> None:
        self._stack = stack
        self._loop = loop
        self._found: list[Delivery] = []
        self._bus: Future[Bus] = Future()
        self._ended = asyncio.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        try:
            self._bus.result(30)
            yield
            self._loop.call_soon_threadsafe(self._ended.set)
            listening.result(30)
        finally:
            listening.cancel()

    def count(self) -> int:
        """Return how many were sent so far, with those that are being delivered."""
        bus = self._bus.result(0)
        asyncio.run_coroutine_threadsafe(_flush(bus), self._loop).result(30)
        return len(self._found)

    async def _listen(self) -> None:
        async with self._stack.connect("listener") as bus:
            await bus.subscribe(subjects.history("context", subjects.ANY), self._found.append)
            await _flush(bus)
            self._bus.set_result(bus)
            await self._ended.wait()


async def _flush(bus: Bus) -> None:
    while not await bus.is_responsive():
        await asyncio.sleep(0.02)


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def requests(stack: Stack) -> Iterator[RequestCounter]:
    with loop_in_a_thread() as loop:
        counter = RequestCounter(stack, loop)
        with counter.running():
            yield counter


@pytest.fixture
def warm(stack: Stack, requests: RequestCounter, session_id: str) -> str:
    """A session whose context the worker keeps: a turn made no request for it."""
    assert stack.chat("my name is Ada", session_id).text == "Nice to meet you, Ada!"

    def is_warm() -> bool:
        before = requests.count()
        assert "Ada" in stack.chat(ASKED, session_id).text
        return requests.count() == before

    # history is asked at times, also before a turn on a busy machine
    wait_for(is_warm, "a turn without a request for the context")
    return session_id


def test_turn_after_a_clear_knows_nothing_before_it(stack: Stack, warm: str) -> None:
    assert stack.http.post("/clear-history", params={"session_id": warm}).status_code == 200
    assert "Ada" not in stack.chat(ASKED, warm).text


def test_turn_after_an_erasure_knows_nothing_before_it(stack: Stack, warm: str) -> None:
    assert stack.http.delete(f"/sessions/{warm}").status_code == 200
    assert "Ada" not in stack.chat(ASKED, warm).text
    assert len(stack.messages(warm)) == 1


def test_turn_after_a_correction_sees_it(stack: Stack, warm: str) -> None:
    last = stack.messages(warm)[-1]["id"]
    path = f"/sessions/{warm}/messages/{last}/feedback"
    assert stack.http.put(path, json={"correction": CORRECTION}).status_code == 200
    assert CORRECTION in stack.chat("what did you say in your last message?", warm).text


def test_turn_after_a_new_title_continues_the_session(stack: Stack, warm: str) -> None:
    described = stack.http.patch(f"/sessions/{warm}", json={"title": "Names"})
    assert described.json()["title"] == "Names"
    end = stack.chat(ASKED, warm).end
    assert end["stored"] == "log" and stack.messages(warm)[-1]["id"] == end["request_id"]


def test_turn_after_one_at_another_worker_sees_it(stack: Stack, warm: str) -> None:
    asyncio.run(append_as_another_worker(stack, warm))
    assert "Grace" in stack.chat(ASKED, warm).text


async def append_as_another_worker(stack: Stack, session: str) -> None:
    async with stack.connect("worker") as bus:
        client, tenant = HistoryClient(bus), subjects.OPEN_TENANT
        context = await client.context(tenant, session)
        own = replace(
            exchange("other"),
            previous=context.applied_seq,
            prompt="my name is Grace",
            response="Nice to meet you, Grace!",
        )
        key = subjects.session_key(tenant, session)
        assert await client.append(key, own, lambda: True) == AppendResult("log")
