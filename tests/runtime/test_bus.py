import asyncio
import logging
import math
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Thread
from uuid import uuid4

import msgspec
import nats
import pytest
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from services.contract.errors import ServiceError
from services.runtime import trace_context
from services.runtime.bus import ALIVE_HEADER, MIN_KEEP_ALIVE_SECONDS, Bus
from services.runtime.deliveries import Delivery, NoResponders, RequestSilent
from services.runtime.logs import RateLimitedLog
from tests.history.samples import until
from tests.servers import nats_server, running


@pytest.fixture
def subject() -> str:
    return f"test.{uuid4().hex}"


class Ask(msgspec.Struct, frozen=True):
    text: str


class Answer(msgspec.Struct, frozen=True):
    text: str


async def echo(subject: str, ask: Ask) -> Answer:
    await asyncio.sleep(0.2)
    return Answer(ask.text)


async def refuse(subject: str, ask: Ask) -> Answer:
    raise ServiceError("not_found", "no such thing\nat all", retry_after=1.5)


async def crash(subject: str, ask: Ask) -> Answer:
    raise RuntimeError("a bug")


def be_busy_until(end: float) -> None:
    while time.monotonic() < end:
        pass


async def publish_once(nats_url: str, subject: str) -> None:
    client = await nats.connect(nats_url)
    await client.publish(subject, b"{}")
    await client.close()


async def serve(bus: Bus, subject: str, handler: object) -> None:
    endpoint = bus.endpoint("ask", subject, Ask, handler)  # type: ignore[arg-type]
    await bus.serve("test", "for the test", [endpoint])


async def test_requests_are_handled_concurrently(bus: Bus, subject: str) -> None:
    """nats-py alone runs handlers one after another: the first would wait for ever."""
    all_began = asyncio.Barrier(8)

    async def echo_together(subject: str, ask: Ask) -> Answer:
        await all_began.wait()
        return Answer(ask.text)

    await serve(bus, subject, echo_together)
    asks = [bus.request(subject, Ask(str(i)), Answer) for i in range(8)]
    answers = await asyncio.gather(*asks)
    assert [answer.text for answer in answers] == [str(i) for i in range(8)]


async def test_slow_request_with_keep_alives_is_not_silent(bus: Bus, subject: str) -> None:
    released = asyncio.Event()

    async def wait(subject: str, ask: Ask) -> Answer:
        await released.wait()
        return Answer(ask.text)

    await serve(bus, subject, wait)
    async with bus.inbox("_INBOX.signs") as signs:
        await bus.publish(subject, Ask("unsigned"), reply="_INBOX.signs")
        asking = asyncio.create_task(bus.request(subject, Ask("x"), Answer, 30, silence=0.2))
        await asyncio.wait({asking}, timeout=1)  # five times the silence
        assert not asking.done()
        released.set()
        assert await asking == Answer("x")
        answer = await signs.next(5)
        assert answer.data == msgspec.json.encode(Answer("unsigned")), (
            "no keep-alive without a request for it"
        )


@pytest.mark.parametrize("wanted", ["nan", "0", "-1", "1e-9"])
async def test_keep_alives_have_a_minimum_interval(
    bus: Bus, nats_url: str, subject: str, wanted: str
) -> None:
    await serve(bus, subject, echo)
    client = await nats.connect(nats_url)
    signs: list[Msg] = []
    answered = asyncio.Event()
    inbox = client.new_inbox()

    async def hear(message: Msg) -> None:
        signs.append(message)
        if message.data:
            answered.set()

    await client.subscribe(inbox, cb=hear)
    headers = {ALIVE_HEADER: wanted}
    await client.publish(subject, b'{"text":"x"}', reply=inbox, headers=headers)
    await asyncio.wait_for(answered.wait(), 30)
    await client.close()
    assert 2 <= len(signs) <= 1 + 0.2 / MIN_KEEP_ALIVE_SECONDS


async def test_request_without_keep_alives_is_silent(bus: Bus, subject: str) -> None:
    await bus.subscribe(subject, lambda delivery: None)
    with pytest.raises(RequestSilent):
        await bus.request(subject, Ask("x"), Answer, 30, silence=0.1)


async def test_slow_request_ends_at_its_timeout(bus: Bus, subject: str) -> None:
    never = asyncio.Event()

    async def wait(subject: str, ask: Ask) -> Answer:
        await never.wait()
        return Answer(ask.text)

    await serve(bus, subject, wait)
    with pytest.raises(TimeoutError) as error:
        await bus.request(subject, Ask("x"), Answer, timeout=0.3, silence=0.2)
    assert not isinstance(error.value, RequestSilent)
    never.set()


async def test_no_responders_are_detected_during_silence(bus: Bus) -> None:
    with pytest.raises(NoResponders):
        await bus.request("nobody.here", Ask("x"), Answer, 30, silence=10)


async def test_service_error_of_a_handler_is_the_reply(bus: Bus, subject: str) -> None:
    await serve(bus, subject, refuse)
    with pytest.raises(ServiceError, match="no such thing at all") as error:
        await bus.request(subject, Ask("x"), Answer)
    assert (error.value.code, error.value.retry_after) == ("not_found", 1.5)


async def test_exception_in_a_handler_is_replied_at_once(bus: Bus, subject: str) -> None:
    await serve(bus, subject, crash)
    with pytest.raises(ServiceError) as error:
        await bus.request(subject, Ask("x"), Answer)
    assert error.value.code == "internal"


async def test_too_large_request_or_reply_is_an_error_at_once(bus: Bus, subject: str) -> None:
    async def talk(subject: str, ask: Ask) -> Answer:
        return Answer(ask.text * 1024)

    await serve(bus, subject, talk)
    for what, length in (("request", 1024 * 1024), ("reply", 1024)):
        with pytest.raises(
            ServiceError, match=f"The {what} exceeds the maximum .* 1,048,576 bytes"
        ) as error:
            await bus.request(subject, Ask("x" * length), Answer)
        assert error.value.code == "payload_too_large"


async def test_invalid_request_is_replied_with_the_reason(bus: Bus, subject: str) -> None:
    await serve(bus, subject, echo)
    with pytest.raises(ServiceError, match="missing required field `text`") as error:
        await bus.request(subject, msgspec.defstruct("Empty", [])(), Answer)
    assert error.value.code == "invalid_request"


async def test_no_responders_are_reported_at_once(bus: Bus) -> None:
    with pytest.raises(NoResponders):
        await bus.request("nobody.here", Ask("x"), Answer, timeout=5)
    async with bus.inbox("_INBOX.test") as inbox:
        await bus.publish("nobody.here", Ask("x"), reply="_INBOX.test")
        with pytest.raises(NoResponders):
            await inbox.next(timeout=5)


async def test_empty_inbox_times_out(bus: Bus) -> None:
    async with bus.inbox("_INBOX.silent") as inbox:
        with pytest.raises(TimeoutError):
            await inbox.next(timeout=0.05)


async def test_message_that_came_while_the_process_was_busy_is_in_time(
    nats_url: str, bus: Bus, subject: str
) -> None:
    async with bus.inbox(subject) as inbox:
        reader, began = asyncio.create_task(inbox.next(0.5)), time.monotonic()
        await bus._client.flush()
        publishing = Thread(target=asyncio.run, args=(publish_once(nats_url, subject),))
        publishing.start()
        publishing.join()  # no task runs meanwhile; the message waits in the socket
        be_busy_until(began + 1)
        assert (await reader).data == b"{}"


async def test_reader_in_a_process_that_is_always_busy_times_out(bus: Bus, subject: str) -> None:
    async with bus.inbox(subject) as inbox:
        reader = asyncio.create_task(inbox.next(0.05))
        while not reader.done():  # it would go on for ever if each delay extended the timeout
            await asyncio.sleep(0)
            be_busy_until(time.monotonic() + 0.15)
        assert isinstance(reader.exception(), TimeoutError)


async def test_invalid_message_does_not_end_a_subscription(bus: Bus, subject: str) -> None:
    heard = asyncio.Queue[str]()

    def hear(delivery: Delivery) -> None:
        if b"bad" in delivery.data:
            raise ServiceError("invalid_request", "bad")
        heard.put_nowait(delivery.subject)

    for _ in range(2):
        await bus.subscribe(subject, hear)
    await bus.publish(subject, Ask("bad"))
    await bus.publish(subject, Ask("good"))
    async with asyncio.timeout(30):
        assert [await heard.get() for _ in range(2)] == [subject, subject]


async def test_handler_gets_messages_as_they_are_sent(bus: Bus, subject: str) -> None:
    heard: asyncio.Queue[Delivery] = asyncio.Queue()
    before = asyncio.all_tasks()
    unsubscribe = await bus.subscribe(subject, heard.put_nowait)
    assert asyncio.all_tasks() <= before, "it needs no task"
    sent = [
        Delivery(subject, b"plain", ""),
        Delivery(subject, b"", "", {"Name": "value"}),
        Delivery(subject, b"last", "_INBOX.some"),
    ]
    for _, data, reply, headers in sent:
        await bus.send(subject, data, reply, dict(headers) or None)
    async with asyncio.timeout(30):
        assert [await heard.get() for _ in sent] == sent
    await unsubscribe()
    await bus.send(subject, b"late")
    await bus._client.flush()
    assert heard.empty()


@pytest.mark.parametrize("headers", [None, {"Name": "value"}])
async def test_failing_handler_does_not_end_the_connection(
    bus: Bus, subject: str, headers: dict[str, str] | None
) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    def fail(delivery: Delivery) -> None:
        heard.put_nowait(delivery.data)
        raise ValueError

    await bus.subscribe(subject, fail)
    for data in (b"one", b"two"):
        await bus.send(subject, data, headers=headers)
    async with asyncio.timeout(30):
        assert [await heard.get() for _ in range(2)] == [b"one", b"two"]


async def test_message_before_the_subscription_is_known_is_handled(
    nats_url: str, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing does not wait for it either."""
    heard: list[bytes] = []
    async with Bus.connect(nats_url, "early") as early:
        client = early._client
        send_subscribe = client._send_subscribe

        async def subscribe_and_receive(subscription: Subscription) -> None:
            await send_subscribe(subscription)
            await client.publish(subject, b"early")
            await client.flush()

        monkeypatch.setattr(client, "_send_subscribe", subscribe_and_receive)
        await early.subscribe(subject, lambda delivery: heard.append(delivery.data))
        assert heard == [b"early"]
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 10, "nats-py waits for 30 s"


async def test_close_awaits_requests_in_flight(nats_url: str, bus: Bus, subject: str) -> None:
    received: list[str] = []

    async def answer_late(subject: str, ask: Ask) -> Answer:
        received.append(ask.text)
        return await echo(subject, ask)

    async def all_received() -> bool:
        return len(received) == 20

    async with Bus.connect(nats_url, "closing") as closing:
        await serve(closing, subject, answer_late)
        asks = [asyncio.create_task(bus.request(subject, Ask(str(i)), Answer)) for i in range(20)]
        await until(all_received)
        assert not any(ask.done() for ask in asks)
    assert len(await asyncio.gather(*asks)) == 20


async def is_disconnected(bus: Bus) -> bool:
    return not bus.connected


async def test_bus_reconnects_to_a_restarted_server(tmp_path: Path) -> None:
    reconnected = asyncio.Event()

    async def again() -> None:
        reconnected.set()

    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            bus.on_reconnect(again)
            await serve(bus, "again.ask", echo)
            server.stop()
            await until(partial(is_disconnected, bus))
            server.start()
            async with asyncio.timeout(10):
                await reconnected.wait()
            assert (await bus.request("again.ask", Ask("x"), Answer)).text == "x"


async def test_publish_during_a_long_outage_only_drops_messages(
    tmp_path: Path,
) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            server.stop()
            await until(partial(is_disconnected, bus))
            for _ in range(80):  # 5 MB, over nats-py's limit for pending data
                await bus.publish("somewhere", Ask("x" * 64 * 1024))


async def test_connect_waits_for_a_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = nats_server(tmp_path)

    async def has_failed() -> bool:
        return "still trying" in caplog.text

    async def connect() -> bool:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            return bus.connected

    connecting = asyncio.create_task(connect())
    await until(has_failed)
    with running(server):
        async with asyncio.timeout(10):
            assert await connecting


async def test_connection_without_server_info_is_closed(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frozen.close()  # the next attempt reaches the real server
        await reader.read()
        closed.set()
        writer.close()

    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            server.stop()
            frozen = await asyncio.start_server(say_nothing, "127.0.0.1", server.port)
            async with asyncio.timeout(10):
                await closed.wait()
            server.start()
            await until(bus.is_responsive)


async def test_endpoint_is_active_when_serve_returns(nats_url: str, bus: Bus) -> None:
    for n in range(100):
        async with Bus.connect(nats_url, "test") as other:
            await serve(other, f"at.once.{n}", refuse)
            with pytest.raises(ServiceError):
                await bus.request(f"at.once.{n}", Ask("x"), Answer)


async def test_closing_service_handles_delivered_requests(nats_url: str, bus: Bus) -> None:
    outcomes: Counter[type] = Counter()
    for n in range(30):
        async with Bus.connect(nats_url, "test") as other:
            await serve(other, f"on.its.way.{n}", refuse)
            asks = [
                asyncio.create_task(bus.request(f"on.its.way.{n}", Ask("x"), Answer))
                for _ in range(5)
            ]
            await asyncio.sleep(0)  # lets the tasks publish
        answers = await asyncio.gather(*asks, return_exceptions=True)
        outcomes.update(type(answer) for answer in answers)
    assert outcomes[ServiceError] and set(outcomes) <= {ServiceError, NoResponders}, "no timeout"


async def test_frozen_server_is_unresponsive_and_not_disconnected(
    tmp_path: Path,
) -> None:
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with Bus.connect(url, "test", flush_timeout=0.2) as bus:

            async def is_frozen() -> bool:
                return not await bus.is_responsive()

            assert await bus.is_responsive()
            server.signal(signal.SIGSTOP)
            await until(is_frozen)
            confirmed_at, frozen_at = bus.confirmed_at, time.monotonic()
            assert confirmed_at < frozen_at - 0.2
            server.signal(signal.SIGCONT)
            await until(bus.is_responsive)  # the PONG of the earlier ping arrives first
            assert bus.confirmed_at > confirmed_at
            await until(bus.is_responsive)
            assert bus.confirmed_at > frozen_at
            assert bus.seconds_since_reconnect == math.inf
            async with bus.inbox("a.b") as inbox:
                await bus.publish("a.b", Ask("still delivered"))
                assert b"still delivered" in (await inbox.next(1)).data


@pytest.mark.parametrize("request_", [b'{"text": "hi"}', b"nonsense"])
async def test_service_publishes_only_to_inboxes(bus: Bus, subject: str, request_: bytes) -> None:
    asked = asyncio.Event()

    async def answer(subject: str, ask: Ask) -> Answer:
        asked.set()
        return Answer(ask.text)

    await serve(bus, subject, answer)
    elsewhere = f"elsewhere.{subject}"  # stands for $JS.API.STREAM.PURGE.HISTORY
    async with bus.inbox(elsewhere) as inbox:
        await bus._client.publish(subject, request_, reply=elsewhere)
        await bus._client.publish(subject, request_)
        await bus._client.publish("$SRV.PING", reply=elsewhere)
        assert await bus.request(subject, Ask("after"), Answer) == Answer("after")
        with pytest.raises(TimeoutError):
            await inbox.next(0.05)
    assert asked.is_set()


async def test_caller_with_an_inbox_prefix_gets_a_reply(nats_url: str, bus: Bus) -> None:
    await serve(bus, "prefix.ask", echo)
    client = await nats.connect(nats_url, inbox_prefix="_INBOX_alice")
    answer = await client.request("prefix.ask", b'{"text":"x"}', timeout=5)
    await client.close()
    assert msgspec.json.decode(answer.data, type=Answer) == Answer("x")


async def test_request_without_an_inbox_is_logged_once(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    await serve(bus, "dropped.ask", echo)
    for _ in range(20):
        await bus._client.publish("dropped.ask", b'{"text":"x"}', reply="some.where")
    assert await bus.request("dropped.ask", Ask("after"), Answer) == Answer("after")
    (record,) = caplog.records
    assert "'dropped.ask': its reply subject 'some.where' is not an inbox" in record.message


async def test_dropped_message_is_logged_with_its_reason(
    bus: Bus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "_lost", RateLimitedLog(logging.getLogger("lost"), interval=0))
    await bus.publish("too.large", Ask("x" * 2 * 1024 * 1024))
    await bus.publish("bad subject", Ask("x"))
    assert [record.message for record in caplog.records] == [
        "message dropped subject='too.large': nats: maximum payload exceeded (1 since the start)",
        "message dropped subject='bad subject': nats: invalid subject (2 since the start)",
    ]
    assert await bus.is_responsive() and bus.seconds_since_reconnect == math.inf


async def test_too_large_error_reply_keeps_the_connection(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse_at_length(subject: str, ask: Ask) -> Answer:
        raise ServiceError("internal", "x" * 2 * 1024 * 1024)

    await serve(bus, "long.refusal", refuse_at_length)
    with pytest.raises(TimeoutError):
        await bus.request("long.refusal", Ask("x"), Answer, timeout=0.5)
    assert "message dropped" in caplog.text
    assert await bus.is_responsive() and bus.seconds_since_reconnect == math.inf


@pytest.mark.parametrize(
    "data, headers",
    [
        (b"", None),
        (b"nonsense", None),
        (b'{"text": 1}', None),
        (b"\xff", None),
        (b"", {"Nats-Service-Error-Code": "no such code"}),
        (b"", {"Nats-Service-Error-Code": "internal", "Retry-After": "soon"}),
    ],
)
async def test_invalid_reply_is_an_internal_error(
    bus: Bus, data: bytes, headers: dict[str, str] | None
) -> None:
    async def answer(message: Msg) -> None:
        await bus._client.publish(message.reply, data, headers=headers)

    subscription = await bus._client.subscribe("unreadable.reply", cb=answer)
    with pytest.raises(ServiceError) as error:
        await bus.request("unreadable.reply", Ask("x"), Answer)
    await subscription.unsubscribe()
    assert error.value.code == "internal"
    assert "unreadable.reply sent an invalid reply" in error.value.message or headers


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = {"traceparent": PARENT, "tracestate": "a=1"}


@pytest.mark.parametrize("silence", [None, 2.0])
async def test_trace_of_a_request_is_that_of_what_it_causes(
    bus: Bus, subject: str, silence: float | None
) -> None:
    second, announced = f"{subject}.second", asyncio.Queue[tuple[str, str]]()

    async def ask_second(_: str, ask: Ask) -> Answer:
        await asyncio.create_task(bus.publish(f"{subject}.event", ask))
        return await bus.request(second, ask, Answer, silence=silence)

    async def reply_trace(_: str, ask: Ask) -> Answer:
        return Answer(str(trace_context.headers()))

    def on_event(delivery: Delivery) -> None:
        announced.put_nowait((trace_context.trace_id(), str(dict(delivery.headers))))

    await bus.subscribe(f"{subject}.event", on_event)
    endpoints = [
        bus.endpoint("first", subject, Ask, ask_second),
        bus.endpoint("second", second, Ask, reply_trace),
    ]
    await bus.serve("test", "for the test", endpoints)
    with trace_context.received(TRACE):
        answer = await bus.request(subject, Ask("x"), Answer, silence=silence)
    assert answer == Answer(str(TRACE))
    assert await announced.get() == ("", "{}")  # an event has the trace only if it is given
    assert await bus.request(subject, Ask("x"), Answer) == Answer("{}")


async def test_message_with_a_trace_is_handled_in_it(bus: Bus, subject: str) -> None:
    handled = asyncio.Queue[str]()
    await bus.subscribe(subject, lambda _: handled.put_nowait(trace_context.trace_id()))
    for headers in (TRACE, {}, {"traceparent": "nonsense"}):
        await bus.publish(subject, Ask("x"), headers=headers)
    assert [await handled.get() for _ in range(3)] == [PARENT.split("-")[1], "", ""]
