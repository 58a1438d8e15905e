"""Which workers hear all reports, and how the others get them: on a real nats-server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from msgspec.structs import replace as replace_fields

from services.client.fleet import FleetLimits
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.fleet import FleetReports, HubAnnouncement
from services.contract.messages import Empty, ModelInfo, WorkerReport
from services.inference.report_hub import ReportHub
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Inbox
from services.runtime.supervised import SupervisedLoop
from tests.servers import nats_server, running

LIMITS = FleetLimits(
    max_hubs=2,
    announce_seconds=0.1,
    max_announcement_age_seconds=1.0,
    look_seconds=0.1,
    hear_seconds=0.1,
    report_seconds=0.05,
)

RARE = replace(LIMITS, announce_seconds=1000.0, max_announcement_age_seconds=5000.0)
"""Hubs announce only what is new."""


@pytest.fixture(scope="module")
def own_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A NATS server whose reports no other test hears."""
    with running(nats_server(tmp_path_factory.mktemp("fleet"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


class Member:
    """A worker that only reports and takes part in the election."""

    def __init__(
        self,
        bus: Bus,
        worker_id: str,
        limits: FleetLimits = LIMITS,
        state: Literal["loading", "ready"] = "ready",
    ) -> None:
        self.bus = bus
        self.worker_id = worker_id
        self.workers = WorkerDirectory()
        self.hub = ReportHub(bus, worker_id, self.workers, limits)
        self.report = WorkerReport(
            worker_id, state, 2, 0, 0, model=ModelInfo("demo", "digest", 2048, 1)
        )

    @property
    def knows(self) -> set[str]:
        return {report.worker_id for report in self.workers.reports()}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        loop = SupervisedLoop("report", self.report_once, pytest.fail)
        async with self.hub.running(pytest.fail), loop.running(is_cancelled=True):
            yield

    async def report_once(self) -> float:
        await self.hub.report(self.report)
        return LIMITS.report_seconds


class Fleet:
    """Any number of members, each with a connection of its own, as `a`, `b`, `c`, …."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stacks: dict[str, AsyncExitStack] = {}
        self.members: dict[str, Member] = {}

    async def add(self, *names: str, limits: FleetLimits = LIMITS) -> None:
        for name in names:
            stack = self._stacks[name] = AsyncExitStack()
            bus = await stack.enter_async_context(Bus.connect(self._url, name))
            member = self.members[name] = Member(bus, name, limits)
            await stack.enter_async_context(member.running())

    async def remove(self, name: str) -> None:
        del self.members[name]
        await self._stacks.pop(name).aclose()

    async def close(self) -> None:
        for name in [*self.members]:
            await self.remove(name)

    @property
    def hearing(self) -> set[str]:
        return {name for name, member in self.members.items() if member.hub.is_hearing}

    @property
    def hubs(self) -> set[str]:
        return {name for name, member in self.members.items() if member.hub.is_hub}

    @property
    def others(self) -> list[Member]:
        return [member for name, member in self.members.items() if name not in self.hearing]

    @property
    def report_intervals(self) -> set[float]:
        return {member.hub.report_interval for member in self.members.values()}

    async def until_elected(self) -> set[str]:
        """Wait until there are `max_hubs`, and no other worker hears the reports."""
        await until(lambda: len(self.hubs) == LIMITS.max_hubs and self.hearing == self.hubs)
        return self.hubs


@pytest.fixture
async def fleet(own_url: str) -> AsyncIterator[Fleet]:
    """An empty fleet."""
    fleet = Fleet(own_url)
    try:
        yield fleet
    finally:
        await fleet.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def next_announcement(inbox: Inbox) -> HubAnnouncement:
    return decode((await inbox.next(20)).data, HubAnnouncement)


async def test_every_worker_of_a_small_fleet_hears_all_reports(fleet: Fleet) -> None:
    await fleet.add("a", "b")
    await until(lambda: fleet.hubs == {"a", "b"})
    await until(lambda: all(member.knows == {"a", "b"} for member in fleet.members.values()))
    assert all(member.hub.is_current for member in fleet.members.values())


async def test_few_workers_of_a_large_fleet_hear_all_reports(fleet: Fleet) -> None:
    await fleet.add(*"abcdefgh")
    await fleet.until_elected()
    others = fleet.others
    assert len(others) == 6
    await until(lambda: all(member.knows == {member.worker_id} for member in others))


async def test_other_worker_gets_the_reports_from_a_hub(fleet: Fleet) -> None:
    await fleet.add(*"abcde", limits=replace(LIMITS, timeout_seconds=20.0, refresh_seconds=20.0))
    hubs = await fleet.until_elected()
    await until(lambda: all(fleet.members[hub].knows == set("abcde") for hub in hubs))
    for member in fleet.others:
        await member.hub.refresh()
        assert member.knows == set("abcde") and not member.hub.is_hearing


async def test_worker_that_comes_or_goes_moves_no_hub(fleet: Fleet) -> None:
    await fleet.add(*"ijkl", limits=RARE)
    hubs = await fleet.until_elected()
    for name in ("a", "z"):
        await fleet.add(name, limits=RARE)
        assert name in fleet.hearing, "a worker begins with the reports"
    await until(lambda: not {"a", "z"} & fleet.hearing)
    await fleet.remove(next(iter(set("ijkl") - hubs)))
    assert await fleet.until_elected() == hubs


async def test_hub_that_stops_is_replaced_at_once(fleet: Fleet) -> None:
    """Not only when its last announcement is old."""
    await fleet.add(*"abcde", limits=RARE)
    hubs = await fleet.until_elected()
    stopped = min(hubs)
    await fleet.remove(stopped)
    assert hubs - {stopped} < await fleet.until_elected()


async def test_hubs_announce_themselves_to_a_new_worker(fleet: Fleet) -> None:
    await fleet.add(*"abc", limits=RARE)
    hubs = await fleet.until_elected()
    await fleet.add("d", limits=RARE)
    await until(lambda: "d" not in fleet.hearing)
    assert fleet.hubs == hubs


async def test_surplus_hub_steps_down_until_an_older_one_is_lost(fleet: Fleet) -> None:
    await fleet.add("a", "b")
    await until(lambda: fleet.hubs == {"a", "b"})
    bus = fleet.members["a"].bus
    stranger = HubAnnouncement("stranger", since=1, workers=3, is_complete=True)
    async with bus.inbox(subjects.hub(subjects.ANY)) as inbox:
        since: dict[str, int] = {}
        while since.keys() != {"a", "b"}:
            heard = await next_announcement(inbox)
            since[heard.worker_id] = heard.since
    newest = max("ab", key=lambda name: (since[name], name))
    async with asyncio.timeout(20):
        while newest in fleet.hearing:
            await bus.publish(subjects.hub("stranger"), stranger)
            await asyncio.sleep(0.01)
    assert fleet.hubs == {"a", "b"} - {newest}
    await until(lambda: fleet.hubs == {"a", "b"})  # the stranger counts as lost by and by


async def test_worker_that_reaches_no_hub_becomes_one(fleet: Fleet, own_url: str) -> None:
    """As many hubs as there should be announce themselves, but freeze."""
    names = [f"frozen{number}" for number in range(LIMITS.max_hubs)]
    asked: set[str] = set()
    await fleet.add("a", limits=replace(RARE, hear_seconds=0.5, refresh_seconds=20.0))
    member = fleet.members["a"]
    async with Bus.connect(own_url, "frozen") as bus:
        for name in names:
            await bus.subscribe(subjects.reports(name), lambda each: asked.add(each.subject))
        async with asyncio.timeout(20):
            while member.hub.is_hearing:
                for name in names:
                    frozen = HubAnnouncement(name, since=1, workers=3, is_complete=True)
                    await bus.publish(subjects.hub(name), frozen)
                await asyncio.sleep(0.01)
        assert not asked
        async with bus.inbox(subjects.hub("a")) as inbox:
            await bus.is_responsive()  # so that the server has the subscription
            assert await member.hub.refresh()
            assert member.hub.is_hub and member.knows == {"a"}
            assert asked == {subjects.reports(name) for name in names}
            assert not (await next_announcement(inbox)).is_complete
            while not (await next_announcement(inbox)).is_complete:
                pass  # it has heard another worker


async def test_worker_that_waits_for_reports_gets_them_from_a_new_hub(fleet: Fleet) -> None:
    """It stops hearing meanwhile, so that its own wait would end without all reports."""
    limits = replace(RARE, max_hubs=1, hear_seconds=1000.0, refresh_seconds=20.0)
    await fleet.add("a", limits=limits)
    member = fleet.members["a"]
    lost, new = (HubAnnouncement(name, 1, 2, is_complete=True) for name in ("lost", "new"))
    known = WorkerDirectory()
    known.on_report(
        Delivery("", encode(replace_fields(member.report, worker_id="b", interval=60.0)), "")
    )

    async def reply(_: Delivery) -> FleetReports:
        return known.snapshot()

    async with asyncio.timeout(20):
        while member.hub.is_hearing:
            await member.bus.publish(subjects.hub("lost"), lost)
            await asyncio.sleep(0.01)
    refreshing = asyncio.create_task(member.hub.refresh())
    await until(lambda: member.hub.is_hub)
    await member.bus.subscribe(
        subjects.reports("new"), lambda delivery: member.bus.respond(delivery, reply)
    )
    await member.bus.publish(subjects.hub("new"), new)
    assert await refreshing and "b" in member.knows
    await until(lambda: not member.hub.is_hearing)


async def test_hub_is_incomplete_after_a_reconnect(tmp_path: Path) -> None:
    """Its reports are too old, or from before the connection was lost."""
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "a") as bus:
            member = Member(bus, "a", replace(LIMITS, hear_seconds=2.0))
            reconnected = asyncio.Event()

            async def on_reconnect() -> None:
                assert not member.hub.is_current
                reconnected.set()

            bus.on_reconnect(on_reconnect)
            async with member.running():
                await until(lambda: member.hub.is_hub and member.hub.is_current)
                server.stop()
                await until(lambda: not bus.connected)
                server.start()
                async with asyncio.timeout(20):
                    await reconnected.wait()
                with pytest.raises(ServiceError) as refused:
                    await bus.request(subjects.reports("a"), Empty(), FleetReports)
                assert refused.value.code == "not_found"
                await until(lambda: member.hub.is_current and member.knows == {"a"})


async def test_worker_that_is_no_hub_refuses_to_reply(fleet: Fleet) -> None:
    await fleet.add(*"abc")
    hubs = await fleet.until_elected()
    (other,) = fleet.others
    with pytest.raises(ServiceError) as refused:
        await other.bus.request(subjects.reports(other.worker_id), Empty(), FleetReports)
    assert refused.value.code == "not_found"
    reply = await other.bus.request(subjects.reports(min(hubs)), Empty(), FleetReports)
    assert reply.reports


async def test_worker_of_an_earlier_version_is_heard(fleet: Fleet) -> None:
    """It reports, but neither announces itself nor listens to announcements."""
    await fleet.add(*"abc")
    await fleet.until_elected()
    (other,) = fleet.others
    old = Member(other.bus, "old")
    async with SupervisedLoop("report", old.report_once, pytest.fail).running(is_cancelled=True):
        await until(lambda: all("old" in fleet.members[hub].knows for hub in fleet.hubs))
        await until(lambda: not other.hub.is_current)
        await other.hub.refresh()
    assert "old" in other.knows


async def test_lone_worker_does_not_wait_for_others(fleet: Fleet) -> None:
    slow = FleetLimits(hear_seconds=1000)
    await fleet.add("a", limits=slow)
    async with asyncio.timeout(10):
        await fleet.members["a"].hub.refresh()
    await until(lambda: fleet.members["a"].knows == {"a"})


async def test_messages_that_are_no_announcements_are_ignored(fleet: Fleet) -> None:
    await fleet.add("a")
    heard: list[Delivery] = []
    await fleet.members["a"].bus.subscribe(subjects.hub("x"), heard.append)
    await fleet.members["a"].bus.send(subjects.hub("x"), b"{")
    await until(lambda: len(heard) == 1 and fleet.hubs == {"a"})


async def test_workers_of_a_large_fleet_report_half_as_often(fleet: Fleet) -> None:
    limits = replace(LIMITS, large_fleet=4)
    await fleet.add(*"abc", limits=limits)
    await until(lambda: len(fleet.hubs) == LIMITS.max_hubs)
    assert fleet.report_intervals == {limits.report_seconds}
    await fleet.add("d", limits=limits)
    await until(lambda: fleet.report_intervals == {2 * limits.report_seconds})
