"""
Bring the workers' reports into a WorkerDirectory: hear all of them, or ask a hub for them.

If every worker and every edge heard every report, reports would cost N². So a few workers, the
hubs, hear all reports and announce that; others ask a hub when they need the reports. A process
that finds no hub hears the reports itself: too many hubs cost something, too few would fail
requests.
"""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.fleet import FleetReports, HubAnnouncement
from services.contract.messages import Empty
from services.runtime.bus import Bus, Unsubscribe
from services.runtime.deliveries import Delivery, NoResponders
from services.runtime.supervised import Fail, SupervisedLoop


@dataclass(frozen=True)
class FleetLimits:
    """Times are in seconds."""

    max_hubs: int = 4
    small_fleet: int = 16  # workers, up to which edges hear all reports
    large_fleet: int = 100  # workers, from which on they report half as often
    report_seconds: float = 1.0  # between two reports of a worker, unless the fleet is large
    announce_seconds: float = 5.0  # between announcements of a hub, unless it hears a new worker
    look_seconds: float = 1.0  # at most, between two looks of a worker at the hubs
    max_announcement_age_seconds: float = 12.0  # after which a hub counts as lost
    hear_seconds: float = 2.5  # in which every worker has reported
    timeout_seconds: float = 0.25  # for a hub to reply
    refresh_seconds: float = 0.6  # for an update; less than a request waits for its admission

    def report_interval(self, workers: int) -> float:
        return self.report_seconds * (2 if workers >= self.large_fleet else 1)

    def poll_interval(self, workers: int) -> float:
        """Return the seconds between two requests for the reports."""
        return self.report_interval(workers) / 2


DEFAULT_LIMITS = FleetLimits()


class Hubs:
    """The live hubs other than this process, by their announcements."""

    def __init__(
        self, limits: FleetLimits, own_id: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._own_id = own_id
        self._clock = clock
        self._heard: dict[str, tuple[float, HubAnnouncement]] = {}  # with the time of receipt

    def on_announcement(self, delivery: Delivery) -> None:
        hub = decode(delivery.data, HubAnnouncement)
        if hub.is_stopping:
            self.remove(hub.worker_id)
        elif hub.worker_id != self._own_id:
            self._heard[hub.worker_id] = (self._clock(), hub)

    def remove(self, worker_id: str) -> None:
        """Forget a hub that does not reply, until it announces itself again."""
        self._heard.pop(worker_id, None)

    def live(self) -> list[HubAnnouncement]:
        oldest = self._clock() - self._limits.max_announcement_age_seconds
        self._heard = {k: v for k, v in self._heard.items() if v[0] > oldest}
        return [hub for _, hub in self._heard.values()]

    @property
    def workers(self) -> int:
        """The number of workers, as far as a hub knows."""
        return max((hub.workers for hub in self.live()), default=0)

    def complete(self) -> list[HubAnnouncement]:
        """Return the hubs that know every worker, in random order: they share the requests."""
        complete = [hub for hub in self.live() if hub.is_complete]
        random.shuffle(complete)
        return complete


class ReportSource:
    """What hubs, other workers and edges have in common. It hears all reports from its start on."""

    def __init__(
        self,
        bus: Bus,
        workers: WorkerDirectory,
        limits: FleetLimits = DEFAULT_LIMITS,
        own_id: str = "",
    ) -> None:
        self._bus = bus
        self._workers = workers
        self._limits = limits
        self._hubs = Hubs(limits, own_id)
        self._unsubscribe: Unsubscribe | None = None
        self._subscribing = asyncio.Lock()
        self._fetched_at = -math.inf

    async def start(self) -> None:
        await self._bus.subscribe(subjects.hub(subjects.ANY), self._hubs.on_announcement)
        await self._hear()

    @property
    def is_hearing(self) -> bool:
        return self._unsubscribe is not None

    async def _hear(self) -> None:
        async with self._subscribing:
            if not self.is_hearing:
                pattern = subjects.report(subjects.ANY)
                self._unsubscribe = await self._bus.subscribe(pattern, self._workers.on_report)

    async def _stop_hearing(self) -> None:
        unsubscribe, self._unsubscribe = self._unsubscribe, None
        if unsubscribe:
            await unsubscribe()

    async def _fetch(self) -> bool:
        """Ask one hub after another for the reports. Return whether one has replied."""
        for hub in self._hubs.complete():
            if await self._fetch_from(hub.worker_id):
                self._fetched_at = time.monotonic()
                return True
            self._hubs.remove(hub.worker_id)
        return False

    async def _fetch_from(self, hub: str) -> bool:
        timeout = self._limits.timeout_seconds
        try:
            self._workers.merge(
                await self._bus.request(subjects.reports(hub), Empty(), FleetReports, timeout)
            )
        except (NoResponders, TimeoutError, ServiceError):
            return False
        return True


class ReportReader(ReportSource):
    """
    Keeps the directory of an edge up to date. It hears all reports while the fleet is small, or no
    hub replies; else it asks a hub twice per interval of the reports.
    """

    @asynccontextmanager
    async def reading(self, fail: Fail) -> AsyncIterator[None]:
        """Follow the size of the fleet during the body. `fail` ends the process."""
        loop = SupervisedLoop("reports", self._step, fail)
        async with loop.running(is_cancelled=True):
            yield

    async def _step(self) -> float:
        workers = self._hubs.workers
        if workers > self._limits.small_fleet and await self._fetch():
            await self._stop_hearing()
        else:
            await self._hear()
        return self._limits.poll_interval(workers)
