"""What conversations will go on with, read while the engine has nothing else to do."""

import logging
from typing import NamedTuple

from services.inference.engine.backend import Backend, BackendError, Chunk
from services.inference.engine.kv_cache import prefix
from services.inference.engine.kv_cache.slots import Lease, Slots
from services.inference.engine.scheduling.sequence import owner

MOST = 16  # conversations that wait for it; the oldest are left out

log = logging.getLogger(__name__)


class IdlePrompt(NamedTuple):
    """All that is known already of a conversation's next prompt."""

    tokens: list[int]
    adapter: int
    session: str
    tenant: str = prefix.PUBLIC

    @property
    def owner(self) -> str:
        return owner(self.adapter, self.session)

    @property
    def run(self) -> bytes:
        return prefix.pack(self.adapter, self.tokens, tenant=self.tenant)


class IdlePrefill:
    """
    A conversation's newest beginning is read, the conversations in the order in which they came.
    """

    def __init__(self, backend: Backend, slots: Slots) -> None:
        self._backend = backend
        self._slots = slots
        self._beginnings: dict[str, IdlePrompt] = {}
        self._computed = 0  # tokens of the first of them

    def add(self, beginning: IdlePrompt) -> None:
        self.forget(beginning.owner)
        self._beginnings[beginning.owner] = beginning
        if len(self._beginnings) > MOST:
            self.forget(next(iter(self._beginnings)))

    def forget(self, owner: str) -> None:
        """The conversation goes on, or has been read."""
        self._beginnings.pop(owner, None)
        self._computed = 0

    def read(self, most: int) -> bool:
        """
        Some of one, at most so many tokens, while all slots are free. False if nothing is left.
        """
        if not self._beginnings:
            return False
        beginning = next(iter(self._beginnings.values()))
        lease = self._slots.acquire(beginning.run, beginning.owner)
        if lease.cached < self._computed:
            self.forget(beginning.owner)  # this kind of model does not keep it
        else:
            self._compute(beginning, lease, most)
        self._slots.release(lease.slot)
        return True

    def _compute(self, beginning: IdlePrompt, lease: Lease, most: int) -> None:
        tokens = beginning.tokens[lease.cached : lease.cached + most]
        if not tokens:
            self.forget(beginning.owner)
            return
        try:
            self._backend.decode([Chunk(lease.slot, lease.cached, tokens, None, beginning.adapter)])
        except BackendError as error:
            log.error("a conversation could not be read ahead: %s", error)
            self._slots.forget(lease.slot)
            self.forget(beginning.owner)
        else:
            self._slots.update(lease.slot, tokens)
            self._computed = lease.cached + len(tokens)
