"""How the reports of workers reach those who do not hear all of them: from a hub, on request."""

import zlib
from collections.abc import Iterable

from msgspec import Struct

from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.messages import WorkerId, WorkerReport

MAX_UNPACKED_BYTES = 64 * 2**20  # reports of some 100,000 workers
FAST = 1  # level of zlib: reports resemble each other, so they become 20 times smaller


class HubAnnouncement(Struct, frozen=True):
    """
    A worker hears all reports. `since` is the Unix time, in milliseconds, since when it does,
    `workers` the number of workers from which it has one. `is_complete`: every worker has had the
    time to report to it. `is_stopping`: it hears them no longer, or not for much longer.
    """

    worker_id: WorkerId
    since: int
    workers: int = 0
    is_complete: bool = False
    is_stopping: bool = False


class HeardReport(Struct, frozen=True):
    """A report, with the time in seconds at which the hub received it, by the hub's clock."""

    heard_at: float
    report: WorkerReport


class HeardReports(Struct, frozen=True):
    reports: tuple[HeardReport, ...]


class FleetReports(Struct, frozen=True):
    """
    What a hub has heard: `reports` is the JSON of HeardReports, compressed by zlib. `sent_at` is
    the time of this reply, by the hub's clock.
    """

    sent_at: float
    reports: bytes


def pack(received: Iterable[tuple[float, WorkerReport]]) -> bytes:
    """Return `reports` of FleetReports."""
    heard = HeardReports(tuple(HeardReport(at, report) for at, report in received))
    return zlib.compress(encode(heard), FAST)


def unpack(reports: bytes) -> tuple[HeardReport, ...]:
    """Return the content of such a field. Raises ServiceError(invalid_request)."""
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(reports, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise ServiceError("invalid_request", f"Invalid reports of a hub: {error}.") from error
    if not unpacking.eof:
        raise ServiceError("invalid_request", "Invalid reports of a hub: too long or cut off.")
    return decode(data, HeardReports).reports
