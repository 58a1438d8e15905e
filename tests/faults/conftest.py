from collections.abc import Iterator

import pytest

from tests.e2e.stack import running_stack
from tests.faults.arena import LONG, SHORT, Arena, Size
from tests.servers import mongod, running


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return LONG if request.config.getoption("--campaigns") == "long" else SHORT


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory, size: Size) -> Iterator[Arena]:
    """Shared: each test has sessions of its own, and leaves every part running."""
    folder = tmp_path_factory.mktemp("arena")
    mongo = mongod(folder)
    with running(mongo), running_stack(folder, f"mongodb://127.0.0.1:{mongo.port}/") as stack:
        yield Arena(stack, mongo, folder, size)
