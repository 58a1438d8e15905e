"""Keeps the events of answers for replay, and detects that their readers have disconnected."""

import time
from collections import OrderedDict
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
    event, a listener may return within `grace` seconds.
    """

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        self._sent = 0
        self._missed = 0  # the last event without a listener
        self._missed_since = 0.0

    def next_number(self) -> int:
        self._sent += 1
        return self._sent

    def on_missed(self, number: int) -> None:
        if not self._missed or number != self._missed + 1:
            self._missed_since = self._clock()
        self._missed = number

    def on_replay(self) -> None:
        """Count a reader that asked for a replay as a listener."""
        self._missed = 0

    @property
    def are_gone(self) -> bool:
        """Whether no event had a listener during the grace, up to the last event."""
        is_last_missed = self._missed == self._sent and self._missed > 0
        return is_last_missed and self._clock() - self._missed_since >= self._grace


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
        self._bytes = 0

    def begin(self, key: str, recording: Recording) -> None:
        self.forget(key)
        self._running[key] = recording

    def end(self, key: str) -> None:
        """Keep the recording if it is final, and evict the oldest ones for it."""
        recording, is_erased = self._running[key], key in self._erased
        self.forget(key)
        if recording.is_final and not is_erased:
            packed = recording.pack()
            self._finished[key] = _Finished(self._clock(), packed, recording.session_id)
            self._bytes += len(packed) + ENTRY_BYTES
        self.evict()

    def forget(self, key: str) -> None:
        self._running.pop(key, None)
        self._erased.discard(key)
        if finished := self._finished.pop(key, None):
            self._bytes -= len(finished.packed) + ENTRY_BYTES

    def forget_session(self, tenant: str, session_id: str) -> None:
        """Forget the finished answers of a session, and running ones once they finish."""

        def is_of_session(key: str, answer: Recording | _Finished) -> bool:
            return key.startswith(f"{tenant}.") and answer.session_id == session_id

        self._erased |= {
            key for key, running in self._running.items() if is_of_session(key, running)
        }
        for key in [key for key, done in self._finished.items() if is_of_session(key, done)]:
            self.forget(key)

    def evict(self) -> None:
        """Drop finished answers that are too old, or too many bytes."""
        while self._finished:
            key, oldest = next(iter(self._finished.items()))
            age = self._clock() - oldest.finished_at
            has_room = self._bytes <= self._limits.max_replay_bytes_kept
            if has_room and age < self._limits.replay_kept_seconds:
                return
            self.forget(key)

    def get(self, key: str, offset: int) -> Replay | None:
        """Return what a reader of the first `offset` characters lacks, as far as it fits."""
        if finished := self._finished.get(key):
            return _fit(decode(finished.packed, Replay), offset, self._limits)
        running = self._running.get(key)
        return running.replay(offset) if running else None


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
