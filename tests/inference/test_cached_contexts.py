"""A warm turn needs no request to history, and never uses an outdated context."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from nats.js import api

from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.history import (
    Context,
    ContextReply,
    ContextRequest,
    Exchange,
    Feedback,
    Imported,
    Window,
)
from services.inference.history_client import AppendResult, HistoryClient
from services.inference.limits import InferenceLimits
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.streams import StoredMessage, Stream
from tests.history import samples
from tests.history.samples import exchange, ids, url_of
from tests.inference.conftest import nats_with_history
from tests.inference.scripted import FAST, StartWorker, Worker, text
from tests.servers import Server, nats_server, running

TRUSTING = InferenceLimits(history_trust_seconds=600.0, last_record_timeout_seconds=600.0)
LIMITS = replace(FAST, history_trust_seconds=600.0, last_record_timeout_seconds=600.0)


class Caller:
    """A worker's client of history, whose tenant is new and whose context requests are counted."""

    def __init__(self, bus: Bus, limits: InferenceLimits = TRUSTING) -> None:
        self.bus = bus
        self.tenant = uuid4().hex
        self.now = 1000.0
        self.client = HistoryClient(bus, limits, lambda: self.now)
        self.requests: list[Delivery] = []

    async def start(self) -> None:
        subject = subjects.history("context", self.tenant)
        await self.bus.subscribe(subject, self.requests.append)

    @property
    def key(self) -> str:
        return subjects.session_key(self.tenant, "s")

    async def context(self, session_id: str = "s") -> Context:
        return await self.client.context(self.tenant, session_id)

    async def turn(
        self, request_id: str, client: HistoryClient | None = None, session_id: str = "s"
    ) -> Exchange:
        """Read the context and append an exchange, as a worker does."""
        client = client or self.client
        context = await client.context(self.tenant, session_id)
        own = exchange(request_id, context.epoch)
        own = msgspec.structs.replace(own, previous=context.applied_seq)
        key = subjects.session_key(self.tenant, session_id)
        assert await client.append(key, own, lambda: True) == AppendResult("log")
        return own

    async def is_current(self) -> bool:
        """Return whether the context is the one that history replies, byte for byte."""
        known = encode(_plain(await self.context()))
        asked = await self.client.stored_context(self.tenant, "s")
        return known == encode(_plain(asked))

    @contextmanager
    def asking(self, count: int) -> Iterator[None]:
        """Check the number of context requests during the body."""
        before = len(self.requests)
        yield
        assert len(self.requests) - before == count


def _plain(context: Context) -> Context:
    return Context(*(getattr(context, name) for name in Context.__struct_fields__))


@pytest.fixture
async def caller(history_url: str) -> AsyncIterator[Caller]:
    async with Bus.connect(history_url, "test") as bus:
        caller = Caller(bus)
        await caller.start()
        yield caller


async def test_only_the_first_turn_asks_history(caller: Caller) -> None:
    with caller.asking(1):
        for n in range(30):  # through several truncations
            await caller.turn(f"r{n}")
    assert await caller.is_current()


async def test_cached_context_is_that_of_history_after_each_turn(caller: Caller) -> None:
    for n in range(15):
        await caller.turn(f"r{n}")
        assert await caller.is_current()


async def test_another_tenants_session_of_the_same_name_is_apart(caller: Caller) -> None:
    await caller.turn("a")
    other = await caller.client.context(uuid4().hex, "s")
    assert other.turns == () and ids(await caller.context()) == ["a"]


@pytest.mark.parametrize("change", ["clear", "erase", "describe", "correct", "import", "worker"])
async def test_turn_after_a_change_uses_the_new_context(caller: Caller, change: str) -> None:
    bus, tenant = caller.bus, caller.tenant
    await caller.turn("a")
    with caller.asking(0):
        before = await caller.context()
    match change:
        case "clear":
            await samples.clear(bus, "s", tenant)
        case "erase":
            await samples.erase(bus, "s", tenant)
        case "describe":
            await samples.describe(bus, "s", tenant, title="T", system_prompt="Be brief.")
        case "correct":
            await samples.give_feedback(bus, "s", "a", Feedback(correction="better"), tenant)
        case "import":
            imported = [Imported(request_id="i", prompt="p", response="r")]
            await samples.import_exchanges(bus, "s", imported, tenant)
        case "worker":
            await caller.turn("b", HistoryClient(bus))
    with caller.asking(1):
        after = await caller.context()
    assert after != before and after.applied_seq > before.applied_seq
    assert await caller.is_current()


async def test_turns_at_two_workers_see_each_other(caller: Caller) -> None:
    other = HistoryClient(caller.bus, TRUSTING)
    for n in range(3):
        await caller.turn(f"a{n}")
        await caller.turn(f"b{n}", other)
    assert ids(await caller.context()) == ["a0", "b0", "a1", "b1", "a2", "b2"]


async def test_two_answers_at_once_are_both_in_the_next_context(caller: Caller) -> None:
    context = await caller.context()
    for request_id in ("a", "b"):  # both generated with the same context
        own = msgspec.structs.replace(exchange(request_id), previous=context.applied_seq)
        await caller.client.append(caller.key, own, lambda: True)
    assert ids(await caller.context()) == ["a", "b"] and await caller.is_current()


async def test_repeated_append_of_a_request_is_not_added_again(caller: Caller) -> None:
    own = await caller.turn("a")
    repeated = msgspec.structs.replace(own, attempt="2")
    assert await caller.client.append(caller.key, repeated, lambda: True) == AppendResult("log")
    assert ids(await caller.context()) == ["a"] and await caller.is_current()


async def test_history_is_asked_again_after_a_while(caller: Caller) -> None:
    with caller.asking(1):
        await caller.turn("a")
        caller.now += TRUSTING.history_trust_seconds - 1
        await caller.turn("b")
    caller.now += 1
    with caller.asking(1):
        await caller.turn("c")
        await caller.turn("d")


async def test_reply_for_one_session_renews_the_trust_of_all(caller: Caller) -> None:
    await caller.turn("a")
    caller.now += TRUSTING.history_trust_seconds
    with caller.asking(1):
        await caller.client.context(caller.tenant, "other")
        assert ids(await caller.context()) == ["a"]


async def test_failed_append_ends_the_trust(tmp_path: Path) -> None:
    """History is asked again, which refuses chats until the log takes records."""
    async with nats_with_history(tmp_path) as url, Bus.connect(url, "test") as bus:
        limits = replace(TRUSTING, append_timeout_seconds=0.5)
        caller = Caller(bus, limits)
        await caller.start()
        await caller.turn("a")
        js = bus.jetstream
        config = (await js.stream_info(subjects.HISTORY_STREAM)).config
        await js.update_stream(replace(config, max_msgs=1, discard=api.DiscardPolicy.NEW))
        context = await caller.context()
        own = msgspec.structs.replace(exchange("b"), previous=context.applied_seq)
        assert await caller.client.append(caller.key, own, lambda: True) == AppendResult("failed")

        async def refuses() -> bool:
            try:
                await caller.context()
            except ServiceError as error:
                return error.code == "history_full"
            return False

        await samples.until(refuses)


async def test_log_with_another_record_in_its_place_is_noticed(tmp_path: Path) -> None:
    """A log that was lost and made anew has the same sequences."""
    async with nats_with_history(tmp_path) as url, Bus.connect(url, "test") as bus:
        caller = Caller(bus)
        await caller.start()
        await caller.turn("a")
        stream = Stream(bus, subjects.HISTORY_STREAM)
        config = (await bus.jetstream.stream_info(stream.name)).config
        seq = (await caller.context()).applied_seq
        await stream.remove()
        await bus.jetstream.add_stream(config)
        await samples.append(bus, "s", exchange("other"), caller.tenant)
        last = await stream.last(subjects.log(caller.key))
        assert last and last.seq == seq
        with caller.asking(1):
            await caller.context()


class GatedRead:
    """Holds the next read of a session's last record, once it has the record, until `gate`."""

    def __init__(self, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_read, self.gate = asyncio.Event(), asyncio.Event()
        self._subject = subjects.log(key)
        self._read = read = Stream.last

        async def last(stream: Stream, subject: str) -> StoredMessage | None:
            found = await read(stream, subject)
            if subject == self._subject and not self.has_read.is_set():
                self.has_read.set()
                await self.gate.wait()
            return found

        monkeypatch.setattr(Stream, "last", last)


async def test_trust_that_ends_during_the_read_is_noticed(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await caller.turn("a")
    for seconds, requests in ((0.0, 0), (TRUSTING.history_trust_seconds, 1)):
        read = GatedRead(caller.key, monkeypatch)
        with caller.asking(requests):
            reading = asyncio.create_task(caller.context())
            await read.has_read.wait()
            caller.now += seconds
            read.gate.set()
            assert ids(await reading) == ["a"]


async def test_context_that_changes_during_the_read_is_not_used(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await caller.turn("a")
    previous = (await caller.context()).applied_seq
    own = msgspec.structs.replace(exchange("b", first.epoch), previous=previous)
    read = GatedRead(caller.key, monkeypatch)
    with caller.asking(1):
        reading = asyncio.create_task(caller.context())
        await read.has_read.wait()
        assert await caller.client.append(caller.key, own, lambda: True) == AppendResult("log")
        read.gate.set()
        assert ids(await reading) == ["a", "b"]


async def test_slow_read_is_left_to_history(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(TRUSTING, last_record_timeout_seconds=0.01)
    caller.client = HistoryClient(caller.bus, limits, lambda: caller.now)
    await caller.turn("a")
    GatedRead(caller.key, monkeypatch)
    with caller.asking(1):
        assert ids(await caller.context()) == ["a"]


class ScriptedHistory:
    """A history service that wants to be asked for each answer, or not."""

    def __init__(self) -> None:
        self.window: Window | None = Window(10, 1000)
        self.reconnected, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def _on_reconnect(self) -> None:
        self.reconnected.set()
        await self.gate.wait()

    async def context(self, subject: str, request: ContextRequest) -> ContextReply:
        return ContextReply(window=self.window)

    @asynccontextmanager
    async def serving(self, server: Server) -> AsyncIterator[Caller]:
        """
        Serve a caller, whose session has one turn in the log. Its callbacks of reconnects wait for
        `gate`.
        """
        async with Bus.connect(url_of(server), "test") as bus:
            bus.on_reconnect(self._on_reconnect)
            await Stream(bus, subjects.HISTORY_STREAM).ensure(subjects.HISTORY_LOG, 2**20, 0)
            caller = Caller(bus)
            subject = subjects.history("context", caller.tenant)
            endpoint = bus.endpoint("context", subject, ContextRequest, self.context)
            await bus.serve("history", "scripted", [endpoint])
            await caller.start()
            await caller.turn("a")
            with caller.asking(0):
                assert ids(await caller.context()) == ["a"]
            yield caller


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A NATS server without history, for one test."""
    with running(nats_server(tmp_path)) as server:
        yield server


async def test_reply_without_a_window_ends_the_trust(server: Server) -> None:
    history = ScriptedHistory()
    async with history.serving(server) as caller:
        history.window = None
        with caller.asking(3):
            await caller.client.context(caller.tenant, "other")
            await caller.context()
            await caller.context()


async def test_unreadable_log_is_left_to_history(server: Server) -> None:
    async with ScriptedHistory().serving(server) as caller:
        await Stream(caller.bus, subjects.HISTORY_STREAM).remove()
        with caller.asking(1):
            await caller.context()


async def test_contexts_are_asked_for_again_after_a_reconnect(server: Server) -> None:
    """NATS may be back with another store."""
    async with ScriptedHistory().serving(server) as caller:
        reconnected = asyncio.Event()

        async def on_reconnect() -> None:
            reconnected.set()

        caller.bus.on_reconnect(on_reconnect)
        server.stop()
        server.start()
        await asyncio.wait_for(reconnected.wait(), 30)
        caller.now += 1
        await caller.client.context(caller.tenant, "other")  # renews the trust
        with caller.asking(1):
            await caller.context()


async def test_contexts_are_forgotten_before_and_at_a_reconnect(server: Server) -> None:
    """Requests may end after the connection is back, and before the callbacks that report it."""
    history = ScriptedHistory()
    async with history.serving(server) as caller:
        history.gate.clear()
        server.stop()
        server.start()
        await asyncio.wait_for(history.reconnected.wait(), 30)
        caller.now += 1
        await caller.client.context(caller.tenant, "other")  # renews the trust
        with caller.asking(1):
            await caller.context()
        await caller.turn("b", session_id="between")
        with caller.asking(0):
            assert ids(await caller.context("between")) == ["b"]
        is_forgotten = asyncio.Event()

        async def on_reconnect() -> None:
            is_forgotten.set()

        caller.bus.on_reconnect(on_reconnect)
        history.gate.set()
        await is_forgotten.wait()
        caller.now += 1
        await caller.client.context(caller.tenant, "other")
        with caller.asking(1):
            await caller.context("between")


async def counted(worker: Worker) -> list[Delivery]:
    """Return a list to which context requests of the worker's tenant are added."""
    requests: list[Delivery] = []
    await worker.bus.subscribe(subjects.history("context", worker.tenant), requests.append)
    return requests


async def test_second_turn_at_a_worker_asks_no_history(start_worker: StartWorker) -> None:
    async with start_worker(limits=LIMITS) as worker:
        requests = await counted(worker)
        for _ in range(3):
            assert text(await worker.ask("hi", "s")) == "hello"
        assert len(requests) == 1
        assert len((await worker.context("s")).turns) == 3


async def test_turn_after_an_erasure_has_no_earlier_turns(start_worker: StartWorker) -> None:
    async with start_worker(limits=LIMITS) as worker:
        await worker.ask("hi", "s")
        await samples.erase(worker.bus, "s", worker.tenant)
        requests = await counted(worker)
        await worker.ask("hi", "s")
        assert len(requests) == 1
        assert len((await worker.context("s")).turns) == 1
