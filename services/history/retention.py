"""Space in the log: how much is used, what that means for requests, and how it is freed."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress

from services.contract import subjects
from services.contract.errors import ServiceError
from services.history.dropping import FairDropper
from services.history.entry import Entry, Unreadable, parse_entry
from services.history.guard import LogGuard
from services.history.limits import HistoryLimits
from services.history.log import SessionLog
from services.history.snapshots import Snapshots
from services.runtime.logs import RateLimitedLog
from services.runtime.streams import StreamState, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

MIB = 2**20

log = logging.getLogger(__name__)


class LogQuota:
    """Warns and rejects chats by the log's last known size, so that asking costs nothing."""

    def __init__(self, limits: HistoryLimits) -> None:
        self._limits = limits
        self.warning: str | None = None
        self.rejection: ServiceError | None = None
        """The error that chats get while the log is full."""
        self.is_tight = False
        """Whether it will reject chats if it grows a little more."""

    def update(self, state: StreamState) -> None:
        """Take the log's size. Logs a warning when it becomes nearly full."""
        warning = self._warning(state) if state.share >= self._limits.warn_above else None
        if warning and not self.warning:
            log.warning("%s", warning)
        self.warning = warning
        self.is_tight = warning is not None and not state.drops_old
        self.rejection = None
        if warning and state.share >= self._limits.reject_above and not state.drops_old:
            self.rejection = ServiceError("history_full", warning)

    def require_room(self) -> None:
        """Raises ServiceError(history_full)."""
        if self.rejection:
            raise self.rejection

    def _warning(self, state: StreamState) -> str:
        size = f"The session log uses {state.share:.0%} of its {(state.limit or 0) / MIB:,.0f} MiB"
        if state.drops_old:
            return (
                f"{size}. Without MongoDB, the oldest records of the tenants with most are dropped"
                f" from {self._limits.drop_above:.0%} on. Give it more room with `nats stream edit"
                " HISTORY --max-bytes …`."
            )
        return (
            f"{size}, because MongoDB is not archiving it: start MongoDB. New chats are rejected"
            f" from {self._limits.reject_above:.0%} on, so that no exchange is lost."
        )


class BulkRoom:
    """Makes imports and descriptions wait while the log is nearly full, so that chats have room."""

    def __init__(self, session_log: SessionLog) -> None:
        self._log = session_log
        self._limits = session_log.limits
        self._rejections = RateLimitedLog(log)

    async def wait(self, tenant: str) -> None:
        """
        Wait until records were archived or dropped. Raises ServiceError(history_full) if that takes
        too long; StreamUnavailable.
        """
        deadline = time.monotonic() + self._limits.max_room_wait_seconds
        while (share := await self._excess_share()) is not None:
            if time.monotonic() > deadline:
                self._rejections.warning("import or description rejected tenant=%s", tenant)
                raise ServiceError(
                    "history_full",
                    f"The session log uses {share:.0%} of its room, and the rest is for chats:"
                    " check that MongoDB runs and archives it, then try again.",
                )
            await asyncio.sleep(self._limits.room_poll_seconds)

    async def _excess_share(self) -> float | None:
        """Return the share of the log that is used, or None while there is room."""
        state = await self._log.stream.state()
        limits = self._limits
        most = limits.bulk_above_without_mongodb if state.drops_old else limits.bulk_above
        return state.share if state.share >= most else None


class Trimmer:
    """
    Deletes archived records, oldest first, while the log is more than half full; without MongoDB,
    those that `dropper` chooses. Any number may run. It reads the log's state anyway, so it passes
    it to quota and guard.
    """

    def __init__(
        self,
        session_log: SessionLog,
        snapshots: Snapshots,
        quota: LogQuota,
        guard: LogGuard,
        dropper: FairDropper,
        fail: Fail,
    ) -> None:
        self._log = session_log
        self._snapshots = snapshots
        self._quota = quota
        self._guard = guard
        self._dropper = dropper
        self._limits = session_log.limits
        self._loop = SupervisedLoop("trimmer", self._step, fail)

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._loop.running(is_cancelled=True)

    async def _step(self) -> float:
        pause = self._limits.trim_interval_seconds
        with suppress(StreamUnavailable):  # requests that need the log report it
            state = await self._log.stream.state()
            self._quota.update(state)
            self._guard.observe(state)
            if state.share >= self._limits.watch_above:
                pause = self._limits.watch_interval_seconds
            if await self._trim(state):
                return 0
        return pause

    async def _trim(self, state: StreamState) -> bool:
        """
        Return whether records were deleted. They go oldest first: a session whose last record is
        older than its snapshot is taken for one of another log.
        """
        if self._dropper.is_due(state):
            return await self._dropper.drop(state)
        if state.drops_old or state.share < self._limits.trim_above:
            return False
        until = min(await self._log.archived_until(), state.first_seq + self._limits.trim_batch - 1)
        entries = await self._entries(state.first_seq, until)
        if not entries or not await self._are_saved(entries):
            return False
        for entry in entries:
            await self._log.stream.delete(entry.seq)
        return True

    async def _entries(self, first: int, last: int) -> list[Entry]:
        entries: list[Entry] = []
        async for stored in self._log.stream.walk(subjects.HISTORY_LOG, first):
            if stored.seq > last:
                break
            entries.append(parse_entry(stored))
        return entries

    async def _are_saved(self, entries: Sequence[Entry]) -> bool:
        """Save the snapshots of these records' sessions, which otherwise only the log has."""
        keys = {entry.key for entry in entries if not isinstance(entry.record, Unreadable)}
        return all([await self._snapshots.save(key) for key in keys])
