"""What several runs showed, and the bar that it has to clear. Knows no load and no server."""

import operator
import statistics
from collections.abc import Iterable
from typing import Literal, NamedTuple

SIGNS = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


class Spread(NamedTuple):
    """The median of several runs, and the lowest and the highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        middle = f"**{number(self.median)}**"
        if self.low == self.high:
            return middle
        return f"{middle} ({number(self.low)} to {number(self.high)})"


class Bar(NamedTuple):
    sign: Literal["≥", "≤", "<"]
    limit: float

    def holds(self, value: float) -> bool:
        return bool(SIGNS[self.sign](value, self.limit))

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


def number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"
