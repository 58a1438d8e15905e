"""A supervised loop that processes the log's records in batches."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from services.contract import subjects
from services.history.limits import HistoryLimits
from services.runtime.consumers import PendingMessage
from services.runtime.streams import Conflict, StoredMessage, StreamUnavailable
from services.runtime.supervised import Fail, SupervisedLoop


class LogConsumer(ABC):
    """
    Fetches batches of records and acknowledges them once they are processed.

    A batch that can't be processed now is given back, and `recover` runs before the next one. Any
    number of these run at once, in any number of processes, so processing must be idempotent.
    """

    temporary_errors: tuple[type[Exception], ...] = (StreamUnavailable, Conflict)
    """Errors after which the same batch is processed again."""

    def __init__(
        self, name: str, fail: Fail, limits: HistoryLimits, batch: int, rest: float = 0.0
    ) -> None:
        """`rest` is the pause after a full batch, as a multiple of its duration."""
        self._limits = limits
        self._batch = batch
        self._rest = rest
        self._loop = SupervisedLoop(name, self._step, fail)

    def running(self) -> AbstractAsyncContextManager[None]:
        """Run during the body; stops between two batches."""
        return self._loop.running()

    @abstractmethod
    async def fetch(self, batch: int, timeout: float) -> Sequence[PendingMessage]:
        """Return at most `batch` messages; none if none came in `timeout` seconds."""

    @abstractmethod
    async def process(self, records: Sequence[StoredMessage]) -> None:
        """Raises one of `temporary_errors` if it must be repeated."""

    @abstractmethod
    async def recover(self, error: Exception) -> None:
        """Create again what may be lost in JetStream."""

    async def _step(self) -> float:
        try:
            fetch = self.fetch(self._batch, self._limits.fetch_seconds)
            batch = await self._loop.unless_stopped(fetch) or []
            began = time.monotonic()
            if batch:
                await self._process(batch)
        except self.temporary_errors as error:
            await self.recover(error)
            return self._limits.retry_seconds
        if len(batch) < self._batch:
            return self._limits.batch_pause_seconds
        return self._rest * (time.monotonic() - began)

    async def _process(self, batch: Sequence[PendingMessage]) -> None:
        records = [pending.stored for pending in batch]
        try:
            # a probe of the log may be delivered before it is deleted
            await self.process([r for r in records if r.subject != subjects.HISTORY_PROBE])
        except self.temporary_errors:
            for pending in batch:
                await pending.give_back()
            raise
        for pending in batch:
            await pending.ack()
