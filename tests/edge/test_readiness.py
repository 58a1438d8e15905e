"""What the edge answers while workers come and go, as their reports tell."""

import asyncio

from msgspec.structs import replace

from services.contract import subjects
from services.contract.history import HistoryStatus
from services.contract.messages import Empty, ModelInfo, WorkerReport
from services.runtime.bus import Bus
from tests.edge.conftest import edge_on

MODEL = ModelInfo("demo", "d1", 2048, 1000)
READY = WorkerReport("w1", "ready", slots=8, running=0, waiting=0, model=MODEL)
LOADING = WorkerReport("w2", "loading", slots=8, running=0, waiting=0, progress=0.42)


async def test_reports_on_the_bus_decide_whether_the_edge_is_ready(bus: Bus) -> None:
    async with edge_on(bus) as http:
        assert (await http.get("/readyz")).json()["error"]["code"] == "no_worker"
        refused = await http.post("/chat", json={"prompt": "hi"})
        assert refused.json()["error"]["code"] == "no_worker"

        await bus.publish(subjects.report("w2"), LOADING)
        await asyncio.sleep(0.05)
        refused = await http.post("/chat", json={"prompt": "hi"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "model_loading"
        assert (await http.get("/readyz")).status_code == 503

        await bus.publish(subjects.report("w1"), READY)
        await asyncio.sleep(0.05)
        assert (await http.get("/readyz")).status_code == 200
        greeting = (await http.get("/")).json()
        assert greeting["status"] == "online" and greeting["model_loaded"] is True
        status = (await http.get("/status")).json()
        assert status["model"]["name"] == "demo"
        assert [worker["worker_id"] for worker in status["workers"]] == ["w2", "w1"]


async def test_an_edge_is_not_ready_while_history_refuses_chats(bus: Bus, nats_url: str) -> None:
    status = HistoryStatus(False, 1, 1, 1, 0, warning="The disk is full.", refuses="history_full")

    async def tell(subject: str, request: Empty) -> HistoryStatus:
        return status

    async with Bus.connect(nats_url, "history") as history, edge_on(bus) as http:
        asked = history.endpoint("status", subjects.HISTORY_STATUS, Empty, tell)
        await history.serve("history", "scripted", [asked])
        await bus.publish(subjects.report("w1"), READY)
        await asyncio.sleep(0.05)
        answer = await http.get("/readyz")
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "history_full"
        assert answer.json()["error"]["message"] == "The disk is full."
        status = replace(status, refuses=None)
        assert (await http.get("/readyz")).status_code == 200
