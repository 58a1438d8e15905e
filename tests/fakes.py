"""Fake services that send what a test has scripted."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from msgspec.structs import replace

from services.contract import subjects
from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.history import (
    ClearRequest,
    Exchange,
    ExchangePage,
    ExchangeRequest,
    HistoryStatus,
    MessagesRequest,
)
from services.contract.messages import (
    Accepted,
    AnswerEvent,
    Cancel,
    ChatRequest,
    Done,
    Empty,
    FinishReason,
    ModelInfo,
    Progress,
    RequestAdmitted,
    Resume,
    ResumeState,
    StreamEvent,
    Timings,
    Token,
    ToolCallDelta,
    Usage,
    WorkerReport,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Endpoint
from services.runtime.streams import Bucket


@dataclass
class Hold:
    """A pause until `end` or a cancel. The event is repeated, as a silent worker counts as lost."""

    event: StreamEvent = Progress(0, 9, 9)
    end: asyncio.Event = field(default_factory=asyncio.Event)


Step = StreamEvent | float | Hold
Script = Sequence[Step]
"""Events to send, and pauses (in seconds, or held by the test) between them."""

ACCEPTED = Accepted("r1", "w1")
DONE = Done("stop", Usage(5, 2, 3), Timings(0.0, 0.1, 0.2), exchanges_dropped=1, stored="log")
HELLO = (ACCEPTED, Token(0, "Grüß ", (1,)), Token(5, "dich", (2,)), DONE)


def text_resume(
    state: ResumeState, token_ids: Sequence[int], text: str, mirostat_mu: float | None = None
) -> Resume:
    """Return a resume of an answer with content only."""
    return Resume(state, (Token(0, text, tuple(token_ids), mirostat_mu=mirostat_mu),))


def answer_events(*parts: tuple[str, str]) -> list[AnswerEvent]:
    """
    Return one event for each part, in order. A part is a kind and its text: `content`, `reasoning`,
    `call`, which begins a call by its name, or `arguments`, which has more of its arguments.
    """
    events: list[AnswerEvent] = []
    calls = offset = 0
    for number, (kind, text) in enumerate(parts):
        ids = (number,)
        calls += kind == "call"
        match kind:
            case "content" | "reasoning":
                events.append(Token(offset, text, ids, channel=kind))
            case "call":
                events.append(ToolCallDelta(offset, calls - 1, ids, f"callid{calls:03}", text))
            case "arguments":
                events.append(ToolCallDelta(offset, calls - 1, ids, arguments=text))
        offset += len(text)
    return events


def random_answer(draw: random.Random) -> Script:
    """Return the script of an answer whose parts change between the channels."""
    parts: list[tuple[str, str]] = []
    for _ in range(draw.randrange(1, 7)):
        match draw.choice(("content", "reasoning", "call")):
            case "call":
                arguments = json.dumps({"to": draw.choice(("Rome", "ü", '"'))}, ensure_ascii=False)
                cut = draw.randrange(1, len(arguments))
                parts += [("call", draw.choice("ab"))]
                parts += [("arguments", arguments[:cut]), ("arguments", arguments[cut:])]
            case channel:
                parts.append((channel, draw.choice(("a", "ß\n", "b\u2028", "\x85"))))
    return answer_script(*parts)


def answer_script(*parts: tuple[str, str], finish_reason: FinishReason = "stop") -> Script:
    """Return the script of a whole answer, whose parts are those of `answer_events`."""
    events = answer_events(*parts)
    thoughts = sum(kind == "reasoning" for kind, _ in parts)
    done = replace(
        DONE,
        finish_reason=finish_reason,
        usage=Usage(5, len(parts), 3, thoughts),
        length=events[-1].end,
    )
    return (ACCEPTED, *events, done)


class ScriptedWorker:
    """Sends the same script to every request, and records requests and cancels."""

    def __init__(self, bus: Bus, script: Script) -> None:
        self._bus = bus
        self.script = script
        self._cancelled_ids: set[str | None] = set()
        self.requests: list[tuple[str, ChatRequest]] = []  # (subject, request)
        self.cancelled: asyncio.Queue[tuple[str, str]] = asyncio.Queue()  # (tenant, request id)
        self.dropped: asyncio.Queue[Cancel] = asyncio.Queue()
        self.refuses: ServiceError | None = None  # the reply to direct requests
        self.is_frozen = False

    async def on_request(self, delivery: Delivery) -> None:
        self._start_script(delivery, delivery.reply)

    async def on_direct_request(self, delivery: Delivery) -> None:
        if not self.is_frozen:
            self._bus.respond(delivery, self._admit)

    async def _admit(self, delivery: Delivery) -> RequestAdmitted:
        if self.refuses:
            raise self.refuses
        self._start_script(delivery, delivery.headers[subjects.REPLY_HEADER])
        return RequestAdmitted(len(self.requests), 0)

    def on_cancel(self, delivery: Delivery) -> None:
        cancel = decode(delivery.data, Cancel)
        if cancel != Cancel():
            self.dropped.put_nowait(cancel)
            return
        tenant, request_id = subjects.target_of(delivery.subject)
        if not self._is_of_another_test(request_id):
            self._cancelled_ids.add(request_id)
            self.cancelled.put_nowait((tenant, request_id))

    def _is_of_another_test(self, request_id: str) -> bool:
        """Return whether it is a generated id (a UUID) that was not requested here."""
        known = (request.request_id for _, request in self.requests)
        return len(request_id) == 36 and request_id not in known

    def _start_script(self, delivery: Delivery, reply: str) -> None:
        request = decode(delivery.data, ChatRequest)
        self.requests.append((delivery.subject, request))
        self._bus.spawn(self._run_script(request.request_id, reply))

    async def _run_script(self, request_id: str | None, reply: str) -> None:
        for step in self.script:
            if request_id in self._cancelled_ids:
                await self._bus.publish(reply, replace(DONE, finish_reason="cancelled"))
                return
            if isinstance(step, Hold):
                await self._hold(step, request_id, reply)
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                await self._bus.publish(reply, step)

    async def _hold(self, hold: Hold, request_id: str | None, reply: str) -> None:
        while not hold.end.is_set() and request_id not in self._cancelled_ids:
            await self._bus.publish(reply, hold.event)
            await asyncio.sleep(0.05)


@asynccontextmanager
async def scripted_worker(nats_url: str, script: Script) -> AsyncIterator[ScriptedWorker]:
    """Serve requests on a connection of its own, which is closed when the test ends."""
    async with Bus.connect(nats_url, "scripted worker") as bus:
        worker = ScriptedWorker(bus, script)
        await bus.subscribe(subjects.cancel(subjects.ANY, subjects.ANY), worker.on_cancel)
        endpoints = [
            Endpoint("chat", subjects.request(subjects.OPEN_TENANT), worker.on_request),
            Endpoint("tenant-chat", subjects.request(subjects.ANY), worker.on_request),
        ]
        await bus.serve("inference", "scripted", endpoints)
        yield worker


MODEL = ModelInfo("demo", "digest", 2048, 1000)


@asynccontextmanager
async def direct_worker(
    nats_url: str, worker_id: str, script: Script
) -> AsyncIterator[ScriptedWorker]:
    """Serve direct requests only, and send no reports."""
    async with Bus.connect(nats_url, "scripted worker") as bus:
        worker = ScriptedWorker(bus, script)
        await bus.subscribe(subjects.cancel(subjects.ANY, subjects.ANY), worker.on_cancel)
        subject = subjects.worker_request(worker_id, subjects.ANY)
        await bus.serve(
            "scripted", "scripted", [Endpoint("direct", subject, worker.on_direct_request)]
        )
        yield worker


def report(worker_id: str, model: ModelInfo = MODEL, in_flight: int = 0) -> WorkerReport:
    return WorkerReport(worker_id, "ready", 8, in_flight, 0, queue=16, model=model, name=model.name)


@asynccontextmanager
async def reporting(bus: Bus, *reports: WorkerReport) -> AsyncIterator[None]:
    """Publish the reports during the body, again and again: edges forget a worker without them."""

    async def publish() -> None:
        while True:
            for each in reports:
                await bus.publish(subjects.report(each.worker_id), each)
            await asyncio.sleep(1)

    publishing = asyncio.create_task(publish())
    try:
        yield
    finally:
        publishing.cancel()


class ScriptedHistory:
    def __init__(self, messages: ExchangePage) -> None:
        self._messages = messages
        self.asked: list[tuple[str, MessagesRequest | ClearRequest]] = []

    async def messages(self, subject: str, request: MessagesRequest) -> ExchangePage:
        self.asked.append((subject, request))
        return self._messages

    async def clear(self, subject: str, request: ClearRequest) -> Empty:
        self.asked.append((subject, request))
        return Empty()

    async def status(self, subject: str, request: Empty) -> HistoryStatus:
        return HistoryStatus(
            database_connected=True, log_records=7, log_bytes=700, unarchived=0, unreadable=0
        )


@asynccontextmanager
async def scripted_history(nats_url: str, messages: ExchangePage) -> AsyncIterator[ScriptedHistory]:
    async with Bus.connect(nats_url, "scripted history") as bus:
        fake = ScriptedHistory(messages)
        endpoints = [
            bus.endpoint(
                "messages",
                subjects.history("messages", subjects.ANY),
                MessagesRequest,
                fake.messages,
            ),
            bus.endpoint(
                "clear", subjects.history("clear", subjects.ANY), ClearRequest, fake.clear
            ),
            bus.endpoint("status", subjects.HISTORY_STATUS, Empty, fake.status),
        ]
        await bus.serve("history", "scripted", endpoints)
        yield fake


@asynccontextmanager
async def history_of(bus: Bus, exchange: Exchange | None) -> AsyncIterator[None]:
    """Serve a history that has at most one exchange, and create its bucket of requests."""
    await Bucket(bus, subjects.REQUESTS_BUCKET).ensure(60)

    async def find(subject: str, request: ExchangeRequest) -> Exchange:
        if exchange is None or request.request_id != exchange.request_id:
            raise ServiceError("not_found", "It is not there.")
        return exchange

    endpoint = bus.endpoint(
        "exchange", subjects.history("exchange", subjects.ANY), ExchangeRequest, find
    )
    await bus.serve("history", "scripted", [endpoint])
    yield
    await bus.stop_serving()
