"""Requests to the history service, with its absence and slowness as errors."""

from dataclasses import dataclass
from typing import TypeVar

from msgspec import Struct

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import HistoryStatus
from services.contract.messages import Empty
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders, RequestSilent

S = TypeVar("S", bound=Struct)


@dataclass(frozen=True)
class HistoryLimits:
    """Times are in seconds."""

    history_seconds: float = 10.0  # for a process that is alive
    ready_seconds: float = 2.5
    # without a keep-alive, after which one process counts as dead and all are asked
    silence_seconds: float = 0.5
    total_silence_seconds: float = 2.5  # without a keep-alive from any process


DEFAULT_LIMITS = HistoryLimits()


class HistoryRequests:
    def __init__(self, bus: Bus, limits: HistoryLimits = DEFAULT_LIMITS) -> None:
        self._bus = bus
        self._limits = limits

    async def request(
        self,
        verb: subjects.HistoryVerb,
        tenant: str,
        message: Struct,
        kind: type[S],
        timeout: float | None = None,
    ) -> S:
        """
        Send a request. `timeout` is the time in seconds for a process that works on it (default:
        `history_seconds`). Raises ServiceError.
        """
        timeout = self._limits.history_seconds if timeout is None else timeout
        return await self._ask(subjects.history(verb, tenant), message, kind, timeout)

    async def status(self, timeout: float | None = None) -> HistoryStatus | None:
        """
        Return the status of the history service, or None if it can't be had in `timeout` seconds
        (default: `history_seconds`).
        """
        timeout = self._limits.history_seconds if timeout is None else timeout
        try:
            return await self._ask(subjects.HISTORY_STATUS, Empty(), HistoryStatus, timeout)
        except ServiceError:
            return None

    async def check_chats_accepted(self) -> None:
        """Raise ServiceError while history rejects chats or hangs; not if it does not run."""
        timeout = self._limits.ready_seconds
        try:
            status = await self._send(subjects.HISTORY_STATUS, Empty(), HistoryStatus, timeout)
        except NoResponders:
            return
        except TimeoutError as error:
            raise _unavailable("does not reply") from error
        if status.refuses:
            message = (
                status.warning
                or "The history service rejects chats: `history` in GET /status shows why."
            )
            raise ServiceError(status.refuses, message)

    async def _ask(self, subject: str, message: Struct, kind: type[S], timeout: float) -> S:
        check_connected(self._bus)
        try:
            return await self._send(subject, message, kind, timeout)
        except (NoResponders, RequestSilent) as error:
            raise _unavailable("does not reply") from error
        except TimeoutError as error:
            raise _unavailable(f"did not finish in {timeout:.0f} s") from error

    async def _send(self, subject: str, message: Struct, kind: type[S], timeout: float) -> S:
        """Ask one process, and all only once it is silent: a slow request is not repeated."""
        silence = self._limits.silence_seconds
        try:
            return await self._bus.request(subject, message, kind, timeout, silence=silence)
        except RequestSilent:
            retry, silence = subjects.retry(subject), self._limits.total_silence_seconds
            return await self._bus.request(retry, message, kind, timeout, silence=silence)


def check_connected(bus: Bus) -> None:
    """Raise ServiceError(bus_unavailable) without a connection to NATS."""
    if not bus.connected:
        message = "The connection to NATS is lost: try again."
        raise ServiceError("bus_unavailable", message)


def _unavailable(what: str) -> ServiceError:
    message = f"The history service {what}: try again."
    return ServiceError("history_unavailable", message)
