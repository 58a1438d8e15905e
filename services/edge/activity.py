"""
What happened in the last ten minutes, for the state of the server on the page: samples of the fleet
and of the time to the first token, and recent failures. It is bounded, and ends with this edge;
Prometheus is for more.
"""

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from secrets import token_hex
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from services.client.routing import WorkerDirectory
from services.contract.errors import ErrorCode
from services.contract.messages import WorkerReport
from services.edge.errors import TABLE
from services.edge.limits import EdgeLimits
from services.edge.rate_limits import steady_clock
from services.runtime import logs
from services.runtime.bus import Bus
from services.runtime.supervised import Fail, SupervisedLoop

SERVER_ERROR = 500
"""The least status of an error that is no fault of the client."""

# --- what /status shows ---------------------------------------------------------------------------


class Samples(Struct, frozen=True):
    """
    Columns of equal length, oldest first; `at` is Unix time in seconds. The fleet's figures are
    null while NATS is disconnected. `ttft_p50` and `ttft_p95` are percentiles in seconds over the
    minute before, null without an answer in it.
    """

    at: Sequence[float]
    running: Sequence[int | None]
    waiting: Sequence[int | None]
    slots: Sequence[int | None]  # of workers that are ready
    prefilled_per_second: Sequence[float | None]  # tokens
    generated_per_second: Sequence[float | None]  # tokens
    ttft_p50: Sequence[float | None]
    ttft_p95: Sequence[float | None]


class Failure(Struct, frozen=True):
    """
    An answer or a request that failed, or `count` of them in a row; `at` and `request_id` are those
    of the last one. `model` is null if no answer had begun.
    """

    at: datetime
    code: ErrorCode
    model: str | None
    tenant: str | None
    request_id: str
    count: int = 1


class Activity(Struct, frozen=True):
    """
    The last ten minutes. The fleet's figures are the same at each edge; time to the first token and
    failures, newest first, are those of the edge that replies. `now` is its Unix time.
    """

    edge_id: str
    now: float
    samples: Samples
    failures: list[Failure]


# --- how it is measured ---------------------------------------------------------------------------


class Fleet(NamedTuple):
    """One sample of the workers' reports."""

    running: int | None = None
    waiting: int | None = None
    slots: int | None = None
    prefilled_per_second: float | None = None
    generated_per_second: float | None = None


class Sample(NamedTuple):
    """One value of each column of Samples, in this order."""

    at: float
    running: int | None
    waiting: int | None
    slots: int | None
    prefilled_per_second: float | None
    generated_per_second: float | None
    ttft_p50: float | None
    ttft_p95: float | None


class WorkerRate(NamedTuple):
    """Tokens per second of a worker between two of its reports, of which this is the second."""

    received_at: float
    report: WorkerReport
    prefilled: float = 0.0
    generated: float = 0.0

    def after(self, received_at: float, report: WorkerReport) -> "WorkerRate":
        """Return the rate with the next report; without a new one it stays as it is."""
        seconds = received_at - self.received_at
        if seconds <= 0:
            return self
        prefilled = report.prefilled_tokens - self.report.prefilled_tokens
        generated = report.generated_tokens - self.report.generated_tokens
        if min(prefilled, generated) < 0:  # of the next process, under the same id
            return WorkerRate(received_at, report)
        return WorkerRate(received_at, report, prefilled / seconds, generated / seconds)


class ActivityMonitor:
    """Watches the workers' reports, and what the metrics of this edge count."""

    def __init__(
        self,
        bus: Bus,
        workers: WorkerDirectory,
        limits: EdgeLimits,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`clock` returns Unix time in seconds that never goes back."""
        self._bus = bus
        self._workers = workers
        self._limits = limits
        self._clock = clock or steady_clock()
        self._edge_id = token_hex(4)
        self._rates: dict[str, WorkerRate] = {}
        self._samples: deque[Sample] = deque(maxlen=limits.max_samples)
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=limits.max_ttfts)  # time, seconds
        self._failures: deque[Failure] = deque(maxlen=limits.max_failures)
        # HTTP requests whose failed answer is known already
        self._known: deque[str] = deque(maxlen=limits.max_failures)

    @asynccontextmanager
    async def sampling(self, fail: Fail) -> AsyncIterator[None]:
        """Take samples during the body. `fail` ends the process."""
        loop = SupervisedLoop("activity", self._step, fail)
        async with loop.running(is_cancelled=True):
            yield

    def on_first_token(self, seconds: float) -> None:
        """Count the time from a request to its first token."""
        self._ttfts.append((self._clock(), seconds))

    def on_failed_answer(self, code: ErrorCode, model: str, tenant: str, request_id: str) -> None:
        self._known.append(logs.request_id.get())
        self._add_failure(code, model, tenant, request_id)

    def on_failed_request(self, code: ErrorCode, tenant: str | None, request_id: str) -> None:
        """Count an HTTP request that failed, unless that is because its answer did."""
        if request_id not in self._known:
            self._add_failure(code, None, tenant, request_id)

    def activity(self) -> Activity:
        columns = zip(*self._samples, strict=True) if self._samples else [()] * len(Sample._fields)
        samples = Samples(*map(list, columns))
        now = round(self._clock(), 3)
        return Activity(self._edge_id, now, samples, list(reversed(self._failures)))

    def sample(self) -> None:
        """Take a sample now."""
        fleet = self._fleet() if self._bus.connected else Fleet()
        self._samples.append(Sample(round(self._clock(), 1), *fleet, *self._ttft_percentiles()))

    async def _step(self) -> float:
        self.sample()
        return self._limits.sample_seconds

    def _fleet(self) -> Fleet:
        received = self._workers.received()
        self._rates = {
            report.worker_id: self._rate(received_at, report) for received_at, report in received
        }
        reports = [report for _, report in received]
        return Fleet(
            sum(report.running for report in reports),
            sum(report.waiting for report in reports),
            sum(report.slots for report in reports if report.state == "ready"),
            round(sum(rate.prefilled for rate in self._rates.values()), 1),
            round(sum(rate.generated for rate in self._rates.values()), 1),
        )

    def _rate(self, received_at: float, report: WorkerReport) -> WorkerRate:
        known = self._rates.get(report.worker_id)
        return known.after(received_at, report) if known else WorkerRate(received_at, report)

    def _ttft_percentiles(self) -> tuple[float | None, float | None]:
        since = self._clock() - self._limits.ttft_seconds
        while self._ttfts and self._ttfts[0][0] < since:
            self._ttfts.popleft()
        ordered = sorted(seconds for _, seconds in self._ttfts)
        return percentile(ordered, 0.5), percentile(ordered, 0.95)

    def _add_failure(
        self, code: ErrorCode, model: str | None, tenant: str | None, request_id: str
    ) -> None:
        """Add a failure of the service, to the last one if only time and request differ."""
        if TABLE[code].status < SERVER_ERROR:
            return
        new = Failure(datetime.fromtimestamp(self._clock(), UTC), code, model, tenant, request_id)
        last = self._failures[-1] if self._failures else None
        if last and (last.code, last.model, last.tenant) == (code, model, tenant):
            self._failures.pop()
            new = replace(new, count=last.count + 1)
        self._failures.append(new)


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Return the nearest-rank percentile of sorted values; None if there are none."""
    return round(ordered[math.ceil(share * len(ordered)) - 1], 4) if ordered else None
