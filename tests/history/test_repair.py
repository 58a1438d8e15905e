"""Inconsistent stores: an older copy, and one that two nats-servers wrote to."""

import asyncio
import dataclasses
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import nats.errors
import nats.js.errors
import pytest

from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.history import Feedback
from services.contract.messages import Empty
from services.history import requests
from services.history.limits import LIMITS, HistoryLimits
from services.history.log import SNAPSHOT_DURABLE, SessionLog
from services.history.repair import Checkup, LogRepair
from services.history.settings import HistorySettings
from services.history.snapshots import Snapshots
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from services.runtime.streams import (
    Appended,
    Conflict,
    Stream,
    StreamDamaged,
    StreamState,
    StreamUnavailable,
)
from tests.history.samples import (
    FAST,
    TENANT,
    append,
    append_many,
    archived,
    clear,
    connected,
    context,
    describe,
    erase,
    exchange,
    give_feedback,
    history,
    ids,
    messages,
    sessions,
    status,
    until,
    url_of,
)
from tests.servers import NATS_VERSIONS, NatsVersion, Server, nats_server, running, wait_for

UNLOCKED = dataclasses.replace(FAST, repair_lock_seconds=0.0)


@pytest.fixture(params=NATS_VERSIONS)
def two_servers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Server, Server]]:
    """Two servers on one store."""
    version: NatsVersion = request.param
    (tmp_path / "store").mkdir()
    with ExitStack() as stack:
        servers = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            server = nats_server(tmp_path / name, tmp_path / "store", version=version)
            stack.callback(server.stop, signal.SIGKILL)
            servers.append(server)
        yield servers[0], servers[1]


async def publish(bus: Bus, session_id: str, request_id: str) -> None:
    """Append without reading the damaged store."""
    subject = subjects.log(subjects.session_key(TENANT, session_id))
    with suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError, StreamUnavailable):
        await bus.jetstream.publish(subject, encode(exchange(request_id)), timeout=1)
        await Stream(bus, subjects.HISTORY_STREAM).last(subject)


async def damage(first: Server, second: Server) -> None:
    """Let both servers write to the store; `first` must be started again."""
    async with Bus.connect(url_of(first), "one") as one, history(url_of(first)):
        await asyncio.to_thread(second.start)
        async with Bus.connect(url_of(second), "two") as two, history(url_of(second)):
            for n in range(6):
                await publish(one, "a", f"a{n}")
                await publish(two, "b", f"b{n}")
                await publish(one if n < 3 else two, "c", f"c{n}")
                await asyncio.sleep(0.3)  # so that both flush, and drop their caches
    for server in (second, first):  # the last one overwrites what the other has written
        await asyncio.to_thread(stop, server)


def stop(server: Server) -> None:
    """Stop the server; nats-server 2.15 may hang on a signal if its store is damaged."""
    server.signal(signal.SIGTERM)
    with suppress(TimeoutError):
        wait_for(lambda: server.has_died, "the server's end", 5)
    server.stop(signal.SIGKILL)


@pytest.mark.timeout(120)
async def test_store_written_by_two_servers_is_repaired(
    two_servers: tuple[Server, Server],
) -> None:
    first, second = two_servers
    first.start()
    async with Bus.connect(url_of(first), "one") as one, history(url_of(first)):
        await append(one, "old", exchange("old"))
        await until(lambda: is_listed(one, "old"))
    await damage(first, second)
    await asyncio.to_thread(first.start)
    async with Bus.connect(url_of(first), "one") as bus, history(url_of(first)):
        await until(lambda: answers(bus), 30)
        for session in ("old", "a", "b", "c"):
            shown = await messages(bus, session)
            assert {message.session_id for message in shown} <= {session}
            assert {message.id.rstrip("0123456789") for message in shown} <= {session}
            assert {i.rstrip("0123456789") for i in ids(await context(bus, session))} <= {session}
        for session in ("a", "b", "new"):
            for n in range(2):
                await append(bus, session, exchange(f"{session}-after-{n}"))
                assert ids(await context(bus, session))[-1] == f"{session}-after-{n}"
            await until(partial(is_listed, bus, session))
            assert ids(await messages(bus, session))[-1] == f"{session}-after-1"


@pytest.mark.parametrize("version", NATS_VERSIONS)
async def test_readable_records_of_a_damaged_store_are_restored(
    tmp_path: Path, version: NatsVersion
) -> None:
    """
    One server's messages behind another's, in one file. nats-server 2.11 then acknowledges records
    that it can't find again; 2.15 reads the file as far as it is consistent.
    """
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    await write_sessions(own, version, "old")
    shutil.copytree(own, other)
    common = {stream: blocks(own, stream).stat().st_size for stream in STREAMS}
    await write_sessions(own, version, "a", "c")
    await write_sessions(other, version, "b")
    for stream in STREAMS:
        added = blocks(other, stream).read_bytes()[common[stream] :]
        append_messages(blocks(own, stream), added)
    with running(nats_server(own, version=version)) as nats:
        async with Bus.connect(url_of(nats), "test") as bus, history(url_of(nats)):
            await until(lambda: answers(bus), 30)
            assert version == "pinned" or "damaged" in ((await status(bus)).warning or "")
            for session in ("old", "a", "c"):
                kept = [f"{session}{n}" for n in range(3)]
                assert ids(await context(bus, session)) == kept
                assert ids(await messages(bus, session)) == kept
                await until(partial(is_listed, bus, session))
            for session in ("a", "b", "new"):
                await append(bus, session, exchange("after"))
                assert ids(await context(bus, session))[-1] == "after"
                await until(partial(is_listed, bus, session))


CONSUMERS = (SNAPSHOT_DURABLE, requests.DURABLE)
STREAMS = ("HISTORY", "KV_sessions")


def blocks(store: Path, stream: str) -> Path:
    return store / "jetstream/$G/streams" / stream / "msgs/1.blk"


async def write_sessions(store: Path, version: NatsVersion, *session_ids: str) -> None:
    nats = nats_server(store, version=version)
    with running(nats):
        async with Bus.connect(url_of(nats), "test") as bus, history(url_of(nats)):
            for n in range(3):
                for session_id in session_ids:
                    await append(bus, session_id, exchange(f"{session_id}{n}"))
            for session_id in session_ids:
                await until(partial(is_listed, bus, session_id))
        await asyncio.to_thread(nats.stop)


def append_messages(file: Path, added: bytes) -> None:
    """Remove the index, which the server rebuilds from the file."""
    file.write_bytes(file.read_bytes() + added)
    for index in file.parent.iterdir():
        if index != file:
            index.unlink()


async def answers(bus: Bus) -> bool:
    try:
        await context(bus, "a")
    except ServiceError as error:
        assert error.code == "history_unavailable"
        return False
    return True


async def is_listed(bus: Bus, session_id: str) -> bool:
    try:
        return session_id in [each.id for each in (await sessions(bus, TENANT)).sessions]
    except ServiceError:
        return False


class Parts(NamedTuple):
    """What a process builds for repairs."""

    log: SessionLog
    snapshots: Snapshots

    def repair(self, bus: Bus, kind: type[Stream] = Stream) -> LogRepair:
        copy = kind(bus, subjects.HISTORY_REPAIR_STREAM)
        return LogRepair(self.log, self.snapshots, copy)


def parts(bus: Bus, limits: HistoryLimits = FAST, kind: type[SessionLog] = SessionLog) -> Parts:
    log = kind(bus, limits=limits)
    return Parts(log, Snapshots(log, HistorySettings(), bus.spawn))


class DamagedStream(Stream):
    """A stream whose store another server writes to."""

    async def probe(self, subject: str) -> None:
        raise StreamDamaged("it has not what it acknowledged")


class CountedRepair(LogRepair):
    repairs = 0

    async def begin(self) -> None:
        pass

    async def run(self) -> int:
        self.repairs += 1
        return 0


async def test_only_a_log_damaged_at_the_start_is_emptied(empty_bus: Bus) -> None:
    log, snapshots = parts(empty_bus)
    await log.ensure()
    log.stream = DamagedStream(empty_bus, subjects.HISTORY_STREAM)
    repair = CountedRepair(log, snapshots, Stream(empty_bus, subjects.HISTORY_REPAIR_STREAM))
    checkup = Checkup(log, snapshots, repair)
    for _ in range(2 * LIMITS.repair_proofs):
        with pytest.raises(StreamDamaged):
            await checkup.run(is_probed=True, is_restarted=False)
    assert repair.repairs == 0
    for _ in range(LIMITS.repair_proofs - 1):
        with pytest.raises(StreamDamaged):
            await checkup.run(is_probed=True, is_restarted=True)
    assert repair.repairs == 0
    await checkup.run(is_probed=True, is_restarted=True)
    assert repair.repairs == 1 and "damaged" in (checkup.warning or "")
    await log.close()


async def test_older_copy_of_the_store_continues_where_it_ends(
    empty_nats: Server, empty_bus: Bus, tmp_path: Path, mongodb_uri: str
) -> None:
    stored, copy = blocks(tmp_path / "nats", "HISTORY").parent, tmp_path / "copy"
    async with history(url_of(empty_nats), mongodb_uri, mongodb_database=f"test_{uuid4().hex}"):
        await connected(empty_bus)
        await append(empty_bus, "s", exchange("before"))
        await archived(empty_bus)
        await until(lambda: is_listed(empty_bus, "s"))
        shutil.copytree(stored, copy)
        await append_many(empty_bus, "s", 5)
        await archived(empty_bus)
        await until(lambda: is_listed(empty_bus, "s"))
        assert (await status(empty_bus)).warning is None
        await asyncio.to_thread(restart_with, empty_nats, stored, copy)
        await until(partial(warns_of_an_older_copy, empty_bus))
        for n in range(3):
            await append(empty_bus, "s", exchange(f"after{n}"))
        assert ids(await context(empty_bus, "s"))[-3:] == ["after0", "after1", "after2"]
        await archived(empty_bus)
        await empty_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        shown = ids(await messages(empty_bus, "s"))
        assert shown[0] == "before" and {"after0", "after1", "after2"} <= set(shown)


def restart_with(nats: Server, stored: Path, copy: Path) -> None:
    """Replace the stored messages of a stream by an older copy."""
    nats.stop(signal.SIGKILL)
    shutil.rmtree(stored)
    shutil.copytree(copy, stored)
    nats.start()


async def warns_of_an_older_copy(bus: Bus) -> bool:
    try:
        return "older copy" in ((await status(bus)).warning or "")
    except (ServiceError, TimeoutError, NoResponders):
        return False


async def test_repair_keeps_order_clearings_and_sessions(
    empty_nats: Server, empty_bus: Bus
) -> None:
    async with history(url_of(empty_nats)):
        await append(empty_bus, "a", exchange("a0"))
        await append(empty_bus, "b", exchange("b0"))
        await clear(empty_bus, "a")
        epoch = (await context(empty_bus, "a")).epoch
        await append(empty_bus, "a", exchange("late", epoch=0))
        await append(empty_bus, "a", exchange("a1", epoch=epoch))
        await erase(empty_bus, "c")
        log, snapshots = parts(empty_bus)
        await log.ensure()
        repair = Parts(log, snapshots).repair(empty_bus)
        before = (await log.stream.state()).messages
        await repair.begin()
        assert await repair.run() == before
        assert ids(await context(empty_bus, "a")) == ["a1"]
        assert ids(await messages(empty_bus, "a")) == ["a0", "late", "a1"]
        assert ids(await context(empty_bus, "b")) == ["b0"]
        await until(lambda: is_listed(empty_bus, "b"))
        assert not await repair.is_unfinished()
        assert (await log.stream.state()).is_whole
        await log.close()


async def test_repair_keeps_feedback_and_its_order(empty_nats: Server, empty_bus: Bus) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, "gone", 5)
        await append_many(empty_bus, "a", 3)
        for request_id, rating in (("r000", "up"), ("r001", "up"), ("r000", "down")):
            given = Feedback(rating, correction=f"not {request_id}")  # type: ignore[arg-type]
            await give_feedback(empty_bus, "a", request_id, given)
        await erase(empty_bus, "gone")
        log, snapshots = parts(empty_bus)
        await log.ensure()
        repair = Parts(log, snapshots).repair(empty_bus)
        await repair.begin()
        await repair.run()
        await log.close()
    async with history(url_of(empty_nats)):  # whose index is empty
        shown = {each.id: each.feedback for each in await messages(empty_bus, "a")}
        ratings = {key: each and each.rating for key, each in shown.items()}
        assert ratings == {"r000": "down", "r001": "up", "r002": None}
        turns = (await context(empty_bus, "a")).turns
        assert [turn.response for turn in turns[:2]] == ["not r000", "not r001"]


class DyingLog(SessionLog):
    """Fails after three appends, as if its process were killed."""

    appends = 0

    async def append(self, *args: Any) -> int:
        self.appends += 1
        if self.appends > 3:
            raise StreamUnavailable("killed")
        return await super().append(*args)


async def test_interrupted_repair_is_finished_by_the_next_process(
    empty_nats: Server, empty_bus: Bus
) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, "s", 6)
    interrupted = parts(empty_bus, kind=DyingLog).repair(empty_bus)
    await interrupted.begin()
    with pytest.raises(StreamUnavailable):
        await interrupted.run()
    with pytest.raises(Conflict):  # its lock holds
        await parts(empty_bus).repair(empty_bus).run()
    async with history(url_of(empty_nats), limits=UNLOCKED):
        await until(lambda: answers(empty_bus))
        assert ids(await messages(empty_bus, "s")) == [f"r{n:03}" for n in range(6)]
        assert ids(await context(empty_bus, "s")) == [f"r{n:03}" for n in range(6)]


async def test_consistent_store_is_not_changed(empty_nats: Server, empty_bus: Bus) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, "s", 5)
        await until(lambda: is_listed(empty_bus, "s"))
    async with history(url_of(empty_nats)):
        assert len(ids(await context(empty_bus, "s"))) == 5
        assert (await status(empty_bus)).warning is None
        state = (await empty_bus.jetstream.stream_info(subjects.HISTORY_STREAM)).state
        assert (state.last_seq, state.messages) == (5, 5)


class DyingStream(Stream):
    """Fails after some writes, as if its process were killed."""

    writes = 0

    async def append(self, *args: Any) -> Appended:
        self._count()
        return await super().append(*args)

    async def append_at(self, *args: Any) -> Appended:
        self._count()
        return await super().append_at(*args)

    async def delete(self, seq: int) -> None:
        self._count()
        await super().delete(seq)

    def _count(self) -> None:
        self.writes -= 1
        if self.writes < 0:
            raise StreamUnavailable("killed")


async def are_moved_within(bus: Bus, writes: int) -> bool:
    """Return whether the records were moved back before the process died, after these writes."""
    copy = DyingStream(bus, subjects.HISTORY_REPAIR_STREAM)
    dying = LogRepair(*parts(bus, UNLOCKED), copy)
    copy.writes = 99
    await dying.begin()
    copy.writes = writes
    try:
        await dying.move_records()
    except StreamUnavailable:
        return False
    return True


@pytest.mark.parametrize("version", NATS_VERSIONS)
async def test_repair_that_dies_at_any_step_loses_nothing(
    tmp_path: Path, version: NatsVersion
) -> None:
    """Also if the next process resumes at once, while nats-server still drops duplicates."""
    with running(nats_server(tmp_path, version=version)) as nats:
        async with Bus.connect(url_of(nats), "test") as bus:
            async with history(url_of(nats)):
                for n in range(3):
                    await append(bus, "s", exchange(f"before{n}"))
                await clear(bus, "s")
                epoch = (await context(bus, "s")).epoch
                for n in range(3):
                    await append(bus, "s", exchange(f"after{n}", epoch=epoch))
                await until(lambda: is_listed(bus, "s"))
            assert not await are_moved_within(bus, 3)
            await append(bus, "s", exchange("meanwhile", epoch=epoch))  # by a worker
            deaths = 0
            while not await are_moved_within(bus, 2 + deaths % 2):
                deaths += 1
            assert deaths
            async with history(url_of(nats), limits=UNLOCKED):
                await until(lambda: answers(bus))
                after = ["after0", "after1", "after2", "meanwhile"]
                assert ids(await messages(bus, "s")) == ["before0", "before1", "before2", *after]
                assert ids(await context(bus, "s")) == after


class FrozenStream(Stream):
    """Waits for `thawed` before its third append at the end."""

    appends = 0

    def __init__(self, bus: Bus, name: str) -> None:
        super().__init__(bus, name)
        self.frozen, self.thawed = asyncio.Event(), asyncio.Event()

    async def append_at(self, *args: Any) -> Appended:
        self.appends += 1
        if self.appends == 3:
            self.frozen.set()
            await self.thawed.wait()
        return await super().append_at(*args)


async def test_process_frozen_during_a_repair_writes_nothing_more(
    empty_nats: Server, empty_bus: Bus
) -> None:
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, "s", 6)
    copy = FrozenStream(empty_bus, subjects.HISTORY_REPAIR_STREAM)
    first = LogRepair(*parts(empty_bus), copy)
    await first.begin()
    freezing = asyncio.create_task(first.move_records())
    await copy.frozen.wait()
    with pytest.raises(Conflict):  # the lock of the first one holds
        await parts(empty_bus).repair(empty_bus).move_records()
    assert await parts(empty_bus, UNLOCKED).repair(empty_bus).move_records() == 6
    copy.thawed.set()
    with pytest.raises(Conflict):
        await freezing
    assert await copy.next(subjects.HISTORY_REPAIR_RECORDS, 1) is None
    assert (await Stream(empty_bus, subjects.HISTORY_STREAM).state()).messages == 6


async def test_changes_are_refused_while_another_process_repairs_the_log(
    empty_nats: Server, empty_bus: Bus
) -> None:
    async with history(url_of(empty_nats)):
        await append(empty_bus, "s", exchange("before"))
    assert not await are_moved_within(empty_bus, 1)
    async with history(url_of(empty_nats)):
        for change in (erase, clear, describe):
            with pytest.raises(ServiceError) as refused:
                await change(empty_bus, "s")
            assert refused.value.code == "history_unavailable"
        assert (await status(empty_bus)).refuses == "history_unavailable"
        assert ids(await messages(empty_bus, "s")) == ["before"]


async def test_repair_begun_by_an_earlier_version_is_finished(
    empty_nats: Server, empty_bus: Bus
) -> None:
    """The second stream outlives an update, so it keeps its first name and subjects."""
    async with history(url_of(empty_nats)):
        request_ids = await append_many(empty_bus, "s", 3)
    log, copy = Stream(empty_bus, "HISTORY"), Stream(empty_bus, "HISTORY_RESCUED")
    await copy.ensure("history.rescued.>", -1, 0)
    record = f"history.rescued.record.{subjects.session_key(TENANT, 's')}"
    async for stored in log.readable():
        await copy.append_at(record, b"%d %b" % (stored.seq, stored.data), stored.seq - 1)
    await copy.append_at("history.rescued.emptied", b"", 3)
    await log.purge(3)
    async with history(url_of(empty_nats)):
        await until(lambda: answers(empty_bus))
        assert ids(await messages(empty_bus, "s")) == request_ids
        assert not await copy.exists()


async def test_finished_repair_is_not_begun_again(empty_nats: Server, empty_bus: Bus) -> None:
    """By a process that looked for one just before another finished it."""
    async with history(url_of(empty_nats)):
        await append_many(empty_bus, "s", 3)
        repair = parts(empty_bus).repair(empty_bus)
        with pytest.raises(StreamUnavailable):
            await repair.run()
        assert not await repair.is_unfinished()


async def test_record_appended_during_a_check_is_no_damage(
    empty_nats: Server, empty_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with history(url_of(empty_nats)):
        await append(empty_bus, "s", exchange("before"))
        log, snapshots = parts(empty_bus)
        await log.ensure()
        look, looks = log.stream.state, 0

        async def look_and_append() -> StreamState:
            nonlocal looks
            looks += 1
            state = await look()
            seq = await append(empty_bus, "s", exchange(f"meanwhile{looks}"))

            async def is_processed() -> bool:
                name = subjects.HISTORY_STREAM
                infos = [await empty_bus.jetstream.consumer_info(name, d) for d in CONSUMERS]
                return all(info.delivered.stream_seq >= seq for info in infos if info.delivered)

            await until(is_processed)
            return state

        monkeypatch.setattr(log.stream, "state", look_and_append)
        checkup = Checkup(log, snapshots, Parts(log, snapshots).repair(empty_bus))
        await checkup.run(is_probed=False, is_restarted=False)
        assert looks and checkup.warning is None
        await log.close()


@pytest.mark.parametrize("is_check_scheduled", [False, True])
async def test_lost_consumers_are_created_again(
    empty_nats: Server, empty_bus: Bus, is_check_scheduled: bool
) -> None:
    """As when a process dies between deleting and creating them."""
    async with history(url_of(empty_nats)):
        await append(empty_bus, "s", exchange("before"))
        await until(lambda: is_listed(empty_bus, "s"))
        assert await answers(empty_bus), "the log has been checked"
        for durable in CONSUMERS:
            await empty_bus.jetstream.delete_consumer(subjects.HISTORY_STREAM, durable)
        if is_check_scheduled:
            await empty_bus.publish(subjects.HISTORY_APPEND_FAILED, Empty())
        await append(empty_bus, "new", exchange("after"))
        await until(lambda: is_listed(empty_bus, "new"))
        await until(lambda: answers(empty_bus))
        assert (await status(empty_bus)).refuses is None


class DyingSnapshots(Snapshots):
    async def restore(self, key: str, data: bytes, last_seq: int) -> None:
        raise StreamUnavailable("killed")


async def test_repair_that_dies_keeps_snapshots_without_records(
    empty_nats: Server, empty_bus: Bus
) -> None:
    log, stream = parts(empty_bus).log, Stream(empty_bus, subjects.HISTORY_STREAM)
    async with history(url_of(empty_nats)):
        dropped = await append(empty_bus, "dropped", exchange("d0"))
        await append(empty_bus, "s", exchange("s0"))
        await until(lambda: is_listed(empty_bus, "dropped"))
        await until(lambda: is_listed(empty_bus, "s"))
    await stream.delete(dropped)
    await log.ensure()
    snapshots = DyingSnapshots(log, HistorySettings(), empty_bus.spawn)
    dying = Parts(log, snapshots).repair(empty_bus)
    await dying.begin()
    with pytest.raises(StreamUnavailable):
        await dying.run()
    assert await log.snapshots.readable() == {}, "it is emptied"
    await log.close()
    async with history(url_of(empty_nats), limits=UNLOCKED):
        await until(lambda: answers(empty_bus))
        for session in ("dropped", "s"):
            assert ids(await context(empty_bus, session)) == [f"{session[0]}0"]
            await until(partial(is_listed, empty_bus, session))
