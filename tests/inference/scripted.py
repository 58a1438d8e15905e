"""A chat service on a real bus with a real history; the model's answers are scripted."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, cast
from uuid import uuid4

from services.client.fleet import DEFAULT_LIMITS as FLEET_LIMITS
from services.client.fleet import FleetLimits
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.answer import Answer
from services.contract.codec import decode, encode
from services.contract.history import (
    Context,
    ContextRequest,
    ExchangePage,
    ExchangeView,
    MessagesRequest,
)
from services.contract.messages import (
    Cancel,
    ChatRequest,
    Done,
    Failed,
    ModelInfo,
    StreamEvent,
    Token,
    ToolCallDelta,
    WorkerReport,
)
from services.inference.chat_service import ChatService
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.scheduling.limits import SchedulerLimits
from services.inference.limits import InferenceLimits
from services.inference.models import LoadedModel
from services.inference.report_hub import ReportHub
from services.inference.settings import InferenceSettings
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Inbox
from tests.inference.chat_templates import CHATML
from tests.inference.fake_backend import FakeBackend

ADAPTERS = ("shout", "loud")
LONG = b"".join(b"%d " % number for number in range(200))[:500]  # repeats nothing
ANSWERS = {f"{question}<|im_end|>\n<|im_start|>assistant\n": answer for question, answer in {
    "hi": b"hello", "long": LONG, "stop": b"fine\nUser: me", "emoji": "é🙂".encode(),
}.items()}  # fmt: skip
FAST = InferenceLimits(
    scheduler=SchedulerLimits(idle_after_seconds=0.15),
    idle_prefill_delay_seconds=0.05,
    connection_check_interval_seconds=0.05,
)

StartWorker = Callable[..., AbstractAsyncContextManager["Worker"]]
"""`started` with the URL of a shared NATS server."""


class Worker:
    """A chat service with a scripted model, and a caller with a tenant of its own."""

    def __init__(
        self,
        bus: Bus,
        backend: FakeBackend,
        limits: InferenceLimits,
        worker_id: str,
        tenant: str,
        model: str,
        template: str,
        fleet: FleetLimits,
        **settings: int,
    ) -> None:
        self.bus = bus
        self.backend = backend
        self.tenant = tenant
        self.workers = WorkerDirectory()
        self.reports = ReportHub(bus, worker_id, self.workers, fleet)
        self.failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        chat_template = ChatTemplate(template, backend, bos="", eos="", adds_bos=False)
        inference = InferenceSettings(chat_max_tokens=1000, **cast(Any, settings))
        info = ModelInfo(model, f"digest of {model}", backend.context, 0)
        self.service = ChatService(
            bus,
            inference,
            limits,
            worker_id,
            LoadedModel(info, backend, chat_template),
            self.workers,
            self.reports,
            self.failure.set_result,
        )
        for file, adapter in enumerate(ADAPTERS, start=1):
            self.service.adapters.put(adapter, file, f"digest of {adapter}")
        slots, queue = inference.model_parallel, inference.model_queue
        self.report = WorkerReport(
            worker_id, "ready", slots, 0, 0, queue, model=self.service.model_info
        )

    @property
    def running(self) -> int:
        return self.service.flights.running

    @property
    def waiting(self) -> int:
        return self.service.flights.waiting

    @property
    def queued(self) -> int:
        """Waiting requests whose prompt is prepared: they are in the engine's queue."""
        flights = self.service.flights.values()
        return sum(flight.sequence is not None and not flight.has_slot for flight in flights)

    def receive_reports(self, *reports: WorkerReport) -> None:
        """Deliver reports of workers."""
        for report in reports:
            subject = subjects.report(report.worker_id)
            self.workers.on_report(Delivery(subject, encode(report), ""))

    async def events(
        self, request: ChatRequest, tenant: str | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        reply = f"_INBOX.{uuid4().hex}"
        async with self.bus.inbox(reply) as inbox:
            await self.bus.publish(subjects.request(tenant or self.tenant), request, reply=reply)
            while True:
                event = read((await inbox.next(10)).data)
                yield event
                if isinstance(event, Done | Failed):
                    return

    async def ask(self, prompt: str, session: str, **more: Any) -> list[StreamEvent]:
        """Return all events of a request of a session."""
        request = ChatRequest(prompt=prompt, session_id=session, **more)
        return [event async for event in self.events(request)]

    async def ask_stateless(self, **fields: Any) -> list[StreamEvent]:
        return [event async for event in self.events(ChatRequest(**fields))]

    async def cancel(self, request_id: str, cancel: Cancel | None = None) -> None:
        await self.bus.publish(subjects.cancel(self.tenant, request_id), cancel or Cancel())

    async def messages(self) -> tuple[ExchangeView, ...]:
        subject = subjects.history("messages", self.tenant)
        return (await self.bus.request(subject, MessagesRequest(), ExchangePage)).messages

    async def context(self, session: str) -> Context:
        subject = subjects.history("context", self.tenant)
        return await self.bus.request(subject, ContextRequest(session), Context)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. Raises TimeoutError after ten seconds."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def started(
    url: str,
    *,
    parallel: int = 8,
    queue: int = 16,
    queue_bytes: int = 2**20,
    step_seconds: float = 0,
    context: int = 2000,
    backend: FakeBackend | None = None,
    limits: InferenceLimits = FAST,
    worker_id: str = "worker",
    tenant: str = "",
    model: str = "fake",
    template: str = CHATML,
    fleet: FleetLimits = FLEET_LIMITS,
) -> AsyncIterator[Worker]:
    """
    Run a worker on the NATS server at `url`; its tenant is new unless given. No request may leave a
    sampler open.
    """
    async with Bus.connect(url, "test") as bus:
        worker = Worker(
            bus,
            backend or FakeBackend(ANSWERS, context, step_seconds),
            limits,
            worker_id,
            tenant or uuid4().hex,
            model,
            template,
            fleet,
            model_parallel=parallel,
            model_queue=queue,
            model_queue_bytes=queue_bytes,
        )
        await worker.service.start()
        try:
            yield worker
        finally:
            await worker.service.drain()
        samplers = worker.backend.samplers
        assert worker.failure.done() or all(sampler.closed for sampler in samplers)


def read(data: bytes) -> StreamEvent:
    return cast(StreamEvent, decode(data, cast(Any, StreamEvent)))


async def rest_of(inbox: Inbox) -> list[StreamEvent]:
    """Return the events that have come, and those that come until there was none for 0.3 s."""
    events = []
    with suppress(TimeoutError):
        while True:
            events.append(read((await inbox.next(0.3)).data))
    return events


def answer_of(events: list[StreamEvent]) -> Answer:
    return Answer.of(event for event in events if isinstance(event, Token | ToolCallDelta))


def text(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))
