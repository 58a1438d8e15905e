"""Limits and timeouts of the history service. Fixed in production; tests pass in shorter ones."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaneLimits:
    """
    Requests that one process works on at once, and those of one tenant that wait; see Lane.

    Their reads are bounded by Bus.reads as well, so these numbers only divide them fairly.
    """

    max_running: int
    max_waiting: int  # of one tenant
    max_wait_seconds: float = 5.0  # shorter than edge and worker wait for a reply
    retry_after_seconds: float = 2.0

    @property
    def max_running_of_tenant(self) -> int:
        return max(1, self.max_running // 2)


@dataclass(frozen=True, kw_only=True)
class HistoryLimits:
    """Times are in seconds, batches in records, and shares relative to the log's size."""

    max_payload_bytes: int = 2**20  # of one NATS message: `max_payload` of the server

    # Contexts of chats never wait behind pages and exports, and these not behind imports, of which
    # a batch takes seconds.
    chat_lane: LaneLimits = LaneLimits(max_running=16, max_waiting=1000)
    bulk_lane: LaneLimits = LaneLimits(max_running=16, max_waiting=128)
    import_lane: LaneLimits = LaneLimits(max_running=4, max_waiting=32, max_wait_seconds=30)

    # Size of a new log; `nats stream edit HISTORY --max-bytes` changes it. It holds about 500,000
    # exchanges: months of backlog while MongoDB is down.
    max_log_bytes: int = 1024**3
    trim_above: float = 0.5  # share above which archived records are deleted
    warn_above: float = 0.8
    reject_above: float = 0.95  # the rest is for answers that are being generated
    # Imports and descriptions wait above this share, so that chats have room. Without MongoDB
    # there is always room soon, as the oldest records are dropped.
    bulk_above: float = 0.8
    bulk_above_without_mongodb: float = 0.95
    max_room_wait_seconds: float = 5.0
    room_poll_seconds: float = 0.1
    # Without MongoDB, the log is emptied from the first share down to the second: by the oldest
    # records of the tenants that have most.
    drop_above: float = 0.9
    drop_to: float = 0.85
    drop_parallel: int = 16
    # Listing the sizes of all records or snapshots, which takes 5 s for 100,000, is not repeated
    # before this is its share of the time; unless it has made room.
    listing_share: float = 0.1
    trim_batch: int = 500
    trim_interval_seconds: float = 1.0  # between two reads of the log's size
    watch_above: float = 0.7  # share above which it is read more often
    watch_interval_seconds: float = 0.2

    # Each try fails if another process changes the same session in the same moment.
    max_tries: int = 10
    retry_seconds: float = 1.0  # pause after a failure of NATS or MongoDB
    max_erase_seconds: float = 0.4  # until an erasure's reply; the rest is deleted in background

    # Consumers. A batch that was not full is followed by a pause, so that the next one is worth
    # its cost. The batch of a dead process is redelivered after the time for acknowledgement,
    # which is longer than MongoDB may take to write one.
    fetch_seconds: float = 2.0  # how long a request for records waits for the first one
    batch_pause_seconds: float = 0.1
    ack_wait_seconds: float = 6.0
    max_ack_pending: int = 5000  # ten processes with a batch each
    archive_batch: int = 500
    # A snapshot may have nearly the size of a message: so few are read at once, and they are stored
    # as soon as they exceed a size that NATS takes in time.
    snapshot_batch: int = 200
    snapshot_reads: int = 16
    snapshot_parallel: int = 100
    snapshot_group_bytes: int = 8 * 2**20
    recent_snapshot_bytes: int = 16 * 2**20  # kept in memory, so that the next one needs no read
    index_batch: int = 500
    index_parallel: int = 250
    max_index_lag: int = 500  # records that a lookup searches itself; beyond, it is unavailable
    max_unsaved: int = 1000  # records that a list of sessions waits for; beyond, it is unavailable

    # What a tenant may write, per process, into sessions without exchanges: no answer pays for it,
    # and their snapshots are kept for ever.
    empty_session_bytes: int = 4 * 2**20  # at once
    empty_session_bytes_per_second: int = 2048
    empty_session_min_bytes: int = 1024  # counted for each write

    # The snapshot of an erased session, longer than an answer can take.
    erased_snapshot_seconds: float = 7200.0
    # HISTORY_MAX_SESSIONS of a tenant have this size on average. They are counted after they have
    # grown by a share of what one tenant may have.
    session_bytes: int = 16 * 1024
    count_sessions_after: float = 0.05
    count_sessions_seconds: float = 2.0  # between two looks at the size

    max_read_bytes: int = 8 * 2**20  # of memory, for a page of exchanges
    export_page: int = 200  # exchanges
    max_imports: int = 8  # sessions whose request ids are kept for the next batch of their import

    max_tree_bytes: int = 64 * 2**20  # of trees of responses that are kept for the next response
    max_read_tree_bytes: int = 256 * 2**20  # of one tree, which is read whole; larger ones are not

    max_indexed: int = 100_000  # exchanges with feedback whose places are kept; 100 bytes each

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

    @property
    def max_exchange_bytes(self) -> int:
        """Size of the largest exchange with feedback: a page with it alone fits in a message."""
        return self.max_payload_bytes - 8192


LIMITS = HistoryLimits()
