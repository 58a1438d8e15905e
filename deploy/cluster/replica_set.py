"""Forms a replica set of mongod processes, or adapts the one that they formed before."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import OperationFailure, PyMongoError

from deploy.cluster.commands import HOST, REPLICA_SET

NOT_YET_INITIALIZED = 94
RETRY_SECONDS = 0.5

Client = AsyncIOMotorClient[dict[str, Any]]

log = logging.getLogger("cluster")


async def form(ports: Sequence[int]) -> None:
    """
    Make a replica set of the servers on these ports, or give an older one these ports. Retries
    until that succeeds, as servers may still be starting.
    """
    client: Client = AsyncIOMotorClient(
        HOST, ports[0], directConnection=True, serverSelectionTimeoutMS=1000
    )
    try:
        while error := await _try_to_form(client, ports):
            log.debug("replica set not formed yet error=%s", error)
            await asyncio.sleep(RETRY_SECONDS)
    finally:
        client.close()


async def _try_to_form(client: Client, ports: Sequence[int]) -> PyMongoError | None:
    members = [{"_id": number, "host": f"{HOST}:{port}"} for number, port in enumerate(ports)]
    try:
        config = await _config(client)
        if config is None:
            new = {"_id": REPLICA_SET, "members": members}
            await client.admin.command("replSetInitiate", new)
        elif [member["host"] for member in config["members"]] != [m["host"] for m in members]:
            moved = config | {"members": members, "version": config["version"] + 1}
            await client.admin.command("replSetReconfig", moved, force=True)
    except PyMongoError as error:
        return error
    return None


async def _config(client: Client) -> dict[str, Any] | None:
    """Return the configuration of the set, or None if there is no set yet."""
    try:
        found: dict[str, Any] = await client.admin.command("replSetGetConfig")
    except OperationFailure as error:
        if error.code == NOT_YET_INITIALIZED:
            return None
        raise
    config: dict[str, Any] = found["config"]
    return config
