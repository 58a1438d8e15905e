"""`/`, `/healthz`, `/readyz` and `/status`: greeting, probes and the state of the whole service."""

from typing import Any, Literal

from litestar import Response
from msgspec import Struct

from services.contract.errors import ServiceError
from services.contract.history import HistoryStatus
from services.contract.messages import ModelInfo, WorkerReport
from services.contract.version import VERSION
from services.edge import pages
from services.edge.context import Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.history_requests import check_connected
from services.edge.parameters import get, wants_html


class Root(Struct, frozen=True):
    """`schema` and `details` are the paths of the documentation and of the full status."""

    status: Literal["online"]
    model_loaded: bool
    schema: str = "/schema"
    details: str = "/status"


class Health(Struct, frozen=True):
    status: Literal["alive", "ready"]


class Status(Struct, frozen=True):
    """`history` is null while no history process replies, `model` while no model is ready."""

    status: Literal["online"]
    version: str
    nats_connected: bool
    model_loaded: bool
    database_connected: bool
    model: ModelInfo | None
    workers: list[WorkerReport]
    history: HistoryStatus | None


@get("/")
async def root(request: AnyRequest, edge: TheEdge) -> Response[Any]:
    if wants_html(request):
        return pages.respond(pages.welcome(request.headers.get("host", "localhost")))
    return Response(Root("online", edge.workers.ready), headers={"Vary": "Accept"})


@get("/healthz")
async def healthz() -> Health:
    return Health("alive")


@get("/readyz")
async def readyz(edge: TheEdge) -> Health:
    if edge.draining.is_set():
        raise ServiceError("shutting_down", "This edge is shutting down: use another one.")
    check_connected(edge.bus)
    if not edge.workers.ready:
        raise edge.workers.unavailable_error()
    await edge.history.check_chats_accepted()
    return Health("ready")


@get("/status")
async def status(edge: TheEdge, tenant: Tenant) -> Status:
    """Report what is down in the fields; the response is never an error for it."""
    history = await edge.history.status()
    return Status(
        status="online",
        version=VERSION,
        nats_connected=edge.bus.connected,
        model_loaded=edge.workers.ready,
        database_connected=history is not None and history.database_connected,
        model=edge.workers.model,
        workers=edge.workers.reports(),
        history=history,
    )
