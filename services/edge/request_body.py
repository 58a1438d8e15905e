"""
Limits of request bodies: fields are measured before they are decoded, and the rest of a rejected
body is read, so that the client receives the response.
"""

import asyncio
from collections.abc import Mapping

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
from msgspec import Raw

from services.contract.errors import ServiceError
from services.edge.limits import EdgeLimits

CLOSE = (b"connection", b"close")

FORMATS = {"response_format", "json_schema", "guided_json", "structured_outputs", "text"}
NESTED = {"tools", *FORMATS}
# limited by their types, by prompts.check and by the limit of the body
LARGE = {
    "messages", "prompt", "prefix", "tools", "tool_results", "content", "tokens",
    "input", "items", "instructions", "query", "documents", "texts",
}  # fmt: skip


def check_sizes(fields: Mapping[str, Raw], limits: EdgeLimits) -> None:
    """
    Check the fields of a body before they are decoded, as one body must not block the event loop:
    msgspec takes 0.3 µs for each list, and a MiB has room for many. Raises
    ServiceError(payload_too_large).
    """
    check_field_count(fields, limits)
    for name, value in fields.items():
        maximum = limits.max_format_bytes if name in FORMATS else limits.max_field_bytes
        if name not in LARGE and len(memoryview(value)) > maximum:
            raise too_large(f"The field `{name}` has more than {maximum:,} bytes")
        data = bytes(value) if name in NESTED else b""
        if data.count(b"{") + data.count(b"[") > limits.max_nested:
            maximum = limits.max_nested
            raise too_large(f"The field `{name}` has more than {maximum:,} objects and lists")


def check_field_count(fields: Mapping[str, Raw], limits: EdgeLimits, path: str = "$") -> None:
    """Check one object. Raises ServiceError(payload_too_large) that names its path."""
    if len(fields) > limits.max_fields:
        raise too_large(f"The object at `{path}` has more than {limits.max_fields:,} fields")


def too_large(what: str) -> ServiceError:
    return ServiceError("payload_too_large", f"{what}: send less.")


class BodyDrain:
    """
    ASGI middleware. After a response that precedes the end of the body (413, 401, 404) the server
    closes the connection, and a client that is still sending sees a reset instead of the response,
    and retries. So a bounded rest of the body is read and dropped first
    (https://github.com/rwf2/Rocket/issues/2783).
    """

    def __init__(self, app: ASGIApp, limits: EdgeLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        body = _TrackedBody(receive)

        async def send_after_body(message: Message) -> None:
            if message["type"] == "http.response.start" and not await self._drop(scope, body):
                message["headers"] = [*message["headers"], CLOSE]
            await send(message)

        await self._app(scope, body.receive, send_after_body)

    async def _drop(self, scope: HTTPScope, body: "_TrackedBody") -> bool:
        """Drop the rest of the body. Return whether it ended, so the connection can be reused."""
        headers = dict(scope["headers"])
        awaits_continue = not body.was_requested and b"expect" in headers
        length = int(headers.get(b"content-length", b"0"))
        is_too_long = length > self._limits.max_dropped_bytes
        if body.is_complete or body.is_being_read or awaits_continue or is_too_long:
            return body.is_complete
        try:
            async with asyncio.timeout(self._limits.max_drop_seconds):
                dropped = 0
                while not body.is_complete and dropped <= self._limits.max_dropped_bytes:
                    message = await body.receive()
                    if message["type"] != "http.request":
                        return False
                    dropped += len(message["body"])
        except TimeoutError:
            return False
        return body.is_complete


class _TrackedBody:
    """A `receive` that keeps track of the request body."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.was_requested = False
        self.is_being_read = False
        self.is_complete = False

    async def receive(self) -> ReceiveMessage:
        self.was_requested = self.is_being_read = True
        try:
            message = await self._receive()
        finally:
            self.is_being_read = False
        if message["type"] == "http.request" and not message.get("more_body"):
            self.is_complete = True
        return message


def _has_body(scope: HTTPScope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
