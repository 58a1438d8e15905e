"""Whose turn it is to be decoded, of the adapters that have streams. Knows no clock."""

from collections.abc import Collection

TURN = 0.05  # seconds; a change of the adapter costs milliseconds, a longer pause would be seen


class AdapterRoundRobin:
    """One adapter after the other, each for about TURN seconds of decode steps."""

    def __init__(self) -> None:
        self._adapter = 0
        self._left = TURN

    def of(self, adapters: Collection[int]) -> int:
        if self._adapter not in adapters or self._left <= 0:
            self._adapter = min(adapters, key=lambda a: (a <= self._adapter, a))  # the next, round
            self._left = TURN
        return self._adapter

    def has_decoded(self, seconds: float) -> None:
        self._left -= seconds
