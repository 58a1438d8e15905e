"""Contexts from history and appends to the log, when either fails for a while."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nats.js import api

from services.contract import subjects
from services.contract.errors import ErrorCode, ServiceError
from services.contract.history import Context, ContextRequest
from services.contract.messages import SessionErased
from services.inference.history_client import AppendResult, HistoryClient
from services.inference.limits import InferenceLimits
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.history.samples import exchange, url_of
from tests.servers import Server, nats_server, running

KEY = subjects.session_key("alice", "s")
SMALL = 1024


@pytest.fixture
async def full_log(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    """A bus with a log that has no room for an exchange."""
    server: Server
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        async with Bus.connect(url_of(server), "test") as bus:
            stream = Stream(bus, subjects.HISTORY_STREAM)
            await stream.ensure(subjects.HISTORY_LOG, SMALL, 0)
            await stream.refuse_when_full()
            yield bus


async def make_room(bus: Bus) -> None:
    config: api.StreamConfig = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
    config.max_bytes = SMALL * SMALL
    await bus.jetstream.update_stream(config)


def is_wanted() -> bool:
    return True


async def test_failed_append_is_reported_to_history_and_repeated(full_log: Bus) -> None:
    async with full_log.inbox(subjects.HISTORY_APPEND_FAILED) as failures:
        large = exchange("a", response="x" * SMALL)
        appending = asyncio.create_task(HistoryClient(full_log).append(KEY, large, is_wanted))
        await failures.next(5)
        await make_room(full_log)
        assert await appending == AppendResult("log")


async def test_append_to_a_full_log_fails_after_a_timeout(full_log: Bus) -> None:
    client = HistoryClient(full_log, InferenceLimits(append_timeout_seconds=0.5))
    large = exchange("a", response="x" * SMALL)
    assert await client.append(KEY, large, is_wanted) == AppendResult("failed")


async def test_exchange_too_large_for_a_message_fails_at_once(full_log: Bus) -> None:
    async with full_log.inbox(subjects.HISTORY_APPEND_FAILED) as failures, asyncio.timeout(30):
        large = exchange("a", response="x" * full_log.max_payload)
        result = await HistoryClient(full_log).append(KEY, large, is_wanted)
        assert result == AppendResult("failed")
        await full_log.publish(subjects.HISTORY_APPEND_FAILED, SessionErased("another"))
        assert b"another" in (await failures.next(1)).data, "history need not probe the log"


class RecoveringHistory:
    """A history service that replies with errors at first."""

    def __init__(self, errors: list[ServiceError]) -> None:
        self._errors = errors

    async def context(self, subject: str, request: ContextRequest) -> Context:
        if self._errors:
            raise self._errors.pop(0)
        return Context(epoch=7)


@asynccontextmanager
async def recovering_history(nats_url: str, code: ErrorCode) -> AsyncIterator[HistoryClient]:
    """Run a history service that replies with two errors, and return a client."""
    history = RecoveringHistory([ServiceError(code, "no leader") for _ in range(2)])
    async with Bus.connect(nats_url, "test") as bus:
        subject = subjects.history("context", subjects.OPEN_TENANT)
        endpoint = bus.endpoint("context", subject, ContextRequest, history.context)
        await bus.serve("history", "recovers", [endpoint])
        yield HistoryClient(bus, InferenceLimits(history_tries_seconds=(0.1, 0.1, 0.1)))


async def test_context_is_requested_again_while_history_has_no_log(
    url_without_history: str,
) -> None:
    async with recovering_history(url_without_history, "history_unavailable") as client:
        assert (await client.context(subjects.OPEN_TENANT, "s")).epoch == 7


async def test_context_is_not_requested_again_while_the_log_is_full(
    url_without_history: str,
) -> None:
    async with recovering_history(url_without_history, "history_full") as client:
        with pytest.raises(ServiceError) as error:
            await client.context(subjects.OPEN_TENANT, "s")
        assert error.value.code == "history_full"
