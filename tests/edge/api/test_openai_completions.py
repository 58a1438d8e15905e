"""Text completions, requested with OpenAI's client; the worker is scripted."""

from typing import Any

import openai
import pytest

from services.contract.messages import (
    Token,
    TokenLogprob,
    TokenProbability,
)
from tests.fakes import ACCEPTED, DONE, HELLO, scripted_worker


async def test_text_is_completed(client: openai.AsyncOpenAI, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await client.completions.create(
            model="demo", prompt="once", max_tokens=7, stop=["\n"], seed=1
        )
    (choice,) = got.choices
    assert got.id.startswith("cmpl-") and got.object == "text_completion"
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Grüß dich", "stop", None)
    assert got.usage is not None and got.usage.total_tokens == 7
    ((_, request),) = worker.requests
    assert (request.text, request.max_completion_tokens) == ("once", 7)
    assert (request.stop, request.seed) == (("\n",), 1)
    assert request.messages is None and request.session_id == ""


async def test_text_completion_is_streamed(client: openai.AsyncOpenAI, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        stream = await client.completions.create(
            model="demo", prompt="once", stream=True, stream_options={"include_usage": True}
        )
        *parts, usage = [part async for part in stream]
    assert "".join(part.choices[0].text for part in parts) == "Grüß dich"
    assert [part.choices[0].finish_reason for part in parts] == [None, None, "stop"]
    assert usage.choices == [] and usage.usage is not None and usage.usage.total_tokens == 7


async def test_echo_precedes_the_answer(client: openai.AsyncOpenAI, nats_url: str) -> None:
    async with scripted_worker(nats_url, HELLO):
        got = await client.completions.create(model="demo", prompt="Sag: ", echo=True)
        stream = await client.completions.create(
            model="demo", prompt="Sag: ", echo=True, stream=True
        )
        text = "".join([part.choices[0].text async for part in stream])
    assert got.choices[0].text == text == "Sag: Grüß dich"


async def test_choices_of_several_prompts_are_in_order(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    async with scripted_worker(nats_url, HELLO) as worker:
        got = await client.completions.create(
            model="demo", prompt=["a", "b"], n=2, echo=True, best_of=1
        )
        await client.completions.create(model="demo", prompt=[1, 2, 3])
        await client.completions.create(model="demo", prompt=[[1], [2, 3]])
    assert [(choice.index, choice.text[0]) for choice in got.choices] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (10, 8)
    asked = [request.text for _, request in worker.requests]
    assert sorted(map(str, asked[:4])) == ["a", "a", "b", "b"]
    assert asked[4] == (1, 2, 3) and set(asked[5:]) == {(1,), (2, 3)}


async def test_logprobs_have_the_form_of_completions(
    client: openai.AsyncOpenAI, nats_url: str
) -> None:
    logprob = TokenLogprob(1, "ab", (97, 98), -0.5, (TokenProbability(2, "e", (101,), -0.25),))
    script = (
        ACCEPTED,
        Token(0, "abab", (1, 1), (logprob, logprob)),
        Token(4, "ab", (1,), (logprob,)),
        DONE,
    )
    async with scripted_worker(nats_url, script) as worker:
        got = await client.completions.create(model="demo", prompt="x", logprobs=1)
    assert worker.requests[0][1].logprobs == 1
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["ab", "ab", "ab"]
    assert (logprobs.text_offset, logprobs.token_logprobs) == ([0, 2, 4], [-0.5] * 3)
    assert logprobs.top_logprobs == [{"e": -0.25}] * 3


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1]}, "echo"),
        ({"prompt": ["x"] * 16, "n": 16}, "n"),
    ],
    ids=str,
)
async def test_unsupported_parameter_is_rejected_by_name(
    client: openai.AsyncOpenAI, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await client.completions.create(model="demo", prompt="x", extra_body=more)
    assert error.value.param == param
