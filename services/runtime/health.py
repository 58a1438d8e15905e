"""
Health check of a container: `python -m services.runtime.health history`.

Exits with 0 if the process of the service on this host answers on the bus.
"""

import asyncio
import socket
import sys
from uuid import uuid4

import msgspec
import uvloop

from services.contract.codec import decode
from services.contract.messages import Empty
from services.runtime.bus import Bus
from services.runtime.deliveries import Inbox, NoResponders
from services.runtime.settings import ServiceSettings, load

TIMEOUT_SECONDS = 3.0


class _Info(msgspec.Struct):
    metadata: dict[str, str]


async def is_healthy(service: str, host: str, url: str, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Return whether a process of the service on `host` answers. All processes are asked."""
    subject = f"_INBOX.{uuid4().hex}"
    try:
        async with (
            asyncio.timeout(timeout),
            Bus.connect(url, "health check") as bus,
            bus.inbox(subject) as inbox,
        ):
            await bus.publish(f"$SRV.INFO.{service}", Empty(), reply=subject)
            while await _next_host(inbox, timeout) != host:
                pass
    except (TimeoutError, NoResponders):
        return False
    return True


async def _next_host(inbox: Inbox, timeout: float) -> str:
    reply = await inbox.next(timeout)
    return decode(reply.data, _Info).metadata["host"]


if __name__ == "__main__":
    healthy = is_healthy(sys.argv[1], socket.gethostname(), load(ServiceSettings).nats_url)
    sys.exit(0 if uvloop.run(healthy) else f"{sys.argv[1]} does not answer on this host")
