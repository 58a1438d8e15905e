"""Which worker a request goes to. Pure: reports in, an order of worker ids out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from services.contract.messages import ModelInfo, WorkerReport

MOST_AHEAD = 2  # requests in flight that a session's worker may have more than the least loaded


def order(
    key: str, model: str | None, reports: Iterable[WorkerReport], digest: str | None = None
) -> list[str]:
    """
    Who is to answer a session's request, then who is asked next if it refuses. With `digest`, only
    workers of this very model.

    A session's worker is named by rendezvous hashing, so that its prompts find what was computed
    for them, and only the sessions of a worker that leaves move. It comes after others while it has
    no free slot and another has, or too many requests more than another.
    """
    able = having(model, reports, digest)
    least = min(map(in_flight, able), default=0)
    is_any_free = any(in_flight(report) < report.slots for report in able)

    def misfit(report: WorkerReport) -> tuple[bool, bool]:
        waits = is_any_free and in_flight(report) >= report.slots
        is_full = in_flight(report) >= report.slots + report.queue
        return is_full, waits or in_flight(report) > least + MOST_AHEAD

    by_weight = sorted(able, key=lambda report: _weight(key, report.worker_id), reverse=True)
    return [report.worker_id for report in sorted(by_weight, key=misfit)]


def having(
    model: str | None, reports: Iterable[WorkerReport], digest: str | None
) -> Sequence[WorkerReport]:
    """
    The ready workers of one model: the named one, or, with None, that of most workers. Where a name
    stands for several files, as while models are being changed, it is the file of most of them.
    """
    able = [r for r in reports if r.state == "ready" and (model is None or model in names(r.model))]
    digests = Counter(_digest(report) for report in able)
    chosen = digest or max(digests, key=lambda each: (digests[each], each), default="")
    return [report for report in able if _digest(report) == chosen]


def names(model: ModelInfo | None) -> tuple[str, ...]:
    """What a request may call it: the model as it is, and with each of its adapters."""
    if model is None:
        return ()
    return (model.name, *(f"{model.name}:{adapter}" for adapter in model.adapters))


def in_flight(report: WorkerReport) -> int:
    return report.running + report.waiting


def _digest(report: WorkerReport) -> str:
    return report.model.digest if report.model else ""


def _weight(key: str, worker_id: str) -> bytes:
    return hashlib.blake2b(f"{worker_id} {key}".encode(), digest_size=8).digest()
