"""Each route: reads its input, asks over the bus, answers. Knows no session and no model."""

import logging
from typing import Any, TypeVar

import msgspec
from litestar import Request, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.types import ASGIApp
from msgspec import Struct

from services.client.chat import ChatClient, new_request_id
from services.client.workers import Workers
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    HistoryStatus,
    Message,
    Messages,
    MessagesRequest,
)
from services.contract.messages import ChatRequest, Empty, Prompt
from services.edge.sse import EventStream
from services.runtime.bus import VERSION, Bus, NoResponders

RETRY_AFTER = 1.0  # seconds
FIRST_TRY, SECOND_TRY = 0.5, 2.5  # seconds that history has to answer

log = logging.getLogger(__name__)
AnyRequest = Request[Any, Any, Any]
TheBus = NamedDependency[Bus]
TheWorkers = NamedDependency[Workers]
Tenant = NamedDependency[str]  # whose key it is; asking for it is what makes a route need a key
S = TypeVar("S", bound=Struct)


class ChatBody(Prompt, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /chat`. A name that we don't know is a typo, and refused."""


EXAMPLE = 'Send JSON like {"prompt": "Hello"}; the fields are ' + ", ".join(
    ChatBody.__struct_fields__
)


@get("/")
async def root(workers: TheWorkers) -> dict[str, Any]:
    return {"status": "online", "model_loaded": workers.ready}


@get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "alive"}


@get("/readyz")
async def readyz(bus: TheBus, workers: TheWorkers) -> dict[str, str]:
    _check(bus)
    if not workers.ready:
        raise workers.absence()
    return {"status": "ready"}


@get("/status")
async def status(bus: TheBus, workers: TheWorkers, tenant: Tenant) -> dict[str, Any]:
    """Never an error because something is missing: it is there to tell what is."""
    try:
        history = await _ask_history(bus, subjects.HISTORY_STATUS, Empty(), HistoryStatus)
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


@post("/chat", status_code=200)
async def chat(request: AnyRequest, bus: TheBus, workers: TheWorkers, tenant: Tenant) -> ASGIApp:
    prompt = read_prompt(await request.body())
    request_id = new_request_id()
    log.info("chat %s", request_id)
    asked = ChatRequest(**msgspec.structs.asdict(prompt), request_id=request_id)
    events = ChatClient(bus, tenant, workers).stream(asked)
    return EventStream(events, request_id, workers.refusal)


@delete("/chat/{request_id:str}", status_code=202)
async def cancel(request_id: FromPath[str], bus: TheBus, tenant: Tenant) -> dict[str, str]:
    """Whether there is such a request only its worker knows, and a cancel is not answered."""
    if not subjects.is_id(request_id):
        raise ServiceError("not_found", "There is no such request: this can't be a request id.")
    _check(bus)
    await ChatClient(bus, tenant).cancel(request_id)
    return {"status": "cancelling", "request_id": request_id}


@get("/messages")
async def messages(request: AnyRequest, bus: TheBus, tenant: Tenant) -> tuple[Message, ...]:
    asked = read_query(request, MessagesRequest)
    answer = await _ask_history(bus, subjects.history_messages(tenant), asked, Messages)
    return answer.messages


@post("/clear-history", status_code=200)
async def clear_history(request: AnyRequest, bus: TheBus, tenant: Tenant) -> dict[str, str]:
    asked = read_query(request, ClearRequest, session_id="default")
    await _ask_history(bus, subjects.history_clear(tenant), asked, Empty)
    return {"status": "success", "message": f"The session {asked.session_id!r} starts anew."}


def read_prompt(body: bytes) -> Prompt:
    """Of JSON, whatever the content type says: `curl -d` calls it a form."""
    if not body.strip():
        raise ServiceError("invalid_request", f"The body is empty. {EXAMPLE}.")
    try:
        prompt = decode(body, ChatBody)
    except ServiceError as error:
        raise ServiceError("invalid_request", f"{error} {EXAMPLE}.") from error
    prompts.check(prompt)
    return prompt


def read_query(request: AnyRequest, kind: type[S], **defaults: str) -> S:
    """Parameters that `kind` does not have are ignored, as everywhere on the web."""
    try:
        return msgspec.convert(defaults | dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ServiceError("invalid_request", f"{error}, in the query of the URL.") from error


async def _ask_history(bus: Bus, subject: str, message: Struct, kind: type[S]) -> S:
    _check(bus)
    for asked, timeout in ((subject, FIRST_TRY), (subjects.retry(subject), SECOND_TRY)):
        try:
            return await bus.request(asked, message, kind, timeout)
        except TimeoutError:
            continue
        except NoResponders:
            break
    raise ServiceError(
        "history_unavailable", "The history service does not answer; try again.", RETRY_AFTER
    )


def _check(bus: Bus) -> None:
    if not bus.connected:
        raise ServiceError("bus_unavailable", "NATS can't be reached; try again.", RETRY_AFTER)
