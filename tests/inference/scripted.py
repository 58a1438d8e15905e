"""The service on a real bus and with a real history; what the model says is scripted."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.history import (
    Context,
    ContextRequest,
    ExchangePage,
    ExchangeView,
    MessagesRequest,
)
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    ModelInfo,
    StreamEvent,
    Token,
    WorkerReport,
)
from services.history.service import start as start_history
from services.history.settings import HistorySettings
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.models import LoadedModel
from services.inference.service import ChatService
from services.inference.settings import InferenceSettings
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, Inbox
from tests.inference.engine.prompt.test_chat_template import CHATML
from tests.inference.fake_backend import FakeBackend
from tests.servers import nats_server, running

ADAPTERS = ("shout", "loud")
NOBODY = "mongodb://127.0.0.1:9/"  # the discard port: no database
LONG = b"".join(b"%d " % number for number in range(200))[:500]  # no loop
ANSWERS = {f"{question}<|im_end|>\n<|im_start|>assistant\n": answer for question, answer in {
    "hi": b"hello", "long": LONG, "stop": b"fine\nUser: me", "emoji": "é🙂".encode(),
}.items()}  # fmt: skip


class Worker:
    """A ChatService over a scripted model, and what callers see of it."""

    def __init__(
        self,
        bus: Bus,
        url: str,
        backend: FakeBackend,
        parallel: int,
        queue: int,
        queue_bytes: int = 2**20,
        worker_id: str = "worker",
        name: str = "fake",
        source: str = CHATML,
    ) -> None:
        self.bus = bus
        self.url = url
        self.workers = WorkerDirectory()
        self.backend = backend
        self.failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        template = ChatTemplate(source, backend, bos="", eos="", adds_bos=False)
        settings = InferenceSettings(
            nats_url=url,
            model_parallel=parallel,
            model_queue=queue,
            model_queue_bytes=queue_bytes,
            chat_max_tokens=1000,
        )
        info = ModelInfo(name, f"digest of {name}", backend.context, 0)
        served = (info, *(replace(info, name=f"{name}:{adapter}") for adapter in ADAPTERS))
        model = LoadedModel(replace(info, adapters=ADAPTERS), backend, template, served)
        fail = self.failure.set_result
        self.service = ChatService(bus, settings, worker_id, model, self.workers, fail)
        self.report = WorkerReport(
            worker_id, "ready", parallel, 0, 0, queue, model=replace(info, adapters=ADAPTERS)
        )

    def hear(self, *reports: WorkerReport) -> None:
        for report in reports:
            subject = subjects.report(report.worker_id)
            self.workers.on_report(Delivery(subject, encode(report), ""))

    async def rest_of(self, inbox: Inbox) -> list[StreamEvent]:
        """What came, and what comes until nothing has for a while."""
        events = []
        with suppress(TimeoutError):
            while True:
                events.append(read((await inbox.next(0.3)).data))
        return events

    async def events(
        self, request: ChatRequest, tenant: str = subjects.OPEN_TENANT
    ) -> AsyncGenerator[StreamEvent, None]:
        inbox_of = f"_INBOX.{id(request)}"
        async with self.bus.inbox(inbox_of) as inbox:
            await self.bus.publish(subjects.request(tenant), request, reply=inbox_of)
            while True:
                event = read((await inbox.next(10)).data)
                yield event
                if isinstance(event, Done | Failed):
                    return

    async def ask(self, prompt: str, session: str, **more: Any) -> list[StreamEvent]:
        request = ChatRequest(prompt=prompt, session_id=session, **more)
        return [event async for event in self.events(request)]

    async def messages(self) -> tuple[ExchangeView, ...]:
        subject = subjects.history("messages", subjects.OPEN_TENANT)
        return (await self.bus.request(subject, MessagesRequest(), ExchangePage)).messages

    async def context(self, session: str) -> Context:
        subject = subjects.history("context", subjects.OPEN_TENANT)
        return await self.bus.request(subject, ContextRequest(session), Context)


def read(data: bytes) -> StreamEvent:
    return cast(StreamEvent, decode(data, cast(Any, StreamEvent)))


def text(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


@asynccontextmanager
async def worker(
    folder: Path,
    parallel: int = 8,
    queue: int = 16,
    queue_bytes: int = 2**20,
    step_seconds: float = 0,
    context: int = 2000,
    backend: FakeBackend | None = None,
    url: str = "",
    worker_id: str = "worker",
    name: str = "fake",
    source: str = CHATML,
) -> AsyncIterator[Worker]:
    """
    On a nats-server of its own (if not that of another), since requests go to who serves; `source`
    is that of its chat template.
    """
    async with AsyncExitStack() as stack:
        if not url:
            server = stack.enter_context(running(nats_server(folder)))
            url = f"nats://127.0.0.1:{server.port}"
        await start_history(stack, HistorySettings(nats_url=url, mongodb_uri=NOBODY), pytest.fail)
        bus = await stack.enter_async_context(Bus.connect(url, "test"))
        backend = backend or FakeBackend(ANSWERS, context, step_seconds)
        worker = Worker(bus, url, backend, parallel, queue, queue_bytes, worker_id, name, source)
        await worker.service.start()
        stack.push_async_callback(worker.service.drain)
        yield worker
