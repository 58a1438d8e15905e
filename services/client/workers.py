"""The workers on the bus, by the report that each sends once a second. Asks none."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec.structs import replace

from services.client import routing
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import Failed, ModelInfo, RequestAdmitted, WorkerReport
from services.runtime.deliveries import Delivery

SILENCE_LIMIT = 3.0  # seconds without a report after which a worker is gone
RETRY_AFTER = 2.0  # seconds


class WorkerDirectory:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[float, WorkerReport]] = {}
        self._asked: Counter[str] = Counter()

    def on_report(self, delivery: Delivery) -> None:
        report = decode(delivery.data, WorkerReport)
        self._forget_the_silent()
        self._heard[report.worker_id] = (self._clock(), report)

    def forget(self, worker_id: str) -> None:
        """Nobody is there under this id any more."""
        self._heard.pop(worker_id, None)

    @contextmanager
    def asked(self, worker_id: str) -> Iterator[None]:
        """The worker is asked to take a request, which no report counts yet."""
        self._asked[worker_id] += 1
        try:
            yield
        finally:
            self._asked[worker_id] -= 1
            if not self._asked[worker_id]:
                del self._asked[worker_id]

    def taken(self, worker_id: str, taken: RequestAdmitted) -> None:
        """What the worker acknowledged is newer than its report."""
        if heard := self._heard.get(worker_id):
            report = replace(heard[1], running=taken.running, waiting=taken.waiting)
            self._heard[worker_id] = (heard[0], report)

    def order(self, key: str, model: str | None, digest: str | None = None) -> list[str]:
        """Who is asked to answer a session's request, one after another; see routing.py."""
        reports = (
            replace(report, waiting=report.waiting + self._asked[report.worker_id])
            for report in self.reports()
        )
        return routing.order(key, model, reports, digest)

    def names(self) -> list[str]:
        """Of all models and adapters that a request can name."""
        ready = (r.model for r in self.reports() if r.state == "ready")
        return sorted({name for model in ready for name in routing.names(model)})

    def reports(self) -> list[WorkerReport]:
        self._forget_the_silent()
        return [report for _, report in self._heard.values()]

    def model_named(self, name: str | None) -> ModelInfo | None:
        """The one that would answer to this name."""
        return next((r.model for r in routing.having(name, self.reports(), None)), None)

    @property
    def model(self) -> ModelInfo | None:
        """The model that is ready to answer, if any is."""
        return next((r.model for r in self.reports() if r.state == "ready"), None)

    @property
    def ready(self) -> bool:
        return any(report.state == "ready" for report in self.reports())

    def absence(self) -> ServiceError:
        """Why nobody takes requests, as far as the reports tell."""
        reports = self.reports()
        if loading := [r.progress for r in reports if r.state == "loading"]:
            share = max(loading)
            how = "loaded and warming up" if share >= 1 else f"being loaded ({share:.0%} so far)"
            return ServiceError("model_loading", f"The model is {how}.", RETRY_AFTER)
        if failed := [r.error for r in reports if r.state == "failed"]:
            return ServiceError("model_unavailable", failed[0] or "The model can't be used.")
        return ServiceError(
            "no_worker",
            "No inference worker answers: it may still be starting, or have failed. See the output"
            " of `just up` or its log; GET /status lists the workers.",
            RETRY_AFTER,
        )

    def refusal(self, failed: Failed) -> ServiceError:
        """The error of a request that failed, with the reason for it where reports tell one."""
        if failed.code == "no_worker":
            return self.absence()
        return ServiceError(failed.code, failed.message, failed.retry_after)

    def _forget_the_silent(self) -> None:
        now = self._clock()
        self._heard = {k: v for k, v in self._heard.items() if now - v[0] < SILENCE_LIMIT}
