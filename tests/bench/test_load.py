"""The load client against scripted servers that answer like llama-server and FineTuneLLM."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bench.load import MAX_EXCHANGES, FineTuneTarget, OpenAITarget, gather_limited

Bodies = list[dict[str, Any]]


@asynccontextmanager
async def server(
    events: list[dict[str, Any]], status: str = "200 OK"
) -> AsyncIterator[tuple[str, Bodies]]:
    """Answer each request with these events; yield the URL and the request bodies."""
    bodies: Bodies = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        bodies.append(json.loads(await reader.readexactly(length)))
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        writer.write(f"HTTP/1.1 {status}\r\n\r\n{lines}data: [DONE]\n\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", bodies


def content(text: str | None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


async def test_openai_answer_has_piece_times_and_token_counts() -> None:
    events = [content(None), content("Hel"), content("lo"), {"choices": [], "usage": USAGE}]
    async with server(events) as (url, _):
        sample = await OpenAITarget("peer", url, "Be kind.", {}).ask("a", "Hi", 2)
    assert len(sample.piece_times) == 2 and sample.piece_times[0] >= sample.sent_at
    assert (sample.prompt_tokens, sample.cached_tokens, sample.completion_tokens) == (9, 4, 2)


async def test_openai_request_contains_the_last_exchanges() -> None:
    async with server([content("yes")]) as (url, bodies):
        peer = OpenAITarget("peer", url, "Be kind.", {"top_k": 40})
        for i in range(MAX_EXCHANGES + 3):
            await peer.ask("a", f"question {i}", 2)
        await peer.ask("b", "another session", 2)
    *_, last, other = bodies
    contents = [message["content"] for message in last["messages"]]
    assert contents[:3] == ["Be kind.", "question 2", "yes"]
    assert contents[-2:] == ["yes", f"question {MAX_EXCHANGES + 2}"]
    assert len(contents) == 1 + 2 * MAX_EXCHANGES + 1
    assert len(other["messages"]) == 2 and other["top_k"] == 40


async def test_our_answer_has_the_token_counts_of_done() -> None:
    done = {"done": True, "usage": {"prompt_tokens": 9, "completion_tokens": 1, "cached_tokens": 4}}
    async with server([{"token": "Hi"}, done]) as (url, bodies):
        sample = await FineTuneTarget(url).ask("a", "Hi", 2)
    assert len(sample.piece_times) == 1 and sample.cached_tokens == 4
    assert bodies == [
        {"prompt": "Hi", "session_id": "a", "max_tokens": 2, "stop": [], "ignore_eos": True}
    ]


async def test_error_ends_the_measurement() -> None:
    async with server([{"error": "gone", "code": "worker_lost"}]) as (url, _):
        with pytest.raises(RuntimeError, match="worker_lost"):
            await FineTuneTarget(url).ask("a", "Hi", 2)
    async with server([], status="503 Service Unavailable") as (url, _):
        with pytest.raises(RuntimeError, match="503"):
            await FineTuneTarget(url).ask("a", "Hi", 2)


async def test_gather_limited_runs_at_most_limit_requests() -> None:
    running = most = 0

    async def request(i: int) -> int:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0)
        running -= 1
        return i

    assert await gather_limited(3, map(request, range(10))) == list(range(10))
    assert most == 3
