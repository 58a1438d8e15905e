"""
services.inference that is killed right after an answer's last token: before the log has the
exchange, or after. DIES says which.
"""

import os
import signal
from collections.abc import Callable

from services.contract.history import Exchange
from services.inference.__main__ import serve
from services.inference.sessions import Kept, Sessions
from services.runtime.process import run

_append = Sessions.append


async def _die(self: Sessions, key: str, exchange: Exchange, is_wanted: Callable[[], bool]) -> Kept:
    if os.environ["DIES"] == "after":
        assert await _append(self, key, exchange, is_wanted) == Kept("log")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead")


if __name__ == "__main__":
    Sessions.append = _die  # type: ignore[method-assign]
    run("inference", serve)
