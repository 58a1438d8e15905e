"""A service as a process: start, wait for a signal, drain with a deadline, exit code."""

import asyncio
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import uvloop

from services.runtime import logs, tracing
from services.runtime.settings import (
    InvalidSetting,
    LogSettings,
    ServiceSettings,
    environment,
    load,
    parse,
    warn_of_invalid_lines,
)
from services.runtime.tasks import Stopped, run_until

DRAIN_DEADLINE = 30.0  # seconds from the signal to the exit; docker-compose.yml gives a little more
INVALID_SETTING = 2  # exit code: restarting the process would not help

log = logging.getLogger(__name__)
S = TypeVar("S", bound=ServiceSettings)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Process:
    """The process around a service, which pushes its resources on `stack`: last in, first out."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self._stop = asyncio.Event()
        self._exit_code = 0

    def stop(self) -> None:
        """Drain and exit. The second call exits at once."""
        if self._stop.is_set():
            log.critical("second signal: exiting without draining")
            sys.exit(1)
        self._stop.set()

    def fail(self, reason: str) -> None:
        """Drain and exit with 1, because a part that the service needs has died."""
        log.critical("process failed: %s", reason)
        self._exit_code = 1
        self._stop.set()

    async def run(self, start: Callable[["Process"], Coroutine[Any, Any, None]]) -> int:
        """Start the service, wait for a signal and drain. Return the exit code."""
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, self.stop)
        try:
            await run_until(self._stop.wait(), start(self))
            log.info("started")
            await self._stop.wait()
        except Stopped:
            pass  # a signal came while the service waited for NATS
        except InvalidSetting as error:
            log.critical("%s", error)
            self._exit_code = INVALID_SETTING
        except Exception:
            log.critical("start failed", exc_info=True)
            self._exit_code = 1
        finally:
            await self._drain()
        return self._exit_code

    async def _drain(self) -> None:
        log.info("draining")
        try:
            async with asyncio.timeout(DRAIN_DEADLINE):
                await self.stack.aclose()
        except TimeoutError:
            log.error("drain exceeded its deadline of %.0f s", DRAIN_DEADLINE)
            self._exit_code = 1
        log.info("stopped exit_code=%d", self._exit_code)


def run(name: str, kind: type[S], serve: Callable[[Process, S], Awaitable[None]]) -> None:
    """
    Run a service until a signal ends it: the main function of each service.

    `serve` starts it with its settings. Exits with 0 after a clean drain, with 2 if a setting is
    invalid, with 1 after any other failure.
    """

    async def start(process: Process) -> None:
        settings = load(kind, configure_logs(name))
        endpoint = settings.otel_exporter_otlp_endpoint
        await process.stack.enter_async_context(tracing.exporting(endpoint, name))
        await serve(process, settings)

    logs.configure(name)
    faulthandler.enable()  # a crash within a library would leave nothing in the log
    sys.exit(uvloop.run(Process().run(start)))


def configure_logs(service: str) -> dict[str, str]:
    """Return the environment, after setting up the log as its LOG_FORMAT says."""
    environ = environment()
    logs.configure(service, parse(LogSettings, environ).log_format)
    warn_of_invalid_lines()
    return environ
