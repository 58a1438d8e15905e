"""
Reads one answer to its end, whatever becomes of the workers that give it. Knows no HTTP, and
nothing of what a worker does.
"""

import asyncio
import secrets
import time
from collections import deque
from contextlib import AsyncExitStack
from functools import partial
from typing import cast

from msgspec.structs import replace

from services.client.offers import first_to_take, offer
from services.client.replays import replay
from services.client.transcript import Gap, Mismatch, Transcript, after
from services.client.workers import WorkerDirectory
from services.contract import prompts, subjects
from services.contract.codec import decode, encode
from services.contract.errors import FAILOVER_CODES, ErrorCode, ServiceError
from services.contract.messages import (
    Accepted,
    Cancel,
    ChatRequest,
    Failed,
    Replay,
    StreamEvent,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Inbox, NoResponders

# All in seconds. A worker that lives sends something at least once a second.
SILENCE = 1.1  # after which it is asked whether it lives
PROBE_TIMEOUT = 1.0  # that it has to say so; it needs a millisecond
LOST_AFTER = 4.0  # of silence; a worker that was out of touch drops its answers after 3
BLINK = 0.25  # in which a worker whose connection broke is there again
RECONNECT = 2.0  # in which all are, after NATS was away
ACK_TIMEOUT = 1.0  # that a worker has to take a request; it needs a millisecond
JOIN_TIMEOUT = 0.5  # that the holder of an answer has to say so; it needs a millisecond
PATIENCE = 10.0  # for another worker, or for NATS, to be there
RETRY_INTERVAL = 0.3
NO_TIME = 0.001  # for an answer whose deadline has passed: what was said is kept
RETRY_AFTER = 1.0  # where the next try can meet another worker or a bus that is back

MOST_LOSSES = 3  # of workers, for one answer
TRIES = 6  # of a request that NATS picks a worker for: it may pick a frozen one again and again
ABANDONED_FOR = 8  # times RETRY_INTERVAL and more: as long as a worker needs to drop it by itself
MOST_BYTES = 1_000_000  # of a request: NATS takes 1 MiB, with the headers
WORTH_WAITING: tuple[ErrorCode, ...] = ("overloaded", "no_worker", "model_loading", *FAILOVER_CODES)


class Reader:
    """
    `ask` or `join` comes first, then `next` until there is a Done or a Failed, then `leave`. All
    raise ServiceError. Of the text only what comes after `told` characters is told.
    """

    def __init__(
        self, bus: Bus, workers: WorkerDirectory, tenant: str, request_id: str, told: int = 0
    ) -> None:
        self._bus = bus
        self._workers = workers
        self._tenant = tenant
        self._request_id = request_id
        self._told = told
        self._request: ChatRequest | None = None
        self._transcript = Transcript()
        self._replayed: deque[StreamEvent] = deque()
        self._listening = AsyncExitStack()
        self._inbox = Inbox()
        self._reply = ""  # of the attempt that is read
        self._worker_id = ""
        self._heard_at = 0.0
        self._deadline: float | None = None  # monotonic time at which `timeout_s` is over
        self._losses = 0
        self.has_joined = False
        """Whether it joined an attempt, which others may read too."""
        self._abandoning: dict[str, asyncio.Task[None]] = {}  # attempts, by their reply subject

    async def ask(self, request: ChatRequest) -> None:
        """An answer that is being given already under the request's id is joined."""
        self._request = self._request or request
        digest = request.resume.state.model if request.resume else None
        route = prompts.routing_key(self._tenant, request)
        order = self._workers.order(route, request.model, digest)
        if digest and not order and self._workers.ready:
            message = "No worker is there of the model that began the answer."
            raise ServiceError("no_worker", message, RETRY_AFTER)
        try:
            taker = await first_to_take(order, partial(self._offer, request))
            self._worker_id = taker or await self._offer_to_any(request)
        except ServiceError as error:
            self._reply = ""  # nobody has taken it
            if error.code != "conflict":
                raise
            await self._join_other()
        self._heard_at = time.monotonic()
        self._set_deadline(request.timeout_s)

    async def join(self) -> None:
        """Raises ServiceError(not_found) if no worker knows of the request."""
        await self._listen(subjects.reply(self._tenant, self._request_id, "*"))
        subject = subjects.replay(self._tenant, self._request_id)
        try:
            held = await replay(self._bus, subject, self._transcript.length, JOIN_TIMEOUT)
        except (NoResponders, TimeoutError) as error:
            raise ServiceError("not_found", "No worker knows of this request.") from error
        if self._request and not _is_same(self._request, held.request):
            raise ServiceError("conflict", "Another request has the same id: choose a new one.")
        if abandoning := self._abandoning.pop(held.reply, None):
            abandoning.cancel()  # this very attempt is alive
        self._request = held.request
        self._set_deadline(held.request.timeout_s, held.age_seconds)
        self.has_joined = True
        self._take_up(held)

    async def _join_other(self) -> None:
        """Whoever answers already; it may just have lost the answer, as it was out of touch."""
        try:
            await self.join()
        except ServiceError as error:
            if error.code != "not_found":
                raise
            raise _lost("Who answered this request has just lost the answer.") from error

    async def next(self) -> StreamEvent:
        """What is new, as it comes."""
        while True:
            is_replayed = bool(self._replayed)
            event = self._replayed.popleft() if is_replayed else await self._hear()
            if event is None:
                continue
            try:
                news = self._transcript.take(event)
            except Gap:
                if is_replayed:
                    raise _lost("A part of the answer was lost.") from None
                await self._catch_up()
                continue
            except Mismatch:
                raise _lost("The answer goes on otherwise than it began.") from None
            if isinstance(event, Accepted):
                self._worker_id = event.worker_id
            if isinstance(event, Failed) and event.code in FAILOVER_CODES:
                await self._go_on(event.message)
            elif news and (untold := after(news, self._told)):
                return untold

    def abandon(self) -> None:
        """Nobody waits for the attempt that is read."""
        if self._reply:
            self._abandoning[self._reply] = self._bus.spawn(self._drop(self._reply))
            self._reply = ""

    async def leave(self) -> None:
        await self._listening.aclose()

    async def _offer(self, request: ChatRequest, worker_id: str) -> None:
        await self._begin_attempt()
        await offer(
            self._bus, self._workers, worker_id, self._tenant, request, self._reply, ACK_TIMEOUT
        )

    async def _offer_to_any(self, request: ChatRequest) -> str:
        """The id of the worker that NATS picked. One that is frozen may be picked, too."""
        for _ in range(TRIES):
            await self._begin_attempt()
            await self._bus.publish(subjects.request(self._tenant), request, self._reply)
            try:
                first = _read((await self._inbox.next(ACK_TIMEOUT)).data)
            except TimeoutError:
                self.abandon()
                continue
            except NoResponders:
                message = "No inference worker is there: start one, or wait."
                raise ServiceError("no_worker", message, RETRY_AFTER) from None
            if isinstance(first, Failed):
                raise ServiceError(first.code, first.message, first.retry_after)
            self._replayed.append(first)
            return first.worker_id if isinstance(first, Accepted) else ""
        raise _lost("No worker answers.") if self._bus.connected else bus_unavailable()

    async def _begin_attempt(self) -> None:
        """With a reply subject of its own: what an earlier one still sends is not heard."""
        self._reply = subjects.reply(self._tenant, self._request_id, secrets.token_hex(8))
        await self._listen(self._reply)

    async def _listen(self, subject: str) -> None:
        self._replayed.clear()
        await self._listening.aclose()
        self._inbox = await self._listening.enter_async_context(self._bus.inbox(subject))

    async def _hear(self) -> StreamEvent | None:
        """The next event of the attempt, or None: then look at what was replayed."""
        try:
            delivery = await self._inbox.next(SILENCE)
        except TimeoutError:
            await self._catch_up()
            return None
        if delivery.subject != self._reply:  # another attempt, which may have replaced this one
            if time.monotonic() - self._heard_at >= SILENCE:
                await self._catch_up()
            return None
        self._heard_at = time.monotonic()
        return _read(delivery.data)

    async def _catch_up(self) -> None:
        """Asks the worker what was said since: which also tells whether it lives."""
        if not self._bus.connected:
            await self._wait_for_bus()
        try:
            since = await self._probe()
        except NoResponders:
            await self._go_on("The worker is gone.")
        except TimeoutError:
            if time.monotonic() - self._heard_at >= LOST_AFTER:
                await self._go_on("The worker went silent.")
        except ServiceError:  # it lives, and does not know of the request
            await self._go_on("The worker has lost the answer.")
        else:
            if since.reply == self._reply:
                self._take_up(since)
            else:
                await self.join()

    async def _probe(self) -> Replay:
        if self._worker_id:
            subject = subjects.worker_replay(self._worker_id, self._tenant, self._request_id)
        else:
            subject = subjects.replay(self._tenant, self._request_id)
        ask = partial(replay, self._bus, subject, self._transcript.length, PROBE_TIMEOUT)
        try:
            return await ask()
        except NoResponders:
            await asyncio.sleep(max(BLINK, RECONNECT - self._bus.seconds_since_reconnect))
            return await ask()

    def _take_up(self, held: Replay) -> None:
        self._heard_at = time.monotonic()
        self._reply, self._worker_id = held.reply, held.worker_id
        self._replayed.extend(held.events)

    async def _go_on(self, why: str) -> None:
        """At another worker, or with whoever has done so already."""
        self._losses += 1
        if self._losses > MOST_LOSSES:
            raise _lost(f"{why} {MOST_LOSSES} other workers were lost before it.")
        self._workers.forget(self._worker_id)
        self.abandon()
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return await self._join_or_ask(why)
            except _GivenUp:
                raise
            except ServiceError as error:
                if error.code not in WORTH_WAITING or time.monotonic() > deadline:
                    raise _lost(f"{why} No other worker can resume: {error.message}") from error
            await asyncio.sleep(RETRY_INTERVAL)

    async def _join_or_ask(self, why: str) -> None:
        if self.has_joined:
            try:
                return await self.join()
            except ServiceError as error:
                if error.code != "not_found":
                    raise
        await self.ask(self._resumed(why))

    def _resumed(self, why: str) -> ChatRequest:
        """Raises _GivenUp."""
        assert self._request is not None
        try:
            request = replace(
                self._request, resume=self._transcript.resume(), timeout_s=self._time_left()
            )
        except Mismatch:
            raise _given_up(f"{why} No other worker can resume: the prompt is too long.") from None
        if len(encode(request)) > MOST_BYTES:
            raise _given_up(f"{why} No other worker can resume: the conversation is too long.")
        return request

    def _set_deadline(self, timeout: float | None, age: float = 0.0) -> None:
        """
        Set the deadline from the `timeout` of an attempt that was accepted `age` seconds ago. Only
        the first call counts: later attempts get the time that is left as their `timeout_s`.
        """
        if timeout is not None and self._deadline is None:
            self._deadline = time.monotonic() + timeout - age

    def _time_left(self) -> float | None:
        """Of the time that the request gives its answer, whoever goes on with it."""
        return self._deadline and max(self._deadline - time.monotonic(), NO_TIME)

    async def _drop(self, reply: str) -> None:
        """Said several times: a worker that is cut off may be back in a moment."""
        subject = subjects.cancel(self._tenant, self._request_id)
        for _ in range(ABANDONED_FOR):
            await self._bus.publish(subject, Cancel(reply=reply))
            await asyncio.sleep(RETRY_INTERVAL)

    async def _wait_for_bus(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._bus.connected:
            if time.monotonic() > deadline:
                raise bus_unavailable()
            await asyncio.sleep(BLINK)
        self._heard_at = time.monotonic()


def bus_unavailable() -> ServiceError:
    return ServiceError("bus_unavailable", "NATS can't be reached; try again soon.", RETRY_AFTER)


class _GivenUp(ServiceError):
    """The answer is lost, and no other worker can resume it."""


def _given_up(message: str) -> _GivenUp:
    return _GivenUp("worker_lost", f"{message} Ask again.", RETRY_AFTER)


def _lost(message: str) -> ServiceError:
    return ServiceError("worker_lost", f"{message} Ask again.", RETRY_AFTER)


def _is_same(one: ChatRequest, other: ChatRequest) -> bool:
    def asked(request: ChatRequest) -> ChatRequest:
        """Without what each attempt has of its own."""
        return replace(request, resume=None, grace_s=0, timeout_s=None)

    return asked(one) == asked(other)


def _read(data: bytes) -> StreamEvent:
    try:
        return decode(data, cast(type[StreamEvent], StreamEvent))
    except ServiceError as error:  # not the caller's mistake, as its code would say
        raise ServiceError("internal", f"The worker sent an unreadable event: {error}") from error
