from collections.abc import Iterator

import pytest

from tests.e2e.stack import running_stack
from tests.faults.harness import LONG, SHORT, Harness, Size
from tests.servers import mongod, running


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return LONG if request.config.getoption("--campaigns") == "long" else SHORT


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory, size: Size) -> Iterator[Harness]:
    """Shared: each test uses sessions of its own and leaves every part running."""
    folder = tmp_path_factory.mktemp("harness")
    mongo = mongod(folder)
    with running(mongo), running_stack(folder, f"mongodb://127.0.0.1:{mongo.port}/") as stack:
        yield Harness(stack, mongo, folder, size)
