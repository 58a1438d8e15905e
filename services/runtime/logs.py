"""One line per event on stderr, with the service and the request it belongs to."""

import logging
import re
import sys
import time
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Set by whoever handles a request; tasks that it starts inherit it."""

_USER_OF_URL = re.compile(r"(?<=://)[^\s'\"]*@")
REPEAT_INTERVAL = 10.0  # seconds


class RateLimitedLog:
    """Log an event that clients can cause at will: at once, then at most once per interval."""

    def __init__(self, logger: logging.Logger, interval: float = REPEAT_INTERVAL) -> None:
        self._logger = logger
        self._interval = interval
        self._silent_until = -float("inf")
        self.count = 0
        """Number of events since the start."""

    def warning(self, message: str, *args: object) -> None:
        self.count += 1
        if time.monotonic() < self._silent_until:
            return
        self._silent_until = time.monotonic() + self._interval
        self._logger.warning(f"{message} (%d since the start)", *args, self.count)


class SecretsFormatter(logging.Formatter):
    """Mask user and password in every URL, also in messages of libraries and in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return _USER_OF_URL.sub("***@", super().format(record))


def configure(service: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        SecretsFormatter(
            f"%(asctime)s %(levelname)-7s {service:<9} [%(request_id)s] %(message)s", "%H:%M:%S"
        )
    )
    handler.addFilter(_add_request_id)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("nats", "uvicorn.access", "pymongo", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True
