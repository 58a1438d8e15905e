"""
Stop strings in a stream: none leaks, not even in part, and no character waits longer than it must.
"""

from typing import NamedTuple


class Text(NamedTuple):
    """What may go out, and whether a stop string followed it."""

    out: str
    stopped: bool


class StopBuffer:
    """
    Holds back the longest end of the text that a stop string could begin with, and nothing
    more.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> Text:
        text = self._held + text
        if (cut := self._first_stop(text)) is not None:
            self._held = ""
            return Text(text[:cut], True)
        keep = self._beginning_of_a_stop(text)
        self._held = text[keep:]
        return Text(text[:keep], False)

    def flush(self) -> str:
        """What was held back, at the end of the answer: it was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)

    def _beginning_of_a_stop(self, text: str) -> int:
        """Where the longest suffix of `text` starts that is a proper prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
