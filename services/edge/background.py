"""
Responses that are generated in background.

A reader is what fails an answer over, so an edge reads each one to its end: the edge that accepted
it, and every edge that was asked for it since. The request is kept in the bucket `requests` until
the log has the answer. So if all of these edges and the worker die, the next edge that is asked
starts it again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from msgspec import Struct

from services.client.chat_client import ChatClient
from services.client.observer import Observe
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, Done, Failed, StreamEvent, Timings, Usage
from services.contract.responses import ResponseTurn
from services.edge.limits import EdgeLimits
from services.runtime.bus import Bus
from services.runtime.streams import Bucket, Conflict, StreamUnavailable
from services.runtime.tasks import Stopped, run_until

CANCELLED = Done("cancelled", Usage(0, 0, 0), Timings(0, 0, 0), 0, "none", 0)
NOT_STORED = Failed("history_unavailable", "The response could not be stored: create it again.")
MAX_TRIES = 10  # while other edges write the same value
REMOVED = Failed("not_found", "The response was deleted.")

T = TypeVar("T")

log = logging.getLogger(__name__)


class BackgroundResponse(Struct, frozen=True):
    """
    The value in the bucket. `request` is None once the response has ended; then `end` is its last
    event, unless the log has it.
    """

    turn: ResponseTurn
    request: ChatRequest | None = None
    end: Done | Failed | None = None


@dataclass(frozen=True)
class BackgroundResponses:
    """All methods raise ServiceError(bus_unavailable) without NATS. `draining` ends all reading."""

    bus: Bus
    workers: WorkerDirectory
    limits: EdgeLimits
    draining: asyncio.Event
    observe: Observe
    _reading: set[tuple[str, str]] = field(default_factory=set)

    async def start(self, tenant: str, turn: ResponseTurn, request: ChatRequest) -> None:
        """Generate the answer, now or as soon as a worker takes it. Conflicts have no effect."""
        request_id = str(request.request_id)
        await self._put(tenant, request_id, BackgroundResponse(turn, request), 0)
        self._spawn(tenant, request_id, self._generate(tenant, request))

    async def find(self, tenant: str, request_id: str) -> BackgroundResponse | None:
        found = await self._get(tenant, request_id)
        return found[0] if found else None

    def watch(self, tenant: str, request_id: str) -> None:
        """Read a response to its end, which another edge has accepted, unless this one does."""
        if (tenant, request_id) not in self._reading:
            self._spawn(tenant, request_id, self._rejoin(tenant, request_id))

    async def end(self, tenant: str, request_id: str, end: Done | Failed) -> None:
        """
        Record the end of a response, so that no edge starts it again. The first one counts, but for
        REMOVED.
        """
        for _ in range(MAX_TRIES):
            found = await self._get(tenant, request_id)
            if found is None or (found[0].request is None and end is not REMOVED):
                return
            kept = _to_keep(end)
            turn = ResponseTurn() if kept in (None, REMOVED) else found[0].turn
            ended = BackgroundResponse(turn, end=kept)
            if await self._put(tenant, request_id, ended, found[1]):
                return

    async def remove_tree(self, tenant: str, tree: str) -> None:
        """Forget all responses of a tree that is erased."""
        prefix, revision = subjects.background_entries(tenant, tree), None
        bucket = Bucket(self.bus, subjects.REQUESTS_BUCKET)
        while found := await _on_bucket(bucket.before(prefix, revision)):
            key, value = found
            await self.end(tenant, tree + key.removeprefix(prefix), REMOVED)
            revision = value.revision

    # --- reading ---

    def _spawn(
        self, tenant: str, request_id: str, reading: AsyncGenerator[StreamEvent, None]
    ) -> None:
        key = tenant, request_id
        self._reading.add(key)

        async def read() -> None:
            try:
                with suppress(Stopped):
                    await run_until(self.draining.wait(), self._read(*key, reading))
            except ServiceError as error:
                log.warning("background response lost answer=%s error=%s", request_id, error)
            finally:
                self._reading.discard(key)

        self.bus.spawn(read())

    async def _read(
        self, tenant: str, request_id: str, reading: AsyncGenerator[StreamEvent, None]
    ) -> None:
        end: Done | Failed | None = None
        async with aclosing(reading):
            async for event in reading:
                end = event if isinstance(event, Done | Failed) else end
        if end is not None:
            await self.end(tenant, request_id, end)
            log.info("background response ended answer=%s", request_id)

    async def _generate(
        self, tenant: str, request: ChatRequest
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield events; try again while no worker takes the request."""
        deadline = time.monotonic() + self.limits.background_retry_seconds
        while True:
            async with aclosing(self._client(tenant).stream(request)) as events:
                async for event in events:
                    if not isinstance(event, Failed) or not _may_come_back(event):
                        yield event
            if not isinstance(event, Failed) or not _may_come_back(event):
                return
            if time.monotonic() > deadline:
                yield event
                return
            await asyncio.sleep(self.limits.background_poll_seconds)
            if not await self._is_wanted(tenant, str(request.request_id)):
                return

    async def _rejoin(self, tenant: str, request_id: str) -> AsyncGenerator[StreamEvent, None]:
        """
        Yield events from the worker that has the response. If none has it for longer than a
        failover takes, start it again; nothing is yielded if it ended meanwhile.
        """
        lost_at = time.monotonic() + self.limits.background_lost_seconds
        while time.monotonic() < lost_at:
            async with aclosing(self._client(tenant).rejoin(request_id)) as events:
                async for event in events:
                    if isinstance(event, Failed) and _may_come_back(event):
                        break
                    yield event
                else:
                    return
            if not await self._is_wanted(tenant, request_id):
                return
            await asyncio.sleep(self.limits.background_poll_seconds)
        found = await self.find(tenant, request_id)
        if found and found.request:
            log.warning("background response started again answer=%s", request_id)
            async for event in self._generate(tenant, found.request):
                yield event

    async def _is_wanted(self, tenant: str, request_id: str) -> bool:
        found = await self.find(tenant, request_id)
        return found is not None and found.request is not None

    def _client(self, tenant: str) -> ChatClient:
        return ChatClient(self.bus, tenant, self.workers, self.limits.failover, self.observe)

    # --- the bucket ---

    async def _get(self, tenant: str, request_id: str) -> tuple[BackgroundResponse, int] | None:
        """Return the value with its revision."""
        entry = subjects.background_entry(tenant, request_id)
        value = await _on_bucket(Bucket(self.bus, subjects.REQUESTS_BUCKET).get(entry))
        return (decode(value.data, BackgroundResponse), value.revision) if value else None

    async def _put(
        self, tenant: str, request_id: str, value: BackgroundResponse, revision: int
    ) -> bool:
        """Return False if another edge has written it since this revision."""
        entry = subjects.background_entry(tenant, request_id)
        bucket = Bucket(self.bus, subjects.REQUESTS_BUCKET)
        try:
            await _on_bucket(bucket.put(entry, encode(value), revision))
        except Conflict:
            return False
        return True


def _may_come_back(failed: Failed) -> bool:
    """Return whether the answer can still be had, from another worker or somewhat later."""
    return failed.code == "not_found" or failed.retry_after is not None


def _to_keep(end: Done | Failed) -> Done | Failed | None:
    """Return what must be kept of an end: nothing if the log has it."""
    match end:
        case Done(stored="log"):
            return None
        case Done(stored="failed"):
            return NOT_STORED
    return end


async def _on_bucket(operation: Awaitable[T]) -> T:
    """Await an operation on the bucket. Raises ServiceError(bus_unavailable)."""
    try:
        return await operation
    except StreamUnavailable as error:
        message = f"Responses in background can't be stored ({error}): try again."
        raise ServiceError("bus_unavailable", message) from error
