"""
Run a command, and kill it when a parent process ends: `python deploy/child.py PID COMMAND…`.

`just up` starts its processes this way, so that none survives it, not even after `kill -9`.
"""

import ctypes
import os
import signal
import sys
import time

# https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html: it survives exec, and the
# signal is sent when the thread that forked ends
PR_SET_PDEATHSIG = 1
POLL_INTERVAL = 0.5  # seconds


def main(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        watch_from_a_fork(parent)
    if os.getppid() == parent:  # else it ended before it was watched
        os.execvp(command[0], command)


def watch_from_a_fork(parent: int) -> None:
    """Fork a process that kills this one after `parent` has ended. For any POSIX system."""
    me = os.getpid()
    if os.fork():
        return
    os.closerange(3, 256)  # the watcher must not hold the lock of .data
    while os.getppid() == me and is_alive(parent):
        time.sleep(POLL_INTERVAL)
    if os.getppid() == me:
        os.kill(me, signal.SIGKILL)
    os._exit(0)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
