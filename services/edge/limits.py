"""Every limit and timeout of the edge, as one value that is passed to what needs it."""

from dataclasses import dataclass

from services.client.embedding_client import EmbeddingPolicy
from services.client.failover import DEFAULT_POLICY, FailoverPolicy
from services.client.history_requests import HistoryLimits
from services.contract.messages import MAX_SCHEMA_BYTES
from services.runtime.bus import TASKS_DEADLINE
from services.runtime.process import DRAIN_DEADLINE

KIB, MIB = 2**10, 2**20
ENVELOPE_BYTES = 4 * KIB
"""Room for the rest of a NATS message beside one exchange."""


@dataclass(frozen=True)
class EdgeLimits(HistoryLimits):
    """Times are in seconds. Sizes that depend on NATS are derived from `max_payload_bytes`."""

    max_payload_bytes: int = MIB  # of one NATS message: `max_payload` of the server

    # --- one HTTP connection ---
    overhead_bytes: int = 64 * KIB  # of the request line and the headers
    # of chunk framing and trailers, plus as many bytes as the body has
    body_overhead_bytes: int = 2 * KIB
    max_headers: int = 200  # and trailers; each one costs more memory than its bytes
    slice_bytes: int = 64 * KIB  # of a body, parsed in one go
    head_slice_bytes: int = 2 * KIB  # of anything else, in which small requests can follow another
    # in a row; a pause follows each further one, `invalid_pause` times as long as its handling, so
    # that the connection uses at most a tenth of the server's time
    invalid_requests: int = 3
    invalid_pause: float = 9.0
    max_invalid_pause_seconds: float = 2.0
    # before a request that came before the response to the previous one: common clients wait
    pipeline_pause_seconds: float = 0.02
    drop_pause_seconds: float = 0.05  # between two reads of what follows a rejected request
    send_buffer_bytes: int = 128 * KIB  # in the kernel, which reports progress in thirds of it
    # without progress, after which a client that does not read is disconnected
    stall_seconds: float = 30.0
    stall_checks: int = 6  # of progress, within `stall_seconds`
    # minimum of an unfinished request that must arrive in each `receive_seconds`
    receive_bytes: int = 8 * KIB
    receive_seconds: float = 10.0
    # fewer, if the process may open fewer files; at the limit, a new one replaces an idle one
    max_connections: int = 20_000
    linger_seconds: float = 2.0  # for a client that is still sending to receive its error
    # longer than proxies keep idle connections, so that they never send on a closed one
    keep_alive_seconds: int = 75
    # at shutdown: /readyz fails and requests are still served, so that routers look elsewhere
    handover_seconds: float = 1.0

    # --- the body of a request ---
    max_body_bytes: int = MIB
    # of a rejected body that is read and dropped before the response
    max_dropped_bytes: int = 32 * MIB
    max_drop_seconds: float = 10.0
    max_fields: int = 1_000  # of one JSON object
    max_field_bytes: int = 64 * KIB  # of a field without a limit of its own
    max_format_bytes: int = MAX_SCHEMA_BYTES  # of a field for the format of the answer
    max_nested: int = 10_000  # objects and lists in `tools` or in a schema
    # messages (if one needs translation), parts, calls and tools of a /v1 body, in total
    max_translated: int = 4_000

    # --- answers ---
    ping_seconds: float = 15.0  # without a byte, after which proxies and browsers may drop a stream
    # for a disconnected client of /chat to resume before the answer is cancelled
    grace_seconds: float = 10.0
    max_queued_events: int = 64  # of all choices of one completion, while its client reads slowly

    heartbeat_seconds: float = 30.0  # of agents on NATS

    failover: FailoverPolicy = DEFAULT_POLICY
    embedding: EmbeddingPolicy = EmbeddingPolicy()

    # --- activity, as the page shows it ---
    sample_seconds: float = 2.0
    max_samples: int = 300
    ttft_seconds: float = 60.0  # of which a sample has percentiles of the time to first token
    max_ttfts: int = 2_000  # of the last answers; more in a minute are not all counted
    max_failures: int = 100

    # --- responses in background ---
    background_seconds: float = 86_400.0  # for which a worker continues one without a reader
    # without any worker that has it, after which an edge starts it again; longer than a failover
    background_lost_seconds: float = 15.0
    background_poll_seconds: float = 1.0  # between two looks for a worker
    background_retry_seconds: float = 600.0  # for it to find a worker that takes it
    cancel_seconds: float = 5.0  # for a cancelled response to end

    # --- idempotency keys ---
    # for the edge that claimed a key to find a worker, before another edge takes over
    claim_seconds: float = 2.0
    claim_poll_seconds: float = 0.05
    # new keys of one tenant at one edge, which are stored for a day also if nothing is answered
    claim_burst: int = 10_000
    claims_per_second: float = 10.0
    # for history to come back, as long as a worker waits for it
    history_restart_seconds: float = 9.0
    history_poll_seconds: float = 0.3

    # --- requests to history, beside those of HistoryLimits ---
    import_seconds: float = 60.0  # for one batch
    dataset_sessions: int = 1000  # per page of the list of a dataset's sessions
    dataset_lists: int = 20  # times at most that the begin of this list is read again
    dataset_tries: int = 5  # at a page of a dataset, with the error's pause between two
    scrape_seconds: float = 2.5  # Prometheus waits 10 s for /metrics by default

    @property
    def drain_seconds(self) -> int:
        """Return how long open streams may continue at shutdown; the rest is for NATS."""
        return int(DRAIN_DEADLINE - TASKS_DEADLINE - self.handover_seconds - 2)

    @property
    def max_exchange_bytes(self) -> int:
        """Return the size of the largest exchange that an export contains: one NATS message."""
        return self.max_payload_bytes - ENVELOPE_BYTES

    @property
    def max_line_bytes(self) -> int:
        """Return the limit of one line of an import, where escapes may make the JSON longer."""
        return 2 * self.max_payload_bytes

    @property
    def import_batch_bytes(self) -> int:
        """Return the size of exchanges sent to history at once; a single one may be larger."""
        return self.max_payload_bytes // 2
