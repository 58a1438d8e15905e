"""How an edge learns the state of the workers: by hearing all reports, or from a hub."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from services.client.fleet import FleetLimits, Hubs, ReportReader
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.fleet import FleetReports, HubAnnouncement
from services.contract.messages import ModelInfo, WorkerReport
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.client.test_routing import Clock, receive
from tests.servers import nats_server, running

LIMITS = FleetLimits(
    small_fleet=2, max_announcement_age_seconds=0.5, report_seconds=0.04, timeout_seconds=0.2
)
REPORTS = [
    WorkerReport(
        f"w{number}", "ready", 2, 0, 0, model=ModelInfo("demo", "digest", 2048, 1), interval=60.0
    )
    for number in range(3)
]  # which stay valid during a test


@pytest.fixture(scope="module")
def own_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A NATS server whose reports no other test hears."""
    with running(nats_server(tmp_path_factory.mktemp("fleet"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


@pytest.fixture
async def fleet_bus(own_url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(own_url, "test") as bus:
        yield bus


class FakeHub:
    """Knows the reports of all workers but does not publish them."""

    def __init__(self, bus: Bus, worker_id: str = "hub", workers: int = 3) -> None:
        self.bus = bus
        self.announcement = HubAnnouncement(worker_id, 1, workers, is_complete=True)
        self.directory = WorkerDirectory()
        self.asked = 0
        self.is_frozen = False
        receive(self.directory, *REPORTS)

    async def start(self) -> None:
        subject = subjects.reports(self.announcement.worker_id)
        await self.bus.subscribe(subject, self._on_request)

    async def announce(self) -> None:
        await self.bus.publish(subjects.hub(self.announcement.worker_id), self.announcement)

    def _on_request(self, delivery: Delivery) -> None:
        self.asked += 1
        if not self.is_frozen:
            self.bus.respond(delivery, self._reply)

    async def _reply(self, _: Delivery) -> FleetReports:
        return self.directory.snapshot()


@asynccontextmanager
async def reading(
    bus: Bus, limits: FleetLimits = LIMITS
) -> AsyncIterator[tuple[ReportReader, WorkerDirectory]]:
    workers = WorkerDirectory()
    reader = ReportReader(bus, workers, limits)
    await reader.start()
    async with reader.reading(pytest.fail):
        yield reader, workers


async def until(reader: ReportReader, is_hearing: bool, hub: FakeHub) -> None:
    """Announce the hub until the reader hears the reports, or does not any more."""
    async with asyncio.timeout(10):
        while reader.is_hearing is not is_hearing:
            await hub.announce()
            await asyncio.sleep(0.01)


async def until_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_edge_of_a_large_fleet_asks_a_hub(fleet_bus: Bus) -> None:
    hub = FakeHub(fleet_bus)
    await hub.start()
    patient = dataclasses.replace(LIMITS, max_announcement_age_seconds=60.0, timeout_seconds=20.0)
    async with reading(fleet_bus, patient) as (reader, workers):
        await until(reader, is_hearing=False, hub=hub)
        assert workers.reports() == REPORTS
        asked = hub.asked
        async with asyncio.timeout(10):
            while hub.asked < asked + 3:  # it asks again and again
                await hub.announce()
                await asyncio.sleep(0.01)
        assert not reader.is_hearing


async def test_edge_of_a_small_fleet_hears_all_reports(fleet_bus: Bus) -> None:
    hub = FakeHub(fleet_bus, workers=LIMITS.small_fleet)
    await hub.start()
    async with reading(fleet_bus) as (reader, workers):
        for _ in range(10):
            await hub.announce()
            await asyncio.sleep(LIMITS.report_seconds)
        assert reader.is_hearing and not hub.asked
        await fleet_bus.publish(subjects.report("w0"), REPORTS[0])
        await until_true(lambda: bool(workers.reports()))


@pytest.mark.parametrize("is_frozen", [False, True], ids=["dead", "frozen"])
async def test_edge_hears_all_reports_if_no_hub_replies(own_url: str, is_frozen: bool) -> None:
    async with Bus.connect(own_url, "edge") as bus, reading(bus) as (reader, workers):
        async with Bus.connect(own_url, "hub") as other:
            hub = FakeHub(other)
            await hub.start()
            await until(reader, is_hearing=False, hub=hub)
            hub.is_frozen = is_frozen
            if is_frozen:
                await until(reader, is_hearing=True, hub=hub)
        await until_true(lambda: reader.is_hearing)
        await bus.publish(subjects.report("new"), replace(REPORTS[0], worker_id="new"))
        await until_true(lambda: len(workers.reports()) == 4)


async def test_edge_asks_the_next_hub_if_one_is_lost(fleet_bus: Bus) -> None:
    hub, lost, frozen = (FakeHub(fleet_bus, each) for each in ("hub", "lost", "frozen"))
    frozen.is_frozen = True
    await hub.start()
    await frozen.start()
    async with reading(fleet_bus) as (reader, workers):
        async with asyncio.timeout(10):
            while reader.is_hearing or not frozen.asked:
                for each in (hub, lost, frozen):
                    await each.announce()
                await asyncio.sleep(0.01)
        assert workers.reports() == REPORTS


def test_hub_is_lost_if_it_is_silent_or_stops() -> None:
    clock = Clock()
    hubs = Hubs(LIMITS, "me", clock)
    for worker_id, is_complete in (("a", True), ("b", False), ("me", True)):
        announcement = HubAnnouncement(worker_id, 1, is_complete=is_complete)
        hubs.on_announcement(Delivery(subjects.hub(worker_id), encode(announcement), ""))
    assert [hub.worker_id for hub in hubs.live()] == ["a", "b"], "not the worker itself"
    assert [hub.worker_id for hub in hubs.complete()] == ["a"]
    stopping = HubAnnouncement("a", 1, is_stopping=True)
    hubs.on_announcement(Delivery(subjects.hub("a"), encode(stopping), ""))
    assert [hub.worker_id for hub in hubs.live()] == ["b"]
    clock.now += LIMITS.max_announcement_age_seconds
    assert hubs.live() == []


def test_invalid_announcement_is_refused() -> None:
    hubs = Hubs(LIMITS)
    for data in (b"{}", b'{"worker_id":"a.b","since":1}', b"\xff"):
        with pytest.raises(ServiceError):
            hubs.on_announcement(Delivery("", data, ""))
    assert hubs.live() == []
