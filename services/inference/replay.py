"""Keeps the events of answers for replay, and detects that their readers have disconnected."""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from services.contract import prompts
from services.contract.answer import merge, split
from services.contract.codec import decode, encode
from services.contract.errors import FAILOVER_CODES
from services.contract.messages import (
    Accepted,
    ChatRequest,
    Done,
    Failed,
    Progress,
    Replay,
    Started,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.inference.limits import DEFAULT_LIMITS, InferenceLimits

ENTRY_BYTES = 560  # memory of a finished answer beside its encoded events


class Listeners:
    """
    Detect that nobody listens to an answer any more.

    Events are numbered from 1. NATS reports an event without subscribers ("no responders") and is
    silent about the others, so events between two reported ones had a listener. After a reported
    event, a listener may return within `grace` seconds; within `waiting_grace` if none was there
    when the answer began. `has_begun`: it began at another worker.
    """

    def __init__(
        self,
        grace: float,
        waiting_grace: float,
        has_begun: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grace = grace
        self._waiting_grace = waiting_grace
        self._clock = clock
        self._sent = 0
        self._begin = 0 if has_begun else math.inf  # number of the event that begins the answer
        self._first_missed = 0  # of those that were missed one after another
        self._missed = 0  # the last event without a listener
        self._missed_since = 0.0

    def next_number(self, is_begin: bool = False) -> int:
        self._sent += 1
        if is_begin:
            self._begin = min(self._begin, self._sent)
        return self._sent

    def on_missed(self, number: int) -> None:
        if not self._missed or number != self._missed + 1:
            self._first_missed, self._missed_since = number, self._clock()
        self._missed = number

    def on_replay(self) -> None:
        """Count a reader that asked for a replay as a listener."""
        self._missed = 0

    @property
    def are_gone(self) -> bool:
        """Whether no event had a listener during the grace, up to the last event."""
        is_last_missed = self._missed == self._sent and self._missed > 0
        has_heard_begin = self._begin < self._first_missed
        grace = self._grace if has_heard_begin else self._waiting_grace
        return is_last_missed and self._clock() - self._missed_since >= grace


class Recording:
    """The events of one attempt at a request."""

    def __init__(
        self,
        request: ChatRequest,
        worker_id: str,
        reply: str,
        limits: InferenceLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._empty = Replay(replace(request, resume=None), worker_id, reply, ())
        self._limits = limits
        self._clock = clock
        self._accepted_at = clock()
        self._begin: list[StreamEvent] = []
        # later readers need the first part too
        self._events: list[StreamEvent] = [*request.resume.events] if request.resume else []

    def add(self, event: StreamEvent) -> None:
        if isinstance(event, Accepted | Started):
            self._begin.append(event)
        elif not isinstance(event, Progress):
            self._events.append(event)

    @property
    def is_final(self) -> bool:
        """Whether the answer has ended, and not so that another worker continues it."""
        match self._events[-1:]:
            case [Done()]:
                return True
            case [Failed(code=code)]:
                return code not in FAILOVER_CODES
        return False

    @property
    def session_id(self) -> str | None:
        """The session of the answer; None if it is not stored."""
        return prompts.stored_session(self._empty.request)

    def replay(self, offset: int) -> Replay:
        """Return what a reader of the first `offset` characters lacks, as far as it fits."""
        return _fit(self._whole, offset, self._limits)

    def pack(self) -> bytes:
        """
        Return the whole replay, encoded, of a finished answer. Nobody resumes it any more, so its
        tokens and resume state are left out.
        """
        whole = self._whole
        return encode(replace(whole, events=_merge(whole.events, self._limits)))

    @property
    def _whole(self) -> Replay:
        """All events; also those of a resumed answer have Started before any text."""
        age = self._clock() - self._accepted_at
        return replace(self._empty, events=(*self._begin, *self._events), age_seconds=age)


class _Finished(NamedTuple):
    finished_at: float
    packed: bytes
    session_id: str | None


class ReplayStore:
    """
    Recordings of running answers and, for a while, of finished ones, by request key. A later
    attempt at a request replaces an earlier one.
    """

    def __init__(
        self,
        limits: InferenceLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._running: dict[str, Recording] = {}
        self._finished: OrderedDict[str, _Finished] = OrderedDict()
        self._erased: set[str] = set()  # running answers that are not kept
        self._bytes: Counter[str] = Counter()  # of finished answers, by tenant

    def begin(self, key: str, recording: Recording) -> None:
        self.forget(key)
        self._running[key] = recording

    def end(self, key: str) -> None:
        """Keep the recording if it is final, and evict others for it."""
        recording, is_erased = self._running[key], key in self._erased
        self.forget(key)
        if recording.is_final and not is_erased:
            packed = recording.pack()
            self._finished[key] = _Finished(self._clock(), packed, recording.session_id)
            self._bytes[_tenant(key)] += len(packed) + ENTRY_BYTES
        self.evict()

    def forget(self, key: str) -> None:
        self._running.pop(key, None)
        self._erased.discard(key)
        if finished := self._finished.pop(key, None):
            size = len(finished.packed) + ENTRY_BYTES
            self._bytes -= Counter({_tenant(key): size})  # removes an entry that becomes zero

    def forget_session(self, tenant: str, session_id: str) -> None:
        """Forget the finished answers of a session, and running ones once they finish."""

        def is_of_session(key: str, answer: Recording | _Finished) -> bool:
            return _tenant(key) == tenant and answer.session_id == session_id

        self._erased |= {
            key for key, running in self._running.items() if is_of_session(key, running)
        }
        for key in [key for key, done in self._finished.items() if is_of_session(key, done)]:
            self.forget(key)

    def evict(self) -> None:
        """
        Drop finished answers that are too old, and, while there are too many bytes, the oldest one
        of the tenant that has the most.
        """
        expired_at = self._clock() - self._limits.replay_kept_seconds
        while self._finished and next(iter(self._finished.values())).finished_at <= expired_at:
            self.forget(next(iter(self._finished)))
        while self._bytes.total() > self._limits.max_replay_bytes_kept:
            largest = max(self._bytes, key=lambda tenant: self._bytes[tenant])
            self.forget(next(key for key in self._finished if _tenant(key) == largest))

    def get(self, key: str, offset: int) -> Replay | None:
        """Return what a reader of the first `offset` characters lacks, as far as it fits."""
        if finished := self._finished.get(key):
            return _fit(decode(finished.packed, Replay), offset, self._limits)
        running = self._running.get(key)
        return running.replay(offset) if running else None


def _tenant(key: str) -> str:
    return key.partition(".")[0]


def _merge(events: tuple[StreamEvent, ...], limits: InferenceLimits) -> tuple[StreamEvent, ...]:
    """Merge the text into as few events as fit into messages, unless they have logprobs."""
    text = [event for event in events if isinstance(event, Token | ToolCallDelta)]
    if any(event.logprobs for event in text):
        return events
    others = [
        replace(event, resume_state=None) if isinstance(event, Started) else event
        for event in events
        if not isinstance(event, Token | ToolCallDelta)
    ]
    runs = (replace(event, token_ids=()) for event in merge(text))
    merged = [part for run in runs for part in split(run, limits.max_replay_token_chars)]
    return (*others[:-1], *merged, others[-1])


def _fit(whole: Replay, offset: int, limits: InferenceLimits) -> Replay:
    """
    Return the events after `offset` that fit into one message, but at least one token, so that the
    reader can ask for the rest. A resume state that does not fit is left out.
    """
    room = limits.max_replay_bytes - len(encode(whole.request))
    room = max(limits.min_replay_event_bytes, room)
    events: list[StreamEvent] = []
    has_token = False
    for event in whole.events:
        if _is_known(event, offset):
            continue
        if isinstance(event, Started) and len(encode(event)) > room:
            event = replace(event, resume_state=None)
        room -= len(encode(event))
        if room < 0 and has_token:
            return replace(whole, events=tuple(events), is_complete=False)
        events.append(event)
        has_token |= isinstance(event, Token | ToolCallDelta)
    return replace(whole, events=tuple(events))


def _is_known(event: StreamEvent, offset: int) -> bool:
    if isinstance(event, Token | ToolCallDelta):
        return event.end <= offset
    return offset > 0 and not isinstance(event, Done | Failed)
