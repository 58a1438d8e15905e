"""The state of the server on the page, with reports of fake workers and on all services."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace as replace_field
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from playwright.async_api import Browser, Locator, Page, Route, expect

from services.contract import subjects
from services.contract.history import HistoryStatus, SessionPage, SessionsRequest
from services.contract.messages import Empty, ModelInfo, WorkerReport
from services.edge.keys import ApiKey, ApiKeys, sha256_of
from services.runtime.bus import Bus
from tests.e2e.stack import Stack
from tests.edge.conftest import LIMITS, edge_on
from tests.page.conftest import PHONE, ask, open_page, until_answered
from tests.page.proxy import proxy_of
from tests.page.test_access import findings
from tests.servers import Server, nats_server, running

STATE = "/#/status"
QUICK = replace_field(LIMITS, sample_seconds=0.2)
REPORT_SECONDS = 0.2
DISK_FULL = "The log can't be written: the disk is full. Free some space."
NO_FILE = "Model file not found: model/x.gguf. Put a .gguf into `model/` or set MODEL_PATH."
FAULT = "adapter.txt is no LoRA adapter: it is not used."

MODEL = ModelInfo("story-1.7b", "d1", 8192, 1_834_426_016, ("story-1.7b:pirate",))
READY = WorkerReport(
    "a1b2c3d4e5f6",
    "ready",
    slots=8,
    running=5,
    waiting=3,
    queue=64,
    queued_tokens=1834,
    tokens_per_second=212.4,
    model=MODEL,
    name=MODEL.name,
    adapter_faults=(FAULT,),
)
LOADING = WorkerReport("b2c3", "loading", 8, 0, 0, progress=0.42, name="story-7b")
DRAINING = replace(READY, worker_id="c3d4", state="draining", running=1, waiting=0)
FAILED = WorkerReport("d4e5", "failed", 8, 0, 0, error=NO_FILE, name="missing")
EVERY_STATE = (READY, LOADING, DRAINING, FAILED)
HEALTHY = HistoryStatus(True, 12_345, 3_400_000, 7, 0, log_limit=2**30)


class FakeFleet:
    """Workers that report what a test sets, and a history with the status that it sets."""

    def __init__(self, bus: Bus, reports: Sequence[WorkerReport]) -> None:
        self._bus = bus
        self.reports = reports
        self.history = HEALTHY
        self.generated = 0  # by each worker, between two reports
        self.nats_url = ""
        self.url = ""  # of an edge

    async def status(self, subject: str, request: Empty) -> HistoryStatus:
        return self.history

    async def sessions(self, subject: str, request: SessionsRequest) -> SessionPage:
        return SessionPage(())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        list_sessions = subjects.history("sessions", subjects.ANY)
        endpoints = [
            self._bus.endpoint("status", subjects.HISTORY_STATUS, Empty, self.status),
            self._bus.endpoint("sessions", list_sessions, SessionsRequest, self.sessions),
        ]
        await self._bus.serve("history", "scripted", endpoints)
        task = asyncio.create_task(self._report())
        yield
        task.cancel()
        await asyncio.wait({task})

    async def _report(self) -> None:
        tokens = 0
        while True:
            for report in self.reports:
                counted = replace(report, generated_tokens=tokens)
                if self._bus.connected:
                    await self._bus.publish(subjects.report(report.worker_id), counted)
            await asyncio.sleep(REPORT_SECONDS)
            tokens += self.generated


@asynccontextmanager
async def fleet_on(
    nats_url: str, keys: ApiKeys | str = "", reports: Sequence[WorkerReport] = (READY,)
) -> AsyncIterator[FakeFleet]:
    """Yield a fleet, by default of one ready worker, and an edge that sees nothing else."""
    async with (
        Bus.connect(nats_url, "edge") as bus,
        Bus.connect(nats_url, "fleet") as other,
        edge_on(bus, keys, limits=QUICK) as http,
    ):
        fleet = FakeFleet(other, reports)
        fleet.nats_url, fleet.url = nats_url, str(http.base_url).rstrip("/")
        async with fleet.running():
            yield fleet


@pytest.fixture(scope="module")
def own_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A NATS server on which no other test reports."""
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        yield server


@pytest.fixture
async def fleet(own_nats: Server) -> AsyncIterator[FakeFleet]:
    async with fleet_on(f"nats://127.0.0.1:{own_nats.port}") as fleet:
        yield fleet


def tile(page: Page, name: str) -> Locator:
    return page.locator(".tile").filter(has=page.get_by_text(name, exact=True))


def worker(page: Page, name: str) -> Locator:
    return page.locator(".worker").filter(has=page.get_by_role("heading", name=name)).first


def plot(page: Page, title: str) -> Locator:
    return page.locator(".plot").filter(has_text=title)


# --- the fleet ------------------------------------------------------------------------------------


async def test_state_of_each_worker_is_shown(browser: Browser, fleet: FakeFleet) -> None:
    fleet.reports = EVERY_STATE
    async with open_page(browser, fleet.url) as page:
        await page.goto(STATE)
        await expect(tile(page, "Workers")).to_contain_text("1 of 4")
        ready = page.locator(".worker").filter(has_text="Ready")
        for text in ("story-1.7b", "5 of 8", "3 of 64", "212 tokens/s", "8,192", "pirate", FAULT):
            await expect(ready).to_contain_text(text)
        await expect(worker(page, "story-7b")).to_contain_text("42 % is loaded")
        progress = worker(page, "story-7b").get_by_role("progressbar")
        await expect(progress).to_have_attribute("value", "0.42")
        failed = worker(page, "missing")
        await expect(failed).to_contain_text("Failed")
        await expect(failed).to_contain_text(NO_FILE.replace("`", ""))
        draining = page.locator(".worker").filter(has_text="Draining")
        await expect(draining).to_contain_text("takes no new requests")


async def test_figures_follow_the_reports(browser: Browser, fleet: FakeFleet) -> None:
    async with open_page(browser, fleet.url) as page:
        await page.goto(STATE)
        await expect(tile(page, "Slots")).to_contain_text("5 of 8")
        await expect(plot(page, "Requests")).to_contain_text("running 5")
        fleet.reports, fleet.generated = (replace(READY, running=8, waiting=64),), 20
        await expect(tile(page, "Slots")).to_contain_text("8 of 8")
        await expect(tile(page, "Slots")).to_have_attribute("data-kind", "warn")
        await expect(plot(page, "Requests")).to_contain_text("waiting 64")
        rate = plot(page, "Generated").locator("b")
        await expect(rate).to_have_text(re.compile(r"^[1-9]\d+$"))  # about 100
        await expect(plot(page, "Generated")).to_contain_text("between 0 and")


async def test_plots_are_not_empty_after_a_reload(browser: Browser, fleet: FakeFleet) -> None:
    async with open_page(browser, fleet.url) as page:
        await page.goto(STATE)
        await expect(plot(page, "Requests")).to_contain_text("running 5")
        fleet.reports = (replace(READY, running=1),)
        await expect(plot(page, "Requests")).to_contain_text("running 1")
        await page.reload()
        await expect(plot(page, "Requests")).to_contain_text("running: between 0 and 5")


async def test_pointer_shows_earlier_values_in_all_plots(
    browser: Browser, fleet: FakeFleet
) -> None:
    async with open_page(browser, fleet.url) as page:
        await page.goto(STATE)
        await expect(page.locator(".plot-time")).to_have_text(["now"] * 4)
        await plot(page, "Requests").locator(".u-over").hover()
        await expect(page.locator(".plot-time").first).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
        await expect(page.locator(".plot-time").last).not_to_have_text("now")


async def test_page_says_that_there_is_no_worker(browser: Browser, own_nats: Server) -> None:
    async with fleet_on(f"nats://127.0.0.1:{own_nats.port}", reports=()) as fleet:
        async with open_page(browser, fleet.url) as page:
            await page.goto(STATE)
            await expect(page.locator(".problems")).to_contain_text("No worker reports")
            await expect(tile(page, "Workers")).to_have_attribute("data-kind", "bad")
            fleet.reports = (LOADING,)
            await expect(page.locator(".problems")).to_contain_text("one is loading")
            fleet.reports = (replace(READY, worker_id="b2c3"),)
            await expect(page.locator(".problems")).to_be_empty()


async def test_history_and_mongodb_say_what_is_wrong(browser: Browser, fleet: FakeFleet) -> None:
    async with open_page(browser, fleet.url) as page:
        await page.goto(STATE)
        await expect(tile(page, "MongoDB")).to_contain_text("7 to archive")
        await expect(page.locator(".history")).to_contain_text("12,345")
        fleet.history = replace(HEALTHY, warning=DISK_FULL, refuses="history_full")
        await expect(page.locator(".problems")).to_contain_text(DISK_FULL)
        await expect(tile(page, "History")).to_have_attribute("data-kind", "bad")
        fleet.history = replace(HEALTHY, database_connected=False, database_expected=True)
        await expect(tile(page, "MongoDB")).to_contain_text("7 to archive once it is back")
        await expect(tile(page, "MongoDB")).to_have_attribute("data-kind", "bad")
        fleet.history = replace(HEALTHY, database_connected=False)
        await expect(tile(page, "MongoDB")).to_contain_text("Not used")
        await expect(tile(page, "MongoDB")).to_have_attribute("data-kind", "off")


async def test_several_edges_are_named(browser: Browser, fleet: FakeFleet) -> None:
    """The replies of two edges take turns, as behind a proxy."""
    async with Bus.connect(fleet.nats_url, "edge") as bus, edge_on(bus, limits=QUICK) as other:
        urls = cycle((fleet.url, str(other.base_url).rstrip("/")))

        async def take_turns(route: Route) -> None:
            response = await route.fetch(url=f"{next(urls)}/status?activity=true")
            await route.fulfill(response=response)

        async with open_page(browser, fleet.url) as page:
            await page.route("**/status?*", take_turns)
            await page.goto(STATE)
            await expect(plot(page, "Requests")).to_contain_text("running 5")
            await expect(page.get_by_text("edges reply in turn")).to_have_count(0)
            await expect(page.get_by_text("2 edges reply in turn")).to_be_visible()


# --- what is away ---------------------------------------------------------------------------------


async def test_last_figures_stay_while_nats_is_away(browser: Browser, tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with fleet_on(f"nats://127.0.0.1:{server.port}") as fleet:
            async with open_page(browser, fleet.url) as page:
                await page.goto(STATE)
                await expect(page.get_by_text("Live", exact=True)).to_be_visible()
                await expect(worker(page, "story-1.7b")).to_be_visible()
                server.stop(signal.SIGKILL)
                await expect(page.locator(".problems")).to_contain_text("NATS")
                await expect(page.locator(".figures")).to_have_attribute("data-stale", "true")
                await expect(page.get_by_text(re.compile(r"^Last seen \d"))).to_be_visible()
                await expect(worker(page, "story-1.7b")).to_be_visible()
                await expect(tile(page, "NATS")).to_contain_text("Disconnected")
                server.start()
                await expect(page.get_by_text("Live", exact=True)).to_be_visible()
                await expect(page.locator(".problems")).to_be_empty()


async def test_unreachable_server_comes_back_by_itself(browser: Browser, fleet: FakeFleet) -> None:
    async with proxy_of(int(fleet.url.rpartition(":")[2])) as proxy:
        async with open_page(browser, proxy.url) as page:
            await page.goto(STATE)
            await expect(worker(page, "story-1.7b")).to_be_visible()
            proxy.cut()
            await expect(page.locator(".problems")).to_contain_text("can’t be reached")
            await expect(tile(page, "Slots")).to_contain_text("5 of 8")
            proxy.mend()
            await expect(page.locator(".problems")).to_be_empty()


# --- keys -----------------------------------------------------------------------------------------


async def test_figures_need_the_key_of_an_admin(browser: Browser, own_nats: Server) -> None:
    limited = ApiKey(name="ann", sha256=sha256_of("ann's key"), requests_per_minute=30)
    keys = ApiKeys([limited, ApiKey(name="boss", sha256=sha256_of("boss's key"), admin=True)])
    async with fleet_on(f"nats://127.0.0.1:{own_nats.port}", keys) as fleet:
        async with open_page(browser, fleet.url) as page:
            await page.goto(STATE)
            await enter_key(page, "ann's key")
            await expect(tile(page, "Model")).to_contain_text("story-1.7b")
            await expect(page.get_by_text("0 of 30")).to_be_visible()
            await expect(page.locator(".worker, .plot, .failures")).to_have_count(0)
            await page.get_by_role("button", name="Enter another key").click()
            await enter_key(page, "boss's key")
            await expect(worker(page, "story-1.7b")).to_be_visible()
            await expect(page.locator(".plot")).to_have_count(4)


async def enter_key(page: Page, key: str) -> None:
    await page.get_by_label("Key", exact=True).fill(key)
    await page.get_by_role("button", name="Use this key").click()


# --- looks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"color_scheme": "light"}, {"color_scheme": "dark", "viewport": PHONE, "is_mobile": True}],
    ids=["light", "dark phone"],
)
async def test_axe_finds_nothing_serious_in_the_state(
    browser: Browser, fleet: FakeFleet, options: dict[str, Any]
) -> None:
    fleet.reports = EVERY_STATE
    fleet.history = replace(HEALTHY, warning=DISK_FULL)
    async with proxy_of(int(fleet.url.rpartition(":")[2])) as proxy:
        async with open_page(browser, proxy.url, bypass_csp=True, **options) as page:
            await page.goto(STATE)
            await expect(page.locator(".worker")).to_have_count(4)
            assert await findings(page) == [], "live"
            width = await page.evaluate("document.documentElement.scrollWidth")
            assert width <= await page.evaluate("innerWidth")
            proxy.cut()
            await expect(page.locator(".figures")).to_have_attribute("data-stale", "true")
            assert await findings(page) == [], "stale"


async def test_figures_that_grow_move_nothing(browser: Browser, fleet: FakeFleet) -> None:
    async def places(page: Page) -> list[Any]:
        return list(
            await page.locator(".tile, .plot, .worker, .history > div").evaluate_all(
                "all => all.map((each) => JSON.stringify(each.getBoundingClientRect()))"
            )
        )

    async with open_page(browser, fleet.url) as page:
        await page.goto(STATE)
        await expect(plot(page, "Requests")).to_contain_text("running 5")
        before = await places(page)
        fleet.reports = (replace(READY, running=8, waiting=58, queued_tokens=123_456),)
        fleet.history = replace(HEALTHY, log_records=9_876_543, unarchived=43_210)
        fleet.generated = 200
        await expect(plot(page, "Requests")).to_contain_text("waiting 58")
        await expect(tile(page, "MongoDB")).to_contain_text("43,210")
        assert await places(page) == before


# --- all services ---------------------------------------------------------------------------------


async def test_answers_and_failures_appear_in_the_state(page: Page, stack: Stack) -> None:
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    await ask(page, "my name is Ada")
    await until_answered(page)
    assert not any("uplot" in url or "fleet" in url for url in loaded)
    rejected = stack.http.post("/v1/embeddings", json={"model": "demo", "input": "hi"})
    assert rejected.status_code == 400, "an error of the client is no failure"
    await page.get_by_role("link", name="State of the server").click()
    await expect(worker(page, "demo")).to_contain_text("Ready")
    assert any("uplot.js" in url for url in loaded)
    median = plot(page, "Time to first token").locator("b").first
    await expect(median).to_have_text(re.compile(r"\d m?s$"))
    await expect(plot(page, "Generated")).to_contain_text("between 0 and")
    await expect(page.get_by_text("None since the server started.")).to_be_visible()
    stack.history.stop(signal.SIGKILL)
    assert stack.http.get("/messages").status_code == 503
    await expect(tile(page, "History")).to_contain_text("Silent")
    await expect(page.locator(".failures")).to_contain_text("history_unavailable")
    stack.history.start()
    await expect(tile(page, "History")).to_contain_text("Replies")
