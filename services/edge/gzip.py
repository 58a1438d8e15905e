"""JSON is sent compressed to those who take it."""

import gzip

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

LEAST = 1024  # bytes; less is not worth the work
LEVEL = 4  # a MiB takes 20 ms


class Gzip:
    """
    Around the app. Only JSON that comes in one piece: the events of a stream would wait for each
    other.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or not _takes_gzip(scope):
            await self._app(scope, receive, send)
            return
        start: Message | None = None

        async def send_compressed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_json(message):
                start = message
                return
            if start is not None:
                head, message = _compressed(start, message)
                start = None
                await send(head)
            await send(message)

        await self._app(scope, receive, send_compressed)


def _takes_gzip(scope: HTTPScope) -> bool:
    accepted = dict(scope["headers"]).get(b"accept-encoding", b"").decode("latin-1")
    codings = (part.partition(";") for part in accepted.split(","))
    return any(
        name.strip().lower() == "gzip" and weight.replace(" ", "") not in ("q=0", "q=0.0")
        for name, _, weight in codings
    )


def _is_json(start: Message) -> bool:
    assert start["type"] == "http.response.start"
    headers = dict(start["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0]
    return kind.endswith((b"/json", b"+json")) and b"content-encoding" not in headers


def _compressed(start: Message, body: Message) -> tuple[Message, Message]:
    assert start["type"] == "http.response.start" and body["type"] == "http.response.body"
    headers = [*start["headers"], (b"vary", b"accept-encoding")]
    if not body["more_body"] and len(body["body"]) >= LEAST:
        body = {**body, "body": gzip.compress(body["body"], LEVEL, mtime=0)}
        headers = [pair for pair in headers if pair[0] != b"content-length"]
        length = str(len(body["body"])).encode()
        headers += [(b"content-encoding", b"gzip"), (b"content-length", length)]
    return {**start, "headers": headers}, body
