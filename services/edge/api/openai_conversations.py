"""`/v1/conversations`: the items that responses with this `conversation` continue."""

from typing import Literal
from uuid import UUID

from litestar import delete, post
from litestar.params import FromPath
from msgspec import Struct

from services.client.chat_client import new_request_id
from services.contract import responses
from services.contract.errors import ServiceError
from services.contract.history import (
    DeleteRequest,
    DescribeRequest,
    Description,
    Exchange,
    ExportPage,
    ExportRequest,
    Imported,
    ImportRequest,
    Metadata,
    Session,
)
from services.contract.messages import Empty
from services.contract.responses import ResponseTurn
from services.edge.api.openai_responses import ItemList, ItemsQuery, page_of
from services.edge.api.openai_responses_body import ConversationBody
from services.edge.api.openai_responses_items import Item, items_of, with_ids
from services.edge.api.openai_responses_objects import CONVERSATION_PREFIX
from services.edge.api.openai_responses_store import ResponseStore, tree_of_conversation
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.parameters import get, read_query


class ConversationObject(Struct, frozen=True):
    id: str
    created_at: int
    metadata: dict[str, str]
    object: Literal["conversation"] = "conversation"


class ConversationDeleted(Struct, frozen=True):
    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: bool = True


@post("/v1/conversations", status_code=200)
async def create(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ConversationObject:
    body = await edge.bodies.read(request, ConversationBody)
    tree = UUID(new_request_id()).hex
    items = await ResponseStore(edge, tenant).resolve([*body.items])
    await _describe(edge, tenant, tree, body.metadata)
    await _add(edge, tenant, tree, items)
    return _object(tree, body.metadata)


@get("/v1/conversations/{conversation_id:str}")
async def retrieve(
    conversation_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ConversationObject:
    tree = tree_of_conversation(conversation_id)
    found = await ResponseStore(edge, tenant).branch(tree, None, 1)
    return _object(tree, found.metadata)


@post("/v1/conversations/{conversation_id:str}", status_code=200)
async def update(
    request: AnyRequest, conversation_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ConversationObject:
    """Replace the metadata."""
    body = await edge.bodies.read(request, ConversationBody)
    tree = await _existing(edge, tenant, conversation_id)
    await _describe(edge, tenant, tree, body.metadata)
    return _object(tree, body.metadata)


@delete("/v1/conversations/{conversation_id:str}", status_code=200)
async def remove(
    conversation_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ConversationDeleted:
    """Erase the conversation with all its responses."""
    tree = await _existing(edge, tenant, conversation_id)
    erasure = DeleteRequest(responses.session_of_tree(tree), new_request_id())
    await edge.background.remove_tree(tenant, tree)
    await edge.history.request("delete", tenant, erasure, Empty)
    return ConversationDeleted(conversation_id)


@get("/v1/conversations/{conversation_id:str}/items", query=ItemsQuery)
async def items(
    request: AnyRequest, conversation_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ItemList:
    """Return the input and output of all its responses, and items that were added."""
    query = read_query(request, ItemsQuery)
    tree = await _existing(edge, tenant, conversation_id)
    return page_of(items_of(await _exchanges(edge, tenant, tree)), query)


@post("/v1/conversations/{conversation_id:str}/items", status_code=200)
async def add_items(
    request: AnyRequest, conversation_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ItemList:
    """Add items to the end of the conversation, and return them."""
    body = await edge.bodies.read(request, ConversationBody)
    if not body.items:
        raise ServiceError("invalid_request", "The field `items` is missing or empty: send some.")
    given = await ResponseStore(edge, tenant).resolve([*body.items])
    tree = await _existing(edge, tenant, conversation_id)
    added = await _add(edge, tenant, tree, given)
    return page_of(added, ItemsQuery(limit=len(added), order="asc"))


async def _existing(edge: Edge, tenant: str, conversation_id: str) -> str:
    """Return the tree of a conversation. Raises ServiceError(not_found)."""
    tree = tree_of_conversation(conversation_id)
    await ResponseStore(edge, tenant).branch(tree, None, 1)
    return tree


async def _exchanges(edge: Edge, tenant: str, tree: str) -> list[Exchange]:
    session_id, cursor = responses.session_of_tree(tree), None
    found: list[Exchange] = []
    while True:
        wanted = ExportRequest(session_id, cursor)
        page = await edge.history.request("export", tenant, wanted, ExportPage)
        found += [each for each in page.exchanges if each.turn and each.turn.is_in_conversation]
        if (cursor := page.next) is None:
            return found


async def _describe(edge: Edge, tenant: str, tree: str, metadata: Metadata) -> None:
    description = Description(metadata=metadata)
    change = DescribeRequest(responses.session_of_tree(tree), description, new_request_id())
    await edge.history.request("describe", tenant, change, Session)


async def _add(edge: Edge, tenant: str, tree: str, given: list[Item]) -> tuple[Item, ...]:
    """Append items to the log, as an exchange without an answer. Return them with ids."""
    if not given:
        return ()
    request_id = responses.request_id(tree, UUID(new_request_id()))
    added = with_ids(given, request_id)
    turn = ResponseTurn(is_in_conversation=True, input=added)
    exchange = Imported(request_id=request_id, prompt="", response="", turn=turn)
    wanted = ImportRequest(responses.session_of_tree(tree), (exchange,))
    await edge.history.request("import", tenant, wanted, Empty)
    return added


def _object(tree: str, metadata: dict[str, str]) -> ConversationObject:
    created_at = int(responses.created_at(tree).timestamp())
    return ConversationObject(CONVERSATION_PREFIX + tree, created_at, metadata)
