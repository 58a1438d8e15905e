"""A load of concurrent sessions that records the outcome of every turn."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

from tests.servers import wait_for

MAX_TOKENS = 3
RETRY_SECONDS = 0.25
TIMEOUT_SECONDS = 30.0  # then the client gives up


class Turn(NamedTuple):
    """The outcome of one turn. `end` is its last event, or the body of a 503."""

    request_id: str
    end: dict[str, Any]
    seconds: float

    @property
    def is_acknowledged(self) -> bool:
        return self.end.get("stored") == "log"

    @property
    def is_rejected(self) -> bool:
        return isinstance(self.end.get("error"), dict)


class Load:
    """
    Sessions that send their turns one after another, `at_once` of them at a time, in a thread.

    A turn that gets a 503 is retried; one that fails later is not. Each session's turns are spread
    over `seconds`. The session `doomed` is not part of the load: tests erase it meanwhile.
    """

    def __init__(
        self, url: str, name: str, sessions: int, turns: int, at_once: int, seconds: float = 0
    ) -> None:
        self.doomed = f"{name} doomed"
        self.sessions = [f"{name} {n}" for n in range(sessions)]
        self.by_session: dict[str, list[Turn]] = {session: [] for session in self.sessions}
        self._url = url
        self._turns = turns
        self._at_once = at_once
        self._pause = seconds / turns
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    @property
    def all(self) -> list[Turn]:
        return [turn for turns in self.by_session.values() for turn in turns]

    @property
    def acknowledged(self) -> dict[str, list[str]]:
        """The request ids of each session's acknowledged turns, in order."""
        return {
            session: [turn.request_id for turn in turns if turn.is_acknowledged]
            for session, turns in self.by_session.items()
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the load beside the block, and wait for its last answer even if the block raises."""
        self._thread.start()
        try:
            yield
        finally:
            self._thread.join()

    def wait_for(self, share: float) -> None:
        """Wait until this share of the turns has ended."""
        wanted = share * len(self.sessions) * self._turns
        wait_for(lambda: len(self.all) >= wanted, f"{share:.0%} of the load", 60)

    async def _run(self) -> None:
        slots = asyncio.Semaphore(self._at_once)
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_SECONDS) as http:
            await asyncio.gather(*(self._talk(http, s, slots) for s in self.sessions))

    async def _talk(self, http: httpx.AsyncClient, session: str, slot: asyncio.Semaphore) -> None:
        for n in range(self._turns):
            async with slot:
                turn = await send_turn(http, session, f"hello {n}")
                while turn.is_rejected:
                    await asyncio.sleep(RETRY_SECONDS)
                    turn = await send_turn(http, session, f"hello {n}")
            self.by_session[session].append(turn)
            await asyncio.sleep(self._pause)


async def send_turn(http: httpx.AsyncClient, session: str, prompt: str, **more: Any) -> Turn:
    """Send one turn and return its outcome, whatever it is."""
    body = {"prompt": prompt, "session_id": session, "temperature": 0, "max_tokens": MAX_TOKENS}
    began, request_id, end = time.monotonic(), "", {}
    try:
        async with http.stream("POST", "/chat", json=body | more) as response:
            request_id = response.headers.get("Content-Location", "").rpartition("/")[2]
            if not response.is_success:
                end = json.loads(await response.aread())
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    end = json.loads(line[6:])
    except httpx.HTTPError as error:
        end = {"error": repr(error)}
    return Turn(request_id, end, time.monotonic() - began)
