import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest

from services.client.routing import WorkerDirectory
from services.contract.errors import ServiceError
from services.contract.messages import (
    Failed,
    Progress,
    Started,
    StreamEvent,
    Token,
    TokenLogprob,
    TokenProbability,
)
from services.edge.api.chat import ChatEncoder
from services.edge.limits import EdgeLimits
from services.edge.sse import SseResponse
from tests.edge.conftest import LIMITS, until
from tests.fakes import ACCEPTED, DONE, HELLO, scripted_worker

TOKEN = Token(0, "on", (1,))
PROGRESS = Progress(0, 5, 5)
STARTED = Started(5, 0, 2, 0)


async def test_answer_is_token_events_and_done(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        answer = await http.post("/chat", json={"prompt": "hi"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    first, second, done, rest = answer.text.split("\n\n")
    assert first == 'id: 5\ndata: {"token":"Grüß "}'
    assert second == 'id: 9\ndata: {"token":"dich"}'
    assert done.startswith("id: end\ndata: ")
    assert rest == "" and "\r" not in answer.text
    assert answer.headers["content-location"] == f"/chat/{data(done)['request_id']}"
    assert {key: value for key, value in data(done).items() if key != "request_id"} == {
        "done": True,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 3},
        "timings": {"queued": 0.0, "prefill": 0.1, "decode": 0.2},
        "exchanges_dropped": 1,
        "stored": "log",
        "stop_string": None,
    }


async def test_logprobs_are_sent_with_their_tokens(http: httpx.AsyncClient, nats_url: str) -> None:
    other = TokenProbability(2, "in", (105, 110), -2.5)
    token = Token(0, "on", (1,), (TokenLogprob(1, "on", (111, 110), -0.5, (other,)),))
    async with scripted_worker(nats_url, [token, DONE]):
        answer = await http.post("/chat", json={"prompt": "hi", "logprobs": 1})
    assert data(answer.text.split("\n\n")[0]) == {
        "token": "on",
        "logprobs": [
            {
                "id": 1,
                "text": "on",
                "bytes": [111, 110],
                "logprob": -0.5,
                "top": [{"id": 2, "text": "in", "bytes": [105, 110], "logprob": -2.5}],
            }
        ],
    }


async def test_tokens_are_sent_without_delay(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, [TOKEN, 0.5, DONE]):
        async with http.stream("POST", "/chat", json={"prompt": "hi"}) as answer:
            async with asyncio.timeout(0.4):
                assert 'data: {"token":"on"}' in await anext(answer.aiter_text())


async def test_failure_before_the_first_event_has_its_status(
    http: httpx.AsyncClient, nats_url: str
) -> None:
    for failed, status in [
        (Failed("context_length_exceeded", "The prompt has 3000 tokens, 2048 fit."), 400),
        (Failed("overloaded", "full", 1.2), 503),
    ]:
        async with scripted_worker(nats_url, [ACCEPTED, failed]):
            answer = await http.post("/chat", json={"prompt": "hi"})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert (error["code"], error["message"]) == (failed.code, failed.message)
        assert answer.headers.get("retry-after") == ("2" if failed.retry_after else None)


@pytest.mark.parametrize("begun", [TOKEN, STARTED, PROGRESS])
async def test_failure_after_the_first_event_is_an_error_event(
    http: httpx.AsyncClient, nats_url: str, begun: StreamEvent
) -> None:
    async with scripted_worker(nats_url, [ACCEPTED, begun, Failed("internal", "broke")]):
        answer = await http.post("/chat", json={"prompt": "hi"})
    assert answer.status_code == 200
    assert data(answer.text.split("\n\n")[-2]) == {
        "error": "broke",
        "code": "internal",
        "trace_id": answer.headers["x-trace-id"],
    }


@pytest.mark.parametrize("begun", [[TOKEN], [ACCEPTED]], ids=["answering", "before the headers"])
async def test_disconnect_leaves_the_answer_running_within_its_grace(
    http: httpx.AsyncClient, nats_url: str, begun: list[StreamEvent]
) -> None:
    async with scripted_worker(nats_url, [*begun, *(0.05,) * 40, DONE]) as worker:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/chat", json={"prompt": "hi"}, timeout=0.2)
        ((_, request),) = worker.requests
        assert request.grace_s == 10
        await asyncio.sleep(0.1)
        assert worker.cancelled.empty()
        await http.delete(f"/chat/{request.request_id}")  # as a positive control
        assert await asyncio.wait_for(worker.cancelled.get(), 30) == ("_", request.request_id)


async def test_finished_answer_is_not_cancelled(http: httpx.AsyncClient, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        done = await http.post("/chat", json={"prompt": "hi"})
        await http.delete(done.headers["content-location"])  # as a positive control
        await asyncio.wait_for(worker.cancelled.get(), 30)
        assert worker.cancelled.empty()


async def test_quiet_stream_is_pinged() -> None:
    quick = replace(LIMITS, ping_seconds=0.05)
    sent = await run(script(TOKEN, *(0.03, PROGRESS) * 4, DONE), limits=quick)
    assert body(sent).count(": ping\n\n") == 2


async def test_busy_stream_is_not_pinged() -> None:
    assert ": ping" not in body(await run(script(TOKEN, PROGRESS, PROGRESS, DONE)))


async def test_interrupted_stream_asks_the_client_to_reconnect() -> None:
    sent: list[Any] = []
    stream = asyncio.create_task(run(script(TOKEN, 5.0, DONE), sent))
    await until(lambda: '"token"' in body(sent))
    stream.cancel()  # as uvicorn does
    await stream
    assert body(sent).split("\n\n")[-2] == "retry: 500", "no event, so it is not the end"
    assert sent[-1]["more_body"] is False


async def test_interruption_before_the_first_event_is_a_503() -> None:
    started = asyncio.Event()

    async def events() -> AsyncGenerator[StreamEvent, None]:
        yield ACCEPTED
        started.set()
        await asyncio.Event().wait()

    stream = asyncio.create_task(run(events()))
    await started.wait()
    stream.cancel()
    with pytest.raises(ServiceError, match="shutting down"):
        await stream


async def test_events_are_closed_on_disconnect_during_a_blocked_send() -> None:
    closed, sending, leaves = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def events() -> AsyncGenerator[StreamEvent, None]:
        try:
            yield TOKEN
            yield DONE
        finally:
            closed.set()

    async def receive() -> Any:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send_to_a_full_socket(message: Any) -> None:
        sending.set()
        await asyncio.Event().wait()

    answering = asyncio.create_task(response(events())({}, receive, send_to_a_full_socket))  # type: ignore[arg-type]
    await sending.wait()
    leaves.set()
    await answering
    assert closed.is_set()


def data(event: str) -> dict[str, Any]:
    line = event.split("\n")[-1]
    assert line.startswith("data: ")
    content: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return content


def body(sent: list[Any]) -> str:
    return b"".join(message.get("body", b"") for message in sent).decode()


async def script(*steps: StreamEvent | float) -> AsyncGenerator[StreamEvent, None]:
    for step in steps:
        if isinstance(step, float):
            await asyncio.sleep(step)
        else:
            yield step


def response(events: AsyncGenerator[StreamEvent, None], limits: EdgeLimits = LIMITS) -> SseResponse:
    return SseResponse([events], ChatEncoder("r1"), WorkerDirectory().to_error, limits)


async def run(
    events: AsyncGenerator[StreamEvent, None],
    sent: list[Any] | None = None,
    limits: EdgeLimits = LIMITS,
) -> Any:
    """Return what a stream sends to a client that stays, as ASGI messages."""
    sent = [] if sent is None else sent

    async def stay() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async with aclosing(events):
        await response(events, limits)({}, stay, send)  # type: ignore[arg-type]
    return sent
