"""
A load client: asks over HTTP + SSE, and notes when each piece of the answer came. It speaks to
FineTuneLLM's /chat, and to any OpenAI-style server, by a raw socket, so that it costs little
itself.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

KEPT = 10  # exchanges of a conversation that the client of a stateless server sends along

T = TypeVar("T")


@dataclass(slots=True)
class Sample:
    """One answer. Times are of the monotonic clock; tokens are counted by the server's `usage`."""

    asked: float = field(default_factory=time.monotonic)
    pieces: list[float] = field(default_factory=list)  # when each came
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.pieces[0] - self.asked


class Target(Protocol):
    """A server under load."""

    name: str

    async def ask(
        self, session: str, prompt: str, max_tokens: int, sample: Sample | None = None
    ) -> Sample:
        """`sample`, if given, is filled in as the answer comes."""


class FineTune:
    """Our /chat: the server keeps the session."""

    name = "ours"

    def __init__(self, url: str) -> None:
        self._url = f"{url}/chat"

    async def ask(
        self, session: str, prompt: str, max_tokens: int, sample: Sample | None = None
    ) -> Sample:
        body = {"prompt": prompt, "session_id": session, "max_tokens": max_tokens, "stop": []}
        sample = sample or Sample()
        async for event in _events(self._url, body):
            if "token" in event:
                sample.pieces.append(time.monotonic())
            elif "done" in event:
                _count(sample, event["usage"], event["usage"]["cached_tokens"])
            else:
                raise RuntimeError(f"{self.name}: {event}")
        return sample


class OpenAI:
    """
    An OpenAI-style server: the client keeps the session, and sends its last exchanges each time.
    """

    def __init__(self, name: str, url: str, system: str, options: dict[str, Any]) -> None:
        self.name = name
        self._url = url
        self._system = system
        self._options = options
        self._sessions: dict[str, list[dict[str, str]]] = {}

    def with_system(self, system: str) -> "OpenAI":
        """The same server, asked with another system prompt."""
        return OpenAI(self.name, self._url, system, self._options)

    async def ask(
        self, session: str, prompt: str, max_tokens: int, sample: Sample | None = None
    ) -> Sample:
        question = {"role": "user", "content": prompt}
        sample, said = sample or Sample(), ""
        async for event in _events(
            f"{self._url}/v1/chat/completions", self._body(session, question, max_tokens)
        ):
            for choice in event.get("choices", []):
                if text := choice["delta"].get("content"):
                    sample.pieces.append(time.monotonic())
                    said += text
            if usage := event.get("usage"):
                details = usage.get("prompt_tokens_details") or {}
                _count(sample, usage, details.get("cached_tokens", 0))
        answer = {"role": "assistant", "content": said}
        self._sessions.setdefault(session, []).extend((question, answer))
        return sample

    def _body(self, session: str, question: dict[str, str], max_tokens: int) -> dict[str, Any]:
        system = {"role": "system", "content": self._system}
        kept = self._sessions.get(session, [])[-2 * KEPT :]
        return self._options | {
            "messages": [system, *kept, question],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def at_most(limit: int, asks: Iterable[Awaitable[T]]) -> list[T]:
    """The answers to all, of which at most `limit` are asked at once."""
    turnstile = asyncio.Semaphore(limit)

    async def one(ask: Awaitable[T]) -> T:
        async with turnstile:
            return await ask

    return await asyncio.gather(*map(one, asks))


def _count(sample: Sample, usage: dict[str, Any], cached: int) -> None:
    sample.prompt_tokens = usage["prompt_tokens"]
    sample.completion_tokens = usage["completion_tokens"]
    sample.cached_tokens = cached


async def _events(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(head.encode() + data)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{url}: {status!r} {await reader.read(500)!r}")
        async for line in reader:  # headers and chunk sizes don't begin with `data: `
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        writer.close()
