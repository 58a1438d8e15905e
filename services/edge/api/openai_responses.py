"""`/v1/responses`: creates responses, and finds them again at any edge."""

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

from litestar import Response, delete, post
from litestar.params import FromPath
from litestar.types import ASGIApp
from msgspec import Meta, Struct
from msgspec.structs import replace

from services.client.chat_client import new_request_id
from services.contract import prompts, responses, subjects
from services.contract.codec import encode
from services.contract.conversation import ChatMessage
from services.contract.errors import ServiceError
from services.contract.history import Exchange
from services.contract.messages import ChatRequest, Failed
from services.contract.responses import ResponseTurn
from services.contract.tokens import TokenCount
from services.edge.api.completion import check_length, respond_whole, session_of
from services.edge.api.models import ask_worker
from services.edge.api.openai_responses_body import ENCRYPTED, ResponseBody
from services.edge.api.openai_responses_items import Item, items_of, to_messages, with_ids
from services.edge.api.openai_responses_objects import (
    CONVERSATION_PREFIX,
    ID_PREFIX,
    Heading,
    ResponseBuilder,
    ResponseEncoder,
    ResponseObject,
    heading_of,
)
from services.edge.api.openai_responses_store import (
    ResponseStore,
    request_id_of,
    tree_of_conversation,
)
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.parameters import get, read_query
from services.edge.sse import AnswerEvents, SseResponse, ToError, read_to_end

MAX_BRANCH_BYTES = prompts.MAX_CONVERSATION_BYTES // 2
"""Of earlier responses with `truncation: auto`: the rest of a request is for the new items."""

log = logging.getLogger(__name__)


class ResponseDeleted(Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ItemList(Struct, frozen=True, kw_only=True):
    """A page of items. `after` of the next one is `last_id`."""

    data: tuple[dict[str, Any], ...]
    first_id: str
    last_id: str
    has_more: bool
    object: Literal["list"] = "list"


class InputTokens(Struct, frozen=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class RetrieveQuery(Struct, frozen=True):
    """The query of `GET /v1/responses/{id}`."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0)] = -1


class ItemsQuery(Struct, frozen=True):
    """The query of lists of items."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class NewResponse(NamedTuple):
    """`turn` is None if the response is not stored."""

    heading: Heading
    request: ChatRequest
    turn: ResponseTurn | None


@post("/v1/responses", status_code=200)
async def create(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, ResponseBody)
    store = ResponseStore(edge, tenant)
    new = await _prepare(edge, store, body, session_of(request, body))
    log.info("response started answer=%s", new.heading.request_id)
    builder = ResponseBuilder(new.heading)
    if new.turn and body.background:
        prompts.check(new.request)
        edge.rate_limits.check_model(tenant, body.model)
        await edge.background.start(tenant, new.turn, new.request)
        if not body.stream:
            queued = builder.response("queued")
            return Response(queued).to_asgi_response(app=None, request=request)
        found = await store.find(ID_PREFIX + new.heading.request_id)
        return _stream(edge, store.events(found), ResponseEncoder(builder, is_stored=True))
    events = edge.chat_client(tenant).stream(new.request)
    if body.stream:
        return _stream(edge, events, ResponseEncoder(builder, is_stored=bool(new.turn)))
    return await respond_whole(request, _collect(builder, events, _to_error(edge)))


@get("/v1/responses/{response_id:str}", query=RetrieveQuery)
async def retrieve(
    request: AnyRequest, response_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ASGIApp:
    """Return a response, or with `stream` its events after number `starting_after`."""
    query = read_query(request, RetrieveQuery)
    store = ResponseStore(edge, tenant)
    found = await store.find(response_id)
    if not query.stream:
        return Response(found.to_object()).to_asgi_response(app=None, request=request)
    builder = ResponseBuilder(heading_of(found.request_id, found.turn))
    encoder = ResponseEncoder(builder, is_stored=True, after=query.starting_after)
    return _stream(edge, store.events(found), encoder)


@delete("/v1/responses/{response_id:str}", status_code=200)
async def remove(response_id: FromPath[str], edge: TheEdge, tenant: Tenant) -> ResponseDeleted:
    await ResponseStore(edge, tenant).remove(response_id)
    return ResponseDeleted(response_id)


@post("/v1/responses/{response_id:str}/cancel", status_code=200)
async def cancel(response_id: FromPath[str], edge: TheEdge, tenant: Tenant) -> ResponseObject:
    """Return the response as it has ended."""
    return (await ResponseStore(edge, tenant).cancel(response_id)).to_object()


@get("/v1/responses/{response_id:str}/input_items", query=ItemsQuery)
async def input_items(
    request: AnyRequest, response_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ItemList:
    """Return the items that the response's request has added."""
    query = read_query(request, ItemsQuery)
    found = await ResponseStore(edge, tenant).find(response_id)
    return page_of(found.turn.input, query)


@post("/v1/responses/input_tokens", status_code=200)
async def input_tokens(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> InputTokens:
    """Return the number of prompt tokens of a response with this body."""
    body = await edge.bodies.read(request, ResponseBody)
    new = await _prepare(edge, ResponseStore(edge, tenant), replace(body, store=False), "")
    prompts.check(new.request)
    counted = await ask_worker(edge, tenant, body.model, subjects.count, new.request, TokenCount)
    return InputTokens(counted.tokens)


def page_of(items: Sequence[Item], query: ItemsQuery) -> ItemList:
    """Return a page of items, which are given oldest first. Raises ServiceError."""
    ordered = list(items) if query.order == "asc" else list(reversed(items))
    if query.after is not None:
        ids = [item["id"] for item in ordered]
        if query.after not in ids:
            message = f"The parameter `after` names no item of this list: {query.after!r:.100}."
            raise ServiceError("invalid_request", message)
        ordered = ordered[ids.index(query.after) + 1 :]
    shown = ordered[: query.limit]
    ends = (shown[0]["id"], shown[-1]["id"]) if shown else ("", "")
    has_more = len(shown) < len(ordered)
    return ItemList(data=tuple(shown), first_id=ends[0], last_id=ends[1], has_more=has_more)


# --- new responses ---


async def _prepare(
    edge: Edge, store: ResponseStore, body: ResponseBody, session_id: str
) -> NewResponse:
    """
    Return the request to a worker, with all that it continues. `session_id` is the client's, for
    routing. Raises ServiceError.
    """
    _check(body)
    own, (tree, parent) = UUID(new_request_id()), _continued(body)
    # a response that is not stored belongs to no tree
    request_id = responses.request_id(tree if tree and body.store else own.hex, own)
    before = await _before(store, body, tree, parent) if tree else []
    new_items = with_ids(await store.resolve(body.items), request_id)
    turn = ResponseTurn(
        parent=parent,
        is_in_conversation=body.conversation is not None,
        input=new_items,
        parameters=_parameters(edge, body),
    )
    messages = _messages(edge, store.tenant, body, [*items_of(before), *new_items])
    is_alone = not tree and not body.store  # nothing will continue it
    own_session = "" if is_alone else responses.session_of_tree(tree or own.hex)
    request = ChatRequest(
        **body.sampling,
        model=body.model,
        session_id=session_id or own_session,
        messages=messages,
        drop_oldest=body.truncation == "auto",
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        enable_thinking=body.enable_thinking,
        reasoning_effort=body.reasoning_effort,
        chat_template_kwargs=body.chat_template_kwargs,
        turn=turn if body.store else None,
        request_id=request_id,
        grace_s=_grace(edge, body),
    )
    heading = Heading(request_id, turn.parameters, ENCRYPTED in body.include)
    return NewResponse(heading, request, request.turn)


def _continued(body: ResponseBody) -> tuple[str, str | None]:
    """Return the tree that the response continues ("": none), and the response in it."""
    if body.conversation_id is not None:
        return tree_of_conversation(body.conversation_id), None
    if body.previous_response_id is None:
        return "", None
    parent = _parent(body.previous_response_id)
    return responses.tree_of(parent), parent


def _messages(
    edge: Edge, tenant: str, body: ResponseBody, items: Sequence[Item]
) -> tuple[ChatMessage, ...]:
    """Return the instructions and the items. Raises ServiceError if there are none, or too many."""
    system = [ChatMessage("system", body.instructions)] if body.instructions else []
    messages = (*system, *to_messages(items))
    if not items or not messages:
        raise ServiceError(
            "invalid_request", "The field `input` is missing, or has no text: send some."
        )
    if body.truncation == "disabled":
        check_length(edge, tenant, "input", len(messages), body.model)
    return messages


def _check(body: ResponseBody) -> None:
    """Raise ServiceError(invalid_request) for fields that contradict each other."""
    if body.conversation and body.previous_response_id is not None:
        raise ServiceError(
            "invalid_request",
            "The field `previous_response_id` can't be combined with `conversation`: remove one of"
            " them.",
        )
    if body.background and not body.store:
        raise ServiceError(
            "invalid_request",
            "The field `background` needs a response that is stored: remove `store`.",
        )


def _parent(response_id: str) -> str:
    try:
        return request_id_of(response_id)
    except ServiceError as error:
        raise _previous_not_found(response_id) from error


async def _before(
    store: ResponseStore, body: ResponseBody, tree: str, parent: str | None
) -> list[Exchange]:
    """Return the stored responses that the new one continues."""
    try:
        branch = await store.branch(tree, parent)
    except ServiceError as error:
        if error.code != "not_found" or parent is None:
            raise
        raise _previous_not_found(str(body.previous_response_id), error) from error
    if body.truncation == "auto":
        return _newest(branch.exchanges)
    if not branch.is_complete:
        raise ServiceError(
            "context_length_exceeded",
            "This model's maximum context length is exceeded: the responses before this one are too"
            " long for a request. Set `truncation` to auto to leave out the oldest.",
        )
    return list(branch.exchanges)


def _newest(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Return the last exchanges that fit into a request to a worker."""
    room = MAX_BRANCH_BYTES
    for at, exchange in reversed([*enumerate(exchanges)]):
        room -= len(encode(exchange))
        if room < 0:
            return list(exchanges[at + 1 :])
    return list(exchanges)


def _previous_not_found(response_id: str, cause: ServiceError | None = None) -> ServiceError:
    why = f" {cause.message}" if cause and response_id not in cause.message else ""
    return ServiceError(
        "previous_response_not_found",
        f"Previous response with id {response_id!r:.100} not found.{why} The field"
        " `previous_response_id` must name a stored response that has ended.",
    )


def _parameters(edge: Edge, body: ResponseBody) -> dict[str, Any]:
    """Return what the response repeats of its request."""
    info = edge.workers.find_model(body.model)
    more: dict[str, Any] = {"model": body.model or (info.name if info else "")}
    if body.previous_response_id is not None:
        more["previous_response_id"] = body.previous_response_id
    if body.conversation_id is not None:
        tree = tree_of_conversation(body.conversation_id)
        more["conversation"] = {"id": CONVERSATION_PREFIX + tree}
    return more | body.parameters


def _grace(edge: Edge, body: ResponseBody) -> float:
    """Return how long the answer continues without a reader."""
    if body.background:
        return edge.limits.background_seconds
    return edge.limits.grace_seconds if body.store and body.stream else 0


# --- answers ---


def _stream(edge: Edge, events: AnswerEvents, encoder: ResponseEncoder) -> ASGIApp:
    return SseResponse([events], encoder, _to_error(edge), edge.limits)


async def _collect(
    builder: ResponseBuilder, events: AnswerEvents, to_error: ToError
) -> ResponseObject:
    """Return the response. Raises ServiceError if its answer fails."""
    done = await read_to_end(events, builder.push, to_error)
    builder.close(done.finish_reason)
    return builder.finished(done)


def _to_error(edge: Edge) -> ToError:
    """Workers know the items as messages."""

    def to_error(failed: Failed) -> ServiceError:
        message = failed.message.replace("`messages`", "`input`").replace("`$.messages", "`$.input")
        return edge.workers.to_error(replace(failed, message=message))

    return to_error
