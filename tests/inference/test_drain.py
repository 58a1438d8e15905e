"""A draining worker: requests that it can't finish in time fail over to another."""

import asyncio
import threading
import time
from contextlib import aclosing
from dataclasses import replace

import pytest
from msgspec.structs import replace as change

from services.client.chat_client import ChatClient
from services.client.failover import FailoverPolicy
from services.contract.messages import Accepted, ChatRequest, Done, Failed, StreamEvent, Token
from services.inference.history_client import HistoryClient
from services.inference.prompt_builder import PromptBuilder
from tests.inference.scripted import FAST, LONG, StartWorker, Worker, text
from tests.inference.test_router import pair


async def drain(worker: Worker, other: Worker) -> None:
    """Report `draining`, then drain, like services.inference.worker."""
    for each in (worker, other):
        each.receive_reports(change(worker.report, state="draining"))
    await worker.service.drain()


def client_of(worker: Worker) -> ChatClient:
    policy = FailoverPolicy(retry_seconds=0.03)
    return ChatClient(worker.bus, worker.tenant, worker.workers, policy)


async def test_unfinished_answer_resumes_at_another_worker(start_worker: StartWorker) -> None:
    limits = replace(FAST, drain_seconds=0.1)
    async with pair(start_worker, step_seconds=0.005, limits=limits) as workers:
        by_id = {worker.report.worker_id: worker for worker in workers}
        events: list[StreamEvent] = []
        request = ChatRequest(prompt="long", session_id="s", request_id="r1", max_tokens=100)
        client = client_of(workers[0])
        draining = None
        async with aclosing(client.stream(request)) as answer:
            async for event in answer:
                events.append(event)
                if isinstance(event, Token) and draining is None:
                    accepted = next(e for e in events if isinstance(e, Accepted))
                    first = by_id.pop(accepted.worker_id)
                    (second,) = by_id.values()
                    draining = asyncio.create_task(drain(first, second))
        assert draining is not None
        await draining
        assert text(events) == LONG[:100].decode()
        assert isinstance(events[-1], Done) and events[-1].stored == "log"
        (turn,) = (await second.context("s")).turns
        assert turn.response == LONG[:100].decode()
        assert second.backend.steps, "it resumed there"


async def test_second_reader_fails_over_while_worker_still_computes(
    start_worker: StartWorker,
) -> None:
    limits = replace(FAST, drain_seconds=0)
    async with pair(start_worker, step_seconds=0.1, limits=limits) as (first, second):
        request = ChatRequest(prompt="hi", session_id="s", request_id="r1", grace_s=10)
        client = client_of(first)
        async with aclosing(client.stream(request)) as answer:
            async for event in answer:
                if isinstance(event, Accepted):
                    holder = event.worker_id
                if isinstance(event, Token):
                    break  # like an edge that dies
        pairs = {"w1": (first, second), "w2": (second, first)}
        joined = client.rejoin("r1")
        events: list[StreamEvent] = [await anext(joined)]
        draining = asyncio.create_task(drain(*pairs[holder]))
        events += [event async for event in joined]
        await draining
        assert text(events) == "hello" and isinstance(events[-1], Done)


async def test_drain_fails_requests_that_wait_for_history(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(HistoryClient, "context", never)
    async with start_worker(limits=replace(FAST, drain_seconds=0)) as leaving:
        asked = asyncio.create_task(leaving.ask("hi", "s"))
        await leaving.until(lambda: leaving.waiting == 1)
        async with asyncio.timeout(3):
            await leaving.service.drain()
        failed = (await asked)[-1]
        assert isinstance(failed, Failed) and failed.code == "shutting_down"


async def test_drain_closes_the_model_after_an_idle_prompt_is_built(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    building, was_closed = threading.Event(), []

    def build_slowly(*_: object) -> None:
        building.set()
        time.sleep(0.1)
        was_closed.append(leaving.backend.closed)

    monkeypatch.setattr(PromptBuilder, "idle_prompt", build_slowly)
    async with start_worker() as leaving:
        await leaving.ask("hi", "s")
        await asyncio.to_thread(building.wait)
        await leaving.service.drain()
        assert was_closed == [False]


async def test_drain_does_not_wait_for_context_of_an_idle_prompt(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    asked = asyncio.Event()
    async with start_worker(limits=replace(FAST, idle_context_timeout_seconds=0.2)) as leaving:
        await leaving.ask("hi", "s")
        monkeypatch.setattr(HistoryClient, "context", never)
        await asked.wait()
        async with asyncio.timeout(3):
            await leaving.service.drain()
            await leaving.bus.stop_serving()
            while any("_prefill_next_prompt" in str(task) for task in asyncio.all_tasks()):
                await asyncio.sleep(0.01)
