"""
Fake workers that answer every request with the same story, one character per event, and are lost in
every way; and readers that check that they get the whole story.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime

from msgspec.structs import replace

from services.client.chat_client import AnswerStream, ChatClient
from services.client.failover import FailoverPolicy
from services.contract import subjects
from services.contract.answer import Answer
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import (
    Accepted,
    AnswerEvent,
    Cancel,
    ChatRequest,
    Done,
    Failed,
    Replay,
    ReplayRequest,
    ResumeState,
    Started,
    StreamEvent,
    Timings,
    Token,
    Usage,
)
from services.inference.replay import Recording
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Endpoint

STORY = "Es war einmal eine 🙂, die hieß Grüße und wohnte in einem Bus."
TOKENS = tuple(Token(at, character, (ord(character),)) for at, character in enumerate(STORY))
RESUME_STATE = ResumeState("digest", b"\0\0\0\0", 0, 0, 1, datetime.now(UTC), 0, 0)
TOKEN_SECONDS = 0.004
CONFLICT = ServiceError("conflict", "It is being answered already.")

REQUEST = ChatRequest(prompt="hi", request_id="r", grace_s=10)
FAST = FailoverPolicy(
    silence_seconds=0.15,
    probe_seconds=0.1,
    lost_seconds=0.5,
    worker_reconnect_seconds=0.05,
    admission_seconds=0.2,
    join_seconds=0.2,
    give_up_seconds=1.0,
    retry_seconds=0.05,
    max_publish_tries=1000,  # NATS picks a frozen worker half of the time
)


class StoryWorker:
    """
    Stops at the character `stop_at` of the story, forever or with the event `failure`. A frozen
    worker neither receives nor sends anything.
    """

    def __init__(
        self,
        bus: Bus,
        worker_id: str,
        stop_at: int,
        failure: Failed | None,
        story: Sequence[AnswerEvent] = TOKENS,
        token_seconds: float = TOKEN_SECONDS,
    ) -> None:
        self._bus = bus
        self._token_seconds = token_seconds
        self._story = story
        self._stop_at = stop_at
        self._failure = failure
        self._recordings: dict[str, Recording] = {}
        self.worker_id = worker_id
        self.unsent: set[int] = set()
        """Characters whose tokens are lost on the way."""
        self.loses_started = self.loses_done = False
        self.is_frozen = False
        self.freezes_after_replay = False
        self.rejects_with: ServiceError | None = None
        self.requests: list[ChatRequest] = []
        self.replies: list[str] = []
        self.cancelled: list[Cancel] = []
        self.received = asyncio.Event()
        """A request arrived."""
        self.accepted = asyncio.Event()
        self.stopped = asyncio.Event()
        """Every token before `stop_at` was sent."""
        self.replayed = asyncio.Event()
        self.accepted_before = 0.0
        """Seconds by which replays shift the time of acceptance into the past."""

    async def serve(self) -> None:
        own_replays = subjects.worker_replay(self.worker_id, "*", "*")
        await self._bus.subscribe(subjects.cancel(subjects.ANY, subjects.ANY), self._on_cancel)
        await self._bus.subscribe(subjects.replay(subjects.ANY, subjects.ANY), self._on_replay)
        await self._bus.subscribe(own_replays, self._on_replay)
        endpoint = Endpoint("chat", subjects.request(subjects.OPEN_TENANT), self._on_request)
        await self._bus.serve("inference", "story", [endpoint])

    async def stop_accepting(self) -> None:
        await self._bus.stop_serving()

    async def publish(self, reply: str, event: StreamEvent) -> None:
        await self._bus.publish(reply, event)

    def forget(self) -> None:
        """Lose all answers."""
        self._recordings.clear()

    async def kill(self) -> None:
        """Disconnect without draining, as after SIGKILL."""
        await self._bus._client.close()

    async def _on_request(self, delivery: Delivery) -> None:
        if self.is_frozen:
            return
        request = decode(delivery.data, ChatRequest)
        self.requests.append(request)
        self.received.set()
        key = f"{subjects.tenant_of_request(delivery.subject)}.{request.request_id}"
        recording = self._recordings.get(key)
        is_running = recording is not None and not recording.is_final
        if error := CONFLICT if is_running else self.rejects_with:
            await self.publish(delivery.reply, Failed(error.code, error.message, 0.1))
            return
        self.replies.append(delivery.reply)
        self.accepted.set()
        self._recordings[key] = Recording(request, self.worker_id, delivery.reply)
        self._bus.spawn(self._answer(key, request, delivery.reply))

    async def _answer(self, key: str, request: ChatRequest, reply: str) -> None:
        recording = self._recordings[key]
        begin = Answer.of(request.resume.events).length if request.resume else 0
        await self._send(recording, reply, Accepted(str(request.request_id), self.worker_id))
        started = Started(5, 0, 0, 0, RESUME_STATE)
        await self._send(recording, reply, started, is_lost=self.loses_started)
        for event in self._story:
            if event.end > begin and event.offset < self._stop_at:
                await self._send(recording, reply, event, is_lost=event.offset in self.unsent)
                await asyncio.sleep(self._token_seconds)
        self.stopped.set()
        if self._stop_at >= (length := self._story[-1].end):
            usage, timings = Usage(5, len(self._story), 0), Timings(0, 0, 0)
            done = Done("stop", usage, timings, 0, "log", length)
            await self._send(recording, reply, done, is_lost=self.loses_done)
        elif self._failure:
            await self._send(recording, reply, self._failure)
            if not recording.is_final:
                del self._recordings[key]

    async def _send(
        self, recording: Recording, reply: str, event: StreamEvent, is_lost: bool = False
    ) -> None:
        while self.is_frozen:
            await asyncio.sleep(0.01)
        recording.add(event)
        if not is_lost:
            await self.publish(reply, event)

    def _on_cancel(self, delivery: Delivery) -> None:
        _, request_id = subjects.target_of(delivery.subject)
        if any(request.request_id == request_id for request in self.requests):
            self.cancelled.append(decode(delivery.data, Cancel))

    def _on_replay(self, delivery: Delivery) -> None:
        if self.is_frozen:
            return
        is_known = ".".join(subjects.target_of(delivery.subject)) in self._recordings
        if is_known or not delivery.subject.startswith("chat.replay."):
            self._bus.respond(delivery, self._replay)

    async def _replay(self, delivery: Delivery) -> Replay:
        recording = self._recordings.get(".".join(subjects.target_of(delivery.subject)))
        if recording is None:
            raise ServiceError("not_found", "This worker does not know the request.")
        self.replayed.set()
        self.is_frozen |= self.freezes_after_replay
        replay = recording.replay(decode(delivery.data, ReplayRequest).offset)
        return replace(replay, age_seconds=replay.age_seconds + self.accepted_before)


@asynccontextmanager
async def story_worker(
    nats_url: str,
    worker_id: str = "w1",
    stop_at: int = len(STORY),
    failure: Failed | None = None,
    story: Sequence[AnswerEvent] = TOKENS,
    token_seconds: float = TOKEN_SECONDS,
) -> AsyncIterator[StoryWorker]:
    async with Bus.connect(nats_url, "story worker") as bus:
        worker = StoryWorker(bus, worker_id, stop_at, failure, story, token_seconds)
        await worker.serve()
        yield worker


class FickleSink:
    """Takes two of three events that it is offered."""

    def __init__(self, events: list[StreamEvent]) -> None:
        self._events = events
        self.offered = 0

    def take(self, event: AnswerEvent) -> bool:
        self.offered += 1
        is_taken = self.offered % 3 != 0
        if is_taken:
            self._events.append(event)
        return is_taken


async def read(
    bus: Bus, request: ChatRequest = REQUEST, policy: FailoverPolicy = FAST
) -> list[StreamEvent]:
    return await read_all(ChatClient(bus, policy=policy).stream(request))


async def rejoin(bus: Bus, offset: int = 0, policy: FailoverPolicy = FAST) -> list[StreamEvent]:
    return await read_all(ChatClient(bus, policy=policy).rejoin("r", offset))


async def read_all(answer: AnswerStream) -> list[StreamEvent]:
    """Return what the stream yields and what its sink takes, as it arrives."""
    events: list[StreamEvent] = []
    sink = FickleSink(events)
    async with aclosing(answer):
        async for event in answer:
            events.append(event)
            answer.pass_text_to(sink)
    return events


def check_whole(events: list[StreamEvent], begins_at: int = 0) -> None:
    """Check that each character comes once, and every other event at most once."""
    text = STORY[:begins_at]
    for event in events:
        if isinstance(event, Token):
            assert event.offset == len(text)
            text += event.text
    assert text == STORY
    assert isinstance(events[-1], Done)
    for kind in (Accepted, Started, Done, Failed):
        assert sum(isinstance(event, kind) for event in events) <= 1, kind
