"""What the worker asks of history, and what it puts into the log. Knows no model."""

import asyncio
import logging

import msgspec

from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.messages import Context, ContextRequest, Exchange, Stored
from services.runtime.bus import Bus, NoResponders
from services.runtime.streams import Conflict, Stream, StreamUnavailable

# seconds given to each: a process that died or froze is replaced by another
TRIES = (0.3, 0.6, 1.2, 2.4)
APPEND_TRIES = 5  # each lost to another turn of the same session, or to a server that is restarting

log = logging.getLogger(__name__)


class Sessions:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._log = Stream(bus, subjects.HISTORY_STREAM)

    async def context(self, tenant: str, session_id: str) -> Context:
        """
        Raises ServiceError(history_unavailable): a session is never answered as if it were
        new.
        """
        subject = subjects.history_context(tenant)
        for timeout in TRIES:
            try:
                return await self._bus.request(
                    subject, ContextRequest(session_id), Context, timeout
                )
            except NoResponders:
                await asyncio.sleep(timeout)
            except TimeoutError:
                continue
        raise ServiceError(
            "history_unavailable",
            "The history service does not answer, so the session can't be continued: start it, or"
            " try again.",
            retry_after=2,
        )

    async def append(self, key: str, exchange: Exchange) -> Stored:
        """
        Puts the exchange after the session's last record; `log` once the stream has acknowledged
        it.

        The message id lets the server drop a repeat, so a try that was not acknowledged is
        repeated.
        """
        for attempt in range(APPEND_TRIES):
            try:
                await self._log.append(
                    subjects.log(key),
                    encode(exchange),
                    message_id=f"{key}.{exchange.request_id}",
                    previous=exchange.previous,
                )
                return "log"
            except Conflict:
                exchange = msgspec.structs.replace(exchange, previous=await self._last(key))
            except StreamUnavailable as error:
                log.warning("the log did not take the exchange (try %d): %s", attempt + 1, error)
        return "failed"

    async def _last(self, key: str) -> int:
        stored = await self._log.last(subjects.log(key))
        return stored.seq if stored else 0
