import random
import time
from itertools import pairwise

import pytest

from services.contract.answer import (
    Answer,
    Run,
    after_offset,
    events_of,
    merge,
    mirostat_mu,
    split,
    text_of,
)
from services.contract.conversation import FunctionCall, ToolCall
from services.contract.messages import AnswerEvent, Token, ToolCallDelta

CALLS = (
    ToolCall("c0", FunctionCall("go", '{"to": "🙂"}')),
    ToolCall("c1", FunctionCall("f", "{}")),
)
USUAL: list[AnswerEvent] = [
    Token(0, "hm ", (1,), channel="reasoning"),
    Token(3, "so", (2,), channel="reasoning"),
    Token(5, "Well", (3, 4)),
    ToolCallDelta(9, 0, (5,), "c0", "go"),
    ToolCallDelta(11, 0, (6,), arguments='{"to": '),
    ToolCallDelta(18, 0, (7,), arguments='"🙂"}'),
    ToolCallDelta(22, 1, (8, 9), "c1", "f", "{}"),
]
INTERLEAVED: list[AnswerEvent] = [
    Token(0, "First.", (1,)),
    Token(6, "hm", (2,), channel="reasoning"),
    ToolCallDelta(8, 0, (5,), "c0", "go", '{"to": "🙂"}'),
    Token(21, "Then.", (3,)),
    ToolCallDelta(26, 1, (8,), "c1", "f"),
    ToolCallDelta(27, 1, (8,), arguments="{}"),
]


@pytest.mark.parametrize("events", [USUAL, INTERLEAVED])
def test_offsets_of_the_examples_add_up(events: list[AnswerEvent]) -> None:
    assert events[0].offset == 0
    assert all(first.end == second.offset for first, second in pairwise(events))


def test_answer_is_built_from_its_events() -> None:
    answer = Answer.of(USUAL)
    assert (answer.content, answer.reasoning, tuple(answer.tool_calls)) == ("Well", "hm so", CALLS)
    assert answer.length == len(answer.text) == USUAL[-1].end


def test_usual_order_is_not_stored() -> None:
    assert Answer.of(USUAL).order == () == Answer.of([]).order
    assert Answer.of(INTERLEAVED).order == (
        Run("content", 6),
        Run("reasoning", 2),
        Run("tool_call", 13),
        Run("content", 5),
        Run("tool_call", 3),
    )


@pytest.mark.parametrize("events", [USUAL, INTERLEAVED, []])
def test_stored_answer_has_the_same_characters(events: list[AnswerEvent]) -> None:
    answer = Answer.of(events)
    stored = events_of(answer.content, answer.reasoning, answer.tool_calls, answer.order)
    assert Answer.of(stored) == answer


@pytest.mark.parametrize("events", [USUAL, INTERLEAVED])
def test_every_offset_has_one_rest(events: list[AnswerEvent]) -> None:
    whole = Answer.of(events).text
    for offset in range(len(whole) + 1):
        rest = [part for event in events if (part := after_offset(event, offset))]
        text = "".join(map(text_of, rest))
        is_in_name = any(
            isinstance(e, ToolCallDelta) and e.offset < offset < e.offset + len(e.name)
            for e in events
        )
        assert text == whole[rest[0].offset :] if rest else offset == len(whole)
        assert is_in_name or not rest or rest[0].offset == offset


def test_name_of_a_call_is_not_cut() -> None:
    call = ToolCallDelta(10, 0, (1,), "id", "name", "{}")
    assert after_offset(call, 12) == call
    assert after_offset(call, 14) == ToolCallDelta(14, 0, (1,), arguments="{}")
    assert after_offset(call, 15) == ToolCallDelta(15, 0, (1,), arguments="}")
    assert after_offset(call, 16) is None


def test_merged_events_keep_the_last_state_of_mirostat() -> None:
    events: list[AnswerEvent] = [
        Token(0, "a", (1,), mirostat_mu=7.5),
        Token(1, "b", (2,), mirostat_mu=6.5),
        Token(2, "c", ()),
        ToolCallDelta(3, 0, (3,), "id", "f", mirostat_mu=5.5),
        ToolCallDelta(4, 0, (4,), arguments="{}", mirostat_mu=4.5),
    ]
    assert [event.mirostat_mu for event in merge(events)] == [6.5, 4.5]
    assert mirostat_mu(events) == 4.5 and mirostat_mu(merge(events[:3])) == 6.5
    assert mirostat_mu([]) is None


def test_merged_events_are_one_per_run() -> None:
    assert merge(USUAL) == [
        Token(0, "hm so", (1, 2), channel="reasoning"),
        Token(5, "Well", (3, 4)),
        ToolCallDelta(9, 0, (5, 6, 7), "c0", "go", '{"to": "🙂"}'),
        ToolCallDelta(22, 1, (8, 9), "c1", "f", "{}"),
    ]
    assert Answer.of(merge(INTERLEAVED)) == Answer.of(INTERLEAVED)
    assert merge([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_split_events_build_the_same_answer(seed: int) -> None:
    dice = random.Random(seed)
    for events in (USUAL, INTERLEAVED):
        size = dice.randint(1, 9)
        parts = [part for event in merge(events) for part in split(event, size)]
        assert Answer.of(parts) == Answer.of(events)
        assert all(first.end == second.offset for first, second in pairwise(parts))
        assert all(len(text_of(part)) <= size + len("go") for part in parts)


def test_answer_starts_with_each_of_its_beginnings() -> None:
    for events in (USUAL, INTERLEAVED):
        whole = Answer.of(events)
        for count in range(len(events) + 1):
            beginning = Answer.of(events[:count])
            assert whole.starts_with(beginning)
            assert beginning.starts_with(whole) is (count == len(events))
    assert not Answer.of(USUAL).starts_with(Answer.of(INTERLEAVED))
    assert not Answer.of([Token(0, "ab", ())]).starts_with(Answer.of([Token(0, "ac", ())]))
    reasoning = Answer.of([Token(0, "a", (), channel="reasoning")])
    assert not Answer.of([Token(0, "ab", ())]).starts_with(reasoning)
    thought_longer = Answer.of([*USUAL[:2], Token(5, "W", (), channel="reasoning")])
    assert not Answer.of(USUAL).starts_with(thought_longer)


def test_imported_calls_without_names_are_separate() -> None:
    calls = (ToolCall("", FunctionCall("", "{}")), ToolCall("", FunctionCall("", "[]")))
    answer = Answer.of(events_of("", "", calls))
    assert answer.runs == [Run("tool_call", 2)] * 2
    assert answer.text == "{}[]" and answer.starts_with(answer)


def test_many_calls_take_linear_time() -> None:
    calls = [ToolCall(str(number), FunctionCall("f", "{}")) for number in range(20_000)]
    began = time.process_time()
    assert Answer.of(events_of("", "", calls)).tool_calls == calls
    assert time.process_time() - began < 2
