"""
llama.cpp's sampler chain for one sequence: penalties, top-k, top-p, temperature, a seeded draw.
"""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import secrets

import llama_cpp
import numpy as np
import numpy.typing as npt

from services.contract.messages import Sampling
from services.inference.engine.backend import Chosen

PENALTY_WINDOW = 64  # generated tokens; the prompt is never penalised, so that answers can quote it
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class ChainSampler:
    """
    Temperature 0 takes the likeliest token. The chain remembers what it chose, for the
    penalties.
    """

    def __init__(
        self,
        vocab: llama_cpp.llama_vocab_p,
        sampling: Sampling,
    ) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        for part in _parts(llama_cpp.llama_vocab_n_tokens(vocab), sampling):
            llama_cpp.llama_sampler_chain_add(self._chain, part)

    def choose(self, logits: npt.NDArray[np.float32]) -> Chosen:
        """The next token, by its `logits`: one for each token of the vocabulary."""
        candidates = np.zeros(len(logits), CANDIDATE)
        candidates["id"] = np.arange(len(logits))
        candidates["logit"] = logits
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return Chosen(token)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)


def _parts(vocab_size: int, sampling: Sampling) -> list[llama_cpp.llama_sampler_p]:
    penalty = sampling.repeat_penalty or 1.0
    parts = []
    if penalty != 1.0:
        parts.append(
            llama_cpp.llama_sampler_init_penalties(vocab_size, PENALTY_WINDOW, penalty, 0.0, 0.0)
        )
    if not sampling.temperature:
        return [*parts, llama_cpp.llama_sampler_init_greedy()]
    seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
    return [
        *parts,
        llama_cpp.llama_sampler_init_top_k(sampling.top_k or 0),
        llama_cpp.llama_sampler_init_top_p(sampling.top_p or 1.0, 1),
        llama_cpp.llama_sampler_init_temp(sampling.temperature),
        llama_cpp.llama_sampler_init_dist(seed),
    ]
