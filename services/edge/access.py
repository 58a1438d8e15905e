"""One log line per HTTP request, under the id that the caller gave it or that it got here."""

import logging
import secrets
import time

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from services.runtime import logs

HEADER = b"x-request-id"
MAX_ID_LENGTH = 64
ASKED_ALL_THE_TIME = ("/healthz", "/readyz")

log = logging.getLogger(__name__)


class Access:
    """Around the whole app, as Litestar's own middleware doesn't see a 404."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        logs.request_id.set(request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER, request_id.encode())]
            await send(message)

        started = time.monotonic()
        # matched as it was sent, since a session's id may hold a slash
        scope["path"] = scope["raw_path"].decode("ascii", "replace").partition("?")[0]
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _note(scope, status, time.monotonic() - started)


def _request_id(scope: HTTPScope) -> str:
    """Only what can't break a log line or a header is kept of the caller's."""
    given = dict(scope["headers"]).get(HEADER, b"").decode("ascii", "ignore")
    return "".join(filter(str.isprintable, given))[:MAX_ID_LENGTH].strip() or secrets.token_hex(8)


def _note(scope: HTTPScope, status: int, seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in ASKED_ALL_THE_TIME else logging.INFO
    # as it was sent: the decoded path can hold line breaks, the query somebody's session
    path = scope["raw_path"].decode("ascii", "replace").partition("?")[0][:200]
    log.log(level, "%s %s %s %.0f ms", scope["method"], path, status or "-", seconds * 1000)
