"""The connection survives whatever other clients publish."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from typing import cast

import msgspec
import pytest

from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.consumers import Consumer
from services.runtime.deliveries import Delivery
from services.runtime.streams import Stream
from tests import frames
from tests.history.samples import until
from tests.servers import NATS_VERSIONS, NatsVersion, Server, nats_server, running


class Ask(msgspec.Struct, frozen=True):
    text: str


@pytest.fixture(scope="module", params=NATS_VERSIONS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    version = cast(NatsVersion, request.param)
    with running(nats_server(tmp_path_factory.mktemp("nats"), version=version)) as server:
        yield server


@pytest.fixture
async def own_bus(server: Server) -> AsyncIterator[Bus]:
    access = NatsAccess(inbox_prefix="_INBOX_own")
    async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test", access) as bus:
        yield bus


async def echo(subject: str, ask: Ask) -> Ask:
    return ask


async def test_unparsable_messages_are_dropped_and_counted(
    server: Server, own_bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Delivery] = []
    await own_bus.subscribe("hear.*", heard.append)
    await own_bus.serve("test", "for the test", [own_bus.endpoint("ask", "ask.*", Ask, echo)])
    bad = [
        *chain(frames.unreadable(b"hear.x"), frames.unreadable(b"ask.x")),
        frames.pub(b"hear.\xff"),
        frames.pub(b"$SRV.PING", reply=b"_INBOX.\xff"),
    ]
    await frames.send(server.port, bad)
    assert await own_bus.request("ask.x", Ask("after"), Ask) == Ask("after")
    assert own_bus.dropped_frames == len(bad)
    stats = await own_bus._client.request("$SRV.STATS.test", timeout=5)
    assert b'"dropped_frames":%d' % len(bad) in stats.data.replace(b" ", b"")
    assert own_bus.seconds_since_reconnect == math.inf and not heard
    assert len(caplog.records) == 1, "the log can't be flooded"
    assert "can't be parsed" in caplog.text and "\xff" not in caplog.text


async def test_odd_messages_have_no_effect(
    server: Server, own_bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    other = asyncio.Queue[Delivery]()  # a vertical tab could inject into its subscription
    for _ in range(10):
        await own_bus.subscribe("other", other.put_nowait)
    heard = asyncio.Queue[Delivery]()
    await own_bus.subscribe("hear.*", heard.put_nowait)
    await own_bus.serve("test", "for the test", [own_bus.endpoint("ask", "ask.*", Ask, echo)])
    odd = chain(
        frames.odd(b"hear.x"),
        frames.odd(b"ask.x"),
        frames.odd(b"$SRV.PING"),
        frames.bad_tokens(b"hear."),
        frames.bad_tokens(b"ask."),
    )
    await frames.send(server.port, odd)
    assert await own_bus.request("ask.x", Ask("after"), Ask) == Ask("after")
    assert own_bus.seconds_since_reconnect == math.inf
    assert other.empty()
    subjects = {heard.get_nowait().subject for _ in range(heard.qsize())}
    assert subjects >= {"hear.x", "hear.a\x0bb", "hear.\x00"}
    assert "Traceback" not in caplog.text and len(caplog.records) < 8


async def test_unparsable_log_record_is_delivered_once(server: Server, own_bus: Bus) -> None:
    stream = Stream(own_bus, "RECORDS")
    await stream.ensure("records.>", 2**20, 0)
    consumer = Consumer(own_bus, "RECORDS", "reader")
    await consumer.ensure(ack_wait=30, max_ack_pending=1000)
    headers = (*frames.UNREADABLE_HEADERS, *frames.ODD_HEADERS)
    bad = [
        *frames.bad_tokens(b"records."),
        *(frames.hpub(b"records.x", header, b"record") for header in headers),
        frames.pub(b"records.last"),
    ]
    await frames.send(server.port, bad)
    fetched: list[str] = []
    async with asyncio.timeout(10):
        while "records.last" not in fetched:
            for pending in await consumer.fetch(100, 0.5):
                fetched.append(pending.stored.subject)
                await pending.ack()
    assert len(fetched) == len(bad)

    async def is_done() -> bool:
        return (await consumer.progress()).unacknowledged == 0

    await until(is_done)
    assert own_bus.seconds_since_reconnect == math.inf
    await consumer.close()
    await own_bus.jetstream.delete_stream("RECORDS")


@pytest.fixture
def reconnected(own_bus: Bus) -> asyncio.Event:
    """Set when the bus has reconnected."""
    event = asyncio.Event()

    async def set_event() -> None:
        event.set()

    own_bus.on_reconnect(set_event)
    return event


async def test_client_reconnects_after_a_fatal_server_error(
    own_bus: Bus, reconnected: asyncio.Event
) -> None:
    client = own_bus._client
    assert client._transport is not None
    client._transport.write(b"NONSENSE\r\n")
    await client._transport.drain()  # type: ignore[no-untyped-call]
    async with asyncio.timeout(10):
        await reconnected.wait()
    assert await own_bus.is_responsive()


async def test_client_reconnects_after_its_read_loop_failed(
    own_bus: Bus, reconnected: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(data: bytes) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug of the parser")

    monkeypatch.setattr(own_bus._client._ps, "parse", fail)
    await own_bus.publish("any", Ask("x"))
    await own_bus.is_responsive()  # the parser fails at its PONG
    async with asyncio.timeout(10):
        await reconnected.wait()
    assert await own_bus.is_responsive()
