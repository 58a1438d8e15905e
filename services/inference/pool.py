"""Runs work of milliseconds to seconds in threads, with a bounded queue."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from services.contract.errors import ServiceError, shutting_down
from services.inference.engine.threads import DeepStackThreads

T = TypeVar("T")


class Pool:
    """`threads` threads, and a queue of at most `queue` items."""

    def __init__(self, name: str, threads: int, queue: int) -> None:
        self._threads = DeepStackThreads(name, threads)
        self._free = threading.BoundedSemaphore(threads + queue)

    async def run(
        self, work: Callable[..., T], *arguments: object, discard: Callable[[T], None] | None = None
    ) -> T:
        """
        Return the result of `work`. If the caller is cancelled, work that has not started never
        starts, and `discard` gets the result of work that has. Raises ServiceError: overloaded if
        the queue is full, shutting_down if the pool was closed before the work started.
        """
        if not self._free.acquire(blocking=False):
            raise ServiceError("overloaded", "The worker's queue is full: try again.")
        future = self._threads.submit(partial(copy_context().run, work, *arguments))
        future.add_done_callback(lambda _: self._free.release())
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and not task.cancelling():  # the pool was closed
                raise shutting_down() from None
            if discard and not future.cancelled():
                future.add_done_callback(partial(_discard, discard))
            raise

    async def close(self) -> None:
        """Wait for running work, and cancel the rest."""
        await asyncio.to_thread(self._threads.close)


def _discard(discard: Callable[[T], None], future: Future[T]) -> None:
    if future.exception() is None:
        discard(future.result())
