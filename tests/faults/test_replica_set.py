"""The archive on a MongoDB replica set whose primary is killed right after a write."""

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from deploy.cluster import replica_set
from deploy.cluster.commands import replica_set_uri
from services.runtime.bus import Bus
from tests.history.samples import (
    append,
    archived,
    connected,
    exchange,
    history,
    status,
    until,
    until_status,
    url_of,
)
from tests.servers import Server, mongo_replica_set, nats_server, running

DATABASE = "finetunellm_test"


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Server]:
    with running(nats_server(tmp_path)) as server:
        yield server


@pytest.fixture
async def members(tmp_path: Path) -> AsyncIterator[list[Server]]:
    """The servers of a replica set, which has a primary."""
    servers = mongo_replica_set(tmp_path, 3)
    with ExitStack() as cleanup:
        for server in servers:
            cleanup.callback(server.stop, signal.SIGKILL)
            server.start()
        await replica_set.form([server.port for server in servers])
        await until(lambda: step_up(servers[0]), 30)
        await until(lambda: states(servers[0]) == ["PRIMARY", "SECONDARY", "SECONDARY"], 30)
        yield servers


def ask(server: Server, command: str) -> dict[str, Any]:
    with direct(server) as client:
        return client.admin.command(command)


def states(server: Server) -> list[str]:
    return [member["stateStr"] for member in ask(server, "replSetGetStatus")["members"]]


def direct(server: Server) -> MongoClient[dict[str, Any]]:
    return MongoClient(
        "127.0.0.1", server.port, directConnection=True, serverSelectionTimeoutMS=500
    )


def writable(servers: list[Server]) -> list[Server]:
    """Return those that are primary."""
    return [server for server in servers if server.is_running and is_primary(server)]


def is_primary(server: Server) -> bool:
    try:
        return bool(ask(server, "hello")["isWritablePrimary"])
    except PyMongoError:
        return False


def stored(server: Server) -> list[str]:
    """Return the request ids in the archive, as this server alone has them."""
    with direct(server) as client:
        found = client[DATABASE]["exchanges"].find().sort("seq")
        return [document["request_id"] for document in found]


def step_up(server: Server) -> bool:
    """Make it the primary, without waiting for ten seconds of silence."""
    try:
        ask(server, "replSetStepUp")
    except PyMongoError:
        return False  # it has not caught up with the other one
    return True


@pytest.mark.campaign
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "is_kept"),
    [("", True), ("&w=1&readConcernLevel=local", False)],
    ids=["majority", "w=1"],
)
async def test_write_that_only_the_killed_primary_had(
    nats: Server, members: list[Server], options: str, is_kept: bool
) -> None:
    """Only without a majority is it acknowledged to the log, which then may trim the record."""
    uri = replica_set_uri([server.port for server in members]) + options
    primary, *others = members
    async with Bus.connect(url_of(nats), "test") as bus, history(url_of(nats), uri):
        await connected(bus)
        await append(bus, "s", exchange("before"))
        await archived(bus)
        await until(lambda: all(stored(server) == ["before"] for server in others))
        for server in others:
            server.stop(signal.SIGKILL)
        await append(bus, "s", exchange("during"))
        await until(lambda: stored(primary) == ["before", "during"])
        await until_status(bus, unarchived=int(is_kept))
        primary.stop(signal.SIGKILL)
        for server in others:
            server.start()
        await until(lambda: bool(writable(others)), 60)  # after 10 s without a primary
        await append(bus, "s", exchange("after"))
        await archived(bus)
        (successor,) = writable(others)
        assert ("during" in stored(successor)) == is_kept
        assert (await status(bus)).unarchived == 0


@pytest.mark.campaign
@pytest.mark.timeout(120)
async def test_replica_set_is_given_other_ports(members: list[Server], tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    for server, other in zip(members, mongo_replica_set(tmp_path / "others", 3), strict=True):
        server.stop()
        server.command[server.command.index("--port") + 1] = str(other.port)
        server.port = other.port
        server.start()
    await replica_set.form([server.port for server in members])
    await until(lambda: len(writable(members)) == 1, 40)
