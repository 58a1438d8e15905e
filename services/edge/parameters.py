"""Reads the query, the path and simple bodies of requests, and routes HEAD like GET."""

from functools import partial
from typing import TypeVar
from urllib.parse import unquote

import msgspec
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import SessionId
from services.edge.errors import AnyRequest
from services.edge.plain_errors import in_plain_words

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing

S = TypeVar("S", bound=Struct)

get = partial(HTTPRouteHandler, http_method=[HttpMethod.GET, HttpMethod.HEAD])
"""
Like Litestar's `get`, but also for HEAD, which Litestar answers only where a route declares it.
uvicorn drops the body of the response; a handler that streams ends its stream.
"""


class SessionQuery(Struct, frozen=True):
    """The query of routes that need nothing but a session."""

    session_id: SessionId = "default"


def read_query(request: AnyRequest, kind: type[S]) -> S:
    """Decode the query. Unknown parameters are ignored; see reject_unknown_parameters."""
    return _convert(dict(request.query_params), kind)


def read_path(request: AnyRequest, kind: type[S], session_id: str) -> S:
    """Decode the query together with the session's id from the path, percent-encoded there."""
    try:
        decoded = unquote(session_id, errors="strict")
    except UnicodeDecodeError as error:
        message = "The session id in the URL is not UTF-8: percent-encode its UTF-8 bytes."
        raise ServiceError("invalid_request", message) from error
    return _convert({**request.query_params, "session_id": decoded}, kind)


def decode_body(body: bytes, kind: type[S], example: str) -> S:
    """Decode JSON. Raises ServiceError with the example, a sentence without its full stop."""
    try:
        return decode(body, kind)
    except ServiceError as error:
        raise ServiceError("invalid_request", f"{error} {example}.") from error


def reject_unknown_parameters(request: AnyRequest) -> None:
    """
    Raise ServiceError for an unknown parameter of a route that changes something: a mistyped one
    must not change the wrong thing. GET and /v1, whose clients add their own, accept any.
    """
    path = request.scope["path"]
    if request.method in SAFE_METHODS or path.startswith("/v1/"):
        return
    query: type[Struct] | None = request.route_handler.opt.get("query")
    known = query.__struct_fields__ if query else ()
    for name in request.query_params:
        if name not in known:
            expected = f"use {', '.join(known)}" if known else "it takes none"
            raise ServiceError(
                "invalid_request",
                f"Unknown parameter {name!r} in the URL of {request.method} {path}: {expected}.",
            )


def wants_html(request: AnyRequest) -> bool:
    return request.accept.best_match(["application/json", "text/html"]) == "text/html"


def _convert(values: dict[str, str], kind: type[S]) -> S:
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        message = in_plain_words(str(error), "URL parameter")
        raise ServiceError("invalid_request", f"{message}.") from error
