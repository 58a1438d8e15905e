"""Every failure as an HTTP response: one table from code to status and type, one shape of body."""

import logging
import math
import re
from typing import Any, NamedTuple

from litestar import Request, Response
from litestar.exceptions import HTTPException

from services.contract.errors import ErrorCode, ServiceError
from services.edge.plain_errors import in_plain_words
from services.runtime import logs, trace_context

log = logging.getLogger(__name__)


class ErrorKind(NamedTuple):
    status: int
    type: str  # OpenAI's name


TABLE: dict[ErrorCode, ErrorKind] = {
    "invalid_request": ErrorKind(400, "invalid_request_error"),
    "context_length_exceeded": ErrorKind(400, "invalid_request_error"),
    "unauthorized": ErrorKind(401, "authentication_error"),
    "forbidden": ErrorKind(403, "invalid_request_error"),
    "not_found": ErrorKind(404, "invalid_request_error"),
    "previous_response_not_found": ErrorKind(400, "invalid_request_error"),
    "model_not_found": ErrorKind(404, "invalid_request_error"),
    "method_not_allowed": ErrorKind(405, "invalid_request_error"),
    "conflict": ErrorKind(409, "invalid_request_error"),
    "wrong_host": ErrorKind(421, "invalid_request_error"),
    "payload_too_large": ErrorKind(413, "invalid_request_error"),
    "rate_limit_exceeded": ErrorKind(429, "rate_limit_error"),
    "too_many_sessions": ErrorKind(429, "rate_limit_error"),
    "internal": ErrorKind(500, "server_error"),
    "overloaded": ErrorKind(503, "server_error"),
    "timeout": ErrorKind(504, "server_error"),
    "no_worker": ErrorKind(503, "server_error"),
    "model_loading": ErrorKind(503, "server_error"),
    "model_unavailable": ErrorKind(503, "server_error"),
    "history_unavailable": ErrorKind(503, "server_error"),
    "history_full": ErrorKind(503, "server_error"),
    "bus_unavailable": ErrorKind(503, "server_error"),
    "worker_lost": ErrorKind(503, "server_error"),
    "shutting_down": ErrorKind(503, "server_error"),
}

ANTHROPIC_PATH, OLLAMA_PATH = "/v1/messages", "/api/"
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Error types of Anthropic's API by status; of any other status `api_error`."""

NOT_RETRYABLE: tuple[ErrorCode, ...] = ("conflict", "model_unavailable", "too_many_sessions")
"""OpenAI's SDKs retry these statuses unless `x-should-retry: false` is sent."""

IMPLIED_METHODS = ("HEAD", "OPTIONS")

NAMES_FIELD: tuple[ErrorCode, ...] = (
    "invalid_request",
    "context_length_exceeded",
    "previous_response_not_found",
)

# "The field `prompt` …", "… unknown field `promt`", "… - at `$.messages[0]`"
_FIELD = re.compile(r"(?:(?:field|parameter) `|at `\$\.)(\w+)")

AnyRequest = Request[Any, Any, Any]
ErrorBody = dict[str, Any]


class DetailedError(ServiceError):
    """
    A ServiceError with another message, and with more fields in the response: beside `error`, or
    inside of it in Anthropic's form.
    """

    def __init__(self, error: ServiceError, message: str, **fields: Any) -> None:
        super().__init__(error.code, message, error.retry_after)
        self.fields = fields


def service_error(request: AnyRequest, error: ServiceError) -> Response[ErrorBody]:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if error.code in NOT_RETRYABLE:
        headers["x-should-retry"] = "false"
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return _response(request, error, headers)


def framework_error(request: AnyRequest, error: HTTPException) -> Response[ErrorBody]:
    """Return the response for an error that Litestar raises, in the same shape as ours."""
    headers = error.headers or {}
    return _response(request, _describe(request, error, headers), headers)


def unexpected_error(request: AnyRequest, error: Exception) -> Response[ErrorBody]:
    log.error("request failed", exc_info=error)
    message = "Internal server error. Quote X-Request-Id when reporting it."
    return _response(request, ServiceError("internal", message))


def body(error: ServiceError) -> ErrorBody:
    message = in_plain_words(error.message)
    field = _FIELD.search(message) if error.code in NAMES_FIELD else None
    content = {
        "message": message,
        "type": TABLE[error.code].type,
        "param": field and field[1],
        "code": error.code,
    }
    more = error.fields if isinstance(error, DetailedError) else {}
    return {"error": content | trace_field(), **more}


def trace_field() -> ErrorBody:
    """Return the field of an error that names the trace of the request; none outside of one."""
    trace_id = trace_context.trace_id()
    return {"trace_id": trace_id} if trace_id else {}


def _describe(request: AnyRequest, error: HTTPException, headers: dict[str, str]) -> ServiceError:
    path = request.url.path
    match error.status_code:
        case 404:
            message = f"No such route: {request.method} {path}. GET /schema lists all routes."
            return ServiceError("not_found", message)
        case 405:
            allowed = [m for m in headers.get("allow", "").split(", ") if m not in IMPLIED_METHODS]
            message = f"{request.method} is not allowed on {path}; use {' or '.join(allowed)}."
            return ServiceError("method_not_allowed", f"{message} GET /schema lists all routes.")
        case 413:
            return ServiceError("payload_too_large", "The body is larger than 1 MiB: send less.")
        case status:
            return ServiceError(
                "invalid_request" if status < 500 else "internal", f"{error.detail}."
            )


def anthropic_body(error: ServiceError) -> ErrorBody:
    """Return the body of an error in the form of Anthropic's API."""
    kind = ANTHROPIC_TYPES.get(TABLE[error.code].status, "api_error")
    more = error.fields if isinstance(error, DetailedError) else {}
    return {
        "type": "error",
        "error": {"type": kind, "message": in_plain_words(error.message), **more},
        "request_id": logs.request_id.get(),
        **trace_field(),
    }


def ollama_body(error: ServiceError) -> ErrorBody:
    return {"error": in_plain_words(error.message), **trace_field()}


def _response(
    request: AnyRequest, error: ServiceError, headers: dict[str, str] | None = None
) -> Response[ErrorBody]:
    request.state.error_code = error.code  # for metrics
    path = request.scope["path"]
    if path.startswith(ANTHROPIC_PATH):
        content = anthropic_body(error)
    else:
        content = ollama_body(error) if path.startswith(OLLAMA_PATH) else body(error)
    return Response(content, status_code=TABLE[error.code].status, headers=headers)
