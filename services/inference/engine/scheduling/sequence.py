"""One request inside the engine: its tokens, its progress, and its answer."""

import threading
import time
from dataclasses import dataclass, field

from services.contract.messages import Sampling, Timings, Usage
from services.inference.engine.backend import ROW_BLOCK, Chunk, Sampler
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.slots import cache_owner
from services.inference.engine.output.generated_answer import GeneratedAnswer
from services.inference.engine.speculation.ngram_drafter import NgramDrafter

# Tokens of a chunk in a deterministic prefill. llama.cpp computes one token alone, and with flash
# attention 64 and more, by other kernels, whose logits differ by up to 0.1 (docs/decisions/0028).
# All chunks but the last are whole blocks (0029).
MIN_DETERMINISTIC_CHUNK, MAX_DETERMINISTIC_CHUNK = 2, 63
MAX_DETERMINISTIC_BLOCKS = MAX_DETERMINISTIC_CHUNK // ROW_BLOCK * ROW_BLOCK


@dataclass(slots=True, eq=False)
class Sequence:
    """
    Stores facts; what follows from them is a property. Owned by the engine's thread once submitted;
    other threads may read its counts and withdraw it. Times are those of time.monotonic(), 0 if not
    reached.
    """

    key: str  # of the request, unique among those in the engine
    prompt: list[int]
    sampling: Sampling  # with max_completion_tokens and stop set
    sampler: Sampler  # closed by the engine
    answer: GeneratedAnswer  # new, or with the tokens emitted before a failover
    adapter: int = 0  # 0: the base model
    session: str = ""  # key of the conversation whose next turn reuses the cache; "": none
    is_deterministic: bool = False  # same logits for each prefill, cold or cached
    is_cache_used: bool = True  # else the whole prompt is prefilled
    tenant: str = prefix.PUBLIC  # whose text the prompt contains
    stable_length: int = 0  # tokens of the prompt that the conversation's next one repeats
    prefill_tokens: list[int] = field(init=False)  # the prompt, and the answer before a failover
    prefix_key: bytes = field(init=False)  # `prefill_tokens` without the last, always computed ones
    cached_estimate: int = 0  # length of the cached prefix when last checked, while it waits
    computed_tokens: int = 0  # that the slot holds, including the cached ones
    cached_tokens: int = 0  # that the slot held when the sequence got it
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones
    drafter: NgramDrafter | None = None  # made when the sequence may have a draft
    queue_position: int = 0  # 1 is next; 0: not waiting
    slot: int | None = None
    received_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0  # it got a slot
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    last_emit_at: float = 0.0
    is_withdrawn: bool = field(default=False, init=False)
    _claim: threading.Lock = field(default_factory=threading.Lock, init=False)  # never released

    def __post_init__(self) -> None:
        self.prefill_tokens = [*self.prompt, *self.answer.tokens]
        # the last token is always computed, since its logits are needed
        min_computed = MIN_DETERMINISTIC_CHUNK if self.is_deterministic else 1
        reusable = self.prefill_tokens[:-min_computed] if self.is_cache_used else []
        self.prefix_key = prefix.pack(self.adapter, reusable, self.is_deterministic, self.tenant)

    @property
    def reusable_stable_length(self) -> int:
        """The stable tokens of `prefix_key`, at least 1."""
        return min(self.stable_length or len(self.prompt), prefix.length(self.prefix_key)) or 1

    @property
    def owner(self) -> str:
        return cache_owner(self.adapter, self.session)

    @property
    def generated(self) -> list[int]:
        return self.answer.tokens

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def is_prefilled(self) -> bool:
        """Whether all tokens but the newest are computed, so that a decode step is next."""
        return self.length - 1 == self.computed_tokens >= len(self.prefill_tokens)

    @property
    def remaining_prefill(self) -> int:
        """Tokens to compute before the first one is sampled: an estimate while it waits."""
        done = self.cached_estimate if self.slot is None else self.computed_tokens
        return max(0, len(self.prefill_tokens) - done)

    @property
    def remaining_tokens(self) -> int:
        """The most tokens that may still be generated."""
        return self.answer.remaining_tokens

    def claim(self) -> bool:
        """Return whether the engine may start the sequence: not if it was withdrawn."""
        return self._claim.acquire(blocking=False)

    def withdraw(self) -> bool:
        """Keep the engine from starting the sequence, in any thread. Return False if it has."""
        if not self._claim.acquire(blocking=False):
            return False
        self.is_withdrawn = True
        return True

    def next_chunk(self, max_tokens: int, pause: int = 0) -> Chunk:
        """
        Return the next at most `max_tokens` tokens to compute, or one more that a deterministic
        prefill can't compute alone; it must have a slot. The prefill pauses where `pause` tokens
        are computed; 0: nowhere.
        """
        assert self.slot is not None
        start = self.computed_tokens
        tokens = self._next_tokens(max_tokens, pause or len(self.prefill_tokens))
        sampler = self.sampler if start + len(tokens) == self.length else None
        return Chunk(self.slot, start, tokens, sampler, self.adapter)

    def _next_tokens(self, max_tokens: int, end: int) -> list[int]:
        if self.is_prefilled:
            return self.generated[-1:]
        left = end - self.computed_tokens
        if self.is_deterministic:
            is_long = left > MAX_DETERMINISTIC_CHUNK
            max_tokens = min(max_tokens, MAX_DETERMINISTIC_BLOCKS if is_long else left)
            if left - max_tokens < MIN_DETERMINISTIC_CHUNK:
                max_tokens = left
        return self.prefill_tokens[self.computed_tokens : end][:max_tokens]

    @property
    def usage(self) -> Usage:
        prompt = len(self.prompt)
        return Usage(
            prompt,
            len(self.generated),
            min(prompt, self.cached_tokens),
            self.answer.reasoning_tokens,
            self.drafted_tokens,
            self.accepted_tokens,
        )

    @property
    def timings(self) -> Timings:
        queued = (self.started_at or time.monotonic()) - self.received_at
        prefill = self.first_token_at - self.started_at if self.first_token_at else 0.0
        decode = self.last_token_at - self.first_token_at
        return Timings(round(queued, 6), round(prefill, 6), round(decode, 6))
