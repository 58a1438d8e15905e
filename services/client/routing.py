"""
Choose the worker for a request from the workers' reports, and offer the request to workers in turn.
"""

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ErrorCode, ServiceError
from services.contract.fleet import FleetReports, pack, unpack
from services.contract.messages import (
    Cancel,
    ChatRequest,
    Failed,
    ModelInfo,
    ModelKind,
    RequestAdmitted,
    WorkerReport,
)
from services.contract.model_names import is_name_of, names_of
from services.runtime import trace_context
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, NoResponders

MAX_LOAD_DIFFERENCE = 2
"""In-flight requests that a session's worker may have more than the least loaded worker."""
MAX_REPORT_AGE_SECONDS = 3.0
"""
A worker that reports once a second counts as lost after this time without a report. For others, it
is multiplied by their reports' `interval`.
"""
MAX_INTERVAL_SECONDS = 5.0
"""A longer `interval` of a report counts as this one, so that a forged report does not stay."""
REMOVED_SECONDS = 30.0
"""For so long, a hub may still reply with earlier reports of a worker that was lost."""
MIN_REPORT_GAP_SECONDS = 0.3
"""
Between two reports without a `number`, of a worker of an earlier version: times of receipt that
differ by less may be those of one report.
"""
PACKED_SECONDS = 0.2
"""For so long, a hub replies to all with the same compressed reports."""
RETRIABLE_ELSEWHERE: tuple[ErrorCode, ...] = ("overloaded", "shutting_down")
"""Errors of one worker that another worker may not return."""
KINDS: dict[ModelKind, tuple[str, str, str]] = {
    "chat": ("a chat model", "chat model", "POST /v1/chat/completions"),
    "embedding": ("an embedding model", "embedding model", "POST /v1/embeddings"),
    "rerank": ("a reranker", "reranker", "POST /v1/rerank"),
}
"""What a model of each kind is, its name without an article, and where it is used."""


# --- ranking: pure --------------------------------------------------------------------------------


def rank_workers(
    key: str,
    model: str | None,
    reports: Iterable[WorkerReport],
    digest: str | None = None,
    kind: ModelKind = "chat",
) -> list[str]:
    """
    Return the ids of the workers that can serve `model`, best first. With `digest`: only workers
    that have loaded exactly this model.

    Rendezvous hashing of `key` (the session) and the worker ids gives each session one worker, so
    that its prompts find their cached prefix there, and moves only the sessions of a worker that
    shuts down. A worker ranks lower while it has no free slot and another one has, or while it has
    over MAX_LOAD_DIFFERENCE more requests in flight than the least loaded one; full ones rank last.
    """
    able = workers_of_model(model, reports, digest, kind)
    least = min(map(in_flight, able), default=0)
    is_any_free = any(in_flight(report) < report.slots for report in able)

    def penalty(report: WorkerReport) -> tuple[bool, bool]:
        load = in_flight(report)
        must_wait = is_any_free and load >= report.slots
        is_full = load >= report.slots + report.queue
        return is_full, must_wait or load > least + MAX_LOAD_DIFFERENCE

    by_weight = sorted(able, key=lambda report: _weight(key, report.worker_id), reverse=True)
    return [report.worker_id for report in sorted(by_weight, key=penalty)]


def workers_of_model(
    model: str | None,
    reports: Iterable[WorkerReport],
    digest: str | None = None,
    kind: ModelKind = "chat",
) -> Sequence[WorkerReport]:
    """
    Return the ready workers of one model of a kind: the named one or, with None, the default. While
    a model is being replaced, its name stands for several files: the most common file wins.
    """
    reports = list(reports)
    name = default_model(reports, kind) if model is None else model
    able = defaultdict[str, list[WorkerReport]](list)  # by file
    for r in reports:
        if r.state == "ready" and r.kind == kind and (name is None or is_name_of(name, r.model)):
            able[r.model.digest if r.model else ""].append(r)
    chosen = digest or max(able, key=lambda each: (len(able[each]), each), default="")
    return able[chosen]


def default_model(reports: Sequence[WorkerReport], kind: ModelKind = "chat") -> str | None:
    """
    Return the model of requests that name none: the one that most workers have as MODEL_DEFAULT.
    None if no worker has such a setting, or if that model is of another kind: then it is the model
    of most workers.
    """
    names = Counter(report.default_model for report in reports if report.default_model)
    default = max(names, key=lambda each: (names[each], each), default=None)
    kinds = {report.kind for report in _reports_of(default or "", reports)} or {"chat"}
    return default if kind in kinds else None


def _reports_of(name: str, reports: Iterable[WorkerReport]) -> list[WorkerReport]:
    """Return the reports of workers that have the model, or load it."""
    return [r for r in reports if r.name and (name == r.name or name.startswith(f"{r.name}:"))]


def in_flight(report: WorkerReport) -> int:
    return report.running + report.waiting


def _weight(key: str, worker_id: str) -> bytes:
    return hashlib.blake2b(f"{worker_id} {key}".encode(), digest_size=8).digest()


# --- the workers on the bus -----------------------------------------------------------------------


class WorkerDirectory:
    """The live workers, by the reports that each of them sends every second or two."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._reports: dict[str, tuple[float, WorkerReport]] = {}  # with the time of receipt
        self._removed: dict[str, float] = {}  # the time, by worker
        self._offered: Counter[str] = Counter()
        self._packed, self._packed_at = b"", -math.inf
        self._expires_at = math.inf  # no report expires earlier

    def on_report(self, delivery: Delivery) -> None:
        report = decode(delivery.data, WorkerReport)
        self._remove_silent()
        self.add(report)

    def add(self, report: WorkerReport) -> None:
        self._keep(self._clock(), report)

    def remove(self, worker_id: str) -> None:
        """Forget a worker until its next report: one that a hub heard earlier does not count."""
        self._reports.pop(worker_id, None)
        self._removed[worker_id] = self._clock()

    def snapshot(self) -> FleetReports:
        """Return all reports, for a process that does not hear them."""
        now = self._clock()
        if now - self._packed_at >= PACKED_SECONDS:
            self._packed, self._packed_at = pack(self.received()), now
        return FleetReports(now, self._packed)

    def merge(self, snapshot: FleetReports) -> None:
        """Add the reports of a hub's snapshot that are newer. Raises ServiceError."""
        offset = self._clock() - snapshot.sent_at
        for heard in unpack(snapshot.reports):
            self._add_if_newer(heard.heard_at + offset, heard.report)
        self._remove_silent()

    def _add_if_newer(self, received_at: float, report: WorkerReport) -> None:
        """Keep the known one otherwise, whose load `on_admitted` may have updated."""
        if received_at <= self._removed.get(report.worker_id, -math.inf):
            return
        known_at, known = self._reports.get(report.worker_id, (-math.inf, None))
        if known and known.number and report.number:
            is_newer = report.number > known.number
        else:
            is_newer = received_at > known_at + MIN_REPORT_GAP_SECONDS
        if is_newer:
            self._keep(received_at, report)

    def _keep(self, received_at: float, report: WorkerReport) -> None:
        self._reports[report.worker_id] = (received_at, report)
        self._expires_at = min(self._expires_at, _expiry(received_at, report))

    @contextmanager
    def offering(self, worker_id: str) -> Iterator[None]:
        """Count a request as in flight at the worker before it is in the worker's report."""
        self._offered += Counter([worker_id])
        try:
            yield
        finally:
            self._offered -= Counter([worker_id])  # removes an entry that becomes zero

    def on_admitted(self, worker_id: str, admitted: RequestAdmitted) -> None:
        """Update the worker's load, which the acknowledgement knows better than its report."""
        if worker_id in self._reports:
            received_at, report = self._reports[worker_id]
            report = replace(report, running=admitted.running, waiting=admitted.waiting)
            self._reports[worker_id] = (received_at, report)

    def rank(
        self,
        key: str,
        model: str | None,
        digest: str | None = None,
        kind: ModelKind = "chat",
    ) -> list[str]:
        """Return worker ids, best first (see rank_workers)."""
        return rank_workers(key, model, map(self._with_offered, self.reports()), digest, kind)

    def _with_offered(self, report: WorkerReport) -> WorkerReport:
        offered = self._offered[report.worker_id]
        return replace(report, waiting=report.waiting + offered) if offered else report

    def model_names(self) -> list[str]:
        """Return the names of all models and adapters that a request can select."""
        ready = {r.model for r in self.reports() if r.state == "ready"}
        return sorted({name for model in ready for name in names_of(model)})

    def reports(self) -> list[WorkerReport]:
        return [report for _, report in self.received()]

    def received(self) -> list[tuple[float, WorkerReport]]:
        """Return the reports, each with the time in seconds at which it arrived."""
        self._remove_silent()
        return list(self._reports.values())

    def find_model(self, name: str | None) -> ModelInfo | None:
        """Return the model that serves chat requests for `name`."""
        return next((r.model for r in workers_of_model(name, self.reports())), None)

    def only_model(self, name: str, kind: ModelKind = "chat") -> str | None:
        """
        Return None, which is the default model, for an unknown name if there is only one model of
        the kind; else the name. An unknown adapter of the model stays unknown.
        """
        reports = self.reports()
        names = {report.name for report in reports if report.name and report.kind == kind}
        return None if len(names) == 1 and not _reports_of(name, reports) else name

    def is_loading(self, name: str | None) -> bool:
        """Return whether a worker loads the chat model. None: the default, which may be any."""
        reports = self.reports() if name is None else _reports_of(name, self.reports())
        return any(report.state == "loading" and report.kind == "chat" for report in reports)

    def find_report(self, name: str) -> WorkerReport | None:
        """Return the report of a ready worker of the model, whatever its kind is."""
        reports = self.reports()
        kinds = (workers_of_model(name, reports, kind=kind) for kind in KINDS)
        return next((report for found in kinds for report in found), None)

    @property
    def model(self) -> ModelInfo | None:
        """The model of a ready worker, if possible of the default chat model."""
        ready = (r.model for r in self.reports() if r.state == "ready")
        return self.find_model(None) or next(ready, None)

    @property
    def ready(self) -> bool:
        """Whether a worker is ready: for chats, unless all workers have models of other kinds."""
        reports = self.reports()
        chats = [report for report in reports if report.kind == "chat"]
        return any(report.state == "ready" for report in chats or reports)

    @property
    def is_complete(self) -> bool:
        """Whether every worker has had the time to report."""
        return self._clock() - self._since > MAX_REPORT_AGE_SECONDS

    def check_kind(self, model: str | None, kind: ModelKind = "chat") -> None:
        """Raise ServiceError(invalid_request) if workers have the model, but of another kind."""
        named = _reports_of(model or "", self.reports())
        if named and all(report.kind != kind for report in named):
            is_what, _, use = KINDS[named[0].kind]
            raise ServiceError(
                "invalid_request",
                f"The field `model` names {model!r}, which is {is_what}: use it with {use}, or"
                f" {self._advice(kind)}.",
            )

    def unavailable_error(self, model: str | None = None, kind: ModelKind = "chat") -> ServiceError:
        """
        Return the reason why no worker serves `model` (None: the default), as far as the reports
        show: model_not_found if workers serve other models only, invalid_request if the model is
        of another kind.
        """
        try:
            self.check_kind(model, kind)
        except ServiceError as error:
            return error
        reports = self.reports()
        of_kind = [report for report in reports if report.kind == kind]
        name = default_model(reports, kind) if model is None else model
        if name is None:
            if kind != "chat" and not of_kind and self.ready:
                message = f"There is no {KINDS[kind][1]} here: {self._advice(kind)}."
                return ServiceError("invalid_request", message)
            return _unavailable(of_kind)
        of_model = _reports_of(name, reports)
        is_served = model in self.model_names()  # by workers that don't reply
        is_other = not of_model or any(report.state == "ready" for report in of_model)
        if model and self.ready and is_other and not is_served:
            return ServiceError(
                "model_not_found",
                f"There is no model {model!r}; available: {', '.join(self.model_names())}.",
            )
        return _unavailable(of_model or of_kind)

    def _advice(self, kind: ModelKind) -> str:
        """Return how to get a model of this kind."""
        models = (r.model for r in self.reports() if r.kind == kind and r.state == "ready")
        if names := sorted({model.name for model in models if model}):
            return f"name {KINDS[kind][0]}; available: {', '.join(names)}"
        return f"add the path of a GGUF file that is {KINDS[kind][0]} to MODEL_PATH"

    def to_error(self, failed: Failed) -> ServiceError:
        """Convert a Failed event; replace `no_worker` by the reason in the reports."""
        if failed.code == "no_worker":
            return self.unavailable_error()
        return ServiceError(failed.code, failed.message, failed.retry_after)

    def _remove_silent(self) -> None:
        now = self._clock()
        if now < self._expires_at:
            return
        self._reports = {k: heard for k, heard in self._reports.items() if now < _expiry(*heard)}
        self._expires_at = min((_expiry(*h) for h in self._reports.values()), default=math.inf)
        oldest = now - REMOVED_SECONDS
        self._removed = {k: at for k, at in self._removed.items() if at > oldest}


def _expiry(received_at: float, report: WorkerReport) -> float:
    """Return the time from which a report without a later one no longer counts."""
    return received_at + MAX_REPORT_AGE_SECONDS * min(report.interval, MAX_INTERVAL_SECONDS)


def _unavailable(reports: Sequence[WorkerReport]) -> ServiceError:
    """Return the reason why none of the workers takes requests."""
    names = {r.name for r in reports if r.name}
    the_model = f"The model {names.pop()!r}" if len(names) == 1 else "The model"
    if loading := [r.progress for r in reports if r.state == "loading"]:
        share = max(loading)
        how = "loaded and warming up" if share >= 1 else f"loading ({share:.0%} so far)"
        return ServiceError("model_loading", f"{the_model} is {how}.")
    if failed := [r.error for r in reports if r.state == "failed"]:
        return ServiceError("model_unavailable", failed[0] or f"{the_model} can't be used.")
    return ServiceError(
        "no_worker",
        "No inference worker answers: it may still be starting, or have failed. Its log says why."
        " GET /status lists the workers.",
    )


# --- offering a request ---------------------------------------------------------------------------


class WorkerUnresponsive(Exception):
    """The worker has disconnected, or did not reply to an offer in time."""


async def offer(
    bus: Bus,
    workers: WorkerDirectory,
    worker_id: str,
    tenant: str,
    request: ChatRequest,
    reply: str,
    timeout: float,
) -> None:
    """
    Ask one worker to admit the request and send its events to `reply`. Raises the worker's
    ServiceError if it rejects the request, or WorkerUnresponsive after `timeout` seconds; a worker
    that resumes later then drops the request.
    """
    assert request.request_id is not None
    subject = subjects.worker_request(worker_id, tenant)
    with workers.offering(worker_id):
        try:
            admitted = await bus.request(
                subject, request, RequestAdmitted, timeout, {subjects.REPLY_HEADER: reply}
            )
        except NoResponders as error:
            workers.remove(worker_id)
            raise WorkerUnresponsive from error
        except TimeoutError as error:
            cancel = subjects.cancel(tenant, request.request_id)
            await bus.publish(cancel, Cancel(worker_id, reply), headers=trace_context.headers())
            raise WorkerUnresponsive from error
    workers.on_admitted(worker_id, admitted)


async def offer_in_turn(
    ranked: Iterable[str], offer_to: Callable[[str], Awaitable[None]]
) -> str | None:
    """
    Return the id of the first worker that admits the request, or None if none responds. Raises
    ServiceError: an error that every worker would return, or, if all workers rejected the request,
    the rejection with the shortest wait.
    """
    rejections = []
    for worker_id in ranked:
        try:
            await offer_to(worker_id)
            return worker_id
        except WorkerUnresponsive:
            continue
        except ServiceError as error:
            if error.code not in RETRIABLE_ELSEWHERE:
                raise
            rejections.append(error)
    if rejections:
        raise min(rejections, key=lambda error: error.retry_after or 0)
    return None
