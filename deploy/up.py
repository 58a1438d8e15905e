"""`just up`: run nats-server and the three services in one terminal until Ctrl-C."""

import asyncio
import contextlib
import http.client
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from deploy.lock import locked
from deploy.nats import server
from deploy.nats.secrets import DATA, NATS_PID, Secrets
from services.contract.version import COMMAND
from services.edge.server import bind
from services.edge.settings import EdgeSettings
from services.history.archive import Archive
from services.history.settings import HistorySettings
from services.inference.model_path import expand_home, model_name
from services.inference.settings import InferenceSettings
from services.runtime import logs
from services.runtime.process import INVALID_SETTING, configure_logs
from services.runtime.settings import (
    NO_DOTENV,
    InvalidSetting,
    LogSettings,
    ServiceSettings,
    load,
    own_environment,
    parse,
)
from services.runtime.supervised import BackOff

CHILD = Path(__file__).with_name("child.py")
SERVICES: dict[str, type[ServiceSettings]] = {
    "history": HistorySettings,
    "inference": InferenceSettings,
    "edge": EdgeSettings,
}
"""The services and their settings, in the order of starting; they are stopped in reverse."""
PRIVATE = 0o077  # umask: what is below .data belongs to this user alone
RESTART_DELAYS = BackOff(min_seconds=1.0)
STOP_DEADLINE = 35.0  # seconds; a service drains for at most 30
EARLY_SECONDS = 3.0  # a process that exits sooner has not started
MAX_EARLY_EXITS = 5
INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as of a shell: `just` expects it
POLL_INTERVAL = 0.2  # seconds

# Wildcard addresses to listen on, and the loopback address that reaches each of them
ALL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}

log = logging.getLogger("up")


class Child:
    """
    A process that is restarted when it exits, and killed when this process dies.

    It has its own session, so that Ctrl-C reaches only this process, which stops the children in
    order. It inherits the file descriptors `pass_fds`. Unless it `gives_up`, it is restarted even
    if it keeps failing at start, with longer and longer delays.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environ: dict[str, str],
        log_file: Path | None = None,
        pass_fds: tuple[int, ...] = (),
        gives_up: bool = True,
    ) -> None:
        self.name = name
        self._gives_up = gives_up
        self._hint = f"its log is {log_file}" if log_file else "see its log above"
        self._output = _private(log_file).open("ab") if log_file else None
        self._command = [sys.executable, str(CHILD), str(os.getpid()), *command]
        self._environ = environ
        self._pass_fds = pass_fds
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._exited = asyncio.Event()
        self._exited.set()

    async def run(self) -> int:
        """Run until stopped. Return 0 then, or another code if a restart would not help."""
        early_exits = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._run_once()
            if code == INVALID_SETTING:
                if self._output:
                    log.critical("%s can't use its settings (%s)", self.name, self._hint)
                return code
            if self._stopping.is_set():
                break
            early_exits = early_exits + 1 if time.monotonic() - started < EARLY_SECONDS else 0
            if self._gives_up and early_exits == MAX_EARLY_EXITS:
                log.critical("%s keeps failing at start, giving up (%s)", self.name, self._hint)
                return 1
            log.error("%s %s, restarting it (%s)", self.name, _describe(code), self._hint)
            await self._pause(1 if self._gives_up else max(1, early_exits))
        return 0

    async def stop(self) -> None:
        """Let it drain; kill it after the deadline."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_DEADLINE):
                await self._exited.wait()
        except TimeoutError:
            log.error("%s did not stop within %.0f s, killing it", self.name, STOP_DEADLINE)
            self.kill()

    def kill(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGKILL)

    async def _pause(self, failures: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTART_DELAYS.seconds(failures)):
                await self._stopping.wait()

    async def _run_once(self) -> int:
        self._exited.clear()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environ,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
                pass_fds=self._pass_fds,
            )
            if self._stopping.is_set():  # while it was being started
                self._signal(signal.SIGTERM)
            return await self._process.wait()
        finally:
            self._exited.set()

    def _signal(self, signum: signal.Signals) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(signum)


def _private(path: Path) -> Path:
    """Return the path of a file that others can't read, also if an earlier version made it."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path


def _describe(code: int) -> str:
    """Describe an exit code, which is negative if a signal killed the process."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


async def up(edge: EdgeSettings, environ: dict[str, str]) -> int:
    """
    Run everything until a signal comes or a process can't start. Return the exit code.

    Without NATS_URL in `environ`, that includes a nats-server, of which each service is a user with
    a key of its own.
    """
    os.umask(PRIVATE)
    has_own_nats = not environ.get("NATS_URL", "").strip()
    # the environment is complete: the services do not read `.env` again
    environ = environ | {"NATS_URL": edge.nats_url, NO_DOTENV: "1"}
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(DATA, NATS_PID)) if has_own_nats else None
        with bind(edge.edge_host, edge.edge_port):
            pass  # check early: the edge is the last to start
        stages, secrets = [], None
        if lock is not None:
            secrets = Secrets()
            secrets.ensure()
            stages.append([_nats_server(edge.nats_port, lock, environ)])
        for name in SERVICES:
            stages.append(_processes(name, environ | (secrets.settings(name) if secrets else {})))
        return await run(stages, log_when_ready(edge))


def _processes(service: str, environ: dict[str, str]) -> list[Child]:
    """
    Return the process of a service, or of inference one for each model of MODEL_PATH. Raises
    InvalidSetting.
    """
    command = [sys.executable, "-m", f"services.{service}"]
    settings = parse(InferenceSettings, environ)
    environ = own_environment(SERVICES[service], SERVICES.values(), environ)
    if service == "inference" and not settings.model_cache_folder:
        environ = environ | {"MODEL_CACHE_FOLDER": str(DATA / "kv-cache")}
    if service != "inference" or len(settings.model_paths) < 2:
        return [Child(service, command, environ)]
    default = {"MODEL_DEFAULT": settings.model_default or _default_model(settings.model_paths)}
    first = settings.inference_metrics_port
    ports = [str(first + number) if first else "" for number in range(len(settings.model_paths))]
    return [
        Child(
            f"inference of {path}",
            command,
            environ | default | {"MODEL_PATH": path, "INFERENCE_METRICS_PORT": port},
            gives_up=False,
        )
        for path, port in zip(settings.model_paths, ports, strict=True)
    ]


def _default_model(paths: Sequence[str]) -> str:
    """
    Return the name of the first model; "" if it is a folder, in which the worker finds it. Raises
    InvalidSetting if two models have one name.
    """
    files = {path for path in paths if not os.path.isdir(expand_home(path))}
    for name, count in Counter(model_name(Path(file)) for file in files).items():
        if count > 1:
            raise InvalidSetting(
                f"MODEL_PATH names two models {name!r}: rename one of the files. Of a split model,"
                " name only the first part."
            )
    return model_name(Path(paths[0])) if paths[0] in files else ""


async def run(stages: Sequence[Sequence[Child]], *work: Coroutine[Any, Any, None]) -> int:
    """
    Run all children, and `work` beside them, until a signal comes or a child can't start. Then stop
    the stages in reverse, the children of each one together. Return the exit code.
    """
    children = [child for stage in stages for child in stage]
    stop, interrupted = asyncio.Event(), asyncio.Event()
    _on_signals(children, stop, interrupted)
    running = [asyncio.create_task(child.run()) for child in children]
    stopping = asyncio.create_task(stop.wait())
    others = [asyncio.create_task(each) for each in (_watch_parent(stop), *work)]
    await asyncio.wait([*running, stopping], return_when=asyncio.FIRST_COMPLETED)
    for task in (stopping, *others):
        task.cancel()
    log.info("shutting down after the answers in progress")
    for stage in reversed(stages):
        await asyncio.gather(*(child.stop() for child in stage))
    code = max(await asyncio.gather(*running))
    return code or (INTERRUPTED if interrupted.is_set() else 0)


def _on_signals(children: list[Child], stop: asyncio.Event, interrupted: asyncio.Event) -> None:
    def on_signal(signum: signal.Signals) -> None:
        if signum == signal.SIGINT:
            interrupted.set()
        if stop.is_set():  # the second signal
            for child in children:
                child.kill()
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            asyncio.get_running_loop().add_signal_handler(signum, on_signal, signum)


async def _watch_parent(stop: asyncio.Event) -> None:
    """Stop when `just` has ended, even by SIGKILL, but not under nohup."""
    parent = os.getppid()
    while os.getppid() == parent or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        await asyncio.sleep(POLL_INTERVAL)
    log.warning("parent process has ended, stopping")
    stop.set()


def _nats_server(port: int, lock: int, environ: dict[str, str]) -> Child:
    if server.is_taken(port):
        raise InvalidSetting(
            f"Port {port} is taken, perhaps by a `{COMMAND} up` in another folder:"
            " choose another port with NATS_PORT. To use a NATS server with JetStream that"
            f" listens there, set NATS_URL=nats://{server.HOST}:{port}."
        )
    environ = server.environment(own_environment(LogSettings, SERVICES.values(), environ))
    return Child("nats-server", server.command(port), environ, server.LOG, pass_fds=(lock,))


async def log_when_ready(edge: EdgeSettings) -> None:
    """Log the URL once chats are accepted."""
    while not await asyncio.to_thread(_is_ready, edge):
        await asyncio.sleep(POLL_INTERVAL)
    log.info("ready: %s (stop with Ctrl-C)", _url(edge))


def _is_ready(edge: EdgeSettings) -> bool:
    """Return whether the edge is ready. urllib is not used, as it would use an `http_proxy`."""
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
    """Check the settings of all services before any is started. Raises InvalidSetting."""
    environ = configure_logs("up")
    load(ServiceSettings, environ)  # logs misspelt NATS_… variables; services log their own
    edge = parse(EdgeSettings, environ)
    parse(InferenceSettings, environ)
    history = parse(HistorySettings, environ)
    Archive(history.mongodb_uri, history.mongodb_database, sys.exit).close()
    return await up(edge, environ)


def main(name: str, start: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run `start` until it ends, with logs of this name. Return its exit code."""
    logs.configure(name)
    try:
        return uvloop.run(start())
    except InvalidSetting as error:
        log.critical("%s", error)
        return INVALID_SETTING


if __name__ == "__main__":
    sys.exit(main("up", _start))
