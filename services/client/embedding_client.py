"""
Request embeddings and relevance scores from the workers that have such a model.

    client = EmbeddingClient(bus, workers)
    reply = await client.embed(EmbedRequest(("Hello", "Grüß dich"), model="bge"))
    for vector in reply.vectors:
        floats = np.frombuffer(vector, "<f4")

A request is sent in batches whose vectors fit a NATS message, one after another, so that no caller
holds a worker for long. A batch is repeated at another worker if its worker is lost.
"""

import re
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from secrets import token_hex
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from services.client.failover import bus_unavailable, worker_lost
from services.client.routing import RETRIABLE_ELSEWHERE, WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.embeddings import Embeddings, EmbedRequest, Input, RerankRequest, Scores
from services.contract.errors import ServiceError
from services.contract.messages import ModelKind
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders

K = TypeVar("K", bound=Struct)

BYTES_PER_FLOAT = 6  # four, as base64 in JSON
ENVELOPE_BYTES = 4096  # of a message beside its vectors
TOKEN_BYTES = 4  # of a token id, which counts like a word of text
_ITEM = re.compile(r"(input|documents)\[(\d+)\]")


@dataclass(frozen=True)
class EmbeddingPolicy:
    """`batch_bytes` of input are sent at once. Times are in seconds."""

    batch_bytes: int = 2**16
    silence_seconds: float = 3.0  # without a keep-alive, after which a worker counts as lost
    total_seconds: float = 600.0  # for one batch, with its time in the queue


DEFAULT_POLICY = EmbeddingPolicy()


@dataclass(frozen=True)
class EmbeddingClient:
    """Any number of concurrent requests."""

    bus: Bus
    workers: WorkerDirectory
    policy: EmbeddingPolicy = DEFAULT_POLICY

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Return the vectors of all inputs. Raises ServiceError."""
        parts = [part async for part in self.embed_in_batches(request)]
        vectors = tuple(vector for part in parts for vector in part.vectors)
        return Embeddings(parts[0].model, vectors, sum(part.prompt_tokens for part in parts))

    async def embed_in_batches(self, request: EmbedRequest) -> AsyncGenerator[Embeddings, None]:
        """Yield the vectors of the inputs in order, some at a time. Raises ServiceError."""
        request = _checked(request, EmbedRequest)
        width = self._check_dimensions(request)
        max_inputs = (self.bus.max_payload - ENVELOPE_BYTES) // (width * BYTES_PER_FLOAT)
        sizes = [_size(each) for each in request.input]
        for batch in _batches(sizes, self.policy.batch_bytes, max(max_inputs, 1)):
            part = replace(request, input=request.input[batch])
            with _numbered_from(batch.start):
                reply = await self._ask(
                    request.model, "embedding", subjects.embed, part, Embeddings
                )
            yield reply

    async def rerank(self, request: RerankRequest) -> Scores:
        """Return the scores of all documents. Raises ServiceError."""
        request = _checked(request, RerankRequest)
        sizes = [_size(request.query) + _size(each) for each in request.documents]
        parts = []
        for batch in _batches(sizes, self.policy.batch_bytes, len(sizes)):
            part = replace(request, documents=request.documents[batch])
            with _numbered_from(batch.start):
                reply = await self._ask(request.model, "rerank", subjects.rerank, part, Scores)
            parts.append(reply)
        scores = tuple(score for part in parts for score in part.scores)
        return Scores(parts[0].model, scores, sum(part.prompt_tokens for part in parts))

    def _check_dimensions(self, request: EmbedRequest) -> int:
        """Return the floats of a vector, as far as it is known. Raises ServiceError."""
        able = self.workers.rank("", request.model, kind="embedding")
        widths = [r.dimensions for r in self.workers.reports() if r.worker_id in able]
        width = min(widths, default=0)
        if request.dimensions and width and request.dimensions > width:
            raise ServiceError(
                "invalid_request",
                f"The field `dimensions` is {request.dimensions}, but the model's embeddings have"
                f" {width}: ask for at most that.",
            )
        return request.dimensions or width or 1

    async def _ask(
        self,
        model: str | None,
        kind: ModelKind,
        subject: Callable[[str], str],
        message: Struct,
        reply: type[K],
    ) -> K:
        """Ask the workers of the model, one after another, until one replies."""
        errors = []
        for worker_id in self.workers.rank(token_hex(4), model, kind=kind):
            try:
                with self.workers.offering(worker_id):
                    return await self.bus.request(
                        subject(worker_id),
                        message,
                        reply,
                        self.policy.total_seconds,
                        silence=self.policy.silence_seconds,
                    )
            except (NoResponders, TimeoutError):
                self._check_connected()  # else it is not the worker that is lost
                self.workers.remove(worker_id)
                errors.append(worker_lost("The worker was lost before it replied."))
            except ServiceError as error:
                if error.code not in RETRIABLE_ELSEWHERE:
                    raise
                errors.append(error)
        self._check_connected()
        if errors:
            raise min(errors, key=lambda error: error.retry_after or 0)
        raise self.workers.unavailable_error(model, kind)

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


def _size(text: Input) -> int:
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
