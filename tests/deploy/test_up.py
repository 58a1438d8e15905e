"""`just up` with real processes."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from deploy.nats import server
from services.contract import subjects
from services.contract.codec import encode
from services.runtime.bus import Bus
from services.runtime.streams import Stream
from tests.e2e.stack import plain_environment
from tests.history.samples import exchange
from tests.servers import ROOT, free_port, nats_server, running, wait_for

LOADED = {"one": "loaded", "two": "loaded", "broken": "unloaded"}
UP = (sys.executable, "-m", "deploy.up")


class Up:
    """
    `python -m deploy.up` in its own folder, with its own .data/. `env` is the text of its `.env`,
    `within` a command that runs another one.
    """

    command: Sequence[str] = UP

    def __init__(
        self, folder: Path, env: str = "", within: Sequence[str] = (), **environ: str
    ) -> None:
        self.link(folder)
        (folder / ".env").write_text(env)
        self.port = free_port()
        self.log = folder / f"up-{self.port}.log"
        self.nats_port = str(free_port())
        ports = {"EDGE_PORT": str(self.port), "NATS_PORT": self.nats_port}
        one_thread = {"MODEL_THREADS": "1"}  # more would compete with other tests
        environ = plain_environment() | ports | one_thread | environ
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*within, *self.command],
                cwd=folder,
                env={k: v for k, v in environ.items() if f"{k}=" not in env},
                stdout=log,
                stderr=log,
            )

    def link(self, folder: Path) -> None:
        """Make the folder look like a clone."""
        for name in ("services", "deploy", "model"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)

    def wait_until_ready(self) -> str:
        """Return the URL in its ready line."""
        wait_for(self._is_ready, "the ready line", 40)
        return self.log.read_text().partition("ready: ")[2].split()[0]

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"it has ended:\n{self.log.read_text()[-2000:]}"
        return "ready: " in self.log.read_text()

    def interrupt(self) -> int:
        """Send Ctrl-C and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def models(self) -> dict[str, str]:
        """Return the states of the models."""
        models = httpx.get(f"http://127.0.0.1:{self.port}/v1/models", timeout=20).json()["data"]
        return {model["id"]: model["status"]["value"] for model in models}

    def chat(self, prompt: str, **more: str) -> str:
        """Return the answer, or "" if it is missing or incomplete."""
        url = f"http://127.0.0.1:{self.port}/chat"
        body = {"prompt": prompt, "temperature": 0} | more
        with suppress(httpx.TransportError):
            answer = httpx.post(url, json=body, timeout=20)
            lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
            *tokens, end = [json.loads(line.removeprefix("data: ")) for line in lines] or [{}]
            if end.get("done"):
                return "".join(token["token"] for token in tokens)
        return ""

    def children(self) -> dict[str, int]:
        """Return process ids by module, and that of nats-server."""
        listing = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
        )
        rows = [line.split() for line in listing.stdout.splitlines() if "child.py" not in line]
        return {
            "nats-server" if "nats-server" in row[1] else row[-1]: int(row[0])
            for row in rows
            if "services." in row[-1] or "nats-server" in row[1]
        }


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_for_exit(children: dict[str, int]) -> None:
    wait_for(lambda: not any(map(is_running, children.values())), f"the end of {children}", 30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Start `just up` in the test's folder; those still running at the end are stopped."""
    started: list[Up] = []

    def start(**options: Any) -> Up:
        started.append(Up(tmp_path, **options))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.interrupt()


@pytest.fixture
def up(start: Callable[..., Up]) -> Up:
    return start()


def test_ctrl_c_ends_all_processes(up: Up) -> None:
    assert up.wait_until_ready() == f"http://localhost:{up.port}"
    assert up.chat("hello")
    children = up.children()
    assert len(children) == 4
    os.kill(children["services.inference"], signal.SIGKILL)
    wait_for(lambda: bool(up.chat("hello")), "an answer after a restart", 30)
    assert up.interrupt() == 130
    log = up.log.read_text()
    assert log.count(" stopped exit_code=0") == 3 and "Traceback" not in log
    for pid in children.values():
        assert not Path(f"/proc/{pid}").exists()


def test_each_model_has_a_worker_and_one_crash_spares_others(
    start: Callable[..., Up], tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.gguf").symlink_to(ROOT / "model/demo.gguf")
    (folder / "broken.gguf").write_text("no GGUF")
    up = start(MODEL_PATH="models/one.gguf, models/broken.gguf,models/two.gguf")
    up.wait_until_ready()
    wait_for(lambda: up.models() == LOADED, "all models to be loaded or failed")
    workers = _inference_processes(up)
    assert len(workers) == 3
    assert up.chat("hello") and up.chat("hello", model="two")
    os.kill(workers["models/one.gguf"], signal.SIGKILL)
    assert up.chat("hello", model="two")
    wait_for(lambda: bool(up.chat("hello", model="one")), "an answer after a restart", 30)
    after = _inference_processes(up)
    assert {k for k, pid in workers.items() if after[k] != pid} == {"models/one.gguf"}
    assert up.interrupt() == 130
    log = up.log.read_text()
    assert "inference of models/one.gguf was killed by SIGKILL, restarting it" in log
    assert log.count(" stopped exit_code=0") == 5 and "Traceback" not in log


def test_two_models_with_one_name_are_refused(tmp_path: Path) -> None:
    up = Up(tmp_path, MODEL_PATH="a/x.gguf,b/x.gguf")
    assert up.process.wait(55) == 2
    assert "MODEL_PATH names two models 'x'" in up.log.read_text().splitlines()[-1]


def _inference_processes(up: Up) -> dict[str, int]:
    """Return the workers' process ids by their MODEL_PATH."""
    found = {}
    for pid in children_of(up.process.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if command.endswith(b"services.inference\0"):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            (path,) = [e for e in environ if e.startswith(b"MODEL_PATH=")]
            found[path.decode().removeprefix("MODEL_PATH=")] = pid
    return found


def test_closing_the_terminal_ends_all_processes(up: Up) -> None:
    wait_for(lambda: len(up.children()) == 4, "the services")
    children = up.children()
    up.process.send_signal(signal.SIGHUP)
    assert up.process.wait(60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


def test_second_ctrl_c_kills_a_hanging_process(up: Up) -> None:
    wait_for(lambda: len(up.children()) == 4, "the services")
    children = up.children()
    os.kill(children["services.edge"], signal.SIGSTOP)
    up.process.send_signal(signal.SIGINT)
    wait_for(lambda: "shutting down" in up.log.read_text(), "the first signal to be handled")
    up.process.send_signal(signal.SIGINT)
    up.process.wait(10)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


def test_process_that_keeps_failing_ends_all(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data/jetstream").write_text("a file, where nats-server needs a folder")
    up = Up(tmp_path)
    assert up.process.wait(55) == 1
    assert "nats-server keeps failing at start" in up.log.read_text()


def test_taken_nats_port_is_explained(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        up = Up(tmp_path, NATS_PORT=str(taken.getsockname()[1]))
        assert up.process.wait(20) == 2
    assert "choose another port with NATS_PORT" in up.log.read_text()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("MODEL_CONTEXT", "many", "MODEL_CONTEXT='many' can't be used"),
        ("HISTORY_RETENTION", "90", "set an age such as 90d"),
        ("MONGODB_URI", "http://x", "MONGODB_URI can't be used"),
        ("EDGE_API_KEYS", "ada", "each entry must be name:key"),
        ("CHAT_STOP", "User:", "it must be a JSON list"),
        ("EDGE_HOST", "nowhere.invalid", "EDGE_HOST='nowhere.invalid'"),
    ],
)
def test_invalid_setting_is_the_last_line_and_nothing_starts(
    tmp_path: Path, name: str, value: str, why: str
) -> None:
    up = Up(tmp_path, **{name: value})
    assert up.process.wait(55) == 2
    log = up.log.read_text()
    assert why in log.splitlines()[-1] and log.count(why) == 1
    assert len(log.splitlines()) == 1 and not (tmp_path / ".data/jetstream").exists()


def test_taken_edge_port_is_explained_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        up = Up(tmp_path, EDGE_PORT=str(taken.getsockname()[1]))
        assert up.process.wait(55) == 2
    assert "choose another port with EDGE_PORT" in up.log.read_text().splitlines()[-1]
    assert not (tmp_path / ".data/jetstream").exists()


def test_read_only_data_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / ".data").write_text("a file, where a folder is needed")
    up = Up(tmp_path)
    assert up.process.wait(55) == 2
    assert "The folder .data can't be written" in up.log.read_text().splitlines()[-1]


def test_second_just_up_in_a_folder_names_the_first_and_exits(up: Up) -> None:
    up.wait_until_ready()
    up.chat("my name is Ada")
    before = up.children()
    second = Up(up.log.parent)
    assert second.process.wait(40) == 2
    assert f"`just up` already runs in this folder (pid {up.process.pid})" in second.log.read_text()
    assert up.children() == before
    assert "Ada" in up.chat("what is my name?")


def test_kill_9_leaves_no_process_and_loses_no_history(up: Up, start: Callable[..., Up]) -> None:
    up.wait_until_ready()
    up.chat("my name is Ada")
    children = up.children()
    assert len(children) == 4
    up.process.kill()
    up.process.wait()
    again = start()  # at once: it waits until they have ended
    wait_for_exit(children)
    again.wait_until_ready()
    assert "Ada" in again.chat("what is my name?")
    assert again.interrupt() == 130


def test_just_up_ends_when_its_parent_is_killed(start: Callable[..., Up]) -> None:
    # a shell that stays its parent, as `just` does
    up = start(within=["bash", "-c", '"$@"; exit', "just"])
    started = up.process.pid
    wait_for(lambda: bool(children_of(started)), "its start")
    (up_pid,) = children_of(started)
    wait_for(lambda: len(children_of(up_pid)) == 4, "the services")
    up.wait_until_ready()
    children = {str(pid): pid for pid in children_of(up_pid)}
    up.process.kill()
    up.process.wait()
    wait_for_exit(children | {"up": up_pid})
    log = up.log.read_text()
    assert log.count(" stopped exit_code=0") == 3 and "parent process has ended" in log


def children_of(pid: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(line) for line in listing.stdout.split()]


def test_nats_server_that_survived_is_named(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data/nats.pid").write_text("4711")
    with (tmp_path / ".data/up.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        up = Up(tmp_path)
        assert up.process.wait(55) == 2
    assert "Stop it with `kill 4711`" in up.log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "url"),
    [("::1", "http://[::1]:{}"), ("0.0.0.0", "http://localhost:{}"), ("::", "http://localhost:{}")],
)
def test_ready_line_has_the_url_of_the_edge(start: Callable[..., Up], host: str, url: str) -> None:
    proxy = "http://127.0.0.1:9"  # nothing listens there, and local requests must not use it
    up = start(EDGE_HOST=host, http_proxy=proxy, HTTP_PROXY=proxy)
    assert up.wait_until_ready() == url.format(up.port)
    is_open = "without API keys" in up.log.read_text()
    assert is_open == (host != "::1")


def test_dotenv_problem_is_logged_once(start: Callable[..., Up]) -> None:
    up = start(env="MODEL_PARALLEL=2\nnot a variable\n")
    up.wait_until_ready()
    status = httpx.get(f"http://127.0.0.1:{up.port}/status").json()
    assert status["workers"][0]["slots"] == 2
    assert up.interrupt() == 130
    log = up.log.read_text()
    assert log.count(".env, line 2 is not NAME=value") == 1 and "dotenv" not in log.lower()


def test_each_process_has_its_own_settings_and_key_only(
    start: Callable[..., Up], tmp_path: Path
) -> None:
    uri = "mongodb://u:hush-mongodb@127.0.0.1:9/"
    up = start(EDGE_API_KEYS="ann:hush-key", EDGE_API_KEY="hush-typo", MONGODB_URI=uri)
    up.wait_until_ready()
    shared = {"LOG_FORMAT", "NATS_URL", "NATS_CREDS", "NATS_INBOX_PREFIX"}
    for name, prefixes in PREFIXES.items():
        environ = environment_of(up.children()[name])
        own = {key for key in environ if key.startswith(prefixes)}
        settings = {key for key in environ if key.startswith(("EDGE_", "MONGODB_", "HISTORY_"))}
        assert settings <= own, name
        key = f".data/secrets/{name.removeprefix('services.')}/nats.nk"
        assert name == "nats-server" or (environ["NATS_CREDS"] == key and shared <= environ.keys())
        given = server.environment(os.environ) if name == "nats-server" else os.environ
        assert environ.get("GOMAXPROCS") == given.get("GOMAXPROCS")
    assert "EDGE_API_KEY is not a setting" in up.log.read_text(), "the edge sees its own"
    status = httpx.get(f"http://127.0.0.1:{up.port}/status", headers={"X-API-Key": "hush-key"})
    assert status.status_code == 200
    arguments = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    written = status.text + up.log.read_text() + (tmp_path / ".data/nats.log").read_text()
    assert "hush" not in written + arguments
    private = (".data", ".data/nats.log", ".data/secrets", ".data/secrets/edge/nats.nk")
    assert [mode(tmp_path / path) & 0o077 for path in private] == [0] * 4


PREFIXES = {
    "nats-server": (),
    "services.edge": ("EDGE_",),
    "services.history": ("MONGODB_", "HISTORY_"),
    "services.inference": (),
}
"""How the settings begin that a process has, besides those of all."""


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def mode(path: Path) -> int:
    return path.stat().st_mode


def test_data_of_an_earlier_version_is_kept(tmp_path: Path, start: Callable[..., Up]) -> None:
    """It had no users, a data folder and a log that everybody could read, and no keys."""
    store = tmp_path / ".data/jetstream"
    store.mkdir(parents=True)
    (tmp_path / ".data").chmod(0o755)
    (tmp_path / ".data/nats.log").touch(mode=0o644)
    with running(nats_server(tmp_path, store)) as server:
        subject = subjects.log(subjects.session_key(subjects.OPEN_TENANT, "default"))
        uvloop.run(append(f"nats://127.0.0.1:{server.port}", subject))
        server.stop()
    up = start()
    up.wait_until_ready()
    url = f"http://127.0.0.1:{up.port}/messages"
    shown = httpx.get(url, params={"session_id": "default"}).json()
    assert [message["model_response"] for message in shown] == ["Hello, Ada!"]
    assert mode(tmp_path / ".data/nats.log") & 0o077 == 0 == mode(tmp_path / ".data") & 0o077


def test_server_of_nats_url_is_used_without_keys(
    tmp_path: Path, start: Callable[..., Up], nats_url: str
) -> None:
    up = start(NATS_URL=nats_url)
    up.wait_until_ready()
    assert up.chat("hello") and set(up.children()) == set(PREFIXES) - {"nats-server"}
    assert not (tmp_path / ".data/secrets").exists()


async def append(url: str, subject: str) -> None:
    """Store an exchange in a new log."""
    async with Bus.connect(url, "earlier version") as bus:
        log = Stream(bus, subjects.HISTORY_STREAM)
        await log.ensure(subjects.HISTORY_LOG, 1 << 20, 0)
        await log.append(subject, encode(exchange("r", response="Hello, Ada!")), None, 0)


def test_rotated_key_takes_effect_while_it_runs(up: Up, tmp_path: Path) -> None:
    up.wait_until_ready()
    seed = (tmp_path / ".data/secrets/inference/nats.nk").read_text()
    rotate = [sys.executable, "-m", "deploy.nats.secrets", "rotate", "inference"]
    subprocess.run(rotate, cwd=tmp_path, check=True)
    wait_for(lambda: "NATS reconnected" in up.log.read_text(), "the new key", 20)
    assert (tmp_path / ".data/secrets/inference/nats.nk").read_text() != seed
    wait_for(lambda: bool(up.chat("hello")), "an answer", 20)
    log = up.log.read_text()
    assert log.count("NATS reconnected") == 1 and "Traceback" not in log


def test_terminal_chat_uses_its_key(up: Up, tmp_path: Path) -> None:
    up.wait_until_ready()
    chat = [sys.executable, "-m", "services.terminal", "--session", "terminal"]
    as_client = [*chat[:2], "deploy.as_user", "client", *chat[2:]]
    environ = plain_environment() | {"NATS_PORT": up.nats_port}
    done = subprocess.run(
        as_client,
        cwd=tmp_path,
        env=environ,
        input="my name is Ada\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.startswith("Model demo.")
    shown = httpx.get(f"http://127.0.0.1:{up.port}/messages", params={"session_id": "terminal"})
    assert done.stdout == shown.json()[0]["model_response"] + "\n"
    refused = subprocess.run(chat, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "rejects the credentials" in refused.stderr and "Traceback" not in refused.stderr
    assert "Violation" not in (tmp_path / ".data/nats.log").read_text()
