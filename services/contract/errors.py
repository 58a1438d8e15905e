"""Error codes, on the bus and over HTTP. services/edge/errors.py maps them to HTTP statuses."""

from typing import Literal

ErrorCode = Literal[
    "invalid_request",  # the caller's input is invalid
    "context_length_exceeded",  # the prompt alone exceeds the context window
    "not_found",
    "previous_response_not_found",
    "model_not_found",  # no worker has the model or adapter that the request names
    "method_not_allowed",
    "conflict",  # another request has the same id
    "payload_too_large",
    "unauthorized",
    "forbidden",  # the origin of the calling web page is not allowed
    "wrong_host",  # the name in the `Host` header is not allowed
    "rate_limit_exceeded",  # a limit of the API key is used up
    "too_many_sessions",  # the tenant stores as many as it may; deleting some helps
    "overloaded",  # all slots are taken and the queue is full
    "timeout",  # the request timed out before its answer began
    "no_worker",  # no worker is connected
    "model_loading",
    "model_unavailable",  # the model file is missing or invalid
    "history_unavailable",  # history can't be read, so the session can't be continued
    "history_full",  # the log is full until MongoDB has archived more of it
    "bus_unavailable",  # NATS is disconnected
    "worker_lost",  # the worker stopped sending events during an answer
    "shutting_down",  # the worker shut down before the answer was complete
    "internal",
]

FAILOVER_CODES: tuple[ErrorCode, ...] = ("worker_lost", "shutting_down")
"""After these, the reader resumes the answer at another worker."""

RETRY_AFTER_SECONDS: dict[ErrorCode, float] = {
    "rate_limit_exceeded": 1.0,  # unless the time is known
    "overloaded": 1.0,  # unless the time until the queue is worked off is known
    "timeout": 1.0,
    "no_worker": 2.0,
    "model_loading": 2.0,
    "history_unavailable": 2.0,
    "history_full": 5.0,
    "bus_unavailable": 1.0,
    "worker_lost": 1.0,
    "shutting_down": 1.0,
}
"""The errors after which a retry can help, and the least time until then."""


class ServiceError(Exception):
    """
    A failure that is reported to the caller.

    `code` is for programs, `message` for people: what is wrong, then what to do. `retry_after` is
    in seconds, None if a retry does not help; the default depends on the code.
    """

    def __init__(self, code: ErrorCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        default = RETRY_AFTER_SECONDS.get(code)
        self.retry_after = default if retry_after is None else retry_after


def shutting_down() -> ServiceError:
    return ServiceError("shutting_down", "The server is shutting down: send the request again.")
