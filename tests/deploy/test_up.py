"""`just up`, as a person uses it: one command, Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.e2e.stack import plain_environment
from tests.servers import ROOT, free_port, wait_for


class Up:
    """`python -m deploy.up` in a folder of its own, so that the project's .data/ is left alone."""

    def __init__(self, folder: Path, **environ: str) -> None:
        for name in ("services", "deploy", "model"):
            (folder / name).symlink_to(ROOT / name)
        self.port = free_port()
        self.log = folder / "up.log"
        ports = {"EDGE_PORT": str(self.port), "NATS_PORT": str(free_port())}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.up"],
                cwd=folder,
                env=plain_environment() | ports | environ,
                stdout=log,
                stderr=log,
            )

    def chat(self, prompt: str) -> str:
        url = f"http://127.0.0.1:{self.port}/chat"
        with suppress(httpx.TransportError):
            answer = httpx.post(url, json={"prompt": prompt, "temperature": 0}, timeout=20)
            if answer.is_success:
                return answer.text
        return ""

    def children(self) -> dict[str, int]:
        """Process ids by module."""
        listing = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
        )
        return {
            line.split()[-1]: int(line.split()[0])
            for line in listing.stdout.splitlines()
            if "services." in line
        }


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    yield up
    if up.process.poll() is None:
        up.process.send_signal(signal.SIGTERM)
        up.process.wait(60)


def test_one_command_starts_all_and_ctrl_c_ends_all(up: Up) -> None:
    wait_for(lambda: "ready: http://localhost" in up.log.read_text(), "the greeting", 30)
    assert "done" in up.chat("hello")
    children = up.children()
    assert len(children) == 3
    os.kill(children["services.inference"], signal.SIGKILL)
    wait_for(lambda: "done" in up.chat("hello"), "an answer after the death of a part", 30)
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    log = up.log.read_text()
    assert log.count(" bye") == 3 and "Traceback" not in log
    for pid in children.values():
        assert not Path(f"/proc/{pid}").exists()


def test_closing_the_terminal_ends_all_and_leaves_nothing_behind(up: Up) -> None:
    wait_for(lambda: len(up.children()) == 3, "the services")
    children = up.children()
    up.process.send_signal(signal.SIGHUP)
    assert up.process.wait(60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


def test_a_second_ctrl_c_does_not_wait_for_a_part_that_hangs(up: Up) -> None:
    wait_for(lambda: len(up.children()) == 3, "the services")
    children = up.children()
    os.kill(children["services.edge"], signal.SIGSTOP)
    up.process.send_signal(signal.SIGINT)
    wait_for(lambda: "ending" in up.log.read_text(), "the first signal to be heard")
    up.process.send_signal(signal.SIGINT)
    up.process.wait(10)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


def test_a_part_that_never_gets_up_ends_it_all(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data/jetstream").write_text("a file, where nats-server needs a folder")
    up = Up(tmp_path)
    assert up.process.wait(40) == 1
    assert "nats-server does not get up: its words are in .data/nats.log" in up.log.read_text()


def test_a_taken_port_is_explained(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        up = Up(tmp_path, NATS_PORT=str(taken.getsockname()[1]))
        assert up.process.wait(20) == 2
    assert "is taken: choose another with NATS_PORT" in up.log.read_text()


def test_a_bad_setting_ends_it_with_one_line(tmp_path: Path) -> None:
    up = Up(tmp_path, MODEL_CONTEXT="many")
    assert up.process.wait(40) == 2
    log = up.log.read_text()
    assert "MODEL_CONTEXT='many' can't be used" in log and "Traceback" not in log
