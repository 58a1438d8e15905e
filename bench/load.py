"""
Load client: send requests over HTTP, and record when each piece of the answer arrives. Uses raw
sockets, so that the client itself costs little.
"""

import asyncio
import json
import random
import string
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

MAX_EXCHANGES = 10  # of a conversation, that the client of a stateless server sends

T = TypeVar("T")


@dataclass(slots=True)
class Sample:
    """One answer. Times are monotonic, in seconds; token counts are the server's `usage`."""

    sent_at: float = field(default_factory=time.monotonic)
    piece_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Time to the first token, in seconds."""
        return self.piece_times[0] - self.sent_at


class Target(Protocol):
    """A server under load."""

    name: str

    async def ask(
        self, session: str, prompt: str, max_tokens: int, sample: Sample | None = None
    ) -> Sample:
        """Send a prompt; `sample`, if given, is filled in while the answer arrives."""


class FineTuneTarget:
    """FineTuneLLM's `/chat`: the server keeps the session."""

    name = "ours"

    def __init__(self, url: str) -> None:
        self._url = f"{url}/chat"

    async def ask(
        self, session: str, prompt: str, max_tokens: int, sample: Sample | None = None
    ) -> Sample:
        body = {
            "prompt": prompt,
            "session_id": session,
            "max_tokens": max_tokens,
            "stop": [],
            "ignore_eos": True,
        }
        sample = sample or Sample()
        async for event in _post(self._url, body):
            if "token" in event:
                sample.piece_times.append(time.monotonic())
            elif "done" in event:
                _set_usage(sample, event["usage"], event["usage"]["cached_tokens"])
            else:
                raise RuntimeError(f"{self.name}: {event}")
        return sample


class OpenAITarget:
    """An OpenAI-compatible server: the client keeps the session, and sends its last exchanges."""

    def __init__(self, name: str, url: str, system: str, options: dict[str, Any]) -> None:
        self.name = name
        self._url = url
        self._system = system
        self._options = options
        self._sessions: dict[str, list[dict[str, str]]] = {}

    def with_system(self, system: str) -> "OpenAITarget":
        """Return the same server with another system prompt and no sessions."""
        return OpenAITarget(self.name, self._url, system, self._options)

    async def ask(
        self, session: str, prompt: str, max_tokens: int, sample: Sample | None = None
    ) -> Sample:
        question = {"role": "user", "content": prompt}
        sample, content = sample or Sample(), ""
        body = self._body(session, question, max_tokens)
        async for event in _post(f"{self._url}/v1/chat/completions", body):
            for choice in event.get("choices", []):
                if text := choice["delta"].get("content"):
                    sample.piece_times.append(time.monotonic())
                    content += text
            if usage := event.get("usage"):
                details = usage.get("prompt_tokens_details") or {}
                _set_usage(sample, usage, details.get("cached_tokens", 0))
        answer = {"role": "assistant", "content": content}
        self._sessions.setdefault(session, []).extend((question, answer))
        return sample

    def _body(self, session: str, question: dict[str, str], max_tokens: int) -> dict[str, Any]:
        system = {"role": "system", "content": self._system}
        history = self._sessions.get(session, [])[-2 * MAX_EXCHANGES :]
        return self._options | {
            "messages": [system, *history, question],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def gather_limited(limit: int, requests: Iterable[Awaitable[T]]) -> list[T]:
    """Return all results; at most `limit` requests run at once."""
    semaphore = asyncio.Semaphore(limit)

    async def one(request: Awaitable[T]) -> T:
        async with semaphore:
            return await request

    return await asyncio.gather(*map(one, requests))


def words(count: int) -> str:
    """
    Return random words of one to three letters, each of which is one token of the synthetic
    vocabulary: no two prompts share a cached prefix by chance.
    """
    return " ".join(
        "".join(random.choices(string.ascii_lowercase, k=random.randint(1, 3)))
        for _ in range(count)
    )


def _set_usage(sample: Sample, usage: dict[str, Any], cached: int) -> None:
    sample.prompt_tokens = usage["prompt_tokens"]
    sample.completion_tokens = usage["completion_tokens"]
    sample.cached_tokens = cached


async def _post(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of the server-sent events. Raises RuntimeError for a status other than 200."""
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
