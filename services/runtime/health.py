"""
Health check of a container: `python -m services.runtime.health history`.

Exits with 0 if the process of the service on this host answers on the bus.
"""

import asyncio
import socket
import sys

import msgspec
import uvloop

from services.contract.codec import decode
from services.contract.messages import Empty
from services.runtime.access import NO_CREDENTIALS, NatsAccess
from services.runtime.bus import Bus
from services.runtime.deliveries import Inbox, NoResponders
from services.runtime.settings import InvalidSetting, ServiceSettings, load

TIMEOUT_SECONDS = 3.0
NAMES = {"inference": ("inference", "embedding")}
"""What processes of a package call themselves on NATS, if not like the package."""


class _Info(msgspec.Struct):
    metadata: dict[str, str]


async def is_healthy(
    service: str,
    host: str,
    url: str,
    timeout: float = TIMEOUT_SECONDS,
    access: NatsAccess = NO_CREDENTIALS,
) -> bool:
    """
    Return whether a process of the service on `host` answers. All processes are asked. Raises
    InvalidSetting.
    """
    names = NAMES.get(service, (service,))
    return any(await asyncio.gather(*(_answers(n, host, url, timeout, access) for n in names)))


async def _answers(name: str, host: str, url: str, timeout: float, access: NatsAccess) -> bool:
    try:
        async with (
            asyncio.timeout(timeout),
            Bus.connect(url, "health check", access) as bus,
            bus.inbox(subject := bus.new_inbox()) as inbox,
        ):
            await bus.publish(f"$SRV.INFO.{name}", Empty(), reply=subject)
            while await _next_host(inbox, timeout) != host:
                pass
    except (TimeoutError, NoResponders):
        return False
    return True


async def _next_host(inbox: Inbox, timeout: float) -> str:
    reply = await inbox.next(timeout)
    return decode(reply.data, _Info).metadata["host"]


def main(service: str) -> str | int:
    """Return what the process exits with: 0, or a sentence."""
    try:
        settings = load(ServiceSettings)
        url, access = settings.nats_url, NatsAccess.of(settings)
        healthy = uvloop.run(is_healthy(service, socket.gethostname(), url, access=access))
    except InvalidSetting as error:
        return str(error)
    return 0 if healthy else f"{service} does not answer on this host"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
