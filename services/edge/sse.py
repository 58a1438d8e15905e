"""
Server-sent events: one response class for all APIs. An encoder per API writes the events.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp, Receive, Scope, Send

from services.client.chat_client import AnswerStream
from services.contract.errors import ServiceError, shutting_down
from services.contract.messages import (
    Accepted,
    AnswerEvent,
    Done,
    Failed,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.edge.errors import AnyRequest
from services.edge.http_protocol import WRITER, BodyWriter
from services.edge.limits import EdgeLimits
from services.runtime.tasks import Stopped, run_until

END: Literal["end"] = "end"
"""Id of the last event. The id of any other event is the length of the answer up to it."""
RETRY = b"retry: 500\n\n"
"""Milliseconds until a client reconnects, with `Last-Event-ID`."""
HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would buffer the stream
)

_BREAKS = re.compile(b"\xe2\x80[\xa8\xa9]|\xc2\x85")
_ESCAPES = {b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029", b"\xc2\x85": b"\\u0085"}

NumberedEvents = AsyncGenerator[tuple[int, StreamEvent], None]
"""The events of several answers, each with the number of its answer, from 0."""
ToError = Callable[[Failed], ServiceError]
T = TypeVar("T")


class AnswerEvents(Protocol):
    """The events of an answer: an AnswerStream, or a generator."""

    def __aiter__(self) -> AsyncIterator[StreamEvent]: ...

    async def aclose(self) -> None: ...


class StreamForm(NamedTuple):
    content_type: bytes
    ping: bytes  # to fill silence


SSE = StreamForm(b"text/event-stream; charset=utf-8", b": ping\n\n")
NDJSON = StreamForm(b"application/x-ndjson", b"")  # every line is an object of the answer

_encode = msgspec.json.Encoder().encode

log = logging.getLogger(__name__)


class Encoder(Protocol):
    """Writes events in the form of one API. Every method returns bytes of an event stream."""

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """More headers of the response."""

    def begin(self) -> bytes: ...

    def encode(self, number: int, event: StreamEvent) -> bytes:
        """Return b"" for an event that the API does not have."""

    def end(self) -> bytes: ...

    def fail(self, error: ServiceError) -> bytes:
        """End the stream with an error."""

    def interrupt(self) -> bytes:
        """End the stream of an unfinished answer, because this process shuts down."""


class SseResponse:
    """
    Streams one answer or several. An ASGI response of its own, because Litestar's notices a
    disconnect only after it sent the headers.

    The headers wait for the first event after Accepted. If the request fails before it, the error
    is raised instead, as `to_error` returns it, so that the response has the status of the error.
    """

    __slots__ = (
        "_form",
        "_answers",
        "_events",
        "_encoder",
        "_to_error",
        "_ping_seconds",
        "_is_started",
        "_sent_at",
        "_send",
        "_writer",
    )

    def __init__(
        self,
        answers: Sequence[AnswerEvents],
        encoder: Encoder,
        to_error: ToError,
        limits: EdgeLimits,
        form: StreamForm = SSE,
    ) -> None:
        self._form = form
        self._answers = answers
        self._events = merge(answers, limits.max_queued_events)
        self._encoder = encoder
        self._to_error = to_error
        self._ping_seconds = limits.ping_seconds
        self._is_started = False
        self._sent_at = 0.0
        self._send: Send
        self._writer: BodyWriter | None = None  # without it, parts are sent by ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope.get("method") == "HEAD"
        self._send, self._writer = send, scope.get("state", {}).get(WRITER)
        try:
            await while_connected(receive, self._stream(is_head))
        except asyncio.CancelledError:  # by uvicorn, when the drain took too long
            if not self._is_started:
                raise shutting_down() from None
            await self._end(self._encoder.interrupt())

    async def _stream(self, is_head: bool) -> None:
        async with aclosing(self._events) as events:
            async for number, event in events:
                if isinstance(event, Accepted):
                    continue
                if isinstance(event, Failed):
                    await self._fail(self._to_error(event))
                    return
                begin = b"" if self._is_started else await self._start()
                if is_head:
                    break
                await self._write(begin + self._encoder.encode(number, event))
        await self._end(self._encoder.end())

    async def _fail(self, error: ServiceError) -> None:
        if not self._is_started:
            raise error
        await self._end(self._encoder.fail(error))

    def take(self, token: Token) -> bool:
        """Write the text at once, unless the client reads too slowly (chat_client.TextSink)."""
        writer = self._writer
        if writer is None or not writer.is_open:
            return False
        if data := self._encoder.encode(0, token) or self._ping():
            self._sent_at = time.monotonic()
            writer.write(data)
        return True

    async def _start(self) -> bytes:
        """Send the head. Return the beginning of the body."""
        self._is_started = True
        self._sent_at = time.monotonic()
        if len(self._answers) == 1 and isinstance(answer := self._answers[0], AnswerStream):
            answer.pass_text_to(self)
        content_type = (b"content-type", self._form.content_type)
        headers = [content_type, *HEADERS, *self._encoder.headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if self._writer is not None:
            self._writer.open()
        return self._encoder.begin()

    async def _write(self, data: bytes) -> None:
        data = data or self._ping()
        if not data:
            return
        self._sent_at = time.monotonic()
        if self._writer is not None and self._writer.is_open:
            self._writer.write(data)
        else:  # which waits for a client that reads slowly
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def _ping(self) -> bytes:
        """Return what to send instead of an event that has no data: a ping after a silence."""
        is_silent = time.monotonic() - self._sent_at >= self._ping_seconds
        return self._form.ping if is_silent else b""

    async def _end(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


def data_line(json: bytes) -> bytes:
    """Return an event with this JSON as data."""
    return b"data: %b\n\n" % one_line(json)


def one_line(json: bytes) -> bytes:
    """
    Escape U+2028, U+2029 and U+0085: they are valid in an event stream and in a line of JSON, but
    clients that split either with str.splitlines would cut it there
    (https://github.com/florimondmanca/httpx-sse/issues/34).
    """
    if b"\xe2\x80" not in json and b"\xc2\x85" not in json:
        return json  # searching twice is faster than one search for a pattern
    return _BREAKS.sub(lambda found: _ESCAPES[found[0]], json)


def text_json(text: str) -> bytes:
    """Return a text as JSON on one line."""
    json = _encode(text)
    return json if json.isascii() else one_line(json)


def last_event_id(request: AnyRequest) -> int | Literal["end"]:
    """
    Return the length of the answer up to the last event that the client has, or `end`. Raises
    ServiceError(invalid_request).
    """
    given = request.headers.get("last-event-id") or "0"
    if given == END:
        return END
    if not given.isdecimal() or not given.isascii() or len(given) > 9:
        raise ServiceError(
            "invalid_request", f"Last-Event-ID must be the id of an event, not {given[:20]!r}."
        )
    return int(given)


def no_content() -> ASGIApp:
    """Return the response that stops an EventSource from reconnecting."""
    return ASGIResponse(status_code=204)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work`, and cancel it when the client disconnects; then return None."""
    with suppress(Stopped):
        return await run_until(_disconnected(receive), work)
    return None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_to_end(
    events: AnswerEvents, push: Callable[[AnswerEvent], Iterable[Any]], to_error: ToError
) -> Done:
    """Pass each part of an answer to `push`. Return its end. Raises ServiceError if it fails."""
    async with aclosing(events):
        async for event in events:
            match event:
                case Token() | ToolCallDelta():
                    for _ in push(event):
                        pass
                case Failed():
                    raise to_error(event)
                case Done():
                    return event
    raise AssertionError("an answer ends with Done or Failed")


async def merge(streams: Sequence[AnswerEvents], max_queued: int) -> NumberedEvents:
    """Yield the events of all answers in the order of their arrival."""
    if len(streams) == 1:
        async with aclosing(_guard(streams[0])) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue(max_queued)

    async def copy(number: int, stream: AnswerEvents) -> None:
        async with aclosing(_guard(stream)) as events:
            async for event in events:
                await queue.put((number, event))

    tasks = [asyncio.create_task(copy(*pair)) for pair in enumerate(streams)]
    unfinished = len(tasks)
    try:
        while unfinished:
            number, event = await queue.get()
            unfinished -= isinstance(event, Done | Failed)
            yield number, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _guard(stream: AnswerEvents) -> AnswerEvents:
    """Yield the events. An exception becomes a Failed, as the reader waits for an end."""
    try:
        async with aclosing(stream) as events:
            async for event in events:
                yield event
    except Exception:
        log.exception("reading an answer failed")
        yield Failed("internal", "The answer was interrupted. See the server's log.")
