"""
Callers of every kind, who do what a good client does when its server goes away, and remember what
they were told.
"""

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
PATIENCE = 60.0  # seconds for one answer; then the caller gives up
AGAIN = 0.2  # seconds
SILENCE = 5.0  # seconds after which a plain caller asks again


class Told(NamedTuple):
    """What a caller was told. `end` is the last event: of the one end that an answer has."""

    kind: str
    prompt: str
    request_id: str
    text: str
    end: dict[str, Any]
    seconds: float
    longest_gap: float  # seconds between two pieces of text
    resumes: int  # times that it had to go on elsewhere

    @property
    def is_whole(self) -> bool:
        return bool(self.end.get("done")) and self.end["finish_reason"] != "cancelled"


class Reading:
    """An answer as far as it came."""

    def __init__(self, kind: str, prompt: str) -> None:
        self.kind = kind
        self.prompt = prompt
        self.request_id = ""
        self.text = ""
        self.end: dict[str, Any] = {}
        self.asked = 0  # times
        self._began = self._last = time.monotonic()
        self._gap = 0.0

    @property
    def is_over(self) -> bool:
        return bool(self.end) or self.seconds > PATIENCE

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def take(self, at: int, text: str) -> None:
        assert at == len(self.text), f"{self.request_id}: {at} after {len(self.text)} characters"
        now = time.monotonic()
        if self.text:
            self._gap = max(self._gap, now - self._last)
        self.text, self._last = self.text + text, now

    def told(self) -> Told:
        end = self.end or {"error": "no end", "code": "gave_up"}
        seconds, resumes = round(self.seconds, 2), max(0, self.asked - 1)
        return Told(
            self.kind, self.prompt, self.request_id, self.text, end, seconds, self._gap, resumes
        )


async def over_http(urls: list[str], prompt: str, cancel_after: int | None = None) -> Told:
    """
    Asks any edge, and goes on at any where the stream stops without its end. With `cancel_after`:
    deletes the request once it has so many characters.
    """
    reading, key = Reading("cancel" if cancel_after is not None else "http", prompt), uuid4().hex
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        while not reading.is_over:
            reading.asked += 1
            try:
                await _read_http(http, random.choice(urls), reading, key, cancel_after, urls)
            except httpx.TransportError:
                await asyncio.sleep(AGAIN)
    return reading.told()


async def _read_http(
    http: httpx.AsyncClient,
    url: str,
    reading: Reading,
    key: str,
    cancel_after: int | None,
    urls: list[str],
) -> None:
    async with _ask(http, url, reading, key) as response:
        if response.status_code != 200:
            await _refused(response, reading)
            return
        reading.request_id = response.headers["Content-Location"].rpartition("/")[2]
        async for at, event in _events(response):
            if "token" in event:
                reading.take(at - len(event["token"]), event["token"])
            elif event.get("done") or "error" in event:
                reading.end = event
                return
            if cancel_after is not None and len(reading.text) >= cancel_after:
                await _delete(http, urls, reading)


def _ask(http: httpx.AsyncClient, url: str, reading: Reading, key: str) -> Any:
    if reading.request_id:
        headers = {"Last-Event-ID": str(len(reading.text))}
        return http.stream("GET", f"{url}/chat/{reading.request_id}", headers=headers)
    body = GREEDY | {"prompt": reading.prompt, "session_id": key}
    return http.stream("POST", f"{url}/chat", json=body, headers={"Idempotency-Key": key})


async def _refused(response: httpx.Response, reading: Reading) -> None:
    """A 503 is asked again, as any client library does; anything else is the end."""
    await response.aread()
    if response.status_code == 503:
        await asyncio.sleep(min(float(response.headers.get("Retry-After", AGAIN)), 1))
    else:
        reading.end = response.json()["error"] | {"status": response.status_code}


async def _delete(http: httpx.AsyncClient, urls: list[str], reading: Reading) -> None:
    try:
        await http.delete(f"{random.choice(urls)}/chat/{reading.request_id}")
    except httpx.TransportError:
        return  # said again with the next piece of text


async def _events(response: httpx.Response) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """With the answer's length after each."""
    length = 0
    async for line in response.aiter_lines():
        if line.startswith("id: ") and line != "id: end":
            length = int(line[4:])
        elif line.startswith("data: "):
            yield length, json.loads(line[6:])


async def over_nats(bus: Bus, workers: WorkerDirectory, prompt: str) -> Told:
    """With ChatClient, which replaces a worker that is lost by itself."""
    reading = Reading("client", prompt)
    request = _request(reading, prompt)
    async with aclosing(ChatClient(bus, workers=workers).stream(request)) as events:
        async for event in events:
            _take(reading, event)
    return reading.told()


async def plainly(bus: Bus, prompt: str) -> Told:
    """As any program with a NATS client can: by an inbox; what it loses it asks for anew."""
    reading = Reading("plain", prompt)
    while not reading.is_over:
        reading.asked += 1
        reading.text, request = "", _request(reading, prompt)
        inbox_name = f"_INBOX.{uuid4().hex}"
        async with bus.inbox(inbox_name) as inbox:
            await bus.publish(subjects.request(subjects.OPEN_TENANT), request, reply=inbox_name)
            try:
                while not reading.is_over:
                    event: StreamEvent = decode((await inbox.next(SILENCE)).data, StreamEvent)  # type: ignore[arg-type]
                    if isinstance(event, Failed) and event.retry_after is not None:
                        break
                    if _is_after_a_gap(event, len(reading.text)):
                        break  # a part of it was lost on the way
                    _take(reading, event)
            except (TimeoutError, NoResponders):
                pass
        await asyncio.sleep(AGAIN)
    return reading.told()


def _is_after_a_gap(event: StreamEvent, length: int) -> bool:
    match event:
        case Token(offset=at):
            return at != length
        case Done(length=whole):
            return whole != length
    return False


def _request(reading: Reading, prompt: str) -> ChatRequest:
    reading.request_id = new_request_id()
    return ChatRequest(
        prompt=prompt, session_id=uuid4().hex, request_id=reading.request_id, **GREEDY
    )


def _take(reading: Reading, event: StreamEvent) -> None:
    match event:
        case Token(offset=at, text=text):
            reading.take(at, text)
        case Done(finish_reason=reason, stored=stored):
            reading.end = {"done": True, "finish_reason": reason, "stored": stored}
        case Failed(code=code, message=message):
            reading.end = {"error": message, "code": code}
