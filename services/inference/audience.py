"""Whether anybody hears an answer. Publishes nothing."""

import time
from collections.abc import Callable

LEAST_GRACE = 2.0  # seconds: a reader that lost NATS for a moment is back by then


class Listeners:
    """
    Events are numbered from 1. NATS says of an event that nobody heard it, and nothing of one that
    somebody did; so those that it says nothing of, between two that it does, were heard.
    """

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = max(grace, LEAST_GRACE)
        self._clock = clock
        self._sent = 0
        self._missed = 0  # the last that nobody heard
        self._missed_since = 0.0

    def next_number(self) -> int:
        self._sent += 1
        return self._sent

    def missed(self, number: int) -> None:
        if not self._missed or number != self._missed + 1:
            self._missed_since = self._clock()
        self._missed = number

    def came(self) -> None:
        """Somebody asked for what was said so far, and listens now."""
        self._missed = 0

    @property
    def is_gone(self) -> bool:
        """Nobody heard the last event, nor any in all of the grace before it."""
        nobody = self._missed == self._sent and self._missed > 0
        return nobody and self._clock() - self._missed_since >= self._grace
