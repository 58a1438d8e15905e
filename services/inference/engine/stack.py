"""Calls of C code that recurses deeper than a thread's usual stack allows."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_PAGE = 2**16  # bytes; some systems want a multiple of theirs
_ONE = threading.Lock()


def with_stack(size: int, work: Callable[[], T]) -> T:
    """
    What `work` gives, in a thread of its own that has `size` bytes of stack. One at a time, so that
    the memory that several need is never needed at once.
    """
    with _ONE, ThreadPoolExecutor(1) as thread:
        usual = threading.stack_size(-(-size // _PAGE) * _PAGE)
        try:
            working = thread.submit(work)
        finally:
            threading.stack_size(usual)
        return working.result()
