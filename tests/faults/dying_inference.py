"""
services.inference that is killed after an answer's last token: with DIES=before, before the log
has the exchange; with DIES=after, after it.
"""

import os
import signal
from collections.abc import Callable

from services.contract.history import Exchange
from services.inference.__main__ import serve
from services.inference.history_client import AppendResult, HistoryClient
from services.inference.settings import InferenceSettings
from services.runtime.process import run

_append = HistoryClient.append


async def _die(
    self: HistoryClient, key: str, exchange: Exchange, is_wanted: Callable[[], bool]
) -> AppendResult:
    if os.environ["DIES"] == "after":
        assert await _append(self, key, exchange, is_wanted) == AppendResult("log")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead")


if __name__ == "__main__":
    HistoryClient.append = _die  # type: ignore[method-assign]
    run("inference", InferenceSettings, serve)
