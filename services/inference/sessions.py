"""What the worker asks of history, and what it puts into the log. Knows no model."""

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
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders, RequestSilent
from services.runtime.streams import Conflict, Stream, StreamUnavailable

# seconds without a sign of life after which each try ends; in all, enough to replace a process that
# died or froze, and for a NATS cluster to elect a leader
TRIES = (0.3, 0.6, 1.2, 2.4, 4.8)
APPEND_DEADLINE = 10.0  # seconds, of which a server that restarts takes a few
RETRY_INTERVAL = 0.3  # seconds

log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """
    `other`, beside `log`: what is there instead, of another attempt at the request that was first.
    """

    stored: StoredState
    other: Exchange | None = None


class HistoryClient:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._log = Stream(bus, subjects.HISTORY_STREAM)

    async def context(self, tenant: str, session_id: str, is_answered: bool = False) -> Context:
        """
        Raises ServiceError: `history_unavailable`, as a session is never answered as if it were
        new; `history_full`, where the answer could not be stored.
        """
        subject = subjects.history("context", tenant)
        request = ContextRequest(session_id, is_answered)
        unavailable = _history_silent()
        for silence in TRIES:
            try:
                return await self._bus.request(
                    subject, request, Context, sum(TRIES), silence=silence
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

    async def append(self, key: str, exchange: Exchange, is_wanted: Callable[[], bool]) -> Kept:
        """
        Puts the exchange after the session's last record; `log` once the stream has acknowledged
        it, `none` if the session was erased since the exchange was asked. Nothing is tried any more
        once it is not wanted: another worker has it then.

        The message id lets the server drop a repeat, so a try that was not acknowledged is
        repeated. What another attempt at the request has put there stays.
        """
        try:
            async with asyncio.timeout(APPEND_DEADLINE):
                while is_wanted():
                    try:
                        if kept := await self._try(key, exchange):
                            return kept
                        # in this order: what comes in between makes the next try fail as well
                        previous = await self._last(key)
                        if await self._is_erased(key, exchange):
                            return Kept("none")
                        exchange = replace(exchange, previous=previous)
                    except (StreamUnavailable, ServiceError) as error:
                        # history probes the log, and refuses chats meanwhile
                        await self._bus.publish(subjects.HISTORY_APPEND_FAILED, Empty())
                        # a server that restarts is back in a moment
                        log.warning("the log does not take the exchange: %s; trying again", error)
                        await asyncio.sleep(RETRY_INTERVAL)
        except TimeoutError:
            log.error("the log did not take the exchange: no time left")
        return Kept("failed")

    async def _try(self, key: str, exchange: Exchange) -> Kept | None:
        """None if another record of the session came first, so that `previous` is another now."""
        if not self._bus.connected:  # what waits for the connection may come too late
            raise StreamUnavailable("not connected")
        subject, message_id = subjects.log(key), f"{key}.{exchange.request_id}"
        with suppress(Conflict):
            seq, is_new = await self._log.append(
                subject, encode(exchange), message_id, exchange.previous
            )
            return Kept("log") if is_new else await self._repeated(seq, key, exchange)
        return None

    async def _repeated(self, seq: int, key: str, exchange: Exchange) -> Kept:
        """The request's exchange was there already."""
        stored = await self._log.get(seq)
        if stored is None:  # archived, and trimmed
            return Kept("none" if await self._is_erased(key, exchange) else "log")
        there = decode(stored.data, Exchange)
        return Kept("log", None if _what(there) == _what(exchange) else there)

    async def _is_erased(self, key: str, exchange: Exchange) -> bool:
        """Whether the session was, since the exchange was asked."""
        now = await self.context(*subjects.session_of_key(key), is_answered=True)
        return now.erased > exchange.epoch

    async def _last(self, key: str) -> int:
        stored = await self._log.last(subjects.log(key))
        return stored.seq if stored else 0


def _what(exchange: Exchange) -> tuple[str, str, str]:
    return exchange.prompt, exchange.response, exchange.finish_reason


def _history_silent() -> ServiceError:
    return ServiceError(
        "history_unavailable",
        "The history service does not answer, so the session can't be continued: start it, or"
        " try again.",
        retry_after=2,
    )
