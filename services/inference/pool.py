"""Runs work of milliseconds to seconds in threads, with a queue that tenants share."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from services.contract.errors import ServiceError, shutting_down
from services.inference.engine.scheduling.tenant_shares import TenantShares, has_room
from services.inference.engine.threads import DeepStackThreads

T = TypeVar("T")


@dataclass(eq=False)
class _Item:
    tenant: str
    work: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future, init=False)


class Pool:
    """
    `threads` threads, of which a tenant uses all but one, so that no tenant waits for another's
    work; a single thread is used by all. The next free thread goes to the tenant whose work has
    taken the least time. At most `max_waiting` items wait, and in any case a tenant's share of
    them; without it, callers bound them. Used by one event loop.
    """

    def __init__(self, name: str, threads: int, max_waiting: int | None = None) -> None:
        self._threads = DeepStackThreads(name, threads)
        self._count = threads
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._shares = TenantShares()
        self._waiting: dict[str, deque[_Item]] = {}  # by tenant; no queue is empty
        self._running: Counter[str] = Counter()  # items by tenant
        self._is_closed = False

    async def run(self, tenant: str, work: Callable[..., T], *arguments: object) -> T:
        """
        Return the result of `work`. If the caller is cancelled, work that has not started never
        starts. Raises ServiceError: overloaded if the queue is full, shutting_down if the pool was
        closed before the work started.
        """
        item = _Item(tenant, partial(copy_context().run, work, *arguments))
        self._add(item)
        try:
            result: T = await asyncio.wrap_future(item.future)
            return result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and not task.cancelling():  # the pool was closed
                raise shutting_down() from None
            self._remove(item)
            raise

    async def close(self) -> None:
        """Wait for running work, and cancel the rest."""
        self._is_closed = True
        for queue in self._waiting.values():
            for item in queue:
                item.future.cancel()
        self._waiting.clear()
        await asyncio.to_thread(self._threads.close)

    def _add(self, item: _Item) -> None:
        if self._is_closed:
            raise shutting_down()
        waiting = {tenant: len(queue) for tenant, queue in self._waiting.items()}
        is_bounded = self._max_waiting is not None and sum(self._running.values()) >= self._count
        if is_bounded and not has_room(item.tenant, waiting, self._max_waiting or 0):
            raise ServiceError("overloaded", "The worker's queue is full: try again.")
        self._shares.join(item.tenant, self._waiting)
        self._waiting.setdefault(item.tenant, deque()).append(item)
        self._start()

    def _remove(self, item: _Item) -> None:
        queue = self._waiting.get(item.tenant, deque())
        with suppress(ValueError):
            queue.remove(item)
            if not queue:
                del self._waiting[item.tenant]

    def _start(self) -> None:
        """Hand work to the free threads."""
        while item := self._next():
            self._remove(item)
            if item.future.set_running_or_notify_cancel():
                self._running[item.tenant] += 1
                self._threads.submit(partial(self._compute, item))

    def _next(self) -> _Item | None:
        if sum(self._running.values()) >= self._count:
            return None
        max_running = max(1, self._count - 1)
        able = [tenant for tenant in self._waiting if self._running[tenant] < max_running]
        tenant = min(able, key=self._shares.used, default=None)
        return None if tenant is None else self._waiting[tenant][0]

    def _compute(self, item: _Item) -> None:
        """Runs in a thread."""
        began = time.monotonic()
        try:
            result = item.work()
        except BaseException as error:
            item.future.set_exception(error)
        else:
            item.future.set_result(result)
        seconds = time.monotonic() - began
        self._loop.call_soon_threadsafe(self._on_computed, item.tenant, seconds)

    def _on_computed(self, tenant: str, seconds: float) -> None:
        self._shares.charge(tenant, seconds)
        self._running -= Counter([tenant])  # removes an entry that becomes zero
        self._start()
