"""
Health check of a container: `python -m services.runtime.health history`.

Exits with 0 if the process of the service on this host answers on the bus.
"""

import asyncio
import socket
import sys

import msgspec
import nats.errors
import uvloop

from services.runtime.connection import ResilientClient
from services.runtime.nats_url import parse_servers
from services.runtime.settings import ServiceSettings, load

TIMEOUT_SECONDS = 3.0


class _Info(msgspec.Struct):
    metadata: dict[str, str]


async def is_healthy(service: str, host: str, url: str, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Return whether a process of the service on `host` answers. All processes are asked."""
    client = ResilientClient()
    try:
        async with asyncio.timeout(timeout):
            await client.open(parse_servers(url), error_cb=_ignore)
            inbox = client.new_inbox()
            answers = await client.subscribe(inbox)
            await client.publish(f"$SRV.INFO.{service}", reply=inbox)
            while True:
                message = await answers.next_msg(timeout)
                if message.data and _host(message.data) == host:
                    return True
    except (TimeoutError, nats.errors.Error):
        return False
    finally:
        await client.close()


def _host(data: bytes) -> str:
    return msgspec.json.decode(data, type=_Info).metadata["host"]


async def _ignore(error: Exception) -> None:
    """Replace nats-py's error callback, which logs a traceback of each attempt."""


if __name__ == "__main__":
    healthy = is_healthy(sys.argv[1], socket.gethostname(), load(ServiceSettings).nats_url)
    sys.exit(0 if uvloop.run(healthy) else f"{sys.argv[1]} does not answer on this host")
