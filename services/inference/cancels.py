"""
The cancels of late: one can overtake its request, which comes by another way.
"""

import time
from collections import deque
from collections.abc import Callable

from services.contract.messages import Cancel

REMEMBERED = 30.0  # seconds
MOST = 10_000


class Cancels:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: deque[tuple[float, str, Cancel]] = deque(maxlen=MOST)

    def remember(self, key: str, cancel: Cancel) -> None:
        self._forget_the_old()
        self._heard.append((self._clock(), key, cancel))

    def of(self, key: str) -> list[Cancel]:
        """All that were for the request with this key."""
        self._forget_the_old()
        return [cancel for _, cancelled, cancel in self._heard if cancelled == key]

    def _forget_the_old(self) -> None:
        while self._heard and self._clock() - self._heard[0][0] >= REMEMBERED:
            self._heard.popleft()
