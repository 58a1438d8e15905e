"""The workers on the bus, by the report that each sends once a second. Routes nothing."""

import time
from collections.abc import Callable

from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import Failed, ModelInfo, WorkerReport
from services.runtime.bus import Delivery

SILENCE_LIMIT = 3.0  # seconds without a report after which a worker is gone
RETRY_AFTER = 2.0  # seconds


class Workers:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[float, WorkerReport]] = {}

    def hear(self, delivery: Delivery) -> None:
        report = decode(delivery.data, WorkerReport)
        self._forget_the_silent()
        self._heard[report.worker_id] = (self._clock(), report)

    def reports(self) -> list[WorkerReport]:
        self._forget_the_silent()
        return [report for _, report in self._heard.values()]

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
            percent = f"{max(loading):.0%}"
            return ServiceError(
                "model_loading", f"The model is being loaded ({percent} so far).", RETRY_AFTER
            )
        if failed := [r.error for r in reports if r.state == "failed"]:
            return ServiceError("model_unavailable", failed[0] or "The model can't be used.")
        return ServiceError(
            "no_worker",
            "No inference worker is there to answer: start one, or wait for it to come back.",
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
