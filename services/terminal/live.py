"""Lines at the bottom of a terminal that may still change."""

import re
from itertools import takewhile
from typing import IO, Protocol

from rich.cells import cell_len

# Synchronized output: a terminal that knows it shows a frame at once, others ignore it.
# https://gist.github.com/christianparpart/d8a62cc1ab659194337d73e399004036
BEGIN_FRAME, END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
CLEAR_BELOW = "\x1b[J"
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Size(Protocol):
    """Of the terminal, in cells."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


class LiveLines:
    """
    Draws lines, each shorter than the terminal is wide, and draws the changed ones again.

    What has scrolled out of the screen can't be changed: of more lines than fit, only the last ones
    are compared. So a caller whose first lines change draws no more than `fitting`.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lines: list[str] = []  # the cursor is at the end of the last one

    def fitting(self, size: Size) -> int:
        """Return how many lines can change; the prompt or the shell's last line stays visible."""
        return max(1, size.height - 1)

    def draw(self, lines: list[str], size: Size) -> None:
        """Replace the lines by others, in one write."""
        old, kept = self._lines, self._kept(lines, size)
        if kept == len(old) == len(lines):
            return
        new = lines[kept:]
        if kept == len(old):
            begin = "\n" if old else ""
        elif kept == len(old) - 1 and new and new[0].startswith(old[-1]):
            begin, new[0] = "", new[0].removeprefix(old[-1])
        else:
            up = sum(_rows(line, size.width) for line in old[kept:]) - 1
            begin = (f"\x1b[{up}A" if up else "") + f"\r{CLEAR_BELOW}"
        self._write(BEGIN_FRAME + begin + "\n".join(new) + END_FRAME)
        self._lines = lines

    def commit(self) -> None:
        """Leave the lines as they are, and continue below them."""
        if self._lines:
            self._write("\n")
            self._lines = []

    def _kept(self, lines: list[str], size: Size) -> int:
        """Return how many of the drawn lines stay as they are."""
        pairs = zip(self._lines, lines, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if same == len(lines) < len(self._lines):
            same = max(0, same - 1)  # the cursor ends behind a line that is written
        scrolled_out = len(self._lines) - self.fitting(size)
        return max(same, min(scrolled_out, len(lines)))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _rows(line: str, width: int) -> int:
    """Return the rows that a line takes: several, once the terminal became narrower."""
    return max(1, -(-cell_len(_STYLE.sub("", line)) // width))
