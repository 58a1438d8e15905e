"""Spans of real processes, as a collector receives them, and the trace in logs and messages."""

import asyncio
import json
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.embedding_models import write
from services.runtime.deliveries import Delivery
from tests.collector import Collector, ReceivedSpan, collecting
from tests.e2e.stack import GREEDY, Process, Stack, running_stack
from tests.faults.worker_pair import WorkerPair
from tests.servers import wait_for

STAGES = {f"inference: {stage}" for stage in ("queue", "prefill", "decode", "append")}
REQUESTS = ("chat.", "history.")
NO_REQUESTS = (".report", ".reply.", ".status", ".hub.")
"""Parts of the subjects of other messages: reports, and the events of an answer."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def stack(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that exports spans, in which answers take seconds."""
    with running_stack(
        tmp_path_factory.mktemp("traces"),
        slow=True,
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
        LOG_FORMAT="json",
    ) as stack:
        yield stack


class Caller:
    """A caller with a trace of its own, to whose span the edge's one is a child."""

    def __init__(self, is_sampled: bool = True, state: str = "") -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        flags = "01" if is_sampled else "00"
        parent = f"00-{self.trace_id}-{self.span_id}-{flags}"
        self.headers = {"traceparent": parent} | ({"tracestate": state} if state else {})


def chat(stack: Stack, session: str, headers: dict[str, str], prompt: str = "hello") -> str:
    """Return the X-Trace-Id of a whole answer."""
    body = GREEDY | {"prompt": prompt, "session_id": session}
    response = stack.http.post("/chat", json=body, headers=headers)
    assert response.status_code == 200 and '"done"' in response.text, response.text
    return response.headers["x-trace-id"]


def is_whole(spans: list[ReceivedSpan]) -> bool:
    """Return whether the first span of each service has come, which ends last."""
    names = {(span.service, span.name) for span in spans}
    first = {("edge", "POST /chat"), ("inference", "chat"), ("history", "history context")}
    return names >= first


def test_chat_is_one_trace_of_all_services(stack: Stack, collector: Collector) -> None:
    caller = Caller(state="vendor=1")
    assert chat(stack, "tree", caller.headers) == caller.trace_id
    collector.wait_for(caller.trace_id, is_whole)
    (attempt,) = collector.tree(caller.trace_id)["edge: POST /chat"].items()
    assert attempt[0] == "edge: chat"
    (served,) = attempt[1].items()
    assert served[0] == "inference: chat"
    assert served[1].keys() == STAGES | {"inference: context"}
    assert served[1]["inference: context"] == {"history: history context": {}}

    spans = {f"{span.service}: {span.name}": span for span in collector.of_trace(caller.trace_id)}
    root, worker = spans["edge: POST /chat"], spans["inference: chat"]
    assert root.parent_id == caller.span_id
    assert {span.state for span in spans.values()} == {"vendor=1"}
    assert not any(span.has_failed for span in spans.values())
    assert root.attributes["http.response.status_code"] == 200
    assert (
        worker.attributes.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "finetunellm",
            "gen_ai.response.model": "demo",
            "gen_ai.conversation.id": "tree",
            "gen_ai.request.temperature": 0.0,
            "gen_ai.response.finish_reasons": ["stop"],
            "finetunellm.stored": "log",
        }.items()
    )
    stages = [spans[f"inference: {name}"] for name in ("queue", "prefill", "decode", "append")]
    for one, next_one in zip(stages, stages[1:], strict=False):
        assert one.ended <= next_one.began + 1_000_000  # ns: clocks are read one after another
    decode = spans["inference: decode"]
    assert decode.ended - decode.began >= 20_000_000  # the slow worker pauses in each step
    assert decode.attributes["gen_ai.usage.output_tokens"] > 1


def test_spans_have_no_text_of_prompt_or_answer(stack: Stack, collector: Collector) -> None:
    caller = Caller()
    chat(stack, "private", caller.headers, "count to 9")
    collector.wait_for(caller.trace_id, is_whole)
    values = [str(span.attributes) for span in collector.of_trace(caller.trace_id)]
    assert any("private" in value for value in values)  # the session's id
    assert not any("count" in value or "7, 8" in value for value in values)


def test_failover_is_a_second_attempt_of_the_trace(
    stack: Stack, collector: Collector, tmp_path: Path
) -> None:
    caller, pair = Caller(), WorkerPair(stack, tmp_path)
    second = pair.add_worker()
    try:
        session = pair.session_of(second, "failover")
        body = GREEDY | {"prompt": "count to 20", "session_id": session}
        with stack.http.stream("POST", "/chat", json=body, headers=caller.headers) as response:
            lines = response.iter_lines()
            next(line for line in lines if '"token"' in line)
            second.stop(signal.SIGKILL)
            assert '"done": true' in "".join(lines).replace(":true", ": true")
    finally:
        second.stop(signal.SIGKILL)
    collector.wait_for(
        caller.trace_id, lambda spans: attempts_of(spans)[1:] != [] and is_whole(spans)
    )
    spans = collector.of_trace(caller.trace_id)
    lost, resumed = attempts_of(spans)
    (edge,) = (span for span in spans if span.name == "POST /chat")
    assert lost.parent_id == resumed.parent_id == edge.span_id
    assert (lost.attributes["error.type"], lost.has_failed) == ("worker_lost", True)
    assert not resumed.has_failed
    worker_id = "finetunellm.worker_id"
    assert lost.attributes[worker_id] != resumed.attributes[worker_id]
    collector.wait_for(
        caller.trace_id,
        lambda spans: ("inference", "chat") in {(span.service, span.name) for span in spans},
    )
    served = next(
        span
        for span in collector.of_trace(caller.trace_id)
        if (span.service, span.name) == ("inference", "chat")
    )
    assert served.parent_id == resumed.span_id
    assert served.attributes["finetunellm.resumed"] is True


def test_embeddings_are_one_trace(stack: Stack, collector: Collector, tmp_path: Path) -> None:
    caller = Caller()
    model = write("bert", tmp_path / "bert.gguf")
    environ = stack.inference.environ | {"MODEL_PATH": str(model)}
    worker = Process("services.inference", 0, environ, tmp_path)
    worker.start()
    body = {"model": "bert", "input": "hello you"}
    try:
        wait_for(lambda: "bert" in ready_models(stack), "the embedding model")
        response = stack.http.post("/v1/embeddings", json=body, headers=caller.headers)
        assert response.status_code == 200, response.text
        collector.wait_for(caller.trace_id, lambda spans: len(spans) == 3)
    finally:
        worker.stop(signal.SIGKILL)
    assert collector.tree(caller.trace_id) == {
        "edge: POST /v1/embeddings": {"edge: embeddings bert": {"inference: embeddings bert": {}}}
    }
    served = next(span for span in collector.spans if span.name == "embeddings bert")
    assert served.attributes["gen_ai.operation.name"] == "embeddings"


async def test_every_message_of_a_request_has_its_trace(stack: Stack) -> None:
    caller, seen = Caller(state="vendor=1"), list[Delivery]()
    async with stack.connect("spy") as bus:
        await bus.subscribe(">", seen.append)
        assert await bus.is_responsive()
        await asyncio.to_thread(chat, stack, "messages", caller.headers)
        for method, path in (
            ("GET", "/chat/nobody"),
            ("DELETE", "/chat/nobody"),
            ("DELETE", "/sessions/messages"),
        ):
            await asyncio.to_thread(stack.http.request, method, path, headers=caller.headers)
        assert await bus.is_responsive()
    requests = [
        message
        for message in seen
        if message.subject.startswith(REQUESTS)
        and not any(part in message.subject for part in NO_REQUESTS)
    ]
    traced, untraced = set[str](), []
    for message in requests:
        headers = message.headers
        if caller.trace_id in headers.get("traceparent", ""):
            assert headers["tracestate"] == "vendor=1"
            traced.add(message.subject.split(".")[1])
        elif "traceparent" in headers and message.subject.startswith("chat.cancel."):
            pass  # of an earlier test's request, whose lost attempt is cancelled late
        else:
            untraced.append(message.subject)
    assert traced >= {"worker", "replay", "cancel", "context", "log", "delete", "erased"}
    assert untraced in ([], ["history.context._"])  # of the idle prefill
    events = [message for message in seen if message.subject.startswith("chat.reply.")]
    assert events and not any("traceparent" in message.headers for message in events)


def test_unsampled_trace_is_not_exported_but_logged(stack: Stack, collector: Collector) -> None:
    unsampled, sampled = Caller(is_sampled=False), Caller()
    for caller in (unsampled, sampled):
        # in sessions of their own: a worker that knows the context does not ask history
        assert chat(stack, f"of {caller.trace_id}", caller.headers) == caller.trace_id
    collector.wait_for(sampled.trace_id, is_whole)
    assert not collector.of_trace(unsampled.trace_id)
    for process in (stack.edge, stack.inference):
        assert "request finished" in messages_of(process, unsampled.trace_id)


@pytest.mark.parametrize(
    "parent",
    ["00-0-0-0", f"00-{'0' * 32}-{'1' * 16}-01", f"ff-{'1' * 32}-{'1' * 16}-01", "x" * 5000],
)
def test_malformed_traceparent_begins_a_new_trace(
    stack: Stack, collector: Collector, parent: str
) -> None:
    response = stack.http.get("/v1/models", headers={"traceparent": parent})
    trace_id = response.headers["x-trace-id"]
    assert trace_id not in parent
    collector.wait_for(trace_id, bool)
    (span,) = collector.of_trace(trace_id)
    assert (span.name, span.parent_id) == ("GET /v1/models", "")


def test_flood_of_tracestate_is_bounded(stack: Stack, collector: Collector) -> None:
    state = ",".join([*(f"k{number}={'v' * 90}" for number in range(20)), f"big={'v' * 250}"])
    caller = Caller(state=state)
    chat(stack, "flood", caller.headers)
    collector.wait_for(caller.trace_id, is_whole)
    states = {span.state for span in collector.of_trace(caller.trace_id)}
    (kept,) = states
    assert 400 < len(kept) <= 512 and state.startswith(kept)


def test_error_is_the_status_of_its_span(stack: Stack, collector: Collector) -> None:
    caller = Caller()
    body = {"model": "nope", "messages": [{"role": "user", "content": "hello"}]}
    response = stack.http.post("/v1/chat/completions", json=body, headers=caller.headers)
    assert response.json()["error"]["trace_id"] == caller.trace_id
    name = "POST /v1/chat/completions"
    collector.wait_for(caller.trace_id, lambda spans: any(span.name == name for span in spans))
    (edge,) = (span for span in collector.of_trace(caller.trace_id) if span.name == name)
    assert edge.attributes["finetunellm.error_code"] == "model_not_found"
    assert not edge.has_failed  # a 4xx is the caller's error


def test_probes_have_no_spans(stack: Stack, collector: Collector) -> None:
    probed, asked = Caller(), Caller()
    for path, caller in (("/healthz", probed), ("/readyz", probed), ("/status", asked)):
        stack.http.get(path, headers=caller.headers)
    collector.wait_for(asked.trace_id, bool)
    assert not collector.of_trace(probed.trace_id)


def attempts_of(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    """Return the spans of the edge's attempts at an answer, in order."""
    found = [span for span in spans if (span.service, span.name) == ("edge", "chat")]
    return sorted(found, key=lambda span: span.began)


def ready_models(stack: Stack) -> set[str]:
    return {each["model"]["name"] for each in stack.status()["workers"] if each["state"] == "ready"}


def messages_of(process: Process, trace_id: str) -> str:
    """Return the messages in a process' log that belong to a trace."""
    lines = [json.loads(line) for line in process.log.read_text().splitlines()]
    return "\n".join(line["message"] for line in lines if line["trace_id"] == trace_id)
