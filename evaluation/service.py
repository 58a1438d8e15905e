"""The service under evaluation, by /v1/chat/completions."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from services.contract.version import COMMAND

MAX_TRIES = 6
MAX_RETRY_SECONDS = 30.0
READ_SECONDS = 300.0  # until the next bytes; the service pings each 15 s
RETRIABLE = (429, 503)


class ServiceUnusable(Exception):
    """The service can't be reached, or does not accept the key or the model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """
    A model's answer. `error` says why there is none, or only a part. Times are in seconds; `decode`
    is from the first token to the last.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    error: str = ""
    ttft: float | None = None
    decode: float = 0.0
    completion_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        return (self.completion_tokens - 1) / self.decode if self.decode else None


class Service:
    """`retry_seconds`: pause after a failure that names none. Raises ServiceUnusable."""

    def __init__(self, url: str, key: str, retry_seconds: float = 1.0) -> None:
        self._retry_seconds = retry_seconds
        try:
            self._http = httpx.AsyncClient(
                base_url=url.rstrip("/"),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(READ_SECONDS, connect=5.0),
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ServiceUnusable(f"The URL or the key can't be used: {error}.") from error

    async def __aenter__(self) -> "Service":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def check_model(self, name: str) -> None:
        """Raises ServiceUnusable."""
        try:
            response = await self._http.get(f"/v1/models/{quote(name, safe='/:@')}")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise ServiceUnusable(f"The model {name!r} can't be used: {_message(response)}")

    async def complete(self, body: dict[str, Any]) -> Answer:
        """
        Return the answer to a request, streamed to measure it. Raises ServiceUnusable if the
        service stays away or busy: lines that nothing answered say nothing about a model.
        """
        for _ in range(MAX_TRIES - 1):
            try:
                return await self._stream(body)
            except _Busy as busy:
                await asyncio.sleep(busy.seconds)
            except httpx.HTTPError:
                await asyncio.sleep(self._retry_seconds)
        try:
            return await self._stream(body)
        except _Busy as busy:
            raise ServiceUnusable(f"The service stays busy: {busy}") from busy
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> ServiceUnusable:
        return ServiceUnusable(
            f"{self._http.base_url} can't be reached ({error!r}): start it with `{COMMAND} up`,"
            " or name another one with --url."
        )

    async def _stream(self, body: dict[str, Any]) -> Answer:
        """Raises _Busy, httpx.HTTPError."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        reader = _StreamReader(time.perf_counter())
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code in RETRIABLE:
                    raise _Busy(_message(response), response.headers.get("Retry-After", ""))
                return Answer(error=f"{response.status_code}: {_message(response)}")
            try:
                async for chunk in _chunks(response):
                    reader.read(chunk)
            except msgspec.DecodeError as error:
                return Answer(error=f"the stream is malformed: {error}")
        return reader.answer()


class _Busy(Exception):
    def __init__(self, message: str, retry_after: str) -> None:
        super().__init__(message)
        seconds = float(retry_after) if retry_after.isdecimal() else 1.0
        self.seconds = min(seconds, MAX_RETRY_SECONDS)


class _StreamReader:
    """Puts the chunks of an answer together."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._first = self._last = 0.0
        self._parts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._finish_reason = ""
        self._error = ""
        self._tokens = 0

    def read(self, chunk: dict[str, Any]) -> None:
        if error := chunk.get("error"):
            self._error = str(error.get("message", error))
        self._tokens = (chunk.get("usage") or {}).get("completion_tokens", self._tokens)
        for choice in chunk.get("choices", ()):
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            for name, parts in self._parts.items():
                if text := choice["delta"].get(name):
                    parts.append(text)
                    self._last = time.perf_counter()
                    self._first = self._first or self._last

    def answer(self) -> Answer:
        has_ended = self._error or self._finish_reason
        return Answer(
            text="".join(self._parts["content"]),
            reasoning="".join(self._parts["reasoning_content"]),
            finish_reason=self._finish_reason,
            error=self._error if has_ended else "the stream ended before the answer",
            ttft=self._first - self._began if self._first else None,
            decode=self._last - self._first,
            completion_tokens=self._tokens,
        )


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of events. (`aiter_lines` also splits where JSON has U+2028 or U+0085.)"""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data: ")
            if data != line.strip() and data != b"[DONE]":
                yield msgspec.json.decode(data, type=dict[str, Any])


def _message(response: httpx.Response) -> str:
    """Return the message of an error, in OpenAI's format if it has that."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}: is it the URL of an edge?"
