"""One line per event on stderr, with the service and the request it belongs to."""

import logging
import sys
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Set by whoever handles a request; tasks that it starts inherit it."""


def configure(service: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
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
