"""Runs work that can be interrupted."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The work was cancelled before it was done."""


async def run_until(stop: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """
    Return the result of `work`. Once `stop` returns, cancel and await the work, and raise Stopped;
    its result is lost if it completes nevertheless, since nats-py may swallow a cancellation.

    The work runs in the caller's task, which is cancelled as `asyncio.timeout` does it: a task of
    its own would delay each request by 0.1 ms.
    """
    task, stopping = _current_task(), asyncio.create_task(stop)
    is_working, is_stopped = True, False

    def interrupt(_: object) -> None:
        nonlocal is_stopped
        if is_working:
            is_stopped = True
            task.cancel()

    stopping.add_done_callback(interrupt)
    try:
        result = await work
    except (Exception, asyncio.CancelledError):
        if is_stopped and task.uncancel() == 0:
            raise Stopped from None
        raise
    finally:
        is_working = False
        stopping.cancel()
    if is_stopped:
        task.uncancel()
        raise Stopped
    return result


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "only a task runs coroutines"
    return task
