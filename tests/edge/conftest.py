import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from services.edge import server
from services.edge.app import make_app
from services.edge.keys import Keys
from services.edge.server import Limits, bind, serving
from services.edge.settings import EdgeSettings
from services.runtime.bus import Bus

DEFAULT_LIMITS = Limits()


@pytest.fixture(autouse=True, scope="session")
def leaving_at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "LEAVE_AFTER", 0)
        yield


@asynccontextmanager
async def edge_on(
    bus: Bus, keys: str = "", is_strict: bool = False, limits: Limits = DEFAULT_LIMITS
) -> AsyncIterator[httpx.AsyncClient]:
    """An edge behind a real uvicorn, and a client that asks it."""
    leaving = asyncio.Event()
    origins = EdgeSettings().edge_cors_origins
    app = await make_app(bus, Keys.parse(keys), origins, leaving, is_strict)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with serving(app, listener, leaving, pytest.fail, limits):
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            yield client


@pytest.fixture(scope="session")
async def http(nats_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An open edge that tests share; one that must know of certain workers alone has its own."""
    async with Bus.connect(nats_url, "edge") as bus, edge_on(bus) as client:
        yield client


async def until_gone(bus: Bus) -> None:
    async with asyncio.timeout(5):
        while bus.connected:
            await asyncio.sleep(0.01)
