"""Reads contexts from history, and appends exchanges to the log."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Context, ContextReply, ContextRequest, Exchange
from services.contract.messages import Empty, StoredState
from services.inference.context_cache import ContextCache
from services.inference.limits import DEFAULT_LIMITS, InferenceLimits
from services.runtime import trace_context
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders, RequestSilent
from services.runtime.streams import Conflict, MessageTooLarge, Stream, StreamUnavailable

NOT_WRITABLE = ("history_unavailable", "history_full")

log = logging.getLogger(__name__)


class AppendResult(NamedTuple):
    """
    The outcome of an append. With `stored="log"`, `other` is the exchange that another attempt at
    the request had appended before, if it differs.
    """

    stored: StoredState
    other: Exchange | None = None


class HistoryClient:
    """
    Requests to history are retried while history or the log is replaced.

    A context is kept with the exchanges that this worker appends to it. The next request of the
    session uses it if the log still ends with the last of them, and history has accepted a chat
    within the last seconds: so it is not asked again.
    """

    def __init__(
        self,
        bus: Bus,
        limits: InferenceLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._limits = limits
        self._clock = clock
        self._log = Stream(bus, subjects.HISTORY_STREAM)
        self._contexts = ContextCache(limits, clock)
        self._trust = Trust(limits.history_trust_seconds, clock)
        # at both: requests are sent after the connection is back, before the reconnect's callbacks
        bus.on_disconnect(self._forget_all)
        bus.on_reconnect(self._on_reconnect)

    async def context(self, tenant: str, session_id: str) -> Context:
        """
        Return the session's context.

        Raises ServiceError: `history_unavailable`, since a session must not be answered as if it
        were new; `history_full` if the answer could not be stored.
        """
        key = subjects.session_key(tenant, session_id)
        if cached := await self._cached(key):
            return cached
        asked_at = self._clock()
        try:
            reply = await self._request(tenant, session_id)
        except ServiceError as error:
            if error.code in NOT_WRITABLE:
                self._trust.end()
            raise
        if reply.window is None:
            self._trust.end()  # history may reject the next chat
        else:
            self._trust.renew(asked_at)
        self._contexts.put(key, reply, asked_at)
        return reply

    async def stored_context(self, tenant: str, session_id: str) -> Context:
        """
        Return the session's context as history has it, for what is answered already: so a full log
        does not refuse the request. Raises ServiceError(history_unavailable).
        """
        return await self._request(tenant, session_id, is_answered=True)

    def forget_session(self, key: str) -> None:
        self._contexts.drop(key)

    def _forget_all(self) -> None:
        """Ask again for all contexts: NATS may be back with another store."""
        self._trust.end()
        self._contexts.clear()

    async def _on_reconnect(self) -> None:
        self._forget_all()

    async def _cached(self, key: str) -> Context | None:
        """Return the cached context if the log ends where it does; None: history must be asked."""
        cached = self._contexts.get(key)
        if not (cached and cached.record and self._trust.holds and self._bus.connected):
            return None
        try:
            async with asyncio.timeout(self._limits.last_record_timeout_seconds):
                last = await self._log.last(subjects.log(key))
        except (StreamUnavailable, TimeoutError) as error:
            log.warning("log not read, asking history instead error=%r", str(error) or "timed out")
            self._trust.end()
            return None
        if not cached.ends_with(last):
            self._contexts.drop(key, cached)
            return None
        is_valid = self._trust.holds and self._contexts.get(key) is cached  # also after the read
        return cached.context if is_valid else None

    async def _request(
        self, tenant: str, session_id: str, is_answered: bool = False
    ) -> ContextReply:
        subject = subjects.history("context", tenant)
        request = ContextRequest(session_id, is_answered)
        tries = self._limits.history_tries_seconds
        unavailable = ServiceError(
            "history_unavailable",
            "The history service does not reply, so the session can't be continued: try again, and"
            " check that it runs.",
        )
        for silence in tries:
            try:
                return await self._bus.request(
                    subject, request, ContextReply, sum(tries), silence=silence
                )
            except NoResponders:
                await asyncio.sleep(silence)
            except RequestSilent:
                subject = subjects.retry(subjects.history("context", tenant))
            except TimeoutError:
                break
            except ServiceError as error:
                if error.code != "history_unavailable":
                    raise
                unavailable = error
                await asyncio.sleep(silence)
        raise unavailable

    async def append(
        self, key: str, exchange: Exchange, is_wanted: Callable[[], bool]
    ) -> AppendResult:
        """
        Append the exchange after the last record of the session with this key.

        The result is `log` once the stream has acknowledged it, `none` if the session was erased
        after the request, and `failed` after a time-out, if the exchange exceeds a message, or once
        `is_wanted` returns False because another worker has taken over.

        Idempotent: a try that was not acknowledged is repeated with the same message id, which the
        server deduplicates. An exchange of another attempt at the request is not overwritten.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.append_timeout_seconds):
                return await self._append(key, exchange, is_wanted)
        log.error("append timed out: the exchange is not stored")
        return AppendResult("failed")

    async def _append(
        self, key: str, exchange: Exchange, is_wanted: Callable[[], bool]
    ) -> AppendResult:
        while is_wanted():
            try:
                if result := await self._try(key, exchange):
                    return result
                # in this order: a record in between makes the next try fail as well
                previous = await self._last(key)
                if await self._is_erased(key, exchange):
                    return AppendResult("none")
                exchange = replace(exchange, previous=previous)
            except MessageTooLarge as error:  # and will always be
                log.error("append failed, the exchange is not stored error=%r", str(error))
                return AppendResult("failed")
            except (StreamUnavailable, ServiceError) as error:
                # history then probes the log, and rejects chats meanwhile
                await self._bus.publish(
                    subjects.HISTORY_APPEND_FAILED, Empty(), headers=trace_context.headers()
                )
                self._trust.end()
                log.warning("append failed, retrying error=%r", str(error))
                await asyncio.sleep(self._limits.append_retry_seconds)
        return AppendResult("failed")

    async def _try(self, key: str, exchange: Exchange) -> AppendResult | None:
        """Return None if `previous` is outdated by another record of the session."""
        if not self._bus.connected:  # a buffered publish may arrive too late
            raise StreamUnavailable("not connected")
        subject, message_id = subjects.log(key), f"{key}.{exchange.request_id}"
        with suppress(Conflict):
            data = encode(exchange)
            seq, is_new = await self._log.append(subject, data, message_id, exchange.previous)
            if not is_new:
                return await self._duplicate(seq, key, exchange)
            self._contexts.advance(key, exchange, seq, data)
            return AppendResult("log")
        return None

    async def _duplicate(self, seq: int, key: str, exchange: Exchange) -> AppendResult:
        """Compare with the exchange of the request that is at `seq` in the log."""
        stored = await self._log.get(seq)
        if stored is None:  # archived, and trimmed from the log
            return AppendResult("none" if await self._is_erased(key, exchange) else "log")
        other = decode(stored.data, Exchange)
        return AppendResult("log", None if _outcome(other) == _outcome(exchange) else other)

    async def _is_erased(self, key: str, exchange: Exchange) -> bool:
        """Return whether the session was erased after the exchange's request."""
        now = await self.stored_context(*subjects.session_of_key(key))
        return now.erased > exchange.epoch

    async def _last(self, key: str) -> int:
        stored = await self._log.last(subjects.log(key))
        return stored.seq if stored else 0


class Trust:
    """Whether history would accept a chat now, as it has accepted another one a moment ago."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._accepted_at = self._ended_at = -math.inf

    @property
    def holds(self) -> bool:
        return self._clock() - self._accepted_at < self._seconds

    def renew(self, asked_at: float) -> None:
        """Note that history has accepted a chat when asked at this time."""
        if asked_at > self._ended_at:
            self._accepted_at = max(self._accepted_at, asked_at)

    def end(self) -> None:
        """Note that it may reject chats from now on."""
        self._accepted_at, self._ended_at = -math.inf, self._clock()


def _outcome(exchange: Exchange) -> tuple[object, ...]:
    asked = (exchange.prompt, exchange.tool_results)
    return *asked, exchange.response, *exchange.events(), exchange.finish_reason
