"""Which records a full log without MongoDB drops: the shares alone, then a small log."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.contract import subjects
from services.contract.history import Imported
from services.history.dropping import FairDropper, LogUse, fair_share
from services.history.limits import LIMITS
from services.history.log import SessionLog
from services.history.settings import HistorySettings
from services.history.snapshots import Snapshots
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.history.samples import (
    FAST,
    append,
    context,
    describe,
    exchange,
    export,
    history,
    ids,
    import_exchanges,
    message_page,
    messages,
    sessions,
    status,
    until,
    url_of,
)
from tests.servers import Server

LIMIT = 512 * 1024
LARGE = "x" * 8000
PATIENT = replace(FAST, max_room_wait_seconds=30)


def test_fair_share_of_a_log_with_room_is_infinite() -> None:
    assert fair_share({"ann": 50, "bob": 40}, 100) == math.inf
    assert fair_share({}, 100) == math.inf


def test_fair_share_divides_what_small_tenants_leave() -> None:
    assert fair_share({"ann": 900, "bob": 10, "cid": 500}, 410) == 200


def test_excess_is_only_of_tenants_above_their_share() -> None:
    use = LogUse({"ann": 900, "bob": 10, "cid": 150}, 0)
    assert use.excess(460) == {"ann": 600}


@pytest.fixture
async def small(empty_bus: Bus) -> Bus:
    """A connection to a NATS whose log has a small limit, as an operator may set it."""
    await SessionLog(empty_bus).ensure()
    config = (await empty_bus.jetstream.stream_info(subjects.HISTORY_STREAM)).config
    config.max_bytes = LIMIT
    await empty_bus.jetstream.update_stream(config)
    return empty_bus


async def flood(bus: Bus, tenant: str, count: int) -> None:
    """Import exchanges, more than the log has room for."""
    for n in range(count):
        line = Imported(request_id=f"r{n:03}", prompt="p", response=LARGE)
        await import_exchanges(bus, "flood", [line], tenant)


async def test_flood_of_one_tenant_pushes_out_its_own_records_only(
    empty_nats: Server, small: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    async with history(url_of(empty_nats), limits=PATIENT):
        for n in range(3):
            await append(small, "s", exchange(f"b{n}"), "bob")
        await flood(small, "ann", 150)
        assert ids(await messages(small, "s", tenant="bob")) == ["b0", "b1", "b2"]
        kept = ids(await messages(small, "flood", 200, tenant="ann"))
        assert kept == [f"r{n:03}" for n in range(150 - len(kept), 150)]
        assert 30 < len(kept) < 70
        assert ids(await context(small, "flood", "ann"))[-1] == "r149"

        async def are_counted() -> bool:  # it may drop more between two looks
            left = len(await messages(small, "flood", 200, tenant="ann"))
            return (await status(small)).dropped == 150 - left

        await until(are_counted)
    assert "tenant=ann" in caplog.text and "tenant=bob" not in caplog.text


async def test_only_as_much_is_dropped_as_needed(empty_nats: Server, small: Bus) -> None:
    """Large records beside many small ones, by their own sizes."""
    async with history(url_of(empty_nats), limits=PATIENT):
        await flood(small, "ann", 30)
        for n in range(120):
            await append(small, "small", exchange(f"s{n}"), "ann")
        await flood(small, "bob", 30)

        async def has_room() -> bool:
            return ((await status(small)).log_bytes or LIMIT) < LIMITS.drop_above * LIMIT

        await until(has_room)
        assert ((await status(small)).log_bytes or 0) > (LIMITS.drop_to - 0.05) * LIMIT
        assert 0 < (await status(small)).dropped < 30


async def test_tenants_above_their_share_keep_the_same_room(empty_nats: Server, small: Bus) -> None:
    async with history(url_of(empty_nats), limits=PATIENT):
        await append(small, "s", exchange("c0"), "cid")
        await flood(small, "ann", 60)
        await flood(small, "bob", 60)
        kept = {
            name: len(await messages(small, "flood", 200, tenant=name)) for name in ("ann", "bob")
        }
        assert kept["bob"] >= kept["ann"] > 15
        assert ids(await messages(small, "s", tenant="cid")) == ["c0"]


async def test_session_continues_after_all_its_records_were_dropped(
    empty_nats: Server, small: Bus
) -> None:
    subject = subjects.log(subjects.session_key("ann", "quiet"))
    stream = Stream(small, subjects.HISTORY_STREAM)
    async with history(url_of(empty_nats), limits=PATIENT):
        await append(small, "quiet", exchange("before"), "ann")
        await flood(small, "ann", 120)

        async def is_dropped() -> bool:
            return await stream.last(subject) is None

        await until(is_dropped)
        await append(small, "quiet", exchange("after"), "ann")
        assert ids(await context(small, "quiet", "ann")) == ["before", "after"]


async def test_dropped_exchanges_are_missed_by_export_and_messages(
    empty_nats: Server, small: Bus
) -> None:
    async with history(url_of(empty_nats), limits=PATIENT):
        for session in ("old", "both", "new"):
            await append(small, session, exchange("a"), "ann")
            if session == "new":
                continue
            await append(small, session, exchange("b"), "ann")
        await append(small, "kept", exchange("k"), "bob")
        await drop_all(small, "ann", wholly=("old",), but_last=("both",))
        expected = {"old": (0, False), "both": (1, False), "new": (1, True)}
        for session, (count, is_complete) in expected.items():
            page = await message_page(small, session, tenant="ann")
            assert (len(page.messages), page.is_complete) == (count, is_complete)
            exported = await export(small, session, tenant="ann")
            assert (len(exported.exchanges), exported.is_complete) == (count, is_complete)
        listed = (await sessions(small, "ann")).sessions
        assert {each.id: each.exchanges for each in listed} == {"old": 0, "both": 1, "new": 1}
        assert (await describe(small, "old", tenant="ann", title="Old")).title == "Old"


async def drop_all(
    bus: Bus, tenant: str, wholly: Sequence[str], but_last: Sequence[str] = ()
) -> None:
    """Delete records as a full log drops them, once their snapshots are stored."""
    stream = Stream(bus, subjects.HISTORY_STREAM)
    for session in (*wholly, *but_last):
        await context(bus, session, tenant)
        subject = subjects.log(subjects.session_key(tenant, session))
        stored = [message async for message in stream.walk(subject, 1)]
        for message in stored[: len(stored) - (session in but_last)]:
            await stream.delete(message.seq)


async def test_dropper_that_can_save_no_snapshot_pauses(small: Bus) -> None:
    """Else it would read the log again and again, as long as the bucket takes no writes."""
    session_log = SessionLog(small, limits=FAST)
    snapshots = Snapshots(session_log, HistorySettings(), small.spawn)
    for n in range(60):
        await append(small, "s", exchange(f"a{n}", response=LARGE), "ann")
    bucket = f"KV_{subjects.SESSIONS_BUCKET}"
    config = (await small.jetstream.stream_info(bucket)).config
    await small.jetstream.update_stream(config.evolve(max_bytes=1))
    dropper, state = FairDropper(session_log, snapshots), await session_log.stream.state()
    assert dropper.is_due(state)
    assert not await dropper.drop(state)
    assert dropper.dropped == 0 and not dropper.is_due(state)
    await small.jetstream.update_stream(config)
    assert await dropper.drop(state)
    assert not dropper.is_due(await session_log.stream.state())


async def test_dropper_that_comes_late_drops_nothing(small: Bus) -> None:
    """Another process has dropped since this one has read the state of the log."""
    session_log = SessionLog(small, limits=FAST)
    snapshots = Snapshots(session_log, HistorySettings(), small.spawn)
    for n in range(60):
        await append(small, "s", exchange(f"a{n}", response=LARGE), "ann")
    state = await session_log.stream.state()
    first, late = (FairDropper(session_log, snapshots) for _ in range(2))
    assert await first.drop(state)
    assert not await late.drop(state)


async def test_two_processes_drop_at_once_what_one_would(empty_nats: Server, small: Bus) -> None:
    async with (
        history(url_of(empty_nats), limits=PATIENT),
        history(url_of(empty_nats), limits=PATIENT),
    ):
        await append(small, "s", exchange("b0"), "bob")
        await asyncio.gather(flood(small, "ann", 120), flood(small, "cid", 120))
        assert ids(await messages(small, "s", tenant="bob")) == ["b0"]
        assert len(await messages(small, "flood", 200, tenant="ann")) > 10
