"""Work in threads: results, errors, rejection, cancellation and closing."""

import asyncio
import threading
import time
from contextvars import ContextVar
from typing import Any

import pytest

from services.contract.errors import ServiceError
from services.inference.pool import Pool

ANN, BOB = "ann", "bob"


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
    assert await pool.run(ANN, lambda a: (a, name.get()), 7) == (7, "caller")
    with pytest.raises(ZeroDivisionError):
        await pool.run(ANN, lambda: 1 // 0)
    await pool.close()


async def test_full_queue_rejects_with_retry_after() -> None:
    pool, gate = Pool("test", 1, 1), Gate()
    running, waiting = (asyncio.create_task(pool.run(ANN, gate.work)) for _ in range(2))
    await gate.started.wait()
    with pytest.raises(ServiceError, match="queue is full") as caught:
        await pool.run(ANN, gate.work)
    assert caught.value.code == "overloaded" and caught.value.retry_after
    gate.open()
    assert await running == await waiting == "done"
    for _ in range(5):
        assert await pool.run(ANN, lambda: 1) == 1
    await pool.close()


async def test_cancelled_work_never_starts() -> None:
    pool, gate = Pool("test", 1, 1), Gate()
    started: list[int] = []
    running = asyncio.create_task(pool.run(ANN, gate.work))
    await gate.started.wait()
    abandoned = asyncio.create_task(pool.run(ANN, started.append, 1))
    await asyncio.sleep(0)
    abandoned.cancel()
    await asyncio.wait([abandoned])
    next_one = asyncio.create_task(pool.run(ANN, started.append, 2))
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(running, next_one)
    assert started == [2]
    await pool.close()


async def test_waiting_work_of_a_closed_pool_fails() -> None:
    pool, gate = Pool("test", 1, 1), Gate()
    running, waiting = (asyncio.create_task(pool.run(ANN, gate.work)) for _ in range(2))
    await gate.started.wait()
    closing = asyncio.create_task(pool.close())
    with pytest.raises(ServiceError, match="shutting down"):
        await waiting
    gate.open()
    await closing
    assert await running == "done"


async def test_another_tenant_finds_a_thread_free() -> None:
    pool, gate = Pool("test", 2), Gate()
    flood = [asyncio.create_task(pool.run(ANN, gate.work)) for _ in range(5)]
    await gate.started.wait()
    assert await pool.run(BOB, lambda: 1) == 1
    assert not any(task.done() for task in flood)
    gate.open()
    assert await asyncio.gather(*flood) == ["done"] * 5
    await pool.close()


async def test_next_thread_goes_to_the_tenant_with_least_time() -> None:
    pool, gate = Pool("test", 1), Gate()
    order: list[str] = []
    running = asyncio.create_task(pool.run(ANN, gate.work))
    await gate.started.wait()
    waiting = [
        asyncio.create_task(pool.run(tenant, order.append, tenant))
        for tenant in (ANN, ANN, ANN, BOB)
    ]
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(running, *waiting)
    assert order[0] == BOB
    await pool.close()


async def test_tenant_saves_nothing_while_none_of_its_work_waits() -> None:
    pool, first, second, order = Pool("test", 1), Gate(), Gate(), list[str]()
    running: list[asyncio.Task[Any]] = [asyncio.create_task(pool.run(ANN, first.work))]
    await first.started.wait()
    running.append(asyncio.create_task(pool.run(BOB, time.sleep, 0.05)))
    running.append(asyncio.create_task(pool.run(ANN, second.work)))
    await asyncio.sleep(0)
    first.open()
    await second.started.wait()  # bob has used more than ann, who has nothing that waits
    flood = [
        asyncio.create_task(pool.run(tenant, order.append, tenant))
        for tenant in (BOB, ANN, ANN, ANN)
    ]
    await asyncio.sleep(0)
    second.open()
    await asyncio.gather(*running, *flood)
    assert order[0] == BOB
    await pool.close()


async def test_full_queue_has_room_for_another_tenant() -> None:
    pool, gate = Pool("test", 1, 4), Gate()
    flood = [asyncio.create_task(pool.run(ANN, gate.work)) for _ in range(5)]
    await gate.started.wait()
    with pytest.raises(ServiceError, match="queue is full"):
        await pool.run(ANN, gate.work)
    others = [asyncio.create_task(pool.run(BOB, gate.work)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ServiceError, match="queue is full"):
        await pool.run(BOB, gate.work)
    gate.open()
    assert await asyncio.gather(*flood, *others) == ["done"] * 7
    await pool.close()


async def test_cancelled_work_leaves_its_place_to_others() -> None:
    pool, gate = Pool("test", 1, 1), Gate()
    running, waiting = (asyncio.create_task(pool.run(ANN, gate.work)) for _ in range(2))
    await gate.started.wait()
    waiting.cancel()
    await asyncio.wait([waiting])
    next_one = asyncio.create_task(pool.run(ANN, lambda: 1))
    await asyncio.sleep(0)
    gate.open()
    assert (await running, await next_one) == ("done", 1)
    await pool.close()
