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
    """
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop)
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Stopped
        return working.result()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.wait((working, stopping))
