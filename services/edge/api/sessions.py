"""`/sessions`, `/messages` and `/clear-history`: read, describe, export, import, clear, erase."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Literal

import msgspec
from litestar import Response, delete, patch, post
from litestar.params import FromPath
from litestar.response import Stream
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from services.client.chat_client import new_request_id
from services.client.history_requests import HistoryRequests
from services.contract import imports, prompts, responses
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    DeleteRequest,
    DescribeRequest,
    Description,
    Exchange,
    ExchangePage,
    ExchangeView,
    ExportPage,
    ExportRequest,
    Imported,
    ImportRequest,
    MessagesRequest,
    Metadata,
    Session,
    SessionPage,
    SessionsRequest,
    SystemPrompt,
    Title,
)
from services.contract.messages import Empty, RequestId
from services.edge.context import Tenant, TheEdge
from services.edge.errors import AnyRequest, DetailedError
from services.edge.json_lines import json_lines
from services.edge.limits import EdgeLimits
from services.edge.parameters import SessionQuery, decode_body, get, read_path, read_query

CLEAR_EXAMPLE = 'Send JSON like {"session_id": "default"}, or no body'
DESCRIPTION_EXAMPLE = (
    'Send JSON like {"title": "Holidays"}; the fields are title, system_prompt and metadata'
)
HISTORY_COMPLETE = "X-History-Complete"
LINE_EXAMPLE = 'Each line must be JSON like {"prompt": "Hello", "response": "Hi!"}, as in an export'


class ClearBody(SessionQuery, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /clear-history`."""


class DescriptionBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `PATCH /sessions/{session_id}`."""

    title: Title | None | UnsetType = UNSET
    system_prompt: SystemPrompt | None | UnsetType = UNSET
    metadata: Metadata | None | UnsetType = UNSET


class ImportLine(Imported, frozen=True, kw_only=True):
    """An exchange whose request id is optional."""

    request_id: RequestId = "_"


EXPORT_FIELDS = {"type", *Exchange.__struct_fields__, *ImportLine.__struct_fields__}


class Success(Struct, frozen=True, kw_only=True):
    status: Literal["success"] = "success"
    message: str


class ImportResult(Struct, frozen=True, kw_only=True):
    status: Literal["success"] = "success"
    imported: int


@get("/messages", query=MessagesRequest)
async def messages(
    request: AnyRequest, edge: TheEdge, tenant: Tenant
) -> Response[tuple[ExchangeView, ...]]:
    query = read_query(request, MessagesRequest)
    page = await edge.history.request("messages", tenant, query, ExchangePage)
    return Response(page.messages, headers=_completeness(page))


@post("/clear-history", status_code=200, query=SessionQuery)
async def clear_history(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> Success:
    session_id = _session_to_clear(request, await request.body())
    clear = ClearRequest(session_id, new_request_id())
    await edge.history.request("clear", tenant, clear, Empty)
    return Success(
        message=f"The context of session {session_id!r} is cleared; its messages stay readable."
    )


@get("/sessions", query=SessionsRequest)
async def sessions(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> SessionPage:
    query = read_query(request, SessionsRequest)
    return await edge.history.request("sessions", tenant, query, SessionPage)


@get("/sessions/{session_id:str}/messages", query=MessagesRequest)
async def session_messages(
    request: AnyRequest, session_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ExchangePage:
    """Return a page of exchanges, newest first."""
    query = read_path(request, MessagesRequest, session_id)
    page = await edge.history.request("messages", tenant, query, ExchangePage)
    return replace(page, messages=page.messages[::-1])


@patch("/sessions/{session_id:str}")
async def describe(
    request: AnyRequest, session_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> Session:
    """Set title, system prompt and metadata, also of a session without exchanges."""
    id_ = read_path(request, SessionQuery, session_id).session_id
    change = DescribeRequest(id_, _read_description(await request.body()), new_request_id())
    return await edge.history.request("describe", tenant, change, Session)


@delete("/sessions/{session_id:str}", status_code=200)
async def erase(
    request: AnyRequest, session_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> Success:
    id_ = read_path(request, SessionQuery, session_id).session_id
    erasure = DeleteRequest(id_, new_request_id())
    if responses.is_session(id_):
        await edge.background.remove_tree(tenant, responses.tree_of_session(id_))
    await edge.history.request("delete", tenant, erasure, Empty)
    return Success(message=f"The session {id_!r} is erased.")


@get("/sessions/{session_id:str}/export")
async def export(
    request: AnyRequest, session_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> Stream:
    """Send exchanges as JSON Lines, oldest first. An error of the first page has its own status."""
    query = read_path(request, ExportRequest, session_id)
    page = await edge.history.request("export", tenant, query, ExportPage)
    lines = _export_lines(edge.history, tenant, query.session_id, page)
    return json_lines(request, lines, _completeness(page))


@post("/sessions/{session_id:str}/messages", status_code=200, request_max_body_size=None)
async def import_(
    request: AnyRequest, session_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ImportResult:
    """Append JSON Lines of any length, oldest first, in the format of an export."""
    id_ = read_path(request, SessionQuery, session_id).session_id
    limits, imported = edge.limits, 0
    try:
        async for batch in _batches(_read_lines(request.stream(), limits), limits):
            part = ImportRequest(id_, batch)
            await edge.history.request("import", tenant, part, Empty, limits.import_seconds)
            imported += len(batch)
        if not imported:
            raise ServiceError("invalid_request", f"The body is empty. {LINE_EXAMPLE}.")
    except ServiceError as error:
        raise _import_stopped(error, imported) from error
    return ImportResult(imported=imported)


def _completeness(page: ExchangePage | ExportPage) -> dict[str, str]:
    """Return the header of a response that lacks exchanges which the session had."""
    return {} if page.is_complete else {HISTORY_COMPLETE: "false"}


def _import_stopped(error: ServiceError, imported: int) -> DetailedError:
    message = error.message
    if imported:
        message += (
            f" The first {imported:,} lines are imported. Fix this, and send all lines again: none"
            " is imported twice."
        )
    return DetailedError(error, message, imported=imported)


def _session_to_clear(request: AnyRequest, body: bytes) -> str:
    """Return the session that the body or the query names."""
    in_query = read_query(request, SessionQuery).session_id
    if not body:
        return in_query
    in_body = decode_body(body, ClearBody, CLEAR_EXAMPLE).session_id
    if "session_id" in request.query_params and in_body != in_query:
        raise ServiceError(
            "invalid_request",
            f"The URL names session {in_query!r}, the body {in_body!r}: send only one of them.",
        )
    return in_body


def _read_description(body: bytes) -> Description:
    given = decode_body(body or b"{}", DescriptionBody, DESCRIPTION_EXAMPLE)
    if given == DescriptionBody():
        raise ServiceError("invalid_request", f"The body sets nothing. {DESCRIPTION_EXAMPLE}.")
    return Description(given.title, given.system_prompt, given.metadata)


async def _export_lines(
    history: HistoryRequests, tenant: str, session_id: str, page: ExportPage
) -> AsyncGenerator[bytes, None]:
    """Yield all pages as lines. Raises ServiceError."""
    while True:
        yield b"".join(encode(exchange) + b"\n" for exchange in page.exchanges)
        if page.next is None:
            return
        query = ExportRequest(session_id, page.next)
        page = await history.request("export", tenant, query, ExportPage)


async def _read_lines(chunks: AsyncIterator[bytes], limits: EdgeLimits) -> AsyncIterator[Imported]:
    """Split and decode the lines of a body. Raises ServiceError that names the line."""
    number, rest = 0, b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _read_line(line, number, limits)
        if len(rest) > limits.max_line_bytes:
            raise _too_large(number + 1, "line", "over", limits.max_line_bytes)
    if rest.strip():
        yield _read_line(rest, number + 1, limits)


def _read_line(data: bytes, number: int, limits: EdgeLimits) -> Imported:
    """Decode a line. Without an id it gets one from its text and number, to detect repeats."""
    try:
        line = decode(data, ImportLine)
        imports.check(line)
        if unknown := decode(data, dict[str, msgspec.Raw]).keys() - EXPORT_FIELDS:
            why = f"Object contains unknown field `{min(unknown)}`."
            raise ServiceError("invalid_request", why)
    except ServiceError as error:
        raise ServiceError("invalid_request", f"Line {number}: {error} {LINE_EXAMPLE}.") from error
    for name, size, maximum in (
        ("prompt", _prompt_bytes(line), prompts.MAX_BYTES),
        ("exchange", len(encode(line)), limits.max_exchange_bytes),
    ):
        if size > maximum:
            raise _too_large(number, name, f"{size:,}", maximum)
    if line.request_id != "_":
        return line
    return replace(line, request_id=hashlib.sha256(b"%d %b" % (number, data)).hexdigest()[:32])


def _prompt_bytes(line: Imported) -> int:
    """Return the size of what the next prompt shows of the request."""
    return len((line.prompt + "".join(result.content for result in line.tool_results)).encode())


def _too_large(number: int, what: str, size: str, maximum: int) -> ServiceError:
    return ServiceError(
        "payload_too_large",
        f"Line {number}: the {what} has {size} bytes; the maximum is {maximum:,}.",
    )


async def _batches(
    lines: AsyncIterator[Imported], limits: EdgeLimits
) -> AsyncIterator[tuple[Imported, ...]]:
    batch: list[Imported] = []
    size = 0
    async for line in lines:
        length = len(encode(line))
        if batch and size + length > limits.import_batch_bytes:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(line)
        size += length
    if batch:
        yield tuple(batch)
