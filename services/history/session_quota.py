"""Bounds the sessions of a tenant: their snapshots are kept for ever, and fill a disk of all."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from services.contract import subjects
from services.contract.errors import ServiceError
from services.history.log import SessionLog
from services.runtime.logs import RateLimitedLog
from services.runtime.streams import StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

MIB = 2**20
WARNING_SHARE = 0.8

log = logging.getLogger(__name__)


class SessionsUse(NamedTuple):
    """Stored sessions, without erased ones, and the bytes of their snapshots."""

    sessions: int
    bytes: int


NOTHING = SessionsUse(0, 0)


class SessionQuota:
    """
    Rejects new sessions of a tenant with `max_sessions`, or as many times `session_bytes`.

    Snapshots are counted when they have grown by a share of one tenant's limit, by listing them
    without their data: so nothing is kept that could differ from them, and a tenant exceeds its
    limit by little. Any number of processes may count.
    """

    def __init__(self, session_log: SessionLog, max_sessions: int, fail: Fail) -> None:
        self._log = session_log
        self._limits = session_log.limits
        self._max = SessionsUse(max_sessions, max_sessions * self._limits.session_bytes)
        self._loop = SupervisedLoop("session quota", self._step, fail)
        self._rejections = RateLimitedLog(log)
        self._full: Mapping[str, SessionsUse] = {}
        self._counted, self._counted_seq = NOTHING, 0

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._loop.running(is_cancelled=True)

    def require_session(self, tenant: str) -> None:
        """Raise ServiceError(too_many_sessions) if the tenant may not begin another session."""
        if use := self._full.get(tenant):
            raise self._rejection(tenant, use)

    def require_bytes(self, tenant: str) -> None:
        """Raise ServiceError(too_many_sessions) if its sessions may not grow by an import."""
        if (use := self._full.get(tenant, NOTHING)).bytes >= self._max.bytes:
            raise self._rejection(tenant, use)

    async def _step(self) -> float:
        try:
            return await self._count_if_due()
        except StreamUnavailable:  # requests that need the sessions report it
            return self._limits.count_sessions_seconds

    async def _count_if_due(self) -> float:
        state = await self._log.snapshots.state()
        stored = SessionsUse(state.messages, state.bytes)
        is_changed = bool(self._full) and state.last_seq != self._counted_seq
        if not is_changed and not self._has_grown(stored):
            return self._limits.count_sessions_seconds
        began = time.monotonic()
        uses = await self._count()
        self._full = {tenant: use for tenant, use in uses.items() if self._has(use, 1.0)}
        self._warn(uses)
        self._counted, self._counted_seq = stored, state.last_seq
        seconds = time.monotonic() - began
        return max(self._limits.count_sessions_seconds, seconds / self._limits.listing_share)

    def _has_grown(self, stored: SessionsUse) -> bool:
        """Return whether a tenant may have reached its limit since the last count."""
        share = self._limits.count_sessions_after
        pairs = zip(stored, self._counted, self._max, strict=True)
        return any(now - before >= share * most for now, before, most in pairs)

    async def _count(self) -> dict[str, SessionsUse]:
        sessions: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        async for entry in self._log.snapshot_sizes():
            if not entry.expires:
                tenant = subjects.tenant_of_snapshot(entry.subject)
                sessions[tenant] += 1
                sizes[tenant] += entry.bytes
        return {tenant: SessionsUse(sessions[tenant], sizes[tenant]) for tenant in sessions}

    def _has(self, use: SessionsUse, share: float) -> bool:
        """Return whether a tenant uses this share of what it may have."""
        return any(used >= share * most for used, most in zip(use, self._max, strict=True))

    def _warn(self, uses: Mapping[str, SessionsUse]) -> None:
        for tenant, use in uses.items():
            if self._has(use, WARNING_SHARE) and tenant not in self._full:
                log.warning(
                    "tenant has most of its sessions: delete some, set HISTORY_RETENTION, or raise"
                    " HISTORY_MAX_SESSIONS tenant=%s sessions=%d of=%d mib=%.0f of=%.0f",
                    tenant,
                    use.sessions,
                    self._max.sessions,
                    use.bytes / MIB,
                    self._max.bytes / MIB,
                )

    def _rejection(self, tenant: str, use: SessionsUse) -> ServiceError:
        self._rejections.warning(
            "new session rejected tenant=%s sessions=%d bytes=%d", tenant, *use
        )
        return ServiceError(
            "too_many_sessions",
            f"This API key has {use.sessions:,} sessions and stored responses with"
            f" {use.bytes / MIB:,.0f} MiB, and may have {self._max.sessions:,} with"
            f" {self._max.bytes / MIB:,.0f} MiB: delete some, or have HISTORY_MAX_SESSIONS raised.",
        )
