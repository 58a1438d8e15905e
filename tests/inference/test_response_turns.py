"""Responses of /v1/responses at a worker: stored with their turn, though it has all messages."""

import asyncio
from dataclasses import replace
from uuid import UUID

from services.client.chat_client import new_request_id
from services.contract import responses, subjects
from services.contract.conversation import ChatMessage
from services.contract.history import (
    Branch,
    BranchRequest,
    DeleteRequest,
    Exchange,
    ExportPage,
    ExportRequest,
)
from services.contract.messages import (
    ChatRequest,
    Done,
    Empty,
    Failed,
    Replay,
    ReplayRequest,
    Started,
)
from services.contract.responses import ResponseTurn
from tests.inference.scripted import FAST, StartWorker, Worker, started, text

ASK = ChatMessage("user", "hi")
TURN = ResponseTurn(input=({"type": "message"},), parameters={"model": "fake"})


def new_id(tree: str = "") -> str:
    own = UUID(new_request_id())
    return responses.request_id(tree or own.hex, own)


def request(id_: str, *messages: ChatMessage, **fields: object) -> ChatRequest:
    given = {"messages": messages or (ASK,), "turn": TURN, "request_id": id_, "session_id": ""}
    return ChatRequest(**(given | fields))  # type: ignore[arg-type]


async def ask(worker: Worker, asked: ChatRequest) -> list[object]:
    return [event async for event in worker.events(asked)]


async def stored(worker: Worker, id_: str) -> tuple[Exchange, ...]:
    subject = subjects.history("export", worker.tenant)
    wanted = ExportRequest(responses.session_of(id_))
    return (await worker.bus.request(subject, wanted, ExportPage)).exchanges


async def test_response_is_stored_with_its_turn(fast: Worker) -> None:
    id_ = new_id()
    *_, done = await ask(fast, request(id_))
    assert isinstance(done, Done) and done.stored == "log"
    (exchange,) = await stored(fast, id_)
    assert (exchange.request_id, exchange.prompt, exchange.response) == (id_, "hi", "hello")
    assert exchange.turn == TURN
    assert exchange.sampling.max_tokens is None, "defaults of sessions don't apply"


async def test_repeated_response_comes_from_the_log(fast: Worker) -> None:
    id_ = new_id()
    first = await ask(fast, request(id_))
    fast.service._replays.forget(f"{fast.tenant}.{id_}")
    second = await ask(fast, request(id_))
    assert text(first) == text(second) == "hello"  # type: ignore[arg-type]
    assert len(await stored(fast, id_)) == 1


async def test_branches_of_a_tree_are_stored_side_by_side(fast: Worker) -> None:
    root = new_id()
    await ask(fast, request(root))
    tree = responses.tree_of(root)
    ids = [new_id(tree) for _ in range(4)]
    turn = ResponseTurn(parent=root)
    await asyncio.gather(*(ask(fast, request(id_, turn=turn)) for id_ in ids))
    for id_ in ids:
        wanted = BranchRequest(tree, id_)
        subject = subjects.history("branch", fast.tenant)
        found = await fast.bus.request(subject, wanted, Branch)
        assert [each.request_id for each in found.exchanges] == [root, id_]


async def test_next_response_reuses_the_tokens_of_the_last(fast: Worker) -> None:
    root = new_id()
    *_, done = await ask(fast, request(root))
    assert isinstance(done, Done)
    messages = (ASK, ChatMessage("assistant", "hello"), ASK)
    events = await ask(fast, request(new_id(responses.tree_of(root)), *messages))
    (started,) = [event for event in events if isinstance(event, Started)]
    held = done.usage.prompt_tokens + done.usage.completion_tokens - 1  # the token that ended it
    assert started.cached_tokens == held


async def test_erased_tree_drops_running_and_finished_answers(start_worker: StartWorker) -> None:
    async with start_worker(step_seconds=0.01) as worker:
        finished, running = new_id(), new_id()
        await ask(worker, request(finished))
        reading = asyncio.create_task(ask(worker, request(running, ChatMessage("user", "long"))))
        await worker.until(lambda: worker.running == 1)
        for id_ in (finished, running):
            erasure = DeleteRequest(responses.session_of(id_))
            await worker.bus.request(subjects.history("delete", worker.tenant), erasure, Empty)
        *_, done = await reading
        assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "none")
        for id_ in (finished, running):
            assert await stored(worker, id_) == ()
            assert not worker.service._replays.get(f"{worker.tenant}.{id_}", 0)


async def test_running_response_shows_its_request_in_a_replay(start_worker: StartWorker) -> None:
    async with start_worker(step_seconds=0.01) as worker:
        id_ = new_id()
        asked = request(id_, ChatMessage("user", "long"))
        reading = asyncio.create_task(ask(worker, asked))
        await worker.until(lambda: worker.running == 1)
        found = await worker.bus.request(
            subjects.replay(worker.tenant, id_), ReplayRequest(), Replay
        )
        assert found.request.turn == TURN
        await worker.cancel(id_)
        await reading
        (exchange,) = await stored(worker, id_)
        assert exchange.finish_reason == "cancelled"


async def test_long_conversation_is_truncated_if_requested(start_worker: StartWorker) -> None:
    old = [ChatMessage("user", "x" * 100), ChatMessage("assistant", "y" * 100)]
    async with start_worker(context=600) as worker:
        messages = (*old, *old, *old, ASK)
        *_, failed = await ask(worker, request(new_id(), *messages))
        assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"
        events = await ask(worker, request(new_id(), *messages, drop_oldest=True))
        done = events[-1]
        assert isinstance(done, Done) and done.exchanges_dropped == 2
        assert text(events) == "hello"  # type: ignore[arg-type]


async def test_response_needs_history_before_it_is_generated(url_without_history: str) -> None:
    limits = replace(FAST, history_tries_seconds=(0.05, 0.05))
    async with started(url_without_history, limits=limits) as worker:
        (*_, failed) = await ask(worker, request(new_id()))
        assert isinstance(failed, Failed) and failed.code == "history_unavailable"
