"""Space in the log: the quota alone, then a small log with a real MongoDB."""

import asyncio
import dataclasses
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, Imported
from services.history.limits import LIMITS
from services.history.log import SessionLog
from services.history.retention import LogQuota
from services.runtime.bus import Bus
from services.runtime.streams import Stream, StreamFull, StreamState
from tests.history.samples import (
    FAST,
    TENANT,
    append,
    archived,
    connected,
    context,
    exchange,
    history,
    ids,
    import_exchanges,
    messages,
    status,
    until,
    uri_of,
    url_of,
)
from tests.servers import Server

LIMIT = 256 * 1024
ROOM = int(LIMIT * LIMITS.trim_above)
LARGE = "x" * 4000
TRIM = dataclasses.replace(FAST, trim_batch=10)
MIB = 2**20


def seen(percent: int, drops_old: bool = False, limit: int | None = 100 * MIB) -> LogQuota:
    quota = LogQuota(LIMITS)
    quota.update(state(percent, drops_old, limit))
    return quota


def state(percent: int, drops_old: bool = False, limit: int | None = 100 * MIB) -> StreamState:
    return StreamState(1, 9, 9, 0, percent * MIB, limit, drops_old)


def test_a_log_with_room_is_no_warning() -> None:
    quota = seen(79)
    quota.require_room()
    assert quota.warning is None


def test_a_log_without_a_limit_is_never_full() -> None:
    assert seen(1_000_000, limit=None).warning is None


def test_a_log_that_is_nearly_full_is_a_warning_with_the_figure_and_takes_chats() -> None:
    quota = seen(80)
    quota.require_room()
    assert quota.warning is not None
    assert "80%" in quota.warning and "100 MiB" in quota.warning


def test_a_full_log_takes_no_chats_until_there_is_room() -> None:
    quota = seen(95)
    with pytest.raises(ServiceError, match="start MongoDB") as refused:
        quota.require_room()
    assert (refused.value.code, refused.value.retry_after) == ("history_full", 5)
    quota.update(state(94))
    quota.require_room()


def test_a_log_that_drops_its_oldest_takes_chats_when_it_is_full() -> None:
    quota = seen(100, drops_old=True)
    quota.require_room()
    assert quota.warning is not None and "--max-bytes" in quota.warning


def test_the_warning_is_logged_once_each_time_that_the_log_fills(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quota = LogQuota(LIMITS)
    for percent in (85, 90, 96, 70, 81):
        quota.update(state(percent))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


@pytest.fixture
async def small(empty_bus: Bus) -> Bus:
    """Its log has a small limit, as an operator may set it."""
    await SessionLog(empty_bus).ensure()
    await limit(empty_bus, LIMIT)
    return empty_bus


async def limit(bus: Bus, max_bytes: int) -> None:
    config = (await bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
    config.max_bytes = max_bytes
    await bus.jetstream.update_stream(config)


def large(request_id: str) -> Exchange:
    return exchange(request_id, response=LARGE)


async def trimmed(bus: Bus) -> None:
    """Waits until all is archived, and the log has its room back."""

    async def is_trimmed() -> bool:
        told = await status(bus)
        return told.unarchived == 0 and (told.log_bytes or 0) < ROOM

    await until(is_trimmed)


async def fill(bus: Bus, session_id: str) -> list[str]:
    """Appends until the log refuses; the ids of what it took."""
    taken: list[str] = []
    with pytest.raises(StreamFull):
        while True:
            await append(bus, session_id, large(f"r{len(taken):03}"))
            taken.append(f"r{len(taken):03}")
    return taken


async def refused(bus: Bus, session_id: str) -> bool:
    try:
        await context(bus, session_id)
    except ServiceError as error:
        assert error.code == "history_full" and "MongoDB" in error.message
        return True
    return False


@asynccontextmanager
async def seen_and_gone(nats: Server, bus: Bus, empty_mongo: Server) -> AsyncIterator[None]:
    """A history whose MongoDB was there, and is not any more."""
    async with history(url_of(nats), uri_of(empty_mongo)):
        await connected(bus)
        await append(bus, "first", exchange("first"))
        await archived(bus)
        await asyncio.to_thread(empty_mongo.stop, signal.SIGKILL)
        yield


async def test_without_mongodb_the_oldest_records_make_room(
    empty_nats: Server, small: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        for n in range(90):
            await append(small, session_id, large(f"r{n:03}"))

        async def is_warned() -> bool:
            return bool((await status(small)).warning)

        await until(is_warned)
        told = await status(small)
        assert told.log_limit == LIMIT and told.log_bytes and 0.9 * LIMIT < told.log_bytes <= LIMIT
        assert ids(await context(small, session_id))[-1] == "r089"


async def test_behind_the_archive_the_log_is_trimmed_and_nothing_is_forgotten(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with history(url_of(empty_nats), uri_of(empty_mongo), TRIM):
        await connected(small)
        await append(small, "quiet", exchange("before"))  # no context is asked for here
        for n in range(150):
            await append(small, session_id, large(f"r{n:03}"))
            if n % 20 == 19:
                await trimmed(small)
        assert ids(await context(small, "quiet")) == ["before"]
        assert ids(await context(small, session_id))[-10:] == [f"r{n}" for n in range(140, 150)]
        assert len(await messages(small, session_id, limit=200)) == 150


async def test_a_session_goes_on_after_all_its_records_were_trimmed(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with history(url_of(empty_nats), uri_of(empty_mongo), TRIM):
        await connected(small)
        await append(small, session_id, exchange("before"))
        for n in range(60):
            await append(small, "other", large(f"r{n:03}"))
            if n % 20 == 19:
                await trimmed(small)
        subject = subjects.log(subjects.session_key(TENANT, session_id))
        assert await Stream(small, subjects.HISTORY_STREAM).last(subject) is None
        await append(small, session_id, exchange("after"))
        assert ids(await context(small, session_id)) == ["before", "after"]
        assert ids(await messages(small, session_id)) == ["before", "after"]


async def test_a_full_log_refuses_chats_and_keeps_all_until_mongodb_is_back(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with seen_and_gone(empty_nats, small, empty_mongo):
        taken = await fill(small, session_id)

        async def is_refused() -> bool:
            return await refused(small, session_id)

        await until(is_refused)
        warning = (await status(small)).warning
        assert warning and "MongoDB" in warning
        with pytest.raises(ServiceError, match="MongoDB"):  # the rest is for what is being said
            await import_exchanges(
                small, "other", [Imported(request_id="a", prompt="p", response="r")]
            )
        await asyncio.to_thread(empty_mongo.start)

        async def is_taken() -> bool:
            return not await refused(small, session_id)

        await until(is_taken)
        await append(small, session_id, exchange("after"))
        await archived(small)
        found = ids(await messages(small, session_id, limit=200))
        assert found == [*taken, "after"]
        assert ids(await context(small, session_id))[-2:] == [taken[-1], "after"]


async def test_a_history_that_starts_without_mongodb_still_owes_it_everything(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with seen_and_gone(empty_nats, small, empty_mongo):
        pass
    async with history(url_of(empty_nats)):
        taken = await fill(small, session_id)

        async def is_refused() -> bool:
            return await refused(small, session_id)

        await until(is_refused)
        assert ids(await messages(small, session_id, limit=200)) == taken
