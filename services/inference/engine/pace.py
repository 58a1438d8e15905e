"""
How much of a prompt is read at once, and how often beside running streams. Learns from measured
times; knows no clock.
"""

SLOWDOWN = 2.4  # mean gap of a stream while a prompt is read beside it, by its gap before
CHUNK_MIN = 16  # tokens; fewer cost a CPU nearly as much time
CHUNK_MAX = 512
CHUNK_SECONDS = 0.5  # so that a cancel does not wait longer
WEIGHT = 0.3  # of the newest measurement in an average


class Pace:
    """
    A chunk that takes longer than the streams may wait is made up for by decode steps before the
    next one.
    """

    def __init__(self) -> None:
        self._speed = 250.0  # tokens read a second; a guess, until it is measured
        self._decode = 0.0  # seconds of a decode step
        self._debt = 0.0  # seconds of reading that decode steps have to make up for

    @property
    def may_read(self) -> bool:
        return self._debt <= 0

    @property
    def chunk(self) -> int:
        """Tokens, while nobody is kept waiting."""
        return _tokens(self._speed * CHUNK_SECONDS)

    @property
    def chunk_beside(self) -> int:
        """Tokens that are read in the time that one decode step makes up for."""
        return min(self.chunk, _tokens(self._speed * self._decode * (SLOWDOWN - 1)))

    def has_read(self, tokens: int, seconds: float, beside: bool) -> None:
        """`beside` running streams, which were kept waiting."""
        if tokens >= CHUNK_MIN and seconds > 0:
            self._speed += WEIGHT * (tokens / seconds - self._speed)
        if beside:
            self._debt += seconds

    def has_decoded(self, seconds: float) -> None:
        self._decode += (WEIGHT if self._decode else 1.0) * (seconds - self._decode)
        self._debt = max(0.0, self._debt - seconds * (SLOWDOWN - 1))


def _tokens(worth: float) -> int:
    return int(min(max(worth, CHUNK_MIN), CHUNK_MAX))
