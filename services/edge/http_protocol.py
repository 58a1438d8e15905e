"""One HTTP connection: uvicorn's protocol, with bounds that uvicorn does not have."""

import asyncio
import logging
import time
import weakref
from typing import Any, cast

import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from services.contract.errors import ErrorCode, ServiceError
from services.edge import errors
from services.edge.access_log import STATUS
from services.edge.limits import EdgeLimits
from services.runtime.logs import RateLimitedLog

INVALID = (400, 413, 421, 422)
"""Statuses of requests that can't succeed when they are repeated."""

WRITER = "writer"
"""Key in the scope's state of the request's BodyWriter."""

MAX_HELD_BYTES = 64 * 1024
"""Maximum bytes of a response that wait to be sent together with what follows."""

log = logging.getLogger(__name__)
_full = RateLimitedLog(log)


class HeldFlow(FlowControl):
    """Flow control whose reading can be held: then the app's wish to read has no effect."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._is_held = False
        self.pauses = 0  # since the start

    def hold(self) -> None:
        self._is_held = True
        self.pause_reading()

    def release(self) -> None:
        """Resume reading if it was held. A pause for another reason stays."""
        if self._is_held:
            self._is_held = False
            self.resume_reading()

    def pause_reading(self) -> None:
        self.pauses += 1
        super().pause_reading()

    def resume_reading(self) -> None:
        if not self._is_held:
            super().resume_reading()


class ResponseTransport:
    """
    The transport of one response. What is written before the event loop turns to something else is
    sent together: the head of a response and its first events wake the client once.
    """

    __slots__ = ("_batch", "_bytes", "_parts", "_transport")

    def __init__(self, transport: asyncio.Transport, batch: "WriteBatch") -> None:
        self._transport = transport
        self._batch = batch
        self._parts: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._batch.add(self)
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes > MAX_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is written."""
        data = b"".join(self._parts)
        self._parts.clear()
        self._bytes = 0
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class WriteBatch:
    """
    Sends what all responses write, once the running callback of the event loop has ended.

    A write goes through the kernel to the socket of the client, and leaves little of Python in the
    CPU's cache. So the events that arrived together are all processed first, and written then
    (docs/decisions/0095).
    """

    def __init__(self) -> None:
        self._waiting: list[ResponseTransport] = []

    def add(self, response: ResponseTransport) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(response)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for response in waiting:
            try:
                response.flush()
            except Exception:  # which must not cost other clients their chunks
                log.exception("a chunk could not be written")
                response.abort()


class BodyWriter:
    """
    Writes parts of a streamed body past all that is between the app and the transport: nothing in
    between changes the body of a stream, but each layer costs microseconds an event.

    It holds uvicorn's cycle weakly: the cycle's scope refers to the writer, and only the garbage
    collector, which runs seldom, would free a request whose objects refer to each other.
    """

    __slots__ = ("_cycle", "_transport", "is_open")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.is_open = False
        """Whether the response has begun and not ended, and its client reads fast enough."""
        self._cycle = weakref.ref(cycle)
        self._transport: ResponseTransport | None = None

    def open(self) -> None:
        """Allow writing, if the response has begun, consists of chunks and has not ended."""
        cycle = self._cycle()
        if cycle is None or not cycle.chunked_encoding or cycle.response_complete:
            return
        if not cycle.flow.write_paused and not cycle.disconnected:
            self.is_open, self._transport = True, cast(ResponseTransport, cycle.transport)

    def close(self) -> None:
        """End or interrupt writing."""
        self.is_open, self._transport = False, None

    def write(self, data: bytes) -> None:
        """Write a chunk, which is not empty, to an open response."""
        assert self._transport is not None
        self._transport.write(_chunk(data))


def _chunk(data: bytes) -> bytes:
    """Return a chunk of a body (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class BoundedProtocol(HttpToolsProtocol):
    """
    uvicorn's HTTP protocol, with bounds on what a client may send and leave unread, how slowly it
    may send, and how many connections there are.

    A connection has one request at a time: what follows waits unparsed, and nothing more is read.
    uvicorn would go on reading, and keep all pipelined requests in memory. A pause follows each
    response before which the next request came, and each invalid request after several in a row.
    """

    flow: HeldFlow

    def __init__(self, limits: EdgeLimits, batch: WriteBatch, **more: Any) -> None:
        super().__init__(**more)
        self._limits = limits
        self._batch = batch
        self._overhead_left = limits.overhead_bytes
        self._is_rejected = False
        self._unparsed, self._parsed = b"", 0  # bytes, and how many of them were parsed
        self._invalid_requests = 0  # in a row
        self._pauses = 0  # of reading, until the last check
        self._answered: RequestResponseCycle | None = None  # or being answered
        self._writer: BodyWriter | None = None  # of that answer
        self._response: ResponseTransport | None = None  # of that answer
        self._began_at = 0.0  # of that answer, in monotonic time
        self._is_waiting = False  # before the next request is parsed
        self._next_pause = 0.0  # in seconds, before the next request of `pipeline` is answered
        self._is_receiving = False  # a request that is not complete yet
        self._is_in_body = False
        self._received = 0  # bytes of it since the last check
        self._next_receive_check: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes of the answer
        self._stalled_checks = 0
        self._next_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = HeldFlow(transport)
        # else a client that never asks would stay for ever
        self.timeout_keep_alive_task = self.loop.call_later(
            self._limits.keep_alive_seconds, self.timeout_keep_alive_handler
        )
        if len(self.connections) > self._limits.max_connections and not self._close_an_idle_one():
            _full.warning("no room for another connection connections=%d", len(self.connections))
            self._reject(503, "overloaded", "All connections are in use: try again.")

    @property
    def is_idle(self) -> bool:
        """Whether no request is received or answered."""
        return not self._is_receiving and (self.cycle is None or self.cycle.response_complete)

    def _close_an_idle_one(self) -> bool:
        """Close another connection that is idle. Return whether there was one."""
        others = (cast(BoundedProtocol, other) for other in self.connections if other is not self)
        idle = next((other for other in others if other.is_idle), None)
        if idle is not None:
            self.connections.discard(idle)
            idle.transport.abort()  # a close would wait for a client that does not read
        return idle is not None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(self._limits.linger_seconds, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._is_rejected:  # the rest is dropped, but not as fast as it comes
            self._pause_reading(self._limits.drop_pause_seconds)
            return
        self._received += len(data)
        self._unparsed = self._unparsed[self._parsed :] + data
        self._parsed = 0
        if self._has_to_wait:  # some clients send a line break after a body
            self._unparsed = self._unparsed.lstrip(b"\r\n")
        self._parse()

    def _parse(self) -> None:
        """
        Parse what was received, until a request waits for its response. Reject endless headers or
        tiny chunks: neither llhttp nor uvicorn bounds them, and each one costs a Python call. A
        body is parsed in parts of at most the overhead that is left, so that it can't be exceeded
        by far before it is checked.
        """
        while self._parsed < len(self._unparsed) and not self._has_to_wait:
            part_of_body = min(self._limits.slice_bytes, max(1, self._overhead_left))
            size = part_of_body if self._is_in_body else self._limits.head_slice_bytes
            part = self._unparsed[self._parsed : self._parsed + size]
            self._parsed += len(part)
            self._overhead_left -= len(part)
            super().data_received(part)
            if self._overhead_left < 0:
                self._reject(431, "payload_too_large", self._too_much_overhead)
            if self._is_rejected or self.transport.is_closing():
                return
        if self._parsed < len(self._unparsed):
            self.flow.hold()
        elif not self._is_waiting:
            self.flow.release()
        if self._is_receiving and self._next_receive_check is None:
            self._received = 0
            self._check_receiving_later()

    @property
    def _has_to_wait(self) -> bool:
        """Whether the next request can't be parsed yet."""
        if self._is_waiting or self.pipeline:
            return True
        is_answering = self.cycle is not None and not self.cycle.response_complete
        return is_answering and not self._is_receiving

    def _pause_reading(self, seconds: float) -> None:
        """Read and parse nothing for a while."""
        self._is_waiting = True
        self.flow.hold()
        self.loop.call_later(seconds, self._end_pause)

    def _end_pause(self) -> None:
        self._is_waiting = False
        self._go_on()

    def _go_on(self) -> None:
        if self.transport.is_closing() or self.parser is None:
            return
        if self._is_rejected:
            self.flow.release()
        else:
            self._parse()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self._next_pause:
            self.loop.call_later(self._next_pause, self._answer, cycle, app)
            self._next_pause = 0.0
        else:
            self._answer(cycle, app)

    def _answer(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not self.transport.is_closing():
            cycle.scope["state"][WRITER] = self._writer = BodyWriter(cycle)
            self._answered, self._began_at = cycle, time.monotonic()
            self._response = ResponseTransport(self.transport, self._batch)
            cycle.transport = self._response  # type: ignore[assignment]
            super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Answer the next request, perhaps after a pause."""
        self._close_writer()
        self._flush_response()  # before the next one, or the end of the connection
        status = self._answered.scope["state"].get(STATUS) if self._answered else None
        self._invalid_requests = self._invalid_requests + 1 if status in INVALID else 0
        pause = self._pause_after_response()
        if self.pipeline:
            self._next_pause = pause
        elif pause:
            self._pause_reading(pause)
        super().on_response_complete()

    def _pause_after_response(self) -> float:
        limits = self._limits
        if self._invalid_requests > limits.invalid_requests:
            pause = limits.invalid_pause * (time.monotonic() - self._began_at)
            return min(pause, limits.max_invalid_pause_seconds)
        has_next = self.pipeline or self._parsed < len(self._unparsed)
        return limits.pipeline_pause_seconds if has_next else 0.0

    def on_message_begin(self) -> None:
        self._overhead_left = self._limits.overhead_bytes
        self._is_receiving, self._is_in_body = True, False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) < self._limits.max_headers:
            super().on_header(name, value)
        else:
            self._overhead_left = -1

    def on_headers_complete(self) -> None:
        self._is_in_body = True
        self._overhead_left = min(self._overhead_left, self._limits.body_overhead_bytes)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._stop_receiving()
        super().on_message_complete()

    def _check_receiving_later(self) -> None:
        self._pauses = self.flow.pauses
        delay = self._limits.receive_seconds
        self._next_receive_check = self.loop.call_later(delay, self._check_receiving)

    def _check_receiving(self) -> None:
        """Reject a request that comes too slowly, unless it is this server that does not read."""
        was_paused = self.flow.read_paused or self.flow.pauses > self._pauses
        if self._received < self._limits.receive_bytes and not was_paused:
            self._reject(408, "timeout", "The request arrived too slowly: send it again, faster.")
            return
        self._received = 0
        self._check_receiving_later()

    def _stop_receiving(self) -> None:
        self._is_receiving = False
        if self._next_receive_check is not None:
            self._next_receive_check.cancel()
            self._next_receive_check = None

    def on_body(self, body: bytes) -> None:
        self._overhead_left += 2 * len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Send the error as JSON like the rest of the API, where uvicorn sends plain text."""
        self._reject(400, "invalid_request", msg)

    @property
    def _too_much_overhead(self) -> str:
        return (
            f"The request has over {self._limits.max_headers} headers,"
            f" over {self._limits.overhead_bytes:,} bytes before its body, or too small chunks:"
            " send fewer headers, or larger chunks."
        )

    def _reject(self, status: int, code: ErrorCode, message: str) -> None:
        """
        Send an error, and close the connection once the client had time to read it: closing at once
        would reset the connection of a client that is still sending.
        """
        if self._is_rejected or self.transport.is_closing():
            return
        self._is_rejected = True
        self._unparsed, self._parsed = b"", 0
        self._stop_receiving()
        if self._disconnect_answered():
            self.transport.abort()
            return
        self._flush_response()  # it may be a 100 Continue
        content = msgspec.json.encode(errors.body(ServiceError(code, message)))
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (len(content), content)
        )
        self.transport.write_eof()
        self.loop.call_later(self._limits.linger_seconds, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._close_writer()
        self._unread = self.transport.get_write_buffer_size()
        self._stalled_checks = 0
        self._check_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writer is not None:
            self._writer.open()
        self._stop_checking()

    def _flush_response(self) -> None:
        if self._response is not None:
            self._response.flush()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _disconnect_answered(self) -> bool:
        """
        Let the request that is being answered know that its client is gone: uvicorn tells the last
        one of a pipeline only. Return whether its response has begun.
        """
        cycle = self._answered
        if cycle is None or cycle.response_complete:
            return False
        self._close_writer()
        cycle.disconnected = True
        cycle.message_event.set()
        return cycle.response_started

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnect_answered()
        self._stop_checking()
        self._stop_receiving()
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
