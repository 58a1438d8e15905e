"""llama.cpp's own samplers over the whole vocabulary, as llama-server chains them."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np

from services.contract.messages import Sampling
from services.inference.engine.sampling.candidates import CANDIDATE, Logits

BREAKERS = ("\n", ":", '"', "*")
ALL = 10_000  # more tokens than a test generates


class LlamaCppChain:
    """The chain of common_sampler_init in llama.cpp's common/sampling.cpp, with its defaults."""

    def __init__(self, sampling: Sampling, vocabulary: Any, size: int) -> None:
        self._data = np.zeros(size, CANDIDATE)
        params = llama_cpp.llama_sampler_chain_default_params()
        self._chain = llama_cpp.llama_sampler_chain_init(params)
        samplers = mirostat if sampling.mirostat else default_samplers
        for sampler in (bias(sampling, size), *samplers(sampling, vocabulary, size)):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def choose(self, logits: Logits) -> int:
        data = self._data
        data["id"], data["logit"] = np.arange(len(data)), logits
        array = llama_cpp.llama_token_data_array(
            data=data.ctypes.data_as(llama_cpp.llama_token_data_p),
            size=len(data),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)


def bias(sampling: Sampling, size: int) -> Any:
    given = (sampling.logit_bias or {}).items()
    biases = (llama_cpp.llama_logit_bias * len(given))(
        *(llama_cpp.llama_logit_bias(int(token), value) for token, value in given)
    )
    return llama_cpp.llama_sampler_init_logit_bias(size, len(biases), biases)


def default_samplers(sampling: Sampling, vocabulary: Any, size: int) -> Iterator[Any]:
    def value(name: str, default: float) -> Any:
        given = getattr(sampling, name)
        return default if given is None else given

    def last(name: str) -> int:
        count = value(name, 64)
        return ALL if count == -1 else int(count)

    min_keep, seed = value("min_keep", 0), value("seed", 0)
    breakers = [text.encode() for text in value("dry_sequence_breakers", BREAKERS)]  # type: ignore[arg-type]
    yield llama_cpp.llama_sampler_init_penalties(
        size,
        last("repeat_last_n"),
        value("repeat_penalty", 1.0),
        value("frequency_penalty", 0.0),
        value("presence_penalty", 0.0),
    )
    yield llama_cpp.llama_sampler_init_dry(
        vocabulary,
        value("dry_multiplier", 0.0),
        value("dry_base", 1.75),
        value("dry_allowed_length", 2),
        last("dry_penalty_last_n"),
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )
    yield llama_cpp.llama_sampler_init_top_n_sigma(value("top_n_sigma", -1.0))
    yield llama_cpp.llama_sampler_init_top_k(value("top_k", 0))
    yield llama_cpp.llama_sampler_init_typical(value("typical_p", 1.0), min_keep)
    yield llama_cpp.llama_sampler_init_top_p(value("top_p", 1.0), min_keep)
    yield llama_cpp.llama_sampler_init_min_p(value("min_p", 0.0), min_keep)
    yield llama_cpp.llama_sampler_init_xtc(
        value("xtc_probability", 0.0), value("xtc_threshold", 0.1), min_keep, seed
    )
    yield llama_cpp.llama_sampler_init_temp_ext(
        value("temperature", 0.0), value("dynatemp_range", 0.0), value("dynatemp_exponent", 1.0)
    )
    yield llama_cpp.llama_sampler_init_dist(seed)


def mirostat(sampling: Sampling, vocabulary: Any, size: int) -> Iterator[Any]:
    seed = sampling.seed or 0
    tau = 5.0 if sampling.mirostat_tau is None else sampling.mirostat_tau
    eta = 0.1 if sampling.mirostat_eta is None else sampling.mirostat_eta
    yield llama_cpp.llama_sampler_init_temp(sampling.temperature or 0.0)
    if sampling.mirostat == 1:
        yield llama_cpp.llama_sampler_init_mirostat(size, seed, tau, eta, 100)
    else:
        yield llama_cpp.llama_sampler_init_mirostat_v2(seed, tau, eta)
