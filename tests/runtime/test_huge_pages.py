"""A process starts again with huge pages, once, and only where nobody has decided about them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.runtime.huge_pages import TUNABLES

PROGRAM = f"""
import os, sys
from services.runtime.huge_pages import use_huge_pages
print("start", flush=True)
use_huge_pages()
print(os.getpid(), os.environ.get({TUNABLES!r}), sys.argv[1:])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")


def run(program: str = PROGRAM, **environ: str) -> tuple[list[str], int]:
    """Return the lines that the program writes, and its process id."""
    plain = {key: value for key, value in os.environ.items() if key != TUNABLES}
    with subprocess.Popen(
        [sys.executable, "-c", program, "two words"],
        env=plain | environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        return process.stdout.read().splitlines(), process.pid


def test_process_starts_again_with_huge_pages_and_the_same_arguments() -> None:
    lines, pid = run()

    assert lines == ["start", "start", f"{pid} glibc.malloc.hugetlb=1 ['two words']"]


def test_other_tunables_stay() -> None:
    lines, _ = run(GLIBC_TUNABLES="glibc.malloc.arena_max=2")

    assert "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1" in lines[-1]


def test_process_that_loses_the_variable_starts_again_once(tmp_path: Path) -> None:
    """glibc removes it from a program that has file capabilities."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nunset {TUNABLES}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    lines, pid = run(f"import sys; sys.executable = {str(python)!r}{PROGRAM}")

    assert lines == ["start", "start", f"{pid} None ['two words']"]


def test_process_that_was_told_otherwise_does_not_start_again() -> None:
    lines, pid = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")

    assert lines == ["start", f"{pid} glibc.malloc.hugetlb=0 ['two words']"]
