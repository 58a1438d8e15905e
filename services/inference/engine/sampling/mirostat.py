"""Mirostat: candidates whose surprise holds the one of the answer near a target."""

import math

import numpy as np

from services.contract.messages import Sampling
from services.inference.engine.sampling.candidates import Logits, TokenIds, likeliest

TAU, ETA = 5.0, 0.1  # llama.cpp's defaults
ESTIMATION_TOKENS = 100  # from which version 1 estimates the exponent of Zipf's law


class Mirostat:
    """
    Versions 1 and 2 by llama.cpp's formulas (llama_sampler_mirostat_apply and …_v2_apply in
    src/llama-sampler.cpp, after https://arxiv.org/abs/2007.14966). llama.cpp's own samplers don't
    let a resumed answer set `mu`, the maximum surprise of a token in bits.
    """

    def __init__(self, sampling: Sampling, temperature: float) -> None:
        self._version = sampling.mirostat
        self._tau = TAU if sampling.mirostat_tau is None else sampling.mirostat_tau
        self._eta = ETA if sampling.mirostat_eta is None else sampling.mirostat_eta
        self._bits = 1 / (temperature * math.log(2))  # that a token loses for 1.0 less in its logit
        self._highest, self._log_sum = 0.0, 0.0  # of the logits that were selected last
        self.mu = 2 * self._tau

    def select(self, logits: Logits) -> TokenIds:
        """Return the candidates, likeliest first; none if the logits, [n_vocab], have NaN."""
        self._highest = float(logits.max())
        if not math.isfinite(self._highest):
            return np.zeros(0, np.intp)
        tokens = self._first_k(logits) if self._version == 1 else self._unsurprising(logits)
        self._log_sum = _log2_sum(self._log2_weights(logits[tokens]))
        return tokens

    def observe(self, logit: float) -> None:
        """Learn from the token that was drawn among those selected last, by its logit."""
        surprise = self._log_sum - (logit - self._highest) * self._bits
        self.mu -= self._eta * (surprise - self._tau)

    def _unsurprising(self, logits: Logits) -> TokenIds:
        weights = self._log2_weights(logits)
        bound = min(_log2_sum(weights) - self.mu, 0.0)  # the likeliest token has a weight of 2⁰
        return _sorted(logits, np.flatnonzero(weights >= bound))

    def _first_k(self, logits: Logits) -> TokenIds:
        top = _sorted(logits, likeliest(logits, ESTIMATION_TOKENS))[:ESTIMATION_TOKENS]
        k = self._k(logits[top].astype(np.float64), len(logits))
        return top[:k] if k <= len(top) else _sorted(logits, likeliest(logits, k))[:k]

    def _k(self, top: np.ndarray, vocabulary_size: int) -> int:
        """Return the number of candidates, from the `top` logits in descending order."""
        ranks = np.arange(1.0, len(top))
        steps = np.log((ranks + 1) / ranks)
        drops = (top[:-1] - top[1:]) * self._bits * math.log(2)
        with np.errstate(all="ignore"):
            exponent = (steps @ drops) / (steps @ steps)  # of Zipf's law
            epsilon = exponent - 1
            mass = epsilon * np.exp2(self.mu) / (1 - np.power(float(vocabulary_size), -epsilon))
            k = np.power(mass, 1 / exponent)
        return int(np.clip(np.nan_to_num(k, nan=1.0), 1, vocabulary_size))

    def _log2_weights(self, logits: Logits) -> Logits:
        """Return the logarithms of the probabilities, up to a constant."""
        return (logits - np.float32(self._highest)) * np.float32(self._bits)


def _log2_sum(weights: Logits) -> float:
    return math.log2(np.exp2(weights).sum(dtype=np.float64))


def _sorted(logits: Logits, tokens: TokenIds) -> TokenIds:
    return tokens[np.argsort(-logits[tokens], kind="stable")]
