"""
python -m services.runtime.health <service>: whether this host's process of it answers on the bus.
"""

import asyncio
import socket
import sys

import msgspec
import nats
import nats.errors

from services.runtime.settings import BusSettings, load

PATIENCE = 2.0  # seconds


class _Info(msgspec.Struct):
    metadata: dict[str, str]


async def is_healthy(service: str, host: str, url: str) -> bool:
    """
    Asks all processes of the service, since which of them a queue group would pick is left to
    NATS.
    """
    client = await nats.connect(url, connect_timeout=2, allow_reconnect=False)
    try:
        inbox = client.new_inbox()
        answers = await client.subscribe(inbox)
        await client.publish(f"$SRV.INFO.{service}", reply=inbox)
        async with asyncio.timeout(PATIENCE):
            async for message in answers.messages:
                if msgspec.json.decode(message.data or b"{}", type=_Info).metadata["host"] == host:
                    return True
    except (TimeoutError, nats.errors.Error):
        return False
    finally:
        await client.close()
    return False


if __name__ == "__main__":
    healthy = is_healthy(sys.argv[1], socket.gethostname(), load(BusSettings).nats_url)
    sys.exit(0 if asyncio.run(healthy) else f"{sys.argv[1]} does not answer on this host")
