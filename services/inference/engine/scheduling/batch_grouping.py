"""Whether a few streams are decoded in one batch or one by one: whichever was faster. Pure."""

from collections import Counter

MOST = 8  # streams; more are always faster in a batch
TRIES = 8  # of each way, of which the fastest counts: others may have been held up
HOPELESS = 1.5  # times as slow after ENOUGH tries: not tried again
ENOUGH = 3
FORGET = 5000  # steps after which both ways are tried anew


class BatchGrouping:
    """
    llama.cpp's kernels for few tokens can be poor: 2 sequences of a Q8_0 model take 14 ms in a
    batch on AVX-512, and 5 ms each. Learned from the steps themselves, for each number of streams,
    since a measurement at start meets other processes that start.
    """

    def __init__(self) -> None:
        self._tries: Counter[tuple[int, bool]] = Counter()
        self._fastest: dict[tuple[int, bool], float] = {}

    def is_apart(self, streams: int) -> bool:
        """Whether the next step is better computed one by one, or should be, to know."""
        together, apart = (streams, False), (streams, True)
        if not 1 < streams <= MOST or self._tries[together] < TRIES:
            return False
        is_hopeless = self._fastest.get(apart, 0.0) > HOPELESS * self._fastest[together]
        if is_hopeless and self._tries[apart] >= ENOUGH:
            return False
        return self._tries[apart] < TRIES or self._fastest[apart] < self._fastest[together]

    def took(self, streams: int, is_apart: bool, seconds: float) -> None:
        key = streams, is_apart
        self._tries[key] += 1
        self._fastest[key] = min(seconds, self._fastest.get(key, seconds))
        if self._tries[key] >= FORGET:
            for way in ((streams, False), (streams, True)):
                self._tries[way] = 0
                self._fastest.pop(way, None)
