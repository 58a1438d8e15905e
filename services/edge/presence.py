"""Whether an HTTP client is still there."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from litestar.types import Receive


async def while_present(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, and cancels it once the client has gone. Raises what the work raises."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.wait((working, gone))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
