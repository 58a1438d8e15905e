"""uvicorn inside our own process: it serves and drains, and leaves the signals alone."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import msgspec
import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from services.contract.errors import ErrorCode, ServiceError
from services.edge import errors
from services.runtime.bus import TASKS_DEADLINE
from services.runtime.process import DRAIN_DEADLINE
from services.runtime.settings import InvalidSetting
from services.runtime.supervised import Fail

# All in seconds. What is left of the drain is for the bus.
LEAVE_AFTER = (
    1.0  # in which it still serves, and says that it leaves: who routes can look elsewhere
)
STREAMS_DEADLINE = DRAIN_DEADLINE - TASKS_DEADLINE - LEAVE_AFTER - 2

KEEP_ALIVE = 75  # seconds; longer than proxies keep theirs, so that none asks on a closed one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """
    Limits of one connection. The headers, trailers and chunk framing of a request may take
    `overhead_bytes` and as many bytes as its body.
    """

    overhead_bytes: int = 64 * 1024
    slice_bytes: int = 64 * 1024  # parsed at once, before other connections have a turn
    send_buffer_bytes: int = 128 * 1024  # in the kernel, which reports progress in thirds of it
    stall_seconds: float = 30.0  # without progress, after which a client is disconnected
    checks: int = 6  # of progress in that time
    linger_seconds: float = 2.0  # for a client that is still sending to receive its error


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # runtime.process owns them


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with bounds on what a client may send and leave unread."""

    def __init__(self, limits: Limits, **more: Any) -> None:
        super().__init__(**more)
        self._limits = limits
        self._overhead_left = limits.overhead_bytes
        self._has_refused = False
        self._unread = 0  # bytes of the answer
        self._stalled_checks = 0
        self._next_check: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """
        Reject a request of endless headers or tiny chunks. Neither llhttp nor uvicorn bounds them,
        and each chunk costs a Python call.
        """
        for start in range(0, len(data), self._limits.slice_bytes):
            if self._has_refused or self.transport.is_closing():
                return
            part = data[start : start + self._limits.slice_bytes]
            self._overhead_left -= len(part)
            super().data_received(part)
            if self._overhead_left < 0:
                self._refuse(431, "payload_too_large", self._too_much_overhead)

    def on_message_begin(self) -> None:
        self._overhead_left = self._limits.overhead_bytes
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._overhead_left += 2 * len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Send the error as JSON, like the rest of the API; uvicorn sends plain text."""
        self._refuse(400, "invalid_request", msg)

    @property
    def _too_much_overhead(self) -> str:
        return (
            f"The request has over {self._limits.overhead_bytes:,} bytes besides its body: send"
            " fewer headers, or larger chunks."
        )

    def _refuse(self, status: int, code: ErrorCode, message: str) -> None:
        """
        Send an error, and close after the client had time to read it: closing at once would reset
        the connection of a client that is still sending.
        """
        if self._has_refused or self.transport.is_closing():
            return
        self._has_refused = True
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
        interval = self._limits.stall_seconds / self._limits.checks
        self._next_check = self.loop.call_later(interval, self._check_progress)

    def _stop_checking(self) -> None:
        if self._next_check is not None:
            self._next_check.cancel()
            self._next_check = None

    def _check_progress(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._stalled_checks = self._stalled_checks + 1 if unread >= self._unread else 0
        self._unread = unread
        if self._stalled_checks < self._limits.checks:
            self._check_later()
            return
        log.warning(
            "dropped the client %s: it read nothing for %.0f s, unread bytes=%d",
            self.client and self.client[0],
            self._limits.stall_seconds,
            unread,
        )
        self.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """Takes the address before anything else is started; nobody is let in yet."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise InvalidSetting(_why(host, port, error)) from error
        stack.pop_all()  # the caller's from here on
    return listener


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is taken, perhaps by another `just up`: stop that one, or"
            " choose another port with EDGE_PORT."
        )
    return f"EDGE_HOST={host!r} with EDGE_PORT={port} can't be used: {error.strerror}."


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp,
    listener: socket.socket,
    leaving: asyncio.Event,
    fail: Fail,
    limits: Limits = Limits(),
) -> AsyncIterator[None]:
    """
    Serve until the body ends; call `fail` if the server ends earlier. At the end set `leaving`,
    then stop accepting connections, and wait for open streams; those that take too long are
    cancelled.
    """
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(BoundedProtocol, limits)),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(STREAMS_DEADLINE),
    )
    server = Server(config)
    # inherited by accepted connections: the kernel would buffer megabytes for each
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_buffer_bytes)
    listener.listen(config.backlog)
    serving = asyncio.create_task(server.serve([listener]))

    def ended(_: asyncio.Task[None]) -> None:
        if not server.should_exit:
            fail("the HTTP server ended")

    serving.add_done_callback(ended)
    try:
        yield
    finally:
        leaving.set()
        await asyncio.sleep(LEAVE_AFTER)
        server.should_exit = True
        await serving
        if late := server.server_state.tasks:  # cancelled, and now telling their workers so
            await asyncio.wait(late, timeout=1)
