import socket
from pathlib import Path

from services.runtime.bus import Bus
from services.runtime.health import is_healthy
from tests.servers import nats_server, running


async def test_service_with_a_process_on_this_host_is_healthy(nats_url: str) -> None:
    async with Bus.connect(nats_url, "test") as bus:
        await bus.serve("healthy", "for the test", [])
        assert await is_healthy("healthy", socket.gethostname(), nats_url)
        assert not await is_healthy("healthy", "another-host", nats_url, 0.5)
    assert not await is_healthy("healthy", socket.gethostname(), nats_url, 0.5)


async def test_embedding_worker_is_a_healthy_inference_process(nats_url: str) -> None:
    async with Bus.connect(nats_url, "test") as bus:
        await bus.serve("embedding", "for the test", [])
        assert await is_healthy("inference", socket.gethostname(), nats_url)
        assert not await is_healthy("history", socket.gethostname(), nats_url, 0.5)


async def test_service_without_nats_is_unhealthy(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
    assert not await is_healthy("healthy", "host", url, 0.5)
