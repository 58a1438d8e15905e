"""`/v1/models`, and the token routes of llama-server, which any worker of a model can answer."""

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

from litestar import post
from litestar.params import FromPath
from msgspec import Struct

from services.client.routing import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.errors import ServiceError
from services.contract.tokens import (
    TOKENS_TIMEOUT_SECONDS,
    DetokenizeReply,
    DetokenizeRequest,
    TokenCount,
    TokenizeReply,
    TokenizeRequest,
)
from services.edge.api.objects import ModelList, ModelObject
from services.edge.api.openai_chat import chat_request
from services.edge.api.openai_requests import ChatCompletionBody, DetokenizeBody, TokenizeBody
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.history_requests import check_connected
from services.edge.parameters import get
from services.runtime.deliveries import NoResponders

K = TypeVar("K", bound=Struct)


@get("/v1/models")
async def models(edge: TheEdge, tenant: Tenant) -> ModelList:
    """Return every model that is ready on a worker, and each of its adapters."""
    names = edge.workers.model_names()
    return ModelList(tuple(_model_object(edge.workers, name) for name in names))


@get("/v1/models/{name:path}")
async def model(name: FromPath[str], edge: TheEdge, tenant: Tenant) -> ModelObject:
    name = unquote(name.removeprefix("/"))
    if name not in edge.workers.model_names():
        raise _not_found(edge.workers, name)
    return _model_object(edge.workers, name)


@post("/v1/tokenize", status_code=200)
async def tokenize(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> dict[str, list[Any]]:
    body = await edge.bodies.read(request, TokenizeBody)
    message = TokenizeRequest(body.content, body.add_special, body.parse_special, body.with_pieces)
    reply = await _ask_worker(edge, body.model, subjects.tokenize, message, TokenizeReply)
    if body.with_pieces:
        return {"tokens": [{"id": piece.id, "piece": piece.text} for piece in reply.pieces]}
    return {"tokens": list(reply.tokens)}


@post("/v1/detokenize", status_code=200)
async def detokenize(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> dict[str, str]:
    body = await edge.bodies.read(request, DetokenizeBody)
    message = DetokenizeRequest(body.tokens)
    reply = await _ask_worker(edge, body.model, subjects.detokenize, message, DetokenizeReply)
    return {"content": reply.text}


@post("/v1/chat/completions/input_tokens", status_code=200)
async def count_tokens(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> dict[str, Any]:
    """Return the number of prompt tokens of a chat completion with this body."""
    body = await edge.bodies.read(request, ChatCompletionBody)
    chat = chat_request(body, "")
    prompts.check(chat)
    reply = await _ask_worker(edge, body.model, subjects.count, chat, TokenCount)
    return {"object": "response.input_tokens", "input_tokens": reply.tokens}


async def _ask_worker(
    edge: Edge,
    model: str | None,
    subject: Callable[[str], str],
    message: Struct,
    kind: type[K],
) -> K:
    """Ask the workers of the model, one after another, until one replies. Raises ServiceError."""
    check_connected(edge.bus)
    order = edge.workers.rank("", model)
    if not order and model and edge.workers.model_names():
        raise _not_found(edge.workers, model)
    for worker_id in order:
        try:
            return await edge.bus.request(subject(worker_id), message, kind, TOKENS_TIMEOUT_SECONDS)
        except (NoResponders, TimeoutError):
            continue
    raise edge.workers.unavailable_error()


def _model_object(workers: WorkerDirectory, name: str) -> ModelObject:
    info = workers.find_model(name)
    return ModelObject(name, created=info.changed if info else 0)


def _not_found(workers: WorkerDirectory, name: str) -> ServiceError:
    available = ", ".join(workers.model_names()) or "none"
    return ServiceError("model_not_found", f"There is no model {name!r}; available: {available}.")
