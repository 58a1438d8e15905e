"""What benchmarks of floods share."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx


async def repeat(send: Callable[[], Awaitable[str]], clients: int, seconds: float) -> Counter[str]:
    """
    Call `send` in a loop, in `clients` tasks at once, for some seconds. Return how often it gave
    each result, or raised each error of the connection.
    """
    counts = Counter[str]()

    async def send_on() -> None:
        while True:
            try:
                counts[await send()] += 1
            except httpx.TransportError as error:
                counts[type(error).__name__] += 1

    sending = [asyncio.create_task(send_on()) for _ in range(clients)]
    await asyncio.sleep(seconds)
    for task in sending:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*sending)
    return counts
