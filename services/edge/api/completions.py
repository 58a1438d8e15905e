"""
A completion as HTTP: whole as JSON, or streamed as server-sent events. Knows neither bodies nor
routes.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec
from litestar.types import Receive, Scope, Send
from msgspec import Struct

from services.contract.errors import ServiceError
from services.contract.messages import Accepted, Done, Failed, StreamEvent, Token
from services.contract.messages import Usage as Counted
from services.edge import errors
from services.edge.api.answers import ChoiceBuilder
from services.edge.api.objects import (
    ChatChunk,
    ChatCompletion,
    CompletionUsage,
    PromptDetails,
    TextCompletion,
)
from services.edge.lines import one_line
from services.edge.presence import while_present
from services.edge.sse import PING, PING_INTERVAL

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
MAX_WAITING_EVENTS = 64  # of all answers, while the client reads slowly
Events = AsyncGenerator[StreamEvent, None]


class ResponseObjects(NamedTuple):
    """The objects of an endpoint."""

    part: type[Struct]
    whole: type[Struct]


CHAT = ResponseObjects(ChatChunk, ChatCompletion)
TEXT = ResponseObjects(TextCompletion, TextCompletion)


class CompletionBuilder(NamedTuple):
    """
    What is under way. `n` answers each belong to one prompt; `heading` are the fields that all
    objects have. `cancel` stops an answer, by its number; its Done, with the usage, still
    follows.
    """

    form: ResponseObjects
    heading: dict[str, Any]
    answers: Sequence[ChoiceBuilder]
    streams: Sequence[Events]
    n: int
    refusal: Callable[[Failed], ServiceError]
    cancel: Callable[[int], None]

    def push(self, number: int, token: Token) -> list[Struct]:
        """Add a token to an answer, and cancel its generation if that completes it."""
        answer = self.answers[number]
        was_complete = answer.is_complete
        parts = [*answer.push(token)]
        if answer.is_complete and not was_complete:
            self.cancel(number)
        return parts

    def part(self, choices: Iterable[Struct], **more: Any) -> bytes:
        return msgspec.json.encode(self.form.part(choices=tuple(choices), **self.heading, **more))

    def whole(self, usages: dict[int, Counted]) -> bytes:
        choices = tuple(answer.whole() for answer in self.answers)
        usage = self.usage(usages)
        return msgspec.json.encode(self.form.whole(choices=choices, usage=usage, **self.heading))

    def usage(self, usages: dict[int, Counted]) -> CompletionUsage:
        """Each prompt counts once, however many answers it got."""
        prompts = [usage for number, usage in usages.items() if number % self.n == 0]
        read = sum(usage.prompt_tokens for usage in prompts)
        written = sum(usage.completion_tokens for usage in usages.values())
        cached = sum(usage.cached_tokens for usage in prompts)
        return CompletionUsage(read, written, read + written, PromptDetails(cached))


class WholeResponse:
    """An ASGI response, since Litestar's own goes on with an answer that nobody waits for."""

    def __init__(self, completion: CompletionBuilder) -> None:
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_present(receive, self._answer(send))
        except asyncio.CancelledError:  # by uvicorn, when a drain has lasted too long
            raise _shutting_down() from None

    async def _answer(self, send: Send) -> None:
        completion = self._completion
        usages: dict[int, Counted] = {}
        async with aclosing(_together(completion.streams)) as events:
            async for number, event in events:
                match event:
                    case Token():
                        completion.push(number, event)
                    case Done():
                        list(completion.answers[number].end(event))
                        usages[number] = event.usage
                    case Failed():
                        raise completion.refusal(event)
        body = completion.whole(usages)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class StreamedResponse:
    """
    The headers wait for the first event after Accepted, so that a request which fails before that
    is answered with its own status. An error after that is an event, which the SDKs raise.
    """

    def __init__(self, completion: CompletionBuilder, includes_usage: bool) -> None:
        self._completion = completion
        # OpenAI's: null in all parts but the last, which has no choices
        self._no_usage = {"usage": None} if includes_usage else {}
        self._started = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_present(receive, self._answer(send))
        except asyncio.CancelledError:  # by uvicorn, when a drain has lasted too long
            await self._fail(send, _shutting_down())

    async def _answer(self, send: Send) -> None:
        completion = self._completion
        usages: dict[int, Counted] = {}
        async with aclosing(_together(completion.streams)) as events:
            async for number, event in events:
                match event:
                    case Accepted():
                        continue
                    case Failed():
                        await self._fail(send, completion.refusal(event))
                        return
                    case Done():
                        usages[number] = event.usage
                await self._start(send)
                await self._send_parts(send, self._parts(number, event))
        if self._no_usage:
            await self._write(send, completion.part((), usage=completion.usage(usages)))
        await self._end(send)

    def _parts(self, number: int, event: StreamEvent) -> Iterable[Struct]:
        match event:
            case Token():
                return self._completion.push(number, event)
            case Done():
                return self._completion.answers[number].end(event)
            case _:
                return ()

    async def _start(self, send: Send) -> None:
        if self._started:
            return
        self._started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would hold the tokens back
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for answer in self._completion.answers:
            await self._send_parts(send, answer.begin())

    async def _send_parts(self, send: Send, parts: Iterable[Struct]) -> None:
        data = b"".join(_event(self._completion.part([p], **self._no_usage)) for p in parts)
        if not data and time.monotonic() - self._sent_at >= PING_INTERVAL:
            data = PING
        await self._send(send, data)

    async def _write(self, send: Send, content: bytes) -> None:
        await self._send(send, _event(content))

    async def _send(self, send: Send, data: bytes) -> None:
        if data:
            self._sent_at = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _fail(self, send: Send, error: ServiceError) -> None:
        if not self._started:
            raise error
        await self._write(send, msgspec.json.encode(errors.body(error)))
        await self._end(send)

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _together(streams: Sequence[Events]) -> AsyncGenerator[tuple[int, StreamEvent], None]:
    """The events of all, as they come, with the stream's number."""
    queue: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue(MAX_WAITING_EVENTS)

    async def hand_on(number: int, stream: Events) -> None:
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    await queue.put((number, event))
        except Exception:  # else who waits for an event would do so for ever
            log.exception("an answer broke off")
            failed = Failed("internal", "The answer broke off. See the server's log.")
            await queue.put((number, failed))

    tasks = [asyncio.create_task(hand_on(*pair)) for pair in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            number, event = await queue.get()
            running -= isinstance(event, Done | Failed)
            yield number, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _shutting_down() -> ServiceError:
    return ServiceError("shutting_down", "The server is restarting; ask again.", 1)


def _event(content: bytes) -> bytes:
    return b"data: %b\n\n" % one_line(content)
