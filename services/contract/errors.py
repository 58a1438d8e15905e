"""
The codes that a failure can have, on the bus and over HTTP. Their HTTP statuses are in
services/edge/errors.py.
"""

from typing import Literal

ErrorCode = Literal[
    "invalid_request",  # the caller's input is wrong
    "context_length_exceeded",  # the prompt can't fit the context window even alone
    "not_found",
    "model_not_found",  # the request names a model or an adapter that the worker does not have
    "method_not_allowed",
    "conflict",  # the request's id is that of another one
    "payload_too_large",
    "unauthorized",
    "forbidden",  # a web page of an origin that is not allowed
    "overloaded",  # every slot is taken and the queue is full
    "timeout",  # the request's own time was over before the answer had begun
    "no_worker",  # nobody on the bus takes requests
    "model_loading",
    "model_unavailable",  # the model file is missing or can't be used
    "history_unavailable",  # the session can't be read, so it can't be continued
    "history_full",  # the log has no room until MongoDB has taken more of it
    "bus_unavailable",  # NATS can't be reached
    "worker_lost",  # the worker went silent in the middle of an answer
    "shutting_down",  # the worker is leaving and did not finish in time
    "internal",
]

FAILOVER_CODES: tuple[ErrorCode, ...] = ("worker_lost", "shutting_down")
"""What a worker says that leaves its answer to another: who reads it goes on there."""


class ServiceError(Exception):
    """
    A failure that a caller is told: `code` for programs, `message` for people (what is wrong, what
    to do).

    `retry_after` is in seconds, where trying again can help.
    """

    def __init__(self, code: ErrorCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.retry_after = retry_after
