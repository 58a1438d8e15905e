"""Free memory under the limits of cgroups, of both versions."""

import sys
from pathlib import Path

import pytest

from services.inference.engine import memory

GIB = 2**30
V2, V1 = "0::/app/worker\n", "5:cpu,cpuacct:/app\n4:memory:/app/worker\n"


def group(root: Path, path: str, most: int | str, used: int, cached: int) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nactive_file 3\n")


def machine(root: Path, cgroup: str) -> Path:
    """A machine with 8 GiB of free memory."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def test_without_a_limit_available_memory_counts(tmp_path: Path) -> None:
    machine(tmp_path, V2)
    group(tmp_path, "app/worker", "max", 5, 0)
    assert memory.host_available(tmp_path) == 8 * GIB


@pytest.mark.parametrize("path", ["app/worker", "app", "."])
def test_limit_of_a_group_or_its_parent_counts(tmp_path: Path, path: str) -> None:
    machine(tmp_path, V2)
    group(tmp_path, path, 4 * GIB, 3 * GIB, 2 * GIB)  # of which 2 GiB are cached files
    assert memory.host_available(tmp_path) == 3 * GIB


def test_limit_above_the_free_memory_changes_nothing(tmp_path: Path) -> None:
    machine(tmp_path, V2)
    group(tmp_path, ".", 64 * GIB, GIB, 0)
    assert memory.host_available(tmp_path) == 8 * GIB


def test_exceeded_limit_leaves_no_memory(tmp_path: Path) -> None:
    machine(tmp_path, V2)
    group(tmp_path, "app/worker", GIB, 2 * GIB, 0)
    assert memory.host_available(tmp_path) == 0


def test_limit_of_cgroup_version_one_counts(tmp_path: Path) -> None:
    machine(tmp_path, V1)
    folder = tmp_path / "sys/fs/cgroup/memory/app"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (folder / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {GIB // 2}\n")
    assert memory.host_available(tmp_path) == 3 * GIB // 2


def test_half_of_the_physical_memory_counts_without_proc(tmp_path: Path) -> None:
    assert memory.host_available(tmp_path) == memory._physical_memory() // 2 > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_this_machine_has_free_memory() -> None:
    found = memory.measure()
    assert 0 < found.host <= memory._physical_memory()
    assert (found.gpu > 0) <= (memory.gpu_count() > 0)
