"""Where parts fail: one stack with a MongoDB, and a load on it."""

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
from services.runtime.bus import Bus
from services.runtime.deliveries import NoResponders
from tests.e2e.stack import Process, Stack
from tests.faults import ledger
from tests.faults.load import PATIENCE, Load, Told, ask
from tests.servers import Server, wait_for


class Size(NamedTuple):
    """Of a load, and how long parts stay away meanwhile, in seconds."""

    sessions: int
    turns: int
    outage: float


SHORT = Size(sessions=20, turns=8, outage=1)
LONG = Size(sessions=50, turns=10, outage=30)
AT_ONCE = 20


class Arena:
    def __init__(self, stack: Stack, mongo: Server, folder: Path, size: Size) -> None:
        self.stack = stack
        self.mongo = mongo
        self.size = size
        self._folder = folder

    @property
    def mongodb_uri(self) -> str:
        return f"mongodb://127.0.0.1:{self.mongo.port}/"

    def load(self, name: str, lasting: float = 0) -> Load:
        url = str(self.stack.http.base_url)
        load = Load(url, name, self.size.sessions, self.size.turns, AT_ONCE, lasting)
        self.stack.chat("hello", load.doomed)
        return load

    def erase_doomed(self, load: Load) -> None:
        """After one more exchange, which may still wait to be archived."""
        one(self.stack, load.doomed)
        asyncio.run(erase(self.stack, load.doomed))

    def check(self, load: Load) -> None:
        """See `ledger.check`; all that were asked were answered, and what was erased is gone."""
        assert len(load.all) == self.size.sessions * self.size.turns
        there = ledger.check(self.stack, self.mongodb_uri, load.acknowledged)
        ledger.check_erased(self.stack, self.mongodb_uri, load.doomed)
        acknowledged = sum(map(len, load.acknowledged.values()))
        print(f"{len(load.all)} asked, {acknowledged} acknowledged, {there} there")

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
    """As the edge does it; again until it is done."""
    subject = subjects.history("delete", subjects.OPEN_TENANT)
    async with Bus.connect(f"nats://127.0.0.1:{stack.nats.port}", "arena") as bus:
        while True:
            with suppress(TimeoutError, NoResponders, ServiceError):
                await bus.request(subject, DeleteRequest(session), Empty, timeout=7)
                return
            subject = subjects.retry(subjects.history("delete", subjects.OPEN_TENANT))
            await asyncio.sleep(0.1)


def one(stack: Stack, session: str, prompt: str = "hello") -> Told:
    """One turn."""

    async def asked() -> Told:
        async with httpx.AsyncClient(base_url=stack.http.base_url, timeout=PATIENCE) as http:
            return await ask(http, session, prompt)

    return asyncio.run(asked())
