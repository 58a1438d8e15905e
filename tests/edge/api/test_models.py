"""The models of an edge that two workers report to."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from services.contract.messages import ModelInfo, WorkerReport
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on
from tests.fakes import HELLO, reporting, scripted_worker


def report(worker_id: str, name: str, *adapters: str) -> WorkerReport:
    info = ModelInfo(name, f"digest of {name}", 2048, 1, adapters, trained_context=4096)
    return WorkerReport(worker_id, "ready", 1, 0, 0, model=info, name=name)


@pytest.fixture
async def client_of_two(nats_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """An OpenAI client of an edge that two workers report to."""
    reports = report("1", "small", "loud"), report("2", "org/large")
    async with (
        Bus.connect(nats_url, "edge") as bus,
        edge_on(bus) as http,
        reporting(bus, *reports),
    ):
        base = f"{http.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as client:
            async with asyncio.timeout(30):
                while not (await client.models.list()).data:
                    await asyncio.sleep(0.01)
            yield client


async def test_models_of_all_workers_are_listed_with_their_adapters(
    client_of_two: openai.AsyncOpenAI,
) -> None:
    models = await client_of_two.models.list()
    assert [model.id for model in models.data] == ["org/large", "small", "small:loud"]
    assert (await client_of_two.models.retrieve("small:loud")).id == "small:loud"
    assert (await client_of_two.models.retrieve("org/large")).object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        await client_of_two.models.retrieve("other")
    assert error.value.code == "model_not_found"


async def test_model_has_its_size_context_and_adapters(client_of_two: openai.AsyncOpenAI) -> None:
    small = (await client_of_two.models.retrieve("small")).model_dump()
    loud = (await client_of_two.models.retrieve("small:loud@0.5")).model_dump()
    assert small["status"] == loud["status"] == {"value": "loaded"}
    assert small["max_model_len"] == loud["max_model_len"] == 2048
    assert small["meta"] == {"n_ctx": 2048, "n_ctx_train": 4096, "size": 1}
    assert small["adapters"] == ["loud"] and "parent" not in small
    assert loud["parent"] == "small" and "adapters" not in loud
    with pytest.raises(openai.BadRequestError, match="scale in the model"):
        await client_of_two.models.retrieve("small:loud@7")


async def test_models_that_are_not_ready_are_listed_last_with_why(
    client_of_two: openai.AsyncOpenAI, nats_url: str
) -> None:
    loading = WorkerReport("3", "loading", 1, 0, 0, progress=0.25, name="big")
    failed = WorkerReport("4", "failed", 1, 0, 0, error="It is broken.", name="broken")
    async with Bus.connect(nats_url, "worker") as bus, reporting(bus, loading, failed):
        async with asyncio.timeout(30):
            while len(models := (await client_of_two.models.list()).data) < 5:
                await asyncio.sleep(0.01)
    assert [model.id for model in models[3:]] == ["big", "broken"]
    big, broken = (model.model_dump() for model in models[3:])
    assert big["status"] == {"value": "loading", "progress": 0.25}
    assert broken["status"] == {"value": "unloaded", "failed": True, "error": "It is broken."}
    assert (await client_of_two.models.retrieve("broken")).model_dump() == broken
    with pytest.raises(openai.InternalServerError, match="'big' is loading") as error:
        await client_of_two.post("/tokenize", cast_to=object, body={"content": "x", "model": "big"})
    assert error.value.status_code == 503


async def test_completion_has_model_and_fingerprint(
    client_of_two: openai.AsyncOpenAI, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO):
        got = await client_of_two.chat.completions.create(
            model="small:loud", messages=[{"role": "user", "content": "hi"}]
        )
    assert (got.model, got.system_fingerprint) == ("small:loud", "fp_digest of sm")


async def test_prompt_over_the_context_is_rejected_by_its_count(
    client_of_two: openai.AsyncOpenAI, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        with pytest.raises(openai.BadRequestError, match="maximum context length is 2048") as error:
            await client_of_two.completions.create(model="small", prompt=[1] * 2048)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
    assert not worker.requests


async def test_more_messages_than_the_context_are_rejected_by_count(
    client_of_two: openai.AsyncOpenAI, nats_url: str
) -> None:
    messages: Any = [{"role": "user", "content": "x"}] * 2048
    async with scripted_worker(nats_url, HELLO) as worker:
        with pytest.raises(openai.BadRequestError, match="maximum context length is 2048") as error:
            await client_of_two.chat.completions.create(model="small", messages=messages)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    assert not worker.requests
