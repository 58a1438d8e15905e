"""Every failure as HTTP: one table from code to status and type, one shape of body."""

import logging
import math
import re
from typing import Any, NamedTuple

from litestar import Request, Response
from litestar.exceptions import HTTPException

from services.contract.errors import ErrorCode, ServiceError

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    status: int
    type: str  # as OpenAI names it


TABLE: dict[ErrorCode, Kind] = {
    "invalid_request": Kind(400, "invalid_request_error"),
    "context_length_exceeded": Kind(400, "invalid_request_error"),
    "unauthorized": Kind(401, "authentication_error"),
    "forbidden": Kind(403, "invalid_request_error"),
    "not_found": Kind(404, "invalid_request_error"),
    "model_not_found": Kind(404, "invalid_request_error"),
    "method_not_allowed": Kind(405, "invalid_request_error"),
    "conflict": Kind(409, "invalid_request_error"),
    "payload_too_large": Kind(413, "invalid_request_error"),
    "internal": Kind(500, "server_error"),
    "overloaded": Kind(503, "server_error"),
    "timeout": Kind(504, "server_error"),
    "no_worker": Kind(503, "server_error"),
    "model_loading": Kind(503, "server_error"),
    "model_unavailable": Kind(503, "server_error"),
    "history_unavailable": Kind(503, "server_error"),
    "history_full": Kind(503, "server_error"),
    "bus_unavailable": Kind(503, "server_error"),
    "worker_lost": Kind(503, "server_error"),
    "shutting_down": Kind(503, "server_error"),
}

HOPELESS: tuple[ErrorCode, ...] = ("conflict", "model_unavailable")
"""OpenAI's SDKs would repeat them by their status, and can be told not to."""

NAMES_FIELD: tuple[ErrorCode, ...] = ("invalid_request", "context_length_exceeded")

# msgspec names the field: "… field `promt`", "… - at `$.prompt`", "… - at `key` in `$.logit_bias`"
_FIELD = re.compile(r"(?:field `|(?:at|in) `\$\.)(\w+)")

AnyRequest = Request[Any, Any, Any]
ErrorBody = dict[str, dict[str, str | None]]


def service_error(_: AnyRequest, error: ServiceError) -> Response[ErrorBody]:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if error.code in HOPELESS:
        headers["x-should-retry"] = "false"
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return Response(body(error), status_code=TABLE[error.code].status, headers=headers)


def body(error: ServiceError) -> ErrorBody:
    field = _FIELD.search(error.message) if error.code in NAMES_FIELD else None
    told = {
        "message": error.message,
        "type": TABLE[error.code].type,
        "param": field and field[1],
        "code": error.code,
    }
    return {"error": told}


def framework_error(request: AnyRequest, error: HTTPException) -> Response[ErrorBody]:
    """What Litestar itself refuses."""
    where = f"{request.method} {request.url.path}"
    headers = error.headers or {}
    match error.status_code:
        case 404:
            return _response("not_found", f"No such route: {where}. GET /schema lists all routes.")
        case 405:
            usable = [name for name in headers.get("allow", "").split(", ") if name != "OPTIONS"]
            message = f"{request.method} is not allowed on {request.url.path}; use "
            message += f"{' or '.join(usable)}. GET /schema lists all routes."
            return _response("method_not_allowed", message, headers)
        case 413:
            return _response("payload_too_large", "The body is larger than 1 MiB; send less.")
        case status if status < 500:
            return _response("invalid_request", f"{error.detail}.", headers)
        case _:
            return _response("internal", f"{error.detail}.", headers)


def unexpected_error(_: AnyRequest, error: Exception) -> Response[ErrorBody]:
    log.error("unexpected", exc_info=error)
    return _response(
        "internal", "Something failed here; the log has it, under this answer's X-Request-Id."
    )


def _response(
    code: ErrorCode, message: str, headers: dict[str, str] | None = None
) -> Response[ErrorBody]:
    content = body(ServiceError(code, message))
    return Response(content, status_code=TABLE[code].status, headers=headers)
