"""Whether this process and NATS have lost each other for so long that others took its work over."""

import time
from collections.abc import Awaitable, Callable

LIMIT = 3.0  # seconds; a reader gives its worker up after more than that (client/failover.py)
INTERVAL = 0.25  # seconds


class NatsWatch:
    """
    `answers` says whether NATS answers now. `on_loss` is called once contact was lost for longer
    than LIMIT, before anything else happens: also in a process that was frozen, however it wakes,
    if whoever acts for others looks (`check`) before.
    """

    def __init__(
        self,
        answers: Callable[[], Awaitable[bool]],
        on_loss: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answers = answers
        self._on_loss = on_loss
        self._clock = clock
        self._last = clock()

    async def look(self) -> float:
        """Check the connection; a step of a Loop. Return the seconds until the next check."""
        is_there = await self._answers()
        self.check()
        if is_there:
            self._last = self._clock()
        return INTERVAL

    def check(self) -> None:
        if self._clock() - self._last > LIMIT:
            self._last = self._clock()
            self._on_loss()
