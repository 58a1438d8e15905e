import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from services.contract.messages import Progress, Token
from services.edge.server import Server, bind
from services.runtime.settings import InvalidSetting
from tests.edge.conftest import until
from tests.fakes import DONE, Script, scripted_worker
from tests.servers import ROOT, accepts, free_port, wait_for

EDGE = [sys.executable, "-m", "services.edge"]


class EdgeProcess:
    def __init__(self, nats_url: str, log: Path) -> None:
        self.port = free_port()
        environ = os.environ | {"NATS_URL": nats_url, "EDGE_PORT": str(self.port)}
        with log.open("wb") as output:
            self.process = subprocess.Popen(EDGE, cwd=ROOT, env=environ, stderr=output)
        wait_for(lambda: accepts(self.port), f"edge (log: {log})")


@pytest.fixture
def edge(nats_url: str, tmp_path: Path) -> Iterator[EdgeProcess]:
    edge = EdgeProcess(nats_url, tmp_path / "edge.log")
    yield edge
    edge.process.kill()
    edge.process.wait()


async def test_sigterm_fails_readyz_then_drains_open_streams(
    edge: EdgeProcess, nats_url: str
) -> None:
    script: Script = [Token(0, "a", (1,)), 0.9, Progress(0, 5, 5), 0.9, DONE]
    async with (
        scripted_worker(nats_url, script) as worker,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{edge.port}") as http,
    ):
        answering = asyncio.create_task(http.post("/chat", json={"prompt": "hi"}))
        await until(lambda: bool(worker.requests))
        edge.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            while (await http.get("/readyz")).json()["error"]["code"] != "shutting_down":
                await asyncio.sleep(0.01)
        assert (await http.get("/healthz")).status_code == 200, "it still serves"
        await until(lambda: not accepts(edge.port))
        assert '"done":true' in (await answering).text
        assert await asyncio.to_thread(edge.process.wait, 5) == 0


def test_taken_address_names_its_settings(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InvalidSetting, match="EDGE_PORT"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_invalid_setting_exits_with_2() -> None:
    environ = os.environ | {"EDGE_API_KEYS": "nonsense", "NATS_URL": "nats://127.0.0.1:1"}
    ended = subprocess.run(EDGE, cwd=ROOT, env=environ, capture_output=True, timeout=10)
    assert ended.returncode == 2
    assert b"EDGE_API_KEYS" in ended.stderr


async def test_date_is_renewed_until_the_server_stops() -> None:
    server = Server(uvicorn.Config(lambda *_: None, log_config=None))
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(server.main_loop())
        for _ in range(2):
            while not server.server_state.default_headers:
                await asyncio.sleep(0.01)
            assert dict(server.server_state.default_headers).keys() == {b"date"}
            server.server_state.default_headers.clear()
        server.stop()
