"""Spans in this process, as a real collector receives them."""

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

import pytest

from services.contract.errors import ServiceError
from services.runtime import trace_context, tracing
from services.runtime.settings import InvalidSetting
from services.runtime.trace_context import TraceContext
from tests.collector import Collector, collecting
from tests.servers import free_port

CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", True, "a=1")
UNUSED = """
import sys
import services.edge.__main__, services.history.__main__, services.inference.__main__
from services.runtime import tracing
with tracing.span("a"):
    tracing.record("b", 0, 1)
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@asynccontextmanager
async def in_trace(context: TraceContext | None = CALLER) -> AsyncIterator[None]:
    """Work on the trace of a caller during the body."""
    with trace_context.received(context.headers if context else {}):
        yield


async def test_spans_form_the_tree_of_their_bodies(collector: Collector) -> None:
    async with tracing.exporting(collector.url, "test"), in_trace():
        with tracing.span("outer", "server", {"a": 1, "none": None}) as outer:
            with tracing.span("inner", "client"):
                await asyncio.create_task(asyncio.sleep(0))
            now = time.monotonic()
            tracing.record("past", now - 3, now - 1, {"b": ["x"]})
            outer.set({"late": True})
        assert trace_context.headers() == CALLER.headers
    assert collector.tree(CALLER.trace_id) == {"test: outer": {"test: past": {}, "test: inner": {}}}
    spans = {span.name: span for span in collector.spans}
    assert spans["outer"].parent_id == CALLER.span_id
    assert spans["outer"].attributes == {"a": 1, "late": True}
    past = spans["past"]
    assert past.attributes == {"b": ["x"]}
    assert past.ended - past.began == pytest.approx(2e9, abs=1e8)  # nanoseconds
    assert time.time_ns() - past.ended == pytest.approx(1e9, abs=9e8)
    assert {span.state for span in collector.spans} == {"a=1"}


async def test_exception_is_the_error_of_its_span(collector: Collector) -> None:
    failures = (ServiceError("overloaded", "Secret."), KeyError("secret"), asyncio.CancelledError())
    async with tracing.exporting(collector.url, "test"):
        for failure in failures:
            with pytest.raises(type(failure)), tracing.span("failing"):
                raise failure
    errors = [span.attributes for span in collector.spans]
    codes = ("overloaded", "KeyError", "cancelled")
    assert errors == [{"error.type": code} for code in codes]
    assert all(span.has_failed for span in collector.spans)


async def test_reply_that_nothing_was_found_is_no_error(collector: Collector) -> None:
    async with tracing.exporting(collector.url, "test"):
        with pytest.raises(ServiceError), tracing.span("looking"):
            raise ServiceError("not_found", "There is no such exchange.")
    (span,) = collector.spans
    assert (span.attributes, span.has_failed) == ({}, False)


async def test_unsampled_trace_goes_on_without_spans(collector: Collector) -> None:
    unsampled = CALLER._replace(is_sampled=False)
    async with tracing.exporting(collector.url, "test"), in_trace(unsampled):
        with tracing.span("unsampled") as span:
            assert not span.is_recorded
            headers = trace_context.headers()
        with tracing.span("other"):
            pass
    assert headers["traceparent"].startswith(f"00-{CALLER.trace_id}-")
    assert headers["traceparent"].endswith("-00")
    assert not collector.spans


async def test_span_without_a_caller_begins_a_trace(collector: Collector) -> None:
    async with tracing.exporting(collector.url, "test"):
        with tracing.span("root"):
            headers = trace_context.headers()
    (span,) = collector.spans
    assert headers == {"traceparent": f"00-{span.trace_id}-{span.span_id}-01"}
    assert span.parent_id == ""


async def test_without_a_collector_the_trace_goes_on_unchanged() -> None:
    async with tracing.exporting("", "test"), in_trace():
        with tracing.span("nothing", "server") as span:
            assert trace_context.headers() == CALLER.headers
    assert not span.is_recorded
    with tracing.span("alone"):
        assert trace_context.trace_id()


def test_without_the_setting_opentelemetry_is_not_imported() -> None:
    result = subprocess.run([sys.executable, "-c", UNUSED], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


async def test_missing_package_is_an_invalid_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    with pytest.raises(InvalidSetting, match="Run `pip install opentelemetry-sdk"):
        async with tracing.exporting("http://localhost:4318", "test"):
            pass


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://user:secret@localhost:4317"])
async def test_endpoint_must_be_a_url(endpoint: str) -> None:
    with pytest.raises(InvalidSetting, match="must be a URL such as") as error:
        async with tracing.exporting(endpoint, "test"):
            pass
    assert "secret" not in str(error.value)


async def test_password_of_the_endpoint_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    for address in (f"127.0.0.1:{free_port()}", "[invalid"):
        async with tracing.exporting(f"http://user:secret@{address}/otlp", "test"):
            with tracing.span("lost"):
                pass
        assert f"spans are dropped endpoint={address} error=" in caplog.text
    assert "secret" not in caplog.text


async def test_span_may_end_after_the_export(collector: Collector) -> None:
    """As that of a request which a drain did not wait for."""
    async with tracing.exporting(collector.url, "test"):
        late = tracing.start("late")
    late.end("cancelled")
    assert not collector.spans


async def test_unusable_variable_of_the_sdk_is_an_invalid_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(InvalidSetting, match="can't use an OTEL_… variable"):
        async with tracing.exporting("http://localhost:4318", "test"):
            pass


async def test_disabled_sdk_leaves_the_trace_unchanged(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with tracing.exporting(collector.url, "test"):
        with tracing.span("root") as root:
            assert int(root.context.trace_id, 16)
        async with in_trace():
            with tracing.span("child") as child:
                assert child.context == CALLER
    assert not collector.spans


async def test_sampler_of_the_sdk_decides_on_new_traces(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with tracing.exporting(collector.url, "test"):
        with tracing.span("new") as new:
            assert int(new.context.trace_id, 16) and not new.context.is_sampled
        async with in_trace():
            with tracing.span("continued"):
                pass
    assert [span.name for span in collector.spans] == ["continued"]


async def test_absent_collector_is_one_log_line_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    caplog.set_level(logging.INFO)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with AsyncExitStack() as collectors, tracing.exporting(url, "test"):
        for _ in range(30):
            with tracing.span("lost"):
                pass
            await asyncio.sleep(0.03)  # several batches
        (line,) = caplog.messages
        assert line.startswith(f"spans are dropped endpoint=127.0.0.1:{port} error=")
        collector = collectors.enter_context(collecting(port))
        async with asyncio.timeout(30):
            while not collector.spans:
                with tracing.span("taken"):
                    await asyncio.sleep(0.03)
    assert caplog.messages[1:] == [f"spans are exported again endpoint=127.0.0.1:{port}"]


async def test_hanging_collector_delays_neither_spans_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "512")

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with nullcontext(writer):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    began = time.monotonic()
    async with tracing.exporting(url, "test", flush_seconds=0.2):
        for _ in range(2000):  # more than are kept
            with tracing.span("stuck"):
                pass
    assert 0.1 < time.monotonic() - began < 5  # an export takes 10 s
    assert caplog.messages == ["the last spans were not exported"]
    server.close()
