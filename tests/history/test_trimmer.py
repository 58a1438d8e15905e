"""The log with little room, and a real MongoDB behind it."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, Imported
from services.history import trimmer
from services.history.log import Log
from services.runtime.bus import Bus
from services.runtime.streams import Stream, StreamFull
from tests.history.samples import (
    TENANT,
    append,
    archived,
    bring_in,
    connected,
    context,
    exchange,
    history,
    ids,
    messages,
    status,
    until,
    uri_of,
    url_of,
)
from tests.servers import Server

LIMIT = 256 * 1024
ROOM = int(LIMIT * trimmer.TRIM_ABOVE)
LARGE = "x" * 4000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimmer, "INTERVAL", 0.05)
    monkeypatch.setattr(trimmer, "CHUNK", 10)


@pytest.fixture
async def small(own_bus: Bus) -> Bus:
    """Its log has a small limit, as an operator may set it."""
    await Log(own_bus, 0).ensure()
    await limit(own_bus, LIMIT)
    return own_bus


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
async def seen_and_gone(nats: Server, bus: Bus, mongo: Server) -> AsyncIterator[None]:
    """A history whose MongoDB was there, and is not any more."""
    async with history(url_of(nats), uri_of(mongo)):
        await connected(bus)
        await append(bus, "first", exchange("first"))
        await archived(bus)
        await asyncio.to_thread(mongo.stop, signal.SIGKILL)
        yield


async def test_without_mongodb_the_oldest_records_make_room(
    own_nats: Server, small: Bus, session_id: str
) -> None:
    async with history(url_of(own_nats)):
        for n in range(90):
            await append(small, session_id, large(f"r{n:03}"))

        async def is_warned() -> bool:
            return bool((await status(small)).warning)

        await until(is_warned)
        told = await status(small)
        assert told.log_limit == LIMIT and told.log_bytes and 0.9 * LIMIT < told.log_bytes <= LIMIT
        assert ids(await context(small, session_id))[-1] == "r089"


async def test_behind_the_archive_the_log_is_trimmed_and_nothing_is_forgotten(
    own_nats: Server, small: Bus, mongo: Server, session_id: str
) -> None:
    async with history(url_of(own_nats), uri_of(mongo)):
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
    own_nats: Server, small: Bus, mongo: Server, session_id: str
) -> None:
    async with history(url_of(own_nats), uri_of(mongo)):
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
    own_nats: Server, small: Bus, mongo: Server, session_id: str
) -> None:
    async with seen_and_gone(own_nats, small, mongo):
        taken = await fill(small, session_id)

        async def is_refused() -> bool:
            return await refused(small, session_id)

        await until(is_refused)
        warning = (await status(small)).warning
        assert warning and "has taken" in warning
        with pytest.raises(ServiceError, match="MongoDB"):  # the rest is for what is being said
            await bring_in(small, "other", [Imported(request_id="a", prompt="p", response="r")])
        await asyncio.to_thread(mongo.start)

        async def is_taken() -> bool:
            return not await refused(small, session_id)

        await until(is_taken)
        await append(small, session_id, exchange("after"))
        await archived(small)
        found = ids(await messages(small, session_id, limit=200))
        assert found == [*taken, "after"]
        assert ids(await context(small, session_id))[-2:] == [taken[-1], "after"]


async def test_a_history_that_starts_without_mongodb_still_owes_it_everything(
    own_nats: Server, small: Bus, mongo: Server, session_id: str
) -> None:
    async with seen_and_gone(own_nats, small, mongo):
        pass
    async with history(url_of(own_nats)):
        taken = await fill(small, session_id)

        async def is_refused() -> bool:
            return await refused(small, session_id)

        await until(is_refused)
        assert ids(await messages(small, session_id, limit=200)) == taken
