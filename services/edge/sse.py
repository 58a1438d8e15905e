"""A chat's events as server-sent events. Knows how they are written, not where they come from."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from litestar.types import Receive, Scope, Send

from services.contract.errors import ServiceError
from services.contract.messages import Accepted, Done, Failed, StreamEvent, Token
from services.edge.lines import one_line
from services.edge.presence import while_present

PING_INTERVAL = 15.0  # seconds without a byte after which proxies and browsers may give up
PING = b": ping\n\n"
END: Literal["end"] = "end"
"""The id of the last event. The id of any other is the length of the answer up to it."""
RETRY = b"retry: 500\n\n"  # milliseconds


class EventStream:
    """
    An ASGI response, written by hand because Litestar's notices a client that left only once it
    has sent the headers.

    The headers wait for the first event after Accepted, so that a request which fails before that
    is answered with its own status: `refusal` makes the error of the Failed, and it is raised.
    """

    def __init__(
        self,
        events: AsyncGenerator[StreamEvent, None],
        request_id: str,
        refusal: Callable[[Failed], ServiceError],
    ) -> None:
        self._events = events
        self._request_id = request_id
        self._refusal = refusal
        self._started = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_present(receive, self._answer(send))
        except asyncio.CancelledError:  # by uvicorn, when a drain has lasted too long
            await self._send_away(send)

    async def _answer(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                if isinstance(event, Accepted):
                    continue
                if isinstance(event, Failed):
                    await self._fail(send, self._refusal(event))
                    return
                await self._start(send)
                await self._write(send, self._format(event))
        await _end(send)

    def _format(self, event: StreamEvent) -> bytes:
        match event:
            case Token(offset=at, text=text, logprobs=logprobs):
                more = {} if logprobs is None else {"logprobs": logprobs}
                return b"id: %d\n%b" % (at + len(text), _data({"token": text, **more}))
            case Done():
                return b"id: %b\n%b" % (END.encode(), _data(_done(event, self._request_id)))
            case _:
                return PING if time.monotonic() - self._sent_at >= PING_INTERVAL else b""

    async def _fail(self, send: Send, error: ServiceError) -> None:
        if not self._started:
            raise error
        await self._write(send, _data({"error": error.message, "code": error.code}))
        await _end(send)

    async def _send_away(self, send: Send) -> None:
        """
        No event ends the stream, so a client that can asks on with `Last-Event-ID`, elsewhere.
        """
        if not self._started:
            raise ServiceError("shutting_down", "The server is restarting; ask again.", 1)
        await self._write(send, RETRY)
        await _end(send)

    async def _start(self, send: Send) -> None:
        if self._started:
            return
        self._started = True
        self._sent_at = time.monotonic()
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would hold the tokens back
            (b"content-location", f"/chat/{self._request_id}".encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _write(self, send: Send, data: bytes) -> None:
        if data:
            self._sent_at = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": True})


async def _end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _data(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % one_line(msgspec.json.encode(content))


def _done(event: Done, request_id: str) -> dict[str, Any]:
    content = msgspec.structs.asdict(event)
    del content["length"]  # the stream's ids tell it
    return {"done": True, **content, "request_id": request_id}
