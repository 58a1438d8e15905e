"""A worker that leaves: what it can't finish in time goes on at another."""

import asyncio
import threading
import time
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest
from msgspec.structs import replace

from services.client.chat_client import ChatClient
from services.contract.messages import Accepted, ChatRequest, Done, Failed, StreamEvent, Token
from services.inference import preparation, service
from services.inference.models import LoadedModel
from services.inference.sessions import HistoryClient
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import LONG, Worker, text, worker
from tests.inference.test_reception import pair


async def leave(worker: Worker, other: Worker) -> None:
    """As Worker.drain does: it says so first, then hands over."""
    for each in (worker, other):
        each.hear(replace(worker.report, state="draining"))
    await worker.service.drain()


async def test_an_answer_that_takes_too_long_goes_on_at_another_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FINISH_DEADLINE", 0.2)
    async with pair(tmp_path, step_seconds=0.005) as workers:
        by_id = {worker.report.worker_id: worker for worker in workers}
        events: list[StreamEvent] = []
        request = ChatRequest(prompt="long", session_id="s", request_id="r1")
        client = ChatClient(workers[0].bus, workers=workers[0].workers)
        leaving = None
        async with aclosing(client.stream(request)) as answer:
            async for event in answer:
                events.append(event)
                if isinstance(event, Token) and leaving is None:
                    accepted = next(e for e in events if isinstance(e, Accepted))
                    first = by_id.pop(accepted.worker_id)
                    (second,) = by_id.values()
                    leaving = asyncio.create_task(leave(first, second))
        assert leaving is not None
        await leaving
        assert text(events) == LONG.decode()
        assert isinstance(events[-1], Done) and events[-1].stored == "log"
        (turn,) = (await second.context("s")).turns
        assert turn.response == LONG.decode()
        assert second.backend.steps, "it went on there"


async def test_who_joined_an_answer_goes_on_elsewhere_while_its_worker_still_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FINISH_DEADLINE", 0)
    async with pair(tmp_path, step_seconds=0.2) as (first, second):
        request = ChatRequest(prompt="hi", session_id="s", request_id="r1", grace_s=10)
        client = ChatClient(first.bus, workers=first.workers)
        async with aclosing(client.stream(request)) as answer:
            async for event in answer:
                if isinstance(event, Accepted):
                    holder = event.worker_id
                if isinstance(event, Token):
                    break  # as an edge that dies
        pairs = {"w1": (first, second), "w2": (second, first)}
        joined = client.resume("r1")
        events: list[StreamEvent] = [await anext(joined)]
        leaving = asyncio.create_task(leave(*pairs[holder]))
        events += [event async for event in joined]
        await leaving
        assert text(events) == "hello" and isinstance(events[-1], Done)


async def test_who_leaves_waits_no_longer_for_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(service, "FINISH_DEADLINE", 0)
    monkeypatch.setattr(HistoryClient, "context", never)
    async with worker(tmp_path) as leaving:
        asked = asyncio.create_task(leaving.ask("hi", "s"))
        while not leaving.service.waiting:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(3):
            await leaving.service.drain()
        failed = (await asked)[-1]
        assert isinstance(failed, Failed) and failed.code == "shutting_down"


async def test_the_model_is_closed_once_nobody_looks_at_the_next_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, was_closed = threading.Event(), []

    def ahead(model: LoadedModel, *_: object) -> None:
        looking.set()
        time.sleep(0.3)
        was_closed.append(cast(FakeBackend, model.backend).closed)

    monkeypatch.setattr(preparation, "ahead", ahead)
    async with worker(tmp_path) as leaving:
        await leaving.ask("hi", "s")
        await asyncio.to_thread(looking.wait)
        await leaving.service.drain()
        assert was_closed == [False]


async def test_who_leaves_does_not_wait_for_history_to_tell_the_next_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    asked = asyncio.Event()
    async with worker(tmp_path) as leaving:
        await leaving.ask("hi", "s")
        monkeypatch.setattr(HistoryClient, "context", never)
        await asked.wait()
        async with asyncio.timeout(3):
            await leaving.service.drain()
            await leaving.bus.stop_serving()
            while any("_read_ahead" in str(task) for task in asyncio.all_tasks()):
                await asyncio.sleep(0.05)
