"""The one place that puts the edge together: routes, and what they depend on."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.errors import ServiceError
from services.edge import chat, errors, pages, routes, schema, sessions
from services.edge.access import Access
from services.edge.api import routes as openai
from services.edge.api import tokens
from services.edge.api.reading import HEADER, BodyReader, name_ignored
from services.edge.claims import IdempotencyKeys
from services.edge.drain import BodyDrain
from services.edge.gzip import Gzip
from services.edge.head import Head
from services.edge.keys import Keys
from services.runtime.bus import Bus

MAX_BODY_BYTES = 1024 * 1024
ROUTES: list[HTTPRouteHandler] = [
    routes.root,
    routes.healthz,
    routes.readyz,
    routes.status,
    chat.chat,
    chat.resume,
    chat.cancel,
    routes.messages,
    routes.clear_history,
    sessions.sessions,
    sessions.messages,
    sessions.describe,
    sessions.erase,
    sessions.export,
    sessions.import_,
    openai.chat_completions,
    openai.completions,
    openai.models,
    openai.model,
    tokens.tokenize,
    tokens.detokenize,
    tokens.count,
]


async def make_app(
    bus: Bus,
    keys: Keys,
    origins: Sequence[str],
    leaving: asyncio.Event,
    is_strict: bool = False,
) -> Access:
    """
    `origins` are those of the browser pages that may ask; `*` in them stands for anything.
    `leaving`: set while the edge drains. `is_strict`: reject unknown fields of /v1.
    """
    workers, claims, bodies = WorkerDirectory(), IdempotencyKeys(bus), BodyReader(is_strict)
    await bus.subscribe(subjects.report(subjects.ANY), workers.on_report)

    def tenant(request: Request[Any, Any, Any]) -> str:
        return keys.tenant(request.headers)

    cors = CORSConfig(
        allow_origins=list(origins),
        expose_headers=["Content-Location", "Retry-After", "X-Request-Id", HEADER],
    )
    litestar = Litestar(
        [*ROUTES, *_reference(schema.document(ROUTES, keys.is_open))],
        dependencies={
            "bodies": Provide(lambda: bodies, sync_to_thread=False),
            "bus": Provide(lambda: bus, sync_to_thread=False),
            "claims": Provide(lambda: claims, sync_to_thread=False),
            "workers": Provide(lambda: workers, sync_to_thread=False),
            "leaving": Provide(lambda: leaving, sync_to_thread=False),
            "tenant": Provide(tenant, sync_to_thread=False),
        },
        exception_handlers={
            ServiceError: errors.service_error,
            HTTPException: errors.framework_error,
            Exception: errors.unexpected_error,
        },
        cors_config=cors,
        before_send=[name_ignored],
        before_request=partial(_check, cors),
        openapi_config=None,
        request_max_body_size=MAX_BODY_BYTES,
        logging_config=None,
    )
    return Access(Gzip(Head(BodyDrain(litestar))))


def _reference(document: dict[str, Any]) -> list[HTTPRouteHandler]:
    """Return the routes of the reference: a page for browsers, the document for programs."""
    page = pages.reference(document)
    json, yaml = msgspec.json.encode(document), msgspec.yaml.encode(document)

    @get("/schema", sync_to_thread=False)
    def for_both(request: Request[Any, Any, Any]) -> Response[Any]:
        return pages.answer(page) if routes.wants_html(request) else for_programs()

    @get("/schema/openapi.json", sync_to_thread=False)
    def as_json() -> Response[bytes]:
        return for_programs()

    @get(["/schema/openapi.yaml", "/schema/openapi.yml"], sync_to_thread=False)
    def as_yaml() -> Response[bytes]:
        return Response(yaml, media_type="application/yaml")

    def for_programs() -> Response[bytes]:
        return Response(json, media_type="application/json", headers={"Vary": "Accept"})

    return [for_both, as_json, as_yaml]


async def _check(cors: CORSConfig, request: Request[Any, Any, Any]) -> None:
    _refuse_strangers(cors, request)
    routes.refuse_unknown_parameters(request)


def _refuse_strangers(cors: CORSConfig, request: Request[Any, Any, Any]) -> None:
    """
    CORS keeps a stranger's page from reading an answer, not from asking: a browser sends a plain
    POST without a preflight.
    """
    origin = request.headers.get("origin")
    if not origin or request.method in routes.SAFE_METHODS:
        return
    host = origin.partition("://")[2]
    if host == request.headers.get("host") or cors.is_origin_allowed(origin):
        return
    raise ServiceError(
        "forbidden", f"Pages of {origin!r} may not ask; EDGE_CORS_ORIGINS lists those that may."
    )
