import msgspec

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import encode
from services.contract.messages import Failed, ModelInfo, WorkerReport
from services.runtime.deliveries import Delivery

MODEL = ModelInfo("demo", "d1", 2048, 1000)
READY = WorkerReport("w1", "ready", slots=8, running=0, waiting=0, model=MODEL)
LOADING = WorkerReport("w2", "loading", slots=8, running=0, waiting=0, progress=0.42)
FAILED = WorkerReport("w3", "failed", slots=0, running=0, waiting=0, error="No model is there.")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def hear(workers: WorkerDirectory, *reports: WorkerReport) -> None:
    for report in reports:
        workers.on_report(Delivery(subjects.report(report.worker_id), encode(report), ""))


def test_a_ready_worker_has_its_model_loaded() -> None:
    workers = WorkerDirectory()
    hear(workers, LOADING, READY)
    assert workers.ready and workers.model == MODEL
    assert workers.reports() == [LOADING, READY]


def test_a_worker_that_loads_or_drains_or_failed_is_not_ready() -> None:
    workers = WorkerDirectory()
    hear(workers, LOADING, FAILED, msgspec.structs.replace(READY, state="draining"))
    assert not workers.ready and workers.model is None


def test_a_worker_that_was_silent_for_3_seconds_is_gone() -> None:
    clock = Clock()
    workers = WorkerDirectory(clock)
    hear(workers, READY)
    clock.now += 2.9
    assert workers.ready
    clock.now += 0.2
    assert not workers.ready and workers.reports() == []


def test_the_last_report_of_a_worker_counts() -> None:
    workers = WorkerDirectory()
    hear(workers, READY, msgspec.structs.replace(READY, running=3))
    assert [report.running for report in workers.reports()] == [3]


def test_why_nobody_answers_is_told_as_far_as_the_reports_know() -> None:
    workers = WorkerDirectory()
    assert workers.unavailable_error().code == "no_worker"
    hear(workers, FAILED)
    assert workers.unavailable_error().code == "model_unavailable"
    assert workers.unavailable_error().message == "No model is there."
    hear(workers, LOADING)
    assert workers.unavailable_error().code == "model_loading"
    assert "42%" in workers.unavailable_error().message


def test_only_a_missing_worker_is_explained_by_the_reports() -> None:
    workers = WorkerDirectory()
    hear(workers, LOADING)
    assert workers.to_error(Failed("no_worker", "nobody")).code == "model_loading"
    overloaded = workers.to_error(Failed("overloaded", "full", 2.5))
    assert (overloaded.code, overloaded.message, overloaded.retry_after) == (
        "overloaded",
        "full",
        2.5,
    )
