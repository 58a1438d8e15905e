"""The composition root of the edge: routes, their dependencies, and the middleware around them."""

import asyncio
import re
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import msgspec
from litestar import Litestar, Response
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.datastructures import Headers
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.middleware.compression import CompressionMiddleware
from litestar.types import (
    ASGIApp,
    ExceptionHandlersMap,
    HTTPResponseStartEvent,
    Message,
    Scope,
    Send,
)

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.errors import ServiceError
from services.edge import errors, pages, schema
from services.edge.access_log import AccessLog
from services.edge.api import (
    anthropic,
    chat,
    metrics,
    models,
    ollama,
    openai_chat,
    openai_completions,
    openai_conversations,
    openai_embeddings,
    openai_responses,
    sessions,
    status,
)
from services.edge.api.openai_body import IGNORED_FIELDS, BodyReader, add_ignored_fields
from services.edge.background import BackgroundResponses
from services.edge.context import Edge
from services.edge.errors import AnyRequest
from services.edge.history_requests import HistoryRequests
from services.edge.hosts import AllowedHosts
from services.edge.idempotency import IdempotencyKeys
from services.edge.keys import ApiKeys
from services.edge.limits import EdgeLimits
from services.edge.metrics import EdgeMetrics
from services.edge.parameters import SAFE_METHODS, get, reject_unknown_parameters, wants_html
from services.edge.request_body import BodyDrain
from services.runtime.bus import Bus

ROUTES: list[HTTPRouteHandler] = [
    status.root,
    status.healthz,
    status.readyz,
    status.status,
    metrics.metrics,
    chat.chat,
    chat.resume,
    chat.cancel,
    sessions.messages,
    sessions.clear_history,
    sessions.sessions,
    sessions.session_messages,
    sessions.describe,
    sessions.erase,
    sessions.export,
    sessions.import_,
    anthropic.messages,
    anthropic.count_message_tokens,
    ollama.ollama_chat,
    ollama.ollama_generate,
    ollama.ollama_version,
    ollama.ollama_tags,
    ollama.ollama_ps,
    ollama.ollama_show,
    ollama.ollama_embed,
    ollama.ollama_embeddings,
    openai_chat.chat_completions,
    openai_chat.chat_completion,
    openai_chat.cancel_completion,
    openai_completions.completions,
    openai_embeddings.embeddings,
    openai_embeddings.rerank,
    openai_responses.create,
    openai_responses.retrieve,
    openai_responses.remove,
    openai_responses.cancel,
    openai_responses.input_items,
    openai_responses.input_tokens,
    openai_conversations.create,
    openai_conversations.retrieve,
    openai_conversations.update,
    openai_conversations.remove,
    openai_conversations.items,
    openai_conversations.add_items,
    models.models,
    models.model,
    models.tokenize,
    models.detokenize,
    models.count_tokens,
]
BROWSER_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
EXPOSED_HEADERS = ["Content-Location", "Retry-After", "X-Request-Id", IGNORED_FIELDS]

_GZIP_REFUSED = re.compile(r"gzip\s*;\s*q=0(\.0*)?\s*(,|$)", re.IGNORECASE)


class Compression(CompressionMiddleware):
    """
    Litestar's compression, except for streams, whose headers and pings it would delay, and for a
    client that sends `gzip;q=0`, which Litestar ignores.
    """

    def create_compression_send_wrapper(
        self, send: Send, compression_encoding: str, scope: Scope
    ) -> Send:
        if _GZIP_REFUSED.search(Headers.from_scope(scope).get("accept-encoding", "")):
            return send
        chosen = super().create_compression_send_wrapper(send, compression_encoding, scope)

        async def send_chosen(message: Message) -> None:
            nonlocal chosen
            if message["type"] == "http.response.start" and _is_stream(message):
                chosen = send
            await chosen(message)

        return send_chosen


def _is_stream(start: HTTPResponseStartEvent) -> bool:
    return b"content-length" not in dict(start["headers"])


COMPRESSION = CompressionConfig(
    "gzip",
    minimum_size=1024,
    gzip_compress_level=4,  # a MiB takes 20 ms
    exclude=["^/v1/embeddings"],  # random bits: slow to compress, and hardly smaller
    middleware_class=Compression,
)
EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    ServiceError: errors.service_error,
    HTTPException: errors.framework_error,
    Exception: errors.unexpected_error,
}


async def make_edge(
    bus: Bus,
    draining: asyncio.Event,
    limits: EdgeLimits,
    is_strict: bool = False,
    takes_any_model: bool = False,
    counts_tenants: bool = False,
) -> Edge:
    """
    Connect the parts that the APIs share. `draining` is set at shutdown. With `is_strict`, unknown
    fields of /v1 are rejected; with `takes_any_model`, unknown model names stand for the only
    model; with `counts_tenants`, metrics count by tenant too.
    """
    workers = WorkerDirectory()
    edge_metrics = EdgeMetrics(bus, workers, counts_tenants)
    await bus.subscribe(subjects.report(subjects.ANY), workers.on_report)
    return Edge(
        bus,
        workers,
        HistoryRequests(bus, limits),
        IdempotencyKeys(bus),
        BodyReader(limits, is_strict, workers.only_model if takes_any_model else None),
        BackgroundResponses(bus, workers, limits, draining, edge_metrics.observe),
        draining,
        limits,
        edge_metrics,
    )


def make_app(
    edge: Edge,
    keys: ApiKeys,
    origins: Sequence[str],
    hosts: Sequence[str] = (),
    has_metrics: bool = True,
) -> ASGIApp:
    """
    Build the ASGI app. Pages of `origins` may send requests; `*` in them matches anything. `hosts`
    are those of AllowedHosts. Without `has_metrics`, another app serves them (make_metrics_app).
    """

    def tenant(request: AnyRequest) -> str:
        return keys.tenant(request.headers)

    cors = CORSConfig(allow_origins=list(origins), expose_headers=EXPOSED_HEADERS)
    routes = [route for route in ROUTES if has_metrics or route is not metrics.metrics]
    litestar = Litestar(
        [*routes, *_schema_routes(keys.is_open)],
        dependencies={
            "edge": Provide(lambda: edge, sync_to_thread=False),
            "tenant": Provide(tenant, sync_to_thread=False),
        },
        exception_handlers=EXCEPTION_HANDLERS,
        cors_config=cors,
        compression_config=COMPRESSION,
        before_send=[add_ignored_fields, _add_browser_headers],
        before_request=partial(_check, cors, AllowedHosts(hosts, keys.is_open)),
        openapi_config=None,  # see schema.py
        request_max_body_size=edge.limits.max_body_bytes,
        logging_config=None,
    )
    return AccessLog(BodyDrain(litestar, edge.limits), edge.metrics)


def make_metrics_app(edge: Edge) -> ASGIApp:
    """Build an app with nothing but `/metrics`, which needs no key."""
    litestar = Litestar(
        [metrics.metrics],
        dependencies={
            "edge": Provide(lambda: edge, sync_to_thread=False),
            "tenant": Provide(lambda: subjects.OPEN_TENANT, sync_to_thread=False),
        },
        exception_handlers=EXCEPTION_HANDLERS,
        compression_config=COMPRESSION,
        openapi_config=None,
        logging_config=None,
    )
    return AccessLog(BodyDrain(litestar, edge.limits), edge.metrics)


@cache
def _schema_routes(is_open: bool) -> tuple[HTTPRouteHandler, ...]:
    """Return the routes of the reference: a page for browsers, the document for programs."""
    document = schema.document(ROUTES, is_open)
    page = pages.reference(document)
    json, yaml = msgspec.json.encode(document), msgspec.yaml.encode(document)

    @get("/schema", sync_to_thread=False)
    def negotiated(request: AnyRequest) -> Response[Any]:
        return pages.respond(page) if wants_html(request) else json_response()

    @get("/schema/openapi.json", sync_to_thread=False)
    def as_json() -> Response[bytes]:
        return json_response()

    @get(["/schema/openapi.yaml", "/schema/openapi.yml"], sync_to_thread=False)
    def as_yaml() -> Response[bytes]:
        return Response(yaml, media_type="application/yaml")

    def json_response() -> Response[bytes]:
        return Response(json, media_type="application/json", headers={"Vary": "Accept"})

    return negotiated, as_json, as_yaml


async def _add_browser_headers(message: Message, scope: Scope) -> None:
    """Add the headers that keep a browser from guessing, framing and caching."""
    if message["type"] == "http.response.start":
        given = dict(message["headers"])
        missing = [header for header in BROWSER_HEADERS if header[0] not in given]
        message["headers"] = [*message["headers"], *missing]


async def _check(cors: CORSConfig, hosts: AllowedHosts, request: AnyRequest) -> None:
    hosts.check(request.headers.get("host", ""))
    _reject_foreign_origin(cors, request)
    reject_unknown_parameters(request)


def _reject_foreign_origin(cors: CORSConfig, request: AnyRequest) -> None:
    """
    Raise ServiceError(forbidden) for a change from a web page of another origin. CORS keeps such a
    page from reading a response only: a browser sends a plain POST without a preflight.
    """
    origin = request.headers.get("origin")
    if not origin or request.method in SAFE_METHODS:
        return
    host = origin.partition("://")[2]
    if host == request.headers.get("host") or cors.is_origin_allowed(origin):
        return
    raise ServiceError(
        "forbidden",
        f"Pages of {origin!r} may not send requests: add the origin to EDGE_CORS_ORIGINS.",
    )
