"""The memory of a worker, as Linux shows and limits it."""

import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, running_stack

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc and prlimit")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), MODEL_THREADS="2") as stack:
        yield stack


def test_worker_asks_for_huge_pages(stack: Stack) -> None:
    process = Path(f"/proc/{stack.inference.pid}")

    assert b"glibc.malloc.hugetlb=1" in (process / "environ").read_bytes()
    setting = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""
    if "[madvise]" in setting:  # else glibc need not ask, or asks in vain
        blocks = (process / "smaps").read_text().split("VmFlags:")
        assert any(" hg" in flags.partition("\n")[0] for flags in blocks[1:])


def test_worker_without_memory_for_a_thread_answers(stack: Stack) -> None:
    """It has started all its threads before: a stack alone would take 8 MiB."""
    pid = stack.inference.pid
    status = Path(f"/proc/{pid}/status").read_text()
    used = int(status.split("VmSize:")[1].split()[0]) * 1024

    def chat(number: int) -> str:
        text = "Tell me of a word. " * 50 + str(number)  # longer than what any stack can take
        return str(stack.chat(text, f"s{number}", max_tokens=4).end)

    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_AS, (used + 4 * MIB, resource.RLIM_INFINITY))
    try:
        with ThreadPoolExecutor(4) as pool:
            ends = list(pool.map(chat, range(4)))
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
    assert all("'finish_reason': 'length'" in end for end in ends), ends
    assert stack.inference.is_running
