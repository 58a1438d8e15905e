"""Whether the log takes records, so that no answer is generated that could not be stored."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager

from services.contract.errors import ErrorCode, ServiceError
from services.history.log import Log
from services.runtime.streams import NoRoom, StreamUnavailable
from services.runtime.supervised import Fail, Loop

PROBE_INTERVAL = 1.0  # seconds between two probes of a log that takes nothing
RETRY_AFTER = 5.0  # seconds
AT_REST = 3600.0  # seconds; a doubt ends them

log = logging.getLogger(__name__)


class Guard:
    """
    Probes the log once an append has failed, and again until it takes records. In the meantime
    chats are refused.
    """

    def __init__(self, history: Log, fail: Fail) -> None:
        self._log = history
        self._loop = Loop("log guard", self._step, fail)
        self._doubts = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self.refusal: ServiceError | None = None

    def running(self) -> AbstractAsyncContextManager[None]:
        return self._loop.running(is_cancelled=True)

    def doubt(self) -> None:
        """An append has failed, here or at a worker."""
        self._doubts += 1
        self._settled.clear()
        self._loop.hurry()

    async def check(self) -> None:
        """Raises ServiceError if the log takes no records; waits for a probe that is due."""
        await self._settled.wait()
        if self.refusal:
            raise self.refusal

    async def _step(self) -> float:
        if self._settled.is_set() and self.refusal is None:
            return AT_REST
        doubts = self._doubts
        self._see(await self._probe())
        if doubts == self._doubts:
            self._settled.set()
        return PROBE_INTERVAL if self.refusal else AT_REST

    async def _probe(self) -> ServiceError | None:
        try:
            await self._log.probe()
        except NoRoom as error:
            return _refusal("history_full", error)
        except StreamUnavailable as error:
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
        f"The sessions' log takes no records ({error}), so that no answer could be stored: make"
        " room on the disk of nats-server, and restart it if it does not recover by itself.",
        RETRY_AFTER,
    )
