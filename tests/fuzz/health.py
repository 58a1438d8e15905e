"""Checks that a stack is as healthy after a fuzz test as before it."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.embedding_models import MEAN, RANK, write
from tests.e2e.stack import NO_MONGO, Process, Stack, running_stack
from tests.servers import Server, nats_server, wait_for

MAX_GROWTH_BYTES = 200 * 2**20
"""Of the memory of a process: its caches fill up, and messages of a MiB fragment its heap."""
MODELS = (("embedder", MEAN), ("reranker", RANK))
FAILURES = ("Traceback", " ERROR ", "supervised")


@contextmanager
def checked_stack(folder: Path, **settings: str) -> Iterator[Stack]:
    """
    Run every service, without MongoDB, and workers of an embedding model and a reranker. Check at
    the end that all of them are healthy. NATS has no permissions, which would keep a mistake of a
    service from doing harm.
    """
    nats = nats_server(folder)
    with running_stack(folder, NO_MONGO, False, nats, **settings) as stack, ExitStack() as cleanup:
        workers = [worker(stack, folder / name, pooling) for name, pooling in MODELS]
        for each in workers:
            cleanup.callback(each.stop, signal.SIGKILL)
            each.start()
        wait_for(lambda: dict(MODELS).keys() <= served_models(stack), "all models")
        health = Health(stack, workers)
        yield stack
        health.check()


def worker(stack: Stack, folder: Path, pooling: Any) -> Process:
    """Return a process, which is not started, that serves a tiny model made in the folder."""
    folder.mkdir()
    path = write("bert", folder / f"{folder.name}.gguf", pooling=pooling)
    environ = stack.inference.environ | {"MODEL_PATH": str(path)}
    return Process("services.inference", 0, environ, folder)


def served_models(stack: Stack) -> set[str]:
    return {each["id"] for each in stack.http.get("/v1/models").json()["data"]}


def ready_workers(stack: Stack) -> list[dict[str, Any]]:
    """Return the reports of the workers, that of the chat model first."""
    ready = [each for each in stack.status().get("workers", ()) if each["state"] == "ready"]
    return sorted(ready, key=lambda each: each["kind"] != "chat")


class Health:
    """What is measured before a test. A first answer has filled what is made once."""

    def __init__(self, stack: Stack, workers: list[Process]) -> None:
        self._stack = stack
        self._services = [stack.history, stack.inference, stack.edge, *workers]
        self._parts = [stack.nats, *self._services]
        assert stack.chat("hello", "health").end["done"]
        self._memory = [resident_bytes(part) for part in self._parts]
        self._pids = [part.pid for part in self._parts]

    def check(self) -> None:
        """Raise AssertionError if a process has failed, grown or restarted, or a slot is stuck."""
        stack = self._stack
        wait_for(lambda: stack.running() == 0, "no running request", 90)
        stack.wait_until_ready()
        assert stack.chat("hello", "health").end["done"]
        assert stack.histories() == 1
        for part, pid, memory in zip(self._parts, self._pids, self._memory, strict=True):
            assert part.is_running and part.pid == pid, part.name
            growth = resident_bytes(part) - memory
            print(f"{part.name}: {growth / 2**20:+.0f} MiB")
            assert growth < MAX_GROWTH_BYTES, part.name
        for process in self._services:
            check_log(process)


def check_log(process: Process) -> None:
    lines = process.log.read_text(errors="replace").splitlines()
    failures = [line for line in lines if any(each in line for each in FAILURES)]
    assert not failures, f"{process.name}: {failures[:5]}"


def resident_bytes(server: Server) -> int:
    """Return the memory of a process that is in RAM (Linux)."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (kib,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(kib) * 1024
