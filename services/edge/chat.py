"""The routes of one answer: asked for, read again from anywhere, stopped. Knows no model."""

import logging
from typing import Literal

import msgspec
from litestar import delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp
from msgspec import Raw

from services.client.chat_client import ChatClient, new_request_id
from services.contract import prompts, subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest, PromptRequest
from services.edge import sizes
from services.edge.answers import StoredAnswers
from services.edge.claims import IdempotencyKeys
from services.edge.routes import AnyRequest, Tenant, TheBus, TheWorkers, check_bus
from services.edge.sse import END, EventStream

GRACE = 10.0  # seconds in which a client that lost its connection may come back to its answer

WITHOUT_KEY = (
    "POST /chat with Last-Event-ID needs the Idempotency-Key of the original request. Send both, or"
    " resume with GET /chat/{request_id}."
)

TheClaims = NamedDependency[IdempotencyKeys]
log = logging.getLogger(__name__)


class ChatBody(PromptRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /chat`. A name that we don't know is a typo, and refused."""


EXAMPLE = 'Send JSON like {"prompt": "Hello"}; the fields are ' + ", ".join(
    ChatBody.__struct_fields__
)


@post("/chat", status_code=200)
async def chat(
    request: AnyRequest,
    bus: TheBus,
    workers: TheWorkers,
    claims: TheClaims,
    tenant: Tenant,
) -> ASGIApp:
    """
    Answer a prompt. A repeat with the same `Idempotency-Key` gets the same answer, running or
    finished; with `Last-Event-ID` as well, only the events after that one.
    """
    prompt = read_prompt(await request.body())
    key, at = request.headers.get("idempotency-key"), _last_event_id(request)
    client = ChatClient(bus, tenant, workers)
    answers = StoredAnswers(bus, tenant, client)
    if at and not key:
        raise ServiceError("invalid_request", WITHOUT_KEY)
    if at == END:
        return _no_content()
    if key and at:
        request_id, is_mine = await answers.begun(claims, key, prompt), False
    elif key:
        request_id, is_mine = await answers.once(claims, key, prompt)
    else:
        request_id, is_mine = new_request_id(), True
    log.info("chat %s", request_id)
    if is_mine:
        fields = msgspec.structs.asdict(prompt)
        events = client.stream(ChatRequest(**fields, request_id=request_id, grace_s=GRACE))
    else:
        events = answers.again(request_id, at)
    return EventStream(events, request_id, workers.to_error)


@get("/chat/{request_id:str}")
async def resume(
    request: AnyRequest,
    request_id: FromPath[str],
    bus: TheBus,
    workers: TheWorkers,
    tenant: Tenant,
) -> ASGIApp:
    """
    Send the events of an answer after `Last-Event-ID`, or all of them. After the last event it is
    a 204, which stops an EventSource from reconnecting.
    """
    check_id(request_id)
    at = _last_event_id(request)
    if at == END:
        return _no_content()
    log.info("resuming %s from %d", request_id, at)
    events = StoredAnswers(bus, tenant, ChatClient(bus, tenant, workers)).again(request_id, at)
    return EventStream(events, request_id, workers.to_error)


@delete("/chat/{request_id:str}", status_code=202)
async def cancel(request_id: FromPath[str], bus: TheBus, tenant: Tenant) -> dict[str, str]:
    """Whether there is such a request only its worker knows, and a cancel is not answered."""
    check_id(request_id)
    check_bus(bus)
    await ChatClient(bus, tenant).cancel(request_id)
    return {"status": "cancelling", "request_id": request_id}


def read_prompt(body: bytes) -> PromptRequest:
    """Of JSON, whatever the content type says: `curl -d` calls it a form."""
    if not body.strip():
        raise ServiceError("invalid_request", f"The body is empty. {EXAMPLE}.")
    try:
        sizes.check_sizes(decode(body, dict[str, Raw]))
        prompt = decode(body, ChatBody)
    except ServiceError as error:
        if error.code != "invalid_request":
            raise
        raise ServiceError("invalid_request", f"{error} {EXAMPLE}.") from error
    prompts.check(prompt)
    return prompt


def check_id(request_id: str) -> None:
    if not subjects.is_id(request_id):
        raise ServiceError("not_found", "There is no such request: this can't be a request id.")


def _last_event_id(request: AnyRequest) -> int | Literal["end"]:
    """Return the length of the answer up to the last event that the client has, or `end`."""
    given = request.headers.get("last-event-id") or "0"
    if given == END:
        return END
    if not given.isdecimal() or not given.isascii() or len(given) > 9:
        raise ServiceError(
            "invalid_request", f"Last-Event-ID must be the id of an event, not {given[:20]!r}."
        )
    return int(given)


def _no_content() -> ASGIApp:
    return ASGIResponse(status_code=204)
