"""
Chooses one sequence's tokens: bias, penalties, grammar, top-k, top-p, min-p, temperature, a seeded
draw, in this order, as llama-server does.
"""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import secrets

import llama_cpp
import numpy as np
import numpy.typing as npt

from services.contract.messages import Sampling
from services.inference.engine.backend import (
    ComputeFailure,
    ConstraintFailure,
    SampledToken,
    SampleResult,
)
from services.inference.engine.sampling.candidates import Candidates, likeliest
from services.inference.engine.sampling.grammar import Grammar, GrammarError
from services.inference.engine.sampling.logprobs import token_logprob
from services.inference.engine.sampling.penalties import Penalties
from services.inference.engine.sampling.vocabulary import Vocabulary

NO_NUMBERS = ComputeFailure("The model computed no numbers (NaN): is its file damaged?")
LEAST_TEMPERATURE = 1e-3  # below it, only the likeliest token has a chance
ONE, ITS_LOGIT = np.zeros(1, np.intp), np.zeros(1, np.float32)  # to draw among

Logits = npt.NDArray[np.float32]


class SamplerChain:
    """
    Temperature 0 takes the likeliest token. The penalties and the grammar remember what was chosen.
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
        self._alternatives = sampling.logprobs
        self._penalties = Penalties(sampling)
        self._grammar = grammar
        self._top_k = sampling.top_k or 0
        self._is_greedy = (sampling.temperature or 0.0) < LEAST_TEMPERATURE
        self._chain = _chain(sampling)

    def choose(self, logits: Logits) -> SampleResult:
        """The next token, by its `logits`, one for each of the vocabulary, which may be changed."""
        own = None if self._alternatives is None else logits.copy()
        self._penalties.apply(logits)
        tokens = self._likeliest(logits)
        if not len(tokens) or not np.isfinite(logits[tokens[0]]):
            return NO_NUMBERS
        try:
            token = self._choose(logits, tokens)
            is_last = self._remember(token)
        except GrammarError as error:
            return ConstraintFailure(f"The answer can't go on by its grammar: {error}.")
        chosen = SampledToken(token, is_last=is_last, is_constrained=self._grammar is not None)
        if own is None:
            return chosen
        logprob = token_logprob(own, token, self._alternatives or 0, self._vocabulary)
        return chosen._replace(logprob=logprob)

    def accept(self, token: int) -> SampledToken | ConstraintFailure:
        self._pass_draws(2 if self._grammar else 1)
        try:
            if self._grammar and not self._grammar.allows(token):
                return ConstraintFailure("its grammar does not allow what it says")
            is_last = self._remember(token)
        except GrammarError as error:
            return ConstraintFailure(f"{error}")
        return SampledToken(token, is_last=is_last, is_constrained=self._grammar is not None)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)

    def _choose(self, logits: Logits, tokens: npt.NDArray[np.intp]) -> int:
        token = self._draw(logits, tokens)
        if self._grammar is None:
            return token
        if not self._grammar.allows(token):
            return self._draw(logits, self._allowed(self._grammar, logits))
        self._pass_draws(1)
        return token

    def _pass_draws(self, count: int) -> None:
        """
        Each token takes as many draws, needed or not, so that where it was chosen elsewhere the
        next one is drawn as there.
        """
        for _ in range(0 if self._is_greedy else count):
            self._candidates.draw(self._chain, ONE, ITS_LOGIT)

    def _remember(self, token: int) -> bool:
        """Whether nothing may follow it."""
        self._penalties.accept(token)
        if self._grammar is None:
            return False
        self._grammar.accept(token)
        return self._grammar.is_finished

    def _likeliest(self, logits: Logits) -> npt.NDArray[np.intp]:
        """What the chain needs to see."""
        return np.array([logits.argmax()]) if self._is_greedy else likeliest(logits, self._top_k)

    def _allowed(self, grammar: Grammar, logits: Logits) -> npt.NDArray[np.intp]:
        """Return the candidates for the chain among the tokens that the grammar allows."""
        np.copyto(logits, -np.inf, where=~grammar.allowed())
        tokens = likeliest(logits, self._top_k)
        if not len(tokens):
            raise GrammarError("it allows no token of this model here")
        return tokens

    def _draw(self, logits: Logits, tokens: npt.NDArray[np.intp]) -> int:
        if self._is_greedy:
            return int(tokens[logits[tokens].argmax()])
        return self._candidates.draw(self._chain, tokens, logits[tokens])


def _chain(sampling: Sampling) -> llama_cpp.llama_sampler_p:
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
