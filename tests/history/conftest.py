"""Servers of a test's own: with an empty log, or to be stopped and frozen."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.runtime.bus import Bus
from tests.history.samples import url_of
from tests.servers import Server, mongod, nats_server, running


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "nats").mkdir()
    with running(nats_server(tmp_path / "nats")) as server:
        yield server


@pytest.fixture
async def own_bus(own_nats: Server) -> AsyncIterator[Bus]:
    async with Bus.connect(url_of(own_nats), "test") as bus:
        yield bus


@pytest.fixture
def mongo(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "mongo").mkdir()
    with running(mongod(tmp_path / "mongo")) as server:
        yield server
