"""Requests that resume an answer which another worker has begun."""

from dataclasses import replace as replace_limits
from typing import Any

import pytest
from msgspec.structs import replace

from services.contract.answer import Answer
from services.contract.messages import (
    ChatRequest,
    Done,
    Failed,
    ResumeState,
    Started,
    StreamEvent,
    Token,
)
from tests.fakes import text_resume
from tests.inference.scripted import FAST, LONG, StartWorker, Worker, text
from tests.inference.test_exchanges import stored

LOST_AT = 100  # tokens


def state_of(events: list[StreamEvent]) -> ResumeState:
    (started,) = (event for event in events if isinstance(event, Started))
    assert started.resume_state is not None
    return started.resume_state


async def begin(worker: Worker, prompt: str, **more: Any) -> tuple[ResumeState, list[StreamEvent]]:
    """Return an answer in another session, as another worker would give it."""
    events = await worker.ask(prompt, "elsewhere", **more)
    return state_of(events), events


async def test_resumed_answer_continues_and_is_stored_whole(
    fast: Worker,
) -> None:
    state, whole = await begin(fast, "long", request_id="first")
    resume = text_resume(state, tuple(LONG[:LOST_AT]), LONG[: LOST_AT - 1].decode())
    accepted, started, *tokens, done = await fast.ask("long", "s", resume=resume, request_id="r")
    first = tokens[0]
    assert isinstance(first, Token) and first.offset == LOST_AT - 1
    assert Answer.of(resume.events).text + text(tokens) == LONG.decode()
    assert isinstance(done, Done) and isinstance(whole[-1], Done)
    assert (done.usage.completion_tokens, done.length) == (len(LONG) + 1, len(LONG))
    assert done.usage.prompt_tokens == whole[-1].usage.prompt_tokens
    assert state_of([started]) == state
    (turn,) = (await fast.context("s")).turns
    assert (turn.request_id, turn.response) == ("r", LONG.decode())


async def test_resumed_answer_keeps_its_prompt(
    fast: Worker,
) -> None:
    state = state_of(await fast.ask("hi", "s"))
    await fast.ask("long", "s")
    resumed = await fast.ask("hi", "s", resume=text_resume(state, (104,), "h"))
    assert text(resumed) == "ello"
    assert state_of(resumed) == state


async def test_prompt_after_a_resumed_one_is_not_truncated_more(
    start_worker: StartWorker,
) -> None:
    async with start_worker(context=740) as small:
        for turn in range(3):
            await small.ask(f"{turn:02} hi", "s", max_tokens=300)
        state, _ = await begin(small, "03 hi", max_tokens=300)
        resume = text_resume(state, (104,), "h")
        await small.ask("03 hi", "s", max_tokens=300, resume=resume)
        _, started, *_ = await small.ask("04 hi", "s", max_tokens=300)
        assert isinstance(started, Started)
        assert (started.exchanges_kept, started.exchanges_dropped) == (4, 0)


async def test_resumed_answer_cancelled_before_its_start_is_stored(fast: Worker) -> None:
    state, _ = await begin(fast, "hi")
    await fast.cancel("r")
    *_, done = await fast.ask("hi", "s", resume=text_resume(state, (104,), "h"), request_id="r")
    assert isinstance(done, Done) and (done.finish_reason, done.stored) == ("cancelled", "log")
    (turn,) = (await fast.context("s")).turns
    assert turn.response == "h"


async def test_resumed_answer_that_lacks_only_its_end_gets_no_slot(fast: Worker) -> None:
    state, _ = await begin(fast, "stop")
    steps = len(fast.backend.steps)
    generated = tuple(b"fine\nUser:")
    accepted, done = await fast.ask("stop", "s", resume=text_resume(state, generated, "fine"))
    assert isinstance(done, Done) and done.finish_reason == "stop"
    assert len(fast.backend.steps) == steps
    (turn,) = (await fast.context("s")).turns
    assert turn.response == "fine"


async def test_resumed_answer_keeps_its_seed(
    fast: Worker,
) -> None:
    state, _ = await begin(fast, "hi")
    resumed = await fast.ask("hi", "s", resume=text_resume(state, (104,), "h"))
    assert state_of(resumed).seed == state.seed
    seeds = [(await stored(fast, session))[0].sampling.seed for session in ("elsewhere", "s")]
    assert seeds == [state.seed, state.seed]
    given, _ = await begin(fast, "hi", seed=5)
    assert given.seed == 5


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        ({"model": "another"}, "model_not_found", "Another model"),
        ({"adapter": "another"}, "model_not_found", "Another model"),
        ({"prompt": b""}, "invalid_request", "ends inside a token"),
        ({"prompt": b"123"}, "invalid_request", "ends inside a token"),
        ({"prompt": b"\xff\xff\xff\xff"}, "invalid_request", "not in the model's vocabulary"),
        ({"prompt": b"h\0\0\0" * 2000}, "context_length_exceeded", "MODEL_CONTEXT"),
    ],
    ids=str,
)
async def test_resume_state_of_another_model_is_rejected(
    fast: Worker,
    change: dict[str, Any],
    code: str,
    why: str,
) -> None:
    state, _ = await begin(fast, "hi")
    resume = text_resume(replace(state, **change), (104,), "h")
    failed = (await fast.ask("hi", "s", resume=resume, max_tokens=100))[-1]
    assert isinstance(failed, Failed) and failed.code == code and why in failed.message


async def test_resume_with_more_tokens_than_the_window_is_rejected(fast: Worker) -> None:
    state, _ = await begin(fast, "hi")
    failed = (await fast.ask("hi", "s", resume=text_resume(state, (104,) * 3000, "h")))[-1]
    assert isinstance(failed, Failed) and failed.code == "context_length_exceeded"


async def test_answer_of_an_adapter_is_resumed_by_that_adapter_only(fast: Worker) -> None:
    state, _ = await begin(fast, "hi", model="fake:shout")
    request = ChatRequest(prompt="hi", model="fake:shout", resume=text_resume(state, (72,), "H"))
    assert text([event async for event in fast.events(request)]) == "ELLO"
    failed = (await fast.ask("hi", "s", resume=text_resume(state, (72,), "H")))[-1]
    assert isinstance(failed, Failed) and failed.code == "model_not_found"


async def test_resume_state_too_long_for_a_message_is_left_out(start_worker: StartWorker) -> None:
    limits = replace_limits(FAST, max_payload=800)  # bytes: room for 50 tokens of a prompt
    async with start_worker(limits=limits) as small:
        states = []
        for padding in (0, 50):
            prompt = f"{'x' * padding}hi<|im_end|>\n<|im_start|>assistant\n"
            events = await small.ask_stateless(text=prompt)
            states += [event.resume_state for event in events if isinstance(event, Started)]
    assert states[0] is not None and states[1] is None
