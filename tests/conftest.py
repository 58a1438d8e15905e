"""
Servers shared by all tests of a process. They are never wiped: each test uses session ids of its
own.
"""

import os
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest

from services.runtime.bus import Bus
from tests.servers import mongod, nats_server, running

SLOWEST_FIRST = (
    "tests/faults/",
    "tests/e2e/",
    "tests/deploy/",
    "tests/page/",
    "tests/history/",
    "tests/model/",
    "tests/inference/engine/",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaigns",
        choices=("short", "long"),
        help="`short`: run only the fault campaigns, in seconds; `long`: everything, at full size",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select what `--campaigns` says, and run the slowest files first."""
    size = config.getoption("--campaigns")
    if size != "long":
        chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            chosen[("campaign" in item.keywords) == (size == "short")].append(item)
        config.hook.pytest_deselected(items=chosen[False])
        items[:] = chosen[True]
    items.sort(key=lambda item: _rank(item.nodeid))  # stable


def _rank(node_id: str) -> int:
    ranks = (rank for rank, path in enumerate(SLOWEST_FIRST) if node_id.startswith(path))
    return next(ranks, len(SLOWEST_FIRST))


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a nats-server that is shared by all tests of this process."""
    with running(nats_server(tmp_path_factory.mktemp("nats"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


@pytest.fixture(scope="session")
def mongodb_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of MONGODB_TEST_URI, or of a mongod that is shared by all tests of this process."""
    if uri := os.environ.get("MONGODB_TEST_URI"):
        yield uri
        return
    with running(mongod(tmp_path_factory.mktemp("mongo"))) as server:
        yield f"mongodb://127.0.0.1:{server.port}/"


@pytest.fixture
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    """A connection to the shared nats-server, closed at the end of the test."""
    async with Bus.connect(nats_url, "test") as bus:
        yield bus


@pytest.fixture
def session_id() -> str:
    """A session id that no other test uses."""
    return f"session {uuid4()}"
