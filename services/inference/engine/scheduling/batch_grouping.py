"""Learns whether a few streams decode faster in one batch or one by one. Reads no clock."""

from collections import Counter

MAX_STREAMS = 8  # more are always faster in a batch
MIN_SAMPLES = 8  # of each way; the fastest counts, since others may have been interrupted
MAX_SPLIT_RATIO = 1.5  # one by one is not tried further if slower than this, in relation
MIN_SPLIT_SAMPLES = 3  # before that is decided
RELEARN_STEPS = 5000  # of either way, after which both are measured again


class BatchGrouping:
    """
    llama.cpp's kernels for small batches can be slow: a step of 2 sequences of a Q8_0 model takes
    14 ms in a batch on AVX-512, and 5 ms each. Learned from the steps themselves, per number of
    streams: a benchmark at start is disturbed by other processes that start.
    """

    def __init__(self) -> None:
        self._samples: Counter[tuple[int, bool]] = Counter()
        self._fastest: dict[tuple[int, bool], float] = {}  # seconds

    def is_split(self, streams: int) -> bool:
        """Return whether to decode the next step one by one: because it is faster, or to learn."""
        batched, split = (streams, False), (streams, True)
        if not 1 < streams <= MAX_STREAMS or self._samples[batched] < MIN_SAMPLES:
            return False
        is_slow = self._fastest.get(split, 0.0) > MAX_SPLIT_RATIO * self._fastest[batched]
        if is_slow and self._samples[split] >= MIN_SPLIT_SAMPLES:
            return False
        if self._samples[split] < MIN_SAMPLES:
            return True
        return self._fastest[split] < self._fastest[batched]

    def record(self, streams: int, is_split: bool, seconds: float) -> None:
        key = streams, is_split
        self._samples[key] += 1
        self._fastest[key] = min(seconds, self._fastest.get(key, seconds))
        if self._samples[key] >= RELEARN_STEPS:
            for way in ((streams, False), (streams, True)):
                self._samples[way] = 0
                self._fastest.pop(way, None)
