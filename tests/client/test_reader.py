"""An answer is read whole, whatever becomes of the workers that give it."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from msgspec.structs import replace

from services.client.chat_client import ChatClient
from services.client.failover import FailoverPolicy
from services.client.routing import WorkerDirectory
from services.contract import subjects
from services.contract.codec import encode
from services.contract.errors import ServiceError
from services.contract.messages import (
    Accepted,
    Cancel,
    ChatRequest,
    Done,
    Failed,
    ModelInfo,
    Progress,
    Resume,
    Started,
    StreamEvent,
    Token,
    WorkerReport,
)
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery, InboxLimits
from tests.client.tellers import CONFLICT, ORIGIN, STORY, teller
from tests.servers import nats_server, running

REQUEST = ChatRequest(prompt="hi", request_id="r", grace_s=10)
FAST = FailoverPolicy(
    silence_seconds=0.15,
    probe_seconds=0.1,
    lost_seconds=0.5,
    worker_reconnect_seconds=0.05,
    admission_seconds=0.2,
    join_seconds=0.2,
    give_up_seconds=1.0,
    retry_seconds=0.05,
    max_publish_tries=1000,  # NATS picks a frozen worker half of the time
)


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    """One's own, since requests go to whoever is there."""
    with running(nats_server(tmp_path)) as server:
        yield f"nats://127.0.0.1:{server.port}"


async def read(bus: Bus, request: ChatRequest = REQUEST) -> list[StreamEvent]:
    async with aclosing(ChatClient(bus, policy=FAST).stream(request)) as events:
        return [event async for event in events]


async def resume(bus: Bus, at: int = 0) -> list[StreamEvent]:
    async with aclosing(ChatClient(bus, policy=FAST).resume("r", at)) as events:
        return [event async for event in events]


def check_whole(events: list[StreamEvent], begins_at: int = 0) -> None:
    """Each character once, one end, and nothing said twice."""
    text = STORY[:begins_at]
    for event in events:
        if isinstance(event, Token):
            assert event.offset == len(text)
            text += event.text
    assert text == STORY
    assert isinstance(events[-1], Done)
    for kind in (Accepted, Started, Done, Failed):
        assert sum(isinstance(event, kind) for event in events) <= 1, kind


async def test_what_is_lost_on_the_way_is_asked_for_again(bus: Bus, nats_url: str) -> None:
    async with teller(nats_url) as worker:
        worker.unheard = {0, 7, 8, 9, 30, len(STORY) - 1}
        check_whole(await read(bus))
        assert len(worker.requests) == 1


async def test_an_end_that_is_lost_is_asked_for_too(bus: Bus, nats_url: str) -> None:
    async with teller(nats_url) as worker:
        worker.unheard = {len(STORY) - 1}
        worker.loses_the_end = True
        check_whole(await read(bus))


@pytest.mark.parametrize("until", [0, 20, len(STORY) - 1])
async def test_another_goes_on_where_a_worker_died(bus: Bus, nats_url: str, until: int) -> None:
    async with teller(nats_url, "w1", until) as first:
        reading = asyncio.create_task(read(bus))
        await first.said.wait()
        async with teller(nats_url, "w2") as second:
            await first.die()
            check_whole(await reading)
    (request,) = second.requests
    ids = tuple(map(ord, STORY[:until]))
    assert request.resume == (Resume(ORIGIN, ids, STORY[:until]) if until else None)
    assert request.request_id == "r" and request.prompt == "hi"


async def test_who_goes_on_has_only_the_time_that_is_left(bus: Bus, nats_url: str) -> None:
    request = replace(REQUEST, timeout_s=30)
    async with teller(nats_url, "w1", until=9) as dying:
        reading = asyncio.create_task(read(bus, request))
        await dying.said.wait()
        async with teller(nats_url, "w2") as other:
            await dying.die()
            check_whole(await reading)
    (resumed,) = other.requests
    assert resumed.timeout_s and 25 < resumed.timeout_s < 30


async def test_joined_reader_resumes_with_the_remaining_timeout(bus: Bus, nats_url: str) -> None:
    async with teller(nats_url, "w1", until=9) as dying:
        reading = asyncio.create_task(read(bus, replace(REQUEST, timeout_s=30)))
        await dying.said.wait()
        reading.cancel()
        dying.accepted_before = 10
        joined = asyncio.create_task(resume(bus))
        await dying.replayed.wait()
        async with teller(nats_url, "w2") as other:
            await dying.die()
            check_whole(await joined)
    (resumed,) = other.requests
    assert resumed.timeout_s and resumed.timeout_s <= 20


async def test_joined_reader_switches_to_the_attempt_that_replaced_its_own(
    bus: Bus, nats_url: str
) -> None:
    begun, more = STORY[:20], STORY[20:40]
    async with teller(nats_url, "w1", until=20) as first:
        reading = asyncio.create_task(read(bus))
        await first.said.wait()
        reading.cancel()
        async with aclosing(ChatClient(bus, policy=FAST).resume("r")) as joined:
            assert await text_of(joined, len(begun)) == begun
            await first._bus.stop_serving()  # it accepts no more requests
            first.forget()
            async with teller(nats_url, "w2", until=40) as second:
                reply = subjects.reply("_", "r", "second")
                again = replace(REQUEST, resume=Resume(ORIGIN, tuple(map(ord, begun)), begun))
                await bus.publish(subjects.request(subjects.OPEN_TENANT), again, reply)
                lives = asyncio.create_task(send_progress(bus, reply))
                try:
                    assert await text_of(joined, len(more)) == more
                finally:
                    lives.cancel()
                assert len(second.requests) == 1


async def text_of(events: AsyncGenerator[StreamEvent, None], length: int) -> str:
    text = ""
    async with asyncio.timeout(5):
        while len(text) < length:
            event = await anext(events)
            text += event.text if isinstance(event, Token) else ""
    return text


async def send_progress(bus: Bus, reply: str) -> None:
    while True:
        await bus.publish(reply, Progress(0, 5, 5))
        await asyncio.sleep(0.01)


async def test_another_goes_on_where_a_worker_froze_and_its_attempt_is_dropped(
    bus: Bus, nats_url: str
) -> None:
    async with teller(nats_url, "w1", 20) as first:
        reading = asyncio.create_task(read(bus))
        await first.said.wait()
        async with teller(nats_url, "w2") as second:
            first.is_frozen = True
            check_whole(await reading)
    assert Cancel(reply=first.replies[0]) in first.cancelled
    assert first.replies[0] not in second.replies


async def test_who_says_that_it_answers_already_and_then_loses_the_answer_is_asked_again(
    bus: Bus, nats_url: str
) -> None:
    async with teller(nats_url, "w1", 20) as first:
        reading = asyncio.create_task(read(bus))
        await first.said.wait()
        async with teller(nats_url, "w2") as second:
            second.refuses = CONFLICT
            await first.die()
            while not second.requests:
                await asyncio.sleep(0.001)
            second.refuses = None
            check_whole(await reading)


async def test_what_a_lost_attempt_still_says_is_not_heard(bus: Bus, nats_url: str) -> None:
    async with teller(nats_url, "w1", 20) as first:
        reading = asyncio.create_task(read(bus))
        await first.said.wait()
        async with teller(nats_url, "w2") as second:
            first.refuses = ServiceError("shutting_down", "It leaves.")
            first.forget()
            await second.said.wait()
            await first._bus.publish(first.replies[0], Token(20, "WRONG", (1,)))
            check_whole(await reading)


@pytest.mark.parametrize("code", ["shutting_down", "worker_lost"])
async def test_a_worker_that_leaves_its_answer_to_another_is_believed_at_once(
    bus: Bus, nats_url: str, code: str
) -> None:
    failed = Failed(code, "It leaves.")  # type: ignore[arg-type]
    async with teller(nats_url, "w1", 20, failed) as first:
        reading = asyncio.create_task(read(bus))
        while not first.requests:
            await asyncio.sleep(0.001)
        async with teller(nats_url, "w2"):
            first.refuses = ServiceError("shutting_down", "It leaves.")
            check_whole(await reading)


async def test_an_answer_that_nobody_can_go_on_with_ends_in_an_error(
    bus: Bus, nats_url: str
) -> None:
    async with teller(nats_url, "w1", 20) as first:
        reading = asyncio.create_task(read(bus))
        await first.said.wait()
        await first.die()
        *_, failed = await reading
    assert isinstance(failed, Failed) and failed.code == "worker_lost" and failed.retry_after
    assert "No other worker can resume" in failed.message


async def test_who_is_lost_again_and_again_is_given_up(bus: Bus, nats_url: str) -> None:
    failed = Failed("worker_lost", "It leaves.")
    async with teller(nats_url, "w1", 20, failed) as worker:
        *_, end = await read(bus)
    assert isinstance(end, Failed) and end.code == "worker_lost"
    assert len(worker.requests) == 1 + FAST.max_losses


async def test_other_failures_are_the_answers_end(bus: Bus, nats_url: str) -> None:
    async with teller(nats_url, "w1", 20, Failed("internal", "The model failed.")) as worker:
        assert (await read(bus))[-1] == Failed("internal", "The model failed.")
    assert len(worker.requests) == 1


async def test_who_comes_later_gets_all_and_goes_on_live(bus: Bus, nats_url: str) -> None:
    async with teller(nats_url) as worker:
        first = asyncio.create_task(read(bus))
        while not worker.replies:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        for events in await asyncio.gather(first, resume(bus)):
            check_whole(events)
        check_whole(await resume(bus))
        assert len(worker.requests) == 1


@pytest.mark.parametrize("at", [1, 19, 20, 40, len(STORY)])
async def test_who_has_some_text_gets_the_rest(bus: Bus, nats_url: str, at: int) -> None:
    async with teller(nats_url) as worker:
        await read(bus)
        check_whole(await resume(bus, at), begins_at=at)
        reading = asyncio.create_task(read(bus, ChatRequest(prompt="hi", request_id="r")))
        await asyncio.sleep(0.05)
        check_whole(await resume(bus, at), begins_at=at)
        check_whole(await reading)
        assert len(worker.requests) == 2


async def test_what_no_worker_knows_of_is_not_found(bus: Bus, nats_url: str) -> None:
    (failed,) = await resume(bus)
    assert isinstance(failed, Failed) and failed.code == "not_found"
    async with teller(nats_url):
        (failed,) = await resume(bus)
        assert isinstance(failed, Failed) and failed.code == "not_found"


async def test_who_joined_goes_on_elsewhere_too_and_two_readers_have_one_answer(
    bus: Bus, nats_url: str
) -> None:
    async with teller(nats_url, "w1", 20) as first:
        reading = asyncio.create_task(read(bus))
        await first.said.wait()
        joined = asyncio.create_task(resume(bus, 5))
        await asyncio.sleep(0.05)
        async with teller(nats_url, "w2") as second:
            await first.die()
            check_whole(await reading)
            check_whole(await joined, begins_at=5)
            assert len(second.replies) == 1


async def test_a_request_whose_id_is_being_answered_is_joined_if_it_is_the_same(
    bus: Bus, nats_url: str
) -> None:
    async with teller(nats_url) as worker:
        reading = asyncio.create_task(read(bus))
        while not worker.replies:
            await asyncio.sleep(0.001)
        worker.refuses = CONFLICT
        check_whole(await read(bus))
        (failed,) = await read(bus, ChatRequest(prompt="other", request_id="r"))
        assert isinstance(failed, Failed) and failed.code == "conflict"
        check_whole(await reading)


async def test_who_leaves_an_answer_that_has_a_grace_does_not_cancel_it(
    bus: Bus, nats_url: str
) -> None:
    async with teller(nats_url) as worker:
        async with aclosing(ChatClient(bus, policy=FAST).stream(REQUEST)) as events:
            async for event in events:
                if isinstance(event, Token):
                    break
        check_whole(await resume(bus))
        assert worker.cancelled == []


async def test_an_answer_goes_on_after_nats_was_away(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with running(nats_server(tmp_path / "own")) as server:
        url = f"nats://127.0.0.1:{server.port}"
        async with Bus.connect(url, "test") as bus, teller(url) as worker:
            reading = asyncio.create_task(read(bus))
            while not worker.replies:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            check_whole(await reading)
            assert len(worker.requests) == 1


async def test_an_answer_waits_for_a_worker_of_its_own_model_though_others_are_there(
    bus: Bus, nats_url: str
) -> None:
    workers, model = WorkerDirectory(), ModelInfo("other", "digest of other", 100, 0)
    other = WorkerReport("w2", "ready", 8, 0, 0, 8, model=model)
    workers.on_report(Delivery(subjects.report("w2"), encode(other), ""))
    client = ChatClient(bus, workers=workers, policy=FAST)
    async with aclosing(client.stream(replace(REQUEST, model="mine"))) as events:
        async with teller(nats_url, "w1", until=9) as mine:
            while not isinstance(await anext(events), Token):
                pass
            await mine.said.wait()
            await mine.die()
        async with teller(nats_url, "w2", until=0, failing=Failed("model_not_found", "no")) as w2:
            *_, end = [event async for event in events]
    assert isinstance(end, Failed) and end.code == "worker_lost"
    assert w2.requests == []


async def test_reader_whose_inbox_was_full_gets_the_whole_answer(nats_url: str) -> None:
    limits = InboxLimits(messages=5)
    async with (
        teller(nats_url) as telling,
        Bus.connect(nats_url, "slow reader", limits) as bus,
        aclosing(ChatClient(bus, policy=FAST).stream(REQUEST)) as answer,
    ):
        events = [await anext(answer)]
        await telling.said.wait()
        events += [event async for event in answer]
    check_whole(events)
    assert len(telling.requests) == 1
