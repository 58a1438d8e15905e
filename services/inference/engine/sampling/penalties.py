"""What changes the logits before a token is chosen: bias, and penalties for what was said. Pure."""

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
        self._window = np.zeros(WINDOW, np.intp)
        self._said = 0  # tokens, of which the window has the last

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Changes the logits in place."""
        if len(self._biased):
            logits[self._biased] += self._bias
        tokens = self._window[: self._said]
        if not len(tokens):
            return
        said = logits[tokens]  # a token that was said twice is here twice, and gets the same value
        if self._repeat != 1.0:
            said *= np.where(said <= 0, self._repeat, 1 / self._repeat)
        if self._presence or self._frequency:
            counts = np.equal.outer(tokens, tokens).sum(axis=0)
            said -= counts * self._frequency + self._presence
        logits[tokens] = said

    def accept(self, token: int) -> None:
        self._window[self._said % WINDOW] = token
        self._said += 1
