import asyncio
import logging

import pytest

from services.runtime.supervised import BackOff, SupervisedLoop

SOON = BackOff(min_seconds=0.001, max_seconds=0.002, max_failures=3)
LONG = 3600.0


class Steps:
    """A step that raises the given errors one at a time, then succeeds."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.count = 0
        self.succeeded = asyncio.Event()
        self.failed: asyncio.Queue[str] = asyncio.Queue()

    async def step(self) -> float:
        self.count += 1
        if self.failures:
            raise self.failures.pop(0)
        self.succeeded.set()
        return LONG

    def loop(self) -> SupervisedLoop:
        return SupervisedLoop("sweeper", self.step, self.failed.put_nowait, SOON)


async def test_failed_step_is_logged_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(ValueError("a"), asyncio.CancelledError("of a future that the step awaited"))
    async with asyncio.timeout(30), steps.loop().running():
        await steps.succeeded.wait()
    assert steps.count == 3 and steps.failed.empty()
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2 and all(text.startswith("sweeper failed") for text in errors)


async def test_repeated_failure_fails_the_process_once() -> None:
    steps = Steps(*(ValueError(str(n)) for n in range(7)))
    async with asyncio.timeout(30), steps.loop().running():
        await steps.succeeded.wait()
    assert steps.failed.get_nowait() == "sweeper failed 3 times in a row"
    assert steps.failed.empty()


async def test_success_resets_the_count_of_failures() -> None:
    steps = Steps(ValueError("a"), ValueError("b"))
    loop = steps.loop()
    async with asyncio.timeout(30), loop.running():
        await steps.succeeded.wait()
        steps.failures = [ValueError("c"), ValueError("d")]
        steps.succeeded.clear()
        loop.wake()
        await steps.succeeded.wait()
    assert steps.failed.empty()


async def test_stop_ends_a_pause_at_once() -> None:
    steps = Steps()
    async with asyncio.timeout(30), steps.loop().running():
        await steps.succeeded.wait()
    assert steps.count == 1


async def test_stop_ends_a_wait_and_lets_the_step_finish() -> None:
    waiting, finished = asyncio.Event(), asyncio.Event()

    async def wait() -> str:
        waiting.set()
        await asyncio.sleep(LONG)
        return "never"

    async def step() -> float:
        assert await loop.unless_stopped(wait()) is None
        await asyncio.sleep(0)
        finished.set()
        return 0

    loop = SupervisedLoop("sweeper", step, pytest.fail)
    async with asyncio.timeout(30), loop.running():
        await waiting.wait()
    assert finished.is_set()


async def test_stop_cancels_a_step_that_may_be_cancelled() -> None:
    began = asyncio.Event()

    async def step() -> float:
        began.set()
        await asyncio.sleep(LONG)
        return 0

    async with (
        asyncio.timeout(30),
        SupervisedLoop("sweeper", step, pytest.fail).running(is_cancelled=True),
    ):
        await began.wait()


async def test_wake_ends_the_pause() -> None:
    steps = Steps()
    loop = steps.loop()
    async with asyncio.timeout(30), loop.running():
        await steps.succeeded.wait()
        steps.succeeded.clear()
        loop.wake()
        await steps.succeeded.wait()
    assert steps.count == 2
