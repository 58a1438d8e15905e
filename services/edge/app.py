"""The composition root of the edge: routes, their dependencies, and the middleware around them."""

import asyncio
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import msgspec
from litestar import Litestar, Response
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute
from litestar.types import ASGIApp, ExceptionHandlersMap, Message, Scope

from services.client.fleet import ReportReader
from services.client.history_requests import HistoryRequests
from services.client.observer import AnswerObserver, Observers
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest
from services.edge import errors, pages, schema
from services.edge.access_log import AccessLog
from services.edge.activity import ActivityMonitor
from services.edge.api import (
    anthropic,
    chat,
    datasets,
    feedback,
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
from services.edge.api import (
    keys as key_routes,
)
from services.edge.api.openai_body import IGNORED_FIELDS, BodyReader, add_ignored_fields
from services.edge.api.sessions import HISTORY_COMPLETE
from services.edge.background import BackgroundResponses
from services.edge.compression import COMPRESSION
from services.edge.context import Edge, TheEdge
from services.edge.errors import AnyRequest
from services.edge.hosts import AllowedHosts
from services.edge.idempotency import IdempotencyKeys
from services.edge.keys import ApiKeys
from services.edge.limits import EdgeLimits
from services.edge.metrics import EdgeMetrics
from services.edge.page_files import load_page, page_file
from services.edge.parameters import SAFE_METHODS, get, reject_unknown_parameters, wants_html
from services.edge.rate_limits import RateLimits
from services.edge.request_body import BodyDrain
from services.runtime.bus import Bus

ROUTES: list[HTTPRouteHandler] = [
    status.root,
    status.healthz,
    status.readyz,
    status.status,
    metrics.metrics,
    key_routes.keys,
    key_routes.add_key,
    key_routes.revoke_key,
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
    feedback.give_feedback,
    feedback.remove_feedback,
    datasets.sft,
    datasets.preferences,
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
RATE_LIMIT_HEADERS = [
    f"x-ratelimit-{figure}-{kind}"
    for figure in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
]
EXPOSED_HEADERS = [
    *("Content-Location", "Retry-After", "X-Request-Id", "X-Trace-Id"),
    *(IGNORED_FIELDS, HISTORY_COMPLETE),
    *RATE_LIMIT_HEADERS,
]
COUNTED_METHODS = ("POST", "PATCH", "PUT")
"""Methods of requests that cost work, which `requests_per_minute` of an API key counts."""

EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    ServiceError: errors.service_error,
    HTTPException: errors.framework_error,
    Exception: errors.unexpected_error,
}


async def make_edge(
    bus: Bus,
    draining: asyncio.Event,
    limits: EdgeLimits,
    keys: ApiKeys,
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
    activity = ActivityMonitor(bus, workers, limits)
    edge_metrics = EdgeMetrics(bus, workers, activity, counts_tenants)
    rate_limits = RateLimits(bus, keys, workers)

    def observe(tenant: str, request: ChatRequest | None) -> AnswerObserver:
        counted = rate_limits.observe(tenant, request)
        measured = edge_metrics.observe(tenant, request)
        return Observers(counted, measured) if counted else measured

    reports = ReportReader(bus, workers)
    await reports.start()
    return Edge(
        bus,
        workers,
        reports,
        HistoryRequests(bus, limits),
        IdempotencyKeys(bus, limits),
        BodyReader(limits, is_strict, workers.only_model if takes_any_model else None),
        BackgroundResponses(bus, workers, limits, draining, observe),
        draining,
        limits,
        edge_metrics,
        activity,
        keys,
        rate_limits,
        observe,
    )


class Callers:
    """Who sends a request: what routes depend on, and the headers that follow from it."""

    def __init__(self, edge: Edge) -> None:
        self._keys = edge.api_keys
        self._rate_limits = edge.rate_limits

    def tenant(self, request: AnyRequest, edge: TheEdge) -> str:
        """Return the tenant, and count the request. Raises ServiceError."""
        # Litestar runs independent dependencies in tasks, which takes a tenth of the time until the
        # request is published. Depending on `edge` puts them in sequence.
        name = self._keys.tenant(request.headers)
        request.state.tenant = name
        if request.method in COUNTED_METHODS:
            self._rate_limits.count_request(name)
        return name

    def admin(self, request: AnyRequest) -> str:
        return self._keys.admin(request.headers)

    async def add_rate_limits(self, message: Message, scope: Scope) -> None:
        """Add the headers with what is left of the tenant's limits."""
        name = scope["state"].get("tenant")
        if message["type"] == "http.response.start" and name is not None:
            message["headers"] = [*message["headers"], *self._rate_limits.headers(name)]


def make_app(
    edge: Edge,
    origins: Sequence[str],
    hosts: Sequence[str] = (),
    has_metrics: bool = True,
    has_page: bool = True,
) -> ASGIApp:
    """
    Build the ASGI app. Pages of `origins` may send requests; `*` in them matches anything. `hosts`
    are those of AllowedHosts. Without `has_metrics`, another app serves them (make_metrics_app).
    Without `has_page`, browsers get a welcome at `/` instead of the chat page.
    """
    page = load_page() if has_page else None
    keys, callers = edge.api_keys, Callers(edge)
    cors = CORSConfig(allow_origins=list(origins), expose_headers=EXPOSED_HEADERS)
    routes = [route for route in ROUTES if has_metrics or route is not metrics.metrics]
    litestar = Litestar(
        [
            _options_route(routes),
            *routes,
            *_schema_routes(keys),
            *([page_file] if has_page else []),
        ],
        dependencies={
            "edge": Provide(lambda: edge, sync_to_thread=False),
            "page": Provide(lambda: page, sync_to_thread=False),
            "tenant": Provide(callers.tenant, sync_to_thread=False),
            "admin": Provide(callers.admin, sync_to_thread=False),
        },
        exception_handlers=EXCEPTION_HANDLERS,
        cors_config=cors,
        compression_config=COMPRESSION,
        before_send=[add_ignored_fields, _add_browser_headers, callers.add_rate_limits],
        before_request=partial(_check, cors, AllowedHosts(hosts, keys)),
        openapi_config=None,  # see schema.py
        request_max_body_size=edge.limits.max_body_bytes,
        logging_config=None,
    )
    return AccessLog(BodyDrain(litestar, edge.limits), edge.metrics, edge.activity)


def make_metrics_app(edge: Edge) -> ASGIApp:
    """Build an app with nothing but `/metrics`, which needs no key."""
    litestar = Litestar(
        [metrics.metrics],
        dependencies={
            "edge": Provide(lambda: edge, sync_to_thread=False),
            "admin": Provide(lambda: subjects.OPEN_TENANT, sync_to_thread=False),
        },
        exception_handlers=EXCEPTION_HANDLERS,
        compression_config=COMPRESSION,
        openapi_config=None,
        logging_config=None,
    )
    return AccessLog(BodyDrain(litestar, edge.limits), edge.metrics, edge.activity)


def _options_route(routes: Sequence[HTTPRouteHandler]) -> HTTPRouteHandler:
    """
    Return the handler of OPTIONS, which names all methods of a path. Litestar's own handler names
    those of one route only: https://github.com/litestar-org/litestar/issues/4169
    """

    def options(request: AnyRequest) -> Response[None]:
        path = request.scope["path_template"]
        methods = next(
            each.methods
            for each in request.app.routes
            if isinstance(each, HTTPRoute) and each.path_format == path
        )
        return Response(None, headers={"Allow": ", ".join(sorted(methods))})

    paths = sorted({path for handler in routes for path in handler.paths})
    method = [HttpMethod.OPTIONS]
    return HTTPRouteHandler(paths, http_method=method, status_code=204, sync_to_thread=False)(
        options
    )


class Reference(NamedTuple):
    """The reference: a page for browsers, the document for programs."""

    page: str
    json: bytes
    yaml: bytes


@cache
def _reference(is_open: bool) -> Reference:
    document = schema.document(ROUTES, is_open)
    json, yaml = msgspec.json.encode(document), msgspec.yaml.encode(document)
    return Reference(pages.reference(document), json, yaml)


def _schema_routes(keys: ApiKeys) -> tuple[HTTPRouteHandler, ...]:
    _reference(keys.is_open)  # takes a tenth of a second, which no request shall wait for

    @get("/schema", sync_to_thread=False)
    def negotiated(request: AnyRequest) -> Response[Any]:
        page = _reference(keys.is_open).page
        return pages.respond(page) if wants_html(request) else as_json()

    @get("/schema/openapi.json", sync_to_thread=False)
    def in_json() -> Response[bytes]:
        return as_json()

    @get(["/schema/openapi.yaml", "/schema/openapi.yml"], sync_to_thread=False)
    def in_yaml() -> Response[bytes]:
        return Response(_reference(keys.is_open).yaml, media_type="application/yaml")

    def as_json() -> Response[bytes]:
        json = _reference(keys.is_open).json
        return Response(json, media_type="application/json", headers={"Vary": "Accept"})

    return negotiated, in_json, in_yaml


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
