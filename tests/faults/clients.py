"""Clients of every kind that retry and resume as a good client does, and record what they got."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple
from uuid import uuid4

import httpx

from services.client.chat_client import ChatClient, new_request_id
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import decode
from services.contract.messages import ChatRequest, Done, Failed, StreamEvent, Token
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 150}
TIMEOUT_SECONDS = 60.0  # then the client gives up
RETRY_SECONDS = 0.2
SILENCE_SECONDS = 5.0  # after which the plain NATS client repeats its request


class Outcome(NamedTuple):
    """What a client received of one answer, and its last event, `end`."""

    kind: str
    prompt: str
    request_id: str
    text: str
    end: dict[str, Any]
    seconds: float
    longest_gap: float  # seconds between two pieces of text
    resumes: int  # requests after the first

    @property
    def is_whole(self) -> bool:
        return bool(self.end.get("done")) and self.end["finish_reason"] != "cancelled"


class PartialAnswer:
    """The part of an answer that has been received."""

    def __init__(self, kind: str, prompt: str) -> None:
        self.kind = kind
        self.prompt = prompt
        self.request_id = ""
        self.text = ""
        self.end: dict[str, Any] = {}
        self.requests = 0
        self._began = self._last = time.monotonic()
        self._gap = 0.0

    @property
    def is_over(self) -> bool:
        return bool(self.end) or self.seconds > TIMEOUT_SECONDS

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def take(self, at: int, text: str) -> None:
        assert at == len(self.text), f"{self.request_id}: {at} after {len(self.text)} characters"
        now = time.monotonic()
        if self.text:
            self._gap = max(self._gap, now - self._last)
        self.text, self._last = self.text + text, now

    def outcome(self) -> Outcome:
        end = self.end or {"error": "no end", "code": "gave_up"}
        seconds, resumes = round(self.seconds, 2), max(0, self.requests - 1)
        return Outcome(
            self.kind, self.prompt, self.request_id, self.text, end, seconds, self._gap, resumes
        )


async def ask_over_http(urls: list[str], prompt: str, cancel_after: int | None = None) -> Outcome:
    """
    Ask a random edge, and resume at a random one if the stream breaks off.

    With `cancel_after`, delete the request once the text has that many characters.
    """
    partial = PartialAnswer("cancel" if cancel_after is not None else "http", prompt)
    key = uuid4().hex
    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as http:
        while not partial.is_over:
            partial.requests += 1
            try:
                await _read_http(http, random.choice(urls), partial, key, cancel_after, urls)
            except httpx.TransportError:
                await asyncio.sleep(RETRY_SECONDS)
    return partial.outcome()


async def _read_http(
    http: httpx.AsyncClient,
    url: str,
    partial: PartialAnswer,
    key: str,
    cancel_after: int | None,
    urls: list[str],
) -> None:
    async with _ask(http, url, partial, key) as response:
        if response.status_code != 200:
            await _on_error_status(response, partial)
            return
        partial.request_id = response.headers["Content-Location"].rpartition("/")[2]
        async for at, event in _events(response):
            if "token" in event:
                partial.take(at - len(event["token"]), event["token"])
            elif event.get("done") or "error" in event:
                partial.end = event
                return
            if cancel_after is not None and len(partial.text) >= cancel_after:
                await _delete(http, urls, partial)


def _ask(http: httpx.AsyncClient, url: str, partial: PartialAnswer, key: str) -> Any:
    if partial.request_id:
        headers = {"Last-Event-ID": str(len(partial.text))}
        return http.stream("GET", f"{url}/chat/{partial.request_id}", headers=headers)
    body = GREEDY | {"prompt": partial.prompt, "session_id": key}
    return http.stream("POST", f"{url}/chat", json=body, headers={"Idempotency-Key": key})


async def _on_error_status(response: httpx.Response, partial: PartialAnswer) -> None:
    """Wait before the retry of a 503, as client libraries do; any other status is the end."""
    await response.aread()
    if response.status_code == 503:
        await asyncio.sleep(min(float(response.headers.get("Retry-After", RETRY_SECONDS)), 1))
    else:
        partial.end = response.json()["error"] | {"status": response.status_code}


async def _delete(http: httpx.AsyncClient, urls: list[str], partial: PartialAnswer) -> None:
    try:
        await http.delete(f"{random.choice(urls)}/chat/{partial.request_id}")
    except httpx.TransportError:
        return  # repeated with the next token


async def _events(response: httpx.Response) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Yield each event with the length of the answer so far."""
    length = 0
    async for line in response.aiter_lines():
        if line.startswith("id: ") and line != "id: end":
            length = int(line[4:])
        elif line.startswith("data: "):
            yield length, json.loads(line[6:])


async def ask_by_chat_client(bus: Bus, workers: WorkerDirectory, prompt: str) -> Outcome:
    """Ask with ChatClient, which fails over to another worker by itself."""
    partial = PartialAnswer("client", prompt)
    request = _request(partial, prompt)
    async with aclosing(ChatClient(bus, workers=workers).stream(request)) as events:
        async for event in events:
            _take(partial, event)
    return partial.outcome()


async def ask_over_nats(bus: Bus, prompt: str) -> Outcome:
    """Ask with an inbox, as any NATS program can; repeat the request if events are lost."""
    partial = PartialAnswer("plain", prompt)
    while not partial.is_over:
        partial.requests += 1
        partial.text, request = "", _request(partial, prompt)
        inbox_name = f"_INBOX.{uuid4().hex}"
        async with bus.inbox(inbox_name) as inbox:
            await bus.publish(subjects.request(subjects.OPEN_TENANT), request, reply=inbox_name)
            try:
                while not partial.is_over:
                    data = (await inbox.next(SILENCE_SECONDS)).data
                    event: StreamEvent = decode(data, StreamEvent)  # type: ignore[arg-type]
                    if isinstance(event, Failed) and event.retry_after is not None:
                        break
                    if _is_after_a_gap(event, len(partial.text)):
                        break  # an event was lost
                    _take(partial, event)
            except (TimeoutError, NoResponders):
                pass
        await asyncio.sleep(RETRY_SECONDS)
    return partial.outcome()


def _is_after_a_gap(event: StreamEvent, length: int) -> bool:
    match event:
        case Token(offset=at):
            return at != length
        case Done(length=whole):
            return whole != length
    return False


def _request(partial: PartialAnswer, prompt: str) -> ChatRequest:
    partial.request_id = new_request_id()
    return ChatRequest(
        prompt=prompt, session_id=uuid4().hex, request_id=partial.request_id, **GREEDY
    )


def _take(partial: PartialAnswer, event: StreamEvent) -> None:
    match event:
        case Token(offset=at, text=text):
            partial.take(at, text)
        case Done(finish_reason=reason, stored=stored):
            partial.end = {"done": True, "finish_reason": reason, "stored": stored}
        case Failed(code=code, message=message):
            partial.end = {"error": message, "code": code}
