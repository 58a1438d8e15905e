"""Responses in background, whose edge and worker are lost or not there yet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.client.failover import FailoverPolicy
from services.edge.limits import EdgeLimits
from services.runtime.bus import Bus
from tests.edge.conftest import LIMITS, edge_on
from tests.inference.conftest import nats_with_history
from tests.inference.scripted import FAST, LONG, started

QUICK = replace(
    LIMITS,
    background_lost_seconds=0.4,
    background_poll_seconds=0.05,
    failover=FailoverPolicy(join_seconds=0.1, admission_seconds=0.1, max_publish_tries=1),
)
BODY = {"model": "fake", "input": "long", "background": True}


@pytest.fixture(scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    folder: Path = tmp_path_factory.mktemp("background")
    async with nats_with_history(folder) as url:
        yield url


@asynccontextmanager
async def edge(url: str, limits: EdgeLimits = QUICK) -> AsyncIterator[httpx.AsyncClient]:
    async with Bus.connect(url, "edge") as bus, edge_on(bus, limits=limits) as http:
        yield http


async def create(http: httpx.AsyncClient) -> str:
    got = (await http.post("/v1/responses", json=BODY)).json()
    assert got["status"] == "queued", got
    response_id: str = got["id"]
    return response_id


async def get(http: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    got = await http.get(f"/v1/responses/{response_id}")
    assert got.status_code == 200, got.text
    found: dict[str, Any] = got.json()
    return found


async def until(http: httpx.AsyncClient, response_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (found := await get(http, response_id))["status"] not in statuses:
            await asyncio.sleep(0.02)
    return found


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


async def test_response_waits_for_a_worker(url: str) -> None:
    async with edge(url) as http:
        response_id = await create(http)
        assert (await get(http, response_id))["status"] == "queued"
        async with started(url):
            found = await until(http, response_id, "completed", "failed")
    assert text_of(found) == LONG.decode()


async def test_response_that_no_worker_takes_fails_at_last(url: str) -> None:
    async with edge(url, replace(QUICK, background_retry_seconds=0)) as http:
        found = await until(http, await create(http), "failed")
    assert found["error"]["code"] == "server_error"


async def test_worker_goes_on_when_the_edge_is_gone(url: str) -> None:
    async with started(url, step_seconds=0.001) as worker:
        async with edge(url) as http:
            response_id = await create(http)
            await worker.until(lambda: worker.running == 1)
        assert worker.running == 1
        async with edge(url) as http:
            found = await until(http, response_id, "completed", "failed")
    assert text_of(found) == LONG.decode()


async def test_next_edge_starts_a_response_again_that_was_lost(url: str) -> None:
    dying = replace(FAST, drain_seconds=0)
    async with started(url, step_seconds=0.01, limits=dying) as worker:
        async with edge(url) as http:
            response_id = await create(http)
            await worker.until(lambda: worker.running == 1)
    async with edge(url) as one, edge(url) as two, started(url) as worker:
        assert (await get(one, response_id))["status"] == "queued"
        assert (await get(two, response_id))["status"] == "queued"
        found = await until(one, response_id, "completed", "failed")
        assert text_of(found) == LONG.decode()
        assert await get(two, response_id) == found


async def test_cancelled_response_is_not_started_again(url: str) -> None:
    async with edge(url) as one, edge(url) as two:
        response_id = await create(one)
        got = await two.post(f"/v1/responses/{response_id}/cancel")
        assert (got.status_code, got.json()["status"]) == (200, "cancelled")
        async with started(url) as worker:
            await asyncio.sleep(0.1)
            assert worker.running == 0 and not worker.backend.steps
            assert (await get(one, response_id))["status"] == "cancelled"
            stream = await one.get(f"/v1/responses/{response_id}?stream=true")
            assert '"status":"cancelled"' in stream.text


async def test_stream_of_a_waiting_response_begins_with_its_worker(url: str) -> None:
    async with edge(url) as http:
        response_id = await create(http)
        reading = asyncio.create_task(http.get(f"/v1/responses/{response_id}?stream=true"))
        await asyncio.sleep(0.1)
        async with started(url):
            text = (await reading).text
    assert text.startswith("event: response.created\n") and "response.completed" in text


async def test_erased_response_is_not_started_again(url: str) -> None:
    async with edge(url) as one, edge(url) as two:
        response_id, other = await create(one), await create(one)
        session_id = "responses_" + response_id.removeprefix("resp_")[:32]
        assert (await two.delete(f"/sessions/{session_id}")).status_code == 200
        async with started(url):
            await until(two, other, "completed")
        for http in (one, two):
            assert (await http.get(f"/v1/responses/{response_id}")).status_code == 404
