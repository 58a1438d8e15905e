"""The worker's limits and timeouts."""

from dataclasses import dataclass

from services.contract.tokens import TOKENS_TIMEOUT_SECONDS
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS as DEFAULT_SCHEDULER_LIMITS
from services.inference.engine.scheduling.limits import SchedulerLimits


@dataclass(frozen=True)
class InferenceLimits:
    """
    Limits and timeouts of a worker. Those of messages follow from `max_payload`, the maximum bytes
    of a message on the NATS server.
    """

    max_payload: int = 2**20
    scheduler: SchedulerLimits = DEFAULT_SCHEDULER_LIMITS

    load_log_interval_seconds: float = 2.0
    max_reported_faults: int = 10  # of adapters; the log has all
    adapter_poll_seconds: float = 0.5  # a change is reported at once, after two looks
    drain_seconds: float = 22.0  # in which a draining worker finishes in-flight requests
    save_seconds: float = 5.0  # in which it then writes cached prompts, if it has a folder

    keep_alive_seconds: float = 1.0  # without an event, after which a Progress is sent
    disconnected_seconds: float = 3.0  # less than a reader waits before it fails over
    connection_check_interval_seconds: float = 0.25
    forward_timeout_seconds: float = 0.1  # for another worker to accept a request

    # Two of them are parallel only while they tokenize or compile, which releases the GIL; another
    # tenant finds the third one free.
    preparing_threads: int = 3
    idle_prefill_delay_seconds: float = 0.2
    idle_context_timeout_seconds: float = 1.0  # for history, when no caller waits
    max_cached_answer_tokens: int = 2**19  # 2 MiB

    min_retry_after_seconds: float = 1.0
    max_retry_after_seconds: float = 60.0

    cancel_kept_seconds: float = 30.0
    max_cancels_kept: int = 10_000

    min_grace_seconds: float = 2.0  # in which a disconnected reader reconnects
    # Share of the grace that a request has before its answer begins: its place is not worth more
    # than that of a request whose caller stays. With the edge's grace, 1 s; clients of server-sent
    # events reconnect after 0.5 s.
    waiting_grace_share: float = 0.1
    replay_kept_seconds: float = 60.0  # after the end of an answer
    max_replay_bytes_kept: int = 4 * 2**20  # of finished answers; admission bounds the others

    # Seconds without a keep-alive after which each try of a request to history ends; together
    # enough to replace a process that died or froze, and for a NATS cluster to elect a leader.
    history_tries_seconds: tuple[float, ...] = (0.3, 0.6, 1.2, 2.4, 4.8)
    # Contexts that are kept for the next requests of their sessions
    max_cached_contexts: int = 1000
    max_cached_context_bytes: int = 16 * 2**20  # of memory
    cached_context_seconds: float = 600.0  # after history's last reply for the session
    history_trust_seconds: float = 2.0  # after history's last reply for any session
    last_record_timeout_seconds: float = 0.5  # to read it; then history is asked instead
    max_stored_tools_bytes: int = 64 * 2**10  # of a request; larger ones are left out of its record
    append_timeout_seconds: float = 10.0  # a server that restarts takes a few
    append_retry_seconds: float = 0.3

    token_queue: int = 64  # waiting requests to count or convert tokens
    token_seconds: float = TOKENS_TIMEOUT_SECONDS - 0.5  # so that the caller gets the error

    @property
    def max_replay_bytes(self) -> int:
        """Maximum bytes of one Replay, which leaves room for headers and JSON."""
        return self.max_payload * 6 // 7

    @property
    def min_replay_event_bytes(self) -> int:
        """Minimum bytes for events in a Replay, however long its request is."""
        return self.max_payload // 32

    @property
    def max_replay_token_chars(self) -> int:
        """Maximum characters, of up to six bytes each in JSON, of a Token in a Replay."""
        return self.min_replay_event_bytes // 8

    @property
    def max_resume_tokens(self) -> int:
        """Maximum prompt tokens in the resume state of a Started: a third of a message."""
        return self.max_payload // 16

    @property
    def max_token_pieces(self) -> int:
        """Maximum pieces in a TokenizeReply: " the", for example, takes 54 bytes with its token."""
        return self.max_payload // 55


DEFAULT_LIMITS = InferenceLimits()
