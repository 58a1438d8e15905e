"""A file system of a few MiB that tests can fill."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 48


class SmallDisk:
    """
    A tmpfs in its own mount namespace, which needs no root and leaves nothing behind.

    Only commands prefixed with `within` see it.
    """

    def __init__(self, folder: Path, holder: int) -> None:
        self.folder = folder
        self.within = ["nsenter", "-t", str(holder), "-U", "-m", "--preserve-credentials"]

    def fill(self) -> None:
        subprocess.run([*self.within, "dd", "if=/dev/zero", f"of={self._ballast}"], check=False)

    def make_room(self) -> None:
        subprocess.run([*self.within, "rm", str(self._ballast)], check=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """Skip the test where mounting is not allowed, as in most containers."""
    mount = f"mount -t tmpfs -o size={MIB}m tmpfs '{folder}' && echo mounted && exec sleep 600"
    holder = subprocess.Popen(
        ["unshare", "-r", "-m", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with holder:
        try:
            assert holder.stdout is not None and holder.stderr is not None
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip(f"mounting is not allowed: {holder.stderr.read().decode().strip()}")
            yield SmallDisk(folder, holder.pid)
        finally:
            holder.kill()
