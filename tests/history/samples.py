"""Helpers of the history tests: records, appends as a worker does them, a running service."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from services.contract import subjects
from services.contract.answer import Run
from services.contract.codec import encode
from services.contract.conversation import FunctionCall, ToolCall, ToolResult
from services.contract.history import (
    ClearRequest,
    Context,
    ContextReply,
    ContextRequest,
    DeleteRequest,
    DescribeRequest,
    Description,
    Exchange,
    ExchangePage,
    ExchangeView,
    ExportPage,
    ExportRequest,
    Feedback,
    FeedbackRequest,
    FeedbackStored,
    HistoryStatus,
    Imported,
    ImportRequest,
    MessagesRequest,
    Session,
    SessionPage,
    SessionsRequest,
    Window,
)
from services.contract.messages import Empty, ModelInfo, Sampling, Timings, Usage
from services.history.limits import HistoryLimits
from services.history.service import start
from services.history.settings import HistorySettings
from services.runtime.bus import Bus
from services.runtime.streams import Conflict, Stream
from tests.servers import Server, free_port

TENANT = "alice"
FAST = HistoryLimits(
    fetch_seconds=0.05,
    batch_pause_seconds=0.01,
    retry_seconds=0.1,
    trim_interval_seconds=0.05,
    watch_interval_seconds=0.05,
    max_room_wait_seconds=0.2,
    count_sessions_seconds=0.05,
    ack_wait_seconds=2.0,
    mongodb_select_seconds=0.5,
    mongodb_read_seconds=2.0,  # a busy machine must not look like one without MongoDB
    mongodb_probe_interval_seconds=0.05,
)
"""Limits with which nothing waits longer than it must."""


def exchange(request_id: str, epoch: int = 0, response: str | None = None) -> Exchange:
    now = datetime.now(UTC)
    return Exchange(
        previous=0,
        request_id=request_id,
        epoch=epoch,
        prompt=f"prompt of {request_id}",
        response=f"response of {request_id}" if response is None else response,
        asked_at=now,
        answered_at=now,
        finish_reason="stop",
        model=ModelInfo("demo", "digest", 2048, 1),
        sampling=Sampling(temperature=0.5, stop=("User:",)),
        usage=Usage(7, 3, 0),
        timings=Timings(0.0, 0.1, 0.2),
        stop_string="User:",
    )


def with_channels(request_id: str) -> Exchange:
    """Return an exchange with reasoning before and after content, and calls."""
    return replace(
        exchange(request_id),
        response="First.Then.",
        reasoning="Hm. And?",
        tool_calls=(ToolCall("c1", FunctionCall("go", '{"to": "🙂"}')),),
        tool_results=(ToolResult("c0", "done"),),
        finish_reason="tool_calls",
        order=(
            Run("reasoning", 3),
            Run("content", 6),
            Run("reasoning", 5),
            Run("content", 5),
            Run("tool_call", 13),
        ),
    )


async def append(bus: Bus, session_id: str, record: Exchange, tenant: str = TENANT) -> int:
    """Append the exchange as a worker does. Return its sequence."""
    stream = Stream(bus, subjects.HISTORY_STREAM)
    key = subjects.session_key(tenant, session_id)
    while True:
        last = await stream.last(subjects.log(key))
        record = replace(record, previous=last.seq if last else 0)
        try:
            message_id = f"{key}.{record.request_id}"
            appended = await stream.append(
                subjects.log(key), encode(record), message_id, record.previous
            )
            return appended.seq
        except Conflict:
            await asyncio.sleep(0)


async def append_many(bus: Bus, session_id: str, count: int, tenant: str = TENANT) -> list[str]:
    ids = [f"r{n:03}" for n in range(count)]
    for request_id in ids:
        await append(bus, session_id, exchange(request_id), tenant)
    return ids


@asynccontextmanager
async def history(
    nats_url: str, mongodb_uri: str = "", limits: HistoryLimits = FAST, **settings: Any
) -> AsyncIterator[None]:
    """Run the service as its process builds it. Without a URI there is no MongoDB."""
    async with AsyncExitStack() as stack:
        await start(
            stack,
            HistorySettings(
                nats_url=nats_url,
                mongodb_uri=mongodb_uri or f"mongodb://127.0.0.1:{free_port()}/",
                **({"mongodb_database": "finetunellm_test"} | settings),
            ),
            pytest.fail,
            limits,
        )
        yield


async def context(bus: Bus, session_id: str, tenant: str = TENANT) -> Context:
    return await bus.request(
        subjects.history("context", tenant), ContextRequest(session_id), Context, timeout=5
    )


async def window(bus: Bus, session_id: str) -> Window | None:
    """Return what history says of a context's growth; None: workers ask for each answer."""
    subject = subjects.history("context", TENANT)
    return (await bus.request(subject, ContextRequest(session_id), ContextReply)).window


async def clear(bus: Bus, session_id: str, tenant: str = TENANT) -> None:
    await bus.request(subjects.history("clear", tenant), ClearRequest(session_id), Empty, timeout=5)


async def erase(bus: Bus, session_id: str, tenant: str = TENANT) -> None:
    await bus.request(
        subjects.history("delete", tenant), DeleteRequest(session_id), Empty, timeout=5
    )


async def messages(
    bus: Bus, session_id: str | None, limit: int = 20, tenant: str = TENANT
) -> tuple[ExchangeView, ...]:
    return (await message_page(bus, session_id, limit, tenant=tenant)).messages


async def all_messages(bus: Bus, session_id: str, limit: int) -> tuple[ExchangeView, ...]:
    """Return the whole session, also if MongoDB, which has a part of it, is slow for a moment."""
    page = ExchangePage(())

    async def is_whole() -> bool:
        nonlocal page
        page = await message_page(bus, session_id, limit)
        return page.is_complete and page.next is None

    await until(is_whole)
    return page.messages


async def message_page(
    bus: Bus,
    session_id: str | None,
    limit: int = 20,
    before: str | None = None,
    tenant: str = TENANT,
) -> ExchangePage:
    request = MessagesRequest(limit, session_id, before)
    return await bus.request(subjects.history("messages", tenant), request, ExchangePage, timeout=5)


async def sessions(
    bus: Bus, tenant: str, limit: int = 20, before: str | None = None
) -> SessionPage:
    request = SessionsRequest(limit, before)
    return await bus.request(subjects.history("sessions", tenant), request, SessionPage, timeout=5)


async def describe(bus: Bus, session_id: str, tenant: str = TENANT, **description: Any) -> Session:
    request = DescribeRequest(session_id, Description(**description))
    return await bus.request(subjects.history("describe", tenant), request, Session, timeout=5)


async def export(
    bus: Bus, session_id: str, after: str | None = None, tenant: str = TENANT
) -> ExportPage:
    request = ExportRequest(session_id, after)
    return await bus.request(subjects.history("export", tenant), request, ExportPage, timeout=5)


async def import_exchanges(
    bus: Bus, session_id: str, exchanges: Sequence[Imported], tenant: str = TENANT
) -> None:
    request = ImportRequest(session_id, tuple(exchanges))
    await bus.request(subjects.history("import", tenant), request, Empty, timeout=5)


async def status(bus: Bus) -> HistoryStatus:
    return await bus.request(subjects.HISTORY_STATUS, Empty(), HistoryStatus, timeout=5)


async def connected(bus: Bus) -> None:
    """Wait until the service is connected to MongoDB."""
    await until_status(bus, database_connected=True)


async def archived(bus: Bus) -> None:
    """Wait until MongoDB has all records of the log."""
    await until_status(bus, unarchived=0)


async def until_status(bus: Bus, **expected: object) -> None:
    """Wait until these fields of the service's status have these values."""

    async def is_as_expected() -> bool:
        current = await status(bus)
        return all(getattr(current, name) == value for name, value in expected.items())

    await until(is_as_expected)


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 30) -> None:
    """Wait until the condition, which may be a coroutine function, is true."""
    deadline = time.monotonic() + seconds
    while not await _result(condition):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.02)


async def _result(condition: Callable[[], Awaitable[bool] | bool]) -> bool:
    result = condition()
    return result if isinstance(result, bool) else await result


def connection_log_levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the levels of the log lines about the connection to MongoDB."""
    changes = ("MongoDB connected", "MongoDB unavailable")
    return [each.levelname for each in caplog.records if each.getMessage().startswith(changes)]


def url_of(nats: Server) -> str:
    return f"nats://127.0.0.1:{nats.port}"


def uri_of(mongo: Server) -> str:
    return f"mongodb://127.0.0.1:{mongo.port}/"


def ids(of: Context | tuple[ExchangeView, ...]) -> list[str]:
    if isinstance(of, Context):
        return [turn.request_id for turn in of.turns]
    return [message.id for message in of]


async def give_feedback(
    bus: Bus,
    session_id: str,
    message_id: str,
    given: Feedback | None,
    tenant: str = TENANT,
    request_id: str | None = None,
) -> FeedbackStored:
    request = FeedbackRequest(session_id, message_id, given, request_id)
    subject = subjects.history("feedback", tenant)
    return await bus.request(subject, request, FeedbackStored, timeout=5)
