"""A disk of a few MiB, so that it can be full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 48


class SmallDisk:
    """
    A tmpfs in a mount namespace of its own, so that it needs no root and nothing of it stays.
    `within` are the words before a command that is to see it.
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
    """Skips the test where nobody may mount, as in most containers."""
    mount = f"mount -t tmpfs -o size={MIB}m tmpfs '{folder}' && echo mounted && exec sleep 600"
    holder = subprocess.Popen(
        ["unshare", "-r", "-m", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with holder:
        try:
            assert holder.stdout is not None and holder.stderr is not None
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip(f"no small disk here: {holder.stderr.read().decode().strip()}")
            yield SmallDisk(folder, holder.pid)
        finally:
            holder.kill()
