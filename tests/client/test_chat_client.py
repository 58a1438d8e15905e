import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from services.client.chat_client import ChatClient, new_request_id
from services.client.failover import FailoverPolicy
from services.client.transcript import Transcript
from services.contract import subjects
from services.contract.messages import ChatRequest, Failed, Progress, StreamEvent, Token
from services.runtime.bus import Bus
from tests.fakes import ACCEPTED, DONE, HELLO, Script, ScriptedWorker, scripted_worker
from tests.servers import nats_server, running

ENDLESS: Script = (ACCEPTED, Token(0, "on", (1,)), *(0.02, Progress(0, 5, 5)) * 100)
QUICK_DROP = FailoverPolicy(drop_messages=1)


async def read(client: ChatClient, request: ChatRequest) -> list[StreamEvent]:
    async with contextlib.aclosing(client.stream(request)) as events:
        return [event async for event in events]


async def next_cancel(worker: ScriptedWorker) -> tuple[str, str]:
    async with asyncio.timeout(30):
        return await worker.cancelled.get()


@pytest.fixture
async def endless(nats_url: str) -> AsyncIterator[ScriptedWorker]:
    async with scripted_worker(nats_url, ENDLESS) as worker:
        yield worker


async def test_stream_yields_all_events_in_order(bus: Bus, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        assert await read(ChatClient(bus), ChatRequest(prompt="hi")) == list(HELLO)


async def test_request_goes_to_the_subject_of_its_tenant(bus: Bus, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        await read(ChatClient(bus), ChatRequest(prompt="hi"))
        await read(ChatClient(bus, "acme"), ChatRequest(prompt="hi", request_id="mine"))
    (open_subject, first), (acme_subject, second) = worker.requests
    assert (open_subject, acme_subject) == ("chat.request", "chat.request.acme")
    assert first.request_id is not None and subjects.is_id(first.request_id)
    assert second.request_id == "mine"


def test_request_ids_are_unique_version_7_uuids() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {UUID(request_id).version for request_id in ids} == {7}
    assert {UUID(request_id).variant for request_id in ids} == {UUID(int=1 << 63).variant}


async def test_request_without_any_worker_fails_at_once(bus: Bus) -> None:
    async with asyncio.timeout(4):
        (failed,) = await read(ChatClient(bus, "nobody"), ChatRequest(prompt="hi"))
    assert isinstance(failed, Failed) and failed.code == "no_worker"


async def test_progress_events_keep_a_slow_answer_alive(bus: Bus, nats_url: str) -> None:
    slow: Script = (ACCEPTED, *(0.2, Progress(0, 5, 5)) * 4, DONE)
    async with scripted_worker(nats_url, slow):
        client = ChatClient(bus, policy=FailoverPolicy(silence_seconds=0.3))
        assert (await read(client, ChatRequest(prompt="hi")))[-1] == DONE


async def test_contradicting_text_ends_the_answer_as_lost(bus: Bus, nats_url: str) -> None:
    async with scripted_worker(nats_url, [Token(0, "äö", (1,)), Token(0, "x", (2,)), DONE]):
        client = ChatClient(bus, policy=QUICK_DROP)
        first, failed = await read(client, ChatRequest(prompt="hi"))
    assert first == Token(0, "äö", (1,))
    assert isinstance(failed, Failed) and failed.code == "worker_lost"


async def test_unreadable_event_is_an_internal_error(bus: Bus, nats_url: str) -> None:
    async with scripted_worker(nats_url, [ChatRequest(prompt="no event")]):  # type: ignore[list-item]
        (failed,) = await read(ChatClient(bus), ChatRequest(prompt="hi"))
    assert isinstance(failed, Failed) and failed.code == "internal"


async def test_leaving_the_stream_cancels_the_request(bus: Bus, endless: ScriptedWorker) -> None:
    request = ChatRequest(prompt="hi", request_id="broken")
    async with contextlib.aclosing(ChatClient(bus, "acme").stream(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                break
    assert await next_cancel(endless) == ("acme", "broken")


async def test_cancelled_task_cancels_the_request(bus: Bus, endless: ScriptedWorker) -> None:
    request, has_begun = ChatRequest(prompt="hi", request_id="task"), asyncio.Event()

    async def read_forever() -> None:
        async with contextlib.aclosing(ChatClient(bus).stream(request)) as events:
            async for _ in events:
                has_begun.set()

    reading = asyncio.create_task(read_forever())
    await has_begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await next_cancel(endless) == ("_", "task")


async def test_finished_answer_is_not_cancelled(bus: Bus, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        await read(ChatClient(bus), ChatRequest(prompt="hi"))
        await ChatClient(bus).cancel("later")  # any earlier cancel would arrive before this one
        assert await next_cancel(worker) == ("_", "later")
        assert worker.cancelled.empty()


async def test_cancel_needs_only_the_request_id(bus: Bus, endless: ScriptedWorker) -> None:
    await ChatClient(bus, "acme").cancel("r7")
    assert await next_cancel(endless) == ("acme", "r7")


async def test_request_without_nats_fails_at_once(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            server.stop(signal.SIGKILL)
            async with asyncio.timeout(30):
                while bus.connected:
                    await asyncio.sleep(0.01)
                (failed,) = await read(ChatClient(bus), ChatRequest(prompt="hi"))
    assert isinstance(failed, Failed) and failed.code == "bus_unavailable"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (ChatRequest(prompt="hi", request_id="a b"), "invalid_request"),
        (ChatRequest(prompt="hi", request_id="*"), "invalid_request"),
        (ChatRequest(prompt="hi", temperature=-1), "invalid_request"),
        (ChatRequest(prompt=" "), "invalid_request"),
        (ChatRequest(prompt="caf\udce9"), "invalid_request"),
        (ChatRequest(prompt="x" * 2_000_000), "payload_too_large"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_invalid_request_yields_failed_and_raises_nothing(
    bus: Bus, request_: ChatRequest, code: str
) -> None:
    (failed,) = await read(ChatClient(bus), request_)
    assert isinstance(failed, Failed) and failed.code == code


@pytest.mark.parametrize("request_id", ["a b", "a*", "", "a\r\nPING"])
async def test_resume_of_an_invalid_id_is_not_found(bus: Bus, request_id: str) -> None:
    async with contextlib.aclosing(ChatClient(bus).rejoin(request_id)) as events:
        (failed,) = [event async for event in events]
    assert isinstance(failed, Failed) and failed.code == "not_found"


async def test_unexpected_error_at_the_start_yields_failed(bus: Bus) -> None:
    unsendable = ChatRequest(prompt="hi", logit_bias={"1": object()})  # type: ignore[dict-item]
    (failed,) = await read(ChatClient(bus), unsendable)
    assert isinstance(failed, Failed) and failed.code == "internal"


async def test_unexpected_error_within_the_answer_yields_failed(
    bus: Bus, endless: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ChatRequest(prompt="hi", request_id="unexpected")
    async with contextlib.aclosing(ChatClient(bus, policy=QUICK_DROP).stream(request)) as events:
        while not isinstance(await anext(events), Token):
            pass
        monkeypatch.setattr(Transcript, "add", raise_unexpected)
        (failed,) = [event async for event in events]
    assert isinstance(failed, Failed) and failed.code == "internal"
    async with asyncio.timeout(30):
        assert (await endless.dropped.get()).reply, "the attempt is dropped"


def raise_unexpected(*arguments: object) -> None:
    raise RuntimeError("unexpected")
