"""In-flight requests, from admission to Done or Failed, and whether there is room for more."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from services.contract import prompts, subjects
from services.contract.answer import Answer
from services.contract.errors import ServiceError
from services.contract.messages import (
    Cancel,
    ChatRequest,
    Done,
    Failed,
    Progress,
    Sampling,
    Started,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.inference.adapters import Variant
from services.inference.engine.engine import Output
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.engine.scheduling.tenant_shares import has_room
from services.inference.limits import InferenceLimits
from services.inference.replay import Listeners, Recording
from services.inference.settings import InferenceSettings
from services.runtime.bus import Bus
from services.runtime.tasks import run_until

BYTES_PER_TOKEN = 4  # of usual text, roughly
NEWEST_WEIGHT = 0.2  # of the newest answer in the moving average of lengths

StopReason = Literal["cancelled", "timeout"]
T = TypeVar("T")


@dataclass(eq=False)
class InFlightRequest:
    """
    One attempt at a request. `request` has a request id, and `sampling` the defaults of the
    settings. `variant` is the model that it names. `admission` numbers the worker's admissions,
    since a request id may come again.
    """

    bus: Bus
    limits: InferenceLimits
    worker_id: str
    admission: int
    tenant: str
    request: ChatRequest
    reply: str
    sampling: Sampling
    variant: Variant
    stop_reason: StopReason | None = field(default=None, init=False)
    has_ended: bool = field(default=False, init=False)
    epoch: int | None = field(default=None, init=False)
    """Epoch of the session's context, once it is known."""
    erased_epoch: int = field(default=0, init=False)
    """Epoch that began when the session was last erased, as far as this worker was told."""
    sequence: Sequence | None = field(default=None, init=False)
    """Set by the pool's thread that has prepared the prompt."""
    submitted_at: float = field(default=0.0, init=False)
    """Monotonic time at which the engine got the sequence; 0: it has not."""
    computed_at: float = field(default=0.0, init=False)
    """Monotonic time at which the engine was done with it; 0: it is not."""
    last: Done | Failed | None = field(default=None, init=False)
    """The event that ended the answer, once it was sent."""

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id or ""
        self.outputs: asyncio.Queue[Output] = asyncio.Queue()
        self.recording = Recording(self.request, self.worker_id, self.reply, self.limits)
        grace = max(self.request.grace_s, self.limits.min_grace_seconds)
        has_begun = self.request.resume is not None
        self.listeners = Listeners(grace, grace * self.limits.waiting_grace_share, has_begun)
        self.asked_at = datetime.now(UTC)
        self.received_at = self._last_sent = time.monotonic()
        resume = self.request.resume
        self.answer = Answer.of(resume.events if resume else ())
        self.epoch = resume.state.epoch if resume else None
        self._prompt_bytes = prompts.size_bytes(self.request)
        self._stopped = asyncio.Event()

    @property
    def key(self) -> str:
        """Names the request among those of all tenants."""
        return f"{self.tenant}.{self.request_id}"

    @property
    def session_key(self) -> str:
        """Names the session of the exchange among those of all tenants; "": it is not stored."""
        session_id = prompts.stored_session(self.request)
        return subjects.session_key(self.tenant, session_id) if session_id else ""

    @property
    def is_erased(self) -> bool:
        """Whether the session was erased after its context was read."""
        return self.epoch is not None and self.epoch < self.erased_epoch

    @property
    def sequence_key(self) -> str:
        """Names this attempt in the engine, which may still have an earlier one."""
        return f"{self.key}.{self.admission}"

    @property
    def has_slot(self) -> bool:
        is_started = self.sequence is not None and self.sequence.slot is not None
        return is_started and not self.is_computed

    @property
    def is_computed(self) -> bool:
        """Whether the engine is done with it: it is being stored, and neither waits nor runs."""
        return self.computed_at > 0

    @property
    def is_waiting(self) -> bool:
        return not self.has_slot and not self.is_computed

    @property
    def queue_position(self) -> int:
        """Position in the engine's queue, 1 is next; 0: not in it."""
        return self.sequence.queue_position if self.sequence else 0

    @property
    def waiting_bytes(self) -> int:
        """
        Bytes of the prompt, until it is prefilled; never fewer than its tokens. The context of its
        session is unknown before history replies, and limited by the context window.
        """
        is_prefilled = self.sequence is not None and not self.sequence.remaining_prefill
        return 0 if is_prefilled or self.is_computed else self._prompt_bytes

    @property
    def remaining_prefill(self) -> int:
        """Prompt tokens that are still to be computed; an estimate until they are known."""
        if self.sequence is None:
            return self._prompt_bytes // BYTES_PER_TOKEN
        return self.sequence.remaining_prefill

    def remaining_tokens(self, mean_length: float) -> int:
        """Estimate the tokens still to be computed, assuming an answer of average length."""
        if self.is_computed:
            return 0
        sampling = self.sequence.sampling if self.sequence else self.sampling
        generated = len(self.sequence.generated) if self.sequence else 0
        max_tokens = sampling.max_tokens or sampling.max_completion_tokens or mean_length
        length = int(min(mean_length or max_tokens, max_tokens))
        return self.remaining_prefill + max(length - generated, 0)

    def stop(self, reason: StopReason) -> None:
        self.stop_reason = self.stop_reason or reason
        self._stopped.set()

    def drop(self) -> None:
        """Stop without any further event."""
        self.has_ended = True
        self.stop("cancelled")

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`. Raises Stopped as soon as the request is stopped."""
        return await run_until(self._stopped.wait(), work)

    async def send(self, event: StreamEvent) -> None:
        """Send an event, unless the request has ended: there is exactly one Done or Failed."""
        if self.has_ended:
            return
        if isinstance(event, Done | Failed):
            self.has_ended, self.last = True, event
        if isinstance(event, Token | ToolCallDelta):
            self.answer.add(event)
        self._last_sent = time.monotonic()
        self.recording.add(event)
        number = self.listeners.next_number(isinstance(event, Started))
        undelivered = subjects.undelivered(self.worker_id, self.key, self.admission, number)
        await self.bus.publish(self.reply, event, undelivered)

    async def fail(self, error: ServiceError) -> None:
        await self.send(Failed(error.code, error.message, error.retry_after))

    async def keep_alive(self, position: int, interval: float) -> None:
        """Send a Progress if nothing was sent for `interval` seconds."""
        if time.monotonic() - self._last_sent < interval:
            return
        total = len(self.sequence.prompt) if self.sequence else 0
        prefilled = min(self.sequence.computed_tokens, total) if self.sequence else 0
        await self.send(Progress(position, total, prefilled))


class InFlightRequests(dict[str, InFlightRequest]):
    """All in-flight requests by key. Admission decides by counts and bytes alone."""

    def __init__(self, settings: InferenceSettings, limits: InferenceLimits) -> None:
        super().__init__()
        self._slots = settings.model_parallel
        self._max_requests = settings.model_parallel + settings.model_queue
        self._max_bytes = settings.model_queue_bytes
        self._limits = limits
        self._mean_length = 0.0  # tokens of an answer, as a moving average; 0: none yet

    @property
    def running(self) -> int:
        return sum(flight.has_slot for flight in self.values())

    @property
    def waiting(self) -> int:
        return sum(flight.is_waiting for flight in self.values())

    @property
    def queued_tokens(self) -> int:
        """Tokens that are still to be computed for requests without a slot; an estimate."""
        waiting = (flight for flight in self.values() if flight.is_waiting)
        return sum(flight.remaining_tokens(self._mean_length) for flight in waiting)

    def check_room(self, new: InFlightRequest, tokens_per_second: float) -> None:
        """
        Check that there is room for one more request, in the share of its tenant or beyond it.
        There always is for a tenant's only prompt, however long. Raises ServiceError(overloaded)
        with the time until the queue is worked off.
        """
        places = Counter(flight.tenant for flight in self.values())
        if not has_room(new.tenant, places, self._max_requests):
            message = "Every slot is taken and the queue is full: try again."
        elif self._exceeds_bytes(new):
            waiting = self._waiting_bytes().total()
            message = (
                f"{waiting:,} bytes of prompts wait for prefill (MODEL_QUEUE_BYTES): try again."
            )
        else:
            return
        raise ServiceError("overloaded", message, self._retry_after(tokens_per_second))

    def _exceeds_bytes(self, new: InFlightRequest) -> bool:
        """Return whether the prompt exceeds both what is free and the share of its tenant."""
        used = self._waiting_bytes()
        has_others = used[new.tenant] > 0
        return has_others and not has_room(new.tenant, used, self._max_bytes, new.waiting_bytes)

    def _waiting_bytes(self) -> Counter[str]:
        """Return the bytes of prompts that wait for prefill, by tenant of those in flight."""
        waiting = Counter[str]()
        for flight in self.values():
            waiting[flight.tenant] += flight.waiting_bytes
        return waiting

    def on_finished(self, tokens: int) -> None:
        """Count the length of an answer, unless it was cancelled in the queue."""
        if tokens:
            weight = NEWEST_WEIGHT if self._mean_length else 1
            self._mean_length += weight * (tokens - self._mean_length)

    def _retry_after(self, tokens_per_second: float) -> float:
        """Return the seconds until the queue, or without one the first slot, is free."""
        shortest = min(flight.remaining_tokens(self._mean_length) for flight in self.values())
        tokens = self.queued_tokens or shortest * self._slots
        wait = tokens / tokens_per_second if tokens_per_second else 0.0
        limits = self._limits
        return round(
            min(max(wait, limits.min_retry_after_seconds), limits.max_retry_after_seconds), 1
        )


class RecentCancels:
    """
    Cancels of the last seconds. A cancel may arrive before its request, which another worker may
    still be forwarding.
    """

    def __init__(
        self, limits: InferenceLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_age = limits.cancel_kept_seconds
        self._clock = clock
        self._cancels: deque[tuple[float, str, Cancel]] = deque(maxlen=limits.max_cancels_kept)

    def add(self, key: str, cancel: Cancel) -> None:
        self._evict()
        self._cancels.append((self._clock(), key, cancel))

    def of(self, key: str) -> list[Cancel]:
        """Return the cancels for the request with this key."""
        self._evict()
        return [cancel for _, cancelled, cancel in self._cancels if cancelled == key]

    def _evict(self) -> None:
        while self._cancels and self._clock() - self._cancels[0][0] >= self._max_age:
            self._cancels.popleft()
