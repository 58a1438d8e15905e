"""
uvicorn within our own process: binding, limits of a connection, shutdown. Signals are handled by
runtime.process.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, cast

import msgspec
import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from services.contract.errors import ErrorCode, ServiceError
from services.edge import errors
from services.edge.limits import EdgeLimits
from services.runtime.settings import InvalidSetting
from services.runtime.supervised import Fail

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none: runtime.process handles them."""
        yield


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with bounds on what a client may send and leave unread."""

    def __init__(self, limits: EdgeLimits, **more: Any) -> None:
        super().__init__(**more)
        self._limits = limits
        self._overhead_left = limits.overhead_bytes
        self._is_rejected = False
        self._unread = 0  # bytes of the answer
        self._stalled_checks = 0
        self._next_check: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """
        Reject a request of endless headers or tiny chunks. Neither llhttp nor uvicorn bounds them,
        and each chunk costs a Python call.
        """
        for start in range(0, len(data), self._limits.slice_bytes):
            if self._is_rejected or self.transport.is_closing():
                return
            part = data[start : start + self._limits.slice_bytes]
            self._overhead_left -= len(part)
            super().data_received(part)
            if self._overhead_left < 0:
                self._reject(431, "payload_too_large", self._too_much_overhead)

    def on_message_begin(self) -> None:
        self._overhead_left = self._limits.overhead_bytes
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._overhead_left += 2 * len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Send the error as JSON like the rest of the API, where uvicorn sends plain text."""
        self._reject(400, "invalid_request", msg)

    @property
    def _too_much_overhead(self) -> str:
        return (
            f"The request has over {self._limits.overhead_bytes:,} bytes besides its body: send"
            " fewer headers, or larger chunks."
        )

    def _reject(self, status: int, code: ErrorCode, message: str) -> None:
        """
        Send an error, and close the connection once the client had time to read it: closing at once
        would reset the connection of a client that is still sending.
        """
        if self._is_rejected or self.transport.is_closing():
            return
        self._is_rejected = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        content = msgspec.json.encode(errors.body(ServiceError(code, message)))
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (len(content), content)
        )
        self.transport.write_eof()
        self.loop.call_later(self._limits.linger_seconds, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._stalled_checks = 0
        self._check_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_checking()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_checking()
        super().connection_lost(exc)

    def _check_later(self) -> None:
        self._stop_checking()
        interval = self._limits.stall_seconds / self._limits.stall_checks
        self._next_check = self.loop.call_later(interval, self._check_progress)

    def _stop_checking(self) -> None:
        if self._next_check is not None:
            self._next_check.cancel()
            self._next_check = None

    def _check_progress(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._stalled_checks = self._stalled_checks + 1 if unread >= self._unread else 0
        self._unread = unread
        if self._stalled_checks < self._limits.stall_checks:
            self._check_later()
            return
        log.warning(
            "disconnected a client that stopped reading address=%s seconds=%.0f unread_bytes=%d",
            self.client and self.client[0],
            self._limits.stall_seconds,
            unread,
        )
        self.transport.abort()


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


def _describe(host: str, port: int, setting: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is taken, perhaps by another `just up`: stop that one, or"
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
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(BoundedProtocol, limits)),
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
        server.should_exit = True
        await task
        if cancelled := server.server_state.tasks:  # they still cancel at their workers
            await asyncio.wait(cancelled, timeout=1)
