"""The probabilities behind a token. Pure."""

import numpy as np
import numpy.typing as npt

from services.contract.messages import TokenLogprob, TokenProbability
from services.inference.engine.sampling.vocabulary import Vocabulary

LEAST = -9999.0  # for a probability of 0, since JSON has no infinity


def token_logprob(
    logits: npt.NDArray[np.float32], token: int, alternatives: int, vocabulary: Vocabulary
) -> TokenLogprob:
    """Of the model's own `logits`: those before anything changed them."""
    best = logits.max()
    total = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))

    def candidate(token: int) -> TokenProbability:
        piece = vocabulary.pieces[token]
        logprob = max(float(logits[token]) - total, LEAST)
        return TokenProbability(token, piece.decode(errors="replace"), tuple(piece), logprob)

    chosen = candidate(token)
    top = tuple(candidate(int(token)) for token in _likeliest(logits, alternatives))
    return TokenLogprob(chosen.id, chosen.text, chosen.bytes, chosen.logprob, top)


def _likeliest(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    if not count:
        return np.zeros(0, np.intp)
    count = min(count, len(logits))
    top = np.argpartition(logits, -count)[-count:]
    return top[np.argsort(-logits[top], kind="stable")]
