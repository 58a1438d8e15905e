"""Lets the workers of a machine load in turn, so that each one measures what memory is left."""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from services.inference.engine.llama_model import ModelError

POLL_INTERVAL = 0.1  # seconds

log = logging.getLogger(__name__)


@contextmanager
def loading_turn(may_wait: Callable[[], bool]) -> Iterator[None]:
    """
    Hold the turn, for which workers of other users and containers do not compete. It ends with the
    process, too. Raises ModelError once `may_wait` returns False.
    """
    with _lock_file().open("a") as file:
        is_waiting = False
        while not _try_to_lock(file):
            if not is_waiting:
                log.info("waiting until another worker has loaded its model lock=%s", file.name)
            is_waiting = True
            if not may_wait():
                raise ModelError("The worker was stopped before it had loaded its model.")
            time.sleep(POLL_INTERVAL)
        yield


def _lock_file() -> Path:
    return Path(tempfile.gettempdir(), f"finetunellm-{os.getuid()}-loading.lock")


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
