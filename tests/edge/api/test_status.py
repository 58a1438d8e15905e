"""`/`, `/healthz`, `/readyz` and `/status`."""

import asyncio
import signal
from pathlib import Path

import httpx
from msgspec.structs import replace

from services.contract import subjects
from services.contract.history import (
    ExchangePage,
    HistoryStatus,
)
from services.contract.messages import (
    Empty,
    ModelInfo,
    WorkerReport,
)
from services.contract.version import VERSION
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on, until_disconnected
from tests.fakes import reporting, scripted_history
from tests.servers import nats_server, running


async def test_status_includes_the_status_of_history(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    async with scripted_history(nats_url, ExchangePage(())):
        status = (await http.get("/status")).json()
    assert status["version"] == VERSION
    assert status["nats_connected"] is True and status["database_connected"] is True
    assert status["history"]["log_records"] == 7


async def test_without_history_status_is_200_and_the_rest_503(
    http: httpx.AsyncClient,
) -> None:
    status = await http.get("/status")
    assert status.status_code == 200
    assert status.json()["database_connected"] is False and status.json()["history"] is None
    for answer in (await http.get("/messages"), await http.post("/clear-history")):
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "history_unavailable"


async def test_without_nats_requests_fail_at_once(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            async with edge_on(bus) as http:
                server.stop(signal.SIGKILL)
                await until_disconnected(bus)
                async with asyncio.timeout(4):
                    rejected = [
                        await http.post("/chat", json={"prompt": "hi"}),
                        await http.delete("/chat/r1"),
                        await http.get("/messages"),
                        await http.post("/clear-history"),
                        await http.get("/readyz"),
                        await http.get(EDGE_ONLY),
                    ]
                    status = await http.get("/status")
                    alive = await http.get("/healthz")
    assert {answer.status_code for answer in rejected} == {503}
    assert {answer.json()["error"]["code"] for answer in rejected} == {"bus_unavailable"}
    assert status.status_code == 200 and status.json()["nats_connected"] is False
    assert alive.status_code == 200


MODEL = ModelInfo("demo", "d1", 2048, 1000)
READY = WorkerReport("w1", "ready", slots=8, running=0, waiting=0, model=MODEL)
LOADING = WorkerReport("w2", "loading", slots=8, running=0, waiting=0, progress=0.42)


EDGE_ONLY = "/readyz?fleet=false"


async def wait_for_readyz(
    http: httpx.AsyncClient, expected: str, path: str = "/readyz"
) -> httpx.Response:
    """Wait until `/readyz` responds with this status or error code; return the response."""
    async with asyncio.timeout(30):
        while True:
            response = await http.get(path)
            content = response.json()
            if expected == (content.get("status") or content["error"]["code"]):
                return response
            await asyncio.sleep(0.01)


async def test_edge_is_ready_once_a_worker_reports_ready(bus: Bus) -> None:
    async with edge_on(bus) as http:
        assert (await http.get("/readyz")).json()["error"]["code"] == "no_worker"
        rejected = await http.post("/chat", json={"prompt": "hi"})
        assert rejected.json()["error"]["code"] == "no_worker"

        async with reporting(bus, LOADING):
            assert (await wait_for_readyz(http, "model_loading")).status_code == 503
            rejected = await http.post("/chat", json={"prompt": "hi"})
            assert rejected.status_code == 503 and int(rejected.headers["retry-after"]) >= 1
            assert rejected.json()["error"]["code"] == "model_loading"

            async with reporting(bus, READY):
                assert (await wait_for_readyz(http, "ready")).status_code == 200
                greeting = (await http.get("/")).json()
                assert greeting["status"] == "online" and greeting["model_loaded"] is True
                status = (await http.get("/status")).json()
                assert status["model"]["name"] == "demo"
                assert {worker["worker_id"] for worker in status["workers"]} == {"w1", "w2"}


async def test_edge_is_not_ready_while_history_rejects_chats(bus: Bus, nats_url: str) -> None:
    status = HistoryStatus(False, 1, 1, 1, 0, warning="The disk is full.", refuses="history_full")

    async def reply(subject: str, request: Empty) -> HistoryStatus:
        return status

    async with Bus.connect(nats_url, "history") as history, edge_on(bus) as http:
        endpoint = history.endpoint("status", subjects.HISTORY_STATUS, Empty, reply)
        await history.serve("history", "scripted", [endpoint])
        async with reporting(bus, READY):
            answer = await wait_for_readyz(http, "history_full")
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.json()["error"]["message"] == "The disk is full."
            assert (await http.get(EDGE_ONLY)).status_code == 200, "it can still erase sessions"
            status = replace(status, refuses=None)
            assert (await http.get("/readyz")).status_code == 200


async def test_edge_without_a_fleet_stays_ready_to_say_so(bus: Bus) -> None:
    async with edge_on(bus) as http:
        early = await http.get(EDGE_ONLY)  # before a worker that is there would have reported
        assert early.status_code == 503 and early.json()["error"]["code"] == "no_worker"
        assert (await wait_for_readyz(http, "ready", EDGE_ONLY)).status_code == 200
        assert (await http.get("/readyz")).json()["error"]["code"] == "no_worker"
        rejected = await http.post("/chat", json={"prompt": "hi"})
        assert rejected.status_code == 503 and rejected.headers["retry-after"]
