"""What is computed in a copy of the process, and what the copy has of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.inference.engine import forked
from services.inference.engine.forked import Compute

WORKER = """
import os, signal, time
from services.inference.engine import forked

def compute():
    print(os.getpid(), flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
    return ""

forked.failure_of(compute)
"""


@pytest.mark.parametrize(
    ("compute", "failure"),
    [
        (lambda: "", ""),
        (lambda: "it is damaged", "it is damaged"),
        (lambda: str(1 // 0), r"ZeroDivisionError('integer division or modulo by zero')"),
        (os.abort, "it ended with SIGABRT: no reason given"),
        (lambda: "x" * 2**20, "x" * forked.MAX_REASON_BYTES),
    ],
)
def test_failure_is_a_clause(compute: Compute, failure: str) -> None:
    assert forked.failure_of(compute) == failure


def test_copy_has_no_open_files_of_the_process() -> None:
    """A copy of a socket would keep a connection alive, and one of a pipe its reader waiting."""
    reading, writing = os.pipe()
    try:
        assert forked.failure_of(lambda: " ".join(sorted(os.listdir("/proc/self/fd")))) == "0 1 2 3"
    finally:
        os.close(reading)
        os.close(writing)


def test_copy_ends_with_the_process() -> None:
    worker = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, timeout=30)
    assert worker.returncode == -signal.SIGKILL
    copy = Path(f"/proc/{int(worker.stdout)}")
    ends_at = time.monotonic() + 10
    while copy.exists() and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert not copy.exists()
