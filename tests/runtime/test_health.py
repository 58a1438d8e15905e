import socket
from pathlib import Path

from services.runtime.bus import Bus
from services.runtime.health import is_healthy
from tests.servers import nats_server, running


async def test_a_service_is_healthy_where_one_of_its_processes_answers(nats_url: str) -> None:
    async with Bus.connect(nats_url, "test") as bus:
        await bus.serve("healthy", "for the test", [])
        assert await is_healthy("healthy", socket.gethostname(), nats_url)
        assert not await is_healthy("healthy", "another-host", nats_url, 0.5)
    assert not await is_healthy("healthy", socket.gethostname(), nats_url, 0.5)


async def test_nothing_is_healthy_without_a_server(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
    assert not await is_healthy("healthy", "host", url, 0.5)
