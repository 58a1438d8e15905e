"""Routes that tell tokens, as llama-server has them. Any worker of the model is asked."""

from collections.abc import Callable
from typing import Any, TypeVar

from litestar import post
from msgspec import Struct

from services.client.routing import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.errors import ServiceError
from services.contract.messages import ModelName
from services.contract.tokens import (
    TOKENS_TIMEOUT_SECONDS,
    DetokenizeReply,
    DetokenizeRequest,
    Text,
    TokenCount,
    TokenizeReply,
    TokenizeRequest,
)
from services.edge.api.bodies import ChatCompletionBody, chat_request
from services.edge.api.routes import TheBodies
from services.edge.routes import AnyRequest, Tenant, TheBus, TheWorkers, check_bus
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders

K = TypeVar("K", bound=Struct)


class TokenizeBody(Struct, frozen=True):
    content: Text
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    model: ModelName | None = None


class DetokenizeBody(DetokenizeRequest, frozen=True):
    model: ModelName | None = None


@post("/v1/tokenize", status_code=200)
async def tokenize(
    request: AnyRequest, bodies: TheBodies, bus: TheBus, workers: TheWorkers, tenant: Tenant
) -> dict[str, list[Any]]:
    body = await bodies.read(request, TokenizeBody)
    asked = TokenizeRequest(body.content, body.add_special, body.parse_special, body.with_pieces)
    found = await _ask(bus, workers, body.model, subjects.tokenize, asked, TokenizeReply)
    if body.with_pieces:
        return {"tokens": [{"id": piece.id, "piece": piece.text} for piece in found.pieces]}
    return {"tokens": list(found.tokens)}


@post("/v1/detokenize", status_code=200)
async def detokenize(
    request: AnyRequest, bodies: TheBodies, bus: TheBus, workers: TheWorkers, tenant: Tenant
) -> dict[str, str]:
    body = await bodies.read(request, DetokenizeBody)
    asked = DetokenizeRequest(body.tokens)
    found = await _ask(bus, workers, body.model, subjects.detokenize, asked, DetokenizeReply)
    return {"content": found.text}


@post("/v1/chat/completions/input_tokens", status_code=200)
async def count(
    request: AnyRequest, bodies: TheBodies, bus: TheBus, workers: TheWorkers, tenant: Tenant
) -> dict[str, Any]:
    """The tokens that a chat completion with this body would read."""
    body = await bodies.read(request, ChatCompletionBody)
    asked = chat_request(body, "")
    prompts.check(asked)
    found = await _ask(bus, workers, body.model, subjects.count, asked, TokenCount)
    return {"object": "response.input_tokens", "input_tokens": found.tokens}


async def _ask(
    bus: Bus,
    workers: WorkerDirectory,
    model: str | None,
    subject: Callable[[str], str],
    message: Struct,
    kind: type[K],
) -> K:
    check_bus(bus)
    order = workers.rank("", model)
    if not order and model and workers.model_names():
        raise ServiceError("model_not_found", f"There is no model {model!r}.")
    for worker_id in order:
        try:
            return await bus.request(subject(worker_id), message, kind, TOKENS_TIMEOUT_SECONDS)
        except (NoResponders, TimeoutError):
            continue
    raise workers.unavailable_error()
