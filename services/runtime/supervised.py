"""Loops that live as long as their process: retried after a failure, stopped at once."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from services.runtime.tasks import Stopped, run_until

log = logging.getLogger(__name__)

T = TypeVar("T")
Step = Callable[[], Awaitable[float]]
"""One iteration of a loop; returns the seconds until the next one."""
Fail = Callable[[str], None]
"""Ends the process with an error, so that its orchestrator restarts it (`Process.fail`)."""


@dataclass(frozen=True)
class BackOff:
    """
    Retry a failed step after `min_seconds`, doubled each time up to `max_seconds`. After
    `max_failures` in a row, fail the process.
    """

    min_seconds: float = 0.5
    max_seconds: float = 30.0
    max_failures: int = 10

    def seconds(self, failures: int) -> float:
        return min(self.min_seconds * 2.0 ** (failures - 1), self.max_seconds)


class SupervisedLoop:
    """Call `step` repeatedly until the loop is stopped. `name` is for log lines."""

    def __init__(self, name: str, step: Step, fail: Fail, back_off: BackOff = BackOff()) -> None:
        self._name = name
        self._step = step
        self._fail = fail
        self._back_off = back_off
        self._failures = 0
        self._stopping = asyncio.Event()
        self._woken = asyncio.Event()

    @asynccontextmanager
    async def running(self, is_cancelled: bool = False) -> AsyncIterator[None]:
        """
        Run the loop during the body. Then await the step in progress, or cancel it if
        `is_cancelled`.
        """
        task = asyncio.create_task(self._run(), name=self._name)
        try:
            yield
        finally:
            self._stopping.set()
            self.wake()
            if is_cancelled:
                task.cancel()
            await asyncio.wait({task})

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Await `work`, which only waits for something to do. Return None if stopped first."""
        with suppress(Stopped):
            return await run_until(self._stopping.wait(), work)
        return None

    def wake(self) -> None:
        """End the pause before the next step."""
        self._woken.set()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                pause = await self._step()
                self._failures = 0
            except asyncio.CancelledError as error:
                if self._is_cancelled():
                    raise
                pause = self._failed(error)  # only a task that the step awaited was cancelled
            except Exception as error:
                pause = self._failed(error)
            await self._pause(pause)

    def _is_cancelled(self) -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def _failed(self, error: BaseException) -> float:
        self._failures += 1
        pause = self._back_off.seconds(self._failures)
        log.error("%s failed, retrying in %.1f s", self._name, pause, exc_info=error)
        if self._failures == self._back_off.max_failures:
            self._fail(f"{self._name} failed {self._failures} times in a row")
        return pause

    async def _pause(self, seconds: float) -> None:
        if self._stopping.is_set():
            return
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
