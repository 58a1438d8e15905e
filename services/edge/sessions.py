"""The routes of sessions: listed, described, read page by page, taken out and in, erased."""

import hashlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from litestar import delete, get, patch, post
from litestar.params import FromPath
from litestar.response import Stream
from msgspec.structs import replace

from services.client.chat import new_request_id
from services.contract import imports, prompts, subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import (
    DeleteRequest,
    DescribeRequest,
    Description,
    ExportPage,
    ExportRequest,
    Imported,
    ImportRequest,
    Messages,
    MessagesRequest,
    Session,
    SessionPage,
    SessionsRequest,
)
from services.contract.messages import Empty, RequestId
from services.edge.routes import (
    AnyRequest,
    SessionQuery,
    Tenant,
    TheBus,
    ask_history,
    read_path,
    read_query,
)
from services.runtime.bus import Bus

IMPORT_PATIENCE = 60.0  # seconds, for a batch
IMPORT_BYTES = 512 * 1024  # of an exchange at most, and of those that are sent to history at once
DESCRIPTION = 'Send JSON like {"title": "Holidays"}; the fields are title and system_prompt'
LINE = 'Each line must be JSON like {"prompt": "Hello", "response": "Hi!"}, as an export has it'


class DescriptionBody(Description, frozen=True, forbid_unknown_fields=True):
    """The body of `PATCH /sessions/{id}`."""


class Line(Imported, frozen=True, kw_only=True):
    """An exchange that may not have an id of its own yet."""

    request_id: RequestId = "_"


@get("/sessions")
async def sessions(request: AnyRequest, bus: TheBus, tenant: Tenant) -> SessionPage:
    asked = read_query(request, SessionsRequest)
    return await ask_history(bus, subjects.history_sessions(tenant), asked, SessionPage)


@get("/sessions/{session_id:str}/messages")
async def messages(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> Messages:
    """Newest first."""
    asked = read_path(request, MessagesRequest, session_id)
    page = await ask_history(bus, subjects.history_messages(tenant), asked, Messages)
    return Messages(page.messages[::-1], page.next)


@patch("/sessions/{session_id:str}")
async def describe(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> Session:
    """A session that nothing was said in yet may be described as well."""
    id_ = read_path(request, SessionQuery, session_id).session_id
    description = _read_description(await request.body())
    asked = DescribeRequest(id_, description, new_request_id())
    return await ask_history(bus, subjects.history_describe(tenant), asked, Session)


@delete("/sessions/{session_id:str}", status_code=200)
async def erase(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> dict[str, str]:
    id_ = read_path(request, SessionQuery, session_id).session_id
    asked = DeleteRequest(id_, new_request_id())
    await ask_history(bus, subjects.history_delete(tenant), asked, Empty)
    return {"status": "success", "message": f"The session {id_!r} is erased."}


@get("/sessions/{session_id:str}/export")
async def export(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> Stream:
    """Whole exchanges as JSON Lines, oldest first. The first page comes before the headers."""
    asked = read_path(request, ExportRequest, session_id)
    page = await _export(bus, tenant, asked)
    return Stream(_lines(bus, tenant, asked.session_id, page), media_type="application/jsonl")


@post("/sessions/{session_id:str}/messages", status_code=200)
async def import_(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> dict[str, Any]:
    """JSON Lines, oldest first, as an export has them. Who fails half-way may repeat it at once."""
    id_ = read_path(request, SessionQuery, session_id).session_id
    lines = _read_lines(await request.body())
    subject = subjects.history_import(tenant)
    for batch in _batches(lines):
        await ask_history(bus, subject, ImportRequest(id_, batch), Empty, IMPORT_PATIENCE)
    return {"status": "success", "imported": len(lines)}


def _read_description(body: bytes) -> Description:
    try:
        said = decode(body or b"{}", DescriptionBody)
    except ServiceError as error:
        raise ServiceError("invalid_request", f"{error} {DESCRIPTION}.") from error
    if said == DescriptionBody():
        raise ServiceError("invalid_request", f"The body says nothing. {DESCRIPTION}.")
    return Description(said.title, said.system_prompt)


async def _export(bus: Bus, tenant: str, asked: ExportRequest) -> ExportPage:
    return await ask_history(bus, subjects.history_export(tenant), asked, ExportPage)


async def _lines(
    bus: Bus, tenant: str, session_id: str, page: ExportPage
) -> AsyncGenerator[bytes, None]:
    """A failure breaks the connection off: nobody takes what came for the whole."""
    while True:
        yield b"".join(encode(exchange) + b"\n" for exchange in page.exchanges)
        if page.next is None:
            return
        page = await _export(bus, tenant, ExportRequest(session_id, page.next))


def _read_lines(body: bytes) -> list[Imported]:
    lines = [_read(line, n) for n, line in enumerate(body.splitlines(), 1) if line.strip()]
    if not lines:
        raise ServiceError("invalid_request", f"The body is empty. {LINE}.")
    return lines


def _read(data: bytes, number: int) -> Imported:
    """One without an id gets that of its text and place, so that a repeat is known."""
    try:
        line = decode(data, Line)
        imports.check(line)
    except ServiceError as error:
        raise ServiceError("invalid_request", f"Line {number}: {error} {LINE}.") from error
    for name, size, most in (
        ("prompt", len(line.prompt.encode()), prompts.MAX_BYTES),
        ("exchange", len(encode(line)), IMPORT_BYTES),
    ):
        if size > most:
            raise ServiceError(
                "payload_too_large",
                f"Line {number}: the {name} has {size:,} bytes, and {most:,} is the most.",
            )
    if line.request_id != "_":
        return line
    return replace(line, request_id=hashlib.sha256(b"%d %b" % (number, data)).hexdigest()[:32])


def _batches(lines: list[Imported]) -> Iterator[tuple[Imported, ...]]:
    """As many as fit one NATS message."""
    batch: list[Imported] = []
    size = 0
    for line in lines:
        length = len(encode(line))
        if batch and size + length > IMPORT_BYTES:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(line)
        size += length
    yield tuple(batch)
