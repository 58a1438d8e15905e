"""Limits and timeouts of the history service. Fixed in production; tests pass in shorter ones."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HistoryLimits:
    """Times are in seconds, batches in records, and shares relative to the log's size."""

    max_payload_bytes: int = 2**20  # of one NATS message: `max_payload` of the server

    # Size of a new log; `nats stream edit HISTORY --max-bytes` changes it. It holds about 500,000
    # exchanges: months of backlog while MongoDB is down.
    max_log_bytes: int = 1024**3
    trim_above: float = 0.5  # share above which archived records are deleted
    warn_above: float = 0.8
    reject_above: float = 0.95  # the rest is for answers that are being generated
    trim_batch: int = 500
    trim_interval_seconds: float = 0.2

    # Each try fails if another process changes the same session in the same moment.
    max_tries: int = 10
    retry_seconds: float = 1.0  # pause after a failure of NATS or MongoDB
    max_erase_seconds: float = 0.4  # until an erasure's reply; the rest is deleted in background

    # Consumers. A batch that was not full is followed by a pause, so that the next one is worth
    # its cost. The batch of a dead process is redelivered after the time for acknowledgement,
    # which is longer than MongoDB may take to write one.
    fetch_seconds: float = 0.5  # to wait for a first record, and then for the rest of the batch
    batch_pause_seconds: float = 0.1
    ack_wait_seconds: float = 6.0
    max_ack_pending: int = 5000  # ten processes with a batch each
    archive_batch: int = 500
    snapshot_batch: int = 100
    snapshot_parallel: int = 4
    index_batch: int = 200
    index_parallel: int = 20
    max_index_lag: int = 500  # records that a lookup searches itself; beyond, it is unavailable
    max_unsaved: int = 1000  # records that a list of sessions waits for; beyond, it is unavailable

    export_page: int = 200  # exchanges
    max_imports: int = 8  # sessions whose request ids are kept for the next batch of their import

    max_tree_bytes: int = 64 * 2**20  # of trees of responses that are kept for the next response

    repair_proofs: int = 3  # failed probes in a row, before the log is emptied and rebuilt
    repair_lock_seconds: float = 60.0  # after which another process takes over
    repair_renewal_seconds: float = 10.0  # between two renewals of the lock

    mongodb_select_seconds: float = 2.0  # to find a server
    mongodb_socket_seconds: float = 5.0  # to write a batch
    mongodb_read_seconds: float = 1.0  # for requests, which then read the log if it has all
    mongodb_probe_interval_seconds: float = 0.5
    erase_again_seconds: float = 60.0  # until a second erasure, of writes that ended late

    @property
    def max_page_bytes(self) -> int:
        """Size of a context or the entries of a page; the rest of the reply is its other fields."""
        return self.max_payload_bytes * 6 // 7


LIMITS = HistoryLimits()
