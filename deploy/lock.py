"""Allow one `just up` per folder: two nats-servers would damage one JetStream store."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deploy.child import is_alive
from services.runtime.settings import InvalidSetting

CHILDREN_DEADLINE = 5.0  # seconds in which the children of a killed `just up` end
POLL_INTERVAL = 0.1  # seconds


@contextmanager
def locked(folder: Path, server_pid: Path, deadline: float = CHILDREN_DEADLINE) -> Iterator[int]:
    """
    Hold the folder's lock and yield its file descriptor.

    nats-server inherits the descriptor, so the lock lasts until all processes that use the folder
    have ended. `server_pid` is the file with nats-server's process id. Raises InvalidSetting if the
    folder can't be written, or is still in use after `deadline` seconds; the message has the pid.
    """
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / "up.lock").open("a+")
    except OSError as error:
        raise InvalidSetting(
            f"The folder {folder} can't be written ({error.strerror}). Fix its permissions."
        ) from error
    with file:
        _lock(file, server_pid, deadline)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _lock(file: IO[str], server_pid: Path, deadline: float) -> None:
    end = time.monotonic() + deadline
    while not _try_to_lock(file):
        file.seek(0)
        holder = _pid(file.read())
        if holder and is_alive(holder):
            raise InvalidSetting(
                f"`just up` already runs in this folder (pid {holder}). Stop it with Ctrl-C there,"
                f" or with `kill {holder}` here."
            )
        if time.monotonic() > end:
            holder = _pid(server_pid.read_text()) if server_pid.exists() else None
            raise InvalidSetting(
                "The nats-server of an earlier `just up` still uses this folder. Stop"
                f" it with `kill {holder or '<its pid>'}`."
            )
        time.sleep(POLL_INTERVAL)


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InvalidSetting(f"{file.name} can't be locked: {error.strerror}.") from error
    return True


def _pid(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None
