"""
Computes in a copy of the process what may abort it: llama.cpp checks some numbers of a file only
when it computes with them.

The copy is a fork, which shares the model's weights: nothing is loaded again, and no memory is
copied. It has one thread, so it must compute with one, and no open files but the standard ones. A
GPU's driver does not survive a fork.
"""

import ctypes
import faulthandler
import os
import re
import signal
import warnings
from collections.abc import Callable
from typing import NoReturn

MAX_SECONDS = 600
MAX_REASON_BYTES = 2**16
Compute = Callable[[], str]
_ABORT = re.compile(r"GGML_ASSERT.*|GGML_ABORT.*|.*terminate called.*")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def failure_of(compute: Compute) -> str:
    """
    Return why `compute` fails in the copy, as a clause: what it returns, what it raises, or the
    signal that ends it. "" if it returns "". Raises OSError if there can't be a copy.
    """
    parent = os.getpid()
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as words:
        try:
            with warnings.catch_warnings():
                # Python 3.12 and later: the copy takes no lock that another thread may hold
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                _run(compute, writing, parent)
        finally:
            os.close(writing)
        written = words.read(MAX_REASON_BYTES).decode(errors="replace").strip()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"it ended with {name}: {reason_of_abort(written)}"
    return (written or "no reason given") if status else ""


def reason_of_abort(errors: str) -> str:
    """Return why llama.cpp aborted, of what it wrote to stderr."""
    found = _ABORT.search(errors)
    return found[0] if found else "no reason given"


def _run(compute: Compute, writing: int, parent: int) -> NoReturn:
    code = 1
    try:
        os.dup2(writing, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # connections and pipes are the process's
        _end_with(parent)
        signal.set_wakeup_fd(-1)  # signals to the copy are not the worker's
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(MAX_SECONDS)
        faulthandler.disable()
        os.environ["GGML_NO_BACKTRACE"] = "1"
        reason = compute()
        os.write(2, reason.encode(errors="replace"))
        code = 1 if reason else 0
    except BaseException as error:
        os.write(2, repr(error).encode(errors="replace"))
    finally:
        os._exit(code)


def _end_with(parent: int) -> None:
    """Have the kernel end the copy once the thread that made it ends; on Linux only."""
    if _prctl:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
