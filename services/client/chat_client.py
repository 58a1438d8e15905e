"""
Send requests to workers over NATS and read the answers. If a worker is lost, another one resumes
its answer.

    async with Bus.connect("nats://127.0.0.1:4222", "my-service") as bus:
        client = ChatClient(bus)
        async with contextlib.aclosing(client.stream(ChatRequest(prompt="Hello"))) as events:
            async for event in events:
                match event:
                    case Token(channel="content", text=text):
                        print(text, end="", flush=True)
                    case Failed(message=message):
                        print(message)
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from uuid import UUID

from msgspec.structs import replace

from services.client import spans
from services.client.attempt import Attempt, AttemptLost, AttemptReplaced, fetch_replay
from services.client.failover import (
    DEFAULT_POLICY,
    FailoverPolicy,
    FailoverState,
    bus_unavailable,
    worker_lost,
)
from services.client.observer import AnswerObserver, Observe, observe_nothing
from services.client.routing import WorkerDirectory, offer, offer_in_turn
from services.client.transcript import Transcript
from services.contract import prompts, subjects
from services.contract.answer import after_offset
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.messages import (
    Cancel,
    ChatRequest,
    Done,
    Failed,
    Replay,
    StreamEvent,
    Token,
    ToolCallDelta,
)
from services.runtime import trace_context, tracing
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from services.runtime.trace_context import TraceContext

log = logging.getLogger(__name__)


def new_request_id() -> str:
    """Return a UUIDv7 (Python has one from 3.14 on): ids sort by the time of their creation."""
    milliseconds = time.time_ns() // 1_000_000
    bits = milliseconds << 80 | 0x7 << 76 | secrets.randbits(12) << 64
    return str(UUID(int=bits | 0b10 << 62 | secrets.randbits(62)))


@dataclass(frozen=True)
class ChatClient:
    """
    Any number of concurrent requests of one tenant.

    A request goes straight to its session's worker, which has cached the session's prefix, if
    `workers` receives the workers' reports. Without reports NATS picks a worker, which forwards the
    request. `observe` begins to observe each answer that is read.
    """

    bus: Bus
    tenant: str = subjects.OPEN_TENANT
    workers: WorkerDirectory = field(default_factory=WorkerDirectory)
    policy: FailoverPolicy = DEFAULT_POLICY
    observe: Observe = observe_nothing

    def stream(self, request: ChatRequest) -> "AnswerStream":
        """
        Return the answer's events. The last one is a Done or a Failed, whatever happens; nothing is
        raised. If the worker is lost, another one resumes the answer.

        Leaving earlier (break, cancelled task, closed generator) cancels the request: at once, or,
        with `grace_s`, unless a client calls `rejoin` in that time. Iterate inside
        `contextlib.aclosing`, so that leaving closes the generator.
        """
        request = replace(request, request_id=request.request_id or new_request_id())
        return AnswerStream(self, str(request.request_id), request)

    def rejoin(self, request_id: str, offset: int = 0) -> "AnswerStream":
        """
        Return the events of an existing request's answer, from character `offset` on. Workers keep
        answers for a minute after their end; Failed(not_found) if none has it.
        """
        return AnswerStream(self, request_id, None, offset)

    async def find_replay(self, request_id: str, offset: int = 0) -> Replay | None:
        """
        Return the events, from character `offset` on, of an answer that a worker generates or has
        finished in the last minute; None if there is no such worker. Raises ServiceError.
        """
        subjects.require_request_id(request_id)
        subject = subjects.replay(self.tenant, request_id)
        try:
            return await fetch_replay(self.bus, subject, offset, self.policy.join_seconds)
        except (NoResponders, TimeoutError):
            return None

    async def cancel(self, request_id: str) -> None:
        """
        Cancel a request of this tenant, from any client; a finished one stays as it is. Raises
        ServiceError(not_found) for an invalid id.
        """
        subjects.require_request_id(request_id)
        subject = subjects.cancel(self.tenant, request_id)
        await self.bus.publish(subject, Cancel(), headers=trace_context.headers())


class TextSink(Protocol):
    """Sends text on as soon as it arrives."""

    def take(self, token: Token) -> bool:
        """Send the text now and return True, or return False: then the stream yields it."""


class AnswerStream(AsyncIterator[StreamEvent]):
    """
    The events of an answer, of one request or, without it, of the running request with this id. See
    ChatClient.stream.
    """

    def __init__(
        self, client: ChatClient, request_id: str, request: ChatRequest | None, offset: int = 0
    ) -> None:
        self._client = client
        self._request_id = request_id
        self._request = request
        self._offset = offset
        self._reader: AnswerReader | None = None
        self._events = self._read()

    def __anext__(self) -> Coroutine[Any, Any, StreamEvent]:
        return self._events.__anext__()

    async def aclose(self) -> None:
        await self._events.aclose()

    def pass_text_to(self, sink: TextSink) -> None:
        """
        Pass text that arrives while the caller waits for the next event to the sink, without waking
        the caller's task. Call it once an event was yielded.
        """
        if self._reader:
            self._reader.sink = sink

    async def _read(self) -> AsyncGenerator[StreamEvent, None]:
        client, request_id, request = self._client, self._request_id, self._request
        try:
            observer = client.observe(client.tenant, request)
        except ServiceError as error:
            yield _failed(request_id, error)
            return
        self._reader = reader = AnswerReader(client, request_id, observer, self._offset)
        has_ended = False
        try:
            if not client.bus.connected:
                raise bus_unavailable()
            if request:
                _check(request)
                await reader.start(request)
            else:
                subjects.require_request_id(request_id)
                await reader.join()
            while not has_ended:
                event = await reader.next()
                has_ended = isinstance(event, Done | Failed)
                observer.on_event(event)
                yield event
        except Exception as error:
            has_ended = True
            if not reader.has_joined:
                reader.abandon()
            failed = _failed(request_id, error)
            observer.on_event(failed)
            yield failed
        finally:
            observer.close()
            await reader.close()
            if request and not request.grace_s and not has_ended:
                # spawned, because a cancelled task can't await here
                client.bus.spawn(client.cancel(request_id))


class AnswerReader:
    """
    Reads one answer through as many attempts as it takes.

        start, join ──► reading ──► Done, Failed
                         ▲   │
         joined, resumed │   │ worker lost, attempt replaced
                         │   ▼
                       recovering ──► ServiceError(worker_lost)

    Call `start` or `join`, then `next` until it returns a Done or a Failed, then `close`. All raise
    ServiceError. The first `offset` characters of the answer are not returned.
    """

    __slots__ = (
        "_client",
        "_request_id",
        "_observer",
        "_offset",
        "_request",
        "_transcript",
        "_failover",
        "_attempt",
        "_span",
        "_trace",
        "_subscription",
        "_deadline",
        "_drops",
        "has_joined",
        "sink",
    )

    def __init__(
        self, client: ChatClient, request_id: str, observer: AnswerObserver, offset: int = 0
    ) -> None:
        self._client = client
        self._request_id = request_id
        self._observer = observer
        self._offset = offset
        self._request: ChatRequest | None = None
        self._transcript = Transcript()
        self._failover = FailoverState()
        self._attempt: Attempt | None = None
        self._span: tracing.Span | None = None  # of the attempt, if this reader has started it
        self._trace: TraceContext | None = None  # in which later attempts are, if no other one is
        self._subscription = AsyncExitStack()
        self._deadline: float | None = None  # monotonic time at which `timeout_s` is over
        self._drops: dict[str, asyncio.Task[None]] = {}  # by the attempt's reply subject
        self.has_joined = False
        """Whether other readers may read the attempt too."""
        self.sink: TextSink | None = None
        """Takes text that arrives while `next` waits."""

    async def start(self, request: ChatRequest) -> None:
        """Start an attempt, or join the running one if the request's id is in use."""
        self._request = self._request or request
        number = self._failover.losses + 1
        with trace_context.working_on(trace_context.current.get() or self._trace):
            self._span = spans.start_chat(request, "client", attempt=number)
        self._trace = self._trace or self._span.context
        try:
            with self._span.active():
                await self._start_attempt(request)
        except ServiceError as error:
            self._end_span(error.code)
            if error.code != "conflict":
                raise
            if not await self._try_join():
                raise worker_lost("The worker that generated this answer has lost it.") from error
        self._set_deadline(request.timeout_s)

    async def join(self) -> None:
        """
        Join the attempt that a worker runs or has finished. Raises ServiceError: not_found if no
        worker knows the request, conflict if its request differs from this one.
        """
        if not await self._try_join():
            raise ServiceError("not_found", "No worker knows this request.")

    async def next(self) -> StreamEvent:
        """Wait for the next event."""
        while True:
            assert self._attempt is not None
            try:
                event = await self._attempt.next()
            except AttemptReplaced:
                self._end_span("replaced")
                self.has_joined = True  # another reader has started the new attempt
                if not await self._try_join():
                    await self._recover("The worker that continued the answer is lost.")
            except AttemptLost as loss:
                await self._recover(str(loss))
            except ServiceError as error:
                self._end_span(error.code)
                raise
            else:
                if not isinstance(event, Token | ToolCallDelta):
                    if isinstance(event, Done | Failed):
                        self._end_span(event)
                    return event
                if news := after_offset(event, self._offset):
                    return news

    def _take(self, subject: str, data: bytes) -> bool:
        """Pass the event to the sink, if it is the next text. Return whether the sink took it."""
        if not self.sink or not self._attempt or self._transcript.length < self._offset:
            return False
        token = self._attempt.take_text(subject, data, self.sink.take)
        if token is not None:
            self._observer.on_event(token)
        return token is not None

    def abandon(self) -> None:
        """Have the worker drop the current attempt."""
        if self._attempt:
            self._drop(self._attempt.reply)
            self._attempt = None

    async def close(self) -> None:
        self.sink = None  # it refers to the stream of this reader
        self._end_span("cancelled")
        await self._subscription.aclose()

    # --- beginning an attempt ---

    async def _start_attempt(self, request: ChatRequest) -> None:
        workers = self._client.workers
        digest = request.resume.state.model if request.resume else None
        ranked = workers.rank(
            prompts.routing_key(self._client.tenant, request), request.model, digest
        )
        if not ranked:
            workers.check_kind(request.model)
        if digest and not ranked and workers.ready:
            message = "No worker has the model that began the answer."
            raise ServiceError("no_worker", message)
        if not await offer_in_turn(ranked, partial(self._offer, request)):
            await self._publish(request)

    async def _offer(self, request: ChatRequest, worker_id: str) -> None:
        attempt = await self._open_attempt()
        bus, workers, tenant = self._client.bus, self._client.workers, self._client.tenant
        timeout = self._client.policy.admission_seconds
        await offer(bus, workers, worker_id, tenant, request, attempt.reply, timeout)
        attempt.admitted_by(worker_id)
        self._attempt = attempt

    async def _publish(self, request: ChatRequest) -> None:
        """Send the request to the worker that NATS picks, which may be a frozen one."""
        bus, subject = self._client.bus, subjects.request(self._client.tenant)
        for _ in range(self._client.policy.max_publish_tries):
            attempt = await self._open_attempt()
            await bus.publish(subject, request, attempt.reply, trace_context.headers())
            try:
                await attempt.wait_for_admission()
            except TimeoutError:
                self._drop(attempt.reply)
            else:
                self._attempt = attempt
                return
        raise worker_lost("No worker responds.") if bus.connected else bus_unavailable()

    async def _try_join(self) -> bool:
        """Return whether a worker had an attempt to join."""
        attempt = await self._open_attempt("*")
        replay = await self._client.find_replay(self._request_id, self._transcript.length)
        if replay is None:
            return False
        if self._request and not _is_same(self._request, replay.request):
            raise ServiceError("conflict", "Another request has the same id: use a new id.")
        if drop := self._drops.pop(replay.reply, None):
            drop.cancel()  # the attempt is alive after all
        self._request = replay.request
        self._set_deadline(replay.request.timeout_s, replay.age_seconds)
        self.has_joined = True
        attempt.adopt(replay)
        self._attempt = attempt
        return True

    async def _open_attempt(self, attempt_id: str = "") -> Attempt:
        """Subscribe to an attempt (`*`: to all), and no longer to the previous one."""
        self._attempt = None
        await self._subscription.aclose()
        bus, policy, tenant = self._client.bus, self._client.policy, self._client.tenant
        reply = subjects.reply(tenant, self._request_id, attempt_id or secrets.token_hex(8))
        inbox = await self._subscription.enter_async_context(bus.inbox(reply))
        inbox.take = self._take
        return Attempt(
            bus,
            policy,
            tenant,
            self._request_id,
            self._transcript,
            inbox,
            reply,
            self._observer.on_replay,
        )

    # --- failover ---

    async def _recover(self, reason: str) -> None:
        """Resume the answer in another attempt; the current one, if there is one, is dropped."""
        self._end_span("worker_lost")
        policy = self._client.policy
        self._failover = policy.after_loss(self._failover, reason, time.monotonic())
        self._observer.on_failover()
        if self._attempt:
            self._client.workers.remove(self._attempt.worker_id)
            self.abandon()
        while True:
            try:
                return await self._join_or_resume()
            except ServiceError as error:
                now = time.monotonic()
                if self._request and self._client.workers.is_loading(self._request.model):
                    self._failover = policy.while_loading(self._failover, now)
                delay = policy.retry_delay(self._failover, error, now)
            await asyncio.sleep(delay)

    async def _join_or_resume(self) -> None:
        if self.has_joined and await self._try_join():
            return  # another reader has resumed the answer
        assert self._request is not None
        left = None if self._deadline is None else self._deadline - time.monotonic()
        bus, policy = self._client.bus, self._client.policy
        resumed = policy.resume_request(
            self._failover, self._request, self._transcript, left, bus.max_payload
        )
        await self.start(resumed)

    def _set_deadline(self, timeout: float | None, age: float = 0.0) -> None:
        """
        Set the deadline from the `timeout` of an attempt that was accepted `age` seconds ago. Only
        the first call counts: later attempts get the remaining time as their `timeout_s`.
        """
        if timeout is not None and self._deadline is None:
            self._deadline = time.monotonic() + timeout - age

    def _end_span(self, end: Done | Failed | str) -> None:
        """End the attempt's span, if there is one, with its last event or an error's code."""
        span, self._span = self._span, None
        if span is None:
            return
        if self._attempt:
            span.set({"finetunellm.worker_id": self._attempt.worker_id or None})
        spans.end_chat(span, end)

    def _drop(self, reply: str) -> None:
        self._drops[reply] = self._client.bus.spawn(self._send_drops(reply))

    async def _send_drops(self, reply: str) -> None:
        """Repeat the message, because a disconnected worker may be back in a moment."""
        subject = subjects.cancel(self._client.tenant, self._request_id)
        for _ in range(self._client.policy.drop_messages):
            await self._client.bus.publish(
                subject, Cancel(reply=reply), headers=trace_context.headers()
            )
            await asyncio.sleep(self._client.policy.retry_seconds)


def _failed(request_id: str, error: Exception) -> Failed:
    if isinstance(error, ServiceError):
        return Failed(error.code, error.message, error.retry_after)
    log.error("reading the answer failed request_id=%s", request_id, exc_info=error)
    return Failed("internal", "Reading the answer failed. See the log of this process.")


def _check(request: ChatRequest) -> None:
    """Raise ServiceError if the request is invalid: msgspec checks fields only while decoding."""
    try:
        prompts.check(decode(encode(request), ChatRequest))
    except UnicodeEncodeError as error:
        message = "The prompt contains half of a surrogate pair: send valid Unicode."
        raise ServiceError("invalid_request", message) from error


def _is_same(one: ChatRequest, other: ChatRequest) -> bool:
    """Compare without the fields in which attempts at one answer differ."""
    attempt = {name: getattr(other, name) for name in ("resume", "grace_s", "timeout_s")}
    return replace(one, **attempt) == other
