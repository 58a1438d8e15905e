"""A chat with a model: the session, its answers, and the requests to history about it."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

from msgspec import ValidationError, convert, to_builtins

from services.client.chat_client import ChatClient, new_request_id
from services.client.history_requests import HistoryRequests
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.history import (
    DescribeRequest,
    Description,
    ExchangePage,
    ExchangeView,
    ExportPage,
    ExportRequest,
    Feedback,
    FeedbackRequest,
    FeedbackStored,
    MessagesRequest,
    Session,
    SessionPage,
    SessionsRequest,
    SystemPrompt,
)
from services.contract.messages import ChatRequest, Done, Failed, SessionId
from services.contract.version import COMMAND
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from services.runtime.nats_url import parse_servers
from services.terminal.output import AnswerView

CONNECT_SECONDS = 3.0
REPORT_SECONDS = 2.5  # in which every worker reports, also in a large fleet
RECONNECT_SECONDS = 10.0  # an answer continues while its reader is disconnected
STOP_SECONDS = 2.0  # for the worker to end an answer that was stopped
TENANT = subjects.OPEN_TENANT

Outcome = Literal["answered", "failed", "stopped"]


class Server(NamedTuple):
    """Where NATS is, and what it takes to connect."""

    url: str
    access: NatsAccess


@contextlib.asynccontextmanager
async def connect(server: Server) -> AsyncIterator[Bus]:
    """Connect to NATS. Raises ConnectionError, where Bus.connect would wait forever."""
    async with contextlib.AsyncExitStack() as stack:
        connecting = stack.enter_async_context(Bus.connect(server.url, "chat", server.access))
        try:
            bus = await asyncio.wait_for(connecting, CONNECT_SECONDS)
        except TimeoutError as error:
            raise ConnectionError(
                f"NATS at {parse_servers(server.url)} can't be reached: start it with"
                f" `{COMMAND} up`, or set NATS_URL or NATS_PORT."
            ) from error
        yield bus


def new_session_id() -> str:
    return f"terminal-{uuid4().hex[:8]}"


def check_session_id(text: str) -> None:
    """Raise ServiceError if it is too long."""
    try:
        convert(text, SessionId)
    except ValidationError as error:
        message = "The name of a session has at most 128 characters."
        raise ServiceError("invalid_request", message) from error


def check_system_prompt(text: str) -> None:
    """Raise ServiceError if it is too long."""
    try:
        convert(text, SystemPrompt)
    except ValidationError as error:
        message = "A system prompt has at most 16,384 characters."
        raise ServiceError("invalid_request", message) from error


class Chat:
    """
    One conversation at a time. Methods that ask a service raise ServiceError; answers don't.
    """

    def __init__(self, bus: Bus, view: AnswerView, session_id: str, model: str | None) -> None:
        self.session_id = session_id
        self.model = model  # None: the default model
        self._bus = bus
        self._view = view
        self._workers = WorkerDirectory()
        self._has_report = asyncio.Event()
        self._client = ChatClient(bus, workers=self._workers)
        self._history = HistoryRequests(bus)
        self._unstored: ChatRequest | None = None
        """The last request, unless its answer is known to be in the session."""
        self._running: str = ""  # the request id of the answer that is shown
        self._deadline = asyncio.timeout(None)  # of that answer

    async def listen(self) -> None:
        """Begin to hear the workers' reports."""
        await self._bus.subscribe(subjects.report(subjects.ANY), self._on_report)

    def _on_report(self, delivery: Delivery) -> None:
        self._workers.on_report(delivery)
        self._has_report.set()

    # --- models ---

    async def model_in_use(self) -> str:
        """Return the name of the model that answers. Raises ServiceError: why none does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_SECONDS):
                while not self._workers.find_model(self.model):
                    self._has_report.clear()
                    await self._has_report.wait()
        if info := self._workers.find_model(self.model):
            return self.model or info.name
        raise self._workers.unavailable_error(self.model)

    def model_names(self) -> list[str]:
        """Return the models, and their adapters, that a ready worker serves."""
        return self._workers.model_names()

    async def choose_model(self, name: str) -> None:
        """Raises ServiceError, for example model_not_found; then the model stays."""
        before, self.model = self.model, name
        try:
            await self.model_in_use()
        except ServiceError:
            self.model = before
            raise

    # --- answers ---

    async def ask(self, prompt: str) -> Outcome:
        """Show the answer to the session's next prompt."""
        return await self._answer(self._request(prompt))

    async def retry(self) -> Outcome:
        """Replace the last answer; one that is not in the session is simply requested again."""
        last, unstored = await self.last_exchange(), self._unstored
        if unstored and (last is None or last.id != unstored.request_id):
            return await self._answer(self._request(unstored.prompt, unstored.retry_of))
        if last is None:
            raise ServiceError("not_found", "There is no answer to retry in this session.")
        return await self._answer(self._request(last.user_prompt, last.id))

    def _request(self, prompt: str, retry_of: str | None = None) -> ChatRequest:
        return ChatRequest(
            prompt=prompt,
            session_id=self.session_id,
            model=self.model,
            retry_of=retry_of,
            request_id=new_request_id(),
            grace_s=RECONNECT_SECONDS,
        )

    async def _answer(self, request: ChatRequest) -> Outcome:
        self._unstored, self._running = request, str(request.request_id)
        try:
            async with asyncio.timeout(None) as self._deadline:
                return await self._read(request)
        except TimeoutError:
            self._view.note("stopped, but no worker confirms it")
            return "stopped"
        except (asyncio.CancelledError, OSError):  # nobody reads on
            self._bus.spawn(self._client.cancel(str(request.request_id)))
            raise
        finally:
            self._running = ""
            self._view.end()

    async def _read(self, request: ChatRequest) -> Outcome:
        outcome: Outcome = "failed"
        async with contextlib.aclosing(self._client.stream(request)) as events:
            async for event in events:
                if isinstance(event, Failed):
                    event = await self._explain(event)
                if isinstance(event, Done):
                    outcome = "stopped" if event.finish_reason == "cancelled" else "answered"
                    if event.stored == "log":
                        self._unstored = None
                self._view.show(event)
        return outcome

    async def _explain(self, failed: Failed) -> Failed:
        """Replace `no_worker` by the reason that the workers report."""
        if failed.code != "no_worker":
            return failed
        try:
            await self.model_in_use()
        except ServiceError as reason:
            return Failed(reason.code, reason.message)
        return failed

    def stop_answer(self) -> bool:
        """
        Have the answer end with the text so far. Return False if none is running, or if it was
        stopped already.
        """
        if not self._running or self._deadline.when() is not None:
            return False
        self._bus.spawn(self._client.cancel(self._running))
        self._deadline.reschedule(asyncio.get_running_loop().time() + STOP_SECONDS)
        return True

    # --- sessions ---

    def switch(self, session_id: str) -> None:
        self.session_id = session_id
        self._unstored = None

    async def sessions(self) -> SessionPage:
        """Return the sessions that were active last."""
        return await self._history.request("sessions", TENANT, SessionsRequest(), SessionPage)

    async def last_exchange(self) -> ExchangeView | None:
        query = MessagesRequest(1, self.session_id)
        page = await self._history.request("messages", TENANT, query, ExchangePage)
        return page.messages[-1] if page.messages else None

    async def give_feedback(self, **fields: str) -> None:
        """Set fields of the feedback on the last answer; the others stay."""
        last = await self.last_exchange()
        if last is None:
            raise ServiceError("not_found", "There is no answer in this session.")
        feedback = convert(to_builtins(last.feedback or Feedback()) | fields, Feedback)
        request = FeedbackRequest(self.session_id, last.id, feedback, new_request_id())
        await self._history.request("feedback", TENANT, request, FeedbackStored)

    async def set_system_prompt(self, text: str | None) -> None:
        """Set the session's system prompt; None: the server's."""
        change = DescribeRequest(self.session_id, Description(system_prompt=text), new_request_id())
        await self._history.request("describe", TENANT, change, Session)

    async def export(self, path: Path) -> int:
        """
        Write the session's exchanges to a new file, as JSON Lines that `POST
        /sessions/{id}/messages` imports, and return their number. Raises OSError.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                count = 0
                async for page in self._export_pages():
                    file.writelines(encode(exchange) + b"\n" for exchange in page.exchanges)
                    count += len(page.exchanges)
        except BaseException:
            path.unlink()
            raise
        return count

    async def _export_pages(self) -> AsyncIterator[ExportPage]:
        query = ExportRequest(self.session_id)
        while True:
            page = await self._history.request("export", TENANT, query, ExportPage)
            yield page
            if page.next is None:
                return
            query = ExportRequest(self.session_id, page.next)
