from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.inference.scripted import Worker, worker


@pytest.fixture
async def fast(tmp_path: Path) -> AsyncIterator[Worker]:
    async with worker(tmp_path) as fast:
        yield fast


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[Worker]:
    async with worker(tmp_path, parallel=1, queue=2, step_seconds=0.01) as slow:
        yield slow
