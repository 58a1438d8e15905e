"""A request that another worker had begun to answer: what its reader and its session see of it."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    Resume,
    ResumeState,
    Started,
    StreamEvent,
    Token,
)
from tests.inference.scripted import LONG, Worker, text, worker

LATER = 100  # of the answer's characters are seen before its worker is lost


def origin_of(events: list[StreamEvent]) -> ResumeState:
    (started,) = (event for event in events if isinstance(event, Started))
    assert started.resume_state is not None
    return started.resume_state


async def begun(worker: Worker, prompt: str, **more: Any) -> tuple[ResumeState, list[StreamEvent]]:
    """What another worker would say, by one whose session is not this one."""
    events = await worker.ask(prompt, "elsewhere", **more)
    return origin_of(events), events


async def test_it_goes_on_where_it_was_cut_off_and_the_whole_of_it_is_stored(
    fast: Worker,
) -> None:
    origin, whole = await begun(fast, "long", request_id="first")
    resume = Resume(origin, tuple(LONG[:LATER]), LONG[: LATER - 1].decode())
    accepted, started, *tokens, done = await fast.ask("long", "s", resume=resume, request_id="r")
    first = tokens[0]
    assert isinstance(first, Token) and first.offset == LATER - 1
    assert resume.text + text(tokens) == LONG.decode()
    assert isinstance(done, Done) and isinstance(whole[-1], Done)
    assert (done.usage.completion_tokens, done.length) == (len(LONG) + 1, len(LONG))
    assert done.usage.prompt_tokens == whole[-1].usage.prompt_tokens
    assert origin_of([started]) == origin
    (turn,) = (await fast.context("s")).turns
    assert (turn.request_id, turn.response) == ("r", LONG.decode())


async def test_its_prompt_is_the_one_that_it_began_with_whatever_its_session_has_become(
    fast: Worker,
) -> None:
    origin = origin_of(await fast.ask("hi", "s"))
    await fast.ask("long", "s")
    resumed = await fast.ask("hi", "s", resume=Resume(origin, (104,), "h"))
    assert text(resumed) == "ello"
    assert origin_of(resumed) == origin


async def test_the_next_prompt_is_not_cut_for_not_knowing_where_this_one_began(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, context=740) as small:
        for turn in range(3):
            await small.ask(f"{turn:02} hi", "s", max_tokens=300)
        origin, _ = await begun(small, "03 hi", max_tokens=300)
        resume = Resume(origin, (104,), "h")
        await small.ask("03 hi", "s", max_tokens=300, resume=resume)
        _, started, *_ = await small.ask("04 hi", "s", max_tokens=300)
        assert isinstance(started, Started)
        assert (started.exchanges_kept, started.exchanges_dropped) == (4, 0)


async def test_what_lacks_nothing_but_its_end_ends_without_a_slot(fast: Worker) -> None:
    origin, _ = await begun(fast, "stop")
    steps = len(fast.backend.steps)
    said = tuple(b"fine\nUser:")
    accepted, done = await fast.ask("stop", "s", resume=Resume(origin, said, "fine"))
    assert isinstance(done, Done) and done.finish_reason == "stop"
    assert len(fast.backend.steps) == steps
    (turn,) = (await fast.context("s")).turns
    assert turn.response == "fine"


async def test_it_is_drawn_as_it_began_though_the_request_names_no_seed(
    fast: Worker,
) -> None:
    origin, _ = await begun(fast, "hi")
    resumed = await fast.ask("hi", "s", resume=Resume(origin, (104,), "h"))
    assert origin_of(resumed).seed == origin.seed
    given, _ = await begun(fast, "hi", seed=5)
    assert given.seed == 5


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        ({"model": "another"}, "model_not_found", "begun by another model"),
        ({"adapter": "another"}, "model_not_found", "begun by another model"),
        ({"prompt": b""}, "invalid_request", "no whole tokens"),
        ({"prompt": b"123"}, "invalid_request", "no whole tokens"),
        ({"prompt": b"\xff\xff\xff\xff"}, "invalid_request", "not in the model's vocabulary"),
        ({"prompt": b"h\0\0\0" * 2000}, "context_length_exceeded", "MODEL_CONTEXT"),
    ],
    ids=str,
)
async def test_what_this_worker_can_not_have_begun_is_refused(
    fast: Worker,
    change: dict[str, Any],
    code: str,
    why: str,
) -> None:
    origin, _ = await begun(fast, "hi")
    resume = Resume(replace(origin, **change), (104,), "h")
    failed = (await fast.ask("hi", "s", resume=resume, max_tokens=100))[-1]
    assert isinstance(failed, Failed) and failed.code == code and why in failed.message


async def test_more_ids_than_an_answer_can_have_are_not_even_looked_at(fast: Worker) -> None:
    origin, _ = await begun(fast, "hi")
    failed = (await fast.ask("hi", "s", resume=Resume(origin, (104,) * 3000, "h")))[-1]
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"


async def test_with_an_adapter_only_the_same_one_goes_on(fast: Worker) -> None:
    origin, _ = await begun(fast, "hi", model="fake:shout")
    request = ChatRequest(prompt="hi", model="fake:shout", resume=Resume(origin, (72,), "H"))
    assert text([event async for event in fast.events(request)]) == "ELLO"
    failed = (await fast.ask("hi", "s", resume=Resume(origin, (72,), "H")))[-1]
    assert isinstance(failed, Failed) and failed.code == "model_not_found"
