"""
llama.cpp's sampler chain for one sequence: penalties, top-k, top-p, temperature, a seeded draw.
"""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import secrets

import llama_cpp

from services.contract.messages import Sampling

PENALTY_WINDOW = 64  # generated tokens; the prompt is never penalised, so that answers can quote it


class ChainSampler:
    """
    Temperature 0 takes the likeliest token. The chain remembers what it chose, for the
    penalties.
    """

    def __init__(
        self,
        vocab: llama_cpp.llama_vocab_p,
        context: llama_cpp.llama_context_p,
        sampling: Sampling,
    ) -> None:
        self._context = context
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        for part in _parts(llama_cpp.llama_vocab_n_tokens(vocab), sampling):
            llama_cpp.llama_sampler_chain_add(self._chain, part)

    def choose(self, index: int) -> int:
        """The token after the one at `index` of the batch that was decoded last."""
        return int(llama_cpp.llama_sampler_sample(self._chain, self._context, index))

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
