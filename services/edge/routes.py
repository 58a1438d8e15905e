"""Each route: reads its input, asks over the bus, answers. Knows no session and no model."""

import asyncio
import logging
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
from litestar import Request, get, post
from litestar.di import NamedDependency
from msgspec import Struct

from services.client.chat import new_request_id
from services.client.workers import Workers
from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    HistoryStatus,
    Message,
    Messages,
    MessagesRequest,
)
from services.contract.messages import Empty, SessionId
from services.runtime.bus import VERSION, Bus
from services.runtime.deliveries import NoResponders, Silent

RETRY_AFTER = 1.0  # seconds
# seconds without a sign of life, after which a history process counts as dead, or all of them do
SILENCE, SILENCE_OF_ALL = 0.5, 2.5
PATIENCE = 10.0  # seconds for one that lives
READY_PATIENCE = 2.5  # seconds for /readyz

log = logging.getLogger(__name__)
AnyRequest = Request[Any, Any, Any]
TheBus = NamedDependency[Bus]
TheWorkers = NamedDependency[Workers]
Leaving = NamedDependency[asyncio.Event]
Tenant = NamedDependency[str]  # whose key it is; asking for it is what makes a route need a key
S = TypeVar("S", bound=Struct)


class SessionQuery(Struct, frozen=True):
    """Which session is meant, where nothing else is asked."""

    session_id: SessionId = "default"


@get("/")
async def root(workers: TheWorkers) -> dict[str, Any]:
    return {"status": "online", "model_loaded": workers.ready}


@get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "alive"}


@get("/readyz")
async def readyz(bus: TheBus, workers: TheWorkers, leaving: Leaving) -> dict[str, str]:
    if leaving.is_set():
        raise ServiceError("shutting_down", "This edge is leaving: ask another.", RETRY_AFTER)
    check_bus(bus)
    if not workers.ready:
        raise workers.absence()
    await _check_log(bus)
    return {"status": "ready"}


async def _check_log(bus: Bus) -> None:
    """Raises ServiceError while history refuses chats. One that does not answer has no say."""
    try:
        history = await ask_history(
            bus, subjects.HISTORY_STATUS, Empty(), HistoryStatus, READY_PATIENCE
        )
    except ServiceError:
        return
    if history.refuses:
        raise ServiceError(history.refuses, history.warning or "History refuses.", RETRY_AFTER)


@get("/status")
async def status(bus: TheBus, workers: TheWorkers, tenant: Tenant) -> dict[str, Any]:
    """Never an error because something is missing: it is there to tell what is."""
    try:
        history = await ask_history(bus, subjects.HISTORY_STATUS, Empty(), HistoryStatus)
    except ServiceError:
        history = None
    return {
        "status": "online",
        "version": VERSION,
        "nats_connected": bus.connected,
        "model_loaded": workers.ready,
        "database_connected": history is not None and history.database_connected,
        "model": workers.model,
        "workers": workers.reports(),
        "history": history,
    }


@get("/messages")
async def messages(request: AnyRequest, bus: TheBus, tenant: Tenant) -> tuple[Message, ...]:
    asked = read_query(request, MessagesRequest)
    answer = await ask_history(bus, subjects.history_messages(tenant), asked, Messages)
    return answer.messages


@post("/clear-history", status_code=200)
async def clear_history(request: AnyRequest, bus: TheBus, tenant: Tenant) -> dict[str, str]:
    id_ = read_query(request, SessionQuery).session_id
    asked = ClearRequest(id_, new_request_id())
    await ask_history(bus, subjects.history_clear(tenant), asked, Empty)
    return {"status": "success", "message": f"The session {id_!r} starts anew."}


def read_query(request: AnyRequest, kind: type[S]) -> S:
    """Parameters that `kind` does not have are ignored, as everywhere on the web."""
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
    """
    One process is asked; all of them only once it is silent, so that nothing is done twice because
    it takes its time. `patience` in seconds. Raises ServiceError.
    """
    check_bus(bus)
    why = "does not answer"
    for asked, silence in ((subject, SILENCE), (subjects.retry(subject), SILENCE_OF_ALL)):
        try:
            return await bus.request(asked, message, kind, patience, silence=silence)
        except Silent:
            continue
        except TimeoutError:
            why = f"takes longer than {patience:.0f} s"
            break
        except NoResponders:
            break
    raise ServiceError("history_unavailable", f"The history service {why}; try again.", RETRY_AFTER)


def check_bus(bus: Bus) -> None:
    if not bus.connected:
        raise ServiceError("bus_unavailable", "NATS can't be reached; try again.", RETRY_AFTER)
