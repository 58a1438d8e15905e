"""An embedding service on a real bus, with a fake model: admission, errors, drain."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import uuid4

import pytest
from msgspec.structs import replace

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import encode
from services.contract.embeddings import (
    Embeddings,
    EmbedRequest,
    RerankRequest,
    Scores,
    floats_of,
)
from services.contract.errors import ServiceError
from services.contract.messages import ModelInfo, ModelKind, WorkerReport
from services.inference.embedding_service import EmbeddingService
from services.inference.limits import InferenceLimits
from services.inference.models import LoadedEmbedder
from services.inference.report_hub import ReportHub
from services.inference.settings import InferenceSettings
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.inference.fake_embedder import DIES, FAILS, FakeEmbedder

FAST = InferenceLimits(drain_seconds=0.3)


class Worker:
    def __init__(
        self,
        bus: Bus,
        embedder: FakeEmbedder,
        kind: ModelKind,
        limits: InferenceLimits,
        **settings: int,
    ) -> None:
        self.bus = bus
        self.embedder = embedder
        self.worker_id = uuid4().hex
        self.failures: list[str] = []
        info = ModelInfo("fake", "digest", embedder.context, 0)
        self.workers = WorkerDirectory()
        self.service = EmbeddingService(
            bus,
            InferenceSettings(**cast(Any, settings)),
            limits,
            self.worker_id,
            LoadedEmbedder(info, kind, embedder),
            self.workers,
            ReportHub(bus, self.worker_id, self.workers),
            self.failures.append,
        )
        report = WorkerReport(
            self.worker_id, "ready", 8, 0, 0, model=info, name="fake", kind=kind,
            dimensions=self.service.dimensions,
        )  # fmt: skip
        self.workers.on_report(Delivery("", encode(report), ""))

    async def embed(self, *texts: Any, tenant: str = "ann", **fields: Any) -> Embeddings:
        subject = subjects.embed(self.worker_id, tenant)
        return await self.bus.request(subject, EmbedRequest(texts, **fields), Embeddings, 10)

    async def rerank(self, query: str, *documents: str) -> Scores:
        request = RerankRequest(query, documents)
        return await self.bus.request(subjects.rerank(self.worker_id, "ann"), request, Scores, 10)

    async def refusal(self, *texts: Any, **fields: Any) -> ServiceError:
        with pytest.raises(ServiceError) as raised:
            await self.embed(*texts, **fields)
        return raised.value

    async def hold(self, text: str = "held") -> "asyncio.Task[Embeddings]":
        """Return a request that the model computes until it may go on."""
        self.embedder.may_compute.clear()
        held = asyncio.create_task(self.embed(text))
        assert await asyncio.to_thread(self.embedder.is_computing.wait, 10)
        return held


@asynccontextmanager
async def started(
    bus: Bus,
    kind: ModelKind = "embedding",
    width: int = 3,
    limits: InferenceLimits = FAST,
    **settings: int,
) -> AsyncIterator[Worker]:
    worker = Worker(bus, FakeEmbedder(width), kind, limits, **settings)
    await worker.service.start()
    try:
        yield worker
    finally:
        worker.embedder.may_compute.set()
        await worker.service.drain()
    assert worker.embedder.is_closed


async def test_vectors_are_normalised_and_cut(bus: Bus) -> None:
    async with started(bus) as worker:
        reply = await worker.embed("abc", (1, 2))
        assert (reply.model, reply.prompt_tokens) == ("fake", 5)
        first, second = map(floats_of, reply.vectors)
        assert first == pytest.approx((3 / 10**0.5, 1 / 10**0.5, 0))
        assert second == pytest.approx((2 / 5**0.5, 1 / 5**0.5, 0))
        assert floats_of((await worker.embed("abc", dimensions=1)).vectors[0]) == (1.0,)
        assert worker.service.throughput.tokens_per_second > 0
        assert worker.service.throughput.prefilled_tokens == 8


async def test_scores_are_in_the_order_of_the_documents(bus: Bus) -> None:
    async with started(bus, "rerank", width=2) as worker:
        reply = await worker.rerank("q", "abc", "", "a")
        assert reply == Scores("fake", (5 / 20, 2 / 20, 3 / 20), 10)
        assert worker.service.dimensions == 0


async def test_any_worker_takes_requests_for_all_models(bus: Bus, nats_url: str) -> None:
    async with started(bus) as worker, Bus.connect(nats_url, "stranger") as stranger:
        request = EmbedRequest(("abc",))
        reply = await stranger.request(subjects.embed_request("ann"), request, Embeddings)
        assert len(reply.vectors) == 1
        with pytest.raises(ServiceError, match="is an embedding model: use it with"):
            await stranger.request(
                subjects.rerank_request("ann"), RerankRequest("a", ("b",), "fake"), Scores
            )
        with pytest.raises(ServiceError, match="There is no model 'other'"):
            await stranger.request(
                subjects.embed_request("ann"), replace(request, model="other"), Embeddings
            )
        assert worker.service.running == 0


@pytest.mark.parametrize(
    ("texts", "fields", "code", "why"),
    [
        (("a", "b" * 21), {}, "context_length_exceeded", "context length is 20 tokens. However, "),
        (((2**17,),), {}, "invalid_request", "`input[0]` has the token 131072"),
        (("a",), {"dimensions": 4}, "invalid_request", "`dimensions` is 4, but"),
        (("a",), {"model": "other"}, "model_not_found", "has no model 'other'"),
        (("",), {}, "invalid_request", "$.input"),
        ((FAILS,), {}, "internal", "It failed. Send the request again."),
    ],
)
async def test_bad_request_is_an_error_with_a_reason(
    bus: Bus, texts: Any, fields: Any, code: str, why: str
) -> None:
    async with started(bus) as worker:
        error = await worker.refusal(*texts, **fields)
        assert error.code == code and why in error.message
        assert len((await worker.embed("a")).vectors) == 1


async def test_nonsense_is_an_error_and_disturbs_nothing(bus: Bus) -> None:
    async with started(bus) as worker:
        subject = subjects.embed(worker.worker_id, "ann")
        for data in (b"", b"{", b"[]", b'{"input": 1}', b'{"input": [[-1]]}', b"\xff", b"null"):
            reply = await bus._client.request(subject, data, timeout=5)
            assert reply.headers and reply.headers["Nats-Service-Error-Code"] == "invalid_request"
        assert len((await worker.embed("a")).vectors) == 1


async def test_reply_that_exceeds_a_message_is_refused_first(bus: Bus) -> None:
    async with started(bus, width=100_000) as worker:
        held = await worker.hold()
        error = await worker.refusal("a", "b")
        assert error.code == "payload_too_large" and "of 2 inputs don't fit" in error.message
        with pytest.raises(ServiceError, match="of 2 inputs don't fit"):
            await worker.bus.request(
                subjects.embed_request("ann"), EmbedRequest(("a", "b")), Embeddings
            )
        worker.embedder.may_compute.set()
        assert len((await held).vectors[0]) == 400_000


async def test_full_queue_rejects_with_a_wait(bus: Bus) -> None:
    async with started(bus, model_parallel=1, model_queue=1) as worker:
        held = await worker.hold()
        waiting = asyncio.create_task(worker.embed("b"))
        await until(lambda: worker.service.waiting == 1)
        assert worker.service.running == 1
        error = await worker.refusal("c")
        assert (error.code, error.retry_after) == ("overloaded", 1.0)
        worker.embedder.may_compute.set()
        assert len((await held).vectors) == len((await waiting).vectors) == 1
        assert worker.service.running == worker.service.waiting == 0


async def test_full_queue_of_one_tenant_has_room_for_others(bus: Bus) -> None:
    async with started(bus, model_parallel=1, model_queue=3, model_queue_bytes=100) as worker:
        held = await worker.hold()
        flood = [asyncio.create_task(worker.embed("a" * 20)) for _ in range(3)]
        await until(lambda: worker.service.waiting == 3)
        assert (await worker.refusal("a")).code == "overloaded"
        others = [asyncio.create_task(worker.embed("b" * 20, tenant="bob")) for _ in range(2)]
        await until(lambda: worker.service.waiting == 5)
        assert (await worker.refusal("b", tenant="bob")).code == "overloaded"
        worker.embedder.may_compute.set()
        await asyncio.gather(held, *flood, *others)


async def test_bytes_that_wait_are_bounded(bus: Bus) -> None:
    async with started(bus, model_queue_bytes=10) as worker:
        assert len((await worker.embed("a" * 20)).vectors) == 1  # a single one may always wait
        held = await worker.hold("b" * 6)
        error = await worker.refusal("c" * 5)
        assert error.code == "overloaded" and "MODEL_QUEUE_BYTES" in error.message
        other = asyncio.create_task(worker.embed("d" * 4))
        await until(lambda: worker.service.running == 2)
        await until(lambda: worker.service.queued_tokens == 4)
        worker.embedder.may_compute.set()
        await held, await other


async def test_drain_finishes_requests_and_takes_no_more(bus: Bus) -> None:
    async with started(bus) as worker:
        held = await worker.hold()
        draining = asyncio.create_task(worker.service.drain())
        await until(lambda: worker.service._is_draining)
        assert (await worker.refusal("a")).code == "shutting_down"
        worker.embedder.may_compute.set()
        assert len((await held).vectors) == 1
        await draining


async def test_drain_fails_what_is_late(bus: Bus) -> None:
    async with started(bus) as worker:
        held = await worker.hold()
        late = [asyncio.create_task(worker.refusal("x" * 20)) for _ in range(3)]
        await until(lambda: worker.service.queued_tokens == 60)
        draining = asyncio.create_task(worker.service.drain())
        assert [(await each).code for each in late] == ["shutting_down"] * 3
        worker.embedder.may_compute.set()
        assert len((await held).vectors) == 1
        await draining


async def test_death_of_the_engine_ends_the_process(bus: Bus) -> None:
    async with started(bus) as worker:
        assert (await worker.refusal(DIES)).code == "shutting_down"
        await until(lambda: worker.failures == ["the engine died"])
        assert (await worker.refusal("a")).code == "shutting_down"


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
