"""`/`, `/healthz`, `/readyz` and `/status`: greeting, probes and the state of the whole service."""

from typing import Any, Literal

from litestar import Response
from litestar.di import NamedDependency
from msgspec import UNSET, Struct, UnsetType

from services.client.history_requests import check_connected
from services.contract.errors import ServiceError
from services.contract.history import HistoryStatus
from services.contract.messages import ModelInfo, WorkerReport
from services.contract.version import VERSION
from services.edge import pages
from services.edge.activity import Activity
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.page_files import Page
from services.edge.parameters import get, read_query, wants_html


class Root(Struct, frozen=True):
    """`schema` and `details` are the paths of the documentation and of the full status."""

    status: Literal["online"]
    model_loaded: bool
    schema: str = "/schema"
    details: str = "/status"


class Health(Struct, frozen=True):
    status: Literal["alive", "ready"]


class KeyUsage(Struct, frozen=True):
    """What a tenant uses at all edges. Requests and tokens are those of the last minute."""

    name: str
    running: int
    requests: int
    tokens: int
    parallel: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


class ReadyQuery(Struct, frozen=True):
    """`fleet=false`: whether this edge may get requests, also while workers or history are away."""

    fleet: bool = True


class StatusQuery(Struct, frozen=True):
    """`activity`: show the last ten minutes, too."""

    activity: bool = False


class Status(Struct, frozen=True):
    """
    `history` is null while no history process replies, `model` while none is ready that the tenant
    may use. Only admins see `workers`, `history` and, if they ask for it, `activity`, which show
    what other tenants do; others see what they use in `key`.
    """

    status: Literal["online"]
    version: str
    nats_connected: bool
    model_loaded: bool
    database_connected: bool
    model: ModelInfo | None
    workers: list[WorkerReport] | UnsetType = UNSET
    history: HistoryStatus | None | UnsetType = UNSET
    activity: Activity | UnsetType = UNSET
    key: KeyUsage | UnsetType = UNSET


@get("/")
async def root(
    request: AnyRequest, edge: TheEdge, page: NamedDependency[Page | None]
) -> Response[Any]:
    """Return JSON to programs; to browsers the chat page, or a welcome if that is turned off."""
    if wants_html(request):
        if page:
            return page.respond_index(request)
        return pages.respond(pages.welcome(request.headers.get("host", "localhost")))
    return Response(Root("online", edge.workers.ready), headers={"Vary": "Accept"})


@get("/healthz")
async def healthz() -> Health:
    return Health("alive")


@get("/readyz", query=ReadyQuery)
async def readyz(request: AnyRequest, edge: TheEdge) -> Health:
    """
    Check what clients need. Where all edges fail together nobody would see the reason, or could
    make room, if that took them out of a load balancer: `fleet=false` leaves it out.
    """
    query = read_query(request, ReadyQuery)
    if edge.draining.is_set():
        raise ServiceError("shutting_down", "This edge is shutting down: use another one.")
    check_connected(edge.bus)
    if not edge.workers.ready and (query.fleet or not edge.workers.is_complete):
        raise _why_not_ready(edge)
    if query.fleet:
        await edge.history.check_chats_accepted()
    return Health("ready")


@get("/status", query=StatusQuery)
async def status(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> Status:
    """Report what is down in the fields; the response is never an error for it."""
    query = read_query(request, StatusQuery)
    history = await edge.history.status()
    is_admin = edge.api_keys.is_admin(request.headers)
    visible = edge.rate_limits.visible_workers(tenant)
    return Status(
        status="online",
        version=VERSION,
        nats_connected=edge.bus.connected,
        model_loaded=visible.ready,
        database_connected=history is not None and history.database_connected,
        model=visible.model,
        workers=edge.workers.reports() if is_admin else UNSET,
        history=history if is_admin else UNSET,
        activity=edge.activity.activity() if is_admin and query.activity else UNSET,
        key=UNSET if edge.api_keys.is_open else _key_usage(edge, tenant),
    )


def _why_not_ready(edge: Edge) -> ServiceError:
    """Return why no model is ready. With API keys it names none: a probe has no key."""
    error = edge.workers.unavailable_error()
    if edge.api_keys.is_open:
        return error
    message = "No model is ready: GET /v1/models with an API key lists them, and why."
    return ServiceError(error.code, message, error.retry_after)


def _key_usage(edge: Edge, tenant: str) -> KeyUsage:
    key = edge.api_keys.limits(tenant)
    return KeyUsage(
        tenant,
        *edge.rate_limits.usage(tenant),
        key.parallel,
        key.requests_per_minute,
        key.tokens_per_minute,
    )
