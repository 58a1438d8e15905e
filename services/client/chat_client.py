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
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from msgspec.structs import replace

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
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders

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

    def stream(self, request: ChatRequest) -> AsyncGenerator[StreamEvent, None]:
        """
        Yield the answer's events. The last one is a Done or a Failed, whatever happens; nothing is
        raised. If the worker is lost, another one resumes the answer.

        Leaving earlier (break, cancelled task, closed generator) cancels the request: at once, or,
        with `grace_s`, unless a client calls `rejoin` in that time. Iterate inside
        `contextlib.aclosing`, so that leaving closes the generator.
        """
        request = replace(request, request_id=request.request_id or new_request_id())
        return self._read(str(request.request_id), request)

    def rejoin(self, request_id: str, offset: int = 0) -> AsyncGenerator[StreamEvent, None]:
        """
        Yield the events of an existing request's answer, from character `offset` on. Workers keep
        answers for a minute after their end; Failed(not_found) if none has it.
        """
        return self._read(request_id, request=None, offset=offset)

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
        await self.bus.publish(subjects.cancel(self.tenant, request_id), Cancel())

    async def _read(
        self, request_id: str, request: ChatRequest | None, offset: int = 0
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of `request`, or, without it, those of a running request."""
        observer = self.observe(self.tenant, request)
        reader = AnswerReader(self, request_id, observer, offset)
        has_ended = False
        try:
            if not self.bus.connected:
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
                self.bus.spawn(self.cancel(request_id))


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
        self._subscription = AsyncExitStack()
        self._deadline: float | None = None  # monotonic time at which `timeout_s` is over
        self._drops: dict[str, asyncio.Task[None]] = {}  # by the attempt's reply subject
        self.has_joined = False
        """Whether other readers may read the attempt too."""

    async def start(self, request: ChatRequest) -> None:
        """Start an attempt, or join the running one if the request's id is in use."""
        self._request = self._request or request
        try:
            await self._start_attempt(request)
        except ServiceError as error:
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
                self.has_joined = True  # another reader has started the new attempt
                if not await self._try_join():
                    await self._recover("The worker that continued the answer is lost.")
            except AttemptLost as loss:
                await self._recover(str(loss))
            else:
                if not isinstance(event, Token | ToolCallDelta):
                    return event
                if news := after_offset(event, self._offset):
                    return news

    def abandon(self) -> None:
        """Have the worker drop the current attempt."""
        if self._attempt:
            self._drop(self._attempt.reply)
            self._attempt = None

    async def close(self) -> None:
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
            await bus.publish(subject, request, attempt.reply)
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
                delay = policy.retry_delay(self._failover, error, time.monotonic())
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

    def _drop(self, reply: str) -> None:
        self._drops[reply] = self._client.bus.spawn(self._send_drops(reply))

    async def _send_drops(self, reply: str) -> None:
        """Repeat the message, because a disconnected worker may be back in a moment."""
        subject = subjects.cancel(self._client.tenant, self._request_id)
        for _ in range(self._client.policy.drop_messages):
            await self._client.bus.publish(subject, Cancel(reply=reply))
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
