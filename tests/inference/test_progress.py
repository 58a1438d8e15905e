"""
What a caller hears while nothing else is sent: something at least once a second, in every phase.
"""

import asyncio
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from services.contract.messages import ChatRequest, Failed, Progress, StreamEvent, Token
from services.inference import service
from services.inference.engine.backend import MAX_BATCH_TOKENS
from services.runtime.bus import Bus
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted import ANSWERS, Worker, text, worker
from tests.servers import nats_server, running

SECOND = 0.2  # what a second is here
SLACK = 0.1  # for a test machine that has other things to do


@pytest.fixture(autouse=True)
def short_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "KEEP_ALIVE", SECOND)


class Heard(NamedTuple):
    event: StreamEvent
    after: float  # seconds since the one before


async def hear(
    asked: Worker, prompt: str, session: str = "s", max_tokens: int | None = None
) -> list[Heard]:
    heard, last = [], time.monotonic()
    request = ChatRequest(prompt=prompt, session_id=session, max_tokens=max_tokens)
    async for event in asked.events(request):
        now = time.monotonic()
        heard.append(Heard(event, now - last))
        last = now
    return heard


def progress(heard: list[Heard]) -> list[Progress]:
    """All of them, once it is clear that there was never a longer silence."""
    assert max(after for _, after in heard) < SECOND + SLACK
    return [event for event, _ in heard if isinstance(event, Progress)]


async def test_while_history_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.sessions.TRIES", (4 * SECOND,))
    with running(nats_server(tmp_path)) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with Bus.connect(url, "test") as bus:
            alone = Worker(bus, url, FakeBackend(ANSWERS), 1, 1)
            await alone.service.start()
            heard = await hear(alone, "hi")
            await alone.service.drain()
    assert isinstance(heard[-1].event, Failed)
    told = progress(heard)
    assert len(told) >= 3 and set(told) == {Progress(1, 0, 0)}


class SlowTokenizer(FakeBackend):
    def tokenize(self, text: str, special: bool) -> list[int]:
        time.sleep(2 * SECOND if "slow" in text else 0)
        return super().tokenize(text, special)


async def test_while_the_prompt_is_tokenized(tmp_path: Path) -> None:
    async with worker(tmp_path, backend=SlowTokenizer(ANSWERS, context=2000)) as slow:
        heard = await hear(slow, "slow hi")
    told = progress(heard)
    assert len(told) >= 1 and set(told) == {Progress(1, 0, 0)}


async def test_while_a_long_prompt_is_read_it_counts_up(tmp_path: Path) -> None:
    async with worker(tmp_path, step_seconds=SECOND / 2, context=20_000) as slow:
        told = progress(await hear(slow, "x" * 5 * MAX_BATCH_TOKENS + "hi"))
    counts = [event.prefilled_tokens for event in told if event.prefilled_tokens]
    assert len(counts) >= 3 and counts == sorted(counts)
    assert counts[-1] > counts[0] and counts[-1] <= told[-1].prompt_tokens
    assert all(event.queue_position == 0 for event in told if event.prefilled_tokens)


async def test_while_a_stream_is_held_for_the_prompts_that_came_with_it(tmp_path: Path) -> None:
    async with worker(tmp_path, step_seconds=SECOND * 1.5) as slow:
        stream, other = await asyncio.gather(
            hear(slow, "hi", "a", max_tokens=2), hear(slow, "x" * 300 + "hi", "b", max_tokens=1)
        )
    first = next(i for i, (event, _) in enumerate(stream) if isinstance(event, Token))
    held = progress(stream[first:])
    assert held and all(event.queue_position == 0 for event in held)
    assert progress(other)
    assert text([event for event, _ in stream]) == "he"


async def test_who_waits_hears_the_place_that_it_has_in_the_queue(tmp_path: Path) -> None:
    async with worker(tmp_path, parallel=1, step_seconds=0.002, context=5000) as busy:
        first = asyncio.create_task(busy.ask("long", "a"))
        while busy.service.running != 1:
            await asyncio.sleep(0.01)
        prompts = ["x" * 900 + "hi", "x" * 600 + "hi", "hi"]  # the shortest goes first
        asks = [asyncio.create_task(hear(busy, p, str(i))) for i, p in enumerate(prompts)]
        heard = [progress(events) for events in await asyncio.gather(*asks)]
        await first
    places = [[event.queue_position for event in told] for told in heard]
    assert [told[0] for told in places] == [3, 2, 1]
    assert all(told == sorted(told, reverse=True) for told in places)
    assert all(told[0].prompt_tokens > len(p) for told, p in zip(heard, prompts, strict=True))
