"""What a prompt may be beyond its type: checked alike by the edge and by the worker."""

from services.contract.errors import ServiceError
from services.contract.messages import Prompt, TextFormat

MAX_BYTES = 64 * 1024
"""So that ten exchanges and a prompt fit NATS's message limit of 1 MiB."""


def check(prompt: Prompt) -> None:
    """
    Raises ServiceError: payload_too_large for a long one, invalid_request for a blank one, or for
    fields that contradict each other.
    """
    if not prompt.prompt.strip():
        raise ServiceError("invalid_request", "The prompt is blank: it must say something.")
    if (size := len(prompt.prompt.encode())) > MAX_BYTES:
        raise ServiceError(
            "payload_too_large",
            f"The prompt has {size:,} bytes, and {MAX_BYTES:,} is the most: shorten it.",
        )
    if prompt.grammar and not isinstance(prompt.response_format, TextFormat | None):
        raise ServiceError(
            "invalid_request",
            "Both grammar and response_format say what the answer must be: leave one of them out.",
        )
