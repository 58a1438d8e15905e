"""
Request embeddings and relevance scores from the workers that have such a model.

    client = EmbeddingClient(bus, workers)
    reply = await client.embed(EmbedRequest(("Hello", "Grüß dich"), model="bge"))
    for vector in reply.vectors:
        floats = np.frombuffer(vector, "<f4")

A request is sent in batches whose vectors fit a NATS message, one after another, so that no caller
holds a worker for long. A batch is repeated at another worker if its worker is lost.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from secrets import token_hex
from typing import Generic, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from services.client import spans
from services.client.failover import bus_unavailable, worker_lost
from services.client.observer import ObserveEmbedding, observe_no_tokens
from services.client.routing import RETRIABLE_ELSEWHERE, WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.embeddings import (
    Embeddings,
    EmbedRequest,
    Input,
    RerankRequest,
    Scores,
    check_dimensions,
)
from services.contract.errors import ServiceError
from services.contract.messages import ModelKind
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders

K = TypeVar("K", bound=Struct)

JSON_BYTES_PER_FLOAT = 6  # four, as base64
ENVELOPE_BYTES = 4096  # of a message beside its vectors
TOKEN_BYTES = 4  # of a token id, which counts like a word of text
_ITEM = re.compile(r"(input|documents)\[(\d+)\]")


@dataclass(frozen=True)
class EmbeddingPolicy:
    """
    `batch_bytes` of input are sent at once: some 2,000 tokens, so that a worker that drains has the
    time to finish them. Times are in seconds.
    """

    batch_bytes: int = 2**13
    silence_seconds: float = 2.0  # without a keep-alive, after which a worker counts as lost
    total_seconds: float = 600.0  # for one batch, with its time in the queue
    give_up_seconds: float = 10.0  # without another worker
    retry_seconds: float = 0.3


DEFAULT_POLICY = EmbeddingPolicy()


@dataclass(frozen=True)
class _Request(Generic[K]):
    """To which workers a request goes, and what they reply."""

    kind: ModelKind
    model: str | None
    subject: Callable[[str, str], str]
    reply: type[K]


async def nothing_to_refresh() -> None:
    """The directory hears all reports, or something else asks for them."""


@dataclass(frozen=True)
class EmbeddingClient:
    """
    Any number of concurrent requests of one tenant. `observe` begins to observe each one, `refresh`
    brings `workers` up to date before workers are asked.
    """

    bus: Bus
    workers: WorkerDirectory
    tenant: str = subjects.OPEN_TENANT
    policy: EmbeddingPolicy = DEFAULT_POLICY
    observe: ObserveEmbedding = observe_no_tokens
    refresh: Callable[[], Awaitable[object]] = nothing_to_refresh

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Return the vectors of all inputs. Raises ServiceError."""
        parts = [part async for part in self.embed_in_batches(request)]
        vectors = tuple(vector for part in parts for vector in part.vectors)
        return Embeddings(parts[0].model, vectors, sum(part.prompt_tokens for part in parts))

    async def embed_in_batches(self, request: EmbedRequest) -> AsyncGenerator[Embeddings, None]:
        """Yield the vectors of the inputs in order, some at a time. Raises ServiceError."""
        request = _checked(request, EmbedRequest)
        count_tokens = self.observe(request.model, "embedding")
        width = self.width_of(request)
        max_inputs = (self.bus.max_payload - ENVELOPE_BYTES) // (width * JSON_BYTES_PER_FLOAT)
        sizes = [input_bytes(each) for each in request.input]
        to_workers = _Request("embedding", request.model, subjects.embed, Embeddings)
        for batch in _batches(sizes, self.policy.batch_bytes, max(max_inputs, 1)):
            part = replace(request, input=request.input[batch])
            with _numbered_from(batch.start):
                reply = await self._ask(to_workers, part, has_begun=batch.start > 0)
            count_tokens(reply.prompt_tokens)
            yield reply

    async def rerank(self, request: RerankRequest) -> Scores:
        """Return the scores of all documents. Raises ServiceError."""
        request = _checked(request, RerankRequest)
        count_tokens = self.observe(request.model, "rerank")
        query_bytes = input_bytes(request.query)
        sizes = [query_bytes + input_bytes(each) for each in request.documents]
        to_workers = _Request("rerank", request.model, subjects.rerank, Scores)
        parts = []
        for batch in _batches(sizes, self.policy.batch_bytes, len(sizes)):
            part = replace(request, documents=request.documents[batch])
            with _numbered_from(batch.start):
                parts.append(await self._ask(to_workers, part, has_begun=batch.start > 0))
        scores = tuple(score for part in parts for score in part.scores)
        prompt_tokens = sum(part.prompt_tokens for part in parts)
        count_tokens(prompt_tokens)
        return Scores(parts[0].model, scores, prompt_tokens)

    def width_of(self, request: EmbedRequest) -> int:
        """Return the floats of a vector, as far as they are known. Raises ServiceError."""
        able = self.workers.rank("", request.model, kind="embedding")
        widths = [r.dimensions for r in self.workers.reports() if r.worker_id in able]
        width = min(widths, default=0)
        if width:
            check_dimensions(request, width)
        return request.dimensions or width or 1

    async def _ask(self, request: _Request[K], message: Struct, has_begun: bool) -> K:
        """
        Return a worker's reply. If workers were lost, or if the reply belongs to a request of which
        a part was computed, wait some seconds for another worker.
        """
        errors: list[ServiceError] = []
        gives_up_at = None
        while (reply := await self._ask_in_turn(request, message, errors)) is None:
            self._check_connected()  # else it is not the workers that are lost
            gives_up_at = gives_up_at or time.monotonic() + self.policy.give_up_seconds
            may_wait = has_begun or any(error.code == "worker_lost" for error in errors)
            if not may_wait or time.monotonic() > gives_up_at:
                raise self._why_nobody(request, errors)
            await asyncio.sleep(self.policy.retry_seconds)
        return reply

    async def _ask_in_turn(
        self, request: _Request[K], message: Struct, errors: list[ServiceError]
    ) -> K | None:
        """
        Ask the workers of the model, one after another, and return the first reply. Append why the
        others gave none. Raises a ServiceError that every worker would return.
        """
        policy = self.policy
        await self.refresh()
        for worker_id in self.workers.rank(token_hex(4), request.model, kind=request.kind):
            try:
                with (
                    self.workers.offering(worker_id),
                    spans.embedding(request.kind, request.model, "client"),
                ):
                    return await self.bus.request(
                        request.subject(worker_id, self.tenant),
                        message,
                        request.reply,
                        policy.total_seconds,
                        silence=policy.silence_seconds,
                    )
            except (NoResponders, TimeoutError):
                self.workers.remove(worker_id)
                errors.append(worker_lost("The worker was lost before it replied."))
            except ServiceError as error:
                if error.code not in RETRIABLE_ELSEWHERE:
                    raise
                errors.append(error)
        return None

    def _why_nobody(self, request: _Request[K], errors: Sequence[ServiceError]) -> ServiceError:
        if not errors:
            return self.workers.unavailable_error(request.model, request.kind)
        return min(errors, key=lambda error: error.retry_after or 0)

    def _check_connected(self) -> None:
        if not self.bus.connected:
            raise bus_unavailable()


def _checked(request: K, kind: type[K]) -> K:
    """Return the request as a worker will decode it: msgspec checks fields only then."""
    try:
        return decode(encode(request), kind)
    except UnicodeEncodeError as error:
        message = "The input contains half of a surrogate pair: send valid Unicode."
        raise ServiceError("invalid_request", message) from error


def input_bytes(text: Input) -> int:
    """Return the size of a text, or of token ids as that of a text of usual words."""
    return len(text.encode()) if isinstance(text, str) else TOKEN_BYTES * len(text)


def _batches(sizes: Sequence[int], max_bytes: int, max_items: int) -> Iterator[slice]:
    """Yield slices of at most `max_items` items and `max_bytes`, or one item that has more."""
    starts, total = [0], 0
    for number, size in enumerate(sizes):
        is_full = total + size > max_bytes or number - starts[-1] == max_items
        if is_full and number > starts[-1]:
            starts.append(number)
            total = 0
        total += size
    for start, end in pairwise((*starts, len(sizes))):
        yield slice(start, end)


@contextmanager
def _numbered_from(start: int) -> Iterator[None]:
    """Let errors name an item by its number in the whole request, not in its batch."""
    try:
        yield
    except ServiceError as error:
        message = _ITEM.sub(lambda found: f"{found[1]}[{int(found[2]) + start}]", error.message)
        raise ServiceError(error.code, message, error.retry_after) from error
