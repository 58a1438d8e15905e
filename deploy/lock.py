"""Allow one `just up` (or `just cluster`) per folder: two servers would damage one store."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deploy.child import is_alive
from services.contract.version import COMMAND
from services.runtime.settings import InvalidSetting

CHILDREN_DEADLINE = 5.0  # seconds in which the children of a killed `just up` end
POLL_INTERVAL = 0.1  # seconds


@contextmanager
def locked(
    folder: Path,
    server_pid: Path,
    deadline: float = CHILDREN_DEADLINE,
    command: str = f"{COMMAND} up",
) -> Iterator[int]:
    """
    Hold the folder's lock for `command` and yield its file descriptor.

    nats-server inherits the descriptor, so the lock lasts until all processes that use the folder
    have ended. `server_pid` is the file with nats-server's process id. Raises InvalidSetting if the
    folder can't be written, or is still in use after `deadline` seconds; the message has the pid.
    """
    try:
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # it belongs to another user
            folder.chmod(0o700)  # that of an earlier version can be read by everybody
        file = (folder / "up.lock").open("a+")
    except OSError as error:
        raise InvalidSetting(
            f"The folder {folder} can't be written ({error.strerror}). Fix its permissions."
        ) from error
    with file:
        _lock(file, server_pid, deadline, command)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def is_locked(folder: Path) -> bool:
    """Return whether a `just up` or `just cluster`, or a server of it, uses the folder."""
    try:
        with (folder / "up.lock").open("a+") as file:
            return not _try_to_lock(file)
    except OSError:
        return False


def _lock(file: IO[str], server_pid: Path, deadline: float, command: str) -> None:
    end = time.monotonic() + deadline
    while not _try_to_lock(file):
        file.seek(0)
        holder = _pid(file.read())
        if holder and is_alive(holder):
            raise InvalidSetting(
                f"`{command}` already runs in this folder (pid {holder}). Stop it with Ctrl-C"
                f" there, or with `kill {holder}` here."
            )
        if time.monotonic() > end:
            holder = _pid(server_pid.read_text()) if server_pid.exists() else None
            raise InvalidSetting(
                f"A server of an earlier `{command}` still uses this folder. Stop it with"
                f" `kill {holder or '<its pid>'}`."
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
