"""A stack with two workers, and one answer at a time that is disturbed midway."""

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
from tests.secured import SecuredServer
from tests.servers import Server, free_port, wait_for

DISTURB_AFTER = 25  # characters of an answer


class StreamedAnswer:
    """An answer as it is received; each event's id must be the length of the text so far."""

    def __init__(self, address: str = "", text: str = "") -> None:
        self.address = address
        self.text = text
        self.end: dict[str, Any] = {}
        self.reset_gap()

    def reset_gap(self) -> None:
        self.longest_gap = 0.0  # seconds between two tokens
        self._last = time.monotonic()

    def take(self, event_id: str, event: dict[str, Any]) -> None:
        assert not self.end, "an event after the end"
        if "token" not in event:
            self.end = event
            return
        now = time.monotonic()
        self.longest_gap, self._last = max(self.longest_gap, now - self._last), now
        self.text += event["token"]
        assert int(event_id) == len(self.text)


class WorkerPair:
    """A stack to which workers are added; `workers` are its worker processes by worker id."""

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
        """Start or restart a worker process; it gets a new worker id."""
        before = self._ready()
        worker.start()
        wait_for(lambda: bool(self._ready() - before), "another worker")
        (worker_id,) = self._ready() - before
        self.workers = {k: v for k, v in self.workers.items() if v is not worker}
        self.workers[worker_id] = worker

    def session_of(self, worker: Process, name: str) -> str:
        """Return the id of a session that is routed to this worker."""
        reports = msgspec.convert(self.stack.status()["workers"], list[WorkerReport])
        for number in range(100):
            session = f"{name} {number}"
            order = routing.rank_workers(session_key(OPEN_TENANT, session), None, reports)
            if self.workers[order[0]] is worker:
                return session
        raise AssertionError("none of 100 sessions is routed to this worker")

    def answering(self) -> Process:
        """Return the worker that generates the only answer in flight."""

        def busy() -> list[str]:
            return [w["worker_id"] for w in self.stack.status()["workers"] if w["running"]]

        wait_for(lambda: len(busy()) == 1, "the report of the answering worker")
        return self.workers[busy()[0]]

    def ask(
        self, session: str, disturb: Callable[[StreamedAnswer], object] = id, **more: Any
    ) -> StreamedAnswer:
        """Stream an answer and call `disturb` in the middle of it."""
        disturbed = False
        body = GREEDY | {"prompt": "count to 50", "session_id": session} | more
        with self.stack.http.stream("POST", "/chat", json=body) as response:
            assert response.status_code == 200, response.read()
            answer = StreamedAnswer(response.headers["content-location"])
            for event_id, event in events(response):
                answer.take(event_id, event)
                if len(answer.text) >= DISTURB_AFTER and not disturbed:
                    disturbed = True
                    disturb(answer)
                    answer.reset_gap()
        return answer

    def _ready(self) -> set[str]:
        return {w["worker_id"] for w in self.stack.status()["workers"] if w["state"] == "ready"}


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each event with its id."""
    event_id = ""
    for line in response.iter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        if line.startswith("data: "):
            yield event_id, json.loads(line.removeprefix("data: "))


@contextmanager
def running_pair(folder: Path) -> Iterator[WorkerPair]:
    with running_stack(folder, slow=True, nats=impatient_nats(folder)) as stack:
        pair = WorkerPair(stack, folder)
        try:
            pair.add_worker()
            yield pair
        finally:
            for worker in pair.added:
                worker.stop(signal.SIGKILL)


def impatient_nats(folder: Path) -> Server:
    """Return a server that disconnects slow consumers after one second instead of ten."""
    return SecuredServer(folder, more='write_deadline: "1s"')


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
