"""Changes the logits of tokens: those that the request names, and those that it repeats."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
from collections import deque
from collections.abc import Sequence

import llama_cpp
import numpy as np

from services.contract.messages import Sampling
from services.inference.engine.sampling.candidates import Candidates, Logits, TokenIds

MIN_REPEAT_PENALTY = 1e-6  # logits divided by less overflow
MIN_LOGIT = -1e15  # DRY's penalties may overflow, but a grammar may need the token
# llama.cpp's defaults
WINDOW = 64  # tokens
DRY_BASE = 1.75
DRY_ALLOWED_LENGTH = 2
DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")


class Penalties:
    """
    The logit bias of a request, and penalties for generated tokens by llama.cpp's formulas
    (llama_sampler_penalties_apply in src/llama-sampler.cpp). The prompt is not penalised, so that
    answers can quote it.
    """

    def __init__(self, sampling: Sampling) -> None:
        bias = sampling.logit_bias or {}
        self._biased = np.array([int(token) for token in bias], np.intp)
        self._bias = np.array(list(bias.values()), np.float32)
        self._repeat = max(sampling.repeat_penalty or 1.0, MIN_REPEAT_PENALTY)
        self._presence = sampling.presence_penalty or 0.0
        self._frequency = sampling.frequency_penalty or 0.0
        is_on = self._repeat != 1.0 or self._presence != 0.0 or self._frequency != 0.0
        size = WINDOW if sampling.repeat_last_n is None else sampling.repeat_last_n
        self._size = size if is_on and not sampling.mirostat else 0  # -1: all tokens
        self._window: deque[int] = deque()
        self._counts: dict[int, int] = {}  # of the tokens in the window

    def apply(self, logits: Logits) -> None:
        """Change the logits, [n_vocab], in place."""
        if len(self._biased):
            logits[self._biased] += self._bias
        if not self._counts:
            return
        tokens = np.fromiter(self._counts, np.intp, len(self._counts))
        penalized = logits[tokens]
        if self._repeat != 1.0:
            penalized *= np.where(penalized <= 0, self._repeat, 1 / self._repeat)
        if self._presence or self._frequency:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            penalized -= counts * self._frequency + self._presence
        logits[tokens] = penalized

    def accept(self, token: int) -> None:
        if self._size == 0:
            return
        self._window.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if 0 < self._size < len(self._window):
            self._forget(self._window.popleft())

    def _forget(self, token: int) -> None:
        self._counts[token] -= 1
        if not self._counts[token]:
            del self._counts[token]


class Dry:
    """
    llama.cpp's DRY sampler ("don't repeat yourself"): the more tokens of an earlier sequence a
    token would repeat, the lower its logit. No repetition extends over a sequence breaker. The
    prompt counts too, as in llama.cpp, since this sampler keeps a conversation from repeating
    itself.

    Construction takes 9 ms per breaker for 150,000 tokens: llama.cpp searches the vocabulary.
    """

    def __init__(
        self,
        vocabulary: llama_cpp.llama_vocab_p,
        candidates: Candidates,
        sampling: Sampling,
        prompt: Sequence[int],
        context: int,
    ) -> None:
        self._candidates = candidates
        last_n = sampling.dry_penalty_last_n
        last_n = WINDOW if last_n is None else last_n
        window = context if last_n == -1 else min(last_n, context)  # llama.cpp allocates as much
        self._sampler = _new_dry(vocabulary, sampling, window)
        self._seen: set[int] = set()
        self._tokens: TokenIds = np.zeros(0, np.intp)  # those seen: only they can be penalised
        for token in prompt[max(0, len(prompt) - window) :]:
            self.accept(token)

    def apply(self, logits: Logits) -> None:
        """Change the logits, [n_vocab], in place."""
        tokens = self._tokens
        penalized = self._candidates.change(self._sampler, tokens, logits[tokens])
        logits[tokens] = np.maximum(penalized, MIN_LOGIT)

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self._sampler, token)
        if token not in self._seen:
            self._seen.add(token)
            self._tokens = np.append(self._tokens, token)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._sampler)


def _new_dry(
    vocabulary: llama_cpp.llama_vocab_p, sampling: Sampling, window: int
) -> llama_cpp.llama_sampler_p:
    base, allowed = sampling.dry_base, sampling.dry_allowed_length
    breakers = sampling.dry_sequence_breakers
    texts = [text.encode() for text in (DRY_SEQUENCE_BREAKERS if breakers is None else breakers)]
    sampler: llama_cpp.llama_sampler_p = llama_cpp.llama_sampler_init_dry(
        vocabulary,
        sampling.dry_multiplier or 0.0,
        DRY_BASE if base is None else base,
        DRY_ALLOWED_LENGTH if allowed is None else allowed,
        window,
        (ctypes.c_char_p * len(texts))(*texts),
        len(texts),
    )
    return sampler
