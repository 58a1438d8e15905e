"""
Chooses the tokens of one sequence, in the order of llama-server: logit bias, penalties, DRY,
top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature and a seeded draw; with Mirostat only
logit bias, temperature, Mirostat and the draw. A token that the grammar forbids is drawn again.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from services.contract.messages import Sampling, TokenLogprob, TokenProbability
from services.inference.engine.backend import (
    ComputeFailure,
    ConstraintFailure,
    SampledToken,
    SampleResult,
)
from services.inference.engine.sampling.candidates import Candidates, Logits, TokenIds, likeliest
from services.inference.engine.sampling.draws import MIN_TEMPERATURE, Draws
from services.inference.engine.sampling.grammar import Grammar, GrammarError, Vocabulary
from services.inference.engine.sampling.mirostat import Mirostat
from services.inference.engine.sampling.penalties import Dry, Penalties

NAN_LOGITS = ComputeFailure("The model computed NaN instead of logits. Check its file for damage.")
MIN_LOGPROB = -9999.0  # for a probability of 0, since JSON has no infinity
# llama.cpp's typical sampler makes an entropy of NaN of probabilities that are 0 in float32.
MAX_TYPICAL_GAP = 80.0


class SamplerChain:
    """
    The sampler of one sequence, with the state of its penalties and grammar. Temperature 0 chooses
    the most likely token after the penalties; what else selects candidates has no effect then.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        candidates: Candidates,
        sampling: Sampling,
        grammar: Grammar | None = None,
        dry: Dry | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._sampling = sampling
        self._grammar = grammar
        self._ends = np.array(sorted(vocabulary.ends), np.intp)
        self._min_tokens = math.inf if sampling.ignore_eos else sampling.min_tokens or 0
        self._accepted = 0
        self._penalties = Penalties(sampling)
        self._dry = dry
        temperature = sampling.temperature or 0.0
        self._is_greedy = temperature < MIN_TEMPERATURE
        has_mirostat = sampling.mirostat and not self._is_greedy
        self._mirostat = Mirostat(sampling, temperature) if has_mirostat else None
        self._draws = Draws(candidates, sampling)
        self._forced: deque[int] = deque()
        self._forbidden: int | None = None

    @property
    def mirostat_mu(self) -> float | None:
        """Mirostat's state, which does not follow from the tokens alone; None without Mirostat."""
        return self._mirostat.mu if self._mirostat else None

    def force(self, tokens: Sequence[int]) -> None:
        self._forced.extend(tokens)

    def forbid(self, token: int | None) -> None:
        self._forbidden = token

    def choose(self, logits: Logits) -> SampleResult:
        """Return the next token by its `logits`, [n_vocab], which are changed in place."""
        top_logprobs = self._sampling.logprobs
        unchanged = None if top_logprobs is None else logits.copy()
        self._change(logits)
        tokens = self._select(logits)
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
        return chosen._replace(
            logprob=token_logprob(unchanged, chosen.token, top_logprobs or 0, self._vocabulary)
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

    def restore(self, mirostat_mu: float) -> None:
        """Set Mirostat's state after the tokens that were accepted."""
        if self._mirostat:
            self._mirostat.mu = mirostat_mu

    def close(self) -> None:
        self._draws.close()
        if self._dry:
            self._dry.close()

    def _change(self, logits: Logits) -> None:
        """Apply bias and penalties, exclude the end before `min_tokens`, and what is forbidden."""
        self._penalties.apply(logits)
        if self._dry:
            self._dry.apply(logits)
        if self._accepted < self._min_tokens:
            logits[self._ends] = -np.inf
        if self._forbidden is not None:
            logits[self._forbidden] = -np.inf

    def _select(self, logits: Logits) -> TokenIds:
        """Return the candidates, without logits of -inf and NaN."""
        if self._is_greedy:
            return np.array([logits.argmax()])
        if self._mirostat:
            return self._mirostat.select(logits)
        tokens = likeliest(logits, self._sampling.top_k or 0)
        bound = self._lowest(logits) if len(tokens) else -math.inf
        return tokens if bound == -math.inf else tokens[logits[tokens] >= bound]

    def _lowest(self, logits: Logits) -> float:
        """Return the lowest logit of a candidate, by top-n-sigma and what llama.cpp can compute."""
        sigmas, typical_p = self._sampling.top_n_sigma or 0.0, self._sampling.typical_p or 1.0
        lowest = -math.inf
        if sigmas > 0:  # llama_sampler_top_n_sigma_apply in src/llama-sampler.cpp
            finite = logits[logits > -np.inf]
            lowest = float(finite.max() - sigmas * finite.std())
        if typical_p < 1:
            lowest = max(lowest, float(logits.max()) - MAX_TYPICAL_GAP)
        return lowest

    def _choose(self, logits: Logits, tokens: TokenIds) -> int:
        """
        Return the next forced token. Else draw one, and draw again among the allowed ones if the
        grammar rejects it.
        """
        if self._forced:
            self._skip_draws(2 if self._grammar else 1)
            return self._forced.popleft()
        token = self._draw(logits, tokens)
        if self._grammar and not self._grammar.allows(token):
            token = self._draw(logits, self._allowed(self._grammar, logits))
        elif self._grammar:
            self._skip_draws(1)
        if self._mirostat:
            self._mirostat.observe(float(logits[token]))
        return token

    def _skip_draws(self, count: int) -> None:
        """
        Advance the random number generator. Every token takes the same number of draws, needed or
        not, so that a resumed answer continues with the same random numbers.
        """
        if not self._is_greedy:
            self._draws.skip(count)

    def _commit(self, token: int) -> SampledToken:
        """Update the penalties and the grammar."""
        self._accepted += 1
        self._penalties.accept(token)
        if self._dry:
            self._dry.accept(token)
        chosen = SampledToken(token, mirostat_mu=self.mirostat_mu)
        if self._grammar is None:
            return chosen
        self._grammar.accept(token)
        return chosen._replace(is_last=self._grammar.is_finished, is_constrained=True)

    def _allowed(self, grammar: Grammar, logits: Logits) -> TokenIds:
        """Return the candidates that the grammar allows."""
        np.copyto(logits, -np.inf, where=~grammar.allowed())
        tokens = self._select(logits)
        if not len(tokens) or logits[tokens[0]] == -np.inf:
            raise GrammarError("it allows no token of this model here")
        return tokens

    def _draw(self, logits: Logits, tokens: TokenIds) -> int:
        return int(tokens[0]) if self._is_greedy else self._draws.draw(tokens, logits[tokens])


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
    top = np.argpartition(logits, -count)[-count:] if count else np.zeros(0, np.intp)
    top = top[np.argsort(-logits[top], kind="stable")]
    others = tuple(probability(int(token)) for token in top)
    return TokenLogprob(own.id, own.text, own.bytes, own.logprob, others)
