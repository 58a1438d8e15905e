import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.contract import subjects
from services.contract.codec import encode
from services.contract.history import Cleared, Erased, Exchange
from services.history.entry import Entry, Unreadable
from services.history.log import SessionLog
from services.runtime.bus import Bus
from services.runtime.consumers import ConsumerProgress
from services.runtime.streams import Stream
from tests.history.samples import FAST, TENANT, append, append_many, exchange, until
from tests.servers import NATS_CONFIG, Server, nats_server, running

CLEARED = Cleared(previous=0, cleared_at=datetime.now(UTC))


@pytest.fixture
async def log(bus: Bus) -> SessionLog:
    log = SessionLog(bus)
    await log.ensure()
    return log


@pytest.fixture
def key(session_id: str) -> str:
    return subjects.session_key(TENANT, session_id)


@asynccontextmanager
async def connection(server: Server) -> AsyncIterator[Bus]:
    async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
        yield bus


async def entries_of(log: SessionLog, key: str) -> list[Entry]:
    """Return all the session's records, oldest first."""
    return [entry async for entry in log.walk_back(await log.last(key), 0)][::-1]


def request_ids(entries: list[Entry]) -> list[str]:
    return [e.record.request_id for e in entries if isinstance(e.record, Exchange)]


async def publish_raw(bus: Bus, subject: str, data: bytes) -> None:
    await bus.jetstream.publish(subject, data)


async def test_unreadable_record_does_not_hide_earlier_ones(
    log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    await append_many(bus, session_id, 2)
    await append_many(bus, f"{session_id} other", 5)
    await publish_raw(bus, subjects.log(key), b"garbage")
    await append(bus, session_id, exchange("after"))
    entries = await entries_of(log, key)
    assert request_ids(entries) == ["r000", "r001", "after"]
    assert isinstance(entries[2].record, Unreadable)
    found = (await log.newest_exchanges(TENANT, key, limit=2, above=0)).entries
    assert request_ids(found) == ["after", "r001"]


@pytest.mark.parametrize("offset", [-1, 0, 100])
async def test_wrong_previous_shows_no_record_of_other_sessions(
    log: SessionLog, bus: Bus, session_id: str, key: str, offset: int
) -> None:
    await append(bus, session_id, exchange("mine"))
    foreign = await append(bus, f"{session_id} other", exchange("other"))
    forged = Cleared(previous=foreign + 1 + offset, cleared_at=exchange("x").asked_at)
    await publish_raw(bus, subjects.log(key), encode(forged))
    entries = await entries_of(log, key)
    assert request_ids(entries) == ["mine"]


async def test_walk_back_ends_at_trimmed_records(
    log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    dropped = await append(bus, session_id, exchange("dropped"))
    await append(bus, session_id, exchange("kept"))
    await bus.jetstream.delete_msg(subjects.HISTORY_STREAM, dropped)
    assert request_ids((await log.newest_exchanges(TENANT, key, limit=9, above=0)).entries) == [
        "kept"
    ]


async def test_archive_is_opened_while_consumers_are_ensured(
    empty_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a start: the guard checks the consumers while the archiver connects to MongoDB."""
    log = SessionLog(empty_bus, limits=FAST)
    ensure = log.snapshot_consumer.ensure

    async def ensure_and_open(ack_wait: float, max_ack_pending: int) -> None:
        monkeypatch.undo()
        await ensure(ack_wait, max_ack_pending)
        await log.open_archive("database")

    monkeypatch.setattr(log.snapshot_consumer, "ensure", ensure_and_open)
    await log.ensure()
    assert await log.archived_until() == 0
    await log.close()


async def test_archive_is_opened_while_consumers_are_restarted(
    empty_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the log then rejected chats: "consumer not found"."""
    log = SessionLog(empty_bus, limits=FAST)
    await log.ensure()
    ensure, opening = log.requests.ensure, list[asyncio.Task[None]]()

    async def ensure_and_open() -> None:
        monkeypatch.undo()
        await ensure()
        opening.append(asyncio.create_task(log.open_archive("database")))
        await asyncio.sleep(0)  # it has begun, and JetStream has not answered yet

    monkeypatch.setattr(log.requests, "ensure", ensure_and_open)
    assert await log.restart_consumers() == []
    await opening[0]
    await log.close()


async def test_consumer_that_has_not_yet_counted_a_record_does_not_hide_it(
    log: SessionLog, bus: Bus, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server confirms a record before its consumers count it."""
    await log.open_archive(f"database-{session_id[-8:]}")
    consumer = log.archive_consumer
    assert consumer is not None
    before = await consumer.progress()
    await append(bus, session_id, exchange("new"))

    async def not_yet_counted() -> ConsumerProgress:
        return ConsumerProgress(before.floor, 0)

    monkeypatch.setattr(consumer, "progress", not_yet_counted)
    assert await log.count_unarchived() == 1


async def test_newest_exchanges_of_a_tenant_come_from_all_sessions(
    log: SessionLog, bus: Bus, session_id: str
) -> None:
    tenant = session_id[-12:]
    for n in range(30):
        await append(bus, f"session {n % 3}", exchange(f"r{n}"), tenant)
        await append(bus, session_id, exchange(f"s{n}"), f"{tenant}x")
    found, _ = await log.newest_exchanges(tenant, None, limit=4, above=0)
    assert request_ids(found) == ["r29", "r28", "r27", "r26"]
    assert len((await log.newest_exchanges(tenant, None, limit=1000, above=0)).entries) == 30
    above = found[1].seq
    assert request_ids((await log.newest_exchanges(tenant, None, 4, above)).entries) == ["r29"]


async def test_delete_before_deletes_only_that_session(
    log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    for n in range(3):
        await append(bus, session_id, exchange(f"old{n}"))
        await append(bus, f"{session_id} other", exchange(f"other{n}"))
    erased = await log.append(key, Erased(previous=0, erased_at=datetime.now(UTC)))
    await append(bus, session_id, exchange("new", epoch=erased))
    for _ in range(2):  # the second time there is nothing to delete
        await log.delete_before(key, erased)
    kinds = [type(entry.record) for entry in await entries_of(log, key)]
    assert kinds == [Erased, Exchange]
    other = subjects.session_key(TENANT, f"{session_id} other")
    assert len((await log.newest_exchanges(TENANT, other, limit=9, above=0)).entries) == 3


async def test_exchanges_before_an_erasure_are_not_found(
    log: SessionLog, bus: Bus, session_id: str
) -> None:
    tenant = session_id[-12:]
    key = subjects.session_key(tenant, "erased")
    for session in ("erased", "other"):
        await append(bus, session, exchange(f"old {session}"), tenant)
    await log.append(key, Erased(previous=0, erased_at=datetime.now(UTC)))
    await append(bus, "erased", exchange("new"), tenant)
    found, erased = await log.newest_exchanges(tenant, None, limit=9, above=0)
    assert (request_ids(found), erased) == (["new", "old other"], {key})
    found, erased = await log.newest_exchanges(tenant, key, limit=9, above=0)
    assert (request_ids(found), erased) == (["new"], {key})


async def test_concurrent_appends_form_one_chain(
    log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    await asyncio.gather(
        *(append(bus, session_id, exchange(f"r{n}")) for n in range(5)), log.append(key, CLEARED)
    )
    entries = await entries_of(log, key)
    assert len(entries) == 6
    assert sum(isinstance(entry.record, Cleared) for entry in entries) == 1
    records = [entry.record for entry in entries if not isinstance(entry.record, Unreadable)]
    assert [record.previous for record in records] == [0, *(entry.seq for entry in entries[:-1])]


async def test_retention_is_the_max_age_of_the_streams(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with connection(server) as bus:
            for retention in (0, 3600, 60, 0):
                await SessionLog(bus, retention).ensure()
                for name in ("HISTORY", "KV_sessions"):
                    config = (await bus.jetstream.stream_info(name)).config
                    assert config.max_age == retention


async def test_ensure_waits_for_jetstream_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = nats_server(tmp_path)
    without = Server("nats-server", [], server.port, tmp_path / "nats.log")
    with_it = {"-js", "-c", str(NATS_CONFIG)}
    without.command = [part for part in server.command if part not in with_it]
    caplog.set_level(logging.WARNING, "services.history")
    without.start()
    try:
        async with connection(server) as bus:
            ensuring = asyncio.create_task(SessionLog(bus, limits=FAST).ensure())
            await until(lambda: "-js" in caplog.text)
            without.stop()
            server.start()
            await asyncio.wait_for(ensuring, 15)
            assert await Stream(bus, subjects.HISTORY_STREAM).get(1) is None
    finally:
        without.stop()
        server.stop()
    assert caplog.text.count("-js") <= 2  # for the server without, and at most while it restarted
