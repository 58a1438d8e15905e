"""Keeps contexts of sessions that the worker served last, so that history is not asked again."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from msgspec.structs import replace

from services.contract.codec import encode
from services.contract.history import Context, ContextReply, Exchange, Window, newest_turns
from services.contract.messages import Turn
from services.inference.limits import InferenceLimits
from services.runtime.streams import StoredMessage

LOGGED_AT_BYTES = 64  # of JSON: history counts a turn with `logged_at` and `"correction":null`
ENTRY_BYTES = 2048  # memory of a context beside its turns
TURN_BYTES = 512  # memory of a turn beside its texts
CHAR_BYTES = 8  # memory of a character beyond ASCII: as Python and as UTF-8 have it


@dataclass(frozen=True)
class CachedContext:
    """
    The context that history replied at a (monotonic) time, with the exchanges that this worker has
    appended since. `record` is the digest of the session's last record, if that is one of them.
    """

    context: Context
    window: Window
    replied_at: float
    record: bytes | None = None

    @cached_property
    def memory(self) -> int:
        """An estimate in bytes."""
        texts = _memory_of(self.context.system_prompt or "")
        return ENTRY_BYTES + texts + sum(map(_memory_of_turn, self.context.turns))

    def ends_with(self, last: StoredMessage | None) -> bool:
        """
        Return whether this is the session's last record. A restored or repaired log reuses
        sequences, but never for the same record.
        """
        if last is None or last.seq != self.context.applied_seq:
            return False
        return self.record == _digest(last.data)

    def after(self, exchange: Exchange, seq: int, data: bytes) -> "CachedContext | None":
        """
        Return it with one more exchange, which was appended as `data` directly after its last
        record. None if only history knows what follows from that.
        """
        window, context = self.window, replace(self.context, applied_seq=seq)
        if exchange.turn is None:  # a tree of responses has no turns
            turn = exchange.as_turn
            room = window.room - len(encode(turn)) - LOGGED_AT_BYTES
            if room < 0 or not _is_ordinary(exchange, self.context):
                return None
            turns = newest_turns((*context.turns, turn), window.exchanges)
            window = replace(window, room=room)
            context = replace(context, turns=turns, last=turn.request_id, unreplaced="")
        return CachedContext(context, window, self.replied_at, _digest(data))


class ContextCache:
    """
    Contexts by the keys of their sessions, which contain the tenant. They are bounded by number,
    memory and age; those that were used last are kept.
    """

    def __init__(self, limits: InferenceLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._contexts: OrderedDict[str, CachedContext] = OrderedDict()
        self._memory = 0
        self._cleared_at = -math.inf

    def __len__(self) -> int:
        return len(self._contexts)

    def get(self, key: str) -> CachedContext | None:
        self._evict()
        cached = self._contexts.get(key)
        if cached is None or self._is_expired(cached):
            return None
        self._contexts.move_to_end(key)
        return cached

    def put(self, key: str, reply: ContextReply, asked_at: float) -> None:
        """
        Keep what history has replied, in place of what is known; nothing without a window, or if it
        was asked before the cache was cleared.
        """
        known = self._contexts.get(key)
        self.drop(key)
        if reply.window is not None and asked_at > self._cleared_at:
            context = Context(*(getattr(reply, name) for name in Context.__struct_fields__))
            record = known.record if known and known.context == context else None
            self._add(key, CachedContext(context, reply.window, asked_at, record))

    def advance(self, key: str, exchange: Exchange, seq: int, data: bytes) -> None:
        """Add an exchange that was appended as `data`, or drop a context that lacks others."""
        cached = self.get(key)
        self.drop(key)
        if cached and cached.context.applied_seq == exchange.previous:
            if advanced := cached.after(exchange, seq, data):
                self._add(key, advanced)

    def drop(self, key: str, outdated: CachedContext | None = None) -> None:
        """Drop the session's context; with `outdated` only if it still is this one."""
        cached = self._contexts.get(key)
        if cached and (outdated is None or outdated is cached):
            del self._contexts[key]
            self._memory -= cached.memory

    def clear(self) -> None:
        """Drop all contexts, and those of replies that are still to come."""
        self._contexts.clear()
        self._memory = 0
        self._cleared_at = self._clock()

    def _add(self, key: str, cached: CachedContext) -> None:
        self._contexts[key] = cached
        self._memory += cached.memory
        self._evict()

    def _evict(self) -> None:
        """Drop the least recently used contexts while there are too many, or that one is old."""
        while self._contexts:
            oldest = next(iter(self._contexts))
            if not (self._is_too_large or self._is_expired(self._contexts[oldest])):
                return
            self.drop(oldest)

    @property
    def _is_too_large(self) -> bool:
        limits = self._limits
        is_heavy = self._memory > limits.max_cached_context_bytes
        return is_heavy or len(self._contexts) > limits.max_cached_contexts

    def _is_expired(self, cached: CachedContext) -> bool:
        return self._clock() - cached.replied_at > self._limits.cached_context_seconds


def _is_ordinary(exchange: Exchange, context: Context) -> bool:
    """Return whether the exchange is added to the context, and nothing else changes."""
    is_known = any(turn.request_id == exchange.request_id for turn in context.turns)
    is_current = exchange.epoch == context.epoch and not is_known
    return is_current and exchange.has_answer and not exchange.retry_of


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _memory_of_turn(turn: Turn) -> int:
    size = sum(map(_memory_of, (turn.prompt, turn.response, turn.reasoning)))
    has_tools = turn.tool_calls or turn.tool_results
    return TURN_BYTES + size + (CHAR_BYTES * len(encode(turn)) if has_tools else 0)


def _memory_of(text: str) -> int:
    return len(text) * (1 if text.isascii() else CHAR_BYTES)
