"""Several processes of each service, on one or more NATS servers, with a slowed model."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.stack import NO_MONGO, Process, plain_environment
from tests.servers import ROOT, Server, free_port, nats_cluster, nats_server, wait_for

SLOW_INFERENCE = "tests.slow_inference"


class Fleet:
    """
    Two edges, two history processes, `workers` workers and `nats` NATS servers. The services' code
    is that of `checkout`.
    """

    def __init__(
        self,
        folder: Path,
        nats: int,
        workers: int,
        inference: str,
        checkout: Path,
        **settings: str,
    ) -> None:
        self.nats = nats_cluster(folder, nats) if nats > 1 else [nats_server(folder)]
        self.nats_url = ",".join(f"nats://127.0.0.1:{server.port}" for server in self.nats)
        self._monitors = [free_port() for _ in self.nats]
        for server, port in zip(self.nats, self._monitors, strict=True):
            server.command += ["-m", str(port)]
        self._folder = folder
        self._checkout = checkout
        self._environ = plain_environment() | {
            "NATS_URL": self.nats_url,
            "MONGODB_URI": NO_MONGO,
            "EDGE_HOST": "127.0.0.1",
            "MODEL_THREADS": "1",
            "MODEL_PATH": str(ROOT / "model/demo.gguf"),
            "HISTORY_REPLICAS": str(nats),
            **settings,
        }
        self.histories = [self._process("services.history") for _ in range(2)]
        self._inference = inference
        self.workers = [self._process(inference) for _ in range(workers)]
        self.edges = [self._process("services.edge", free_port()) for _ in range(2)]

    @property
    def parts(self) -> list[Server]:
        return [*self.nats, *self.histories, *self.workers, *self.edges]

    @property
    def urls(self) -> list[str]:
        """The base URLs of the edges."""
        return [f"http://127.0.0.1:{edge.port}" for edge in self.edges]

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Wait until every edge reports all workers ready and a history that answers."""
        wait_for(lambda: all(map(self._is_ready, self.urls)), "the fleet", seconds)

    def add_worker(self) -> None:
        worker = self._process(self._inference)
        worker.start()
        self.workers.append(worker)

    def remove_worker(self) -> None:
        """End the newest worker, and wait until it has drained."""
        assert self.workers[-1].stop() == 0
        self.workers.pop()

    def status(self, url: str = "") -> dict[str, Any]:
        """
        Return the reply of an edge's `/status`. Raises httpx.HTTPError, also for a 503: JetStream
        may have no leader yet.
        """
        response = httpx.get(f"{url or self.urls[0]}/status").raise_for_status()
        status: dict[str, Any] = response.json()
        return status

    def nats_resources(self) -> dict[str, int]:
        """
        Return the largest number of subscriptions of a process of each service, and the number of
        JetStream consumers under "consumers".
        """
        largest: Counter[str] = Counter()
        for port in self._monitors:
            found = httpx.get(f"http://127.0.0.1:{port}/connz").json()["connections"]
            for connection in found:
                name = connection.get("name", "")
                largest[name] = max(largest[name], connection["subscriptions"])
            consumers = httpx.get(f"http://127.0.0.1:{port}/jsz").json()["consumers"]
            largest["consumers"] = max(largest["consumers"], consumers)
        return largest

    def logs(self) -> dict[str, str]:
        """Return each process' log by its name."""
        return {part.name: part.log.read_text(errors="replace") for part in self.parts}

    def _is_ready(self, url: str) -> bool:
        try:
            status = self.status(url)
        except httpx.HTTPError:
            return False
        ready = [worker for worker in status["workers"] if worker["state"] == "ready"]
        return len(ready) == len(self.workers) and status["history"] is not None

    def _process(self, module: str, port: int = 0) -> Process:
        kind = module.rpartition(".")[2]
        number = len([path for path in self._folder.iterdir() if path.name.startswith(kind)])
        own = self._folder / f"{kind}-{number}"
        own.mkdir()
        process = Process(module, port, self._environ | {"EDGE_PORT": str(port)}, own)
        process.name = own.name
        process.folder = self._checkout
        return process


@contextmanager
def running_fleet(
    folder: Path,
    nats: int = 1,
    workers: int = 2,
    inference: str = SLOW_INFERENCE,
    checkout: Path = ROOT,
    **settings: str,
) -> Iterator[Fleet]:
    """Start all processes and wait until they are ready; kill them at the end."""
    fleet = Fleet(folder, nats, workers, inference, checkout, **settings)
    with ExitStack() as cleanup:
        cleanup.callback(lambda: [part.stop(signal.SIGKILL) for part in fleet.parts])
        for part in fleet.parts:
            part.start()
        fleet.wait_until_ready()
        yield fleet
