"""
A backend with a real tokenizer and scripted logits. They depend on the tokens alone, so they are
the same to the last bit however a sequence was computed.
"""

from collections.abc import Callable, Sequence

import numpy as np

from services.inference.engine.backend import Chunk, SampleResult, SequenceState
from services.inference.engine.sampling.candidates import Candidates, Logits
from services.inference.engine.sampling.sampler import SamplerChain
from tests.inference.fake_backend import FakeState
from tests.inference.vocabulary import VocabularyBackend, load_vocabulary

LIKELY = 10.0  # about as likely as all other tokens of a vocabulary of 100,000 together
SPREAD = 2.0


class ScriptedLogits(VocabularyBackend):
    """Answers PROMPT with `text`, unless sampling chooses an unlikely token; then it ends."""

    PROMPT = (5, 6, 7)

    def __init__(self, name: str, text: str) -> None:
        self._shared = load_vocabulary(name)  # frees the vocabulary with its last reference
        vars(self).update(vars(self._shared))
        self._candidates = Candidates(self.vocabulary_size)
        self._script = [*self.tokenize(text, special=False), min(self._vocabulary.ends)]
        noise = np.random.default_rng(1).normal(0, SPREAD, self.vocabulary_size)
        self._noise = noise.astype(np.float32)
        self._cells: dict[int, list[int]] = {}
        self.is_truncatable = self.is_reuse_exact = True
        self.on_gpu = self.can_verify = False

    def decode(
        self,
        chunks: Sequence[Chunk],
        meanwhile: Callable[[], object] = lambda: None,
        padding: Sequence[Chunk] = (),
    ) -> Sequence[SampleResult | None]:
        meanwhile()
        return [self._compute_one(chunk) for chunk in chunks]

    def interrupt(self) -> None:
        pass

    def max_padded_length(self, streams: int, longest: int) -> int:
        return 0

    def min_length(self, slot: int) -> int:
        return 0

    def truncate(self, slot: int, length: int) -> None:
        self._cells[slot] = self._cells.get(slot, [])[:length]

    def length(self, slot: int) -> int:
        return len(self._cells.get(slot, []))

    def save(self, slot: int) -> SequenceState:  # type: ignore[override]
        return FakeState(tuple(self._cells[slot]), 0)

    def _compute_one(self, chunk: Chunk) -> SampleResult | None:
        cells = self._cells.setdefault(chunk.slot, [])
        assert chunk.position == len(cells)
        cells.extend(chunk.tokens)
        if chunk.sampler is None:
            return None
        assert isinstance(chunk.sampler, SamplerChain)
        return chunk.sampler.choose(self._logits_after(cells))

    def _logits_after(self, cells: list[int]) -> Logits:
        generated = len(cells) - len(self.PROMPT)
        logits = np.roll(self._noise, 7919 * cells[-1] + 104_729 * generated)
        logits[self._script[min(generated, len(self._script) - 1)]] = LIKELY
        return logits
