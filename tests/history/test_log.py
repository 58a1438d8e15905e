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
from services.history.context import Snapshot
from services.history.entry import Entry, Unreadable
from services.history.log import Log
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.history.samples import TENANT, append, append_many, exchange, until
from tests.servers import NATS_CONFIG, Server, nats_server, running

CLEARED = Cleared(previous=0, cleared_at=datetime.now(UTC))


@pytest.fixture
async def log(bus: Bus) -> Log:
    log = Log(bus, retention=0)
    await log.ensure()
    return log


@pytest.fixture
def key(session_id: str) -> str:
    return subjects.session_key(TENANT, session_id)


@asynccontextmanager
async def connection(server: Server) -> AsyncIterator[Bus]:
    async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
        yield bus


async def since(log: Log, key: str, snapshot: Snapshot) -> tuple[Snapshot, list[Entry]]:
    return await log.since(key, snapshot, await log.last(key))


def request_ids(entries: list[Entry]) -> list[str]:
    return [e.record.request_id for e in entries if isinstance(e.record, Exchange)]


async def publish_raw(bus: Bus, subject: str, data: bytes) -> None:
    await bus.jetstream.publish(subject, data)


async def test_what_came_since_a_snapshot_is_read_in_order(
    log: Log, bus: Bus, session_id: str, key: str
) -> None:
    await append_many(bus, session_id, 2)
    seqs = [await append(bus, session_id, exchange(f"new{n}")) for n in range(3)]
    await append(bus, f"{session_id} other", exchange("other"))
    kept = Snapshot(applied_seq=seqs[0])
    snapshot, entries = await since(log, key, kept)
    assert (snapshot, request_ids(entries)) == (kept, ["new1", "new2"])


async def test_a_session_without_records_has_none(log: Log, key: str) -> None:
    assert await since(log, key, Snapshot()) == (Snapshot(), [])


async def test_a_snapshot_of_a_log_that_is_no_more_is_not_continued(
    log: Log, bus: Bus, session_id: str, key: str
) -> None:
    last = await append(bus, session_id, exchange("a"))
    snapshot, entries = await since(log, key, Snapshot(epoch=3, applied_seq=last + 1))
    assert (snapshot, request_ids(entries)) == (Snapshot(), ["a"])


async def test_an_unreadable_record_does_not_hide_what_was_before_it(
    log: Log, bus: Bus, session_id: str, key: str
) -> None:
    await append_many(bus, session_id, 2)
    await append_many(bus, f"{session_id} other", 5)
    await publish_raw(bus, subjects.log(key), b"garbage")
    await append(bus, session_id, exchange("after"))
    _, entries = await since(log, key, Snapshot())
    assert request_ids(entries) == ["r000", "r001", "after"]
    assert isinstance(entries[2].record, Unreadable)
    found = (await log.exchanges(TENANT, key, limit=2, above=0)).entries
    assert request_ids(found) == ["after", "r001"]


@pytest.mark.parametrize("offset", [-1, 0, 100])
async def test_a_record_that_names_a_wrong_one_before_it_shows_nothing_of_other_sessions(
    log: Log, bus: Bus, session_id: str, key: str, offset: int
) -> None:
    await append(bus, session_id, exchange("mine"))
    foreign = await append(bus, f"{session_id} other", exchange("theirs"))
    forged = Cleared(previous=foreign + 1 + offset, cleared_at=exchange("x").asked_at)
    await publish_raw(bus, subjects.log(key), encode(forged))
    _, entries = await since(log, key, Snapshot())
    assert request_ids(entries) == ["mine"]


async def test_a_chain_ends_where_the_log_has_dropped_the_rest(
    log: Log, bus: Bus, session_id: str, key: str
) -> None:
    dropped = await append(bus, session_id, exchange("dropped"))
    await append(bus, session_id, exchange("kept"))
    await bus.jetstream.delete_msg(subjects.HISTORY_STREAM, dropped)
    assert request_ids((await log.exchanges(TENANT, key, limit=9, above=0)).entries) == ["kept"]


async def test_the_last_exchanges_of_a_tenant_come_from_all_its_sessions(
    log: Log, bus: Bus, session_id: str
) -> None:
    tenant = session_id[-12:]
    for n in range(30):
        await append(bus, f"session {n % 3}", exchange(f"r{n}"), tenant)
        await append(bus, session_id, exchange(f"s{n}"), f"{tenant}x")
    found, _ = await log.exchanges(tenant, None, limit=4, above=0)
    assert request_ids(found) == ["r29", "r28", "r27", "r26"]
    assert len((await log.exchanges(tenant, None, limit=1000, above=0)).entries) == 30
    above = found[1].seq
    assert request_ids((await log.exchanges(tenant, None, 4, above)).entries) == ["r29"]


async def test_what_a_session_was_before_a_record_is_deleted_and_no_other_sessions(
    log: Log, bus: Bus, session_id: str, key: str
) -> None:
    for n in range(3):
        await append(bus, session_id, exchange(f"old{n}"))
        await append(bus, f"{session_id} other", exchange(f"other{n}"))
    erased = await log.append(key, Erased(previous=0, erased_at=datetime.now(UTC)))
    await append(bus, session_id, exchange("new", epoch=erased))
    for _ in range(2):  # who comes second finds nothing to delete
        await log.delete_before(key, erased)
    kinds = [type(entry.record) for entry in (await since(log, key, Snapshot()))[1]]
    assert kinds == [Erased, Exchange]
    other = subjects.session_key(TENANT, f"{session_id} other")
    assert len((await log.exchanges(TENANT, other, limit=9, above=0)).entries) == 3


async def test_what_is_older_than_an_erasure_is_not_found_though_the_log_still_has_it(
    log: Log, bus: Bus, session_id: str
) -> None:
    tenant = session_id[-12:]
    key = subjects.session_key(tenant, "gone")
    for session in ("gone", "there"):
        await append(bus, session, exchange(f"old {session}"), tenant)
    await log.append(key, Erased(previous=0, erased_at=datetime.now(UTC)))
    await append(bus, "gone", exchange("new"), tenant)
    found, erased = await log.exchanges(tenant, None, limit=9, above=0)
    assert (request_ids(found), erased) == (["new", "old there"], {key})
    found, erased = await log.exchanges(tenant, key, limit=9, above=0)
    assert (request_ids(found), erased) == (["new"], {key})


async def test_clearing_takes_its_turn_among_many_appends(
    log: Log, bus: Bus, session_id: str, key: str
) -> None:
    await asyncio.gather(
        *(append(bus, session_id, exchange(f"r{n}")) for n in range(5)), log.append(key, CLEARED)
    )
    _, entries = await since(log, key, Snapshot())
    assert len(entries) == 6
    assert sum(isinstance(entry.record, Cleared) for entry in entries) == 1
    records = [entry.record for entry in entries if not isinstance(entry.record, Unreadable)]
    assert [record.previous for record in records] == [0, *(entry.seq for entry in entries[:-1])]


async def test_of_snapshots_kept_at_once_one_stays(log: Log, key: str) -> None:
    _, revision = await log.snapshot(key)
    await log.keep(key, Snapshot(applied_seq=1), revision)
    assert not await log.keep(key, Snapshot(applied_seq=2), revision)
    assert (await log.snapshot(key))[0] == Snapshot(applied_seq=1)


async def test_a_snapshot_that_can_not_be_read_is_replaced(log: Log, bus: Bus, key: str) -> None:
    await publish_raw(bus, f"$KV.{subjects.SESSIONS_BUCKET}.{key}", b'{"turns":7}')
    snapshot, revision = await log.snapshot(key)
    assert snapshot == Snapshot()
    await log.keep(key, Snapshot(applied_seq=1), revision)
    assert (await log.snapshot(key))[0] == Snapshot(applied_seq=1)


async def test_a_retention_is_the_age_of_what_jetstream_keeps(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with connection(server) as bus:
            for retention in (0, 3600, 60, 0):
                await Log(bus, retention).ensure()
                for name in ("HISTORY", "KV_sessions"):
                    config = (await bus.jetstream.stream_info(name)).config
                    assert config.max_age == retention


async def test_it_waits_for_a_server_that_has_no_jetstream_and_says_so_once(
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
            ensuring = asyncio.create_task(Log(bus, 0).ensure())

            async def is_said() -> bool:
                return "-js" in caplog.text

            await until(is_said)
            without.stop()
            server.start()
            await asyncio.wait_for(ensuring, 15)
            assert await Stream(bus, subjects.HISTORY_STREAM).get(1) is None
    finally:
        without.stop()
        server.stop()
    assert caplog.text.count("-js") <= 2  # for the server without, and at most while it restarted


@pytest.mark.parametrize(
    "damaged", [Snapshot(epoch=999_999, applied_seq=0), Snapshot(epoch=0, applied_seq=-7)]
)
async def test_a_snapshot_that_can_not_be_is_not_continued(
    log: Log, key: str, damaged: Snapshot
) -> None:
    await log.append(key, CLEARED)
    snapshot, entries = await since(log, key, damaged)
    assert snapshot == Snapshot() and len(entries) == 1
