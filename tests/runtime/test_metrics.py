"""`/metrics` of a process, beside the edge's."""

import socket

import httpx
import pytest
from msgspec.structs import replace

from services.contract.messages import ModelInfo, WorkerReport
from services.runtime.bus import Bus
from services.runtime.metrics import queued_seconds, serving_metrics, worker_families
from services.runtime.settings import InvalidSetting
from tests.servers import free_port

REPORT = WorkerReport(
    "w", "ready", 8, 3, 2, model=ModelInfo("demo", "digest", 2048, 1000), name="demo"
)


def scrape(port: int) -> str:
    return httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text


async def test_process_shows_itself_and_its_state(bus: Bus) -> None:
    port = free_port()
    with serving_metrics(bus, "127.0.0.1", port, "X_PORT", lambda: worker_families([REPORT])):
        text = scrape(port)
    assert "process_resident_memory_bytes " in text and "process_open_fds " in text
    assert "finetunellm_nats_connected 1.0\n" in text
    assert 'vllm:num_requests_running{model_name="demo"} 3.0\n' in text
    with pytest.raises(httpx.ConnectError):
        scrape(port)


async def test_taken_port_is_an_invalid_setting(bus: Bus) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidSetting, match=f"X_PORT={port} on 127.0.0.1 can't be used"):
            with serving_metrics(bus, "127.0.0.1", port, "X_PORT", list):
                pass


async def test_without_a_port_nothing_is_served(bus: Bus) -> None:
    with serving_metrics(bus, "127.0.0.1", None, "X_PORT", list):
        pass


def queue(tokens: int, rate: float) -> WorkerReport:
    return replace(REPORT, queued_tokens=tokens, tokens_per_second=rate)


@pytest.mark.parametrize(
    ("reports", "seconds"),
    [
        ([], 0),
        ([queue(300, 100)], 3),
        ([queue(300, 100), queue(300, 50)], 9),
        ([queue(300, 100), queue(50, 0)], 3.5),  # a new worker is as fast as the others
        ([queue(300, 0)], 0),  # nothing was computed yet
        ([queue(0, 100)], 0),
    ],
)
def test_queued_seconds_follow_each_workers_own_rate(
    reports: list[WorkerReport], seconds: float
) -> None:
    assert queued_seconds(reports) == seconds


def test_queued_seconds_are_those_of_one_model() -> None:
    reports = [queue(300, 100), replace(queue(10, 1), name="other")]
    families = {family.name: family for family in worker_families(reports)}
    samples = families["finetunellm_queued_seconds"].samples
    assert {s.labels["model_name"]: s.value for s in samples} == {"demo": 3, "other": 10}
