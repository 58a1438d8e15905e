"""What the engine needs of a model. llama.py is the real one; tests script another."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from services.contract.messages import Sampling, TokenLogprob


class Chosen(NamedTuple):
    """A token that a sampler chose."""

    token: int
    logprob: TokenLogprob | None = None  # if the request asked for it
    is_last: bool = False  # the answer's grammar allows nothing after it
    is_constrained: bool = False  # by a grammar


class Stuck(NamedTuple):
    """What was asked of the answer can't be: the sentence says why no token follows."""

    message: str


class NoNumbers(NamedTuple):
    """
    The model computed nothing to choose by: what the cache holds of this sequence can't be trusted.
    """

    message: str


Choice = Chosen | Stuck | NoNumbers


class Sampler(Protocol):
    """Chooses one sequence's tokens; remembers what it chose."""

    def accept(self, token: int) -> Chosen | Stuck:
        """A token that was chosen elsewhere: what comes next is as if it had been chosen here."""

    def close(self) -> None: ...


class Chunk(NamedTuple):
    """
    A run of one sequence's tokens to compute in a step: a piece of its prompt, or its newest token.

    With a sampler, the token that follows the run is chosen too.
    """

    slot: int
    position: int  # of the first token in the sequence
    tokens: Sequence[int]
    sampler: Sampler | None
    adapter: int = 0  # 0: the model as it is


class SpecialToken(NamedTuple):
    text: str
    is_control: bool  # found only where special tokens are on; a user-defined one is found always


class State(Protocol):
    """What was computed of a sequence, in RAM; only the backend that made it can read it."""

    @property
    def nbytes(self) -> int: ...


class BackendError(Exception):
    """
    The model could not compute a step. What the cache holds of the step's sequences is unknown.
    """


class Backend(Protocol):
    """
    One model with one KV cache, in which sequences are told apart by their slot number. Its
    adapters are numbered from 1.
    """

    context: int  # tokens that one sequence can have
    on_gpu: bool  # whether steps are computed there

    @property
    def vocabulary_size(self) -> int: ...

    def tokenize(self, text: str, special: bool) -> list[int]:
        """
        Return the tokens of at most `parts.MAX_CHARS` characters; `Tokenizer` accepts texts of any
        length. With `special`, text such as `<|im_end|>` becomes the control token it names.
        """

    def special_tokens(self) -> dict[int, SpecialToken]:
        """The tokens that are found in a text by their own text, before all others."""

    def piece(self, token: int) -> bytes:
        """The token's bytes, which may be part of a character; none for a control token."""

    def is_end(self, token: int) -> bool: ...

    def sampler(self, sampling: Sampling, call: str | None = None) -> Sampler:
        """
        Return a sampler constrained by `call`, the Lark of a tool call, or by the format that the
        request asks for. May take a second, for a grammar; may be called in any thread.

        Raises ServiceError for what can't be with this model.
        """

    def decode(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        """
        Computes all chunks, which stand in the order of their slots, are of one adapter and of one
        length; the next token of each that has a sampler. Raises BackendError.
        """

    def cut(self, slot: int, length: int) -> bool:
        """
        Keeps the first `length` tokens of what the slot holds. False if this kind of model can't
        keep a part of a sequence (recurrent ones): the slot is empty then.
        """

    def length(self, slot: int) -> int:
        """How many tokens the slot holds."""

    def save(self, slot: int) -> State:
        """A copy of all that was computed of the slot's sequence."""

    def restore(self, slot: int, state: State) -> bool:
        """Puts it into this slot, in the place of what is there. False if that failed."""

    def close(self) -> None:
        """Frees the model; nothing else is called after that."""
