import asyncio

import msgspec

from services.contract import subjects
from services.contract.codec import encode
from services.contract.messages import Failed, ModelInfo, WorkerReport
from services.edge.workers import Workers
from services.runtime.bus import Bus, Delivery
from tests.edge.conftest import edge_on

MODEL = ModelInfo("demo", "d1", 2048, 1000)
READY = WorkerReport("w1", "ready", slots=8, running=0, waiting=0, model=MODEL)
LOADING = WorkerReport("w2", "loading", slots=8, running=0, waiting=0, progress=0.42)
FAILED = WorkerReport("w3", "failed", slots=0, running=0, waiting=0, error="No model is there.")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def hear(workers: Workers, *reports: WorkerReport) -> None:
    for report in reports:
        workers.hear(Delivery(subjects.report(report.worker_id), encode(report), ""))


def test_a_ready_worker_has_its_model_loaded() -> None:
    workers = Workers()
    hear(workers, LOADING, READY)
    assert workers.ready and workers.model == MODEL
    assert workers.reports() == [LOADING, READY]


def test_a_worker_that_loads_or_drains_or_failed_is_not_ready() -> None:
    workers = Workers()
    hear(workers, LOADING, FAILED, msgspec.structs.replace(READY, state="draining"))
    assert not workers.ready and workers.model is None


def test_a_worker_that_was_silent_for_3_seconds_is_gone() -> None:
    clock = Clock()
    workers = Workers(clock)
    hear(workers, READY)
    clock.now += 2.9
    assert workers.ready
    clock.now += 0.2
    assert not workers.ready and workers.reports() == []


def test_the_last_report_of_a_worker_counts() -> None:
    workers = Workers()
    hear(workers, READY, msgspec.structs.replace(READY, running=3))
    assert [report.running for report in workers.reports()] == [3]


def test_why_nobody_answers_is_told_as_far_as_the_reports_know() -> None:
    workers = Workers()
    assert workers.absence().code == "no_worker"
    hear(workers, FAILED)
    assert workers.absence().code == "model_unavailable"
    assert workers.absence().message == "No model is there."
    hear(workers, LOADING)
    assert workers.absence().code == "model_loading"
    assert "42%" in workers.absence().message


def test_only_a_missing_worker_is_explained_by_the_reports() -> None:
    workers = Workers()
    hear(workers, LOADING)
    assert workers.refusal(Failed("no_worker", "nobody")).code == "model_loading"
    overloaded = workers.refusal(Failed("overloaded", "full", 2.5))
    assert (overloaded.code, overloaded.message, overloaded.retry_after) == (
        "overloaded",
        "full",
        2.5,
    )


async def test_reports_on_the_bus_decide_whether_the_edge_is_ready(bus: Bus) -> None:
    async with edge_on(bus) as http:
        assert (await http.get("/readyz")).json()["error"]["code"] == "no_worker"
        refused = await http.post("/chat", json={"prompt": "hi"})
        assert refused.json()["error"]["code"] == "no_worker"

        await bus.publish(subjects.report("w2"), LOADING)
        await asyncio.sleep(0.05)
        refused = await http.post("/chat", json={"prompt": "hi"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "model_loading"
        assert (await http.get("/readyz")).status_code == 503

        await bus.publish(subjects.report("w1"), READY)
        await asyncio.sleep(0.05)
        assert (await http.get("/readyz")).status_code == 200
        assert (await http.get("/")).json() == {"status": "online", "model_loaded": True}
        status = (await http.get("/status")).json()
        assert status["model"]["name"] == "demo"
        assert [worker["worker_id"] for worker in status["workers"]] == ["w2", "w1"]
