"""The spans of requests that end early, in a real collector."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.contract.messages import ChatRequest, Done, Failed, StreamEvent
from services.runtime import tracing
from tests.collector import Collector, ReceivedSpan, collecting
from tests.inference.scripted import Worker, rest_of

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector that gets the spans of this process."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with collecting() as collector:
        async with tracing.exporting(collector.url, "worker"):
            yield collector


async def ask(worker: Worker, prompt: str, request_id: str, **more: Any) -> list[StreamEvent]:
    """Return the events of a request in the trace."""
    request = ChatRequest(prompt=prompt, session_id=request_id, request_id=request_id, **more)
    reply = f"_INBOX.{request_id}"
    async with worker.bus.inbox(reply) as inbox:
        await worker.bus.publish(f"chat.request.{worker.tenant}", request, reply, HEADERS)
        return await rest_of(inbox)


async def spans_of(collector: Collector, request_id: str) -> dict[str, ReceivedSpan]:
    """Wait for the request's span, which ends last, and return it and its children by name."""
    async with asyncio.timeout(30):
        while True:
            spans = collector.of_trace(TRACE_ID)
            roots = [
                span for span in spans if span.attributes.get("gen_ai.response.id") == request_id
            ]
            if roots:
                children = [span for span in spans if span.parent_id == roots[0].span_id]
                return {span.name: span for span in (*roots, *children)}
            await asyncio.sleep(0.01)


async def test_cancelled_request_has_the_stages_that_it_reached(
    slow: Worker, collector: Collector
) -> None:
    first = asyncio.create_task(ask(slow, "long", "running"))
    await slow.until(lambda: len(slow.backend.steps) > 4)
    second = asyncio.create_task(ask(slow, "long", "queued"))
    await slow.until(lambda: slow.queued == 1)
    for request_id in ("queued", "running"):
        await slow.cancel(request_id)
    assert isinstance((await first)[-1], Done) and isinstance((await second)[-1], Done)
    queued = await spans_of(collector, "queued")
    assert queued.keys() == {"chat", "context", "queue", "append"}
    running = await spans_of(collector, "running")
    assert running.keys() == {"chat", "context", "queue", "prefill", "decode", "append"}
    for spans in (queued, running):
        reasons = spans["chat"].attributes["gen_ai.response.finish_reasons"]
        assert (reasons, spans["chat"].has_failed) == (["cancelled"], False)
        assert all(
            spans["chat"].began <= span.began <= span.ended <= spans["chat"].ended + 1_000_000
            for span in spans.values()
        )


async def test_failure_is_the_error_of_the_span(fast: Worker, collector: Collector) -> None:
    (*_, failed) = await ask(fast, "hi", "invalid", grammar="root ::= (")
    assert isinstance(failed, Failed)
    chat = (await spans_of(collector, "invalid"))["chat"]
    assert (chat.attributes["error.type"], chat.has_failed) == (failed.code, True)


async def test_timed_out_request_has_its_finish_reason(slow: Worker, collector: Collector) -> None:
    await ask(slow, "long", "late", timeout_s=0.5)
    chat = (await spans_of(collector, "late"))["chat"]
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["timeout"]
