"""Lines of datasets from exchanges. Pure."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from services.contract.codec import encode
from services.contract.conversation import Function, FunctionCall, Tool, ToolCall, ToolResult
from services.contract.history import Exchange, Feedback
from services.contract.messages import ModelInfo
from services.edge.datasets import (
    AnswerFilter,
    Conversation,
    ConversationLimits,
    Origin,
    PreferenceConversation,
    SftConversation,
)
from tests.history.samples import exchange

START = datetime(2026, 1, 1, tzinfo=UTC)
ANY_ANSWER, LIMITS = AnswerFilter(), ConversationLimits()
UP, DOWN = Feedback("up"), Feedback("down")
TOOLS = (Tool(Function("weather", parameters={"type": "object"})),)
CALL = ToolCall("c1", FunctionCall("weather", '{"city":"Rome"}'))


def said(
    number: int, feedback: Feedback | None = None, model: str = "demo", **fields: Any
) -> Exchange:
    at = START + timedelta(minutes=number)
    info = ModelInfo(model, "digest", 2048, 1)
    made = exchange(f"m{number}")
    named = {"prompt": f"p{number}", "response": f"r{number}", "answered_at": at}
    return replace(made, model=info, feedback=feedback, **(named | fields))


async def lines_of(conversation: Conversation, *exchanges: Exchange) -> list[dict[str, Any]]:
    lines = []
    for each in exchanges:
        lines += [line async for line in conversation.push(each)]
    lines += [line async for line in conversation.end()]
    return [json.loads(encode(line)) for line in lines]


async def sft(
    *exchanges: Exchange,
    wanted: AnswerFilter = ANY_ANSWER,
    system: str | None = None,
    limits: ConversationLimits = LIMITS,
) -> list[dict[str, Any]]:
    return await lines_of(SftConversation(Origin("s", system), wanted, limits), *exchanges)


async def preferences(
    *exchanges: Exchange,
    wanted: AnswerFilter = ANY_ANSWER,
    others: tuple[Exchange, ...] = (),
) -> list[dict[str, Any]]:
    async def find(session_id: str, request_id: str) -> Exchange | None:
        assert session_id == "other"
        return next((each for each in others if each.request_id == request_id), None)

    return await lines_of(PreferenceConversation(Origin("s", None), wanted, find=find), *exchanges)


def contents(line: dict[str, Any]) -> list[str]:
    return [message["content"] for message in line["messages"]]


def pairs(lines: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [
        (line["source"], line["chosen"][0]["content"], line["rejected"][0]["content"])
        for line in lines
    ]


async def test_conversation_is_one_line_with_its_system_prompt() -> None:
    (line,) = await sft(said(1), said(2), system="Be kind.")
    assert line == {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "p1"},
            {"role": "assistant", "content": "r1"},
            {"role": "user", "content": "p2"},
            {"role": "assistant", "content": "r2"},
        ],
        "session_id": "s",
        "message_id": "m2",
    }


async def test_correction_replaces_the_answer_without_its_reasoning() -> None:
    corrected = said(1, Feedback("down", correction="right"), reasoning="wrong thought")
    (line,) = await sft(corrected, said(2, reasoning="thought"))
    assert line["messages"][1] == {"role": "assistant", "content": "right"}
    assert line["messages"][3]["reasoning_content"] == "thought"


async def test_tools_calls_and_results_are_messages() -> None:
    calling = said(1, response="", tool_calls=(CALL,), finish_reason="tool_calls", tools=TOOLS)
    answering = said(2, prompt="", tool_results=(ToolResult("c1", "sunny"),), tools=TOOLS)
    (line,) = await sft(calling, answering)
    assert line["tools"] == [json.loads(encode(TOOLS[0]))]
    assert line["messages"][1]["tool_calls"] == [
        {
            "id": "c1",
            "function": {"name": "weather", "arguments": {"city": "Rome"}},
            "type": "function",
        }
    ]
    assert line["messages"][2:] == [
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "r2"},
    ]


async def test_results_whose_calls_are_left_out_are_left_out_too() -> None:
    calling = said(1, DOWN, response="", tool_calls=(CALL,), finish_reason="tool_calls")
    answering = said(2, prompt="", tool_results=(ToolResult("c1", "sunny"),))
    (line,) = await sft(calling, answering, said(3))
    assert contents(line) == ["p3", "r3"]


@pytest.mark.parametrize(
    ("feedback", "fields", "is_kept"),
    [
        (None, {}, True),
        (DOWN, {}, False),
        (None, {"finish_reason": "cancelled"}, False),
        (None, {"finish_reason": "length"}, False),
        (None, {"response": ""}, False),
        (UP, {"finish_reason": "length"}, True),
        (Feedback("down", correction="r1"), {"finish_reason": "failed", "response": ""}, True),
    ],
)
async def test_answers_unfit_to_be_learned_are_left_out(
    feedback: Feedback | None, fields: dict[str, Any], is_kept: bool
) -> None:
    (line,) = await sft(said(1, feedback, **fields), said(2))
    assert contents(line) == (["p1", "r1"] if is_kept else []) + ["p2", "r2"]


async def test_clear_begins_a_new_line_without_late_answers() -> None:
    late = said(3, epoch=0)
    lines = await sft(said(1), said(2, epoch=5), late, said(4, epoch=5))
    assert [contents(line) for line in lines] == [["p1", "r1"], ["p2", "r2", "p4", "r4"]]


async def test_retry_replaces_the_answer_in_the_conversation() -> None:
    (line,) = await sft(said(1), said(2, prompt="p1", retry_of="m1"), said(3))
    assert contents(line) == ["p1", "r2", "p3", "r3"]
    (edited,) = await sft(said(1), said(2, retry_of="m1"), said(3))
    assert contents(edited) == ["p2", "r2", "p3", "r3"]


@pytest.mark.parametrize(
    ("first", "second", "learned"),
    [
        (None, None, "r2"),
        (UP, None, "r1"),
        (None, DOWN, "r1"),
        (Feedback(preferred_to="m2"), None, "r1"),
        (None, Feedback(preferred_to="m1"), "r2"),
        (Feedback(correction="right"), UP, "right"),
        (
            Feedback(preferred_to="m2", given_at=START + timedelta(minutes=1)),
            Feedback(preferred_to="m1", given_at=START),
            "r1",
        ),
    ],
)
async def test_best_answer_to_a_prompt_is_learned(
    first: Feedback | None, second: Feedback | None, learned: str
) -> None:
    (line,) = await sft(said(1, first), said(2, second, prompt="p1", retry_of="m1"))
    assert contents(line) == ["p1", learned]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (AnswerFilter(rating="up"), ["m2"]),
        (AnswerFilter(rating="none"), ["m1", "m3", "m4"]),
        (AnswerFilter(model="demo"), ["m1", "m2", "m3"]),
        (AnswerFilter(model="demo:pirate"), ["m2"]),
        (AnswerFilter(adapter="pirate"), ["m2", "m3"]),
        (AnswerFilter(adapter=""), ["m1", "m4"]),
        (AnswerFilter(since=START + timedelta(minutes=3)), ["m3", "m4"]),
        (AnswerFilter(until=START + timedelta(minutes=3)), ["m1", "m2"]),
        (AnswerFilter(model="demo", rating="up", adapter=""), []),
    ],
)
async def test_filter_makes_a_line_for_each_selected_answer(
    wanted: AnswerFilter, found: list[str]
) -> None:
    answers = (
        said(1),
        said(2, UP, model="demo:pirate"),
        said(3, model="demo:pirate@0.5"),
        said(4, model="other"),
    )
    lines = await sft(*answers, wanted=wanted)
    assert [line["message_id"] for line in lines] == found
    for line in lines:
        assert contents(line)[-1] == line["message_id"].replace("m", "r")
        assert contents(line)[:2] == ["p1", "r1"]


async def test_only_the_selected_answer_of_a_line_is_to_be_learned() -> None:
    (line,) = await sft(said(1), said(2, UP), wanted=AnswerFilter(rating="up"))
    assert [message.get("weight") for message in line["messages"]] == [None, 0, None, None]
    (whole,) = await sft(said(1), said(2))
    assert not any("weight" in message for message in whole["messages"])


async def test_answer_before_an_edit_is_in_no_later_line() -> None:
    rated, edited = said(1, UP), said(2, UP, retry_of="m1")
    lines = await sft(rated, edited, said(3, UP), wanted=AnswerFilter(rating="up"))
    assert [contents(line) for line in lines] == [
        ["p1", "r1"],
        ["p2", "r2"],
        ["p2", "r2", "p3", "r3"],
    ]


async def test_answers_before_an_edit_are_pairs() -> None:
    corrected = said(1, Feedback("down", correction="right"))
    lines = await preferences(corrected, said(2, retry_of="m1"), said(3, retry_of="m2"))
    assert pairs(lines) == [("correction", "right", "r1")]
    assert [message["content"] for message in lines[0]["prompt"]] == ["p1"]


async def test_long_conversation_continues_in_another_line() -> None:
    answers = [said(n) for n in range(1, 6)]
    lines = await sft(*answers, limits=ConversationLimits(max_turns=2))
    assert [line["message_id"] for line in lines] == ["m2", "m4", "m5"]
    large = [said(n, response=str(n) * 600) for n in range(1, 6)]
    lines = await sft(*large, limits=ConversationLimits(max_bytes=2000))
    assert [line["message_id"] for line in lines] == ["m2", "m4", "m5"]


async def test_long_conversation_keeps_the_newer_half_for_selected_answers() -> None:
    calling = said(3, UP, response="", tool_calls=(CALL,), finish_reason="tool_calls")
    answering = said(4, UP, prompt="", tool_results=(ToolResult("c1", "sunny"),))
    answers = (said(1, UP), said(2, UP), calling, answering, said(5, UP))
    limits = ConversationLimits(max_turns=4)
    lines = await sft(*answers, wanted=AnswerFilter(rating="up"), limits=limits)
    assert [contents(line) for line in lines][-2:] == [
        ["p1", "r1", "p2", "r2", "p3", "", "sunny", "r4"],
        ["p3", "", "sunny", "r4", "p5", "r5"],
    ]


async def test_correction_is_preferred_to_the_answer() -> None:
    corrected = said(2, Feedback("down", correction="right"), reasoning="thought", tools=TOOLS)
    (line,) = await preferences(said(1), corrected)
    assert line == {
        "prompt": [
            {"role": "user", "content": "p1"},
            {"role": "assistant", "content": "r1"},
            {"role": "user", "content": "p2"},
        ],
        "chosen": [{"role": "assistant", "content": "right"}],
        "rejected": [{"role": "assistant", "content": "r2", "reasoning_content": "thought"}],
        "source": "correction",
        "tools": [json.loads(encode(TOOLS[0]))],
        "session_id": "s",
        "message_id": "m2",
    }


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (None, None, [("retry", "r2", "r1")]),
        (Feedback(preferred_to="m2"), None, [("preference", "r1", "r2")]),
        (None, Feedback(preferred_to="m1"), [("preference", "r2", "r1")]),
        (UP, DOWN, [("rating", "r1", "r2")]),
        (DOWN, UP, [("rating", "r2", "r1")]),
        (UP, UP, []),
        (None, DOWN, []),
        (UP, None, []),
        (
            Feedback(correction="right"),
            None,
            [("correction", "right", "r1"), ("retry", "r2", "r1")],
        ),
        (
            Feedback(preferred_to="m2", given_at=START),
            Feedback(preferred_to="m1", given_at=START + timedelta(minutes=1)),
            [("preference", "r2", "r1")],
        ),
    ],
)
async def test_answers_to_one_prompt_are_pairs(
    first: Feedback | None, second: Feedback | None, expected: list[tuple[str, str, str]]
) -> None:
    retry = said(2, second, prompt="p1", retry_of="m1")
    assert pairs(await preferences(said(1, first), retry)) == expected


@pytest.mark.parametrize("reason", ["cancelled", "failed", "timeout"])
async def test_retry_of_a_stopped_answer_is_no_pair(reason: str) -> None:
    retry = said(2, prompt="p1", retry_of="m1")
    assert await preferences(said(1, finish_reason=reason), retry) == []
    assert await preferences(said(1, response=""), retry) == []
    same = replace(retry, response="r1")
    assert await preferences(said(1), same) == []


async def test_preferred_answer_sent_again_is_one_pair() -> None:
    """The page sends an earlier answer again, to continue the conversation with it."""
    first = said(1, Feedback(preferred_to="m2"))
    second = said(2, prompt="p1", retry_of="m1")
    again = replace(said(3, prompt="p1", response="r1", retry_of="m2"), model=None)
    assert pairs(await preferences(first, second, again)) == [("preference", "r1", "r2")]
    (line,) = await sft(first, second, again, said(4))
    assert contents(line) == ["p1", "r1", "p4", "r4"]


async def test_preferred_answer_is_found_in_another_session() -> None:
    given = Feedback(preferred_to="x1", preferred_session="other")
    other = replace(said(9, prompt="p1"), request_id="x1")
    assert pairs(await preferences(said(1, given), others=(other,))) == [("preference", "r1", "r9")]
    assert await preferences(said(1, given)) == []  # it was erased
    imported = replace(other, prompt="another")
    assert await preferences(said(1, given), others=(imported,)) == []


async def test_filter_selects_pairs_with_such_an_answer() -> None:
    answers = (said(1, UP), said(2, DOWN, prompt="p1", retry_of="m1", model="other"))
    for wanted in (AnswerFilter(rating="up"), AnswerFilter(model="other")):
        assert len(await preferences(*answers, wanted=wanted)) == 1
    assert await preferences(*answers, wanted=AnswerFilter(model="third")) == []


async def test_arguments_that_are_no_object_stay_a_text() -> None:
    call = ToolCall("c1", FunctionCall("go", "nonsense {"))
    (line,) = await sft(said(1, tool_calls=(call,), finish_reason="tool_calls"))
    assert line["messages"][1]["tool_calls"][0]["function"]["arguments"] == "nonsense {"
