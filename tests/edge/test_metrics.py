"""Names, labels and values of /metrics after scripted answers, failures and disconnects."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace as replace_field
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.history import ExchangePage
from services.contract.messages import (
    ChatRequest,
    Failed,
    ModelInfo,
    Token,
    WorkerReport,
)
from services.edge import __main__ as edge_process
from services.edge.activity import ActivityMonitor
from services.edge.keys import ApiKey, ApiKeys, sha256_of
from services.edge.metrics import EdgeMetrics
from services.edge.settings import EdgeSettings
from services.runtime.bus import Bus
from services.runtime.process import Process
from services.runtime.settings import InvalidSetting
from tests import frames
from tests.client.story_worker import FAST, STORY, story_worker
from tests.edge.conftest import LIMITS, edge_on, until
from tests.fakes import (
    ACCEPTED,
    DONE,
    HELLO,
    Script,
    direct_worker,
    history_of,
    report,
    reporting,
    scripted_history,
    scripted_worker,
)
from tests.servers import free_port, nats_server, running

HI = {"prompt": "hi"}
TOKEN = Token(0, "on", (1,))
MODEL = ModelInfo("demo", "digest", 2048, 1000, adapters=("pirate",))
Labels = dict[str, str]


class Scrape:
    """The samples of one exposition."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = [each for family in self.families.values() for each in family.samples]
        self.names = {each.name for each in self._samples}
        self.labels = {label for each in self._samples for label in each.labels}

    def get(self, name: str, **labels: str) -> float | None:
        """Return the value of the one sample with exactly these labels."""
        found = [s.value for s in self._samples if s.name == name and s.labels == labels]
        assert len(found) <= 1
        return found[0] if found else None


async def scrape(http: httpx.AsyncClient, **headers: str) -> Scrape:
    response = await http.get("/metrics", headers=headers)
    assert response.status_code == 200
    return Scrape(response.text)


@asynccontextmanager
async def edge_with_report(
    bus: Bus, *reports: WorkerReport, **options: object
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an edge that has these reports."""
    async with edge_on(bus, **options) as http, reporting(bus, *reports):  # type: ignore[arg-type]
        await bus.is_responsive()
        for each in reports:
            async with asyncio.timeout(30):
                while each.worker_id not in (await http.get("/status")).text:
                    await asyncio.sleep(0.01)
        yield http


@asynccontextmanager
async def edge_and_worker(
    nats_url: str, bus: Bus, script: Script
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an edge that has a report of a worker of MODEL, which sends the script."""
    async with direct_worker(nats_url, "w1", script):
        async with edge_with_report(bus, report("w1", MODEL)) as http:
            yield http


async def test_metrics_of_an_answer_are_those_of_its_done(nats_url: str, bus: Bus) -> None:
    async with edge_and_worker(nats_url, bus, HELLO) as http:
        assert (await http.post("/chat", json=HI)).status_code == 200
        await http.post("/chat", json=HI | {"model": "demo:pirate"})
        found = await scrape(http)
    for name, value in [
        ("vllm:prompt_tokens_total", 5),
        ("vllm:generation_tokens_total", 2),
        ("vllm:prefix_cache_queries_total", 5),
        ("vllm:prefix_cache_hits_total", 3),
        ("llamacpp:prompt_tokens_total", 2),
        ("llamacpp:prompt_seconds_total", 0.1),
        ("llamacpp:tokens_predicted_total", 2),
        ("llamacpp:tokens_predicted_seconds_total", 0.2),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 1),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
        ("vllm:request_prefill_time_seconds_sum", 0.1),
        ("vllm:request_decode_time_seconds_sum", 0.2),
        ("vllm:request_prompt_tokens_sum", 5),
        ("vllm:request_generation_tokens_sum", 2),
        ("finetunellm_open_answers", 0),
    ]:
        assert found.get(name, model_name="demo") == value, name
        assert found.get(name, model_name="demo:pirate") == value, name
    ended = {"model_name": "demo", "finished_reason": "stop"}
    assert found.get("vllm:request_success_total", **ended) == 1
    assert found.get("finetunellm_answers_total", model_name="demo", finish_reason="stop") == 1
    assert found.get("finetunellm_http_requests_total", api="chat", status="200") == 2


async def test_drafted_and_accepted_tokens_are_counted(nats_url: str, bus: Bus) -> None:
    usage = replace(DONE.usage, drafted_tokens=9, accepted_tokens=4)
    script = (*HELLO[:-1], replace(DONE, usage=usage))
    async with edge_and_worker(nats_url, bus, script) as http:
        assert (await http.post("/chat", json=HI)).status_code == 200
        found = await scrape(http)
    labels = {"model_name": "demo"}
    assert found.get("vllm:spec_decode_num_draft_tokens_total", **labels) == 9
    assert found.get("vllm:spec_decode_num_accepted_tokens_total", **labels) == 4


async def test_labels_are_bounded_whatever_clients_send(nats_url: str, bus: Bus) -> None:
    async with edge_and_worker(nats_url, bus, HELLO) as http:
        for name in ("a", "b", "c"):
            await http.post("/chat", json=HI | {"session_id": f"session-{name}", "model": name})
            await http.get(f"/route-{name}")
        text = (await http.get("/metrics")).text
    found = Scrape(text)
    assert found.get("finetunellm_http_requests_total", api="none", status="404") == 3
    assert "session-" not in text and "route-" not in text
    assert found.labels <= {
        *("model_name", "finish_reason", "finished_reason", "code", "api", "status", "le"),
        *("state", "version"),
    }
    names = {
        sample.labels.get("model_name")
        for family in found.families.values()
        for sample in family.samples
    }
    assert names == {None, "demo", "unknown"}


async def test_refused_request_is_an_error_response_and_failed(nats_url: str, bus: Bus) -> None:
    async with edge_and_worker(nats_url, bus, [ACCEPTED, Failed("overloaded", "full")]) as http:
        assert (await http.post("/chat", json=HI)).status_code == 503
        found = await scrape(http)
    code = {"code": "overloaded"}
    assert found.get("finetunellm_error_responses_total", api="chat", **code) == 1
    assert found.get("finetunellm_failed_answers_total", model_name="demo", **code) == 1


async def test_failures_are_counted_by_code_and_api(nats_url: str, bus: Bus) -> None:
    script: Script = [ACCEPTED, TOKEN, Failed("internal", "broke")]
    async with edge_and_worker(nats_url, bus, script) as http:
        assert (await http.post("/chat", json=HI)).status_code == 200
        body = {"model": "demo", "messages": []}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 400
        found = await scrape(http)
    demo = {"model_name": "demo"}
    assert found.get("finetunellm_failed_answers_total", code="internal", **demo) == 1
    assert found.get("vllm:request_success_total", finished_reason="error", **demo) == 1
    assert found.get("vllm:generation_tokens_total", **demo) == 1
    errors = "finetunellm_error_responses_total"
    assert found.get(errors, api="openai_chat", code="invalid_request") == 1
    assert found.get(errors, api="chat", code="internal") is None  # its status was 200
    assert found.get("finetunellm_open_answers", **demo) == 0


async def test_disconnected_answer_is_an_abort_with_its_tokens(nats_url: str, bus: Bus) -> None:
    script: Script = [ACCEPTED, TOKEN, *[0.05] * 200, DONE]
    body = {"model": "demo", "prompt": "hi", "stream": True}
    async with edge_and_worker(nats_url, bus, script) as http:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            chunks = answer.aiter_text()  # its end would close the connection
            await anext(chunks)
            assert (await scrape(http)).get("finetunellm_open_answers", model_name="demo") == 1
        async with asyncio.timeout(30):
            while (found := await scrape(http)).get("finetunellm_open_answers", model_name="demo"):
                await asyncio.sleep(0.01)
    demo = {"model_name": "demo"}
    assert found.get("finetunellm_answers_total", finish_reason="disconnected", **demo) == 1
    assert found.get("vllm:request_success_total", finished_reason="abort", **demo) == 1
    assert found.get("vllm:generation_tokens_total", **demo) == 1
    assert found.get("vllm:e2e_request_latency_seconds_count", **demo) is None


async def test_repeats_and_resumes_are_counted_once_as_answers(nats_url: str, bus: Bus) -> None:
    key = {"Idempotency-Key": "metrics"}
    async with edge_on(bus) as http, story_worker(nats_url), history_of(bus, None):
        for _ in range(2):
            answer = await http.post("/chat", json=HI, headers=key)
        assert (await http.get(answer.headers["content-location"])).status_code == 200
        found = await scrape(http)
    assert found.get("finetunellm_idempotent_repeats_total") == 1
    assert found.get("finetunellm_resumes_total") == 2
    ended = {"model_name": "unknown", "finish_reason": "stop"}
    assert found.get("finetunellm_answers_total", **ended) == 1


async def test_lost_worker_is_a_failover_and_no_counter_falls(nats_url: str, bus: Bus) -> None:
    limits = replace_field(LIMITS, failover=FAST)
    async with edge_with_report(bus, report("w0"), limits=limits) as http:
        async with story_worker(nats_url, "w1", 20) as first:
            asking = asyncio.create_task(http.post("/chat", json=HI))
            await first.received.wait()
            async with story_worker(nats_url, "w2"):
                await first.kill()
                assert STORY[-1] in (await asking).text
                before = await scrape(http)
        async with story_worker(nats_url, "w3"):  # the restarted worker
            await http.post("/chat", json=HI)
            after = await scrape(http)
    assert before.get("finetunellm_failovers_total") == 1
    counters = [f for f in before.families.values() if f.type in ("counter", "histogram")]
    values = [(s.name, s.labels, s.value) for f in counters for s in f.samples]
    assert any(name == "vllm:request_success_total" for name, _, _ in values)
    for name, labels, value in values:
        assert (after.get(name, **labels) or 0) >= value, name


async def test_silent_gap_is_a_replay(nats_url: str, bus: Bus) -> None:
    limits = replace_field(LIMITS, failover=FAST)
    async with edge_on(bus, limits=limits) as http, story_worker(nats_url, "w1", 20) as worker:
        asking = asyncio.create_task(http.post("/chat", json=HI))
        await worker.replayed.wait()
        async with asyncio.timeout(30):
            while not (await scrape(http)).get("finetunellm_replays_total"):
                await asyncio.sleep(0.01)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking


async def test_fleet_figures_are_sums_over_the_reports(nats_url: str, bus: Bus) -> None:
    other = replace(MODEL, name="other")
    reports = [
        replace(report("w1", in_flight=3), waiting=2, queued_tokens=70, tokens_per_second=9.5),
        report("w2", in_flight=1),
        replace(report("w3"), state="loading"),
        report("w4", other),
    ]
    async with edge_with_report(bus, *reports) as http:
        async with scripted_history(nats_url, ExchangePage(())):
            found = await scrape(http)
        without_history = await scrape(http)
    for name, value in [
        ("vllm:num_requests_running", 4),
        ("llamacpp:requests_processing", 4),
        ("vllm:num_requests_waiting", 2),
        ("llamacpp:requests_deferred", 2),
        ("finetunellm_slots", 24),
        ("finetunellm_queue_limit", 48),
        ("finetunellm_queued_tokens", 70),
        ("finetunellm_tokens_per_second", 9.5),
        ("finetunellm_queued_seconds", 70 / 9.5),
    ]:
        assert found.get(name, model_name="demo") == value, name
    assert found.get("finetunellm_workers", model_name="demo", state="ready") == 2
    assert found.get("finetunellm_workers", model_name="demo", state="loading") == 1
    assert found.get("finetunellm_workers", model_name="other", state="failed") == 0
    assert found.get("finetunellm_history_up") == 1
    assert found.get("finetunellm_log_bytes") == 700
    assert found.get("finetunellm_unarchived_records") == 0
    assert found.get("finetunellm_dropped_frames_total") == 0
    assert without_history.get("finetunellm_history_up") == 0
    assert without_history.get("finetunellm_log_bytes") is None


async def test_dropped_frames_are_counted(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            async with edge_on(bus) as http:
                await bus.is_responsive()  # so NATS has the edge's subscription
                bad = [*frames.unreadable(subjects.report("w1").encode())]
                await frames.send(server.port, bad)
                await until(lambda: bus.dropped_frames == len(bad))
                found = await scrape(http)
    assert found.get("finetunellm_dropped_frames_total") == len(bad)


async def test_without_nats_metrics_say_so(tmp_path: Path) -> None:
    with running(nats_server(tmp_path)) as server:
        async with Bus.connect(f"nats://127.0.0.1:{server.port}", "test") as bus:
            async with edge_on(bus) as http:
                assert (await scrape(http)).get("finetunellm_nats_connected") == 1
                server.stop(signal.SIGKILL)
                await until(lambda: not bus.connected)
                found = await scrape(http)
    assert found.get("finetunellm_nats_connected") == 0
    assert found.get("finetunellm_history_up") == 0


async def test_two_edges_in_one_process_count_apart(nats_url: str, bus: Bus) -> None:
    async with edge_on(bus) as one, edge_on(bus) as other, scripted_worker(nats_url, HELLO):
        await one.post("/chat", json=HI)
        mine, others = await scrape(one), await scrape(other)
    ended = {"model_name": "unknown", "finish_reason": "stop"}
    assert mine.get("finetunellm_answers_total", **ended) == 1
    assert others.get("finetunellm_answers_total", **ended) is None


def keys() -> ApiKeys:
    """Return the key `s3cret` of acme, an admin."""
    return ApiKeys([ApiKey(name="acme", sha256=sha256_of("s3cret"), admin=True)])


async def test_with_keys_metrics_need_an_admins(bus: Bus) -> None:
    async with edge_on(bus, keys()) as http:
        assert (await http.get("/metrics")).status_code == 401
        found = await http.get("/metrics", headers={"Authorization": "Bearer s3cret"})
    assert found.status_code == 200
    assert found.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_tenants_are_counted_only_if_asked(nats_url: str, bus: Bus) -> None:
    key = {"X-API-Key": "s3cret"}
    async with scripted_worker(nats_url, HELLO):
        async with edge_on(bus, keys(), counts_tenants=True) as http:
            await http.post("/chat", json=HI, headers=key)
            found = await scrape(http, **key)
        async with edge_on(bus, keys()) as http:
            await http.post("/chat", json=HI, headers=key)
            response = await http.get("/metrics", headers=key)
    assert found.get("finetunellm_tenant_answers_total", tenant="acme") == 1
    assert found.get("finetunellm_tenant_tokens_total", tenant="acme", kind="prompt") == 5
    assert found.get("finetunellm_tenant_tokens_total", tenant="acme", kind="generated") == 2
    assert "acme" not in response.text and "s3cret" not in response.text


async def test_own_port_serves_metrics_alone_and_without_key(nats_url: str) -> None:
    main, own = free_port(), free_port()
    settings = EdgeSettings(
        nats_url=nats_url, edge_port=main, edge_metrics_port=own, edge_api_keys="acme:s3cret"
    )
    process = Process()
    async with process.stack, httpx.AsyncClient() as http:
        await edge_process.serve(process, settings)
        found = await http.get(f"http://127.0.0.1:{own}/metrics")
        assert found.status_code == 200 and "vllm:request_success" in found.text
        assert (await http.get(f"http://127.0.0.1:{own}/status")).status_code == 404
        key = {"X-API-Key": "s3cret"}
        on_main = await http.get(f"http://127.0.0.1:{main}/metrics", headers=key)
        assert on_main.status_code == 404


async def test_own_port_that_is_taken_is_named(nats_url: str) -> None:
    with pytest.raises(InvalidSetting, match="EDGE_METRICS_PORT is 8002"):
        EdgeSettings(edge_metrics_port=8002)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = EdgeSettings(nats_url=nats_url, edge_port=free_port(), edge_metrics_port=port)
        process = Process()
        async with process.stack:
            with pytest.raises(InvalidSetting, match="EDGE_METRICS_PORT"):
                await edge_process.serve(process, settings)


async def test_event_costs_a_few_microseconds(bus: Bus) -> None:
    workers = WorkerDirectory()
    metrics = EdgeMetrics(bus, workers, ActivityMonitor(bus, workers, LIMITS))
    answer = metrics.observe("_", ChatRequest(prompt="hi"))
    token, count = Token(0, "on", (1, 2)), 20_000
    started = time.process_time()
    for _ in range(count):
        answer.on_event(token)
    assert (time.process_time() - started) / count < 20e-6  # 1 to 2 µs on an idle machine
    found, demo = Scrape(metrics.render(None).decode()), {"model_name": "unknown"}
    assert found.get("vllm:inter_token_latency_seconds_count", **demo) == count - 1
