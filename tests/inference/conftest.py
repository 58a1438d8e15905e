"""
NATS servers and workers for the tests of the inference service. The servers are shared: each worker
has a tenant of its own.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from services.history.service import start as start_history
from services.history.settings import HistorySettings
from tests.inference.scripted import StartWorker, Worker, started
from tests.servers import nats_server, running

NO_DATABASE = "mongodb://127.0.0.1:9/"  # the discard port


@asynccontextmanager
async def nats_with_history(folder: Path) -> AsyncIterator[str]:
    with running(nats_server(folder)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with AsyncExitStack() as stack:
            settings = HistorySettings(nats_url=url, mongodb_uri=NO_DATABASE)
            await start_history(stack, settings, pytest.fail)
            yield url


@pytest.fixture(scope="session")
async def history_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A NATS server with the history service."""
    async with nats_with_history(tmp_path_factory.mktemp("history")) as url:
        yield url


@pytest.fixture
async def own_history_url(tmp_path: Path) -> AsyncIterator[str]:
    """A NATS server with the history service, for one test."""
    async with nats_with_history(tmp_path) as url:
        yield url


@pytest.fixture(scope="session")
def url_without_history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(nats_server(tmp_path_factory.mktemp("no-history"))) as server:
        yield f"nats://127.0.0.1:{server.port}"


@pytest.fixture
def start_worker(history_url: str) -> StartWorker:
    return partial(started, history_url)


@pytest.fixture
async def fast(start_worker: StartWorker) -> AsyncIterator[Worker]:
    """A worker whose model computes in no time."""
    async with start_worker() as worker:
        yield worker


@pytest.fixture
async def slow(start_worker: StartWorker) -> AsyncIterator[Worker]:
    """A worker with one slot, a queue of two, and 10 ms per step."""
    async with start_worker(parallel=1, queue=2, step_seconds=0.01) as worker:
        yield worker
