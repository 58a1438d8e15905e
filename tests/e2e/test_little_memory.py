"""A worker that gets no more memory once it is ready."""

import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.stack import running_stack

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
def test_worker_without_memory_for_a_thread_answers(tmp_path: Path) -> None:
    """It has started all its threads before: a stack alone would take 8 MiB."""
    with running_stack(tmp_path, MODEL_THREADS="2") as stack:
        pid = stack.inference.pid
        status = Path(f"/proc/{pid}/status").read_text()
        used = int(status.split("VmSize:")[1].split()[0]) * 1024
        resource.prlimit(pid, resource.RLIMIT_AS, (used + 4 * MIB, resource.RLIM_INFINITY))

        def chat(number: int) -> str:
            text = "Tell me of a word. " * 50 + str(number)  # longer than what any stack can take
            return str(stack.chat(text, f"s{number}", max_tokens=4).end)

        with ThreadPoolExecutor(4) as pool:
            ends = list(pool.map(chat, range(4)))
        assert all("'finish_reason': 'length'" in end for end in ends), ends
        assert stack.inference.is_running
