"""Which of two workers answers a request that NATS hands to either of them."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from services.client.chat_client import ChatClient
from services.client.fleet import DEFAULT_LIMITS as FLEET_LIMITS
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.fleet import HubAnnouncement
from services.contract.messages import (
    Accepted,
    Cancel,
    ChatRequest,
    Done,
    Failed,
    ModelInfo,
    ReplayRequest,
    RequestAdmitted,
    StreamEvent,
)
from services.runtime.bus import Bus
from services.runtime.supervised import SupervisedLoop
from tests.inference.scripted import StartWorker, Worker, rest_of
from tests.inference.test_report_hub import LIMITS, Member

SESSIONS = [f"session {number}" for number in range(12)]


@asynccontextmanager
async def pair(
    start_worker: StartWorker, models: tuple[str, str] = ("fake", "fake"), **more: Any
) -> AsyncIterator[tuple[Worker, Worker]]:
    """Run two workers that have each other's reports."""
    async with (
        start_worker(worker_id="w1", model=models[0], **more) as first,
        start_worker(worker_id="w2", model=models[1], tenant=first.tenant, **more) as second,
    ):
        for each in (first, second):
            each.receive_reports(first.report, second.report)
        yield first, second


async def report_once(worker: Worker) -> float:
    await worker.bus.publish(subjects.report(worker.report.worker_id), worker.report)
    return LIMITS.report_seconds


async def answered_by(asked: Worker, session: str, **more: Any) -> str:
    """Return the id of the worker that answers."""
    accepted, *_, end = await asked.ask("hi", session, **more)
    assert isinstance(accepted, Accepted) and isinstance(end, Done)
    return accepted.worker_id


async def test_request_of_the_open_tenant_is_answered(fast: Worker) -> None:
    request = ChatRequest(prompt="hi", session_id=fast.tenant)
    *_, done = [event async for event in fast.events(request, subjects.OPEN_TENANT)]
    assert isinstance(done, Done) and done.stored == "log"


async def test_requests_of_a_session_are_answered_by_one_worker(
    start_worker: StartWorker,
) -> None:
    async with pair(start_worker) as (first, _):
        chosen = {session: await answered_by(first, session) for session in SESSIONS}
        assert set(chosen.values()) == {"w1", "w2"}
        for session in SESSIONS:
            assert {await answered_by(first, session) for _ in range(3)} == {chosen[session]}


async def test_forwarded_request_has_the_trace_of_its_caller(start_worker: StartWorker) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    forwarded = []
    async with pair(start_worker) as (first, _), first.bus.inbox("_INBOX.mine") as inbox:
        to_workers = subjects.worker_request(subjects.ANY, first.tenant)
        await first.bus.subscribe(
            to_workers, lambda delivery: forwarded.append(delivery.headers.get("traceparent"))
        )
        for session in SESSIONS:
            request = ChatRequest(prompt="hi", session_id=session)
            subject = subjects.request(first.tenant)
            await first.bus.publish(subject, request, "_INBOX.mine", {"traceparent": parent})
            await rest_of(inbox)
    assert forwarded and set(forwarded) == {parent}


async def test_request_for_a_model_is_answered_by_a_worker_of_it(start_worker: StartWorker) -> None:
    async with pair(start_worker, models=("fake", "other")) as (first, _):
        for session in SESSIONS[:4]:
            assert await answered_by(first, session, model="fake") == "w1"
            assert await answered_by(first, session, model="other") == "w2"
            assert await answered_by(first, session, model="other:shout") == "w2"
        (failed,) = await first.ask("hi", "s", model="third")
        assert isinstance(failed, Failed) and failed.code == "model_not_found"
        assert "fake" in failed.message and "other" in failed.message


async def test_worker_that_is_no_hub_knows_where_requests_belong(
    start_worker: StartWorker, history_url: str
) -> None:
    """Both workers learn of each other from a third one, which hears the reports."""
    one_hub = dataclasses.replace(LIMITS, max_hubs=1)
    async with Bus.connect(history_url, "hub") as bus, AsyncExitStack() as stack:
        hub = Member(bus, "hub", one_hub, "loading")
        await stack.enter_async_context(hub.running())
        first = await stack.enter_async_context(start_worker(worker_id="w1", fleet=one_hub))
        second = await stack.enter_async_context(
            start_worker(worker_id="w2", fleet=one_hub, model="other", tenant=first.tenant)
        )
        await first.until(lambda: hub.hub.is_hub)
        for each in (first, second):
            reporting = SupervisedLoop("report", partial(report_once, each), pytest.fail)
            await stack.enter_async_context(reporting.running(is_cancelled=True))
            await stack.enter_async_context(each.reports.running(pytest.fail))
        await first.until(lambda: not (first.reports.is_hearing or second.reports.is_hearing))
        await first.until(lambda: hub.knows == {"hub", "w1", "w2"})
        for session in SESSIONS[:4]:
            assert await answered_by(first, session, model="fake") == "w1"
            assert await answered_by(first, session, model="other") == "w2"
        (failed,) = await first.ask("hi", "s", model="third")
        assert isinstance(failed, Failed) and failed.code == "model_not_found"


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "lost"])
async def test_request_is_answered_if_no_hub_replies(
    start_worker: StartWorker, is_frozen: bool
) -> None:
    """A client without reports waits a second for the worker that NATS picks."""
    limits = dataclasses.replace(FLEET_LIMITS, look_seconds=0.1, hear_seconds=1000.0)
    async with start_worker(fleet=limits) as worker, worker.reports.running(pytest.fail):
        await without_hubs(worker, limits.max_hubs, is_frozen)
        assert isinstance(await end_of_answer(worker, "fake"), Done)
        await worker.until(lambda: worker.reports.is_hub)


async def test_incomplete_directory_is_no_reason_to_reject(start_worker: StartWorker) -> None:
    """It lacks this worker, but has one of another model."""
    limits = dataclasses.replace(FLEET_LIMITS, look_seconds=0.1, hear_seconds=1000.0)
    async with start_worker(fleet=limits) as worker, worker.reports.running(pytest.fail):
        await without_hubs(worker, limits.max_hubs, is_frozen=False)
        other = replace(worker.report, worker_id="w2", model=ModelInfo("other", "o", 2048, 0))
        worker.receive_reports(replace(other, interval=60.0))
        assert isinstance(await end_of_answer(worker, "fake"), Done)
        failed = await end_of_answer(worker, "third")
        assert isinstance(failed, Failed) and failed.code == "no_worker"


async def without_hubs(worker: Worker, count: int, is_frozen: bool) -> None:
    """Have the worker rely on that many hubs, none of which replies."""
    names = [f"silent{number}" for number in range(count)]
    for name in names if is_frozen else []:
        await worker.bus.subscribe(subjects.reports(name), lambda delivery: None)
    async with asyncio.timeout(20):
        while worker.reports.is_hearing:
            for name in names:
                hub = HubAnnouncement(name, since=1, workers=5, is_complete=True)
                await worker.bus.publish(subjects.hub(name), hub)
            await asyncio.sleep(0.01)


async def end_of_answer(worker: Worker, model: str) -> StreamEvent:
    """Return the last event that a client without reports gets."""
    client, request = ChatClient(worker.bus, worker.tenant), ChatRequest(prompt="hi", model=model)
    async with aclosing(client.stream(request)) as events:
        return [event async for event in events][-1]


async def test_session_of_a_busy_worker_is_answered_by_another(
    start_worker: StartWorker,
) -> None:
    async with pair(start_worker) as (first, second):
        busy = await answered_by(first, "s")
        for each in (first, second):
            each.receive_reports(replace(each.report, worker_id=busy, running=8))
        assert {await answered_by(first, "s") for _ in range(4)} == {"w1", "w2"} - {busy}


async def test_request_that_no_other_worker_accepts_is_kept(start_worker: StartWorker) -> None:
    async with start_worker() as alone:
        frozen = replace(alone.report, worker_id="frozen")
        await alone.bus.subscribe(
            subjects.worker_request("frozen", subjects.ANY), lambda delivery: None
        )
        for report in (frozen, replace(frozen, worker_id="gone"), alone.report):
            alone.receive_reports(report)
        for session in SESSIONS:
            assert await answered_by(alone, session) == "worker"


async def direct(worker: Worker, request: ChatRequest, reply: str) -> RequestAdmitted:
    subject = subjects.worker_request(worker.report.worker_id, worker.tenant)
    headers = {subjects.REPLY_HEADER: reply}
    return await worker.bus.request(subject, request, RequestAdmitted, headers=headers)


async def test_request_to_one_worker_is_acknowledged_or_rejected(
    start_worker: StartWorker,
) -> None:
    async with start_worker(parallel=1, queue=1, step_seconds=0.01) as busy:
        for number in range(2):
            request = ChatRequest(prompt="long", session_id=str(number), max_tokens=20)
            admitted = await direct(busy, request, f"_INBOX.{number}")
            assert admitted.running + admitted.waiting == number + 1
        with pytest.raises(ServiceError) as rejected:
            await direct(busy, request, "_INBOX.3")
        assert rejected.value.code == "overloaded" and rejected.value.retry_after
        for reply in ("$JS.API.STREAM.PURGE.HISTORY", subjects.reply("bob", "r", "a")):
            with pytest.raises(ServiceError) as rejected:
                await direct(busy, request, reply)
            assert rejected.value.code == "invalid_request"


@pytest.mark.parametrize("subject_of", ["request", "replay", "worker_replay"])
async def test_nothing_is_sent_to_reply_subjects_of_another_tenant(
    fast: Worker, subject_of: str
) -> None:
    """Tenant bob may publish his own requests only, and names a reply subject of tenant ann."""
    ann = subjects.reply("ann", "r", "a")
    await fast.ask("hi", "s", request_id="r")
    bob = fast.tenant
    subject, message = {
        "request": (subjects.request(bob), ChatRequest(prompt="hi", session_id="t")),
        "replay": (subjects.replay(bob, "r"), ReplayRequest(0)),
        "worker_replay": (subjects.worker_replay("worker", bob, "r"), ReplayRequest(0)),
    }[subject_of]
    async with fast.bus.inbox(ann) as inbox, fast.bus.inbox(subjects.reply(bob, "r", "a")) as own:
        await fast.bus.publish(subject, message, reply=ann)
        await fast.ask("hi", "s")  # was handled after it
        with pytest.raises(TimeoutError):
            await inbox.next(0.05)
        if subject_of == "request":
            await fast.bus.publish(subject, message, reply=subjects.reply(bob, "r", "a"))
            await own.next(5)


async def test_request_with_the_reply_of_another_tenant_is_dropped(
    fast: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    request, foreign = ChatRequest(prompt="hi", session_id="s"), subjects.reply("bob", "r", "1")
    async with fast.bus.inbox(foreign) as inbox:
        await fast.bus.publish(subjects.request(fast.tenant), request, reply=foreign)
        assert isinstance((await fast.ask("hi", "s"))[-1], Done), "a later request is answered"
        with pytest.raises(TimeoutError):
            await inbox.next(0)
    assert "another tenant waits there" in caplog.text


@pytest.mark.parametrize(
    ("cancel", "is_dropped"),
    [
        (Cancel("worker"), True),
        (Cancel(reply="_INBOX.mine"), True),
        (Cancel("worker", "_INBOX.mine"), True),
        (Cancel("another"), False),
        (Cancel(reply="_INBOX.another"), False),
    ],
)
async def test_cancel_of_an_attempt_frees_its_slot_silently(
    start_worker: StartWorker, cancel: Cancel, is_dropped: bool
) -> None:
    async with (
        start_worker(parallel=1, step_seconds=0.01) as slow,
        slow.bus.inbox("_INBOX.mine") as inbox,
    ):
        request = ChatRequest(prompt="long", session_id="s", request_id="r1", max_tokens=30)
        await direct(slow, request, "_INBOX.mine")
        await slow.until(lambda: slow.running == 1)
        await slow.cancel("r1", cancel)
        await slow.until(lambda: slow.running == 0)
        events = await rest_of(inbox)
        assert any(isinstance(event, Done) for event in events) is not is_dropped
        assert len((await slow.context("s")).turns) == (0 if is_dropped else 1)
