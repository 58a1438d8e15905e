"""A model whose answers are written down, a token per byte; it checks what each slot holds."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from services.contract.messages import Sampling
from services.inference.engine.backend import (
    BackendError,
    Chunk,
    ComputeFailure,
    ConstraintFailure,
    SampledToken,
    SampleResult,
    SequenceState,
    SpecialToken,
)
from services.inference.engine.sampling import constraints
from services.inference.engine.sampling.grammar import Vocabulary

END = 256
NAN = 0  # where an answer has this byte, the model computes no numbers
VOCABULARY = Vocabulary([*(bytes([byte]) for byte in range(256)), b""], frozenset([END]))


class Script:
    """
    The sampler of one sequence: says the answer that belongs to its prompt, then ends; by a
    grammar, as far as it is right.
    """

    def __init__(self, sampling: Sampling, call: str | None = None) -> None:
        constraints.check_logit_bias(sampling, VOCABULARY)
        self.grammar = constraints.compile_grammar(sampling, call, VOCABULARY)
        self.said: list[int] = []
        self.answer: list[int] | None = None
        self.closed = False

    def begin(self, answer: list[int]) -> None:
        said = len(self.said)
        assert answer[:said] == self.said, "what goes on is what was said"
        self.answer = answer[said:]

    def choose(self) -> SampleResult:
        assert self.answer is not None
        if self.answer[0] == NAN:
            return ComputeFailure("scripted")
        return self.accept(self.answer.pop(0))

    def accept(self, token: int) -> SampledToken | ConstraintFailure:
        self.said.append(token)
        if self.grammar is None:
            return SampledToken(token)
        if not self.grammar.allows(token):
            return ConstraintFailure("scripted")
        self.grammar.accept(token)
        return SampledToken(token, is_last=self.grammar.is_finished, is_constrained=True)

    def close(self) -> None:
        assert not self.closed, "a sampler is closed once"
        self.closed = True


class FakeState(NamedTuple):
    cells: tuple[int, ...]
    adapter: int

    @property
    def nbytes(self) -> int:
        return len(self.cells)


class FakeBackend:
    """
    `answers` maps the end of a prompt to what is said, in capitals with an adapter, and NAN where
    the model fails for this sequence alone; `fails` makes the next step fail.
    """

    def __init__(
        self, answers: dict[str, bytes], context: int = 1000, step_seconds: float = 0
    ) -> None:
        self.context = context
        self.on_gpu = False
        self.vocabulary_size = len(VOCABULARY)
        self.cells: dict[int, list[int]] = {}
        self.adapters: dict[int, int] = {}  # that the cells of a slot were computed with
        self.computed = 0  # tokens, over all steps
        self.restored = 0  # tokens of states
        self.saved = 0  # states
        self.steps: list[list[Chunk]] = []
        self.samplers: list[Script] = []
        self.fails = False
        self.closed = False
        self._answers = answers
        self._step_seconds = step_seconds

    def tokenize(self, text: str, special: bool) -> list[int]:
        return list(text.encode())

    def special_tokens(self) -> dict[int, SpecialToken]:
        return {}

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""

    def is_end(self, token: int) -> bool:
        return token == END

    def sampler(self, sampling: Sampling, call: str | None = None) -> Script:
        self.samplers.append(Script(sampling, call))
        return self.samplers[-1]

    def decode(self, chunks: Sequence[Chunk]) -> Sequence[SampleResult | None]:
        if self.fails:
            self.fails = False
            raise BackendError("scripted")
        time.sleep(self._step_seconds)
        self.steps.append(list(chunks))
        assert len({chunk.adapter for chunk in chunks}) == 1, "a step has one adapter"
        assert len({len(chunk.tokens) for chunk in chunks}) == 1, "its chunks have one length"
        slots = [chunk.slot for chunk in chunks]
        assert slots == sorted(slots), "they stand in the order of their slots"
        return [self._compute(chunk) for chunk in chunks]

    def truncate(self, slot: int, length: int) -> bool:
        held = self.cells.get(slot, [])
        assert length <= len(held), "only what is held can be kept"
        self.cells[slot] = held[:length]
        return True

    def length(self, slot: int) -> int:
        return len(self.cells.get(slot, []))

    def save(self, slot: int) -> SequenceState:
        self.saved += 1
        return FakeState(tuple(self.cells[slot]), self.adapters.get(slot, 0))

    def restore(self, slot: int, state: SequenceState) -> bool:
        assert isinstance(state, FakeState)
        self.cells[slot] = list(state.cells)
        self.adapters[slot] = state.adapter
        self.restored += len(state.cells)
        return True

    def close(self) -> None:
        self.closed = True

    def _compute(self, chunk: Chunk) -> SampleResult | None:
        held = self.cells.setdefault(chunk.slot, [])
        assert chunk.position == len(held), "a sequence has no gaps and computes nothing twice"
        assert chunk.tokens, "a chunk is never empty"
        if not held:
            self.adapters[chunk.slot] = chunk.adapter
        computed_with = self.adapters.get(chunk.slot, 0)
        assert chunk.adapter == computed_with, "a sequence has one adapter"
        held.extend(chunk.tokens)
        self.computed += len(chunk.tokens)
        if chunk.sampler is None:
            return None
        assert isinstance(chunk.sampler, Script)
        if chunk.sampler.answer is None:
            prompt = held[: len(held) - len(chunk.sampler.said)]
            said = self._answer_to(b"".join(map(self.piece, prompt)))
            chunk.sampler.begin([*(bytes(said).upper() if chunk.adapter else said), END])
        return chunk.sampler.choose()

    def _answer_to(self, prompt: bytes) -> Sequence[int]:
        return next(a for end, a in self._answers.items() if prompt.endswith(end.encode()))
