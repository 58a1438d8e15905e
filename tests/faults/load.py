"""People who talk while parts fail, and remember what they were told."""

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
RETRY_AFTER = 0.25  # seconds
PATIENCE = 30.0  # seconds until a client gives up


class Told(NamedTuple):
    """What a client was told of one exchange. `end` is its last event, or the body of a 503."""

    request_id: str
    end: dict[str, Any]
    seconds: float

    @property
    def is_acknowledged(self) -> bool:
        return self.end.get("stored") == "log"

    @property
    def is_refused(self) -> bool:
        return isinstance(self.end.get("error"), dict)


class Load:
    """
    `doomed` is a session beside it, to be erased meanwhile.

    Each session asks its turns one after another, `at_once` sessions at a time, in a thread. A turn
    that is refused at once (503) is asked again, one that fails later is not. `lasting` is how many
    seconds a session's turns are spread over.
    """

    def __init__(
        self, url: str, name: str, sessions: int, turns: int, at_once: int, lasting: float = 0
    ) -> None:
        self.doomed = f"{name} doomed"
        self.sessions = [f"{name} {n}" for n in range(sessions)]
        self.told: dict[str, list[Told]] = {session: [] for session in self.sessions}
        self._url = url
        self._turns = turns
        self._at_once = at_once
        self._pause = lasting / turns
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    @property
    def all(self) -> list[Told]:
        return [told for session in self.told.values() for told in session]

    @property
    def acknowledged(self) -> dict[str, list[str]]:
        """The ids of each session's exchanges that were, in order."""
        return {
            session: [told.request_id for told in turns if told.is_acknowledged]
            for session, turns in self.told.items()
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Waits for the last answer, whatever becomes of the block."""
        self._thread.start()
        try:
            yield
        finally:
            self._thread.join()

    def wait_for(self, share: float) -> None:
        """Until this share of the turns has ended."""
        wanted = share * len(self.sessions) * self._turns
        wait_for(lambda: len(self.all) >= wanted, f"{share:.0%} of the load", 60)

    async def _run(self) -> None:
        turnstile = asyncio.Semaphore(self._at_once)
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE) as http:
            await asyncio.gather(*(self._talk(http, s, turnstile) for s in self.sessions))

    async def _talk(self, http: httpx.AsyncClient, session: str, turn: asyncio.Semaphore) -> None:
        for n in range(self._turns):
            async with turn:
                told = await ask(http, session, f"hello {n}")
                while told.is_refused:
                    await asyncio.sleep(RETRY_AFTER)
                    told = await ask(http, session, f"hello {n}")
            self.told[session].append(told)
            await asyncio.sleep(self._pause)


async def ask(http: httpx.AsyncClient, session: str, prompt: str, **more: Any) -> Told:
    """One turn, whatever comes of it."""
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
    return Told(request_id, end, time.monotonic() - began)
