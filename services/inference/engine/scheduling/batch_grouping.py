"""Learns how llama.cpp computes a decode step fastest on this CPU. Reads no clock."""

from collections import Counter

MIN_HALVED, MIN_PADDED = 8, 12  # streams; fewer than 8 are decoded one by one
MIN_SAMPLES = 8  # of each way; the fastest counts, since others may have been interrupted
MAX_RATIO = 1.5  # if the other way takes more than 1.5 times as long, it is not tried again
MIN_OTHER_SAMPLES = 3  # before that is decided
RELEARN_STEPS = 5000  # of either way, after which both are measured again


class BatchGrouping:
    """
    Streams are decoded in one batch, or otherwise if that is faster:

    - Fewer than 8 one by one: llama.cpp's kernels for small batches can be slow. A step of 2
      streams of a Q8_0 model took 14 ms in a batch on AVX-512, and 5 ms each.
    - 8 to 11 in two batches: 8 streams of a 1.5B Q4_K_M model took 217 ms, twice 4 took 189.
    - More padded to a block (`slot_block.py`): kernels for repacked weights compute 16 tokens at
      once. A step of 15 streams of that model took 321 ms, of 16 streams 260.

    Learned from the steps themselves, per number of streams: a benchmark at start is disturbed by
    other processes that start.
    """

    def __init__(self) -> None:
        self._samples: Counter[tuple[int, bool]] = Counter()
        self._fastest: dict[tuple[int, bool], float] = {}  # seconds

    def batches(self, streams: int) -> int:
        """Return in how many batches to decode the next step: the fastest way, or one to learn."""
        if streams >= MIN_PADDED or not self._is_alternative(streams):
            return 1
        return 2 if streams >= MIN_HALVED else streams

    def is_padded(self, streams: int) -> bool:
        """Return whether to pad the next step: because it is faster, or to learn."""
        return streams >= MIN_PADDED and self._is_alternative(streams)

    def record(self, streams: int, is_alternative: bool, seconds: float) -> None:
        """Record a step; `is_alternative`: it was split or padded."""
        key = streams, is_alternative
        self._samples[key] += 1
        self._fastest[key] = min(seconds, self._fastest.get(key, seconds))
        if self._samples[key] >= RELEARN_STEPS:
            for way in ((streams, False), (streams, True)):
                self._samples[way] = 0
                self._fastest.pop(way, None)

    def _is_alternative(self, streams: int) -> bool:
        """Return whether to split or pad the next step: because it is faster, or to learn."""
        plain, other = (streams, False), (streams, True)
        is_slow = self._fastest.get(other, 0.0) > MAX_RATIO * self._fastest.get(plain, 0.0)
        if is_slow and self._samples[other] >= MIN_OTHER_SAMPLES:
            return False
        if min(self._samples[plain], self._samples[other]) < MIN_SAMPLES:
            return self._samples[other] < self._samples[plain]  # in turns
        return self._fastest[other] < self._fastest[plain]
