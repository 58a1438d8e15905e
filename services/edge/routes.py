"""Each route: reads its input, asks over the bus, answers. Knows no session and no model."""

import asyncio
import logging
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

import msgspec
from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from msgspec import Struct

from services.client.chat_client import new_request_id
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    ExchangePage,
    ExchangeView,
    HistoryStatus,
    MessagesRequest,
)
from services.contract.messages import Empty, ModelInfo, SessionId, WorkerReport
from services.contract.version import VERSION
from services.edge import pages
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders, RequestSilent

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing
RETRY_AFTER = 1.0  # seconds
# seconds without a sign of life after which one history process counts as dead, or all of them
SILENCE, SILENCE_OF_ALL = 0.5, 2.5
PATIENCE = 10.0  # seconds for a process that is alive
READY_PATIENCE = 2.5  # seconds for /readyz

log = logging.getLogger(__name__)
AnyRequest = Request[Any, Any, Any]
TheBus = NamedDependency[Bus]
TheWorkers = NamedDependency[WorkerDirectory]
Leaving = NamedDependency[asyncio.Event]
Tenant = NamedDependency[str]  # whose key it is; asking for it is what makes a route need a key
S = TypeVar("S", bound=Struct)


class SessionQuery(Struct, frozen=True):
    """Which session is meant, where nothing else is asked."""

    session_id: SessionId = "default"


class ClearBody(SessionQuery, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /clear-history`."""


class Root(Struct, frozen=True):
    """`schema` and `details` are the paths of the documentation and of the full status."""

    status: Literal["online"]
    model_loaded: bool
    schema: str = "/schema"
    details: str = "/status"


class Health(Struct, frozen=True):
    status: Literal["alive", "ready"]


class Status(Struct, frozen=True):
    """`history` is null while no history process answers, `model` while no model is ready."""

    status: Literal["online"]
    version: str
    nats_connected: bool
    model_loaded: bool
    database_connected: bool
    model: ModelInfo | None
    workers: list[WorkerReport]
    history: HistoryStatus | None


class Success(Struct, frozen=True, kw_only=True):
    status: Literal["success"] = "success"
    message: str


@get("/")
async def root(request: AnyRequest, workers: TheWorkers) -> Response[Any]:
    if wants_html(request):
        return pages.answer(pages.greeting(request.headers.get("host", "localhost")))
    return Response(Root("online", workers.ready), headers={"Vary": "Accept"})


@get("/healthz")
async def healthz() -> Health:
    return Health("alive")


@get("/readyz")
async def readyz(bus: TheBus, workers: TheWorkers, leaving: Leaving) -> Health:
    if leaving.is_set():
        raise ServiceError("shutting_down", "This edge is leaving: ask another.", RETRY_AFTER)
    check_bus(bus)
    if not workers.ready:
        raise workers.unavailable_error()
    await _check_log(bus)
    return Health("ready")


async def _check_log(bus: Bus) -> None:
    """Raises ServiceError while history refuses chats or hangs; not if there is no history."""
    try:
        history = await _ask(bus, subjects.HISTORY_STATUS, Empty(), HistoryStatus, READY_PATIENCE)
    except NoResponders:
        return
    except TimeoutError as error:
        raise _unavailable("does not answer") from error
    if history.refuses:
        raise ServiceError(
            history.refuses, history.warning or "History refuses chats.", RETRY_AFTER
        )


@get("/status")
async def status(bus: TheBus, workers: TheWorkers, tenant: Tenant) -> Status:
    """Never an error because something is missing: it is there to tell what is."""
    try:
        history = await ask_history(bus, subjects.HISTORY_STATUS, Empty(), HistoryStatus)
    except ServiceError:
        history = None
    return Status(
        status="online",
        version=VERSION,
        nats_connected=bus.connected,
        model_loaded=workers.ready,
        database_connected=history is not None and history.database_connected,
        model=workers.model,
        workers=workers.reports(),
        history=history,
    )


@get("/messages")
async def messages(request: AnyRequest, bus: TheBus, tenant: Tenant) -> tuple[ExchangeView, ...]:
    asked = read_query(request, MessagesRequest)
    answer = await ask_history(bus, subjects.history("messages", tenant), asked, ExchangePage)
    return answer.messages


@post("/clear-history", status_code=200, query=SessionQuery)
async def clear_history(request: AnyRequest, bus: TheBus, tenant: Tenant) -> Success:
    id_ = _session_to_clear(request, await request.body())
    asked = ClearRequest(id_, new_request_id())
    await ask_history(bus, subjects.history("clear", tenant), asked, Empty)
    return Success(
        message=f"The context of session {id_!r} is cleared; its messages stay readable."
    )


def _session_to_clear(request: AnyRequest, body: bytes) -> str:
    """Return the session that the body or the query names."""
    asked = read_query(request, SessionQuery).session_id
    if not body.strip():
        return asked
    try:
        given = decode(body, ClearBody).session_id
    except ServiceError as error:
        example = 'Send JSON like {"session_id": "default"}, or no body'
        raise ServiceError("invalid_request", f"{error} {example}.") from error
    if "session_id" in request.query_params and given != asked:
        raise ServiceError(
            "invalid_request",
            f"The URL names session {asked!r}, the body {given!r}: send only one of them.",
        )
    return given


def refuse_unknown_parameters(request: AnyRequest) -> None:
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
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ServiceError(
                "invalid_request",
                f"Unknown parameter {name!r} in the URL of {request.method} {path}: {takes}.",
            )


def wants_html(request: AnyRequest) -> bool:
    return request.accept.best_match(["application/json", "text/html"]) == "text/html"


def read_query(request: AnyRequest, kind: type[S]) -> S:
    """Return the query. Ignores unknown parameters; see refuse_unknown_parameters."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ServiceError("invalid_request", f"{error}, in the query of the URL.") from error


def read_path(request: AnyRequest, kind: type[S], session_id: str) -> S:
    """The query, and the session's id as the path has it, percent-encoded."""
    try:
        decoded = unquote(session_id, errors="strict")
    except UnicodeDecodeError as error:
        raise ServiceError("invalid_request", "The session id in the URL is no UTF-8.") from error
    values = {**request.query_params, "session_id": decoded}
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ServiceError("invalid_request", f"{error}, in the URL.") from error


async def ask_history(
    bus: Bus, subject: str, message: Struct, kind: type[S], patience: float = PATIENCE
) -> S:
    """Ask history; `patience` in seconds for a process that works on it. Raises ServiceError."""
    check_bus(bus)
    try:
        return await _ask(bus, subject, message, kind, patience)
    except (NoResponders, RequestSilent) as error:
        raise _unavailable("does not answer") from error
    except TimeoutError as error:
        raise _unavailable(f"takes longer than {patience:.0f} s") from error


async def _ask(bus: Bus, subject: str, message: Struct, kind: type[S], patience: float) -> S:
    """
    Ask one process, and all of them only after it is silent, so that a slow request is not
    repeated.
    """
    try:
        return await bus.request(subject, message, kind, patience, silence=SILENCE)
    except RequestSilent:
        retry = subjects.retry(subject)
        return await bus.request(retry, message, kind, patience, silence=SILENCE_OF_ALL)


def _unavailable(why: str) -> ServiceError:
    return ServiceError(
        "history_unavailable", f"The history service {why}; try again.", RETRY_AFTER
    )


def check_bus(bus: Bus) -> None:
    if not bus.connected:
        raise ServiceError("bus_unavailable", "NATS can't be reached; try again.", RETRY_AFTER)
