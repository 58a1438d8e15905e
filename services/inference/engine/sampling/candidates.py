"""The tokens of a vocabulary that may be drawn, and the array from which llama.cpp draws."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
from collections.abc import Iterable

import llama_cpp
import numpy as np
import numpy.typing as npt

GROUPS = 1024  # into which `likeliest` divides the vocabulary
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

Logits = npt.NDArray[np.float32]  # [n_vocab]
TokenIds = npt.NDArray[np.intp]


class Candidates:
    """
    The array on which llama.cpp's samplers work, with room for the vocabulary. Allocated once and
    used for each draw, so it belongs to one thread. It is filled with few tokens: llama.cpp's
    samplers take a millisecond for a vocabulary, and microseconds for 40 tokens.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._data = np.zeros(vocabulary_size, CANDIDATE)
        self._ids, self._logits = self._data["id"], self._data["logit"]
        self._first = self._data.ctypes.data_as(llama_cpp.llama_token_data_p)
        self._array = llama_cpp.llama_token_data_array(data=self._first)
        self._pointer = ctypes.byref(self._array)

    def draw(
        self,
        samplers: Iterable[llama_cpp.llama_sampler_p],
        tokens: TokenIds,
        logits: npt.NDArray[np.float32],
    ) -> int:
        """Return the token that the samplers select among `tokens`; both arrays: [candidates]."""
        self._fill(tokens, logits)
        for sampler in samplers:
            llama_cpp.llama_sampler_apply(sampler, self._pointer)
        return int(self._array.data[self._array.selected].id)  # XTC moves `data`

    def change(
        self,
        sampler: llama_cpp.llama_sampler_p,
        tokens: TokenIds,
        logits: npt.NDArray[np.float32],
    ) -> npt.NDArray[np.float32]:
        """Return the logits as changed by a sampler that leaves the order of tokens alone."""
        self._fill(tokens, logits)
        llama_cpp.llama_sampler_apply(sampler, self._pointer)
        return self._logits[: len(tokens)]

    def _fill(self, tokens: TokenIds, logits: npt.NDArray[np.float32]) -> None:
        count = len(tokens)
        self._ids[:count] = tokens
        self._logits[:count] = logits
        array = self._array
        array.data, array.size, array.selected, array.sorted = self._first, count, -1, False  # type: ignore[assignment]


def likeliest(logits: Logits, count: int) -> TokenIds:
    """
    Return the `count` tokens with the highest logits and maybe a few more, in no order, without
    logits of -inf and NaN. If `count` is 0 or over GROUPS, return all tokens.

    The vocabulary is divided into groups. The `count`-th highest of their maxima is a lower bound
    of the wanted logits, so only groups whose maximum reaches it are searched.
    """
    end = len(logits) // GROUPS * GROUPS
    if end <= GROUPS or not 0 < count <= GROUPS:
        return np.flatnonzero(logits > -np.inf)
    groups = logits[:end].reshape(-1, GROUPS)  # group i has every GROUPS-th token from i on
    maxima = np.maximum.reduce(groups, 0)
    bound = np.partition(maxima, GROUPS - count)[GROUPS - count]
    if not bound > -np.inf:
        return np.flatnonzero(logits > -np.inf)
    high = (maxima >= bound).nonzero()[0]
    rows, columns = (groups.take(high, 1) >= bound).nonzero()
    tokens = rows * GROUPS + high[columns]
    rest = (logits[end:] >= bound).nonzero()[0] + end
    return np.concatenate((tokens, rest)) if len(rest) else tokens
