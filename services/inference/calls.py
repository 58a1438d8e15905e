"""
One request in the worker, from its receipt to its Done or Failed: what is sent, and when something
last was.
"""

import asyncio
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from services.contract import prompts, subjects
from services.contract.errors import ServiceError
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    Progress,
    Sampling,
    StreamEvent,
    Token,
)
from services.inference.audience import Listeners
from services.inference.engine.engine import Output
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.replays import Recording
from services.runtime.bus import Bus

BYTES_PER_TOKEN = 4  # of usual text, roughly

T = TypeVar("T")


class Stopped(Exception):
    """The call is to end before it came to the engine."""


class InFlightRequest:
    """
    `request` has its id, and `sampling` is filled in. `attempt` tells this one from others at the
    same request.
    """

    def __init__(
        self,
        bus: Bus,
        tenant: str,
        request: ChatRequest,
        sampling: Sampling,
        adapter: int,
        reply: str,
        worker_id: str,
        attempt: int,
    ) -> None:
        assert request.request_id is not None
        self._bus = bus
        self._worker_id = worker_id
        self.attempt = attempt
        self.reply = reply
        self.recording = Recording(request, worker_id, reply)
        self.audience = Listeners(request.grace_s)
        self._bytes = prompts.size_bytes(request)
        self._last_sent = time.monotonic()
        self.tenant = tenant
        self.request = request
        self.request_id = request.request_id
        self.sampling = sampling
        self.adapter = adapter
        self.asked_at = datetime.now(UTC)
        self.received = self._last_sent
        self.outputs: asyncio.Queue[Output] = asyncio.Queue()
        self.sequence: Sequence | None = None
        # The request with whose exchange the prompt begins. Another worker's is not known here
        self.since = "" if request.resume else self.request_id
        self.text = request.resume.text if request.resume else ""
        self.stop_reason: Literal["cancelled", "timeout"] | None = None
        self._stopped = asyncio.Event()
        self.ended = False

    @property
    def key(self) -> str:
        """Names the request among all tenants' requests."""
        return f"{self.tenant}.{self.request_id}"

    @property
    def sequence_key(self) -> str:
        """Names this attempt in the engine, where one that was ended may still be."""
        return f"{self.key}.{self.attempt}"

    @property
    def session_key(self) -> str:
        return subjects.session_key(self.tenant, self.request.session_id)

    @property
    def unread_bytes(self) -> int:
        """
        Of the prompt, until the model has read it. A text has no more tokens than bytes. What its
        session adds is not known before history answers, and never more than the context window.
        """
        is_read = self.sequence is not None and not self.sequence.remaining_prefill
        return 0 if is_read else self._bytes

    @property
    def unread_tokens(self) -> int:
        """That are to be computed of the prompt; a guess until it is tokenized."""
        if self.sequence is None:
            return self._bytes // BYTES_PER_TOKEN
        return self.sequence.remaining_prefill

    @property
    def said_tokens(self) -> int:
        return len(self.sequence.generated) if self.sequence else 0

    @property
    def place(self) -> int:
        """In the engine's queue, 1 is next; 0: not in it."""
        return self.sequence.queue_position if self.sequence else 0

    @property
    def has_slot(self) -> bool:
        return self.sequence is not None and self.sequence.slot is not None

    def stop(self, reason: Literal["cancelled", "timeout"]) -> None:
        self.stop_reason = self.stop_reason or reason
        self._stopped.set()

    def drop(self) -> None:
        """Nobody hears of it any more."""
        self.ended = True
        self.stop("cancelled")

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives. Raises Stopped as soon as the call is stopped."""
        working = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Stopped
            return working.result()
        finally:
            working.cancel()
            stopped.cancel()

    async def send(self, event: StreamEvent) -> None:
        """Nothing is sent after the end, so that there is exactly one."""
        if self.ended:
            return
        self.ended = isinstance(event, Done | Failed)
        if isinstance(event, Token):
            self.text += event.text
        self._last_sent = time.monotonic()
        self.recording.add(event)
        number = self.audience.next_number()
        unheard = subjects.undelivered(self._worker_id, self.key, self.attempt, number)
        await self._bus.publish(self.reply, event, unheard)

    async def fail(self, error: ServiceError) -> None:
        await self.send(Failed(error.code, error.message, error.retry_after))

    async def keep_alive(self, position: int, interval: float) -> None:
        """A Progress, if nothing was sent for `interval` seconds."""
        if time.monotonic() - self._last_sent >= interval:
            sequence = self.sequence
            total = len(sequence.prompt) if sequence else 0
            read = min(sequence.computed_tokens, total) if sequence else 0
            await self.send(Progress(position, total, read))
