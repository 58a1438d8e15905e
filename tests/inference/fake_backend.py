"""A backend with scripted answers and a token per byte, which checks what the engine does."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import json

from services.contract.messages import Sampling
from services.inference.engine.adapter_numbers import file_of
from services.inference.engine.backend import (
    AdapterError,
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
BAD_ADAPTER = b"bad"  # the file of an adapter that can't be loaded starts so
NAN = 0  # for this byte of an answer, the logits are invalid
VOCABULARY = Vocabulary([*(bytes([byte]) for byte in range(256)), b""], frozenset([END]))


class Script:
    """
    The sampler of one sequence. It emits the answer to its prompt and ends; with a grammar, it
    fails at the first token that the grammar forbids.
    """

    def __init__(self, sampling: Sampling, call: str | None = None) -> None:
        constraints.check_logit_bias(sampling, VOCABULARY)
        self.grammar = constraints.compile_grammar(sampling, call, VOCABULARY)
        self.emitted: list[int] = []
        self.answer: list[int] | None = None
        self.forced: list[int] = []
        self.forbidden: int | None = None
        self.closed = False

    def begin(self, answer: list[int]) -> None:
        count = len(self.emitted)
        assert answer[:count] == self.emitted, "a resumed answer starts with other tokens"
        self.answer = answer[count:]

    def choose(self) -> SampleResult:
        assert self.answer is not None
        if self.forced:
            return self.accept(self.forced[0])
        if self.answer[0] == NAN:
            return ComputeFailure("scripted")
        if self.answer[0] == self.forbidden:
            self.answer.pop(0)
        return self.accept(self.answer.pop(0))

    def force(self, tokens: Sequence[int]) -> None:
        self.forced += tokens

    def forbid(self, token: int | None) -> None:
        """A forbidden token is left out of the answer."""
        self.forbidden = token

    def accept(self, token: int) -> SampledToken | ConstraintFailure:
        if self.forced and self.forced.pop(0) != token:
            return ConstraintFailure("scripted")
        self.emitted.append(token)
        if self.grammar is None:
            return SampledToken(token)
        if not self.grammar.allows(token):
            return ConstraintFailure("scripted")
        self.grammar.accept(token)
        return SampledToken(token, is_last=self.grammar.is_finished, is_constrained=True)

    def restore(self, mirostat_mu: float) -> None:
        raise AssertionError("a script has no Mirostat")

    def close(self) -> None:
        assert not self.closed, "a sampler is closed twice"
        self.closed = True


class FakeState(NamedTuple):
    cells: tuple[int, ...]
    adapter: int

    @property
    def nbytes(self) -> int:
        return len(self.cells)

    def tobytes(self) -> bytes:
        return json.encode(self)


class FakeBackend:
    """
    `answers` maps the end of a prompt to its answer, which is upper-cased with an adapter, and in
    which NAN makes this sequence fail. Set `fails` to make the next step fail.

    With a `window`, the state can't be cut anywhere: each token needs that of as many tokens before
    it. A slot keeps that of twice as many, copies only that of the last ones. 0: the state of a
    recurrent model, which has no part for each token.

    With `can_verify`, answers that repeat something may take fewer steps than tokens.
    """

    def __init__(
        self,
        answers: dict[str, bytes],
        context: int = 1000,
        step_seconds: float = 0,
        window: int | None = None,
        can_verify: bool = False,
    ) -> None:
        self.context = context
        self.is_truncatable = window is None
        self.can_verify = can_verify
        self.is_reuse_exact = not window
        self.state_format = "fake"
        self.window = window
        self.starts: dict[int, int] = {}  # by slot: the first token whose state there is
        self.checkpoints = 0  # saved
        self.rewound = 0  # slots
        self.on_gpu = self.pads = False
        self.vocabulary_size = len(VOCABULARY)
        self.cells: dict[int, list[int]] = {}
        self.adapters: dict[int, int] = {}  # by slot
        self.computed = 0  # tokens, over all steps
        self.restored = 0  # tokens, over all states
        self.saved = 0  # states
        self.steps: list[list[Chunk]] = []
        self.padded: list[list[int]] = []  # slots, by step
        self.verified: list[list[Chunk]] = []  # those of the steps that have drafts
        self.samplers: list[Script] = []
        self.loaded: list[int] = []  # files of adapters
        self.freed: list[int] = []
        self.fails = False
        self.interruptions = 0
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

    def sampler(
        self, sampling: Sampling, call: str | None = None, prompt: Sequence[int] = ()
    ) -> Script:
        self.samplers.append(Script(sampling, call))
        return self.samplers[-1]

    def warm_up(self) -> None:
        pass

    def decode(
        self,
        chunks: Sequence[Chunk],
        meanwhile: Callable[[], object] = lambda: None,
        padding: Sequence[Chunk] = (),
    ) -> Sequence[SampleResult | None]:
        self._begin_step(chunks)
        self.padded.append([chunk.slot for chunk in padding])
        for chunk in padding:
            assert chunk.slot not in {other.slot for other in chunks}, "padding is between streams"
            assert chunk.position == self.length(chunk.slot) < self.context
        scripts = [self._compute(chunk) for chunk in chunks]
        meanwhile()
        return [None if script is None else script.choose() for script in scripts]

    def interrupt(self) -> None:
        self.interruptions += 1

    def max_padded_length(self, streams: int, longest: int) -> int:
        return longest if self.pads else 0

    def _begin_step(self, chunks: Sequence[Chunk]) -> None:
        if self.fails:
            self.fails = False
            raise BackendError("scripted")
        time.sleep(self._step_seconds)
        self.steps.append(list(chunks))
        assert len({chunk.adapter for chunk in chunks}) == 1, "adapters differ"
        assert file_of(chunks[0].adapter) not in self.freed, "a freed adapter is used"
        assert len({len(chunk.tokens) for chunk in chunks}) == 1, "chunk lengths differ"
        slots = [chunk.slot for chunk in chunks]
        assert slots == sorted(slots), "chunks are not sorted by slot"

    def verify(self, chunks: Sequence[Chunk]) -> Sequence[Iterator[SampleResult]]:
        assert self.can_verify, "nobody should have asked for it"
        assert len(chunks[0].tokens) > 1, "nothing is drafted"
        self._begin_step(chunks)
        self.verified.append(list(chunks))
        return [self._choices(chunk, self._compute(chunk)) for chunk in chunks]

    def _choices(self, chunk: Chunk, script: Script | None) -> Iterator[SampleResult]:
        assert script
        drafted = chunk.tokens[1:]
        before = len(script.emitted)
        for count, _ in enumerate(chunk.tokens):
            assert script.emitted[before:] == drafted[:count], "sampling goes on after a miss"
            yield script.choose()

    def min_length(self, slot: int) -> int:
        start = self.starts.get(slot, 0)
        return start + self.window if start and self.window is not None else 0

    def truncate(self, slot: int, length: int) -> None:
        tokens = self.cells.get(slot, [])
        assert length <= len(tokens), "the slot has fewer tokens"
        assert length in (0, len(tokens)) or length >= self.min_length(slot), "it can't be cut here"
        self.cells[slot] = tokens[:length]
        if not length:
            self.starts[slot] = 0

    def length(self, slot: int) -> int:
        return len(self.cells.get(slot, []))

    def save(self, slot: int) -> SequenceState:
        self.saved += 1
        return FakeState(tuple(self.cells[slot]), self.adapters.get(slot, 0))

    def state(self, data: bytearray) -> FakeState:
        return json.decode(data, type=FakeState)

    def restore(self, slot: int, state: SequenceState) -> bool:
        assert isinstance(state, FakeState)
        self.cells[slot] = list(state.cells)
        self.adapters[slot] = state.adapter
        self.starts[slot] = self._start_of_copy(len(state.cells))
        self.restored += len(state.cells)
        return True

    def save_checkpoint(self, slot: int) -> SequenceState:
        self.checkpoints += 1
        return FakeState(tuple(self.cells[slot]), self.adapters.get(slot, 0))

    def rewind(self, slot: int, length: int, checkpoint: SequenceState) -> bool:
        assert isinstance(checkpoint, FakeState) and checkpoint.adapter == self.adapters[slot]
        assert self.cells[slot][:length] == list(checkpoint.cells), "it is of other tokens"
        del self.cells[slot][length:]
        self.starts[slot] = self._start_of_copy(length)
        self.rewound += 1
        return True

    def _start_of_copy(self, length: int) -> int:
        return 0 if self.window is None else max(0, length - self.window)

    def try_adapter(self, path: Path) -> None:
        pass

    def load_adapter(self, file: int, path: Path) -> None:
        assert file not in self.loaded, "a number of an adapter is reused"
        if path.read_bytes().startswith(BAD_ADAPTER):
            raise AdapterError(f"{path} is bad.")
        self.loaded.append(file)

    def free_adapter(self, file: int) -> None:
        self.freed.append(file)

    def close(self) -> None:
        self.closed = True

    def _compute(self, chunk: Chunk) -> Script | None:
        """Add the chunk to its slot, and return its sampler, which knows what to answer."""
        tokens = self.cells.setdefault(chunk.slot, [])
        assert chunk.position == len(tokens), "a chunk leaves a gap or computes tokens twice"
        assert chunk.tokens, "a chunk is empty"
        if not tokens:
            self.adapters[chunk.slot] = chunk.adapter
        assert chunk.adapter == self.adapters.get(chunk.slot, 0), "a sequence changes its adapter"
        start = self.starts.get(chunk.slot, 0)
        if self.window is not None:
            assert start <= max(0, len(tokens) - self.window), "the state before a token is lost"
            self.starts[chunk.slot] = max(start, len(tokens) + len(chunk.tokens) - 2 * self.window)
        tokens.extend(chunk.tokens)
        assert len(tokens) <= self.context, "a sequence is longer than its context window"
        self.computed += len(chunk.tokens)
        if chunk.sampler is None:
            return None
        assert isinstance(chunk.sampler, Script)
        if chunk.sampler.answer is None:
            prompt = tokens[: len(tokens) - len(chunk.sampler.emitted)]
            answer = self._answer_to(b"".join(map(self.piece, prompt)))
            chunk.sampler.begin([*(bytes(answer).upper() if chunk.adapter else answer), END])
        return chunk.sampler

    def _answer_to(self, prompt: bytes) -> Sequence[int]:
        return next(a for end, a in self._answers.items() if prompt.endswith(end.encode()))
