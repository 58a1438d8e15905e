"""
Metrics in Prometheus' text format that more than one service has: the state of a process, of the
workers, and of history. docs/operations.md lists them.
"""

import logging
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.contract.history import HistoryStatus
from services.contract.messages import WorkerReport
from services.contract.version import VERSION
from services.runtime.bus import Bus
from services.runtime.settings import InvalidSetting

WORKER_STATES = ("loading", "ready", "draining", "failed")

logging.getLogger("wsgiref").setLevel(logging.WARNING)


@contextmanager
def serving_metrics(
    bus: Bus, host: str, port: int | None, setting: str, state: Callable[[], Iterable[Metric]]
) -> Iterator[None]:
    """
    Serve `GET /metrics` of this process during the body: what it uses, its connection to NATS, and
    `state`. A thread of its own answers. Without a `port` nothing is served. Raises InvalidSetting,
    which names the `setting`, if the port can't be used.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(StateCollector(lambda: chain(process_families(bus), state())))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise InvalidSetting(
            f"{setting}={port} on {host} can't be used: {error.strerror}. Each process needs a port"
            " of its own."
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class StateCollector(Collector):
    """Asks for the state at each scrape."""

    def __init__(self, state: Callable[[], Iterable[Metric]]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        return self._state()


def process_families(bus: Bus) -> Iterator[Metric]:
    info = GaugeMetricFamily("finetunellm_build_info", "Version.", labels=("version",))
    info.add_metric((VERSION,), 1)
    yield info
    yield GaugeMetricFamily("finetunellm_nats_connected", "1: connected.", int(bus.connected))
    about = "NATS messages to this process that could not be parsed."
    yield CounterMetricFamily("finetunellm_dropped_frames", about, bus.dropped_frames)


class WorkerGauge(NamedTuple):
    """A sum over the workers of a model."""

    name: str
    about: str
    value: Callable[[WorkerReport], float]


WORKER_GAUGES = (
    WorkerGauge("vllm:num_requests_running", "Requests with a slot.", lambda r: r.running),
    WorkerGauge("vllm:num_requests_waiting", "Requests without a slot yet.", lambda r: r.waiting),
    WorkerGauge("llamacpp:requests_processing", "Requests with a slot.", lambda r: r.running),
    WorkerGauge("llamacpp:requests_deferred", "Requests without a slot yet.", lambda r: r.waiting),
    WorkerGauge("finetunellm_slots", "Requests that can have a slot.", lambda r: r.slots),
    WorkerGauge("finetunellm_queue_limit", "Requests that may wait.", lambda r: r.queue),
    WorkerGauge(
        "finetunellm_queued_tokens",
        "Estimate of the tokens to compute for waiting requests.",
        lambda r: r.queued_tokens,
    ),
    WorkerGauge(
        "finetunellm_tokens_per_second",
        "Recent rate of prefill and decode.",
        lambda r: r.tokens_per_second,
    ),
)


def worker_families(reports: Sequence[WorkerReport]) -> Iterator[Metric]:
    names = sorted({report.name for report in reports})
    for gauge in WORKER_GAUGES:
        family = GaugeMetricFamily(gauge.name, gauge.about, labels=("model_name",))
        for name in names:
            family.add_metric((name,), sum(gauge.value(r) for r in reports if r.name == name))
        yield family
    about = "Estimate of the seconds that one worker needs for all waiting requests."
    family = GaugeMetricFamily("finetunellm_queued_seconds", about, labels=("model_name",))
    for name in names:
        family.add_metric((name,), queued_seconds([r for r in reports if r.name == name]))
    yield family
    states: Tally[tuple[str, str]] = Tally((report.name, report.state) for report in reports)
    family = GaugeMetricFamily("finetunellm_workers", "Workers.", labels=("model_name", "state"))
    for name in names:
        for state in WORKER_STATES:
            family.add_metric((name, state), states[name, state])
    yield family


def queued_seconds(reports: Sequence[WorkerReport]) -> float:
    """
    Return the seconds that one worker of a model needs for the requests that wait at all of them.

    Divided by the number of workers, these are the seconds until the queue is worked off. A worker
    that has computed nothing yet is as fast as the others on average; if none has, the queue is 0.
    """
    rates = [report.tokens_per_second for report in reports if report.tokens_per_second]
    if not rates:
        return 0.0
    mean = sum(rates) / len(rates)
    return sum(report.queued_tokens / (report.tokens_per_second or mean) for report in reports)


def history_families(status: HistoryStatus | None) -> Iterator[Metric]:
    """Yield history's figures. Those that it does not know have no value."""
    known: dict[str, Any] = {}
    if status:
        known = {
            "database_connected": status.database_connected,
            "history_refuses": status.refuses is not None,
            "log_records": status.log_records,
            "log_bytes": status.log_bytes,
            "log_limit_bytes": status.log_limit,
            "unarchived_records": status.unarchived,
            "unreadable_records": status.unreadable,
        }
    known["history_up"] = status is not None
    for name, about in HISTORY_GAUGES.items():
        family = GaugeMetricFamily(f"finetunellm_{name}", about)
        if known.get(name) is not None:
            family.add_metric((), float(known[name]))
        yield family


def history_process_families(status: HistoryStatus) -> Iterator[Metric]:
    """Yield what a history process counts for itself alone."""
    about = "Requests that wait for their tenant's turn."
    yield GaugeMetricFamily("finetunellm_history_waiting", about, status.waiting)
    about = "Requests that were rejected because their tenant's turn did not come in time."
    yield CounterMetricFamily("finetunellm_history_overloaded", about, status.overloaded)
    about = "Records that were dropped to make room, without MongoDB."
    yield CounterMetricFamily("finetunellm_history_dropped_records", about, status.dropped)


HISTORY_GAUGES = {
    "history_up": "1: a history process replies.",
    "history_refuses": "1: history rejects chats of sessions.",
    "database_connected": "1: history is connected to MongoDB.",
    "log_records": "Records in the log.",
    "log_bytes": "Size of the log.",
    "log_limit_bytes": "Maximum size of the log; no value: no limit.",
    "unarchived_records": "Records that MongoDB has not acknowledged.",
    "unreadable_records": "Records of the log that could not be decoded.",
}
