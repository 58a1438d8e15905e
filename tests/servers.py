"""Real nats-server and mongod processes, each on a free port with its data in a folder."""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from deploy.cluster import commands
from deploy.nats.server import environment

NatsVersion = Literal["pinned", "oldest"]
"""nats-server as uv.lock pins it, or the oldest supported one, which deploy/setup.sh installs."""
NATS_VERSIONS: tuple[NatsVersion, ...] = ("pinned", "oldest")

ROOT = Path(__file__).parents[1]
NATS_CONFIG = ROOT / "deploy/nats/nats.conf"


class PortBlock:
    """
    A range of ports that belongs to this process.

    Test processes run in parallel, and one that binds port 0 and closes it again can get a port
    that another one is about to use. A listener on the block's first port claims the block for the
    life of the process. Blocks lie below the ports that Linux and macOS choose for outgoing
    connections.
    """

    FIRST, LAST, SIZE = 10_000, 30_000, 200

    def __init__(self) -> None:
        self._claim, first = self._claim_block()
        self._ports = itertools.cycle(range(first + 1, first + self.SIZE))

    def next_free(self) -> int:
        """Return the next port of the block, in turn, that nothing listens on."""
        for port in itertools.islice(self._ports, self.SIZE):
            with contextlib.suppress(OSError), _bind(port):
                return port
        raise RuntimeError("every port of the block is in use: servers of earlier tests still run")

    def _claim_block(self) -> tuple[socket.socket, int]:
        for first in range(self.FIRST, self.LAST, self.SIZE):
            with contextlib.suppress(OSError):
                return _bind(first), first
        raise RuntimeError("no block of ports is free: too many test processes run at once")


def _bind(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


_port_block = functools.cache(PortBlock)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on and no other test process is given."""
    return _port_block().next_free()


def free_ports(count: int) -> int:
    """Return the first of `count` such ports that follow each other."""
    ports = [free_port()]
    while len(ports) < count:
        port = free_port()
        ports = [*ports, port] if port == ports[-1] + 1 else [port]
    return ports[0]


def wait_for(ready: Callable[[], bool], what: str, seconds: float = 45) -> None:
    """Poll until `ready()` is true; raise TimeoutError, naming `what`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.02)


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Server:
    """A server process that can be killed, frozen and restarted on the same port and data."""

    def __init__(self, name: str, command: list[str], port: int, log: Path) -> None:
        self.name = name
        self.port = port
        self.command = command
        self.log = log
        self.environ = dict(os.environ)
        self.folder: Path | None = None
        """Where it starts; None: where the tests do."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environ, cwd=self.folder
            )
        wait_for(self._is_up, f"{self.name} (log: {self.log})")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit code; 0 if it is not running."""
        if self._process is None:
            return 0
        self._process.send_signal(how)
        code = self._process.wait(40)
        self._process = None
        return code

    def signal(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def has_died(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} exited at start:\n{self.log.read_text()[-2000:]}")
        return accepts(self.port)


def nats_server(
    folder: Path,
    store: Path | None = None,
    within: Sequence[str] = (),
    version: NatsVersion = "pinned",
) -> Server:
    """Return a server that is not started; `within` is a command that runs it, such as nsenter."""
    port = free_port()
    command = [*within, _nats_binary(version), "-c", str(NATS_CONFIG), "-a", "127.0.0.1"]
    command += ["-p", str(port), "-js", "-sd", str(store or folder)]
    server = Server("nats-server", command, port, folder / "nats.log")
    server.environ = environment(server.environ)  # as that of `just up`
    return server


def nats_cluster(folder: Path, size: int) -> list[Server]:
    """Return the servers of one cluster, which works while a majority of them runs."""
    routes = [free_port() for _ in range(size)]
    servers = []
    for number in range(size):
        own = folder / f"nats-{number}"
        own.mkdir()
        server = nats_server(own)
        server.environ = dict(os.environ)  # as those of `just cluster`
        server.name += f"-{number}"
        server.command += commands.nats_route(number, routes)
        servers.append(server)
    return servers


def mongod(folder: Path) -> Server:
    port = free_port()
    (folder / "db").mkdir(exist_ok=True)
    command = commands.mongod(folder / "db", port)
    command += ["--setParameter", "ttlMonitorSleepSecs=1"]  # default: 60
    return Server("mongod", command, port, folder / "mongod.log")


def mongo_replica_set(folder: Path, size: int) -> list[Server]:
    """Return the members of a replica set, which deploy.cluster.replica_set forms."""
    servers = []
    for number in range(size):
        own = folder / f"mongod-{number}"
        own.mkdir()
        servers.append(mongod(own))
        servers[-1].command += commands.replica_set_member()
    return servers


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start the server, and kill it at the end."""
    server.start()
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


def _nats_binary(version: NatsVersion) -> str:
    folders = {
        # absolute, because the test of a full disk starts the server in another folder
        "pinned": str(ROOT / (os.environ.get("NATS_TEST_FOLDER") or sysconfig.get_path("scripts"))),
        "oldest": str(ROOT / ".data/nats-oldest/bin"),
    }
    if binary := shutil.which("nats-server", path=folders[version]):
        return binary
    raise RuntimeError(f"nats-server ({version}) is missing: `just test` installs it")
