"""Work in threads: results, errors, rejection, cancellation and closing."""

import asyncio
import threading
from contextvars import ContextVar

import pytest

from services.contract.errors import ServiceError
from services.inference.pool import Pool


class Gate:
    """Work that runs until the gate is opened."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self._may_end = threading.Event()
        self._loop = asyncio.get_running_loop()

    def work(self) -> str:
        self._loop.call_soon_threadsafe(self.started.set)
        assert self._may_end.wait(10)
        return "done"

    def open(self) -> None:
        self._may_end.set()


async def test_work_returns_its_result_in_the_callers_context() -> None:
    pool, name = Pool("test", 1, 1), ContextVar("name", default="")
    name.set("caller")
    assert await pool.run(lambda a: (a, name.get()), 7) == (7, "caller")
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0)
    await pool.close()


async def test_full_queue_rejects_with_retry_after() -> None:
    pool, gate = Pool("test", 1, 1), Gate()
    running, waiting = (asyncio.create_task(pool.run(gate.work)) for _ in range(2))
    await gate.started.wait()
    with pytest.raises(ServiceError, match="queue is full") as caught:
        await pool.run(gate.work)
    assert caught.value.code == "overloaded" and caught.value.retry_after
    gate.open()
    assert await running == await waiting == "done"
    for _ in range(5):
        assert await pool.run(lambda: 1) == 1
    await pool.close()


async def test_cancelled_work_never_starts() -> None:
    pool, gate = Pool("test", 1, 1), Gate()
    started: list[int] = []
    running = asyncio.create_task(pool.run(gate.work))
    await gate.started.wait()
    abandoned = asyncio.create_task(pool.run(started.append, 1))
    await asyncio.sleep(0)
    abandoned.cancel()
    await asyncio.wait([abandoned])
    next_one = asyncio.create_task(pool.run(started.append, 2))
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(running, next_one)
    assert started == [2]
    await pool.close()


async def test_result_of_cancelled_work_is_discarded() -> None:
    pool, gate = Pool("test", 1, 0), Gate()
    discarded: list[str] = []
    abandoned = asyncio.create_task(pool.run(gate.work, discard=discarded.append))
    await gate.started.wait()
    abandoned.cancel()
    await asyncio.wait([abandoned])
    gate.open()
    await pool.close()
    assert discarded == ["done"]


async def test_waiting_work_of_a_closed_pool_fails() -> None:
    pool, gate = Pool("test", 1, 1), Gate()
    running, waiting = (asyncio.create_task(pool.run(gate.work)) for _ in range(2))
    await gate.started.wait()
    closing = asyncio.create_task(pool.close())
    with pytest.raises(ServiceError, match="shutting down"):
        await waiting
    gate.open()
    await closing
    assert await running == "done"
