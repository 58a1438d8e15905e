"""Permanent threads with a stack of a given size."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_PAGE_BYTES = 2**16  # some systems accept only multiples of their page size


class DeepStackThreads:
    """
    `count` threads that are all started by the constructor, so that no request has to wait for one.
    Each has `stack_bytes` of stack; 0 is the system's default.
    """

    def __init__(self, name: str, count: int, stack_bytes: int = 0) -> None:
        self._executor = ThreadPoolExecutor(count, name)
        all_started = threading.Barrier(count + 1)
        default = threading.stack_size(-(-stack_bytes // _PAGE_BYTES) * _PAGE_BYTES)
        try:
            for _ in range(count):
                self._executor.submit(all_started.wait)
        finally:
            threading.stack_size(default)
        all_started.wait()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        return self._executor.submit(work)

    def close(self) -> None:
        """Wait for running work, and cancel the rest."""
        self._executor.shutdown(cancel_futures=True)
