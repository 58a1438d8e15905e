"""Elects the workers that hear all reports, and gets the reports from them for the others."""

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from services.client.fleet import DEFAULT_LIMITS, FleetLimits, ReportSource
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.fleet import FleetReports, HubAnnouncement
from services.contract.messages import WorkerReport
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.supervised import Fail, SupervisedLoop


class ReportHub(ReportSource):
    """
    Hears all reports if this worker is one of the hubs, of which there are `max_hubs`. The
    longest-serving hubs stay, so that a worker that comes or goes moves nothing. Every worker
    begins to hear the reports at its start, and stops when it has heard of enough hubs. If one of
    these stops or is silent, some other worker takes its place.

    Another worker needs the reports only for requests that any worker may take, and asks a hub for
    them then (`refresh`). Until it is started, the directory is taken as it is.
    """

    def __init__(
        self,
        bus: Bus,
        worker_id: str,
        workers: WorkerDirectory,
        limits: FleetLimits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(bus, workers, limits, worker_id)
        self._id = worker_id
        self._is_started = False
        # after a restart under the same id, numbers are higher than before
        self._numbers = itertools.count(time.time_ns() // 1_000_000)
        self._since: int | None = None  # when it became a hub that announces itself
        self._hearing_since = 0.0  # time of time.monotonic(), while it hears reports
        self._announced_at = -math.inf  # time of time.monotonic()
        self._announced_complete = False
        self._announced_to: set[str] = set()  # the workers that have heard it, if they listened
        self._has_stopped = False
        self._updating: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self, fail: Fail) -> AsyncIterator[None]:
        """Take part in the election during the body. `fail` ends the process."""
        await self._bus.subscribe(
            subjects.reports(self._id), lambda delivery: self._bus.respond(delivery, self._reply)
        )
        await self.start()
        self._is_started = True
        loop = SupervisedLoop("report hub", self._step, fail)
        try:
            async with loop.running(is_cancelled=True):
                yield
        finally:
            if self._updating:
                self._updating.cancel()
            await self._resign()

    @property
    def is_hub(self) -> bool:
        """Whether this worker has announced that it hears all reports."""
        return self._since is not None

    @property
    def is_current(self) -> bool:
        """Whether requests can be routed by the directory as it is now."""
        interval = self._limits.poll_interval(self._hubs.workers)
        is_fetched = time.monotonic() - self._fetched_at < interval
        return not self._is_started or self._is_complete or is_fetched

    @property
    def report_interval(self) -> float:
        """The seconds between two reports of a worker in a fleet of this size."""
        known = len(self._announced_to) if self.is_hub else 0
        return self._limits.report_interval(max(self._hubs.workers, known))

    async def report(self, report: WorkerReport) -> None:
        """Publish this worker's report with the next number, and add it to the directory."""
        numbered = replace(report, number=next(self._numbers))
        self._workers.add(numbered)
        if self._bus.connected:  # a late report is useless
            await self._bus.publish(subjects.report(self._id), numbered)

    async def refresh(self) -> bool:
        """
        Bring the directory up to date. Return whether it is, after at most `refresh_seconds`: a
        client waits one second for the reply. The update goes on for later requests.
        """
        if self.is_current:
            return True
        if self._updating is None or self._updating.done():
            self._updating = self._bus.spawn(self._update())
        done, _ = await asyncio.wait({self._updating}, timeout=self._limits.refresh_seconds)
        return bool(done)

    async def _update(self) -> None:
        """
        Ask the hubs. If none replies, become one, and wait until every worker has reported; at the
        start of the process, be content with the reports so far.
        """
        while not self.is_current and not await self._fetch():
            if not self.is_hearing:
                await self._become_hub()
            has_reconnected = self._bus.seconds_since_reconnect < math.inf
            if not self._has_stopped and not has_reconnected:
                return
            await asyncio.sleep(min(self._seconds_until_complete, self._limits.timeout_seconds))

    @property
    def _is_complete(self) -> bool:
        """Whether every worker has had the time to report."""
        return self.is_hearing and self._seconds_until_complete == 0

    @property
    def _seconds_until_complete(self) -> float:
        """The rest of the time in which every worker reports, also after a lost connection."""
        heard_for = time.monotonic() - self._hearing_since
        heard_for = min(heard_for, self._bus.seconds_since_reconnect)
        return max(0.0, self._limits.hear_seconds - heard_for)

    async def _hear(self) -> None:
        if not self.is_hearing:
            self._hearing_since = time.monotonic()
        await super()._hear()

    async def _step(self) -> float:
        """Take part in the election. Pauses are random, so that one worker acts first."""
        if self.is_hearing and self._count_seniors() >= self._limits.max_hubs:
            await self._stop_hearing()
        elif self._is_announcement_due():
            await self._announce()
        elif not self.is_hearing and self._is_needed():
            await self._become_hub()
        pause = self._limits.look_seconds * random.uniform(0.5, 1.0)
        if self.is_hub and not self._is_complete:
            pause = min(pause, self._seconds_until_complete)
        return pause

    def _is_announcement_due(self) -> bool:
        """Return whether it is time for one, or there is something new to announce."""
        if not (self.is_hub or self._is_complete):
            return False
        is_old = time.monotonic() - self._announced_at >= self._limits.announce_seconds
        has_changed = self._announced_complete != self._is_complete
        return is_old or has_changed or not self._known_workers() <= self._announced_to

    def _known_workers(self) -> set[str]:
        return {report.worker_id for report in self._workers.reports()}

    def _count_seniors(self) -> int:
        """
        Return the number of hubs older than this one, or of all hubs if this worker is not a hub.
        """
        hubs = self._hubs.live()
        if self._since is None:
            return len(hubs)
        return sum((hub.since, hub.worker_id) < (self._since, self._id) for hub in hubs)

    def _is_needed(self) -> bool:
        """Return whether hubs are missing, and not only unheard because of a lost connection."""
        max_age = self._limits.max_announcement_age_seconds
        has_listened = self._bus.connected and self._bus.seconds_since_reconnect > max_age
        return has_listened and len(self._hubs.live()) < self._limits.max_hubs

    async def _become_hub(self) -> None:
        """Announce it at once, so that others don't become one too."""
        await self._hear()
        await self._announce()

    async def _announce(self) -> None:
        self._since = self._since or int(time.time() * 1000)
        self._announced_at, self._announced_to = time.monotonic(), self._known_workers()
        self._announced_complete = self._is_complete
        await self._publish(
            HubAnnouncement(
                self._id, self._since, len(self._announced_to), self._announced_complete
            )
        )

    async def _resign(self) -> None:
        """Announce that this worker is no hub any more, so that it is replaced at once."""
        since, self._since = self._since, None
        if since is not None:
            await self._publish(HubAnnouncement(self._id, since, is_stopping=True))

    async def _publish(self, announcement: HubAnnouncement) -> None:
        if self._bus.connected:  # a late one is useless
            await self._bus.publish(subjects.hub(self._id), announcement)

    async def _stop_hearing(self) -> None:
        self._has_stopped = True
        await self._resign()
        await super()._stop_hearing()

    async def _reply(self, _: Delivery) -> FleetReports:
        if not self._is_complete:
            raise ServiceError("not_found", "This worker does not hear all reports: ask a hub.")
        return self._workers.snapshot()
