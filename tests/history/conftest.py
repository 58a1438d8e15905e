"""Servers with an empty store, which a test may stop and freeze; and services."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from motor.motor_asyncio import AsyncIOMotorClient

from services.runtime.bus import Bus
from tests.history.samples import archived, connected, history, uri_of, url_of
from tests.servers import Server, mongod, nats_server, running


@pytest.fixture
def empty_nats(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "nats").mkdir()
    with running(nats_server(tmp_path / "nats")) as server:
        yield server


@pytest.fixture
async def empty_bus(empty_nats: Server) -> AsyncIterator[Bus]:
    async with Bus.connect(url_of(empty_nats), "test") as bus:
        yield bus


@pytest.fixture(scope="module")
def module_mongo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(mongod(tmp_path_factory.mktemp("mongo"))) as server:
        yield server


@pytest.fixture
async def empty_mongo(module_mongo: Server) -> Server:
    """Shared by a module's tests, since it takes seconds to start; emptied before each."""
    if not module_mongo.is_running:
        module_mongo.start()
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(uri_of(module_mongo))
    for name in await client.list_database_names():
        if name not in ("admin", "config", "local"):
            await client.drop_database(name)
    client.close()
    return module_mongo


@pytest.fixture(params=[False, True], ids=["log alone", "archived"])
async def is_archived(
    request: pytest.FixtureRequest, nats_url: str, mongodb_uri: str, bus: Bus
) -> AsyncIterator[bool]:
    """Runs a service without MongoDB, then one with it."""
    with_mongodb: bool = request.param
    async with history(nats_url, mongodb_uri if with_mongodb else ""):
        if with_mongodb:
            await connected(bus)
            await archived(bus)  # its consumer exists
        yield with_mongodb
