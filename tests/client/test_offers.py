"""Requests that go to the worker that routing names, and on to others if it does not take them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple

import pytest

from services.client.chat_client import ChatClient
from services.client.failover import FailoverPolicy
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, Failed, StreamEvent
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.fakes import HELLO, ScriptedWorker, direct_worker, report, scripted_worker

POLICY = FailoverPolicy(admission_seconds=0.1)


class Pair(NamedTuple):
    """Two workers that reports told of: `first` is the session's."""

    workers: WorkerDirectory
    first: ScriptedWorker
    second: ScriptedWorker
    ids: list[str]


def hear(workers: WorkerDirectory, *worker_ids: str) -> None:
    for worker_id in worker_ids:
        workers.on_report(Delivery(subjects.report(worker_id), encode(report(worker_id)), ""))


@pytest.fixture
async def pair(nats_url: str) -> AsyncIterator[Pair]:
    workers = WorkerDirectory()
    hear(workers, "one", "two")
    ids = workers.rank(subjects.session_key(subjects.OPEN_TENANT, "default"), None)
    async with (
        direct_worker(nats_url, ids[0], HELLO) as first,
        direct_worker(nats_url, ids[1], HELLO) as second,
    ):
        yield Pair(workers, first, second, ids)


async def ask(bus: Bus, workers: WorkerDirectory, **more: Any) -> list[StreamEvent]:
    client = ChatClient(bus, workers=workers, policy=POLICY)
    async with aclosing(client.stream(ChatRequest(prompt="hi", **more))) as events:
        return [event async for event in events]


async def test_the_sessions_worker_is_asked_directly(bus: Bus, pair: Pair) -> None:
    assert await ask(bus, pair.workers) == list(HELLO)
    ((subject, request),) = pair.first.requests
    assert subject == subjects.worker_request(pair.ids[0], subjects.OPEN_TENANT)
    assert request.prompt == "hi" and pair.second.requests == []


async def test_what_a_worker_acknowledged_counts_before_its_next_report(
    bus: Bus, pair: Pair
) -> None:
    await ask(bus, pair.workers)
    running = {report.worker_id: report.running for report in pair.workers.reports()}
    assert running == {pair.ids[0]: 1, pair.ids[1]: 0}


async def test_requests_that_are_not_acknowledged_yet_count_too(bus: Bus, pair: Pair) -> None:
    with pair.workers.offering(pair.ids[0]), pair.workers.offering(pair.ids[0]):
        with pair.workers.offering(pair.ids[0]):
            await ask(bus, pair.workers)
    assert pair.first.requests == [] and len(pair.second.requests) == 1


@pytest.mark.parametrize("code", ["overloaded", "shutting_down"])
async def test_a_worker_that_refuses_is_followed_by_the_next(
    bus: Bus, pair: Pair, code: str
) -> None:
    pair.first.refuses = ServiceError(code, "no", 1)  # type: ignore[arg-type]
    assert await ask(bus, pair.workers) == list(HELLO)
    assert len(pair.second.requests) == 1


async def test_if_all_are_full_the_shortest_wait_is_told(bus: Bus, pair: Pair) -> None:
    pair.first.refuses = ServiceError("overloaded", "full", 7.5)
    pair.second.refuses = ServiceError("overloaded", "full", 3.5)
    assert await ask(bus, pair.workers) == [Failed("overloaded", "full", 3.5)]
    assert pair.first.cancelled.empty(), "what nobody took need not be cancelled"


async def test_what_every_worker_would_refuse_is_refused_by_the_first(bus: Bus, pair: Pair) -> None:
    pair.first.refuses = ServiceError("invalid_request", "no such grammar")
    assert await ask(bus, pair.workers) == [Failed("invalid_request", "no such grammar")]
    assert pair.second.requests == []


async def test_a_frozen_worker_is_passed_over_and_told_to_drop_the_request(
    bus: Bus, pair: Pair
) -> None:
    pair.first.is_frozen = True
    assert await ask(bus, pair.workers, request_id="r1") == list(HELLO)
    async with asyncio.timeout(1):
        drop = await pair.first.dropped.get()
    assert drop.worker_id == pair.ids[0]
    assert drop.reply is not None and drop.reply.startswith("chat.reply._.r1.")


async def test_a_worker_that_is_gone_is_passed_over_at_once_and_forgotten(
    bus: Bus, pair: Pair
) -> None:
    hear(pair.workers, *(f"gone {number}".replace(" ", "-") for number in range(8)))
    async with asyncio.timeout(0.5):
        for number in range(8):
            assert (await ask(bus, pair.workers, session_id=str(number)))[-1] == HELLO[-1]
    assert len(pair.workers.reports()) < 10


async def test_where_no_report_was_heard_nats_picks_a_worker(bus: Bus, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        assert await ask(bus, WorkerDirectory()) == list(HELLO)
    assert [subject for subject, _ in worker.requests] == [subjects.request(subjects.OPEN_TENANT)]
