"""What a step costs on this machine, by its number of tokens. Reads no clock."""

from collections import defaultdict, deque
from dataclasses import dataclass, field

RELEARN_STEPS = 5000  # after which a cost is tried again: it may have been measured on a busy CPU
# The fastest of the last samples counts. A single one is no cost yet: the first step of a size may
# allocate memory or load kernels.
SAMPLES, MIN_SAMPLES = 4, 2


@dataclass
class _Cost:
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))  # seconds
    step: int = 0  # when it was measured last


class StepCosts:
    """
    Learned from the steps themselves, per number of streams and of tokens for each. Costs are not
    linear: two AVX2 cores need 55 ms for a token of a 1.5B model, 1.8 times as long for two and 8
    times for 16, and a GPU about the same for all of them.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[int, int], _Cost] = defaultdict(_Cost)
        self._steps = 0

    def record(self, streams: int, tokens: int, seconds: float) -> None:
        """Record a step in which each stream had `tokens` tokens."""
        self._steps += 1
        cost = self._costs[streams, tokens]
        if not self._is_recent(cost):
            cost.samples.clear()
        cost.samples.append(seconds)
        cost.step = self._steps

    def seconds(self, streams: int, tokens: int) -> float | None:
        """Return what such a step takes; None if that was not measured twice recently."""
        cost = self._costs[streams, tokens]
        is_known = self._is_recent(cost) and len(cost.samples) >= MIN_SAMPLES
        return min(cost.samples) if is_known else None

    def _is_recent(self, cost: _Cost) -> bool:
        return self._steps - cost.step <= RELEARN_STEPS
