"""Workers that tell a story, a character per token, and are lost in every way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.messages import (
    Accepted,
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
ORIGIN = ResumeState("digest", b"\0\0\0\0", 0, 0, 1, datetime.now(UTC), 0, 0)
STEP = 0.004  # seconds
CONFLICT = ServiceError("conflict", "It is being answered already.")


class Teller:
    """
    Of a text's characters those in `unheard` are told to nobody. At `until` it stops there, for
    ever or with `failing`. `is_frozen`: it hears nothing and says nothing.
    """

    def __init__(self, bus: Bus, worker_id: str, until: int, failing: Failed | None) -> None:
        self._bus = bus
        self._until = until
        self._failing = failing
        self._recordings: dict[str, Recording] = {}
        self.worker_id = worker_id
        self.unheard: set[int] = set()
        self.loses_the_end = False
        self.is_frozen = False
        self.refuses: ServiceError | None = None
        self.requests: list[ChatRequest] = []
        self.replies: list[str] = []
        self.cancelled: list[Cancel] = []
        self.said = asyncio.Event()
        """All that it says before `until`."""
        self.replayed = asyncio.Event()
        self.accepted_before = 0.0
        """Seconds by which replays shift the time of acceptance into the past."""

    async def serve(self, waits_for_requests: bool) -> None:
        await self._bus.subscribe(subjects.cancel(subjects.ANY, subjects.ANY), self._hear_cancel)
        await self._bus.subscribe(subjects.replay(subjects.ANY, subjects.ANY), self._hear_replay)
        mine = subjects.worker_replay(self.worker_id, "*", "*")
        await self._bus.subscribe(mine, self._hear_replay)
        if waits_for_requests:
            await self._bus.serve(
                "inference",
                "tells",
                [Endpoint("chat", subjects.request(subjects.OPEN_TENANT), self._receive)],
            )

    def forget(self) -> None:
        self._recordings.clear()

    async def die(self) -> None:
        """As kill -9 does it: nothing is drained."""
        await self._bus._client.close()

    async def _receive(self, delivery: Delivery) -> None:
        if self.is_frozen:
            return
        request = decode(delivery.data, ChatRequest)
        self.requests.append(request)
        key = f"{subjects.tenant_of_request(delivery.subject)}.{request.request_id}"
        held = self._recordings.get(key)
        if error := CONFLICT if held and not held.is_final else self.refuses:
            await self._bus.publish(delivery.reply, Failed(error.code, error.message, 0.1))
            return
        self.replies.append(delivery.reply)
        self._recordings[key] = recording = Recording(request, self.worker_id, delivery.reply)
        self._bus.spawn(self._tell(key, recording, request, delivery.reply))

    async def _tell(self, key: str, recording: Recording, request: ChatRequest, reply: str) -> None:
        begun = len(request.resume.text) if request.resume else 0
        await self._say(recording, reply, Accepted(str(request.request_id), self.worker_id))
        await self._say(recording, reply, Started(5, 0, 0, 0, ORIGIN))
        for at in range(begun, min(self._until, len(STORY))):
            token = Token(at, STORY[at], (ord(STORY[at]),))
            await self._say(recording, reply, token, is_heard=at not in self.unheard)
            await asyncio.sleep(STEP)
        self.said.set()
        if self._until < len(STORY):
            if self._failing:
                await self._say(recording, reply, self._failing)
                if not recording.is_final:
                    del self._recordings[key]
            return
        usage = Usage(5, len(STORY), 0)
        done = Done("stop", usage, Timings(0, 0, 0), 0, "log", len(STORY))
        await self._say(recording, reply, done, is_heard=not self.loses_the_end)

    async def _say(
        self, recording: Recording, reply: str, event: StreamEvent, is_heard: bool = True
    ) -> None:
        while self.is_frozen:
            await asyncio.sleep(0.01)
        recording.add(event)
        if is_heard:
            await self._bus.publish(reply, event)

    def _hear_cancel(self, delivery: Delivery) -> None:
        self.cancelled.append(decode(delivery.data, Cancel))

    def _hear_replay(self, delivery: Delivery) -> None:
        if self.is_frozen:
            return
        is_known = ".".join(subjects.target_of(delivery.subject)) in self._recordings
        if is_known or not delivery.subject.startswith("chat.replay."):
            self._bus.respond(delivery, self._replay)

    async def _replay(self, delivery: Delivery) -> Replay:
        recording = self._recordings.get(".".join(subjects.target_of(delivery.subject)))
        if recording is None:
            raise ServiceError("not_found", "It is not known here.")
        self.replayed.set()
        replay = recording.replay(decode(delivery.data, ReplayRequest).offset)
        return replace(replay, age_seconds=replay.age_seconds + self.accepted_before)


@asynccontextmanager
async def teller(
    nats_url: str,
    worker_id: str = "w1",
    until: int = len(STORY),
    failing: Failed | None = None,
    waits_for_requests: bool = True,
) -> AsyncIterator[Teller]:
    async with Bus.connect(nats_url, "teller") as bus:
        made = Teller(bus, worker_id, until, failing)
        await made.serve(waits_for_requests)
        yield made
