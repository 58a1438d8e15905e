import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.js import api

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Context, ContextRequest
from services.inference import sessions
from services.inference.sessions import HistoryClient, Kept
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.history.samples import exchange, url_of
from tests.servers import Server, nats_server, running

KEY = subjects.session_key("alice", "s")
SMALL = 1024


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "TRIES", (0.1, 0.1, 0.1))


@pytest.fixture
async def full(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    """NATS with a log that takes no exchange."""
    server: Server
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        async with Bus.connect(url_of(server), "test") as bus:
            stream = Stream(bus, subjects.HISTORY_STREAM)
            await stream.ensure(subjects.HISTORY_LOG, SMALL, 0)
            await stream.refuse_when_full()
            yield bus


async def give_room(bus: Bus) -> None:
    config: api.StreamConfig = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
    config.max_bytes = SMALL * SMALL
    await bus.jetstream.update_stream(config)


def is_wanted() -> bool:
    return True


async def test_failed_append_is_reported_to_history_and_repeated(full: Bus) -> None:
    async with full.inbox(subjects.HISTORY_APPEND_FAILED) as doubts:
        said = exchange("a", response="x" * SMALL)
        appending = asyncio.create_task(HistoryClient(full).append(KEY, said, is_wanted))
        await doubts.next(5)
        await give_room(full)
        assert await appending == Kept("log")


async def test_an_exchange_that_finds_no_room_in_time_is_told_as_failed(
    full: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "APPEND_DEADLINE", 0.5)
    asked = HistoryClient(full)
    said = exchange("a", response="x" * SMALL)
    assert await asked.append(KEY, said, is_wanted) == Kept("failed")


class Stumbling:
    """A history that can't read its log at first."""

    def __init__(self, errors: list[ServiceError]) -> None:
        self._errors = errors

    async def context(self, subject: str, request: ContextRequest) -> Context:
        if self._errors:
            raise self._errors.pop(0)
        return Context(epoch=7)


@pytest.mark.parametrize(("code", "epoch"), [("history_unavailable", 7), ("history_full", None)])
async def test_a_history_without_a_log_for_a_moment_is_asked_again(
    tmp_path: Path, code: str, epoch: int | None, quick: None
) -> None:
    history = Stumbling([ServiceError(code, "no leader") for _ in range(2)])  # type: ignore[arg-type]
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(url_of(server), "test") as bus:
            subject = subjects.history("context", subjects.OPEN_TENANT)
            asked = bus.endpoint("context", subject, ContextRequest, history.context)
            await bus.serve("history", "stumbles", [asked])
            try:
                found = await HistoryClient(bus).context(subjects.OPEN_TENANT, "s")
                assert found.epoch == epoch
            except ServiceError as error:
                assert epoch is None and error.code == code
