"""Makes room in a log without MongoDB, so that no tenant pushes out what the others have stored."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NamedTuple

from services.contract import subjects
from services.history.log import SessionLog
from services.history.snapshots import Snapshots
from services.runtime.consumers import MessageSize
from services.runtime.logs import RateLimitedLog
from services.runtime.streams import StreamState

log = logging.getLogger(__name__)


class LogUse(NamedTuple):
    """
    The bytes of each tenant's records in the log. `overhead` is what one record takes beside its
    data: subject, headers and what the store adds.
    """

    bytes_of: Mapping[str, float]
    overhead: float

    def excess(self, target: float) -> dict[str, float]:
        """Return the bytes that tenants must drop, so that all together keep `target`."""
        share = fair_share(self.bytes_of, target)
        return {name: size - share for name, size in self.bytes_of.items() if size > share}


def fair_share(bytes_of: Mapping[str, float], target: float) -> float:
    """
    Return the most that one tenant may keep, so that all together keep `target`: tenants with less
    keep all they have, and the rest is divided evenly (max-min fairness). Infinite if all fits.
    """
    sizes, left = sorted(bytes_of.values()), target
    for number, size in enumerate(sizes):
        share = left / (len(sizes) - number)
        if size > share:
            return share
        left -= size
    return math.inf


class FairDropper:
    """
    Drops the oldest records of the tenants that have most, before JetStream drops the oldest of
    all. The log is read twice for it, without its data, whenever it has filled up again: so nothing
    is counted that could differ from it. Any number of processes may drop at once.
    """

    def __init__(self, session_log: SessionLog, snapshots: Snapshots) -> None:
        self._log = session_log
        self._snapshots = snapshots
        self._limits = session_log.limits
        self._drops = RateLimitedLog(log)
        self._paused_until = 0.0
        self.dropped = 0
        """Records that this process has dropped since its start."""

    def is_due(self, state: StreamState) -> bool:
        if time.monotonic() < self._paused_until:
            return False
        return state.drops_old and state.share >= self._limits.drop_above

    async def drop(self, state: StreamState) -> bool:
        """
        Drop records until the log has room. Return whether any was dropped: not if the snapshots of
        their sessions can't be saved, or another process was first. Raises StreamUnavailable.
        """
        began, dropped_before = time.monotonic(), self.dropped
        await self._drop_excess(state)
        has_dropped = self.dropped > dropped_before
        if not has_dropped:
            now = time.monotonic()
            self._paused_until = now + (now - began) / self._limits.listing_share
        return has_dropped

    async def _drop_excess(self, state: StreamState) -> None:
        use = await self._use()
        excess = use.excess(self._limits.drop_to * (state.limit or 0))
        for tenant, size in excess.items():
            self._drops.warning(
                "log full, dropping a tenant's oldest records tenant=%s bytes=%d of=%d",
                tenant,
                size,
                use.bytes_of[tenant],
            )
        async for batch in self._oldest(excess, use.overhead):
            if not await self._are_saved(batch):
                return
            for start in range(0, len(batch), self._limits.drop_parallel):
                part = batch[start : start + self._limits.drop_parallel]
                await asyncio.gather(*(self._log.stream.delete(record.seq) for record in part))
            self.dropped += len(batch)

    async def _use(self) -> LogUse:
        sizes: Counter[str] = Counter()
        records: Counter[str] = Counter()
        async for record in self._log.sizes():
            tenant = _tenant_of(record)
            sizes[tenant] += record.bytes
            records[tenant] += 1
        # read after the records: what another process has dropped meanwhile is no excess
        state = await self._log.stream.state()
        overhead = max(0, state.bytes - sizes.total()) / max(1, records.total())
        return LogUse({name: sizes[name] + overhead * records[name] for name in records}, overhead)

    async def _oldest(
        self, excess: dict[str, float], overhead: float
    ) -> AsyncIterator[list[MessageSize]]:
        """Yield the tenants' oldest records in batches, until they have as many bytes."""
        left, batch = dict(excess), list[MessageSize]()
        async for record in self._log.sizes():
            tenant = _tenant_of(record)
            if left.get(tenant, 0) > 0:
                left[tenant] -= record.bytes + overhead
                batch.append(record)
            is_last = all(size <= 0 for size in left.values())
            if is_last or len(batch) == self._limits.trim_batch:
                yield batch
                batch = []
            if is_last:
                return
        yield batch

    async def _are_saved(self, records: Sequence[MessageSize]) -> bool:
        """Save the snapshots of these records' sessions, which otherwise only the log has."""
        keys = sorted({subjects.key_of_log(record.subject) for record in records})
        saved = [await self._snapshots.save(key) for key in keys if subjects.is_session_key(key)]
        return all(saved)


def _tenant_of(record: MessageSize) -> str:
    return subjects.key_of_log(record.subject).partition(".")[0]
