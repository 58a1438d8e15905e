"""How a service's process lives: start, serve until a signal, drain with a deadline, exit code."""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import uvloop

from services.runtime import logs
from services.runtime.settings import InvalidSetting

DRAIN_DEADLINE = 30.0  # seconds from the signal to the exit; docker-compose.yml gives a little more

log = logging.getLogger(__name__)


class Process:
    """
    What a service gets to build itself in: resources go on `stack`, and are closed last first.
    """

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self._stop = asyncio.Event()
        self._exit_code = 0

    def stop(self) -> None:
        if self._stop.is_set():
            sys.exit("stopped at once, on the second signal")
        self._stop.set()

    def fail(self, why: str) -> None:
        """Something that the service can't live without has died: drain, and exit with 1."""
        log.critical("%s; the process ends", why)
        self._exit_code = 1
        self._stop.set()

    async def live(self, serve: Callable[["Process"], Awaitable[None]]) -> int:
        """Builds the service, waits for a signal, takes it down again; returns the exit code."""
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, self.stop)
        try:
            if await self._start(serve):
                log.info("up")
                await self._stop.wait()
        except InvalidSetting as error:
            log.critical("%s", error)
            self._exit_code = 2
        finally:
            await self._drain()
        return self._exit_code

    async def _start(self, serve: Callable[["Process"], Awaitable[None]]) -> bool:
        """Whether it got up; False if a signal came first (NATS may be long in coming)."""
        starting = asyncio.ensure_future(serve(self))
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            # nats-py can swallow a cancel: it may even have succeeded
            await asyncio.wait({starting})
            return False
        starting.result()
        return True

    async def _drain(self) -> None:
        log.info("draining")
        try:
            async with asyncio.timeout(DRAIN_DEADLINE):
                await self.stack.aclose()
        except TimeoutError:
            log.error("not drained within %.0f s", DRAIN_DEADLINE)
            self._exit_code = 1
        log.info("bye")


def run(name: str, serve: Callable[[Process], Awaitable[None]]) -> None:
    """
    The main function of every service. Exits 0 after a clean drain, 2 on a bad setting, 1 on
    any other failure.
    """
    logs.configure(name)
    sys.exit(uvloop.run(Process().live(serve)))
