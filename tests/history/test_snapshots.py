"""Snapshots on a real nats-server."""

import asyncio
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from services.contract import subjects
from services.contract.history import Cleared, Exchange
from services.history.context import Snapshot
from services.history.entry import Entry, parse_entry
from services.history.limits import HistoryLimits
from services.history.log import SessionLog
from services.history.settings import HistorySettings
from services.history.snapshots import Loaded, RecentSnapshots, Snapshots
from services.runtime.bus import Bus
from services.runtime.streams import BucketValue, StoredMessage
from tests.history.samples import TENANT, append, append_many, exchange, ids

CLEARED = Cleared(previous=0, cleared_at=datetime.now(UTC))


@pytest.fixture
async def log(bus: Bus) -> SessionLog:
    log = SessionLog(bus)
    await log.ensure()
    return log


@pytest.fixture
def snapshots(log: SessionLog, bus: Bus) -> Snapshots:
    return Snapshots(log, HistorySettings(), bus.spawn)


@pytest.fixture
def key(session_id: str) -> str:
    return subjects.session_key(TENANT, session_id)


async def records_after(
    log: SessionLog, snapshots: Snapshots, key: str, snapshot: Snapshot
) -> tuple[Snapshot, list[Entry]]:
    return await snapshots.records_after(key, snapshot, await log.last(key))


def request_ids(entries: list[Entry]) -> list[str]:
    return [e.record.request_id for e in entries if isinstance(e.record, Exchange)]


async def test_records_appended_and_saved_during_a_read_are_in_it(
    log: SessionLog,
    snapshots: Snapshots,
    bus: Bus,
    session_id: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await append(bus, session_id, exchange("a"))
    early = [await log.last(key)]
    await append(bus, session_id, exchange("b"))
    assert await snapshots.save(key)
    read_last = log.last

    async def last(key: str) -> StoredMessage | None:
        return early.pop() if early else await read_last(key)

    monkeypatch.setattr(log, "last", last)
    assert [turn.request_id for turn in (await snapshots.current(key)).turns] == ["a", "b"]


async def test_records_after_a_snapshot_are_in_log_order(
    snapshots: Snapshots, log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    await append_many(bus, session_id, 2)
    seqs = [await append(bus, session_id, exchange(f"new{n}")) for n in range(3)]
    await append(bus, f"{session_id} other", exchange("other"))
    kept = Snapshot(applied_seq=seqs[0])
    snapshot, entries = await records_after(log, snapshots, key, kept)
    assert (snapshot, request_ids(entries)) == (kept, ["new1", "new2"])


async def test_session_without_records_has_no_records_after(
    snapshots: Snapshots, log: SessionLog, key: str
) -> None:
    assert await records_after(log, snapshots, key, Snapshot()) == (Snapshot(), [])


async def test_snapshot_of_a_lost_log_is_replaced(
    snapshots: Snapshots, log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    last = await append(bus, session_id, exchange("a"))
    snapshot, entries = await records_after(
        log, snapshots, key, Snapshot(epoch=3, applied_seq=last + 1)
    )
    assert (snapshot, request_ids(entries)) == (Snapshot(), ["a"])


async def test_one_of_two_concurrent_stores_succeeds(
    snapshots: Snapshots, log: SessionLog, key: str
) -> None:
    _, revision, _ = await snapshots.load(key)
    await snapshots.store(key, Snapshot(applied_seq=1), revision)
    assert not await snapshots.store(key, Snapshot(applied_seq=2), revision)
    assert (await snapshots.load(key))[0] == Snapshot(applied_seq=1)


async def test_snapshots_are_stored_in_the_order_of_the_log(
    snapshots: Snapshots, log: SessionLog, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [subjects.session_key(TENANT, f"{session_id} {n}") for n in range(3)]
    sequences = [await log.append(key, CLEARED) for key in keys]
    entries = [[entry] for seq in sequences if (entry := await log.get(seq))]
    load, loaded = snapshots.load, dict((key, asyncio.Event()) for key in keys)

    async def load_last_first(key: str) -> Loaded:
        if key != keys[-1]:
            await loaded[keys[keys.index(key) + 1]].wait()
        found = await load(key)
        loaded[key].set()
        return found

    monkeypatch.setattr(snapshots, "load", load_last_first)
    await snapshots.add(entries)
    assert await listed(snapshots, *keys) == keys[::-1]


async def test_undecodable_snapshot_is_replaced(
    snapshots: Snapshots, log: SessionLog, bus: Bus, key: str
) -> None:
    await bus.jetstream.publish(f"$KV.{subjects.SESSIONS_BUCKET}.{key}", b'{"turns":7}')
    snapshot, revision, _ = await snapshots.load(key)
    assert snapshot == Snapshot()
    await snapshots.store(key, Snapshot(applied_seq=1), revision)
    assert (await snapshots.load(key))[0] == Snapshot(applied_seq=1)


@pytest.mark.parametrize(
    "damaged", [Snapshot(epoch=999_999, applied_seq=0), Snapshot(epoch=0, applied_seq=-7)]
)
async def test_inconsistent_snapshot_is_replaced(
    snapshots: Snapshots, log: SessionLog, key: str, damaged: Snapshot
) -> None:
    await log.append(key, CLEARED)
    snapshot, entries = await records_after(log, snapshots, key, damaged)
    assert snapshot == Snapshot() and len(entries) == 1


async def save(snapshots: Snapshots, log: SessionLog, key: str) -> None:
    """Save the session with its last record, as the snapshot saver does."""
    last = await log.last(key)
    assert last
    await snapshots.add([[parse_entry(last)]])


async def test_next_snapshot_of_a_session_needs_no_read(
    snapshots: Snapshots,
    log: SessionLog,
    bus: Bus,
    session_id: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[str] = []
    load = snapshots.load

    async def counted(key: str) -> Loaded:
        reads.append(key)
        return await load(key)

    monkeypatch.setattr(snapshots, "load", counted)
    for request_id in ("a", "b", "c"):
        await append(bus, session_id, exchange(request_id))
        await save(snapshots, log, key)
    assert reads == [key]
    assert ids((await load(key)).snapshot) == ["a", "b", "c"]
    snapshots.forget_recent()
    await append(bus, session_id, exchange("d"))
    await save(snapshots, log, key)
    assert reads == [key, key]


async def test_snapshots_of_two_processes_lack_no_record(
    snapshots: Snapshots, log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    other = Snapshots(log, HistorySettings(), bus.spawn)
    for n in range(3):
        for process in (snapshots, other, other, snapshots):
            await append(bus, session_id, exchange(f"{n} {process is other} {uuid4()}"))
            await save(process, log, key)
    stored = (await snapshots.load(key)).snapshot
    assert (stored.exchanges, stored.applied_seq) == (12, (await last_seq(log, key)))


async def entry_at(log: SessionLog, seq: int) -> Entry:
    entry = await log.get(seq)
    assert entry
    return entry


async def listed(snapshots: Snapshots, *keys: str) -> list[str]:
    """Return these keys as lists of sessions have them, last active first."""
    tenant = subjects.session_key(TENANT, "")
    return [key async for key, _ in snapshots.newest_first(tenant) if key in keys]


async def test_outdated_recent_snapshot_keeps_the_order_of_the_log(
    snapshots: Snapshots, log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    """Another process has stored the session, so the revision that this one knows is outdated."""
    other_key = subjects.session_key(TENANT, f"{session_id} 2")
    await append(bus, session_id, exchange("0"))
    await save(snapshots, log, key)
    first = await entry_at(log, await append(bus, session_id, exchange("a")))
    assert await Snapshots(log, HistorySettings(), bus.spawn).save(key)
    second = await entry_at(log, await append(bus, session_id, exchange("b")))
    later = await entry_at(log, await log.append(other_key, CLEARED))
    await snapshots.add([[first, second], [later]])
    assert ids((await snapshots.load(key)).snapshot) == ["0", "a", "b"]
    assert await listed(snapshots, key, other_key) == [other_key, key]


async def test_snapshot_of_another_process_keeps_its_place(
    snapshots: Snapshots, log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    """A list that is being read would miss it otherwise."""
    other_key = subjects.session_key(TENANT, f"{session_id} 2")
    await append(bus, session_id, exchange("0"))
    await save(snapshots, log, key)
    last = await entry_at(log, await append(bus, session_id, exchange("a")))
    later = await entry_at(log, await log.append(other_key, CLEARED))
    assert await Snapshots(log, HistorySettings(), bus.spawn).save(key)
    stored = await snapshots.load(key)
    await snapshots.add([[last], [later]])
    assert await snapshots.load(key) == stored
    assert await listed(snapshots, key, other_key) == [other_key, key]


async def test_records_that_snapshots_have_are_not_stored_again(
    snapshots: Snapshots, log: SessionLog, bus: Bus, session_id: str, key: str
) -> None:
    last = await entry_at(log, await append(bus, session_id, exchange("a")))
    await snapshots.add([[last]])
    stored = await snapshots.load(key)
    await snapshots.add([[last]])
    assert await snapshots.load(key) == stored


async def test_large_snapshots_are_stored_a_few_at_a_time(
    log: SessionLog, bus: Bus, session_id: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = HistoryLimits(snapshot_reads=2, snapshot_group_bytes=20_000)
    small_log = SessionLog(bus, limits=limits)
    snapshots = Snapshots(small_log, HistorySettings(), bus.spawn)
    held, sizes = 0, list[int]()
    read, write = small_log.snapshots.get, small_log.snapshots.put

    async def get(entry: str) -> BucketValue | None:
        nonlocal held
        held += 1
        sizes.append(held)
        return await read(entry)

    async def put(entry: str, data: bytes, revision: int, ttl: float | None = None) -> int:
        nonlocal held
        assert len(data) > 8000
        held -= 1
        return await write(entry, data, revision, ttl)

    sessions = []
    for n in range(12):
        own = exchange(f"r{n}", response="x" * 8000)
        sessions.append([await entry_at(log, await append(bus, f"{session_id} {n}", own))])
    monkeypatch.setattr(small_log.snapshots, "get", get)
    monkeypatch.setattr(small_log.snapshots, "put", put)
    await snapshots.add(sessions)
    assert held == 0 and len(sizes) == 12 and max(sizes) <= 4  # three, and one read with the last
    keys = [entries[0].key for entries in sessions]
    assert await listed(snapshots, *keys) == keys[::-1]


async def last_seq(log: SessionLog, key: str) -> int:
    last = await log.last(key)
    return last.seq if last else 0


def test_recent_snapshots_are_bounded_by_bytes() -> None:
    recent = RecentSnapshots(max_bytes=100)
    for key in ("a", "b", "c", "c"):
        recent.put(key, BucketValue(bytes(40), 1))
    assert [bool(recent.get(key)) for key in ("a", "b", "c")] == [False, True, True]
    recent.put("d", BucketValue(bytes(101), 1))
    assert [bool(recent.get(key)) for key in ("b", "c", "d")] == [False, False, False]
    recent.put("e", BucketValue(bytes(100), 1))
    assert recent.get("e")


async def test_record_that_names_no_session_keeps_no_list_from_its_sessions(
    snapshots: Snapshots, log: SessionLog, bus: Bus, session_id: str
) -> None:
    tenant = f"t{uuid4().hex}"
    await append(bus, session_id, exchange("a"), tenant)
    await log.stream.append(subjects.log(f"{tenant}.a"), b"{}", None, 0)  # no base64
    assert await snapshots.unsaved_sessions(tenant) == [subjects.session_key(tenant, session_id)]
