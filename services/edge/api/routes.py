"""The routes under /v1. A session that a client names only says which worker is warm."""

import hashlib
import logging
import time
from collections.abc import Sequence
from urllib.parse import unquote

from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.types import ASGIApp
from msgspec.structs import replace

from services.client.chat_client import ChatClient, new_request_id
from services.client.routing import WorkerDirectory
from services.contract import prompts
from services.contract.errors import ServiceError
from services.contract.messages import ChatRequest
from services.edge.api.answers import ChatChoiceBuilder, ChoiceBuilder, TextChoiceBuilder
from services.edge.api.bodies import (
    Body,
    ChatCompletionBody,
    CompletionBody,
    chat_request,
    text_requests,
)
from services.edge.api.completions import (
    CHAT,
    TEXT,
    CompletionBuilder,
    ResponseObjects,
    StreamedResponse,
    WholeResponse,
)
from services.edge.api.objects import ModelList, ModelObject
from services.edge.api.reading import BodyReader
from services.edge.routes import AnyRequest, Tenant, TheBus, TheWorkers
from services.runtime.bus import Bus

TheBodies = NamedDependency[BodyReader]
MAX_SESSION_ID = 128  # characters; a longer one is hashed, as it is only compared
SESSION_HEADERS = ("x-session-id", "x-conversation-id", "x-openwebui-chat-id")

log = logging.getLogger(__name__)


@post("/v1/chat/completions", status_code=200)
async def chat_completions(
    request: AnyRequest, bodies: TheBodies, bus: TheBus, workers: TheWorkers, tenant: Tenant
) -> ASGIApp:
    body = await bodies.read(request, ChatCompletionBody)
    _check_counts("messages", len(body.messages), workers, body.model)
    asked = chat_request(body, session_of(request, body))
    n = body.n or 1
    names = [] if asked.tool_choice == "none" else [t.function.name for t in asked.tools or ()]
    several = asked.parallel_tool_calls is not False
    answers = [ChatChoiceBuilder(index, names, several) for index in range(n)]
    client = ChatClient(bus, tenant, workers)
    return _respond(CHAT, body, [asked], answers, client, workers, bus)


@post("/v1/completions", status_code=200)
async def completions(
    request: AnyRequest, bodies: TheBodies, bus: TheBus, workers: TheWorkers, tenant: Tenant
) -> ASGIApp:
    body = await bodies.read(request, CompletionBody)
    for prompt in body.prompts:
        if not isinstance(prompt, str):
            _check_counts("prompt", len(prompt), workers, body.model)
    asked = text_requests(body, session_of(request, body))
    n = body.n or 1
    echoes = [str(one.text) if body.echo else "" for one in asked for _ in range(n)]
    answers = [TextChoiceBuilder(index, echo) for index, echo in enumerate(echoes)]
    client = ChatClient(bus, tenant, workers)
    return _respond(TEXT, body, asked, answers, client, workers, bus)


@get("/v1/models")
async def models(workers: TheWorkers, tenant: Tenant) -> ModelList:
    """Every model on the bus that is ready, and each of its adapters."""
    return ModelList(tuple(_model(workers, name) for name in workers.model_names()))


@get("/v1/models/{name:path}")
async def model(name: FromPath[str], workers: TheWorkers, tenant: Tenant) -> ModelObject:
    name = unquote(name.removeprefix("/"))
    if name not in workers.model_names():
        raise ServiceError("model_not_found", f"There is no model {name!r}.")
    return _model(workers, name)


def _respond(
    form: ResponseObjects,
    body: Body,
    asked: Sequence[ChatRequest],
    answers: Sequence[ChoiceBuilder],
    client: ChatClient,
    workers: WorkerDirectory,
    bus: Bus,
) -> ASGIApp:
    n = body.n or 1
    requests = [_numbered(one, number) for one in asked for number in range(n)]
    log.info("%s for user %.100r", ", ".join(str(r.request_id) for r in requests), body.user)
    heading = {
        "id": f"{'chatcmpl' if form is CHAT else 'cmpl'}-{requests[0].request_id}",
        "created": int(time.time()),
        **_named(workers, body.model),
    }

    def cancel(number: int) -> None:
        bus.spawn(client.cancel(str(requests[number].request_id)))

    streams = [client.stream(request) for request in requests]
    completion = CompletionBuilder(form, heading, answers, streams, n, workers.to_error, cancel)
    if body.stream:
        return StreamedResponse(completion, body.includes_usage)
    return WholeResponse(completion)


def _numbered(request: ChatRequest, number: int) -> ChatRequest:
    """With an id, and a seed of its own: the same one would give the same answer again."""
    seed = None if request.seed is None else (request.seed + number) % (2**32 - 1)
    return replace(request, request_id=new_request_id(), seed=seed)


def _named(workers: WorkerDirectory, name: str | None) -> dict[str, str]:
    info = workers.find_model(name)
    if info is None:  # the request will fail, and say why
        return {"model": name or "", "system_fingerprint": ""}
    return {"model": name or info.name, "system_fingerprint": f"fp_{info.digest[:12]}"}


def session_of(request: AnyRequest, body: Body) -> str:
    given = (request.headers.get(header) for header in SESSION_HEADERS)
    session_id = next(filter(None, given), body.prompt_cache_key or "")
    if len(session_id) > MAX_SESSION_ID:
        return hashlib.sha256(session_id.encode()).hexdigest()
    return session_id


def _check_counts(field: str, count: int, workers: WorkerDirectory, model: str | None) -> None:
    """
    Reject a prompt that can't fit before any work: each message has at least one token. Raises
    ServiceError(context_length_exceeded).
    """
    info = workers.find_model(model)
    if info and count >= info.context:
        raise prompts.context_exceeded(field, f"at least {count}", info.context)


def _model(workers: WorkerDirectory, name: str) -> ModelObject:
    info = workers.find_model(name)
    return ModelObject(name, created=info.changed if info else 0)
