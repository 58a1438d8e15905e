"""Runs work that can be interrupted."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The work was cancelled before it was done."""


async def run_until(stop: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """
    Return the result of `work`. Once `stop` returns, cancel and await the work, and raise Stopped;
    its result is lost if it completes nevertheless, since nats-py may swallow a cancellation.

    The work runs in the caller's task, as under `asyncio.timeout`: a task of its own would add 0.1
    ms to each request.
    """
    task, stopping = asyncio.current_task(), asyncio.create_task(stop)
    assert task is not None, "only a task runs coroutines"
    cancellations = task.cancelling()
    try:
        async with asyncio.timeout(None) as limit:
            stopping.add_done_callback(partial(_expire, limit))
            result = await work
    except TimeoutError:
        if not limit.expired():
            raise
    finally:
        stopping.cancel()
    if limit.expired():
        raise Stopped
    if task.cancelling() > cancellations:  # which the work has swallowed
        raise asyncio.CancelledError
    return result


def _expire(limit: asyncio.Timeout, _: object) -> None:
    with suppress(RuntimeError):  # the work has ended
        limit.reschedule(asyncio.get_running_loop().time())
