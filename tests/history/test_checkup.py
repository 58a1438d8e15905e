"""Inconsistent stores: an older copy, and one that two nats-servers wrote to."""

import asyncio
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors
import pytest

from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.messages import Empty
from services.history import checkup as checkup_module
from services.history import log_repair, requests
from services.history.checkup import Checkup
from services.history.log import SAVING, Log
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from services.runtime.streams import (
    Appended,
    Bucket,
    Conflict,
    Stream,
    StreamDamaged,
    StreamState,
    StreamUnavailable,
)
from tests.history.samples import (
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
    history,
    ids,
    messages,
    sessions,
    status,
    until,
    url_of,
)
from tests.servers import NATS_VERSIONS, NatsVersion, Server, nats_server, running, wait_for


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
    """Let both write to the store; `first` must be restarted."""
    async with Bus.connect(url_of(first), "one") as one, history(url_of(first)):
        await asyncio.to_thread(second.start)
        async with Bus.connect(url_of(second), "two") as two, history(url_of(second)):
            for n in range(6):
                await publish(one, "a", f"a{n}")
                await publish(two, "b", f"b{n}")
                await publish(one if n < 3 else two, "c", f"c{n}")
                await asyncio.sleep(1)  # they write, and drop their caches
    for server in (second, first):  # the last one overwrites what the other has written
        await asyncio.to_thread(stop, server)


def stop(server: Server) -> None:
    """Stop it; nats-server 2.15 may hang on a signal if its store is damaged."""
    server.signal(signal.SIGTERM)
    with suppress(TimeoutError):
        wait_for(lambda: server.has_died, "the server's end", 5)
    server.stop(signal.SIGKILL)


@pytest.mark.timeout(120)
async def test_store_written_by_two_servers_is_repaired_and_remembers(
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
async def test_readable_records_of_a_damaged_store_are_rescued(
    tmp_path: Path, version: NatsVersion
) -> None:
    """
    One server's messages behind another's, in one file. nats-server 2.9 acknowledges then what it
    can't find again; later ones read the file as far as it makes sense.
    """
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    await converse(own, version, "old")
    shutil.copytree(own, other)
    common = {stream: blocks(own, stream).stat().st_size for stream in STREAMS}
    await converse(own, version, "a", "c")
    await converse(other, version, "b")
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


CONSUMERS = (SAVING, requests.DURABLE)
STREAMS = ("HISTORY", "KV_sessions")


def blocks(store: Path, stream: str) -> Path:
    return store / "jetstream/$G/streams" / stream / "msgs/1.blk"


async def converse(store: Path, version: NatsVersion, *session_ids: str) -> None:
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


class Changing(Log):
    """A log whose store another server writes to; counts rescues."""

    rescues = 0

    async def probe(self) -> None:
        raise StreamDamaged("it has not what it acknowledged")

    async def rescue(self, is_under_way: bool = False) -> int | None:
        self.rescues += 1
        return 0


async def test_only_a_log_that_was_damaged_at_the_start_is_emptied(own_bus: Bus) -> None:
    log = Changing(own_bus, 0)
    await log.ensure()
    checkup = Checkup(log)
    for _ in range(2 * checkup_module.PROOFS):
        with pytest.raises(StreamDamaged):
            await checkup.run(is_probed=True, is_restarted=False)
    assert log.rescues == 0
    for _ in range(checkup_module.PROOFS - 1):
        with pytest.raises(StreamDamaged):
            await checkup.run(is_probed=True, is_restarted=True)
    assert log.rescues == 0
    await checkup.run(is_probed=True, is_restarted=True)
    assert log.rescues == 1 and "damaged" in (checkup.warning or "")
    await log.close()


async def test_an_older_copy_of_the_store_goes_on_where_it_ends(
    own_nats: Server, own_bus: Bus, tmp_path: Path, mongodb_uri: str
) -> None:
    store, copy = tmp_path / "nats", tmp_path / "copy"
    async with history(url_of(own_nats), mongodb_uri, mongodb_database=f"test_{id(store)}"):
        await connected(own_bus)
        await append(own_bus, "s", exchange("before"))
        await archived(own_bus)
        await until(lambda: is_listed(own_bus, "s"))
        streams = "jetstream/$G/streams"
        shutil.copytree(store / streams / "HISTORY/msgs", copy)
        await append_many(own_bus, "s", 5)
        await archived(own_bus)
        await until(lambda: is_listed(own_bus, "s"))
        assert (await status(own_bus)).warning is None
        await asyncio.to_thread(own_nats.stop, signal.SIGKILL)
        shutil.rmtree(store / streams / "HISTORY/msgs")
        shutil.copytree(copy, store / streams / "HISTORY/msgs")
        await asyncio.to_thread(own_nats.start)

        async def is_reported() -> bool:
            try:
                return "older copy" in ((await status(own_bus)).warning or "")
            except (ServiceError, TimeoutError, NoResponders):
                return False

        await until(is_reported)
        for n in range(3):
            await append(own_bus, "s", exchange(f"after{n}"))
        assert ids(await context(own_bus, "s"))[-3:] == ["after0", "after1", "after2"]
        await archived(own_bus)
        await own_bus.jetstream.purge_stream(subjects.HISTORY_STREAM)
        shown = ids(await messages(own_bus, "s"))
        assert shown[0] == "before" and {"after0", "after1", "after2"} <= set(shown)


async def test_rescue_keeps_order_clears_and_sessions(own_nats: Server, own_bus: Bus) -> None:
    async with history(url_of(own_nats)):
        await append(own_bus, "a", exchange("a0"))
        await append(own_bus, "b", exchange("b0"))
        await clear(own_bus, "a")
        epoch = (await context(own_bus, "a")).epoch
        await append(own_bus, "a", exchange("late", epoch=0))
        await append(own_bus, "a", exchange("a1", epoch=epoch))
        await erase(own_bus, "c")
        log = Log(own_bus, 0)
        await log.ensure()
        before = (await own_bus.jetstream.stream_info(subjects.HISTORY_STREAM)).state.messages
        assert await log.rescue() == before
        assert ids(await context(own_bus, "a")) == ["a1"]
        assert ids(await messages(own_bus, "a")) == ["a0", "late", "a1"]
        assert ids(await context(own_bus, "b")) == ["b0"]
        await until(lambda: is_listed(own_bus, "b"))
        assert not await log.is_being_rescued()
        assert not await log.is_suspect()
        await log.close()


async def test_interrupted_rescue_is_finished_by_the_next_process(
    own_nats: Server, own_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with history(url_of(own_nats)):
        await append_many(own_bus, "s", 6)
    moved = 0
    log = Log(own_bus, 0)
    await log.ensure()

    async def die(key: str, record: object, message_id: str) -> int:
        nonlocal moved
        moved += 1
        if moved > 3:
            raise StreamUnavailable("killed")
        return await log.append(key, record, message_id)  # type: ignore[arg-type]

    stream = Stream(own_bus, subjects.HISTORY_STREAM)
    interrupted = log_repair.LogRepair(own_bus, stream, die)
    await interrupted.begin()
    with pytest.raises(StreamUnavailable):
        await interrupted.run()
    assert await log.rescue() is None, "its lock holds"
    monkeypatch.setattr(log_repair, "LOCK_TIME", timedelta(0))
    async with history(url_of(own_nats)):
        await until(lambda: answers(own_bus))
        assert ids(await messages(own_bus, "s")) == [f"r{n:03}" for n in range(6)]
        assert ids(await context(own_bus, "s")) == [f"r{n:03}" for n in range(6)]
    await log.close()


async def test_a_whole_store_is_not_touched(own_nats: Server, own_bus: Bus) -> None:
    async with history(url_of(own_nats)):
        await append_many(own_bus, "s", 5)
        await until(lambda: is_listed(own_bus, "s"))
    async with history(url_of(own_nats)):
        assert len(ids(await context(own_bus, "s"))) == 5
        assert (await status(own_bus)).warning is None
        state = (await own_bus.jetstream.stream_info(subjects.HISTORY_STREAM)).state
        assert (state.last_seq, state.messages) == (5, 5)


class Dying(Stream):
    """Fails after some writes, as if its process were killed."""

    writes = 0

    async def append(self, *args: Any) -> Appended:
        self._live()
        return await super().append(*args)

    async def append_at(self, *args: Any) -> Appended:
        self._live()
        return await super().append_at(*args)

    async def delete(self, seq: int) -> None:
        self._live()
        await super().delete(seq)

    def _live(self) -> None:
        self.writes -= 1
        if self.writes < 0:
            raise StreamUnavailable("killed")


async def is_rescued_within(bus: Bus, log: Log, writes: int) -> bool:
    """Whether the records were moved back before the process died, after as many writes."""
    dying = log_repair.LogRepair(bus, Stream(bus, subjects.HISTORY_STREAM), log.append)
    await dying.begin()
    dying._safe = Dying(bus, subjects.HISTORY_REPAIR_STREAM)
    dying._safe.writes = writes
    try:
        await dying.run()
    except StreamUnavailable:
        return False
    return True


@pytest.mark.parametrize("version", NATS_VERSIONS)
async def test_rescue_that_dies_at_any_step_loses_nothing(
    tmp_path: Path, version: NatsVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the next process goes on at once, while nats-server still drops repeats."""
    monkeypatch.setattr(log_repair, "LOCK_TIME", timedelta(0))
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
            log = Log(bus, 0)
            await log.ensure()
            assert not await is_rescued_within(bus, log, 3)
            await append(bus, "s", exchange("meanwhile", epoch=epoch))  # a worker's answer ends
            deaths = 0
            while not await is_rescued_within(bus, log, 2 + deaths % 2):
                deaths += 1
            assert deaths
            await log.close()
            async with history(url_of(nats)):
                await until(lambda: answers(bus))
                after = ["after0", "after1", "after2", "meanwhile"]
                assert ids(await messages(bus, "s")) == ["before0", "before1", "before2", *after]
                assert ids(await context(bus, "s")) == after


class Frozen(Stream):
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


async def test_process_that_was_frozen_in_a_rescue_writes_nothing_more(
    own_nats: Server, own_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with history(url_of(own_nats)):
        await append_many(own_bus, "s", 6)
    log, stream = Log(own_bus, 0), Stream(own_bus, subjects.HISTORY_STREAM)
    one, other = (log_repair.LogRepair(own_bus, stream, log.append) for _ in range(2))
    await one.begin()
    one._safe = safe = Frozen(own_bus, subjects.HISTORY_REPAIR_STREAM)
    freezing = asyncio.create_task(one.run())
    await safe.frozen.wait()
    with pytest.raises(Conflict):  # the lock of the first one holds
        await other.run()
    monkeypatch.setattr(log_repair, "LOCK_TIME", timedelta(0))
    assert await other.run() == 6
    safe.thawed.set()
    with pytest.raises(Conflict):
        await freezing
    assert await safe.next(subjects.HISTORY_REPAIR_RECORDS, 1) is None
    state = await stream.state()
    assert state.messages == 6


async def test_nothing_is_erased_while_another_process_repairs_the_log(
    own_nats: Server, own_bus: Bus
) -> None:
    async with history(url_of(own_nats)):
        await append(own_bus, "s", exchange("before"))
    log = Log(own_bus, 0)
    assert not await is_rescued_within(own_bus, log, 1)
    async with history(url_of(own_nats)):
        for change in (erase, clear, describe):
            with pytest.raises(ServiceError) as refused:
                await change(own_bus, "s")
            assert refused.value.code == "history_unavailable"
        assert (await status(own_bus)).refuses == "history_unavailable"
        assert ids(await messages(own_bus, "s")) == ["before"]


async def test_ended_rescue_is_not_begun_again(own_nats: Server, own_bus: Bus) -> None:
    """By a process that looked for one just before another ended it."""
    async with history(url_of(own_nats)):
        await append_many(own_bus, "s", 3)
        log = Log(own_bus, 0)
        with pytest.raises(StreamUnavailable):
            await log.rescue(is_under_way=True)
        assert not await log.is_being_rescued()


async def test_record_that_comes_during_a_check_is_no_sign_of_an_older_copy(
    own_nats: Server, own_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with history(url_of(own_nats)):
        await append(own_bus, "s", exchange("before"))
        log = Log(own_bus, 0)
        await log.ensure()
        look, looks = log._stream.state, 0

        async def look_and_append() -> StreamState:
            nonlocal looks
            looks += 1
            state = await look()
            seq = await append(own_bus, "s", exchange(f"meanwhile{looks}"))

            async def is_processed() -> bool:
                name = subjects.HISTORY_STREAM
                infos = [await own_bus.jetstream.consumer_info(name, d) for d in CONSUMERS]
                return all(info.delivered.stream_seq >= seq for info in infos if info.delivered)

            await until(is_processed)
            return state

        monkeypatch.setattr(log._stream, "state", look_and_append)
        checkup = Checkup(log)
        await checkup.run(is_probed=False, is_restarted=False)
        assert looks and checkup.warning is None
        await log.close()


@pytest.mark.parametrize("is_doubted", [False, True])
async def test_lost_consumers_are_made_anew(
    own_nats: Server, own_bus: Bus, is_doubted: bool
) -> None:
    """As when a process dies that was about to have them begin anew."""
    async with history(url_of(own_nats)):
        await append(own_bus, "s", exchange("before"))
        await until(lambda: is_listed(own_bus, "s"))
        assert await answers(own_bus), "the log has been checked"
        for durable in CONSUMERS:
            await own_bus.jetstream.delete_consumer(subjects.HISTORY_STREAM, durable)
        if is_doubted:
            await own_bus.publish(subjects.HISTORY_APPEND_FAILED, Empty())
        await append(own_bus, "new", exchange("after"))
        await until(lambda: is_listed(own_bus, "new"))
        await until(lambda: answers(own_bus))
        assert (await status(own_bus)).refuses is None


async def test_rescue_that_dies_keeps_snapshots_of_sessions_that_the_log_dropped(
    own_nats: Server, own_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_repair, "LOCK_TIME", timedelta(0))
    log, stream = Log(own_bus, 0), Stream(own_bus, subjects.HISTORY_STREAM)
    async with history(url_of(own_nats)):
        dropped = await append(own_bus, "dropped", exchange("d0"))
        await append(own_bus, "s", exchange("s0"))
        await until(lambda: is_listed(own_bus, "dropped"))
        await until(lambda: is_listed(own_bus, "s"))
    await stream.delete(dropped)
    await log.ensure()

    async def die(*_: Any) -> bool:
        raise StreamUnavailable("killed")

    with monkeypatch.context() as dying:
        dying.setattr(log, "keep", die)
        with pytest.raises(StreamUnavailable):
            await log.rescue()
    assert await Bucket(own_bus, subjects.SESSIONS_BUCKET).readable() == {}, "it is emptied"
    await log.close()
    async with history(url_of(own_nats)):
        await until(lambda: answers(own_bus))
        for session in ("dropped", "s"):
            assert ids(await context(own_bus, session)) == [f"{session[0]}0"]
            await until(partial(is_listed, own_bus, session))
