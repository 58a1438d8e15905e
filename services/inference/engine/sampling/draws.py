"""Draws tokens by llama.cpp's samplers, with the same number of random numbers for each draw."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import random
import secrets
from collections.abc import Iterable, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from services.contract.messages import Sampling
from services.inference.engine.sampling.candidates import Candidates, TokenIds

MIN_TEMPERATURE = 1e-3  # below it, only the most likely token has a chance
MIN_DYNAMIC_TEMPERATURE = 1e-5  # still more than 0 in llama.cpp's float32 arithmetic
XTC_THRESHOLD = 0.1  # llama.cpp's default
MAX_XTC_THRESHOLD = 0.5  # XTC excludes all but one of the tokens over it, so none over 0.5
_ANY_TOKEN, _ITS_LOGIT = np.zeros(1, np.intp), np.zeros(1, np.float32)


class Draws:
    """
    The seeded draws of one sequence among given candidates: by top-k, typical, top-p, min-p, XTC
    and temperature, or, after Mirostat, by temperature alone.

    llama.cpp's XTC applies by chance, and draws a random number only if there are two candidates.
    So here the number is drawn, always, and XTC is left out or applies for certain.
    """

    def __init__(self, candidates: Candidates, sampling: Sampling) -> None:
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._candidates = candidates
        self._random = random.Random(seed)
        selection = () if sampling.mirostat else _selection(sampling)
        draw = _temperature_and_draw(sampling, seed)
        self._xtc_probability = 0.0 if sampling.mirostat else sampling.xtc_probability or 0.0
        if not self._xtc_probability:
            self._plain = self._with_xtc = [_chain(*selection, *draw)]
            return
        before, after = _chain(*selection), _chain(*draw)
        self._plain, self._with_xtc = [before, after], [before, _xtc(sampling), after]

    def draw(self, tokens: TokenIds, logits: npt.NDArray[np.float32]) -> int:
        """Return one of the tokens; both arrays are [candidates]."""
        return self._candidates.draw(self._samplers(), tokens, logits)

    def skip(self, count: int) -> None:
        """Advance the random number generators by `count` draws."""
        for _ in range(count):
            self.draw(_ANY_TOKEN, _ITS_LOGIT)

    def close(self) -> None:
        for sampler in self._with_xtc:
            llama_cpp.llama_sampler_free(sampler)

    def _samplers(self) -> Sequence[llama_cpp.llama_sampler_p]:
        if not self._xtc_probability:
            return self._plain
        return self._with_xtc if self._random.random() < self._xtc_probability else self._plain


def _selection(sampling: Sampling) -> Iterable[llama_cpp.llama_sampler_p]:
    min_keep = sampling.min_keep or 1
    yield llama_cpp.llama_sampler_init_top_k(sampling.top_k or 0)
    yield llama_cpp.llama_sampler_init_typical(sampling.typical_p or 1.0, min_keep)
    yield llama_cpp.llama_sampler_init_top_p(sampling.top_p or 1.0, min_keep)
    yield llama_cpp.llama_sampler_init_min_p(sampling.min_p or 0.0, min_keep)


def _xtc(sampling: Sampling) -> llama_cpp.llama_sampler_p:
    threshold = XTC_THRESHOLD if sampling.xtc_threshold is None else sampling.xtc_threshold
    sampler: llama_cpp.llama_sampler_p = llama_cpp.llama_sampler_init_xtc(
        1.0, threshold, sampling.min_keep or 1, 0
    )
    return sampler


def _temperature_and_draw(sampling: Sampling, seed: int) -> Iterable[llama_cpp.llama_sampler_p]:
    """
    Yield the samplers of the temperature, which is dynamic within `dynatemp_range` around it, and
    of the draw. The range is clipped here, as llama.cpp clips it to 0: then a certain token makes
    the temperature so small that logits overflow, and the least likely candidate is drawn.
    """
    mean = sampling.temperature or 1.0
    spread = 0.0 if sampling.mirostat else sampling.dynatemp_range or 0.0
    lowest, highest = max(mean - spread, MIN_DYNAMIC_TEMPERATURE), mean + spread
    exponent = 1.0 if sampling.dynatemp_exponent is None else sampling.dynatemp_exponent
    yield llama_cpp.llama_sampler_init_temp_ext(
        (lowest + highest) / 2, (highest - lowest) / 2, exponent
    )
    yield llama_cpp.llama_sampler_init_dist(seed)


def _chain(*samplers: llama_cpp.llama_sampler_p) -> llama_cpp.llama_sampler_p:
    params = llama_cpp.llama_sampler_chain_default_params()
    chain: llama_cpp.llama_sampler_p = llama_cpp.llama_sampler_chain_init(params)
    for sampler in samplers:
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain
