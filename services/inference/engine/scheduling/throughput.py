"""How fast the model computes of late, whatever it computes. Knows no clock."""

from math import exp

OF_LATE = 10.0  # seconds of computing after which a measurement has lost most of its weight


class Throughput:
    """Prompts and answers alike, all requests together."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self.per_second = 0.0  # tokens; 0 until something was computed

    def add(self, tokens: int, seconds: float) -> None:
        fading = exp(-seconds / OF_LATE)
        self._tokens = self._tokens * fading + tokens
        self._seconds = self._seconds * fading + seconds
        if self._seconds:
            self.per_second = self._tokens / self._seconds
