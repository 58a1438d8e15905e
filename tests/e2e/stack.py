"""All services as real processes on free ports, and an HTTP client for them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import nats

from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from tests.servers import Server, free_port, nats_server, wait_for

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
    One process of each service and their nats-server.

    With `slow`, each decoding step takes 30 ms longer. `http` sends the first of EDGE_API_KEYS, if
    there are any. `settings` are environment variables of all processes.
    """

    def __init__(
        self, folder: Path, mongodb_uri: str, slow: bool, nats: Server, **settings: str
    ) -> None:
        self.nats = nats
        port = free_port()
        environ = plain_environment() | {
            "NATS_URL": f"nats://127.0.0.1:{self.nats.port}",
            "MONGODB_URI": mongodb_uri,
            "EDGE_HOST": "127.0.0.1",
            "EDGE_PORT": str(port),
            "MODEL_THREADS": "1",  # llama.cpp's threads spin, and slow other processes down
            **settings,
        }
        inference = "tests.slow_inference" if slow else "services.inference"
        self.history = Process("services.history", 0, environ, folder)
        self.inference = Process(inference, 0, environ, folder)
        self.edge = Process("services.edge", port, environ, folder)
        _, _, key = settings.get("EDGE_API_KEYS", "").partition(",")[0].partition(":")
        headers = {"X-API-Key": key} if key else {}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=headers)

    @property
    def parts(self) -> list[Server]:
        return [self.nats, self.history, self.inference, self.edge]

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

    def histories(self) -> int:
        """Return the number of history processes that answer a ping within 0.3 s."""

        async def ask() -> int:
            client = await nats.connect(f"nats://127.0.0.1:{self.nats.port}")
            inbox = client.new_inbox()
            answers = await client.subscribe(inbox)
            await client.publish("$SRV.PING.history", reply=inbox)
            await asyncio.sleep(0.3)
            await client.close()
            return answers.pending_msgs

        return asyncio.run(ask())

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200 and self.status()["history"]
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
    """Start all processes and wait until they are ready; kill them at the end."""
    stack = Stack(folder, mongodb_uri, slow, nats or nats_server(folder), **settings)
    with ExitStack() as cleanup:
        cleanup.callback(stack.http.close)
        for part in stack.parts:
            cleanup.callback(part.stop, signal.SIGKILL)
            part.start()
        stack.wait_until_ready()
        yield stack
