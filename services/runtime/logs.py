"""
Log lines on stderr: time, level, service, request id, message and trace id, as text or as JSON.
"""

import json
import logging
import re
import sys
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from services.runtime.trace_context import trace_id

LogFormat = Literal["text", "json"]

NO_REQUEST = "-"
request_id: ContextVar[str] = ContextVar("request_id", default=NO_REQUEST)
"""The request that the current task works on. Tasks that it starts inherit it."""

_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^\s'\"]*@")
_VERBOSE_LOGGERS = ("nats", "uvicorn.access", "pymongo", "httpx")
REPEAT_SECONDS = 10.0


class RateLimitedLog:
    """Log an event that clients can cause at will: at once, then at most once per interval."""

    def __init__(self, logger: logging.Logger, interval: float = REPEAT_SECONDS) -> None:
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


class TextFormatter(logging.Formatter):
    """
    `2026-11-28T02:36:01.123Z INFO    edge      [request id] message trace_id=…`, then any
    traceback.
    """

    def __init__(self, service: str) -> None:
        super().__init__(
            f"%(asctime)s %(levelname)-7s {service:<9} [%(request_id)s] %(message)s%(trace)s"
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _time_of(record)

    def format(self, record: logging.LogRecord) -> str:
        record.request_id = request_id.get()
        record.trace = f" trace_id={trace}" if (trace := trace_id()) else ""
        return _mask_credentials(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object on one line, with the fields of a text line, `logger` and `exception`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        request = request_id.get()
        fields = {
            "time": _time_of(record),
            "level": record.levelname,
            "service": self._service,
            "request_id": None if request == NO_REQUEST else request,
            "trace_id": trace_id() or None,
            "logger": record.name,
            "message": _mask_credentials(record.getMessage()),
        }
        if record.exc_info:
            fields["exception"] = _mask_credentials(self.formatException(record.exc_info))
        return json.dumps(fields)


_FORMATTERS = {"text": TextFormatter, "json": JsonFormatter}


def configure(service: str, log_format: LogFormat = "text") -> None:
    """Write the log of this process to stderr, INFO and above. May be called again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FORMATTERS[log_format](service))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def _time_of(record: logging.LogRecord) -> str:
    time = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
    return f"{time.isoformat(timespec='milliseconds')}Z"


def _mask_credentials(text: str) -> str:
    """Mask user and password in every URL, also in messages of libraries and in tracebacks."""
    return _CREDENTIALS_IN_URL.sub("***@", text)
