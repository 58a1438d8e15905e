"""
One log line and metrics per HTTP request, under the id that the caller sent or that it gets here.
"""

import logging
import secrets
import time

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from services.edge.errors import ANTHROPIC_PATH
from services.edge.metrics import EdgeMetrics
from services.runtime import logs

HEADER = b"x-request-id"
ANTHROPIC_HEADER = b"request-id"
"""The same id as Anthropic's clients read it."""
MAX_ID_LENGTH = 64
MAX_PATH_LENGTH = 200  # in the log
PROBES = ("/healthz", "/metrics", "/readyz")  # logged at DEBUG

log = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware around the whole app, as Litestar's own middleware doesn't see a 404."""

    def __init__(self, app: ASGIApp, metrics: EdgeMetrics) -> None:
        self._app = app
        self._metrics = metrics

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
                if HEADER not in dict(message["headers"]):  # else the id of a completion
                    message["headers"] = [*message["headers"], (HEADER, request_id.encode())]
                if scope["path"].startswith(ANTHROPIC_PATH):
                    message["headers"] = [
                        *message["headers"],
                        (ANTHROPIC_HEADER, request_id.encode()),
                    ]
            await send(message)

        started = time.monotonic()
        # routed by the path as sent, since a session's id may contain an encoded slash
        scope["path"] = scope["raw_path"].decode("ascii", "replace").partition("?")[0]
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _log(scope, status, time.monotonic() - started)
            self._metrics.on_http_request(_api(scope), status, scope["state"].get("error_code"))


def _request_id(scope: HTTPScope) -> str:
    """Return the caller's id without characters that could break a log line or a header."""
    given = dict(scope["headers"]).get(HEADER, b"").decode("ascii", "ignore")
    return "".join(filter(str.isprintable, given))[:MAX_ID_LENGTH].strip() or secrets.token_hex(8)


def _api(scope: HTTPScope) -> str:
    """Return the module in services/edge/api that handled the request; `none`: no route did."""
    handler = scope.get("route_handler")
    return handler.fn.__module__.rpartition(".")[2] if handler else "none"


def _log(scope: HTTPScope, status: int, seconds: float) -> None:
    """Log the path as sent: decoded it can hold line breaks, and the query may be private."""
    level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
    log.log(
        level,
        "request finished method=%s path=%s status=%s ms=%.0f",
        scope["method"],
        scope["path"][:MAX_PATH_LENGTH],
        status or "-",
        seconds * 1000,
    )
