"""Decides whether chats are accepted, so that no answer is generated that can't be stored."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager

from services.contract.errors import ErrorCode, ServiceError
from services.history.log import SessionLog
from services.history.repair import Checkup
from services.runtime.streams import StreamDamaged, StreamFull, StreamState, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

IDLE_SECONDS = 3600.0  # a scheduled check ends the pause

log = logging.getLogger(__name__)


class LogGuard:
    """
    Checks the log at start, after a reconnect and when its figures go back, and probes it after a
    failed append. While it can't be used, the check is repeated and chats are rejected.
    """

    def __init__(self, session_log: SessionLog, checkup: Checkup, fail: Fail) -> None:
        self._log = session_log
        self._checkup = checkup
        self._retry_seconds = session_log.limits.retry_seconds
        self._loop = SupervisedLoop("log guard", self._step, fail)
        self._last: StreamState | None = None
        # what the next check is for
        self._is_due = True
        self._needs_probe = False
        self._is_restarted = True  # NATS was (re)connected and the log not checked since
        self._checked = asyncio.Event()  # cleared while a check is due
        self.rejection: ServiceError | None = None

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._loop.running(is_cancelled=True)

    @property
    def warning(self) -> str | None:
        return self.rejection.message if self.rejection else self._checkup.warning

    def observe(self, state: StreamState) -> None:
        """Schedule a check if the log has lost records or its figures are inconsistent."""
        last, self._last = self._last, state
        if last and (state.last_seq < last.last_seq or state.is_whole < last.is_whole):
            self.schedule_check(is_probed=False)

    def reconnected(self) -> None:
        """Schedule a check: NATS may have come back with another store."""
        self._is_restarted = True
        self.schedule_check(is_probed=False)

    def schedule_check(self, is_probed: bool = True) -> None:
        """Schedule a check; with a probe record after a failed append, here or at a worker."""
        self._is_due = True
        self._needs_probe |= is_probed
        self._checked.clear()
        self._loop.wake()

    async def require_writable(self) -> None:
        """Wait for a check that is due. Raises ServiceError if the log can't be used."""
        await self._checked.wait()
        if self.rejection:
            raise self.rejection

    async def _step(self) -> float:
        if self._checked.is_set() and self.rejection is None:
            return IDLE_SECONDS
        is_probed, is_restarted = self._needs_probe, self._is_restarted
        self._is_due = self._needs_probe = self._is_restarted = False  # may be set during the check
        self._set_rejection(await self._check(is_probed, is_restarted))
        if self.rejection:  # the next check repeats this one
            self._needs_probe = True
            self._is_restarted |= is_restarted
        self._checked.set()  # releases waiting requests, even if checks are scheduled endlessly
        if self._is_due:
            self._checked.clear()
        return self._retry_seconds if self.rejection else IDLE_SECONDS

    async def _check(self, is_probed: bool, is_restarted: bool) -> ServiceError | None:
        try:
            await self._checkup.run(is_probed, is_restarted)
        except StreamUnavailable as error:
            if not isinstance(error, StreamFull | StreamDamaged):
                await self._log.try_ensure()  # creates what was lost; then it is checked again
            return _rejection(error)
        return None

    def _set_rejection(self, rejection: ServiceError | None) -> None:
        if rejection and not self.rejection:
            log.error("chats rejected: %s", rejection)
        if self.rejection and not rejection:
            log.info("chats accepted again, the log takes records")
        self.rejection = rejection


def _rejection(error: StreamUnavailable) -> ServiceError:
    code: ErrorCode = "history_full" if isinstance(error, StreamFull) else "history_unavailable"
    if isinstance(error, StreamDamaged):
        message = (
            f"The store of the session log is damaged ({error}). If two nats-servers use the same"
            " folder, stop one; then restart the other, and all readable records are restored."
        )
    else:
        message = (
            f"The session log takes no records ({error}), so no answer could be stored. Check that"
            " NATS runs with JetStream (nats-server -js) and has free disk space; if that does not"
            " help, restart it."
        )
    return ServiceError(code, message)
