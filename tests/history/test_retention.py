"""Space in the log: the quota alone, then a small log with a real MongoDB."""

import asyncio
import contextlib
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
    all_messages,
    append,
    archived,
    connected,
    context,
    describe,
    exchange,
    history,
    ids,
    import_exchanges,
    messages,
    status,
    until,
    uri_of,
    url_of,
    window,
)
from tests.servers import Server

LIMIT = 256 * 1024
ROOM = int(LIMIT * LIMITS.trim_above)
LARGE = "x" * 4000
TRIM = dataclasses.replace(FAST, trim_batch=10)
MIB = 2**20


def quota_at(percent: int, drops_old: bool = False, limit: int | None = 100 * MIB) -> LogQuota:
    quota = LogQuota(LIMITS)
    quota.update(state(percent, drops_old, limit))
    return quota


def state(percent: int, drops_old: bool = False, limit: int | None = 100 * MIB) -> StreamState:
    return StreamState(1, 9, 9, 0, percent * MIB, limit, drops_old)


def test_quota_below_80_percent_has_no_warning() -> None:
    quota = quota_at(79)
    quota.require_room()
    assert quota.warning is None


def test_quota_without_a_limit_is_never_full() -> None:
    assert quota_at(1_000_000, limit=None).warning is None


def test_quota_nearly_full_warns_with_figures() -> None:
    quota = quota_at(80)
    quota.require_room()
    assert quota.warning is not None
    assert "80%" in quota.warning and "100 MiB" in quota.warning


def test_quota_full_refuses_chats_until_there_is_room() -> None:
    quota = quota_at(95)
    with pytest.raises(ServiceError, match="start MongoDB") as refused:
        quota.require_room()
    assert (refused.value.code, refused.value.retry_after) == ("history_full", 5)
    quota.update(state(94))
    quota.require_room()


def test_quota_is_tight_while_it_may_soon_refuse_chats() -> None:
    tight = [quota_at(percent).is_tight for percent in (79, 80, 96)]
    assert tight == [False, True, True]
    assert not quota_at(96, drops_old=True).is_tight


def test_quota_full_without_mongodb_accepts_chats() -> None:
    quota = quota_at(100, drops_old=True)
    quota.require_room()
    assert quota.warning is not None and "--max-bytes" in quota.warning


def test_quota_warning_is_logged_once_per_time_it_fills(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quota = LogQuota(LIMITS)
    for percent in (85, 90, 96, 70, 81):
        quota.update(state(percent))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


@pytest.fixture
async def small(empty_bus: Bus) -> Bus:
    """A connection to a NATS whose log has a small limit, as an operator may set it."""
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
    """Wait until all records are archived, and the log is trimmed."""

    async def is_trimmed() -> bool:
        current = await status(bus)
        return current.unarchived == 0 and (current.log_bytes or 0) < ROOM

    await until(is_trimmed)


async def fill(bus: Bus, session_id: str) -> list[str]:
    """Append until the log is full. Return the request ids."""
    stored: list[str] = []
    with pytest.raises(StreamFull):
        while True:
            await append(bus, session_id, large(f"r{len(stored):03}"))
            stored.append(f"r{len(stored):03}")
    return stored


async def refused(bus: Bus, session_id: str) -> bool:
    try:
        await context(bus, session_id)
    except ServiceError as error:
        assert error.code == "history_full" and "MongoDB" in error.message
        return True
    return False


@asynccontextmanager
async def with_stopped_mongodb(nats: Server, bus: Bus, empty_mongo: Server) -> AsyncIterator[None]:
    """Run a service whose MongoDB was connected, and is stopped."""
    async with history(url_of(nats), uri_of(empty_mongo)):
        await connected(bus)
        await append(bus, "first", exchange("first"))
        await archived(bus)
        await asyncio.to_thread(empty_mongo.stop, signal.SIGKILL)
        yield


async def test_full_log_without_mongodb_deletes_the_oldest(
    empty_nats: Server, small: Bus, session_id: str
) -> None:
    async with history(url_of(empty_nats)):
        for n in range(90):
            await append(small, session_id, large(f"r{n:03}"))

        async def is_warned() -> bool:
            return bool((await status(small)).warning)

        await until(is_warned)
        current = await status(small)
        assert (
            current.log_limit == LIMIT
            and current.log_bytes
            and 0.8 * LIMIT < current.log_bytes <= LIMIT  # records are dropped down to 85 %
        )
        assert ids(await context(small, session_id))[-1] == "r089"


async def test_log_that_fills_is_read_more_often(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    """The first read is too early: nothing is archived yet."""
    for n in range(50):
        await append(small, session_id, large(f"r{n:03}"))
    rarely = dataclasses.replace(FAST, watch_above=0.4, trim_interval_seconds=3600)
    async with history(url_of(empty_nats), uri_of(empty_mongo), rarely):
        await trimmed(small)


async def test_trimmed_log_loses_no_archived_exchange(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with history(url_of(empty_nats), uri_of(empty_mongo), TRIM):
        await connected(small)
        await append(small, "quiet", exchange("before"))  # its context is never requested
        for n in range(150):
            await append(small, session_id, large(f"r{n:03}"))
            if n % 20 == 19:
                await trimmed(small)
        assert ids(await context(small, "quiet")) == ["before"]
        assert ids(await context(small, session_id))[-10:] == [f"r{n}" for n in range(140, 150)]
        assert len(await all_messages(small, session_id, 200)) == 150


async def test_session_continues_after_all_records_were_trimmed(
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
        assert ids(await all_messages(small, session_id, 20)) == ["before", "after"]


async def test_full_log_keeps_all_until_mongodb_is_back(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with with_stopped_mongodb(empty_nats, small, empty_mongo):
        stored = await fill(small, session_id)

        async def is_refused() -> bool:
            return await refused(small, session_id)

        await until(is_refused)
        warning = (await status(small)).warning
        assert warning and "MongoDB" in warning
        with pytest.raises(ServiceError, match="MongoDB"):  # the rest is for running requests
            await import_exchanges(
                small, "other", [Imported(request_id="a", prompt="p", response="r")]
            )
        await asyncio.to_thread(empty_mongo.start)

        async def is_accepted() -> bool:
            return not await refused(small, session_id)

        await until(is_accepted)
        await append(small, session_id, exchange("after"))
        await archived(small)
        found = ids(await all_messages(small, session_id, 200))
        assert found == [*stored, "after"]
        assert ids(await context(small, session_id))[-2:] == [stored[-1], "after"]


async def test_imports_leave_room_for_chats_while_mongodb_is_away(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with with_stopped_mongodb(empty_nats, small, empty_mongo):
        with pytest.raises(ServiceError, match="the rest is for chats") as rejected:
            for n in range(100):
                line = Imported(request_id=f"i{n}", prompt="p", response=LARGE)
                await import_exchanges(small, "imported", [line], "ann")
        assert rejected.value.code == "history_full"
        used = (await status(small)).log_bytes or 0
        assert LIMITS.bulk_above * LIMIT <= used < LIMITS.bulk_above * LIMIT + 2 * len(LARGE)
        with pytest.raises(ServiceError, match="the rest is for chats"):
            await describe(small, session_id, title="New")
        assert await window(small, session_id) is None, "workers ask for each answer"
        await append(small, session_id, exchange("chat"))
        assert ids(await context(small, session_id)) == ["chat"]
        await asyncio.to_thread(empty_mongo.start)

        async def is_imported() -> bool:
            with contextlib.suppress(ServiceError):
                line = Imported(request_id="later", prompt="p", response="r")
                await import_exchanges(small, "imported", [line], "ann")
                return True
            return False

        await until(is_imported)


async def test_start_without_mongodb_keeps_all_for_it(
    empty_nats: Server, small: Bus, empty_mongo: Server, session_id: str
) -> None:
    async with with_stopped_mongodb(empty_nats, small, empty_mongo):
        pass
    async with history(url_of(empty_nats)):
        stored = await fill(small, session_id)

        async def is_refused() -> bool:
            return await refused(small, session_id)

        await until(is_refused)
        assert ids(await messages(small, session_id, limit=200)) == stored
