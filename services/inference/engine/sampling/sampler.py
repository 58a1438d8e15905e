"""
Chooses the tokens of one sequence: logit bias, penalties, grammar, top-k, top-p, min-p,
temperature and a seeded draw, in the order of llama-server.
"""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import secrets
from collections import deque
from collections.abc import Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from services.contract.messages import Sampling, TokenLogprob, TokenProbability
from services.inference.engine.backend import (
    ComputeFailure,
    ConstraintFailure,
    SampledToken,
    SampleResult,
)
from services.inference.engine.sampling.grammar import Grammar, GrammarError, Vocabulary

NAN_LOGITS = ComputeFailure("The model computed NaN instead of logits. Check its file for damage.")
MIN_TEMPERATURE = 1e-3  # below it, only the most likely token has a chance
MIN_REPEAT_PENALTY = 1e-6  # logits divided by less overflow
PENALTY_WINDOW = 64  # generated tokens; the prompt is not penalised, so that answers can quote it
MIN_LOGPROB = -9999.0  # for a probability of 0, since JSON has no infinity
GROUPS = 1024  # into which `likeliest` divides the vocabulary
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_ANY_TOKEN, _ITS_LOGIT = np.zeros(1, np.intp), np.zeros(1, np.float32)

Logits = npt.NDArray[np.float32]  # [n_vocab]
TokenIds = npt.NDArray[np.intp]


class SamplerChain:
    """
    The sampler of one sequence, with the state of its penalties and grammar. Temperature 0 chooses
    the most likely token.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        candidates: Candidates,
        sampling: Sampling,
        grammar: Grammar | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._candidates = candidates
        self._top_logprobs = sampling.logprobs
        self._penalties = Penalties(sampling)
        self._grammar = grammar
        self._top_k = sampling.top_k or 0
        self._is_greedy = (sampling.temperature or 0.0) < MIN_TEMPERATURE
        self._chain = _new_chain(sampling)
        self._forced: deque[int] = deque()

    def force(self, tokens: Sequence[int]) -> None:
        self._forced.extend(tokens)

    def choose(self, logits: Logits) -> SampleResult:
        """Return the next token by its `logits`, [n_vocab], which are changed in place."""
        unchanged = None if self._top_logprobs is None else logits.copy()
        self._penalties.apply(logits)
        tokens = self._most_likely(logits)
        if not len(tokens) or not np.isfinite(logits[tokens[0]]):
            return NAN_LOGITS
        try:
            chosen = self._commit(self._choose(logits, tokens))
        except GrammarError as error:
            return ConstraintFailure(
                f"The grammar can't continue the answer: {error}. Loosen the grammar or schema."
            )
        if unchanged is None:
            return chosen
        top = self._top_logprobs or 0
        return chosen._replace(
            logprob=token_logprob(unchanged, chosen.token, top, self._vocabulary)
        )

    def accept(self, token: int) -> SampledToken | ConstraintFailure:
        """Advance by a token that another worker chose, as if it had been chosen here."""
        if self._forced and token != self._forced.popleft():
            return ConstraintFailure("its reasoning is longer than its budget")
        self._skip_draws(2 if self._grammar else 1)
        try:
            if self._grammar and not self._grammar.allows(token):
                return ConstraintFailure("its grammar does not allow its tokens")
            return self._commit(token)
        except GrammarError as error:
            return ConstraintFailure(f"{error}")

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)

    def _choose(self, logits: Logits, tokens: TokenIds) -> int:
        """
        Return the next forced token. Else draw one, and draw again among the allowed ones if the
        grammar rejects it.
        """
        if self._forced:
            self._skip_draws(2 if self._grammar else 1)
            return self._forced.popleft()
        token = self._draw(logits, tokens)
        if self._grammar is None:
            return token
        if not self._grammar.allows(token):
            return self._draw(logits, self._allowed(self._grammar, logits))
        self._skip_draws(1)
        return token

    def _skip_draws(self, count: int) -> None:
        """
        Advance the random number generator. Every token takes the same number of draws, needed or
        not, so that a resumed answer continues with the same random numbers.
        """
        for _ in range(0 if self._is_greedy else count):
            self._candidates.draw(self._chain, _ANY_TOKEN, _ITS_LOGIT)

    def _commit(self, token: int) -> SampledToken:
        """Update the penalties and the grammar."""
        self._penalties.accept(token)
        if self._grammar is None:
            return SampledToken(token)
        self._grammar.accept(token)
        return SampledToken(token, is_last=self._grammar.is_finished, is_constrained=True)

    def _most_likely(self, logits: Logits) -> TokenIds:
        return np.array([logits.argmax()]) if self._is_greedy else likeliest(logits, self._top_k)

    def _allowed(self, grammar: Grammar, logits: Logits) -> TokenIds:
        """Return the most likely tokens that the grammar allows."""
        np.copyto(logits, -np.inf, where=~grammar.allowed())
        tokens = likeliest(logits, self._top_k)
        if not len(tokens):
            raise GrammarError("it allows no token of this model here")
        return tokens

    def _draw(self, logits: Logits, tokens: TokenIds) -> int:
        if self._is_greedy:
            return int(tokens[logits[tokens].argmax()])
        return self._candidates.draw(self._chain, tokens, logits[tokens])


def _new_chain(sampling: Sampling) -> llama_cpp.llama_sampler_p:
    seed = sampling.seed if sampling.seed is not None else secrets.randbits(32)
    params = llama_cpp.llama_sampler_chain_default_params()
    chain: llama_cpp.llama_sampler_p = llama_cpp.llama_sampler_chain_init(params)
    for part in (
        llama_cpp.llama_sampler_init_top_k(sampling.top_k or 0),
        llama_cpp.llama_sampler_init_top_p(sampling.top_p or 1.0, 1),
        llama_cpp.llama_sampler_init_min_p(sampling.min_p or 0.0, 1),
        llama_cpp.llama_sampler_init_temp(sampling.temperature or 1.0),
        llama_cpp.llama_sampler_init_dist(seed),
    ):
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain


class Candidates:
    """
    The array from which llama.cpp draws, with room for the vocabulary. Allocated once and used for
    each draw, so it belongs to one thread. It is filled with likely tokens only: llama.cpp's
    samplers take a millisecond for a vocabulary, and microseconds for 40 tokens.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._data = np.zeros(vocabulary_size, CANDIDATE)
        self._ids, self._logits = self._data["id"], self._data["logit"]
        self._array = llama_cpp.llama_token_data_array(
            data=self._data.ctypes.data_as(llama_cpp.llama_token_data_p)
        )
        self._pointer = ctypes.byref(self._array)

    def draw(self, chain: llama_cpp.llama_sampler_p, tokens: TokenIds, logits: Logits) -> int:
        """Return the token that the chain selects among `tokens`; both arrays are [candidates]."""
        count = len(tokens)
        self._ids[:count] = tokens
        self._logits[:count] = logits
        array = self._array
        array.size, array.selected, array.sorted = count, -1, False
        llama_cpp.llama_sampler_apply(chain, self._pointer)
        return int(self._ids[array.selected])


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


class Penalties:
    """
    The logit bias of a request, and penalties for generated tokens by llama.cpp's formulas
    (llama_sampler_penalties_apply in src/llama-sampler.cpp).
    """

    def __init__(self, sampling: Sampling) -> None:
        bias = sampling.logit_bias or {}
        self._biased = np.array([int(token) for token in bias], np.intp)
        self._bias = np.array(list(bias.values()), np.float32)
        self._repeat = max(sampling.repeat_penalty or 1.0, MIN_REPEAT_PENALTY)
        self._presence = sampling.presence_penalty or 0.0
        self._frequency = sampling.frequency_penalty or 0.0
        self._window = np.zeros(PENALTY_WINDOW, np.intp)  # a ring buffer
        self._accepted = 0

    def apply(self, logits: Logits) -> None:
        """Change the logits, [n_vocab], in place."""
        if len(self._biased):
            logits[self._biased] += self._bias
        tokens = self._window[: self._accepted]
        if not len(tokens):
            return
        penalized = logits[tokens]  # equal tokens get the same value
        if self._repeat != 1.0:
            penalized *= np.where(penalized <= 0, self._repeat, 1 / self._repeat)
        if self._presence or self._frequency:
            counts = np.equal.outer(tokens, tokens).sum(axis=0)
            penalized -= counts * self._frequency + self._presence
        logits[tokens] = penalized

    def accept(self, token: int) -> None:
        self._window[self._accepted % PENALTY_WINDOW] = token
        self._accepted += 1


def token_logprob(logits: Logits, token: int, count: int, vocabulary: Vocabulary) -> TokenLogprob:
    """
    Return the log probability of the token and of the `count` most likely ones, by the model's own
    `logits`, [n_vocab], before bias, penalties and grammar.
    """
    highest = logits.max()
    total = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))

    def probability(token: int) -> TokenProbability:
        piece = vocabulary.pieces[token]
        logprob = max(float(logits[token]) - total, MIN_LOGPROB)
        return TokenProbability(token, piece.decode(errors="replace"), tuple(piece), logprob)

    own = probability(token)
    count = min(count, len(logits))
    top = np.argpartition(logits, -count)[-count:] if count else _ANY_TOKEN[:0]
    top = top[np.argsort(-logits[top], kind="stable")]
    others = tuple(probability(int(token)) for token in top)
    return TokenLogprob(own.id, own.text, own.bytes, own.logprob, others)
