"""Decides whether the log can be used, so that no answer is generated that can't be stored."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager

from services.contract.errors import ErrorCode, ServiceError
from services.history.checkup import Checkup
from services.history.log import Log
from services.runtime.streams import StreamDamaged, StreamFull, StreamState, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop

PROBE_INTERVAL = 1.0  # seconds between two probes of a log that takes no records
RETRY_AFTER = 5.0  # seconds
AT_REST = 3600.0  # seconds; a doubt ends the pause

log = logging.getLogger(__name__)


class Guard:
    """
    Checks the log at start, after a reconnect and when its figures go back, and probes it after a
    failed append. While it can't be used, the check is repeated and chats are refused.
    """

    def __init__(self, history: Log, fail: Fail) -> None:
        self._log = history
        self._loop = SupervisedLoop("log guard", self._step, fail)
        self._checkup = Checkup(history)
        self._last: StreamState | None = None
        self._doubts = 0
        self._is_probed = False
        self._is_restarted = True  # NATS was (re)connected and the log not checked since
        self._settled = asyncio.Event()  # set after the first check
        self.refusal: ServiceError | None = None

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._loop.running(is_cancelled=True)

    @property
    def warning(self) -> str | None:
        return self.refusal.message if self.refusal else self._checkup.warning

    def see(self, state: StreamState) -> None:
        """Schedule a check if the log has lost records or its figures are inconsistent."""
        last, self._last = self._last, state
        if last and (state.last_seq < last.last_seq or state.is_whole < last.is_whole):
            self.doubt(is_probed=False)

    def restarted(self) -> None:
        """Schedule a check: NATS is connected again, maybe with another store."""
        self._is_restarted = True
        self.doubt(is_probed=False)

    def doubt(self, is_probed: bool = True) -> None:
        """Schedule a check, with a probe if `is_probed`: an append failed, here or at a worker."""
        self._doubts += 1
        self._is_probed |= is_probed
        self._settled.clear()
        self._loop.wake()

    async def check(self) -> None:
        """Wait for a check that is due. Raises ServiceError if the log can't be used."""
        await self._settled.wait()
        if self.refusal:
            raise self.refusal

    async def _step(self) -> float:
        if self._settled.is_set() and self.refusal is None:
            return AT_REST
        doubts, is_restarted = self._doubts, self._is_restarted
        self._is_restarted = False  # it may be again, during the check
        self._see(await self._check(is_restarted))
        self._is_restarted |= is_restarted and self.refusal is not None
        self._settled.set()  # whoever waits goes on, also if doubts never end
        if doubts == self._doubts:
            self._is_probed = self.refusal is not None
        else:
            self._settled.clear()
        return PROBE_INTERVAL if self.refusal else AT_REST

    async def _check(self, is_restarted: bool) -> ServiceError | None:
        try:
            await self._checkup.run(self._is_probed, is_restarted)
        except StreamFull as error:
            return _refusal("history_full", error)
        except StreamDamaged as error:
            return _damaged(error)
        except StreamUnavailable as error:
            await self._log.repair()
            return _refusal("history_unavailable", error)
        return None

    def _see(self, refusal: ServiceError | None) -> None:
        if refusal and not self.refusal:
            log.error("%s", refusal)
        if self.refusal and not refusal:
            log.info("the log takes records again")
        self.refusal = refusal


def _refusal(code: ErrorCode, error: StreamUnavailable) -> ServiceError:
    return ServiceError(
        code,
        f"The sessions' log takes no records ({error}), so no answer could be stored. Check that"
        " NATS runs with JetStream (nats-server -js) and has room on its disk, and restart it if"
        " that does not help.",
        RETRY_AFTER,
    )


def _damaged(error: StreamDamaged) -> ServiceError:
    return ServiceError(
        "history_unavailable",
        f"The store of the sessions' log is damaged ({error}). If two nats-servers run in one"
        " folder, stop one of them; then restart the other, and all readable records are rescued.",
        RETRY_AFTER,
    )
