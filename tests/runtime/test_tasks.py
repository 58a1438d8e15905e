import asyncio
from contextlib import suppress

import pytest

from services.runtime.tasks import Stopped, run_until

LONG = 60.0


async def test_run_until_returns_the_result_of_the_work() -> None:
    assert await run_until(asyncio.sleep(LONG), asyncio.sleep(0, "done")) == "done"


async def test_run_until_raises_the_error_of_the_work() -> None:
    async def fail() -> None:
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        await run_until(asyncio.sleep(LONG), fail())


@pytest.mark.parametrize("is_swallowed", [False, True])
async def test_run_until_awaits_the_end_of_cancelled_work(is_swallowed: bool) -> None:
    began, has_ended = asyncio.Event(), False

    async def work() -> str:
        nonlocal has_ended
        began.set()
        try:
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            has_ended = True
            if not is_swallowed:
                raise
        return "late"

    async with asyncio.timeout(30):
        with pytest.raises(Stopped):
            await run_until(began.wait(), work())
    assert has_ended


async def test_cancelled_run_until_cancels_the_work_and_the_wait() -> None:
    cancelled: list[str] = []
    began = asyncio.Barrier(3)

    async def wait(name: str) -> None:
        try:
            await began.wait()
            await asyncio.sleep(LONG)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    async with asyncio.timeout(30):
        task = asyncio.create_task(run_until(wait("stop"), wait("work")))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
    assert sorted(cancelled) == ["stop", "work"]


async def test_run_until_leaves_no_cancellation_behind() -> None:
    task = asyncio.current_task()
    assert task
    with pytest.raises(Stopped):
        await run_until(asyncio.sleep(0), asyncio.sleep(LONG))
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # would raise what is left of a cancellation


async def test_stop_after_the_work_does_not_cancel_the_caller() -> None:
    stop = asyncio.Event()

    async def work() -> str:
        await asyncio.sleep(0)  # so that the wait for the stop has begun
        stop.set()
        return "done"

    assert await run_until(stop.wait(), work()) == "done"
    await asyncio.sleep(0.01)


async def test_cancellation_wins_over_a_simultaneous_stop() -> None:
    began, stop = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        await asyncio.sleep(LONG)

    async with asyncio.timeout(30):
        task = asyncio.create_task(run_until(stop.wait(), work()))
        await began.wait()
        stop.set()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_swallowed_cancellation_is_raised() -> None:
    began = asyncio.Event()

    async def work() -> str:
        began.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(LONG)
        return "late"

    async with asyncio.timeout(30):
        task = asyncio.create_task(run_until(asyncio.sleep(LONG), work()))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_stop_is_told_from_an_earlier_cancellation() -> None:
    async def stopped() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(LONG)  # and goes on, as clean-up does
        with pytest.raises(Stopped):
            await run_until(asyncio.sleep(0), asyncio.sleep(LONG))
        assert await run_until(asyncio.sleep(LONG), asyncio.sleep(0, "done")) == "done"

    async with asyncio.timeout(30):
        task = asyncio.create_task(stopped())
        await asyncio.sleep(0)
        task.cancel()
        await task
