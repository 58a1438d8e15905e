"""All services as real processes on free ports, and an HTTP client for them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import msgspec

from services.contract import subjects
from services.contract.codec import decode
from services.contract.messages import WorkerReport
from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.settings import ServiceSettings, parse
from tests.secured import SecuredServer
from tests.servers import Server, free_port, wait_for

GREEDY = {"temperature": 0}
NO_MONGO = "mongodb://127.0.0.1:9/"


class Answer(NamedTuple):
    text: str
    end: dict[str, Any]
    """The last event: `done`, or an error."""


class Process(Server):
    """A process of a service. `start` waits for the edge's port; the others have none."""

    def __init__(self, module: str, port: int, environ: dict[str, str], folder: Path) -> None:
        super().__init__(module, [sys.executable, "-m", module], port, folder / f"{module}.log")
        self.environ = environ
        self._has_port = module == "services.edge"

    def _is_up(self) -> bool:
        return super()._is_up() if self._has_port else True


def plain_environment() -> dict[str, str]:
    """
    Return this process' environment with the demo model and every other setting at its default, so
    that a developer's `.env` has no effect.
    """
    kinds = (EdgeSettings, HistorySettings, InferenceSettings)
    names = [field.name.upper() for kind in kinds for field in msgspec.structs.fields(kind)]
    return os.environ | dict.fromkeys(names, "") | {"MODEL_PATH": "model/demo.gguf"}


class Stack:
    """
    One process of each service and their nats-server. If that is a SecuredServer, each process is
    a user of its own.

    With `slow`, each decoding step takes 30 ms longer. `http` sends the first of EDGE_API_KEYS, if
    there are any. `settings` are environment variables of all processes.
    """

    def __init__(
        self, folder: Path, mongodb_uri: str, slow: bool, nats: Server, **settings: str
    ) -> None:
        self.nats = nats
        port = free_port()
        environ = plain_environment() | {
            "MONGODB_URI": mongodb_uri,
            "EDGE_HOST": "127.0.0.1",
            "EDGE_PORT": str(port),
            "MODEL_THREADS": "1",  # llama.cpp's threads spin, and slow other processes down
            **settings,
        }
        inference = "tests.slow_inference" if slow else "services.inference"
        self.history = Process("services.history", 0, environ | self.user("history"), folder)
        self.inference = Process(inference, 0, environ | self.user("inference"), folder)
        self.edge = Process("services.edge", port, environ | self.user("edge"), folder)
        _, _, key = settings.get("EDGE_API_KEYS", "").partition(",")[0].partition(":")
        headers = {"X-API-Key": key} if key else {}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=headers)

    @property
    def parts(self) -> list[Server]:
        return [self.nats, self.history, self.inference, self.edge]

    def user(self, name: str) -> dict[str, str]:
        """Return the settings of a process that is this user of NATS."""
        if isinstance(self.nats, SecuredServer):
            return self.nats.settings(name)
        return {"NATS_URL": f"nats://127.0.0.1:{self.nats.port}"}

    def connect(self, name: str) -> AbstractAsyncContextManager[Bus]:
        """Connect to NATS as its admin. `name` is shown by monitoring tools."""
        settings = parse(ServiceSettings, self.user("admin"))
        return Bus.connect(settings.nats_url, name, NatsAccess.of(settings))

    def wait_until_ready(self) -> None:
        wait_for(self._is_ready, "the stack")

    def chat(self, prompt: str, session: str, **more: Any) -> Answer:
        """Return a whole answer. Its last event may be an error."""
        text, end = "", {}
        with self.open(prompt, session, **more) as events:
            for event in events:
                text, end = text + event.get("token", ""), event
        return Answer(text, end)

    @contextmanager
    def open(self, prompt: str, session: str, **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Yield the events of an answer as they come; leaving the block disconnects."""
        body = GREEDY | {"prompt": prompt, "session_id": session} | more
        with self.http.stream("POST", "/chat", json=body) as response:
            assert response.status_code == 200, response.read()
            yield (json.loads(x[6:]) for x in response.iter_lines() if x.startswith("data: "))

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.http.get("/status").json()
        return status

    def messages(self, session: str, limit: int = 100) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get(
            "/messages", params={"session_id": session, "limit": limit}
        ).json()
        return found

    def running(self) -> int:
        """Return the number of requests that have a slot."""
        return sum(worker["running"] for worker in self.status()["workers"])

    def next_report(self) -> WorkerReport:
        """Return the worker's next report. With keys, `/status` shows them to admins only."""

        async def receive() -> WorkerReport:
            async with self.connect("report") as bus, bus.inbox(subjects.report("*")) as inbox:
                return decode((await inbox.next(30)).data, WorkerReport)

        return asyncio.run(receive())

    def histories(self) -> int:
        """Return the number of history processes that answer a ping within 0.3 s."""

        async def ask() -> int:
            answers = 0
            subject = f"{subjects.inbox('admin')}.{uuid4().hex}"
            async with self.connect("ping") as bus, bus.inbox(subject) as inbox:
                await bus.send("$SRV.PING.history", reply=subject)
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        while await inbox.next(1):
                            answers += 1
            return answers

        return asyncio.run(ask())

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200 and self.status().get(
                "history", True
            )
        except httpx.TransportError:
            return False


@contextmanager
def running_stack(
    folder: Path,
    mongodb_uri: str = NO_MONGO,
    slow: bool = False,
    nats: Server | None = None,
    **settings: str,
) -> Iterator[Stack]:
    """
    Start all processes and wait until they are ready; kill them at the end. NATS must not have
    refused anything that a service needs.
    """
    stack = Stack(folder, mongodb_uri, slow, nats or SecuredServer(folder), **settings)
    with ExitStack() as cleanup:
        cleanup.callback(stack.http.close)
        for part in stack.parts:
            cleanup.callback(part.stop, signal.SIGKILL)
            part.start()
        stack.wait_until_ready()
        yield stack
        assert not isinstance(stack.nats, SecuredServer) or stack.nats.violations() == []
