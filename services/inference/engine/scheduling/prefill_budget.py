"""
How often a stream's text goes out, how much of a prompt is read at once, and how often that is done
beside streams. Learns from measured times; knows no clock.
"""

from math import ceil

# Seconds. Thirty pieces a second read as smoothly as more, and each costs four processes a turn on
# the CPUs that compute the next token.
PIECE_INTERVAL = 1 / 30
SLOWDOWN = 2.1  # gap between two pieces of a stream while a prompt is read, by that before
CHUNK_MIN = 16  # tokens; fewer cost a CPU nearly as much time
CHUNK_MAX = 512
CHUNK_SECONDS = 0.5  # so that a cancel does not wait longer
FAR_TOO_LONG = 1.0  # seconds for a chunk: what was measured before is worth nothing
AHEAD_SECONDS = 0.1  # so that who comes meanwhile does not wait longer
WEIGHT = 0.3  # of the newest measurement in an average


class PrefillBudget:
    """
    Reading is made up for by decode steps before more is read. A chunk takes no longer than the
    streams may wait for their next piece, unless it would be so small that it is a waste.
    """

    def __init__(self) -> None:
        self._speed = 250.0  # tokens read a second; a guess, until it is measured
        self._decode = 0.0  # seconds of a decode step
        self._debt = 0.0  # seconds of reading that decode steps have to make up for

    @property
    def may_read(self) -> bool:
        return self._debt <= 0

    def seconds(self, tokens: int) -> float:
        """That it takes to read them."""
        return tokens / self._speed

    @property
    def chunk(self) -> int:
        """Tokens, while nobody is kept waiting."""
        return _tokens(self._speed * CHUNK_SECONDS)

    @property
    def chunk_ahead(self) -> int:
        """Tokens, while nobody has asked for them."""
        return _tokens(self._speed * AHEAD_SECONDS)

    @property
    def chunk_beside(self) -> int:
        """Tokens, while streams wait for their next piece."""
        steps = ceil(PIECE_INTERVAL / self._decode) if self._decode else 1
        return min(self.chunk, _tokens(self._speed * steps * self._decode * (SLOWDOWN - 1)))

    def has_read(self, tokens: int, seconds: float, beside: bool) -> None:
        """`beside` running streams, which were kept waiting."""
        if tokens >= CHUNK_MIN and seconds > 0:
            weight = 1.0 if seconds > FAR_TOO_LONG else WEIGHT
            self._speed += weight * (tokens / seconds - self._speed)
        if beside:
            self._debt += seconds

    def has_decoded(self, seconds: float) -> None:
        self._decode += (WEIGHT if self._decode else 1.0) * (seconds - self._decode)
        self._debt = max(0.0, self._debt - seconds * (SLOWDOWN - 1))


def _tokens(worth: float) -> int:
    return int(min(max(worth, CHUNK_MIN), CHUNK_MAX))
