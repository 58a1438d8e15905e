"""Serves embeddings or relevance scores with one model: admission, batches and drain."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from msgspec import Struct

from services.client import spans
from services.client.embedding_client import (
    ENVELOPE_BYTES,
    JSON_BYTES_PER_FLOAT,
    EmbeddingClient,
    input_bytes,
)
from services.client.routing import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.embeddings import (
    Embeddings,
    EmbedRequest,
    Input,
    RerankRequest,
    Scores,
    check_dimensions,
)
from services.contract.errors import ServiceError, shutting_down
from services.contract.messages import ModelInfo, ModelKind
from services.inference.engine.backend import BackendError
from services.inference.engine.embedding import EmbeddingEngine, EngineStopped, Rows, normalize
from services.inference.engine.scheduling.prefill_budget import Throughput
from services.inference.engine.scheduling.tenant_shares import has_room
from services.inference.limits import InferenceLimits
from services.inference.models import LoadedEmbedder
from services.inference.pool import Pool
from services.inference.report_hub import ReportHub
from services.inference.settings import InferenceSettings
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.supervised import Fail

K = TypeVar("K", bound=Struct)
TokenLists = list[list[int]]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class EmbeddingService:
    """
    Replies to requests to this worker alone. A request that NATS hands to any worker of the queue
    group is sent on to a worker that has its model, perhaps this one.

    `fail` ends the process, for example if the engine dies.
    """

    bus: Bus
    settings: InferenceSettings
    limits: InferenceLimits
    worker_id: str
    model: LoadedEmbedder
    workers: WorkerDirectory
    reports: ReportHub
    fail: Fail

    def __post_init__(self) -> None:
        self._max_requests = self.settings.model_parallel + self.settings.model_queue
        self._pool = Pool("tokenizing", self.limits.preparing_threads)
        in_loop: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        self._engine = EmbeddingEngine(
            self.model.embedder, on_death=partial(in_loop, self.fail, "the engine died")
        )
        self._admitted: list[tuple[str, int]] = []  # tenant and bytes of input
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False

    @property
    def model_info(self) -> ModelInfo:
        return self.model.info

    @property
    def adapter_faults(self) -> tuple[str, ...]:
        return ()

    @property
    def dimensions(self) -> int:
        """Floats of an embedding; 0 of a reranker."""
        return self.model.embedder.width if self.model.kind == "embedding" else 0

    @property
    def running(self) -> int:
        """Requests whose inputs take turns in batches: all, but only as many as there are slots."""
        return min(len(self._admitted), self.settings.model_parallel)

    @property
    def waiting(self) -> int:
        return len(self._admitted) - self.running

    @property
    def queued_tokens(self) -> int:
        return self._engine.waiting_tokens

    @property
    def throughput(self) -> Throughput:
        return self._engine.throughput

    async def start(self) -> None:
        self._engine.start()
        await self._serve(subjects.embed, EmbedRequest, self._embed)
        await self._serve(subjects.rerank, RerankRequest, self._rerank)
        endpoints = []
        for prefix, tenant in (("", subjects.OPEN_TENANT), ("tenant-", subjects.ANY)):
            embed, rerank = subjects.embed_request(tenant), subjects.rerank_request(tenant)
            endpoints += [
                self.bus.endpoint(f"{prefix}embed", embed, EmbedRequest, self._embed_anywhere),
                self.bus.endpoint(f"{prefix}rerank", rerank, RerankRequest, self._rerank_anywhere),
            ]
        await self.bus.serve("embedding", f"serves {self.model.info.name}", endpoints)

    async def drain(self) -> None:
        """Accept no more requests, finish those in flight, and fail the rest after a deadline."""
        await self.bus.stop_serving()
        self._is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_seconds):
                await self._is_idle.wait()
        await self._pool.close()
        await asyncio.to_thread(self._engine.close)
        self.model.close()

    async def _serve(
        self,
        subject: Callable[[str, str], str],
        kind: type[K],
        work: Callable[[str, K], Awaitable[Struct]],
    ) -> None:
        async def reply(delivery: Delivery) -> Struct:
            return await work(subjects.tenant_of(delivery.subject), decode(delivery.data, kind))

        await self.bus.subscribe(
            subject(self.worker_id, subjects.ANY),
            lambda delivery: self.bus.respond(delivery, reply),
        )

    async def _embed_anywhere(self, subject: str, request: EmbedRequest) -> Embeddings:
        client = self._client(subject)
        await self.reports.refresh()
        self._check_reply_size(request, client.width_of(request))
        return await client.embed(request)

    async def _rerank_anywhere(self, subject: str, request: RerankRequest) -> Scores:
        return await self._client(subject).rerank(request)

    def _client(self, subject: str) -> EmbeddingClient:
        """Raises ServiceError(invalid_request) if the subject's tenant is invalid."""
        tenant = subjects.tenant_of_request(subject)
        if not subjects.is_id(tenant):
            raise ServiceError("invalid_request", f"{tenant!r} is not a valid tenant.")
        return EmbeddingClient(self.bus, self.workers, tenant, refresh=self.reports.refresh)

    # --- requests to this worker ------------------------------------------------------------------

    async def _embed(self, tenant: str, request: EmbedRequest) -> Embeddings:
        self._check_model(request.model, "embedding")
        self._check_reply_size(request, self.model.embedder.width)
        size = sum(map(input_bytes, request.input))
        tokenize = partial(self._tokenize_inputs, request.input)
        rows, tokens = await self._compute(tenant, size, tokenize)
        vectors = normalize(rows, request.dimensions).astype("<f4")
        return Embeddings(self.model.info.name, tuple(each.tobytes() for each in vectors), tokens)

    async def _rerank(self, tenant: str, request: RerankRequest) -> Scores:
        self._check_model(request.model, "rerank")
        query, documents = request.query, request.documents
        size = len(documents) * input_bytes(query) + sum(map(input_bytes, documents))
        tokenize = partial(self._tokenize_pairs, query, documents)
        rows, tokens = await self._compute(tenant, size, tokenize)
        scores = self.model.embedder.relevance(rows)
        return Scores(self.model.info.name, tuple(scores), tokens)

    def _check_model(self, name: str | None, kind: ModelKind) -> None:
        """Check that the request is for this model: the caller may know an older one."""
        if self.model.kind != kind:
            raise ServiceError(
                "invalid_request", f"This worker's model is for {self.model.kind}, not for {kind}."
            )
        if name is not None and name != self.model.info.name:
            raise ServiceError("model_not_found", f"This worker has no model {name!r}.")

    def _check_reply_size(self, request: EmbedRequest, width: int) -> None:
        """Check the dimensions, and that the vectors fit into one reply, before any work."""
        check_dimensions(request, width)
        size = len(request.input) * (request.dimensions or width) * JSON_BYTES_PER_FLOAT
        if size > self.limits.max_payload - ENVELOPE_BYTES:
            raise ServiceError(
                "payload_too_large",
                f"The embeddings of {len(request.input)} inputs don't fit into one message: send"
                " several requests.",
            )

    async def _compute(
        self, tenant: str, size: int, tokenize: Callable[[], TokenLists]
    ) -> tuple[Rows, int]:
        """Return the rows of all inputs, and the number of their tokens. Raises ServiceError."""
        began = time.monotonic()
        with spans.embedding(self.model.kind, self.model.info.name, "server") as span:
            async with self._place(tenant, size):
                inputs = await self._pool.run(tenant, tokenize)
                try:
                    rows = await asyncio.wrap_future(self._engine.submit(tenant, inputs))
                except EngineStopped:
                    raise shutting_down() from None
                except BackendError as error:
                    raise ServiceError("internal", f"{error} Send the request again.") from error
            tokens = sum(map(len, inputs))
            span.set({"gen_ai.usage.input_tokens": tokens})
        log.info(
            "request finished kind=%s inputs=%d tokens=%d seconds=%.3f",
            self.model.kind,
            len(inputs),
            tokens,
            time.monotonic() - began,
        )
        return rows, tokens

    @asynccontextmanager
    async def _place(self, tenant: str, size: int) -> AsyncIterator[None]:
        """Admit a request by counts and bytes alone, during the body. Raises ServiceError."""
        if self._is_draining:
            raise shutting_down()
        self._check_room(tenant, size)
        place = tenant, size
        self._admitted.append(place)
        self._is_idle.clear()
        try:
            yield
        finally:
            self._admitted.remove(place)
            if not self._admitted:
                self._is_idle.set()

    def _check_room(self, tenant: str, size: int) -> None:
        """Check the shares as for chats (InFlightRequests.check_room). Raises ServiceError."""
        places, waiting = Counter[str](), Counter[str]()
        for other, other_size in self._admitted:
            places[other] += 1
            waiting[other] += other_size
        if not has_room(tenant, places, self._max_requests):
            raise self._overloaded("Every slot is taken and the queue is full")
        max_bytes = self.settings.model_queue_bytes
        if waiting[tenant] and not has_room(tenant, waiting, max_bytes, size):
            raise self._overloaded(f"{waiting.total():,} bytes of input wait (MODEL_QUEUE_BYTES)")

    def _overloaded(self, why: str) -> ServiceError:
        limits, rate = self.limits, self.throughput.tokens_per_second
        wait = self.queued_tokens / rate if rate else 0.0
        wait = min(max(wait, limits.min_retry_after_seconds), limits.max_retry_after_seconds)
        return ServiceError("overloaded", f"{why}: try again.", round(wait, 1))

    def _tokenize_inputs(self, inputs: Sequence[Input]) -> TokenLists:
        """Runs in the pool."""
        embedder = self.model.embedder
        found = [
            embedder.tokenize_input(each) if isinstance(each, str) else list(each)
            for each in inputs
        ]
        for number, tokens in enumerate(found):
            self._check_tokens(f"input[{number}]", tokens)
        return found

    def _tokenize_pairs(self, query: str, documents: Sequence[str]) -> TokenLists:
        """Runs in the pool."""
        found = [self.model.embedder.tokenize_pair(query, document) for document in documents]
        for number, tokens in enumerate(found):
            self._check_tokens(f"documents[{number}]", tokens)
        return found

    def _check_tokens(self, field: str, tokens: Sequence[int]) -> None:
        embedder = self.model.embedder
        if len(tokens) > embedder.context:
            raise prompts.context_exceeded(field, str(len(tokens)), embedder.context)
        if not tokens:
            raise ServiceError(
                "invalid_request", f"The field `{field}` has no tokens: send a text with letters."
            )
        if max(tokens) >= embedder.vocabulary_size:
            raise ServiceError(
                "invalid_request",
                f"The field `{field}` has the token {max(tokens)}, but the model's last token is"
                f" {embedder.vocabulary_size - 1}.",
            )
