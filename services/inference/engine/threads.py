"""Permanent threads with a stack as deep as their work needs."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_PAGE = 2**16  # bytes; some systems want a multiple of theirs


class DeepStackThreads:
    """
    `count` threads, all started here, so that no request has to start one. Each has `stack` bytes
    of stack; 0 is the system's default.
    """

    def __init__(self, name: str, count: int, stack: int = 0) -> None:
        self._executor = ThreadPoolExecutor(count, name)
        all_started = threading.Barrier(count + 1)
        usual = threading.stack_size(-(-stack // _PAGE) * _PAGE)
        try:
            for _ in range(count):
                self._executor.submit(all_started.wait)
        finally:
            threading.stack_size(usual)
        all_started.wait()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        return self._executor.submit(work)

    def close(self) -> None:
        """Wait for running work, and cancel the rest."""
        self._executor.shutdown(cancel_futures=True)
