"""What a step costs on this machine, by its number of tokens. Reads no clock."""

from typing import NamedTuple

RELEARN_STEPS = 5000  # after which a cost is tried again: it may have been measured on a busy CPU
WEIGHT = 0.3  # of the newest measurement in an exponential moving average


class _Cost(NamedTuple):
    seconds: float
    step: int  # when it was measured last


class StepCosts:
    """
    Learned from the steps themselves, per number of streams and of tokens for each. It is no line:
    two AVX2 cores need 55 ms for a token of a 1.5B model, 1.8 times as long for two and 8 times for
    16, and a GPU about the same for all of them.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[int, int], _Cost] = {}
        self._steps = 0

    def record(self, streams: int, tokens: int, seconds: float) -> None:
        """Record a step with so many `tokens` of each stream."""
        self._steps += 1
        known = self.seconds(streams, tokens)
        average = seconds if known is None else known + WEIGHT * (seconds - known)
        self._costs[streams, tokens] = _Cost(average, self._steps)

    def seconds(self, streams: int, tokens: int) -> float | None:
        """Return what such a step takes; None if that was not measured recently."""
        cost = self._costs.get((streams, tokens))
        is_recent = cost and self._steps - cost.step <= RELEARN_STEPS
        return cost.seconds if cost and is_recent else None
