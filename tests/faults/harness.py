"""A stack with a MongoDB whose parts are made to fail while a load runs on it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.history import DeleteRequest
from services.contract.messages import Empty
from services.runtime.deliveries import NoResponders
from tests.e2e.stack import Process, Stack
from tests.faults import consistency
from tests.faults.load import TIMEOUT_SECONDS, Load, Turn, send_turn
from tests.servers import Server, wait_for


class Size(NamedTuple):
    """Size of a load, and the length of an outage in seconds."""

    sessions: int
    turns: int
    outage: float


SHORT = Size(sessions=20, turns=5, outage=1)
LONG = Size(sessions=50, turns=10, outage=30)
AT_ONCE = 20  # sessions


class Harness:
    def __init__(self, stack: Stack, mongo: Server, folder: Path, size: Size) -> None:
        self.stack = stack
        self.mongo = mongo
        self.size = size
        self._folder = folder

    @property
    def mongodb_uri(self) -> str:
        return f"mongodb://127.0.0.1:{self.mongo.port}/"

    def load(self, name: str, seconds: float = 0) -> Load:
        url = str(self.stack.http.base_url)
        load = Load(url, name, self.size.sessions, self.size.turns, AT_ONCE, seconds)
        self.stack.chat("hello", load.doomed)
        return load

    def erase_doomed(self, load: Load) -> None:
        """Erase the session after one more exchange, which may not be archived yet."""
        ask_once(self.stack, load.doomed)
        asyncio.run(erase(self.stack, load.doomed))

    def check(self, load: Load) -> None:
        """Check that every turn ended, what is stored is consistent and what was erased is gone."""
        assert len(load.all) == self.size.sessions * self.size.turns
        stored = consistency.check(self.stack, self.mongodb_uri, load.acknowledged)
        consistency.check_erased(self.stack, self.mongodb_uri, load.doomed)
        acknowledged = sum(map(len, load.acknowledged.values()))
        print(f"{len(load.all)} turns, {acknowledged} acknowledged, {stored} stored")

    @contextmanager
    def second_history(self) -> Iterator[Process]:
        second = Process("services.history", 0, self.stack.history.environ, self._folder)
        second.start()
        try:
            wait_for(lambda: self.stack.histories() == 2, "the second history process")
            yield second
        finally:
            second.stop()


async def erase(stack: Stack, session: str) -> None:
    """Erase a session as the edge does, with retries until it succeeds."""
    subject = subjects.history("delete", subjects.OPEN_TENANT)
    async with stack.connect("harness") as bus:
        while True:
            with suppress(TimeoutError, NoResponders, ServiceError):
                await bus.request(subject, DeleteRequest(session), Empty, timeout=7)
                return
            subject = subjects.retry(subjects.history("delete", subjects.OPEN_TENANT))
            await asyncio.sleep(0.1)


def ask_once(stack: Stack, session: str, prompt: str = "hello") -> Turn:
    """Send one turn."""

    async def send() -> Turn:
        async with httpx.AsyncClient(base_url=stack.http.base_url, timeout=TIMEOUT_SECONDS) as http:
            return await send_turn(http, session, prompt)

    return asyncio.run(send())
