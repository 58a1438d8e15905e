"""Two workers and two edges, one conversation at a time, and how it was heard."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from services.client import routing
from services.contract.messages import WorkerReport
from services.contract.subjects import OPEN_TENANT, session_key
from tests.e2e.stack import GREEDY, Process, Stack, running_stack
from tests.servers import NATS_CONFIG, Server, free_port, nats_server, wait_for

AFTER = 25  # characters of an answer after which something happens


class Heard:
    """An answer as its client hears it: each event's id must be the length so far."""

    def __init__(self, address: str = "", text: str = "") -> None:
        self.address = address
        self.text = text
        self.end: dict[str, Any] = {}
        self.start_the_clock()

    def start_the_clock(self) -> None:
        self.longest_gap = 0.0  # seconds between two tokens
        self._last = time.monotonic()

    def take(self, event_id: str, event: dict[str, Any]) -> None:
        assert not self.end, "nothing comes after the end"
        if "token" not in event:
            self.end = event
            return
        now = time.monotonic()
        self.longest_gap, self._last = max(self.longest_gap, now - self._last), now
        self.text += event["token"]
        assert int(event_id) == len(self.text)


class Pair:
    """Processes are told apart by the id under which their worker reports."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        first = stack.status()["workers"][0]["worker_id"]
        self.workers = {first: stack.inference}
        self.added: list[Process] = []
        self._folder = folder

    def add_worker(self, **settings: str) -> Process:
        module = self.stack.inference.name
        added = Process(module, 0, self.stack.inference.environ | settings, self._folder)
        self.added.append(added)
        self.start(added)
        return added

    def start(self, worker: Process) -> None:
        """Also again, then as another worker."""
        before = self._ready()
        worker.start()
        wait_for(lambda: bool(self._ready() - before), "another worker")
        (worker_id,) = self._ready() - before
        self.workers = {k: v for k, v in self.workers.items() if v is not worker}
        self.workers[worker_id] = worker

    def session_of(self, worker: Process, name: str) -> str:
        """A session that this worker is asked for."""
        reports = msgspec.convert(self.stack.status()["workers"], list[WorkerReport])
        for number in range(100):
            session = f"{name} {number}"
            order = routing.rank_workers(session_key(OPEN_TENANT, session), None, reports)
            if self.workers[order[0]] is worker:
                return session
        raise AssertionError("no session of 100 is this worker's")

    def answering(self) -> Process:
        """The worker that gives the one answer that there is."""

        def busy() -> list[str]:
            return [w["worker_id"] for w in self.stack.status()["workers"] if w["running"]]

        wait_for(lambda: len(busy()) == 1, "the report of who answers")
        return self.workers[busy()[0]]

    def ask(self, session: str, disturb: Callable[[Heard], object] = id, **more: Any) -> Heard:
        """`disturb` is done in the middle of the answer."""
        disturbed = False
        body = GREEDY | {"prompt": "count to 50", "session_id": session} | more
        with self.stack.http.stream("POST", "/chat", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            heard = Heard(answer.headers["content-location"])
            for event_id, event in events(answer):
                heard.take(event_id, event)
                if len(heard.text) >= AFTER and not disturbed:
                    disturbed = True
                    disturb(heard)
                    heard.start_the_clock()
        return heard

    def _ready(self) -> set[str]:
        return {w["worker_id"] for w in self.stack.status()["workers"] if w["state"] == "ready"}


def events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    event_id = ""
    for line in answer.iter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        if line.startswith("data: "):
            yield event_id, json.loads(line.removeprefix("data: "))


@contextmanager
def pair(folder: Path) -> Iterator[Pair]:
    with running_stack(folder, slow=True, nats=impatient_nats(folder)) as stack:
        made = Pair(stack, folder)
        try:
            made.add_worker()
            yield made
        finally:
            for worker in made.added:
                worker.stop(signal.SIGKILL)


def impatient_nats(folder: Path) -> Server:
    """It cuts off who can't be sent anything for a second, not for ten."""
    server, config = nats_server(folder), folder / "nats.conf"
    config.write_text(f'{NATS_CONFIG.read_text()}\nwrite_deadline: "1s"\n')
    server.command[server.command.index(str(NATS_CONFIG))] = str(config)
    return server


@contextmanager
def second_edge(stack: Stack, folder: Path) -> Iterator[Process]:
    port = free_port()
    environ = stack.edge.environ | {"EDGE_PORT": str(port)}
    edge = Process("services.edge", port, environ, folder)
    edge.start()
    try:
        yield edge
    finally:
        edge.stop(signal.SIGKILL)
