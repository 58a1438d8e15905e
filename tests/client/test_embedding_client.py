"""The client of embedding workers: batches, failover and errors, with workers that are scripted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from msgspec.structs import replace

from services.client.embedding_client import EmbeddingClient, EmbeddingPolicy
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.embeddings import (
    Embeddings,
    EmbedRequest,
    RerankRequest,
    Scores,
    floats_of,
)
from services.contract.errors import ServiceError
from services.contract.messages import ModelInfo, ModelKind, WorkerReport
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.servers import Server, nats_server, running

POLICY = EmbeddingPolicy(
    batch_bytes=10, silence_seconds=0.3, give_up_seconds=0.3, retry_seconds=0.02
)


class FakeWorker:
    """Gives a text its length as its vector or score. It may refuse, or stop replying."""

    def __init__(self, bus: Bus, kind: ModelKind = "embedding") -> None:
        self.bus = bus
        self.kind = kind
        self.worker_id = uuid4().hex
        self.batches: list[int] = []
        self.refusals: list[ServiceError] = []
        self.is_frozen = False
        self.seconds = 0.0  # that it computes

    @property
    def report(self) -> WorkerReport:
        info = ModelInfo(self.kind, "digest", 512, 1000)
        return WorkerReport(
            self.worker_id, "ready", 8, 0, 0, 8, model=info, name=self.kind, kind=self.kind,
            dimensions=int(self.kind == "embedding"),
        )  # fmt: skip

    async def start(self) -> None:
        for subject in (subjects.embed, subjects.rerank):
            await self.bus.subscribe(subject(self.worker_id, subjects.ANY), self._on_request)

    def _on_request(self, delivery: Delivery) -> None:
        if not self.is_frozen:
            self.bus.respond(delivery, self._reply)

    async def _reply(self, delivery: Delivery) -> Embeddings | Scores:
        await asyncio.sleep(self.seconds)
        if self.refusals:
            raise self.refusals.pop(0)
        if ".rerank." in delivery.subject:
            documents = decode(delivery.data, RerankRequest).documents
            self.batches.append(len(documents))
            return Scores(self.kind, tuple(len(each) / 100 for each in documents), len(documents))
        inputs = decode(delivery.data, EmbedRequest).input
        self.batches.append(len(inputs))
        vectors = tuple(bytes([0, 0, 128, 63]) * len(each) for each in inputs)
        return Embeddings(self.kind, vectors, len(inputs))


@asynccontextmanager
async def client_of(
    bus: Bus, *workers: FakeWorker, policy: EmbeddingPolicy = POLICY
) -> AsyncIterator[EmbeddingClient]:
    directory = WorkerDirectory()
    for worker in workers:
        await worker.start()
        directory.on_report(Delivery("", encode(worker.report), ""))
    yield EmbeddingClient(bus, directory, policy=policy)


async def failure(client: EmbeddingClient, **fields: Any) -> ServiceError:
    with pytest.raises(ServiceError) as raised:
        await client.embed(EmbedRequest(**{"input": ("a",), **fields}))
    return raised.value


async def test_request_is_sent_in_batches_by_size(bus: Bus) -> None:
    worker = FakeWorker(bus)
    async with client_of(bus, worker) as client:
        texts = ("a" * 4, "b" * 6, "c", "d" * 30, "é" * 5, (1, 2, 3))
        reply = await client.embed(EmbedRequest(texts))
    assert worker.batches == [2, 1, 1, 1, 1]
    assert [len(floats_of(vector)) for vector in reply.vectors] == [len(text) for text in texts]
    assert (reply.model, reply.prompt_tokens) == ("embedding", 6)
    assert floats_of(reply.vectors[2]) == (1.0,)


async def test_batch_has_as_many_vectors_as_fit_a_message(bus: Bus) -> None:
    worker = FakeWorker(bus)
    policy = EmbeddingPolicy(batch_bytes=10**6)
    async with client_of(bus, worker, policy=policy) as client:
        width = 100_000
        report = replace(worker.report, dimensions=width)
        client.workers.on_report(Delivery("", encode(report), ""))
        await client.embed(EmbedRequest(("a",) * 5))
        await client.embed(EmbedRequest(("a",) * 5, dimensions=width // 2))
    assert worker.batches == [1] * 5 + [3, 2]


async def test_documents_are_scored_in_batches(bus: Bus) -> None:
    worker = FakeWorker(bus, "rerank")
    async with client_of(bus, worker) as client:
        reply = await client.rerank(RerankRequest("abc", ("a", "bb", "", "c" * 40)))
    assert worker.batches == [2, 1, 1]  # the query counts with each document
    assert reply == Scores("rerank", (0.01, 0.02, 0.0, 0.4), 4)


async def test_error_names_the_item_of_the_whole_request(bus: Bus) -> None:
    worker = FakeWorker(bus)
    async with client_of(bus, worker) as client:
        worker.seconds = 0.05
        asking = asyncio.create_task(failure(client, input=("a" * 5, "b" * 5, "c", "d")))
        await until_batches(worker, 1)
        why = "The field `input[1]` has 600 tokens."
        worker.refusals = [ServiceError("context_length_exceeded", why)]
        assert (await asking).message == "The field `input[3]` has 600 tokens."


async def test_directory_is_refreshed_before_workers_are_asked(bus: Bus) -> None:
    worker, directory = FakeWorker(bus), WorkerDirectory()
    await worker.start()

    async def refresh() -> None:
        directory.on_report(Delivery("", encode(worker.report), ""))

    client = EmbeddingClient(bus, directory, policy=POLICY, refresh=refresh)
    assert (await client.embed(EmbedRequest(("a",)))).model == "embedding"


async def until_batches(worker: FakeWorker, count: int) -> None:
    async with asyncio.timeout(30):
        while len(worker.batches) < count:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("code", ["overloaded", "shutting_down"])
async def test_rejected_batch_goes_to_another_worker(bus: Bus, code: Any) -> None:
    one, other = FakeWorker(bus), FakeWorker(bus)
    async with client_of(bus, one, other) as client:
        for worker in (one, other):
            worker.refusals = [ServiceError(code, "no")]
            await client.embed(EmbedRequest(("a",)))
            one.refusals, other.refusals = [], []
    assert len(one.batches) + len(other.batches) == 2


async def test_overloaded_workers_are_an_error_at_once(bus: Bus) -> None:
    one, other = FakeWorker(bus), FakeWorker(bus)
    one.refusals, other.refusals = (
        [ServiceError("overloaded", "full", seconds)] * 9 for seconds in (7.5, 3.5)
    )
    async with client_of(bus, one, other) as client:
        error = await failure(client)
    assert (error.code, error.retry_after) == ("overloaded", 3.5)
    assert [len(worker.refusals) for worker in (one, other)] == [8, 8]


async def test_request_that_has_begun_waits_for_room(bus: Bus) -> None:
    worker = FakeWorker(bus)
    worker.seconds = 0.02
    async with client_of(bus, worker) as client:
        asking = asyncio.create_task(client.embed(EmbedRequest(("a" * 9, "b" * 9))))
        await until_batches(worker, 1)
        worker.refusals = [ServiceError("overloaded", "full", 1)] * 2
        assert len((await asking).vectors) == 2


async def test_slow_worker_is_waited_for(bus: Bus) -> None:
    worker = FakeWorker(bus)
    worker.seconds = 3 * POLICY.silence_seconds
    async with client_of(bus, worker) as client:
        assert len((await client.embed(EmbedRequest(("a",)))).vectors) == 1
    assert worker.batches == [1]


async def test_frozen_worker_is_replaced_by_another(bus: Bus) -> None:
    frozen, other = FakeWorker(bus), FakeWorker(bus)
    frozen.is_frozen = True
    async with client_of(bus, frozen, other) as client:
        for _ in range(6):  # the order of the workers is random
            assert len((await client.embed(EmbedRequest(("a",)))).vectors) == 1
            client.workers.on_report(Delivery("", encode(frozen.report), ""))
    assert other.batches == [1] * 6


async def test_lost_worker_without_another_is_an_error(bus: Bus) -> None:
    worker = FakeWorker(bus)
    worker.is_frozen = True
    async with client_of(bus, worker) as client:
        error = await failure(client)
    assert (error.code, error.retry_after) == ("worker_lost", 1.0)


async def test_worker_that_comes_in_time_continues(bus: Bus) -> None:
    gone, late = FakeWorker(bus), FakeWorker(bus)
    policy = EmbeddingPolicy(silence_seconds=0.3, give_up_seconds=5, retry_seconds=0.02)
    async with client_of(bus, policy=policy) as client:
        client.workers.on_report(Delivery("", encode(gone.report), ""))  # it does not listen
        asking = asyncio.create_task(client.embed(EmbedRequest(("a",))))
        await asyncio.sleep(0.05)
        assert not asking.done()
        await late.start()
        client.workers.on_report(Delivery("", encode(late.report), ""))
        assert len((await asking).vectors) == 1


async def test_invalid_requests_are_rejected_before_they_are_sent(bus: Bus) -> None:
    worker = FakeWorker(bus)
    async with client_of(bus, worker) as client:
        for fields in ({"input": ()}, {"input": ("",)}, {"input": ((),)}, {"input": ("\ud800",)}):
            assert (await failure(client, **fields)).code == "invalid_request"
        assert "have 1: ask" in (await failure(client, dimensions=2)).message
    assert worker.batches == []


async def test_no_worker_of_the_kind_is_explained(bus: Bus) -> None:
    async with client_of(bus) as client:
        assert (await failure(client)).code == "no_worker"
    async with client_of(bus, FakeWorker(bus, "chat")) as client:
        error = await failure(client)
        assert error.code == "invalid_request" and "There is no embedding model" in error.message
        error = await failure(client, model="chat")
        assert error.code == "invalid_request" and "'chat', which is a chat model" in error.message
        assert (await failure(client, model="other")).code == "model_not_found"


async def test_disconnected_client_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    server: Server
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            worker = FakeWorker(bus)
            async with client_of(bus, worker) as client:
                server.stop()
                async with asyncio.timeout(30):
                    while bus.connected:
                        await asyncio.sleep(0.01)
                assert (await failure(client)).code == "bus_unavailable"
