"""The interface between the engine and a model. `llama.py` implements it; tests use a fake."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from services.contract.messages import Sampling, TokenLogprob

# Tokens that one step may compute: llama.cpp's default for its physical batch (`n_ubatch`).
MAX_BATCH_TOKENS = 512
# Tokens that the fastest kernels of a CPU compute together. Others compute the rest of a step, in
# 1.4 to 2.6 times the time per token (`ggml_gemm_q4_K_8x8_q8_K` in ggml-cpu/arch/x86/repack.cpp).
ROW_BLOCK = 16

# Types of the KV cache by llama.cpp's names: kv_cache_types in common/arg.cpp
KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
UNQUANTIZED: tuple[KvType, ...] = ("f32", "f16", "bf16")
FlashAttention = Literal["auto", "on", "off"]


class SampledToken(NamedTuple):
    token: int
    logprob: TokenLogprob | None = None  # if the request asked for it
    is_last: bool = False  # the answer's grammar allows nothing after it
    is_constrained: bool = False  # by a grammar
    mirostat_mu: float | None = None  # Mirostat's state after this token, if the request uses it


class ConstraintFailure(NamedTuple):
    """No token can follow, because of the request's own constraints. The answer ends unfinished."""

    message: str


class ComputeFailure(NamedTuple):
    """
    The model computed nothing usable, so the KV cache of this sequence can't be trusted. The answer
    ends unfinished.
    """

    message: str


SampleResult = SampledToken | ConstraintFailure | ComputeFailure


class Sampler(Protocol):
    """Samples the tokens of one sequence. Its state: penalties, grammar, Mirostat, random draws."""

    def accept(self, token: int) -> SampledToken | ConstraintFailure:
        """Replay a token that another worker sampled: the state is as if it was sampled here."""

    def force(self, tokens: Sequence[int]) -> None:
        """Choose these tokens next, whatever the logits are. A grammar must allow them."""

    def forbid(self, token: int | None) -> None:
        """Exclude this token until another one, or None, is forbidden."""

    def restore(self, mirostat_mu: float) -> None:
        """Set the state of Mirostat, which depends on logits, after the replayed tokens."""

    def close(self) -> None: ...


class Chunk(NamedTuple):
    """
    Consecutive tokens of one sequence to compute in a step: a part of its prompt, or its newest
    token. With a sampler, the token after them is sampled too.
    """

    slot: int
    position: int  # of the first token in the sequence
    tokens: Sequence[int]
    sampler: Sampler | None
    adapter: int = 0  # see adapter_numbers.py; 0: the base model


class SpecialToken(NamedTuple):
    text: str
    is_control: bool  # matched only with special=True; user-defined tokens are always matched


class SequenceState(Protocol):
    """
    A sequence's KV cache, copied to RAM. Only the backend that made it can read it, or one with the
    same model and the same `state_format`.
    """

    @property
    def nbytes(self) -> int: ...

    def tobytes(self) -> bytes: ...


class BackendError(Exception):
    """A step failed. The KV cache of the step's sequences is undefined."""


class StepInterrupted(Exception):
    """`interrupt` ended the step. All slots are as before it."""


class AdapterError(Exception):
    """An adapter's file can't be used with the model. The message says why and what to do."""


class TokenBackend(Protocol):
    """The tokenizer of a model."""

    @property
    def vocabulary_size(self) -> int: ...

    def tokenize(self, text: str, special: bool) -> list[int]:
        """
        Return the tokens of at most `tokenizer.MAX_PART_CHARS` characters; `Tokenizer` accepts
        texts of any length. With `special`, text such as `<|im_end|>` becomes a control token.
        """

    def special_tokens(self) -> dict[int, SpecialToken]:
        """Return the tokens that are matched by their literal text, before all others."""

    def piece(self, token: int) -> bytes:
        """Return the token's bytes: maybe part of a character, empty for a control token."""


class Backend(TokenBackend, Protocol):
    """
    One model with one KV cache, which is divided into numbered slots with one sequence each.
    """

    context: int  # tokens per sequence
    on_gpu: bool  # whether layers are offloaded to a GPU
    is_truncatable: bool  # whether any part of a sequence can be kept, in a slot or in RAM
    can_verify: bool  # whether there is `verify`: what it rejects must be cut off again
    is_reuse_exact: bool  # whether a reused prefix gives the same logits, bit by bit
    state_format: str  # what the bytes of a state depend on, beside the model

    def is_end(self, token: int) -> bool: ...

    def warm_up(self) -> None:
        """Compute a token, in the thread of all steps: what that thread needs is there then."""

    def sampler(
        self, sampling: Sampling, call: str | None = None, prompt: Sequence[int] = ()
    ) -> Sampler:
        """
        Return a sampler constrained by `call`, the Lark of a tool call, or by the format that the
        request asks for. DRY penalises repetition of the `prompt`, too. Thread-safe. Compiling a
        grammar may take a second.

        Raises ServiceError for what the model can't satisfy.
        """

    def decode(
        self,
        chunks: Sequence[Chunk],
        meanwhile: Callable[[], object] = lambda: None,
        padding: Sequence[Chunk] = (),
    ) -> Sequence[SampleResult | None]:
        """
        Compute all chunks in one step, like llama_decode: prefill as well as decode. They must be
        sorted by slot and have the same adapter and the same length. Call `meanwhile` while a GPU
        computes, else once it is done. Return the sampled token of each chunk, None for those
        without a sampler. Raises BackendError and StepInterrupted, without calling `meanwhile`.

        `padding` is chunks in other slots, as long as the others. They are computed in the same
        step, and dropped.
        """

    def interrupt(self) -> None:
        """
        Make the running `decode` of a single chunk raise StepInterrupted soon, if it runs on a CPU
        and `is_truncatable`. The next step is not affected. Thread-safe.
        """

    def max_padded_length(self, streams: int, longest: int) -> int:
        """
        Return the maximum length of a slot that pads the next decode step, counting the token that
        is computed in it; 0: do not pad. `streams` is the number of streams in the step, `longest`
        the length of the longest one after it.
        """

    def verify(self, chunks: Sequence[Chunk]) -> Sequence[Iterator[SampleResult]]:
        """
        Compute chunks like `decode`, each of which has a sampler and drafted tokens behind its
        first one. Return an iterator for each chunk. Its n-th result is sampled from the logits of
        the chunk's n-th token, and valid if the results before it equal the drafted tokens. The
        caller takes them before the next step. Raises BackendError.
        """

    def min_length(self, slot: int) -> int:
        """Return the minimum length to which the slot can be truncated, besides 0."""

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of the slot: none, or at least `min_length`."""

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""

    def save(self, slot: int) -> SequenceState:
        """Copy the slot's sequence to RAM."""

    def state(self, data: bytearray) -> SequenceState:
        """Return the state with these bytes (SequenceState.tobytes), which it may keep."""

    def restore(self, slot: int, state: SequenceState) -> bool:
        """Replace the slot's sequence by a saved one. Return False if that failed."""

    def save_checkpoint(self, slot: int) -> SequenceState:
        """Copy to RAM what can't be truncated of the slot's sequence: the state of its end."""

    def rewind(self, slot: int, length: int, checkpoint: SequenceState) -> bool:
        """
        Keep the first `length` tokens of the slot, by a checkpoint that was saved at this length of
        the same sequence. Return False if that failed: then the slot is undefined.
        """

    def try_adapter(self, path: Path) -> None:
        """Load an adapter's file and compute with it, apart. In any thread. Raises AdapterError."""

    def load_adapter(self, file: int, path: Path) -> None:
        """
        Load an adapter's file, which chunks then use by numbers of `file` (adapter_numbers.py). Not
        during a step. Raises AdapterError.
        """

    def free_adapter(self, file: int) -> None:
        """Free an adapter's file, which no sequence uses any more. Not during a step."""

    def close(self) -> None:
        """Free the model. No other method may be called afterwards."""
