"""Whether a worker has room for one more request, and if not, when it will."""

from collections.abc import Collection

from services.contract.errors import ServiceError
from services.inference.calls import InFlightRequest
from services.inference.settings import InferenceSettings

LEAST_WAIT, MOST_WAIT = 1.0, 60.0  # seconds that who is refused is told to wait
WEIGHT = 0.2  # of the newest answer in the average length


class Admission:
    """Decides by counts and bytes alone."""

    def __init__(self, settings: InferenceSettings) -> None:
        self._slots = settings.model_parallel
        self._places = settings.model_parallel + settings.model_queue
        self._bytes = settings.model_queue_bytes
        self._usual = 0.0  # tokens of an answer; 0 until there was one

    def check(
        self, call: InFlightRequest, calls: Collection[InFlightRequest], speed: float
    ) -> None:
        """
        Raises ServiceError(overloaded). `calls` are those that have been taken, `speed` is in
        tokens per second. One prompt has room always, however long it is.
        """
        if len(calls) >= self._places:
            message = "Every slot is taken and the queue is full: try again."
            raise ServiceError("overloaded", message, self._wait(calls, speed))
        unread = sum(other.unread_bytes for other in calls)
        if unread and unread + call.unread_bytes > self._bytes:
            message = f"Prompts of {unread:,} bytes are still to be read: try again."
            raise ServiceError("overloaded", message, self._wait(calls, speed))

    def has_ended(self, tokens: int) -> None:
        """An answer of so many tokens; one that was cancelled in the queue tells nothing."""
        if tokens:
            self._usual += (WEIGHT if self._usual else 1) * (tokens - self._usual)

    def work(self, calls: Collection[InFlightRequest]) -> int:
        """Tokens that are still to be computed for those that have no slot yet."""
        return sum(self._of(call) for call in calls if not call.has_slot)

    def _wait(self, calls: Collection[InFlightRequest], speed: float) -> float:
        """
        Seconds until the queue that there is now has been worked off; if there is none, until the
        first slot is free.
        """
        tokens = self.work(calls) or min(map(self._of, calls)) * self._slots
        wait = tokens / speed if speed else LEAST_WAIT
        return round(min(max(wait, LEAST_WAIT), MOST_WAIT), 1)

    def _of(self, call: InFlightRequest) -> int:
        """An answer that is not there yet is taken to be as long as others were."""
        most = call.sampling.max_tokens or self._usual
        length = min(self._usual or most, most)
        return call.unread_tokens + max(int(length) - call.said_tokens, 0)
