"""
Idle prefill: while the engine has no request, it computes prompts that conversations will probably
send next.
"""

import logging
from typing import NamedTuple

from services.inference.engine.adapter_numbers import file_of
from services.inference.engine.backend import Backend, BackendError, Chunk
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.slots import Lease, Slots, cache_owner

MAX_WAITING = 16  # conversations; the oldest one is dropped for a new one

log = logging.getLogger(__name__)


class IdlePrompt(NamedTuple):
    """The part of a conversation's next prompt that is known before its question."""

    tokens: list[int]
    adapter: int
    session: str
    tenant: str = prefix.PUBLIC

    @property
    def owner(self) -> str:
        return cache_owner(self.adapter, self.session)

    @property
    def prefix_key(self) -> bytes:
        return prefix.pack(self.adapter, self.tokens, tenant=self.tenant)


class IdlePrefill:
    """Prefills the newest prompt of each conversation, first come, first served."""

    def __init__(self, backend: Backend, slots: Slots) -> None:
        self._backend = backend
        self._slots = slots
        self._waiting: dict[str, IdlePrompt] = {}  # by owner, oldest first
        self._computed = 0  # tokens of the oldest one

    def add(self, prompt: IdlePrompt) -> None:
        self.cancel(prompt.owner)
        self._waiting[prompt.owner] = prompt
        if len(self._waiting) > MAX_WAITING:
            self.cancel(next(iter(self._waiting)))

    def cancel(self, owner: str) -> None:
        self._waiting.pop(owner, None)
        self._computed = 0

    def forget_session(self, session: str) -> None:
        """Drop the conversation's prompts, with any adapter."""
        for prompt in list(self._waiting.values()):
            if prompt.session == session:
                self.cancel(prompt.owner)

    def forget_adapter(self, file: int) -> None:
        """Drop the prompts that use an adapter's file."""
        for prompt in list(self._waiting.values()):
            if file_of(prompt.adapter) == file:
                self.cancel(prompt.owner)

    def step(self, max_tokens: int) -> bool:
        """
        Prefill the next chunk of the oldest prompt; all slots must be free. Return False if no
        prompt is waiting.
        """
        if not self._waiting:
            return False
        prompt = next(iter(self._waiting.values()))
        lease = self._slots.acquire(prompt.prefix_key, prompt.owner)
        is_lost = lease.cached < self._computed  # recurrent models can't keep a part of a sequence
        tokens = prompt.tokens[lease.cached : lease.cached + max_tokens]
        if is_lost or not tokens or not self._compute(prompt, lease, tokens):
            self.cancel(prompt.owner)
        self._slots.release(lease.slot)
        return True

    def _compute(self, prompt: IdlePrompt, lease: Lease, tokens: list[int]) -> bool:
        try:
            self._backend.decode([Chunk(lease.slot, lease.cached, tokens, None, prompt.adapter)])
        except BackendError as error:
            log.error("idle prefill failed error=%s", error)
            self._slots.invalidate(lease.slot)
            return False
        self._slots.extend(lease.slot, tokens)
        self._computed = lease.cached + len(tokens)
        return True
