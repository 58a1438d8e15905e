import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest

from services.edge.app import make_app, make_edge
from services.edge.keys import ApiKeys
from services.edge.limits import EdgeLimits
from services.edge.server import bind, serving
from services.edge.settings import EdgeSettings
from services.runtime.bus import Bus

LIMITS = EdgeLimits(handover_seconds=0)
"""Of an edge that stops at once."""


@asynccontextmanager
async def edge_on(
    bus: Bus,
    keys: str | ApiKeys = "",
    is_strict: bool = False,
    limits: EdgeLimits = LIMITS,
    takes_any_model: bool = False,
    hosts: Sequence[str] = (),
    counts_tenants: bool = False,
    has_page: bool = True,
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an edge behind a real uvicorn."""
    draining = asyncio.Event()
    origins = EdgeSettings().edge_cors_origins
    api_keys = ApiKeys.parse(keys) if isinstance(keys, str) else keys
    edge = await make_edge(
        bus, draining, limits, api_keys, is_strict, takes_any_model, counts_tenants
    )
    app = make_app(edge, origins, hosts, has_page=has_page)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    reading = edge.reports.reading(pytest.fail)
    sharing = edge.rate_limits.sharing(pytest.fail)
    sampling = edge.activity.sampling(pytest.fail)
    async with reading, sharing, sampling, serving(app, listener, draining, pytest.fail, limits):
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            yield client


@pytest.fixture(scope="session")
async def http(nats_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an edge without keys that all tests share, and that no worker reports to."""
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus) as client:
        yield client


async def until(is_true: Callable[[], bool], seconds: float = 5) -> None:
    """Wait for a condition. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not is_true():
            await asyncio.sleep(0.01)


async def until_disconnected(bus: Bus) -> None:
    await until(lambda: not bus.connected)
