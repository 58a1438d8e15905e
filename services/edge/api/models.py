"""`/v1/models`, and the token routes of llama-server, which any worker of a model can answer."""

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

from litestar import post
from litestar.params import FromPath
from msgspec import UNSET, Struct

from services.client.history_requests import check_connected
from services.client.routing import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.messages import WorkerReport
from services.contract.model_names import choose_adapter
from services.contract.tokens import (
    TOKENS_TIMEOUT_SECONDS,
    DetokenizeReply,
    DetokenizeRequest,
    TokenCount,
    TokenizeReply,
    TokenizeRequest,
)
from services.edge.api.objects import ModelList, ModelMeta, ModelObject, ModelStatus
from services.edge.api.openai_chat import chat_request
from services.edge.api.openai_requests import ChatCompletionBody, DetokenizeBody, TokenizeBody
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.parameters import get
from services.runtime.deliveries import NoResponders

K = TypeVar("K", bound=Struct)


@get("/v1/models")
async def models(edge: TheEdge, tenant: Tenant) -> ModelList:
    """Return every model that the tenant may use, the ready ones with each adapter first."""
    workers = edge.rate_limits.visible_workers(tenant)
    reports = workers.reports()
    ready = [_ready_model(workers, name) for name in workers.model_names()]
    served = {report.model.name for report in reports if report.model and report.state == "ready"}
    not_ready = [report for report in reports if report.name and report.name not in served]
    others = {report.name: _other_model(report) for report in not_ready}
    return ModelList((*ready, *(others[name] for name in sorted(others))))


@get("/v1/models/{name:path}")
async def model(name: FromPath[str], edge: TheEdge, tenant: Tenant) -> ModelObject:
    name = unquote(name.removeprefix("/"))
    edge.rate_limits.check_model(tenant, name)
    workers = edge.rate_limits.visible_workers(tenant)
    names = workers.model_names()
    if name in names or choose_adapter(name, [each for each in names if ":" in each]):
        return _ready_model(workers, name)
    for report in workers.reports():
        if report.name == name and report.state in ("loading", "failed"):
            return _other_model(report)
    raise workers.unavailable_error(name)


@post("/v1/tokenize", status_code=200)
async def tokenize(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> dict[str, list[Any]]:
    body = await edge.bodies.read(request, TokenizeBody)
    message = TokenizeRequest(body.content, body.add_special, body.parse_special, body.with_pieces)
    reply = await ask_worker(edge, tenant, body.model, subjects.tokenize, message, TokenizeReply)
    if body.with_pieces:
        return {"tokens": [{"id": piece.id, "piece": piece.text} for piece in reply.pieces]}
    return {"tokens": list(reply.tokens)}


@post("/v1/detokenize", status_code=200)
async def detokenize(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> dict[str, str]:
    body = await edge.bodies.read(request, DetokenizeBody)
    message = DetokenizeRequest(body.tokens)
    reply = await ask_worker(
        edge, tenant, body.model, subjects.detokenize, message, DetokenizeReply
    )
    return {"content": reply.text}


@post("/v1/chat/completions/input_tokens", status_code=200)
async def count_tokens(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> dict[str, Any]:
    """Return the number of prompt tokens of a chat completion with this body."""
    body = await edge.bodies.read(request, ChatCompletionBody)
    chat = chat_request(body, "")
    prompts.check(chat)
    reply = await ask_worker(edge, tenant, body.model, subjects.count, chat, TokenCount)
    return {"object": "response.input_tokens", "input_tokens": reply.tokens}


async def ask_worker(
    edge: Edge,
    tenant: str,
    model: str | None,
    subject: Callable[[str, str], str],
    message: Struct,
    kind: type[K],
) -> K:
    """Ask the workers of the model, one after another, until one replies. Raises ServiceError."""
    check_connected(edge.bus)
    edge.rate_limits.check_model(tenant, model)
    order = edge.workers.rank("", model)
    for worker_id in order:
        try:
            return await edge.bus.request(
                subject(worker_id, tenant), message, kind, TOKENS_TIMEOUT_SECONDS
            )
        except (NoResponders, TimeoutError):
            continue
    raise edge.rate_limits.visible_workers(tenant).unavailable_error(model)


def _ready_model(workers: WorkerDirectory, name: str) -> ModelObject:
    report = workers.find_report(name)
    info = report.model if report else None
    if report is None or info is None:  # its worker has stopped since
        return ModelObject(name, 0, ModelStatus("unloaded"), "chat")
    is_adapter = name != info.name
    return ModelObject(
        name,
        info.changed,
        ModelStatus("loaded"),
        report.kind,
        max_model_len=info.context,
        meta=ModelMeta(info.context, info.trained_context, info.bytes, report.dimensions or UNSET),
        parent=info.name if is_adapter else UNSET,
        adapters=UNSET if is_adapter else info.adapters,
    )


def _other_model(report: WorkerReport) -> ModelObject:
    """Describe a model that is not ready."""
    match report.state:
        case "loading":
            status = ModelStatus("loading", progress=report.progress)
        case "failed":
            status = ModelStatus("unloaded", failed=True, error=report.error or "")
        case _:
            status = ModelStatus("unloaded")
    return ModelObject(report.name, 0, status, report.kind)
