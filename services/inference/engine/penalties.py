"""What changes the logits before a token is chosen: bias, and penalties for what was said. Pure."""

from collections import Counter, deque

import numpy as np
import numpy.typing as npt

from services.contract.messages import Sampling

LEAST_REPEAT = 1e-6  # what is divided by less is no float any more
WINDOW = 64  # generated tokens; the prompt is never penalised, so that answers can quote it


class Penalties:
    """The formulas are llama.cpp's; only the few logits that they concern are touched."""

    def __init__(self, sampling: Sampling) -> None:
        bias = sampling.logit_bias or {}
        self._biased = np.array([int(token) for token in bias], np.intp)
        self._bias = np.array(list(bias.values()), np.float32)
        self._repeat = max(sampling.repeat_penalty or 1.0, LEAST_REPEAT)
        self._presence = sampling.presence_penalty or 0.0
        self._frequency = sampling.frequency_penalty or 0.0
        self._window: deque[int] = deque()
        self._counts: Counter[int] = Counter()  # of the window's tokens

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Changes the logits in place."""
        if len(self._biased):
            logits[self._biased] += self._bias
        if not self._counts:
            return
        tokens = np.fromiter(self._counts, np.intp, len(self._counts))
        said = logits[tokens]
        if self._repeat != 1.0:
            said = np.where(said <= 0, said * self._repeat, said / self._repeat)
        if self._presence or self._frequency:
            counts = np.fromiter(self._counts.values(), np.float32, len(tokens))
            said -= counts * self._frequency + self._presence
        logits[tokens] = said

    def accept(self, token: int) -> None:
        if self._repeat == 1.0 and not self._presence and not self._frequency:
            return
        self._window.append(token)
        self._counts[token] += 1
        if len(self._window) > WINDOW:
            oldest = self._window.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
