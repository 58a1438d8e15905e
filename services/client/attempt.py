"""One attempt at an answer: receives a worker's events, detects silence, requests replays."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from msgspec.structs import replace

from services.client.failover import (
    FailoverPolicy,
    bus_unavailable,
    worker_lost,
)
from services.client.transcript import Gap, Mismatch, Transcript
from services.contract import subjects
from services.contract.codec import decoder
from services.contract.errors import FAILOVER_CODES, ServiceError
from services.contract.messages import (
    Accepted,
    Failed,
    Replay,
    ReplayRequest,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Inbox, NoResponders

_decode_event: Callable[[bytes], StreamEvent] = decoder(StreamEvent)


class AttemptLost(Exception):
    """The worker will not finish this attempt, but another one may resume the answer."""


class AttemptReplaced(Exception):
    """The worker runs another attempt at the same answer."""


@dataclass(slots=True)
class Attempt:
    """
    The events that one worker publishes to `reply`, without gaps or repetitions: call `next` until
    it returns a Done or a Failed. `inbox` may hold events of other attempts too. `on_replay` is
    called after each replay.
    """

    bus: Bus
    policy: FailoverPolicy
    tenant: str
    request_id: str
    transcript: Transcript
    inbox: Inbox
    reply: str
    on_replay: Callable[[], None]
    worker_id: str = ""  # until the worker is known
    _replayed: deque[StreamEvent] = field(default_factory=deque, init=False)
    _last_event_at: float = field(default_factory=time.monotonic, init=False)

    async def wait_for_admission(self) -> None:
        """
        Wait for the first event. Raises ServiceError if no worker listens or the worker rejects the
        request, TimeoutError if the worker does not respond.
        """
        try:
            delivery = await self.inbox.next(self.policy.admission_seconds)
        except NoResponders:
            message = "No inference worker is running: start one, or wait for it."
            raise ServiceError("no_worker", message) from None
        event = _decode(delivery.data)
        if isinstance(event, Failed):
            raise ServiceError(event.code, event.message, event.retry_after)
        self.admitted_by(event.worker_id if isinstance(event, Accepted) else "")
        self._replayed.append(event)

    def admitted_by(self, worker_id: str) -> None:
        """Note the worker, and that it is alive now."""
        self.worker_id, self._last_event_at = worker_id, time.monotonic()

    def adopt(self, replay: Replay) -> None:
        """Continue with the attempt that the worker replays."""
        self.reply = replay.reply
        self.admitted_by(replay.worker_id)
        self._replayed.extend(replay.events)

    async def next(self) -> StreamEvent:
        """
        Return the next event that is not in the transcript yet, and add it. Raises AttemptLost,
        AttemptReplaced, or a ServiceError that ends the answer.
        """
        while True:
            is_replayed = bool(self._replayed)
            try:
                event = self._replayed.popleft() if is_replayed else await self._receive()
                if news := self._add(event):
                    return news
            except Gap:
                if is_replayed:
                    raise worker_lost("The worker lost a part of the answer.") from None
                await self._catch_up()

    def take_text(self, subject: str, data: bytes, send: Callable[[Token], bool]) -> Token | None:
        """
        Pass a live event to `send` if it is the next text. If `send` takes it, add and return it.
        """
        if subject != self.reply or self._replayed:
            return None
        try:
            event = _decode_event(data)
        except ServiceError:
            return None  # which `next` reports
        if not self.transcript.is_continued_by(event) or not send(event):
            return None
        self._last_event_at = time.monotonic()
        self.transcript.append(event)
        return event

    def _add(self, event: StreamEvent) -> StreamEvent | None:
        try:
            news = self.transcript.add(event)
        except Mismatch:
            raise worker_lost("The worker continued the answer with other text.") from None
        if isinstance(event, Accepted):
            self.worker_id = event.worker_id
        if isinstance(event, Failed) and event.code in FAILOVER_CODES:
            raise AttemptLost(event.message)
        return news

    async def _receive(self) -> StreamEvent:
        """Return the next live event. Raises Gap after a silence, in which events may be lost."""
        while True:
            try:
                delivery = await self.inbox.next(self.policy.silence_seconds)
            except TimeoutError:
                raise Gap from None
            if delivery.subject == self.reply:
                self._last_event_at = time.monotonic()
                event = _decode(delivery.data)
                if self.transcript.lacks_started(event):
                    self._replayed.extend((*await self._lost_events(), event))
                    event = self._replayed.popleft()
                return event
            if self._silent_seconds >= self.policy.silence_seconds:
                raise Gap  # other attempts send events: one may have replaced this one

    async def _catch_up(self) -> None:
        """Request a replay of what is missing, which also shows whether the worker is alive."""
        if not self.bus.connected:
            await self._wait_for_bus()
        try:
            replay = await self._probe()
        except NoResponders:
            raise AttemptLost("The worker has disconnected.") from None
        except TimeoutError:
            if self._silent_seconds >= self.policy.lost_seconds:
                raise AttemptLost("The worker has stopped responding.") from None
        except ServiceError:  # it is alive, but does not know the request
            raise AttemptLost("The worker has lost the answer.") from None
        else:
            if replay.reply != self.reply:
                raise AttemptReplaced
            self.adopt(replay)

    async def _lost_events(self) -> tuple[StreamEvent, ...]:
        """Return the events so far: without Started the answer can't be resumed. () if unknown."""
        with suppress(NoResponders, TimeoutError, ServiceError):
            replay = await self._fetch()
            if replay.reply == self.reply:
                return replay.events
        return ()

    async def _fetch(self) -> Replay:
        subject = (
            subjects.worker_replay(self.worker_id, self.tenant, self.request_id)
            if self.worker_id
            else subjects.replay(self.tenant, self.request_id)
        )
        offset, timeout = self.transcript.length, self.policy.probe_seconds
        replay = await fetch_replay(self.bus, subject, offset, timeout)
        self.on_replay()
        return replay

    async def _probe(self) -> Replay:
        try:
            return await self._fetch()
        except NoResponders:  # it may be reconnecting
            since_reconnect = self.bus.seconds_since_reconnect
            delay = self.policy.nats_reconnect_seconds - since_reconnect
            await asyncio.sleep(max(self.policy.worker_reconnect_seconds, delay))
            return await self._fetch()

    async def _wait_for_bus(self) -> None:
        gives_up_at = time.monotonic() + self.policy.give_up_seconds
        while not self.bus.connected:
            if time.monotonic() > gives_up_at:
                raise bus_unavailable()
            await asyncio.sleep(self.policy.worker_reconnect_seconds)
        self._last_event_at = time.monotonic()

    @property
    def _silent_seconds(self) -> float:
        return time.monotonic() - self._last_event_at


async def fetch_replay(bus: Bus, subject: str, offset: int, timeout: float) -> Replay:
    """
    Return an answer's events from character `offset` on, in as many parts as it takes. Raises the
    exceptions of Bus.request; `timeout` is in seconds, for each part.
    """
    part = await bus.request(subject, ReplayRequest(offset), Replay, timeout)
    events = list(part.events)
    while not part.is_complete:
        part = await bus.request(subject, ReplayRequest(_end(events)), Replay, timeout)
        events += part.events
    return replace(part, events=tuple(events))


def _end(events: list[StreamEvent]) -> int:
    return max(event.end for event in events if isinstance(event, Token | ToolCallDelta))


def _decode(data: bytes) -> StreamEvent:
    try:
        return _decode_event(data)
    except ServiceError as error:  # whose code would blame the caller
        raise ServiceError("internal", f"The worker sent an unreadable event: {error}") from error
