"""Two workers on one bus: who answers what NATS gave to either of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.messages import Accepted, Cancel, ChatRequest, Done, Failed, RequestAdmitted
from tests.inference.scripted import Worker, worker

SESSIONS = [f"session {number}" for number in range(12)]


@asynccontextmanager
async def pair(
    folder: Path, models: tuple[str, str] = ("fake", "fake"), step_seconds: float = 0
) -> AsyncIterator[tuple[Worker, Worker]]:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(
            worker(folder, worker_id="w1", name=models[0], step_seconds=step_seconds)
        )
        second = await stack.enter_async_context(
            worker(folder, worker_id="w2", name=models[1], step_seconds=step_seconds, url=first.url)
        )
        for each in (first, second):
            each.hear(first.report, second.report)
        yield first, second


async def answered_by(asked: Worker, session: str, **more: str) -> str:
    accepted, *_, end = await asked.ask("hi", session, **more)
    assert isinstance(accepted, Accepted) and isinstance(end, Done)
    return accepted.worker_id


async def test_a_sessions_requests_are_answered_by_one_worker_whoever_nats_picks(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (first, _):
        chosen = {session: await answered_by(first, session) for session in SESSIONS}
        assert set(chosen.values()) == {"w1", "w2"}
        for session in SESSIONS:
            assert {await answered_by(first, session) for _ in range(3)} == {chosen[session]}


async def test_a_named_model_is_answered_by_its_worker_alone(tmp_path: Path) -> None:
    async with pair(tmp_path, models=("fake", "other")) as (first, _):
        for session in SESSIONS[:4]:
            assert await answered_by(first, session, model="fake") == "w1"
            assert await answered_by(first, session, model="other") == "w2"
            assert await answered_by(first, session, model="other:shout") == "w2"
        (failed,) = await first.ask("hi", "s", model="third")
        assert isinstance(failed, Failed) and failed.code == "model_not_found"
        assert "fake" in failed.message and "other" in failed.message


async def test_a_session_whose_worker_is_busy_is_answered_by_the_other(tmp_path: Path) -> None:
    async with pair(tmp_path) as (first, second):
        busy = await answered_by(first, "s")
        for each in (first, second):
            each.hear(replace(each.report, worker_id=busy, running=8))
        assert {await answered_by(first, "s") for _ in range(4)} == {"w1", "w2"} - {busy}


async def test_who_can_not_pass_a_request_on_keeps_it(tmp_path: Path) -> None:
    async with worker(tmp_path) as alone:
        frozen = replace(alone.report, worker_id="frozen")
        await alone.bus.subscribe(
            subjects.worker_request("frozen", subjects.ANY), lambda delivery: None
        )
        for report in (frozen, replace(frozen, worker_id="gone"), alone.report):
            alone.hear(report)
        for session in SESSIONS:
            assert await answered_by(alone, session) == "worker"


async def direct(worker: Worker, request: ChatRequest, reply: str) -> RequestAdmitted:
    subject = subjects.worker_request(worker.report.worker_id, subjects.OPEN_TENANT)
    headers = {subjects.REPLY_HEADER: reply}
    return await worker.bus.request(subject, request, RequestAdmitted, headers=headers)


async def test_a_request_to_one_worker_is_acknowledged_with_its_load_or_refused(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, parallel=1, queue=1, step_seconds=0.01) as busy:
        for number in range(2):
            request = ChatRequest(prompt="long", session_id=str(number), max_tokens=20)
            taken = await direct(busy, request, f"_INBOX.{number}")
            assert taken.running + taken.waiting == number + 1
        with pytest.raises(ServiceError) as refused:
            await direct(busy, request, "_INBOX.3")
        assert refused.value.code == "overloaded" and refused.value.retry_after
        with pytest.raises(ServiceError) as refused:
            await direct(busy, request, "$JS.API.STREAM.PURGE.HISTORY")
        assert refused.value.code == "invalid_request"


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
async def test_an_attempt_that_is_dropped_frees_its_slot_says_no_more_and_keeps_nothing(
    tmp_path: Path, cancel: Cancel, is_dropped: bool
) -> None:
    async with (
        worker(tmp_path, parallel=1, step_seconds=0.01) as slow,
        slow.bus.inbox("_INBOX.mine") as inbox,
    ):
        request = ChatRequest(prompt="long", session_id="s", request_id="r1", max_tokens=30)
        await direct(slow, request, "_INBOX.mine")
        while slow.service.running == 0:
            await asyncio.sleep(0.01)
        await slow.bus.publish(subjects.cancel(subjects.OPEN_TENANT, "r1"), cancel)
        while slow.service.running:
            await asyncio.sleep(0.01)
        events = await slow.rest_of(inbox)
        assert any(isinstance(event, Done) for event in events) is not is_dropped
        assert len((await slow.context("s")).turns) == (0 if is_dropped else 1)
