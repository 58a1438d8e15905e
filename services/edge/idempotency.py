"""
Decides whether a request starts a new answer or returns an earlier one.

All edges agree on the request that an Idempotency-Key stands for, by compare-and-set in the bucket
`requests`, which history creates. An earlier answer comes from the worker that generates it, or
from history.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Literal, NamedTuple, TypeVar

from msgspec import Struct

from services.client.chat_client import ChatClient, new_request_id
from services.client.history_requests import HistoryRequests
from services.contract import subjects
from services.contract.answer import after_offset
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Exchange, ExchangeRequest
from services.contract.messages import Done, Failed, PromptRequest, StreamEvent
from services.edge.limits import EdgeLimits
from services.runtime.bus import Bus
from services.runtime.logs import RateLimitedLog
from services.runtime.streams import Bucket, Conflict, StreamUnavailable
from services.runtime.token_bucket import TokenBuckets

MAX_KEY_LENGTH = 256

log = logging.getLogger(__name__)

T = TypeVar("T")


class KeyedRequest(NamedTuple):
    """
    A request with an Idempotency-Key. `name` is a digest of tenant and key, and the id of the first
    request for it. `body` is a digest of the request, made with the key, so that a reader of the
    bucket can't guess the request.
    """

    tenant: str
    name: str
    body: str

    @property
    def entry(self) -> str:
        return subjects.idempotency_entry(self.tenant, self.name)


class Claim(Struct, frozen=True):
    """The value in the bucket. `claimed_at` is by the clock of the claiming edge."""

    body: str
    request_id: str
    claimed_at: float


class ClaimState(NamedTuple):
    """A claim as found; `revision` 0: the key is not claimed."""

    request_id: str
    age: float  # seconds; edges' clocks may differ
    revision: int

    @property
    def is_claimed(self) -> bool:
        return self.revision > 0


class IdempotencyKeys:
    """The claims of all edges. Each method raises ServiceError(bus_unavailable) without NATS."""

    def __init__(
        self, bus: Bus, limits: EdgeLimits, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` returns Unix time in seconds."""
        self._bucket = Bucket(bus, subjects.REQUESTS_BUCKET)
        self._new = TokenBuckets(
            "new Idempotency-Keys", limits.claim_burst, limits.claims_per_second
        )
        self._rejections = RateLimitedLog(log)
        self._clock = clock

    async def claim(self, keyed: KeyedRequest, request_id: str, revision: int = 0) -> bool:
        """
        Claim the key for a request. Return False if another edge did so since `revision`. Raises
        ServiceError(rate_limit_exceeded) if the tenant has too many new keys.
        """
        if not revision:
            self._count(keyed.tenant)
        claim = Claim(keyed.body, request_id, self._clock())
        try:
            await _on_bucket(self._bucket.put(keyed.entry, encode(claim), revision))
        except Conflict:
            return False
        return True

    def _count(self, tenant: str) -> None:
        try:
            self._new.take(tenant)
        except ServiceError as error:
            self._rejections.warning("request rejected tenant=%s: %s", tenant, error)
            raise

    async def find(self, keyed: KeyedRequest) -> ClaimState:
        """Return the claim of a key. Raises ServiceError(conflict) if it is for another request."""
        value = await _on_bucket(self._bucket.get(keyed.entry))
        if value is None:
            return ClaimState(keyed.name, math.inf, 0)
        claim = decode(value.data, Claim)
        if claim.body != keyed.body:
            raise conflict()
        return ClaimState(claim.request_id, self._clock() - claim.claimed_at, value.revision)

    async def was_answered(self, tenant: str, request_id: str) -> bool:
        """Return whether the log had the answer in the last day; it may be erased since."""
        entry = subjects.request_entry(tenant, request_id)
        return await _on_bucket(self._bucket.get(entry)) is not None


class ClaimedRequest(NamedTuple):
    """`is_new`: this edge must start it; else it exists and can be resumed."""

    request_id: str
    is_new: bool


class StoredAnswers:
    """The answers of one tenant that exist already, generated or being generated."""

    def __init__(
        self,
        tenant: str,
        client: ChatClient,
        history: HistoryRequests,
        keys: IdempotencyKeys,
        limits: EdgeLimits,
    ) -> None:
        self._tenant = tenant
        self._client = client
        self._history = history
        self._keys = keys
        self._limits = limits

    async def rejoin(self, request_id: str, offset: int) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events after `offset` characters; Failed(not_found) if the id is unknown."""
        async with aclosing(self._client.rejoin(request_id, offset)) as events:
            async for event in events:
                if isinstance(event, Failed) and event.code == "not_found":
                    break
                yield event
            else:
                return
        try:
            exchange = await self._exchange(request_id)
        except ServiceError as error:
            yield Failed(error.code, error.message, error.retry_after)
            return
        for event in stored_events(exchange, offset):
            yield event

    async def claim(self, key: str, prompt: PromptRequest) -> ClaimedRequest:
        """
        Return the request of a key, claimed by this edge or, perhaps concurrently, by another one.
        A failed request is started again. Raises ServiceError(conflict) if the key belongs to
        another request, or if its answer no longer exists.
        """
        keyed, started = identify(self._tenant, key, prompt), time.monotonic()
        while True:
            held = await self._keys.find(keyed)
            state = await self._state(held, prompt)
            if state == "exists":
                return ClaimedRequest(held.request_id, is_new=False)
            # a failed answer stays stored under its id
            request_id = new_request_id() if state == "failed" else held.request_id
            waited = max(held.age, time.monotonic() - started)  # its clock may be ahead of ours
            if state == "failed" or waited >= self._limits.claim_seconds:
                if await self._keys.claim(keyed, request_id, held.revision):
                    return ClaimedRequest(request_id, is_new=True)
            await asyncio.sleep(self._limits.claim_poll_seconds)

    async def find(self, key: str, prompt: PromptRequest) -> str:
        """
        Return the request id of a claimed key. Raises ServiceError(not_found) if there is none: a
        client that has a part of an answer must not get another one.
        """
        held = await self._keys.find(identify(self._tenant, key, prompt))
        if not held.is_claimed:
            raise ServiceError(
                "not_found",
                "No request with this Idempotency-Key in the last day. Leave out Last-Event-ID to"
                " start one.",
            )
        return held.request_id

    async def _state(
        self, held: ClaimState, prompt: PromptRequest
    ) -> Literal["exists", "failed", "unknown"]:
        """
        Return the state of an answer; a running one exists. The log may have it although the claim
        expired or was lost. Raises ServiceError(conflict).
        """
        if held.is_claimed and (replay := await self._client.find_replay(held.request_id)):
            failed = any(isinstance(event, Failed) for event in replay.events)
            return "failed" if failed else "exists"
        exchange = await self._logged(held.request_id)
        if exchange is None:
            return "unknown"
        given = (prompt.prompt, prompt.tool_results or (), prompt.prefix)
        if (exchange.prompt, exchange.tool_results, exchange.prefix) != given:
            raise conflict()
        return "failed" if exchange.finish_reason == "failed" else "exists"

    async def _logged(self, request_id: str) -> Exchange | None:
        """
        Return the exchange, waiting for a history service that restarts. Raises
        ServiceError(conflict) if the log had the exchange and no longer has it.
        """
        # before the lookup: an exchange that is logged in between was not erased
        was_answered = await self._keys.was_answered(self._tenant, request_id)
        deadline = time.monotonic() + self._limits.history_restart_seconds
        while True:
            try:
                return await self._exchange(request_id)
            except ServiceError as error:
                if error.code == "not_found":
                    break
                if error.code != "history_unavailable" or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(self._limits.history_poll_seconds)
        if was_answered:
            raise ServiceError(
                "conflict",
                "The answer of this Idempotency-Key was erased, or is no longer kept: use a new key"
                " to ask again.",
            )
        return None

    async def _exchange(self, request_id: str) -> Exchange:
        """Read an exchange from history. Raises ServiceError."""
        wanted = ExchangeRequest(request_id)
        return await self._history.request("exchange", self._tenant, wanted, Exchange)


def identify(tenant: str, key: str, prompt: PromptRequest) -> KeyedRequest:
    """
    Return the digests of a request and its key. Raises ServiceError(invalid_request) for a key that
    is too long or not printable.
    """
    if not key.isprintable() or len(key) > MAX_KEY_LENGTH:
        raise ServiceError(
            "invalid_request",
            f"The Idempotency-Key must be at most {MAX_KEY_LENGTH} printable characters.",
        )
    digest = hashlib.sha256(f"{tenant}\0{key}".encode()).digest()
    name = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    body = hmac.digest(key.encode(), encode(prompt), "sha256").hex()
    return KeyedRequest(tenant, name, body)


def conflict() -> ServiceError:
    return ServiceError(
        "conflict", "The Idempotency-Key was used for another request: use a new key."
    )


def stored_events(exchange: Exchange, offset: int = 0) -> Iterator[StreamEvent]:
    """Yield the events of a stored answer after `offset` characters."""
    stored = exchange.events()
    for part in stored:
        if rest := after_offset(part, offset):
            yield rest
    yield _end_of(exchange, stored[-1].end if stored else 0)


def _end_of(exchange: Exchange, length: int) -> Done | Failed:
    if exchange.finish_reason == "failed":
        return Failed("worker_lost", "The answer could not be finished: send the request again.")
    return Done(
        exchange.finish_reason,
        exchange.usage,
        exchange.timings,
        exchanges_dropped=0,
        stored="log",
        length=length,
        stop_string=exchange.stop_string,
    )


async def _on_bucket(operation: Awaitable[T]) -> T:
    """Await an operation on the bucket. Raises ServiceError(bus_unavailable)."""
    try:
        return await operation
    except StreamUnavailable as error:
        message = f"The Idempotency-Key can't be stored ({error}): try again, or leave it out."
        raise ServiceError("bus_unavailable", message) from error
