"""Lanes alone, then floods of one tenant at a service with a real nats-server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import Exchange, ExchangeRequest, ExportPage, ExportRequest
from services.history.admission import Lane
from services.history.limits import LaneLimits
from services.runtime.bus import Bus
from tests.history.samples import (
    FAST,
    append,
    context,
    exchange,
    history,
    ids,
    status,
    until,
    url_of,
)
from tests.servers import Server

SMALL = LaneLimits(max_running=4, max_waiting=3, max_wait_seconds=30)


async def hold(lane: Lane, tenant: str, count: int) -> AsyncExitStack:
    """Take places, which are free once the stack is closed."""
    stack = AsyncExitStack()
    for _ in range(count):
        await stack.enter_async_context(lane.place(tenant))
    return stack


@asynccontextmanager
async def recording(lane: Lane, order: list[str]) -> AsyncIterator["Recorder"]:
    """Start requests that add their tenant to `order` once they have a place."""
    recorder = Recorder(lane, order)
    yield recorder
    await asyncio.gather(*recorder.tasks)


class Recorder:
    def __init__(self, lane: Lane, order: list[str]) -> None:
        self._lane = lane
        self._order = order
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *tenants: str) -> None:
        for tenant in tenants:
            self.tasks.append(asyncio.create_task(self._run(tenant)))
        await asyncio.sleep(0)

    async def _run(self, tenant: str) -> None:
        async with self._lane.place(tenant):
            self._order.append(tenant)


async def test_lane_gives_one_tenant_half_of_its_places() -> None:
    lane, order = Lane("test", SMALL), list[str]()
    held = await hold(lane, "ann", 2)
    async with recording(lane, order) as requests:
        await requests.ask("ann", "ann", "bob")
        assert (order, lane.waiting) == (["bob"], 2)
        await held.aclose()
    assert order == ["bob", "ann", "ann"]


async def test_lane_lets_waiting_tenants_take_turns() -> None:
    lane, order = (
        Lane("test", LaneLimits(max_running=1, max_waiting=9, max_wait_seconds=30)),
        list[str](),
    )
    held = await hold(lane, "eve", 1)
    async with recording(lane, order) as requests:
        await requests.ask("ann", "ann", "ann", "bob", "cid", "bob")
        assert order == []
        await held.aclose()
    assert order == ["ann", "bob", "cid", "ann", "bob", "ann"]


async def test_lane_rejects_requests_beyond_the_queue_of_a_tenant() -> None:
    lane, order = Lane("test", SMALL), list[str]()
    held = await hold(lane, "ann", 2)
    async with recording(lane, order) as requests:
        await requests.ask("ann", "ann", "ann")
        with pytest.raises(ServiceError, match="send fewer at once") as rejected:
            await hold(lane, "ann", 1)
        assert (rejected.value.code, rejected.value.retry_after) == ("overloaded", 2)
        await (await hold(lane, "bob", 1)).aclose()
        await held.aclose()
    assert (lane.rejected, lane.running, lane.waiting) == (1, 0, 0)


async def test_lane_rejects_a_request_that_waited_too_long() -> None:
    lane = Lane("test", LaneLimits(max_running=2, max_waiting=9, max_wait_seconds=0.01))
    held = await hold(lane, "ann", 1)
    with pytest.raises(ServiceError) as rejected:
        await hold(lane, "ann", 1)
    assert (rejected.value.code, lane.waiting) == ("overloaded", 0)
    await held.aclose()
    await (await hold(lane, "ann", 1)).aclose()
    assert lane.running == 0


async def test_lane_forgets_a_cancelled_request() -> None:
    lane = Lane("test", SMALL)
    held = await hold(lane, "ann", 2)
    waiting = [asyncio.create_task(hold(lane, "ann", 1)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert lane.waiting == 1
    await held.aclose()
    await (await waiting[1]).aclose()
    assert (lane.running, lane.waiting) == (0, 0)


async def test_lane_passes_a_place_on_that_came_too_late() -> None:
    lane = Lane("test", SMALL)
    held = await hold(lane, "ann", 2)
    late = asyncio.create_task(hold(lane, "ann", 1))
    await asyncio.sleep(0)
    await held.aclose()  # gives it a place
    late.cancel()
    await asyncio.wait({late})
    assert (lane.running, lane.waiting) == (0, 0)


async def test_lane_skips_a_request_that_is_just_being_cancelled() -> None:
    """A place becomes free after its wait was cancelled, before its task has noticed."""
    lane = Lane("test", SMALL)
    held = await hold(lane, "ann", 2)
    leaving, staying = (asyncio.create_task(hold(lane, "ann", 1)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await held.aclose()
    await asyncio.wait({leaving})
    assert leaving.cancelled()
    await (await staying).aclose()
    assert (lane.running, lane.waiting) == (0, 0)


LARGE = "x" * 500_000
FLOODED = replace(
    FAST,
    bulk_lane=LaneLimits(max_running=8, max_waiting=100, max_wait_seconds=60),
)


async def find(bus: Bus, request_id: str, tenant: str) -> Exchange:
    subject = subjects.history("exchange", tenant)
    return await bus.request(subject, ExchangeRequest(request_id), Exchange, timeout=60)


async def is_read(bus: Bus, request_id: str) -> bool:
    """Return False if a busy machine read for more than 5 s."""
    with suppress(ServiceError):
        return (await find(bus, request_id, "ann")).response == LARGE
    return False


async def test_flood_of_large_reads_leaves_history_connected(
    empty_nats: Server, empty_bus: Bus
) -> None:
    """What one tenant reads at once is more than nats-server holds for a connection (64 MiB)."""
    async with history(url_of(empty_nats), limits=FLOODED):
        for n in range(2):
            await append(empty_bus, "s", exchange(f"r{n}", response=LARGE), "ann")
        await append(empty_bus, "s", exchange("b"), "bob")
        order: list[str] = []

        async def read(request_id: str) -> None:
            await until(partial(is_read, empty_bus, request_id))
            order.append("ann")

        reads = [asyncio.create_task(read(f"r{n % 2}")) for n in range(100)]
        while (await status(empty_bus)).waiting < 50:
            await asyncio.sleep(0.01)
        assert ids(await context(empty_bus, "s", "bob")) == ["b"]
        order.append("bob")
        await asyncio.gather(*reads)
        assert order.index("bob") < 50
    assert "Slow Consumer" not in empty_nats.log.read_text()


async def test_waiting_request_sends_keep_alives(empty_nats: Server, empty_bus: Bus) -> None:
    """Its caller gives up after 0.5 s of silence, but waits for a request that is worked on."""
    one = LaneLimits(max_running=1, max_waiting=100, max_wait_seconds=60)
    async with history(url_of(empty_nats), limits=replace(FAST, bulk_lane=one)):
        await append(empty_bus, "s", exchange("r0", response=LARGE), "ann")
        reads = [asyncio.create_task(find(empty_bus, "r0", "ann")) for _ in range(25)]
        subject = subjects.history("export", "ann")
        page = await empty_bus.request(
            subject, ExportRequest("s"), ExportPage, timeout=60, silence=0.5
        )
        assert [each.request_id for each in page.exchanges] == ["r0"]
        await asyncio.gather(*reads)
