"""Learns how llama.cpp computes a decode step fastest on this CPU. Reads no clock."""

from collections import Counter

MAX_SPLIT_STREAMS = 8  # more are always faster in a batch
MIN_SAMPLES = 8  # of each way; the fastest counts, since others may have been interrupted
MAX_RATIO = 1.5  # the other way is not tried further if slower than this, in relation
MIN_OTHER_SAMPLES = 3  # before that is decided
RELEARN_STEPS = 5000  # of either way, after which both are measured again


class BatchGrouping:
    """
    A few streams are decoded in one batch or one by one: llama.cpp's kernels for small batches can
    be slow. A step of 2 streams of a Q8_0 model takes 14 ms in a batch on AVX-512, and 5 ms each.

    More streams are decoded as they are or padded to a block (`slot_block.py`): kernels for
    repacked weights compute 16 tokens at once. A step of 15 streams of a 1.5B Q4_K_M model takes
    337 ms, of 16 streams 278 ms.

    Learned from the steps themselves, per number of streams: a benchmark at start is disturbed by
    other processes that start.
    """

    def __init__(self) -> None:
        self._samples: Counter[tuple[int, bool]] = Counter()
        self._fastest: dict[tuple[int, bool], float] = {}  # seconds

    def is_split(self, streams: int) -> bool:
        """Return whether to decode the next step one by one: because it is faster, or to learn."""
        return 1 < streams <= MAX_SPLIT_STREAMS and self._is_changed(streams)

    def is_padded(self, streams: int) -> bool:
        """Return whether to pad the next step: because it is faster, or to learn."""
        return streams > MAX_SPLIT_STREAMS and self._is_changed(streams)

    def record(self, streams: int, is_changed: bool, seconds: float) -> None:
        """Record a step of streams that were decoded one by one or padded, or not."""
        key = streams, is_changed
        self._samples[key] += 1
        self._fastest[key] = min(seconds, self._fastest.get(key, seconds))
        if self._samples[key] >= RELEARN_STEPS:
            for way in ((streams, False), (streams, True)):
                self._samples[way] = 0
                self._fastest.pop(way, None)

    def _is_changed(self, streams: int) -> bool:
        plain, changed = (streams, False), (streams, True)
        if self._samples[plain] < MIN_SAMPLES:
            return False
        is_slow = self._fastest.get(changed, 0.0) > MAX_RATIO * self._fastest[plain]
        if is_slow and self._samples[changed] >= MIN_OTHER_SAMPLES:
            return False
        if self._samples[changed] < MIN_SAMPLES:
            return True
        return self._fastest[changed] < self._fastest[plain]
