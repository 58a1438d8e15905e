"""Admits requests so that no tenant keeps the others waiting, and history is never overrun."""

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.contract.errors import ServiceError
from services.history.limits import LaneLimits
from services.runtime.logs import RateLimitedLog

log = logging.getLogger(__name__)


class Lane:
    """
    Runs a bounded number of requests at once, and at most half of them for one tenant, so that a
    tenant alone never occupies all places. Tenants that wait take turns (round robin), each with
    its oldest request.
    """

    def __init__(self, name: str, limits: LaneLimits) -> None:
        self._name = name
        self._limits = limits
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # by tenant
        self._overloads = RateLimitedLog(log)
        self.rejected = 0
        """Requests that got no place, since the start."""

    @property
    def running(self) -> int:
        return self._running.total()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """
        Hold a place during the body. Raises ServiceError(overloaded) if the tenant has too many
        waiting requests, or none of the places became free for it in time.
        """
        await self._enter(tenant)
        try:
            yield
        finally:
            self._leave(tenant)

    async def _enter(self, tenant: str) -> None:
        if self._has_place(tenant) and tenant not in self._waiting:
            self._running[tenant] += 1
            return
        if len(self._waiting.get(tenant, ())) >= self._limits.max_waiting:
            raise self._overloaded(tenant)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            async with asyncio.timeout(self._limits.max_wait_seconds):
                await turn
        except BaseException as error:
            self._give_up(tenant, turn)
            if isinstance(error, TimeoutError):
                raise self._overloaded(tenant) from error
            raise

    def _has_place(self, tenant: str) -> bool:
        has_share = self._running[tenant] < self._limits.max_running_of_tenant
        return has_share and self.running < self._limits.max_running

    def _leave(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._start_next()

    def _start_next(self) -> None:
        """Give free places to waiting tenants; one that got a place is the last next time."""
        while tenant := next(filter(self._has_place, self._waiting), None):
            turn = self._waiting[tenant].popleft()
            self._waiting.move_to_end(tenant)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if not turn.cancelled():  # its task is about to give up
                self._running[tenant] += 1
                turn.set_result(None)

    def _give_up(self, tenant: str, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():  # it got its place in the same moment
            self._leave(tenant)
            return
        queue = self._waiting.get(tenant)
        if queue is None or turn not in queue:
            return  # a place became free in the same moment, and skipped it
        queue.remove(turn)
        if not queue:
            del self._waiting[tenant]

    def _overloaded(self, tenant: str) -> ServiceError:
        self.rejected += 1
        self._overloads.warning("request rejected lane=%s tenant=%s", self._name, tenant)
        return ServiceError(
            "overloaded",
            "The history service works on too many requests of this API key: send fewer at once,"
            " and try again.",
            retry_after=self._limits.retry_after_seconds,
        )
