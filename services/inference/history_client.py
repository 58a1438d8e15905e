"""Reads contexts from history, and appends exchanges to the log."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import Context, ContextRequest, Exchange
from services.contract.messages import Empty, StoredState
from services.inference.limits import DEFAULT_LIMITS, InferenceLimits
from services.runtime import trace_context
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders, RequestSilent
from services.runtime.streams import Conflict, MessageTooLarge, Stream, StreamUnavailable

log = logging.getLogger(__name__)


class AppendResult(NamedTuple):
    """
    The outcome of an append. With `stored="log"`, `other` is the exchange that another attempt at
    the request had appended before, if it differs.
    """

    stored: StoredState
    other: Exchange | None = None


class HistoryClient:
    """Requests to history are retried while history or the log is replaced."""

    def __init__(self, bus: Bus, limits: InferenceLimits = DEFAULT_LIMITS) -> None:
        self._bus = bus
        self._limits = limits
        self._log = Stream(bus, subjects.HISTORY_STREAM)

    async def context(self, tenant: str, session_id: str, is_answered: bool = False) -> Context:
        """
        Return the session's context. `is_answered`: there already is an answer to append, so a full
        log does not refuse the request.

        Raises ServiceError: `history_unavailable`, since a session must not be answered as if it
        were new; `history_full` if the answer could not be stored.
        """
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
                    subject, request, Context, sum(tries), silence=silence
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
                log.warning("append failed, retrying error=%r", str(error))
                await asyncio.sleep(self._limits.append_retry_seconds)
        return AppendResult("failed")

    async def _try(self, key: str, exchange: Exchange) -> AppendResult | None:
        """Return None if `previous` is outdated by another record of the session."""
        if not self._bus.connected:  # a buffered publish may arrive too late
            raise StreamUnavailable("not connected")
        subject, message_id = subjects.log(key), f"{key}.{exchange.request_id}"
        with suppress(Conflict):
            seq, is_new = await self._log.append(
                subject, encode(exchange), message_id, exchange.previous
            )
            return AppendResult("log") if is_new else await self._duplicate(seq, key, exchange)
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
        now = await self.context(*subjects.session_of_key(key), is_answered=True)
        return now.erased > exchange.epoch

    async def _last(self, key: str) -> int:
        stored = await self._log.last(subjects.log(key))
        return stored.seq if stored else 0


def _outcome(exchange: Exchange) -> tuple[object, ...]:
    asked = (exchange.prompt, exchange.tool_results)
    return *asked, exchange.response, *exchange.events(), exchange.finish_reason
