"""The answers that run and those that ended in the last minute, for who lost a part of one."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from services.contract import prompts
from services.contract.codec import decode, encode
from services.contract.errors import FAILOVER_CODES
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    Progress,
    Replay,
    Started,
    StreamEvent,
    Token,
)

KEPT_FOR = 60.0  # seconds after an answer's end
MOST_BYTES = 4 * 2**20  # of all answers that have ended; what runs is bounded by admission
AROUND = 560  # bytes of memory that one takes beside its own
MOST_IN_ONE = 900_000  # bytes of a replay: NATS takes 1 MiB
LEAST_IN_ONE = 2**15  # bytes of its events, however long the request is
OVERHEAD = 250  # bytes of an event, were its text empty; on the wire it is less


class Recording:
    """What one attempt at an answer has said."""

    def __init__(
        self,
        request: ChatRequest,
        worker_id: str,
        reply: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._accepted_at = clock()
        self._request = replace(request, resume=None)
        self.is_kept = True
        """Whether it can be replayed after its end."""
        self._worker_id = worker_id
        self._reply = reply
        self._events: list[StreamEvent] = []
        if (resume := request.resume) and resume.text:  # who comes later needs the beginning too
            self.add(Token(0, resume.text, resume.token_ids))

    def add(self, event: StreamEvent) -> None:
        if not isinstance(event, Progress):
            self._events.append(event)

    @property
    def is_whole(self) -> bool:
        """It has an end, and not one that leaves it to another worker."""
        match self._events[-1:]:
            case [Done()]:
                return True
            case [Failed(code=code)]:
                return code not in FAILOVER_CODES
        return False

    @property
    def session_id(self) -> str | None:
        """The session of the answer; None for a stateless request."""
        return None if prompts.is_stateless(self._request) else self._request.session_id

    def replay(self, at: int) -> Replay:
        """For a reader that has `at` characters of the answer."""
        return _part(self._all(self._events), at)

    def pack(self) -> bytes:
        """
        All of it, now that it has ended: no one has to go on with it, so tokens and origin are no
        more needed.
        """
        return encode(self._all(_merged(self._events)))

    def _all(self, events: Sequence[StreamEvent]) -> Replay:
        age = self._clock() - self._accepted_at
        return Replay(self._request, self._worker_id, self._reply, tuple(events), age_seconds=age)


class _Ended(NamedTuple):
    ended_at: float
    packed: bytes
    session_id: str | None


class Replays:
    """By key of the request; of several attempts at one, the last is kept."""

    def __init__(
        self, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most_bytes
        self._clock = clock
        self._running: dict[str, Recording] = {}
        self._ended: OrderedDict[str, _Ended] = OrderedDict()
        self._held = 0

    def begin(self, key: str, recording: Recording) -> None:
        self.forget(key)
        self._running[key] = recording

    def end(self, key: str) -> None:
        """Its last event is there; the answers that ended longest ago make room."""
        recording = self._running.pop(key, None)
        if recording and recording.is_kept:
            packed = recording.pack()
            self._ended[key] = _Ended(self._clock(), packed, recording.session_id)
            self._held += len(packed) + AROUND
        self.forget_old()

    def forget(self, key: str) -> None:
        self._running.pop(key, None)
        if ended := self._ended.pop(key, None):
            self._held -= len(ended.packed) + AROUND

    def forget_session(self, tenant: str, session_id: str) -> None:
        """Forget the answers of a session; running ones once they have ended."""
        prefix = f"{tenant}."
        for key, recording in self._running.items():
            if key.startswith(prefix) and recording.session_id == session_id:
                recording.is_kept = False
        for key, ended in list(self._ended.items()):
            if key.startswith(prefix) and ended.session_id == session_id:
                self.forget(key)

    def forget_old(self) -> None:
        while self._ended:
            key, ended = next(iter(self._ended.items()))
            if self._held <= self._most and self._clock() - ended.ended_at < KEPT_FOR:
                return
            self.forget(key)

    def of(self, key: str, at: int) -> Replay | None:
        if ended := self._ended.get(key):
            return _part(decode(ended.packed, Replay), at)
        recording = self._running.get(key)
        return recording.replay(at) if recording else None


def _merged(events: Sequence[StreamEvent]) -> Sequence[StreamEvent]:
    tokens = [event for event in events if isinstance(event, Token)]
    if any(token.logprobs for token in tokens):
        return events
    kept = [
        replace(event, resume_state=None) if isinstance(event, Started) else event
        for event in events
        if not isinstance(event, Token)
    ]
    text = "".join(token.text for token in tokens)
    return [*kept[:-1], Token(0, text, ()), kept[-1]] if text else kept


def _part(whole: Replay, at: int) -> Replay:
    """As much of what a reader of `at` characters lacks as goes into one message."""
    room = max(LEAST_IN_ONE, MOST_IN_ONE - len(encode(whole.request)))
    events: list[StreamEvent] = []
    for event in whole.events:
        if _is_known(event, at):
            continue
        room -= _size(event)
        if room < 0 and events:
            return replace(whole, events=tuple(events), is_complete=False)
        events.append(event)
    return replace(whole, events=tuple(events))


def _is_known(event: StreamEvent, at: int) -> bool:
    if isinstance(event, Token):
        return event.offset + len(event.text) <= at
    return at > 0 and not isinstance(event, Done | Failed)


def _size(event: StreamEvent) -> int:
    """About; in UTF-8 and JSON a character has at most six bytes, and mostly one."""
    match event:
        case Token(text=text, logprobs=logprobs):
            candidates = sum(1 + len(chosen.top) for chosen in logprobs or ())
            return OVERHEAD + len(text.encode()) + OVERHEAD * candidates
        case Started(resume_state=origin) if origin:
            return OVERHEAD + len(origin.prompt) * 4 // 3
        case _:
            return OVERHEAD
