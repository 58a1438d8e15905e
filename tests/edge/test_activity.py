"""What the edge remembers of the last ten minutes: samples of the fleet, TTFT, failures."""

import asyncio
import signal
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import Struct
from msgspec.structs import replace

from services.client.routing import WorkerDirectory
from services.contract.codec import encode
from services.contract.messages import Failed, WorkerReport
from services.edge.activity import Activity, ActivityMonitor, percentile
from services.edge.keys import ApiKey, ApiKeys, sha256_of
from services.edge.limits import EdgeLimits
from services.runtime import logs
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.edge.conftest import LIMITS, edge_on, until_disconnected
from tests.fakes import ACCEPTED, HELLO, direct_worker, report, reporting
from tests.servers import nats_server, running

REPORT = report("w1")
SMALL = EdgeLimits(max_samples=3, max_failures=2)
QUICK = replace_field(LIMITS, sample_seconds=0.05)


class Clock:
    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


class Watched:
    """A monitor with a clock and a directory of workers that a test drives."""

    def __init__(self, bus: Bus, limits: EdgeLimits = SMALL) -> None:
        self.clock = Clock()
        self.workers = WorkerDirectory(self.clock)
        self.monitor = ActivityMonitor(bus, self.workers, limits, self.clock)

    def see(self, *reports: WorkerReport, after: float = 0.0) -> Activity:
        """Take a sample when these reports have arrived."""
        self.clock.time += after
        for each in reports:
            self.workers.on_report(Delivery("", encode(each), ""))
        self.monitor.sample()
        return self.monitor.activity()


@pytest.fixture
def watched(bus: Bus) -> Watched:
    return Watched(bus)


def fail(watched: Watched, code: str, request_id: str = "r", model: str = "demo") -> None:
    watched.monitor.on_failed_answer(code, model, "_", request_id)  # type: ignore[arg-type]


# --- samples --------------------------------------------------------------------------------------


def test_samples_sum_the_reports_of_all_workers(watched: Watched) -> None:
    loading = WorkerReport("w3", "loading", slots=8, running=0, waiting=0)
    busy = replace(REPORT, worker_id="w2", running=3, waiting=2)
    samples = watched.see(replace(REPORT, running=1), busy, loading).samples
    assert samples.running == [4] and samples.waiting == [2]
    assert samples.slots == [16], "a worker that loads has no slots yet"


def test_rates_are_tokens_between_two_reports_of_a_worker(watched: Watched) -> None:
    watched.see(replace(REPORT, generated_tokens=1000, prefilled_tokens=500))
    later = replace(REPORT, generated_tokens=1060, prefilled_tokens=900)
    samples = watched.see(later, after=2.0).samples
    assert samples.generated_per_second == [0.0, 30.0], "a new worker has no rate yet"
    assert samples.prefilled_per_second == [0.0, 200.0]


def test_rate_after_a_restart_is_never_negative(watched: Watched) -> None:
    watched.see(replace(REPORT, generated_tokens=1000))
    watched.see(replace(REPORT, generated_tokens=10), after=2.0)
    later = replace(REPORT, generated_tokens=30)
    assert watched.see(later, after=2.0).samples.generated_per_second == [0.0, 0.0, 10.0]


def test_rate_without_a_new_report_stays_then_ends(watched: Watched) -> None:
    watched.see(REPORT)
    watched.see(replace(REPORT, generated_tokens=60), after=2.0)
    assert watched.see(after=2.0).samples.generated_per_second[-1] == 30.0
    lost = watched.see(after=2.0).samples
    assert lost.generated_per_second[-1] == 0.0 and lost.slots[-1] == 0


def test_samples_are_bounded_and_oldest_first(watched: Watched) -> None:
    for _ in range(5):
        activity = watched.see(after=2.0)
    assert activity.samples.at == [1_000_006.0, 1_000_008.0, 1_000_010.0]
    assert activity.now == 1_000_010.0


def test_columns_of_samples_have_equal_lengths(watched: Watched) -> None:
    def lengths(activity: Activity) -> set[int]:
        samples: Struct = activity.samples
        return {len(getattr(samples, name)) for name in samples.__struct_fields__}

    assert lengths(watched.monitor.activity()) == {0}
    assert lengths(watched.see(REPORT)) == {1}


def test_ttft_percentiles_are_those_of_the_last_minute(watched: Watched) -> None:
    watched.monitor.on_first_token(9.0)
    watched.clock.time += 61
    for tenth in range(1, 21):
        watched.monitor.on_first_token(tenth / 10)
    samples = watched.see().samples
    assert samples.ttft_p50 == [1.0] and samples.ttft_p95 == [1.9]
    assert watched.see(after=61).samples.ttft_p50[-1] is None


def test_percentile_of_one_value_is_the_value() -> None:
    assert percentile([0.3], 0.5) == percentile([0.3], 0.95) == 0.3
    assert percentile([], 0.5) is None


# --- failures -------------------------------------------------------------------------------------


def test_failures_in_a_row_are_counted_and_bounded(watched: Watched) -> None:
    for code in ("internal", "overloaded", "overloaded", "worker_lost"):
        watched.clock.time += 1
        fail(watched, code, request_id=f"r{watched.clock.time:.0f}")
    lost, overloaded = watched.monitor.activity().failures
    assert (lost.code, lost.count) == ("worker_lost", 1)
    assert (overloaded.code, overloaded.count, overloaded.request_id) == (
        "overloaded",
        2,
        "r1000003",
    )
    assert overloaded.at.timestamp() == 1_000_003.0


@pytest.mark.parametrize("code", ["invalid_request", "rate_limit_exceeded", "model_not_found"])
def test_errors_of_clients_are_no_failures(watched: Watched, code: str) -> None:
    fail(watched, code)
    assert watched.monitor.activity().failures == []
    fail(watched, "internal")
    assert len(watched.monitor.activity().failures) == 1


def test_failed_answer_and_its_http_response_are_one_failure(watched: Watched) -> None:
    token = logs.request_id.set("http-1")
    fail(watched, "worker_lost", request_id="answer-1")
    watched.monitor.on_failed_request("worker_lost", "_", "http-1")
    watched.monitor.on_failed_request("worker_lost", "_", "http-2")
    logs.request_id.reset(token)
    other, answer = watched.monitor.activity().failures
    assert (answer.request_id, answer.model) == ("answer-1", "demo")
    assert (other.request_id, other.model) == ("http-2", None)


# --- over HTTP ------------------------------------------------------------------------------------


async def activity_of(http: httpx.AsyncClient, **headers: str) -> dict[str, Any]:
    status = (await http.get("/status?activity=true", headers=headers)).json()
    found: dict[str, Any] = status["activity"]
    return found


async def test_status_has_activity_only_if_asked(bus: Bus) -> None:
    async with edge_on(bus, limits=QUICK) as http:
        assert "activity" not in (await http.get("/status")).json()
        assert (await activity_of(http))["failures"] == []
        rejected = await http.get("/status?activity=perhaps")
    assert rejected.status_code == 400 and "activity" in rejected.json()["error"]["message"]


async def test_activity_is_for_admins_only(bus: Bus) -> None:
    keys = [
        ApiKey(name=name, sha256=sha256_of(name), admin=name == "boss") for name in ("a", "boss")
    ]
    async with edge_on(bus, ApiKeys(keys), limits=QUICK) as http:
        url = "/status?activity=true"
        assert "activity" not in (await http.get(url, headers={"X-API-Key": "a"})).json()
        assert await activity_of(http, **{"X-API-Key": "boss"})
        assert (await http.get(url)).status_code == 401


async def test_answers_and_failures_of_this_edge_are_shown(bus: Bus, nats_url: str) -> None:
    async with (
        edge_on(bus, limits=QUICK) as http,
        direct_worker(nats_url, "w1", HELLO) as worker,
        reporting(bus, REPORT),
    ):
        await until_ready(http)
        assert (await http.post("/chat", json={"prompt": "secret words"})).status_code == 200
        worker.script = (ACCEPTED, Failed("internal", "secret words"))
        failed = await http.post("/v1/completions", json={"prompt": "secret words"})
        assert failed.status_code == 500
        await http.get("/readyz", headers={"X-Request-Id": "probe"})
        await http.get("/messages", headers={"X-Request-Id": "no-history"})
        async with asyncio.timeout(30):
            while not any((found := await activity_of(http))["samples"]["ttft_p50"]):
                await asyncio.sleep(0.05)
    history, answer = found["failures"]
    assert history["code"] == "history_unavailable" and history["request_id"] == "no-history"
    assert (answer["code"], answer["model"], answer["tenant"]) == ("internal", "demo", "_")
    assert "secret" not in str(found)


async def until_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while not (await http.get("/status")).json()["model_loaded"]:
            await asyncio.sleep(0.01)


async def test_fleet_is_unknown_while_nats_is_away(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            watched = Watched(bus)
            watched.see(REPORT)
            server.stop(signal.SIGKILL)
            await until_disconnected(bus)
            samples = watched.see(after=1.0).samples
    assert samples.running == [0, None] and samples.slots == [8, None]
