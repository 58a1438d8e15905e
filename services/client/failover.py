"""
Failover policy: when a worker counts as lost, and when, how often and with which request another
worker resumes its answer. Pure: no I/O, no clock.
"""

import dataclasses
from dataclasses import dataclass

from msgspec.structs import replace

from services.client.transcript import NotResumable, Transcript
from services.contract.codec import encode
from services.contract.errors import FAILOVER_CODES, ErrorCode, ServiceError
from services.contract.messages import ChatRequest

RETRIABLE: tuple[ErrorCode, ...] = ("overloaded", "no_worker", "model_loading", *FAILOVER_CODES)
MIN_TIMEOUT_SECONDS = 0.001
"""`timeout_s` of a resumed request whose deadline has passed: its text so far is stored."""
HEADER_BYTES = 4096
"""Room for the headers of a NATS message, which count in its size."""


class Unresumable(ServiceError):
    """No worker can resume the answer, now or later."""


@dataclass(frozen=True)
class FailoverState:
    """Progress of one answer's failovers. Times are monotonic, in seconds."""

    losses: int = 0
    reason: str = ""
    lost_at: float = 0.0
    gives_up_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FailoverPolicy:
    """
    Timeouts in seconds, and limits. A live worker sends at least one event a second, and replies to
    a request within a millisecond.
    """

    # detection of a lost worker
    silence_seconds: float = 1.1  # without an event, until the worker is probed
    probe_seconds: float = 1.0
    lost_seconds: float = 4.0  # without an event or reply; a disconnected worker gives up after 3
    worker_reconnect_seconds: float = 0.25
    nats_reconnect_seconds: float = 2.0  # after a restart of NATS, until all workers are back

    # start of an attempt
    admission_seconds: float = 1.0
    join_seconds: float = 0.5
    max_publish_tries: int = 6  # NATS may pick a frozen worker repeatedly

    # failover
    max_losses: int = 3  # workers, per answer
    give_up_seconds: float = 10.0  # without another worker, or without NATS
    max_loading_seconds: float = 600.0  # after a loss, while a worker loads the model
    retry_seconds: float = 0.3
    # per abandoned attempt, every `retry_seconds`, until a disconnected worker gives up by itself
    drop_messages: int = 8

    def after_loss(self, state: FailoverState, reason: str, now: float) -> FailoverState:
        """Count a lost worker. Raises ServiceError(worker_lost) if there were too many."""
        if state.losses >= self.max_losses:
            raise worker_lost(f"{reason} {self.max_losses} other workers were lost before it.")
        return FailoverState(state.losses + 1, reason, now, now + self.give_up_seconds)

    def while_loading(self, state: FailoverState, now: float) -> FailoverState:
        """Return the state while a worker loads the model, such as the lost one after a restart."""
        until = min(now + self.give_up_seconds, state.lost_at + self.max_loading_seconds)
        return dataclasses.replace(state, gives_up_at=max(until, state.gives_up_at))

    def retry_delay(self, state: FailoverState, error: ServiceError, now: float) -> float:
        """
        Return the seconds to wait after a failover failed with `error`. Raises
        ServiceError(worker_lost) if it is time to give up.
        """
        if isinstance(error, Unresumable):
            raise error
        if error.code not in RETRIABLE or now > state.gives_up_at:
            raise worker_lost(f"{state.reason} No other worker can resume: {error.message}")
        return self.retry_seconds

    def resume_request(
        self,
        state: FailoverState,
        request: ChatRequest,
        transcript: Transcript,
        seconds_left: float | None,
        max_payload: int,
    ) -> ChatRequest:
        """
        Return the request that lets another worker resume after the text of `transcript`.
        `seconds_left` remain of the request's own timeout; `max_payload` is the maximum of a NATS
        message in bytes. Raises Unresumable.
        """
        timeout = None if seconds_left is None else max(seconds_left, MIN_TIMEOUT_SECONDS)
        try:
            resumed = replace(request, resume=transcript.resume(), timeout_s=timeout)
        except NotResumable:
            raise _unresumable(state, "the prompt is too long.") from None
        if len(encode(resumed)) > max_payload - HEADER_BYTES:
            raise _unresumable(state, "the conversation is too long.")
        return resumed


DEFAULT_POLICY = FailoverPolicy()


def worker_lost(message: str) -> ServiceError:
    return ServiceError("worker_lost", f"{message} Send the request again.")


def bus_unavailable() -> ServiceError:
    message = "NATS can't be reached: try again in a moment."
    return ServiceError("bus_unavailable", message)


def _unresumable(state: FailoverState, why: str) -> Unresumable:
    message = f"{state.reason} No other worker can resume: {why} Send the request again."
    return Unresumable("worker_lost", message)
