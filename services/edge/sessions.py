"""The routes of sessions: listed, described, read page by page, taken out and in, erased."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

import msgspec
from litestar import Response, delete, get, patch, post
from litestar.params import FromPath
from litestar.response import Stream
from msgspec import Struct
from msgspec.structs import replace

from services.client.chat_client import new_request_id
from services.contract import imports, prompts, subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.history import (
    DeleteRequest,
    DescribeRequest,
    Description,
    Exchange,
    ExchangePage,
    ExportPage,
    ExportRequest,
    Imported,
    ImportRequest,
    MessagesRequest,
    Session,
    SessionPage,
    SessionsRequest,
)
from services.contract.messages import Empty, RequestId
from services.edge.errors import service_error
from services.edge.routes import (
    AnyRequest,
    SessionQuery,
    Success,
    Tenant,
    TheBus,
    ask_history,
    read_path,
    read_query,
)
from services.runtime.bus import Bus

IMPORT_PATIENCE = 60.0  # seconds, for a batch
BATCH_BYTES = 512 * 1024  # of exchanges sent to history at once; a single exchange may be larger
MAX_EXCHANGE_BYTES = 1024 * 1024 - 4096  # the largest that an export can have: one NATS message
MAX_LINE_BYTES = 2 * 1024 * 1024  # escapes may make the JSON longer
DESCRIPTION = 'Send JSON like {"title": "Holidays"}; the fields are title and system_prompt'
LINE = 'Each line must be JSON like {"prompt": "Hello", "response": "Hi!"}, as an export has it'


class DescriptionBody(Description, frozen=True, forbid_unknown_fields=True):
    """The body of `PATCH /sessions/{id}`."""


class Line(Imported, frozen=True, kw_only=True):
    """An exchange that may not have an id of its own yet."""

    request_id: RequestId = "_"


KNOWN = {"type", *Exchange.__struct_fields__, *Line.__struct_fields__}  # the fields of an export


class Import(Struct, frozen=True, kw_only=True):
    status: Literal["success"] = "success"
    imported: int


@get("/sessions")
async def sessions(request: AnyRequest, bus: TheBus, tenant: Tenant) -> SessionPage:
    asked = read_query(request, SessionsRequest)
    return await ask_history(bus, subjects.history("sessions", tenant), asked, SessionPage)


@get("/sessions/{session_id:str}/messages")
async def messages(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> ExchangePage:
    """Newest first."""
    asked = read_path(request, MessagesRequest, session_id)
    page = await ask_history(bus, subjects.history("messages", tenant), asked, ExchangePage)
    return ExchangePage(page.messages[::-1], page.next)


@patch("/sessions/{session_id:str}")
async def describe(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> Session:
    """A session that nothing was said in yet may be described as well."""
    id_ = read_path(request, SessionQuery, session_id).session_id
    description = _read_description(await request.body())
    asked = DescribeRequest(id_, description, new_request_id())
    return await ask_history(bus, subjects.history("describe", tenant), asked, Session)


@delete("/sessions/{session_id:str}", status_code=200)
async def erase(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> Success:
    id_ = read_path(request, SessionQuery, session_id).session_id
    asked = DeleteRequest(id_, new_request_id())
    await ask_history(bus, subjects.history("delete", tenant), asked, Empty)
    return Success(message=f"The session {id_!r} is erased.")


@get("/sessions/{session_id:str}/export")
async def export(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> Stream:
    """Whole exchanges as JSON Lines, oldest first. The first page comes before the headers."""
    asked = read_path(request, ExportRequest, session_id)
    page = await _export(bus, tenant, asked)
    return Stream(_lines(bus, tenant, asked.session_id, page), media_type="application/jsonl")


class ImportStopped(ServiceError):
    """An import failed after `imported` lines. Sending the same again imports none twice."""

    def __init__(self, error: ServiceError, imported: int) -> None:
        message = error.message
        if imported:
            message += (
                f" The first {imported:,} lines are imported. Fix this, and send all lines again:"
                " none is imported twice."
            )
        super().__init__(error.code, message, error.retry_after)
        self.imported = imported


def _import_stopped(request: AnyRequest, error: ImportStopped) -> Response[dict[str, Any]]:
    answer = service_error(request, error)
    content = {**answer.content, "imported": error.imported}
    return Response(content, status_code=answer.status_code, headers=answer.headers)


@post(
    "/sessions/{session_id:str}/messages",
    status_code=200,
    request_max_body_size=None,
    exception_handlers={ImportStopped: _import_stopped},
)
async def import_(
    request: AnyRequest, session_id: FromPath[str], bus: TheBus, tenant: Tenant
) -> Import:
    """Append JSON Lines of any length, oldest first, in the format of an export, in batches."""
    id_ = read_path(request, SessionQuery, session_id).session_id
    subject = subjects.history("import", tenant)
    imported = 0
    try:
        async for batch in _batches(_lines_of(request.stream())):
            await ask_history(bus, subject, ImportRequest(id_, batch), Empty, IMPORT_PATIENCE)
            imported += len(batch)
        if not imported:
            raise ServiceError("invalid_request", f"The body is empty. {LINE}.")
    except ServiceError as error:
        raise ImportStopped(error, imported) from error
    return Import(imported=imported)


def _read_description(body: bytes) -> Description:
    try:
        said = decode(body or b"{}", DescriptionBody)
    except ServiceError as error:
        raise ServiceError("invalid_request", f"{error} {DESCRIPTION}.") from error
    if said == DescriptionBody():
        raise ServiceError("invalid_request", f"The body says nothing. {DESCRIPTION}.")
    return Description(said.title, said.system_prompt)


async def _export(bus: Bus, tenant: str, asked: ExportRequest) -> ExportPage:
    return await ask_history(bus, subjects.history("export", tenant), asked, ExportPage)


async def _lines(
    bus: Bus, tenant: str, session_id: str, page: ExportPage
) -> AsyncGenerator[bytes, None]:
    """A failure breaks the connection off: nobody takes what came for the whole."""
    while True:
        yield b"".join(encode(exchange) + b"\n" for exchange in page.exchanges)
        if page.next is None:
            return
        page = await _export(bus, tenant, ExportRequest(session_id, page.next))


async def _lines_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[Imported]:
    """Yield one line at a time. Raises ServiceError that names the line."""
    number, rest = 0, b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _read(line, number)
        if len(rest) > MAX_LINE_BYTES:
            raise _too_large(number + 1, "line", "over", MAX_LINE_BYTES)
    if rest.strip():
        yield _read(rest, number + 1)


def _read(data: bytes, number: int) -> Imported:
    """Decode a line. Without an id it gets one from its text and number, to detect repeats."""
    try:
        line = decode(data, Line)
        imports.check(line)
        unknown = decode(data, dict[str, msgspec.Raw]).keys() - KNOWN
    except ServiceError as error:
        raise ServiceError("invalid_request", f"Line {number}: {error} {LINE}.") from error
    if unknown:
        why = f"Object contains unknown field `{min(unknown)}`"
        raise ServiceError("invalid_request", f"Line {number}: {why}. {LINE}.")
    for name, size, most in (
        ("prompt", len(line.prompt.encode()), prompts.MAX_BYTES),
        ("exchange", len(encode(line)), MAX_EXCHANGE_BYTES),
    ):
        if size > most:
            raise _too_large(number, name, f"{size:,}", most)
    if line.request_id != "_":
        return line
    return replace(line, request_id=hashlib.sha256(b"%d %b" % (number, data)).hexdigest()[:32])


def _too_large(number: int, what: str, size: str, most: int) -> ServiceError:
    return ServiceError(
        "payload_too_large",
        f"Line {number}: the {what} has {size} bytes; the maximum is {most:,}.",
    )


async def _batches(lines: AsyncIterator[Imported]) -> AsyncIterator[tuple[Imported, ...]]:
    """As many as fit one NATS message."""
    batch: list[Imported] = []
    size = 0
    async for line in lines:
        length = len(encode(line))
        if batch and size + length > BATCH_BYTES:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(line)
        size += length
    if batch:
        yield tuple(batch)
