"""The load client against scripted servers, which answer as llama-server and ours do."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bench.load import KEPT, FineTune, OpenAI, at_most

Asked = list[dict[str, Any]]


@asynccontextmanager
async def server(
    events: list[dict[str, Any]], status: str = "200 OK"
) -> AsyncIterator[tuple[str, Asked]]:
    """Answers each request with these events; yields (its URL, the bodies that it was sent)."""
    asked: Asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked.append(json.loads(await reader.readexactly(length)))
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        writer.write(f"HTTP/1.1 {status}\r\n\r\n{lines}data: [DONE]\n\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", asked


def said(text: str | None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


async def test_an_openai_answer_is_timed_by_its_text_and_counted_by_its_usage() -> None:
    events = [said(None), said("Hel"), said("lo"), {"choices": [], "usage": USAGE}]
    async with server(events) as (url, _):
        sample = await OpenAI("peer", url, "Be kind.", {}).ask("a", "Hi", 2)
    assert len(sample.pieces) == 2 and sample.pieces[0] >= sample.asked
    assert (sample.prompt_tokens, sample.cached_tokens, sample.completion_tokens) == (9, 4, 2)


async def test_a_stateless_server_is_sent_the_last_exchanges_of_the_session() -> None:
    async with server([said("yes")]) as (url, asked):
        peer = OpenAI("peer", url, "Be kind.", {"top_k": 40})
        for i in range(KEPT + 3):
            await peer.ask("a", f"question {i}", 2)
        await peer.ask("b", "another session", 2)
    *_, last, other = asked
    contents = [message["content"] for message in last["messages"]]
    assert contents[:3] == ["Be kind.", "question 2", "yes"]
    assert contents[-2:] == ["yes", f"question {KEPT + 2}"]
    assert len(contents) == 1 + 2 * KEPT + 1
    assert len(other["messages"]) == 2 and other["top_k"] == 40


async def test_our_answer_is_counted_by_its_done_event() -> None:
    done = {"done": True, "usage": {"prompt_tokens": 9, "completion_tokens": 1, "cached_tokens": 4}}
    async with server([{"token": "Hi"}, done]) as (url, asked):
        sample = await FineTune(url).ask("a", "Hi", 2)
    assert len(sample.pieces) == 1 and sample.cached_tokens == 4
    assert asked == [{"prompt": "Hi", "session_id": "a", "max_tokens": 2, "stop": []}]


async def test_an_error_ends_the_measurement() -> None:
    async with server([{"error": "gone", "code": "worker_lost"}]) as (url, _):
        with pytest.raises(RuntimeError, match="worker_lost"):
            await FineTune(url).ask("a", "Hi", 2)
    async with server([], status="503 Service Unavailable") as (url, _):
        with pytest.raises(RuntimeError, match="503"):
            await FineTune(url).ask("a", "Hi", 2)


async def test_no_more_are_asked_at_once_than_the_limit() -> None:
    running = most = 0

    async def ask(i: int) -> int:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0)
        running -= 1
        return i

    assert await at_most(3, map(ask, range(10))) == list(range(10))
    assert most == 3
