"""Reads the rest of a request body before a response, so that the client receives the response."""

import asyncio

from litestar.enums import ScopeType
from litestar.types import (
    ASGIApp,
    HTTPScope,
    Message,
    Receive,
    ReceiveMessage,
    Scope,
    Send,
)

MAX_BYTES = 32 * 2**20
MAX_SECONDS = 10.0
CLOSE = (b"connection", b"close")


class BodyDrain:
    """
    ASGI middleware. After a response that precedes the end of the body (413, 401, 404) the server
    closes the connection, and a client that is still sending sees a reset instead of the response,
    and retries. So a bounded rest of the body is read and dropped first (cf. rwf2/Rocket#2783).
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        body = _Body(receive)

        async def send_after_body(message: Message) -> None:
            if message["type"] == "http.response.start" and not await self._drop(scope, body):
                message["headers"] = [*message["headers"], CLOSE]
            await send(message)

        await self._app(scope, body.receive, send_after_body)

    async def _drop(self, scope: HTTPScope, body: "_Body") -> bool:
        """Drop the rest of the body. Return whether it ended, so the connection can be reused."""
        headers = dict(scope["headers"])
        is_asking = not body.was_asked_for and b"expect" in headers  # the body is not sent yet
        length = int(headers.get(b"content-length", b"0"))
        if body.is_read or body.is_being_read or is_asking or length > self._max_bytes:
            return body.is_read
        try:
            async with asyncio.timeout(self._max_seconds):
                dropped = 0
                while not body.is_read and dropped <= self._max_bytes:
                    message = await body.receive()
                    if message["type"] != "http.request":
                        return False
                    dropped += len(message["body"])
        except TimeoutError:
            return False
        return body.is_read


class _Body:
    """A `receive` that keeps track of the request body."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.was_asked_for = False
        self.is_being_read = False
        self.is_read = False

    async def receive(self) -> ReceiveMessage:
        self.was_asked_for = self.is_being_read = True
        try:
            message = await self._receive()
        finally:
            self.is_being_read = False
        if message["type"] == "http.request" and not message.get("more_body"):
            self.is_read = True
        return message


def _has_body(scope: HTTPScope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
