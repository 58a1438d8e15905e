"""
One log line, one span and metrics per HTTP request, under the ids of request and trace that the
caller sent or that it gets here.
"""

import logging
import secrets
import time

from litestar.enums import ScopeType
from litestar.exceptions import LitestarException
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from services.edge.activity import ActivityMonitor
from services.edge.errors import ANTHROPIC_PATH
from services.edge.metrics import EdgeMetrics
from services.runtime import logs, tracing
from services.runtime.trace_context import TRACEPARENT, TRACESTATE, TraceContext, current

HEADER = b"x-request-id"
TRACE_HEADER = b"x-trace-id"
ANTHROPIC_HEADER = b"request-id"
"""The same id as Anthropic's clients read it."""
STATUS = "status"
"""Key in the scope's state of the response's status."""
MAX_ID_LENGTH = 64
MAX_PATH_LENGTH = 200  # in the log
PROBES = ("/healthz", "/metrics", "/readyz")
PAGE_FILES = "/page/"

log = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware around the whole app, as Litestar's own middleware doesn't see a 404."""

    def __init__(self, app: ASGIApp, metrics: EdgeMetrics, activity: ActivityMonitor) -> None:
        self._app = app
        self._metrics = metrics
        self._activity = activity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        logs.request_id.set(request_id)
        span = _start_span(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = scope["state"][STATUS] = message["status"]
                trace_id = span.context.trace_id.encode()
                message["headers"] = [*message["headers"], (TRACE_HEADER, trace_id)]
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
        except LitestarException:
            if "error_code" not in scope["state"]:
                raise
            # else a stream was cut, which is logged: uvicorn closes the connection
        finally:
            _log(scope, status, time.monotonic() - started)
            code = scope["state"].get("error_code")
            self._metrics.on_http_request(_api(scope), status, code)
            if code and scope["path"] not in PROBES:  # which fail each second for one reason
                self._activity.on_failed_request(code, scope["state"].get("tenant"), request_id)
            _end_span(span, scope, status, request_id)


def _request_id(scope: HTTPScope) -> str:
    """Return the caller's id without characters that could break a log line or a header."""
    given = dict(scope["headers"]).get(HEADER, b"").decode("ascii", "ignore")
    return "".join(filter(str.isprintable, given))[:MAX_ID_LENGTH].strip() or secrets.token_hex(8)


def _start_span(scope: HTTPScope) -> tracing.Span:
    """
    Start the request's span in the trace that the caller sent, or in a new one. Minor requests have
    none, which would fill every list of traces.
    """
    parents, states = (
        [value.decode("latin-1") for each, value in scope["headers"] if each == name]
        for name in (TRACEPARENT.encode(), TRACESTATE.encode())
    )
    is_valid = len(parents) == 1  # as the standard wants it
    current.set(TraceContext.parse(parents[0], ",".join(states)) if is_valid else None)
    if _is_minor(scope["path"]):
        span = tracing.Span(current.get() or TraceContext.new())
    else:
        span = tracing.start(scope["method"], "server")
    current.set(span.context)
    return span


def _is_minor(path: str) -> bool:
    """Return whether a request is a probe, or for a file of the page: nobody looks for these."""
    return path in PROBES or path.startswith(PAGE_FILES)


def _end_span(span: tracing.Span, scope: HTTPScope, status: int, request_id: str) -> None:
    """https://opentelemetry.io/docs/specs/semconv/http/http-spans/#http-server"""
    if not span.is_recorded:
        return
    route = scope.get("path_template") if scope.get("route_handler") else None
    span.rename(f"{scope['method']} {route}" if route else scope["method"])
    code = scope["state"].get("error_code")
    span.set(
        {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status or None,
            "url.scheme": scope["scheme"],
            "url.path": scope["path"][:MAX_PATH_LENGTH],
            "finetunellm.request_id": request_id,
            "finetunellm.error_code": code,
        }
    )
    span.end(str(code or status or "cancelled") if status >= 500 or not status else "")


def _api(scope: HTTPScope) -> str:
    """Return the module in services/edge/api that handled the request; `none`: no route did."""
    handler = scope.get("route_handler")
    return handler.fn.__module__.rpartition(".")[2] if handler else "none"


def _log(scope: HTTPScope, status: int, seconds: float) -> None:
    """Log the path as sent: decoded it can hold line breaks, and the query may be private."""
    level = logging.DEBUG if _is_minor(scope["path"]) else logging.INFO
    log.log(
        level,
        "request finished method=%s path=%s status=%s ms=%.0f",
        scope["method"],
        scope["path"][:MAX_PATH_LENGTH],
        status or "-",
        seconds * 1000,
    )
