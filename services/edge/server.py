"""
uvicorn within our own process: binding, limits of a connection, shutdown. Signals are handled by
runtime.process.
"""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import uvicorn
from litestar.types import ASGIApp

from services.contract.version import COMMAND
from services.edge.http_protocol import BoundedProtocol, WriteBatch
from services.edge.limits import EdgeLimits
from services.runtime.settings import InvalidSetting
from services.runtime.supervised import Fail

RESERVED_FILES = 100
"""For everything but clients' connections."""

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Stop accepting connections, and drain."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """
        Renew the `Date` header once a second until stopped. uvicorn wakes up ten times a second to
        see whether it should stop, a quarter of what an idle edge costs.
        """
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 1)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none: runtime.process handles them."""
        yield


def bind(host: str, port: int, setting: str = "EDGE_PORT") -> socket.socket:
    """
    Reserve the address. Connections are accepted only by `serving`. Raises InvalidSetting, whose
    message names the `setting` of the port.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise InvalidSetting(_describe(host, port, setting, error)) from error
        stack.pop_all()  # the caller closes it
    return listener


def _raise_file_limit() -> int:
    """Let this process open as many files as it may, and return how many: each socket is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def _describe(host: str, port: int, setting: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is taken, perhaps by another `{COMMAND} up`: stop that one, or"
            f" choose another port with {setting}."
        )
    return f"EDGE_HOST={host!r} with {setting}={port} can't be used: {error.strerror}."


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp,
    listener: socket.socket,
    draining: asyncio.Event,
    fail: Fail,
    limits: EdgeLimits,
) -> AsyncIterator[None]:
    """
    Serve until the body ends; call `fail` if the server ends earlier. Then drain:

    1. set `draining` and serve for `handover_seconds` more;
    2. stop accepting connections, and wait `drain_seconds` for open streams;
    3. cancel the streams that are left.
    """
    most = min(limits.max_connections, _raise_file_limit() - RESERVED_FILES)
    limits = replace(limits, max_connections=most)
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(BoundedProtocol, limits, WriteBatch())),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=limits.drain_seconds,
    )
    server = Server(config)
    # inherited by accepted connections: the kernel would buffer megabytes for each
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_buffer_bytes)
    listener.listen(config.backlog)
    task = asyncio.create_task(server.serve([listener]))

    def on_end(_: asyncio.Task[None]) -> None:
        if not server.should_exit:
            fail("the HTTP server ended")

    task.add_done_callback(on_end)
    try:
        yield
    finally:
        draining.set()
        await asyncio.sleep(limits.handover_seconds)
        server.stop()
        await task
        if cancelled := server.server_state.tasks:  # they still cancel at their workers
            await asyncio.wait(cancelled, timeout=1)
