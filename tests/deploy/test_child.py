"""A process that must not outlive its parent, with real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.test_up import is_running
from tests.servers import ROOT, wait_for

STARTED_AS = "deploy/child.py", "PARENT"
FORKED = """
import os, sys
from deploy import child
child.watch_from_a_fork(os.getppid())
os.execvp(sys.argv[1], sys.argv[1:])
"""
PARENT = """
import os, subprocess, sys, time
command = [str(os.getpid()) if word == "PARENT" else word for word in sys.argv[1:]]
print(subprocess.Popen([sys.executable, *command, "sleep", "60"]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("started_as", [STARTED_AS, ("-c", FORKED)], ids=["linux", "elsewhere"])
def test_child_dies_with_its_parent(started_as: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", PARENT, *started_as]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n", "the command")
        parent.kill()
    wait_for(lambda: not is_running(child), "its end", 30)


def test_child_of_a_dead_parent_does_not_start() -> None:
    command = [sys.executable, "deploy/child.py", "1", "echo", "started"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert ended.stdout == b""
