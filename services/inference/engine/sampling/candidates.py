"""The tokens that a draw is made among, in llama.cpp's form."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes

import llama_cpp
import numpy as np
import numpy.typing as npt

GROUPS = 1024  # that the vocabulary is split into to find a bound
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Candidates:
    """
    Room for a whole vocabulary, used again for each draw; so for one thread. Only what can be drawn
    is put in, since llama.cpp's samplers take a millisecond for a vocabulary, and microseconds for
    the 40 likeliest.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._data = np.zeros(vocabulary_size, CANDIDATE)
        self._ids, self._logits = self._data["id"], self._data["logit"]
        self._array = llama_cpp.llama_token_data_array(
            data=self._data.ctypes.data_as(llama_cpp.llama_token_data_p)
        )
        self._pointer = ctypes.byref(self._array)

    def draw(
        self,
        chain: llama_cpp.llama_sampler_p,
        tokens: npt.NDArray[np.integer],
        logits: npt.NDArray[np.float32],
    ) -> int:
        """The token that the chain selects among `tokens`, whose logits these are."""
        count = len(tokens)
        self._ids[:count] = tokens
        self._logits[:count] = logits
        array = self._array
        array.size, array.selected, array.sorted = count, -1, False
        llama_cpp.llama_sampler_apply(chain, self._pointer)
        return int(self._ids[array.selected])


def likeliest(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """
    The `count` tokens with the highest logits and maybe a few more, in no order. None has a logit
    of -inf; NaN is no number, and never among them.

    The count-th largest of some disjoint groups' maxima is a bound: so many logits reach it, and
    only groups whose maximum does have any.
    """
    end = len(logits) // GROUPS * GROUPS
    if end <= GROUPS or not 0 < count <= GROUPS:
        return np.flatnonzero(logits > -np.inf)
    groups = logits[:end].reshape(-1, GROUPS)  # group i: every GROUPS-th token from i on
    maxima = np.maximum.reduce(groups, 0)
    bound = np.partition(maxima, GROUPS - count)[GROUPS - count]
    if not bound > -np.inf:
        return np.flatnonzero(logits > -np.inf)
    high = (maxima >= bound).nonzero()[0]
    rows, columns = (groups.take(high, 1) >= bound).nonzero()
    tokens = rows * GROUPS + high[columns]
    rest = (logits[end:] >= bound).nonzero()[0] + end
    return np.concatenate((tokens, rest)) if len(rest) else tokens
