"""Events and objects of responses, checked by the types of OpenAI's package. No processes."""

import json
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from services.contract import responses
from services.contract.answer import Answer, events_of, merge, split
from services.contract.errors import ServiceError
from services.contract.messages import (
    AnswerEvent,
    FinishReason,
    Token,
    TokenLogprob,
    TokenProbability,
)
from services.edge.api.openai_responses_objects import (
    Heading,
    ResponseBuilder,
    ResponseEncoder,
    decode_reasoning,
    encode_reasoning,
)
from tests.fakes import DONE, answer_events

REQUEST_ID = responses.request_id("a" * 32, UUID("01890000-0000-7000-8000-000000000001"))
PARTS = (
    ("reasoning", "Hm, 🙂 "),
    ("content", "Let me"),
    ("reasoning", "look."),
    ("content", "Well\u2028then"),
    ("call", "go"),
    ("arguments", '{"to": '),
    ("arguments", '"Rome"}'),
    ("call", "stay"),
)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
Parts = Sequence[tuple[str, str]]


def in_characters(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    return [part for event in events for part in split(event, 1)]


def as_stored(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    answer = Answer.of(events)
    return events_of(answer.content, answer.reasoning, answer.tool_calls, answer.order)


def stream(
    events: Iterable[AnswerEvent], after: int = -1, reason: FinishReason = "stop", **fields: Any
) -> list[dict[str, Any]]:
    """Return the events that a client receives after a number."""
    builder = ResponseBuilder(Heading(REQUEST_ID, fields))
    encoder = ResponseEncoder(builder, is_stored=True, after=after)
    done = msgspec.structs.replace(DONE, finish_reason=reason)
    parts = [encoder.begin(), *(encoder.encode(0, event) for event in (*events, done))]
    return parsed(b"".join(parts))


def parsed(data: bytes) -> list[dict[str, Any]]:
    events = []
    for block in data.decode().split("\n\n")[:-1]:
        kind, line = block.split("\n")
        event = json.loads(line.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    return events


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def text_of(events: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the events say, with the deltas of an item joined."""
    found: list[tuple[str, str]] = []
    for event in events:
        if "delta" in event and found and found[-1][0] == event["item_id"]:
            found[-1] = (event["item_id"], found[-1][1] + event["delta"])
        elif "delta" in event:
            found.append((event["item_id"], event["delta"]))
        else:
            found.append((event["type"], str(event["sequence_number"])))
    return found


def test_events_of_a_text_come_in_the_order_of_the_api() -> None:
    events = stream(answer_events(("content", "Hel"), ("content", "lo")))
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3, 6, 8, 9, 10, 11, 12]
    assert events[4]["logprobs"] == [] and events[4]["content_index"] == 0
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


def test_reasoning_and_calls_are_items_of_their_own() -> None:
    events = stream(answer_events(*PARTS), background=True)
    assert kinds(events)[:3] == ["created", "queued", "in_progress"]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        *("reasoning", "message", "reasoning", "message", "function_call", "function_call")
    ]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "Hm, 🙂 "}]
    assert (output[4]["name"], output[4]["arguments"]) == ("go", '{"to": "Rome"}')
    assert (output[5]["name"], output[5]["arguments"]) == ("stay", "")
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output
    assert all(item["status"] == "completed" for item in output)


@pytest.mark.parametrize("parts", [PARTS, PARTS[:1], PARTS[1:2], PARTS[4:], ()])
def test_sequence_numbers_do_not_depend_on_the_split(parts: Parts) -> None:
    whole = answer_events(*parts) if parts else []
    fine, coarse = stream(in_characters(whole)), stream(merge(whole))
    stored = stream(as_stored(whole))
    assert text_of(fine) == text_of(coarse) == text_of(stored)
    numbers = [event["sequence_number"] for event in fine]
    assert numbers == list(range(len(numbers)))
    assert stored[-1]["response"]["output"] == fine[-1]["response"]["output"]


def test_stream_continues_after_any_number_without_loss() -> None:
    whole = answer_events(*PARTS)
    fine = stream(in_characters(whole))
    for number in range(-1, len(fine) + 1):
        rest = fine[number + 1 :]
        for events in (whole, in_characters(whole), as_stored(whole)):
            assert text_of(stream(events, after=number)) == text_of(rest), number


@pytest.mark.parametrize(
    ("reason", "status", "kind", "item"),
    [
        ("stop", "completed", "completed", "completed"),
        ("tool_calls", "completed", "completed", "completed"),
        ("length", "incomplete", "incomplete", "incomplete"),
        ("timeout", "incomplete", "incomplete", "incomplete"),
        ("cancelled", "cancelled", "incomplete", "incomplete"),
    ],
)
def test_end_of_an_answer_decides_the_status(
    reason: FinishReason, status: str, kind: str, item: str
) -> None:
    *_, end = stream(answer_events(("content", "Hi")), reason=reason)
    response = end["response"]
    assert (end["type"], response["status"]) == (f"response.{kind}", status)
    assert response["output"][0]["status"] == item
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert response["incomplete_details"] == details
    assert (response["completed_at"] is not None) == (status == "completed")


def test_failure_ends_the_stream_with_the_output_so_far() -> None:
    builder = ResponseBuilder(Heading(REQUEST_ID, {}))
    encoder = ResponseEncoder(builder, is_stored=False)
    data = encoder.begin() + encoder.encode(0, Token(0, "Hi", (1,)))
    events = parsed(data + encoder.fail(ServiceError("worker_lost", "It is lost.")))
    assert kinds(events)[-2:] == ["output_item.done", "failed"]
    response = events[-1]["response"]
    assert response["error"] == {"code": "server_error", "message": "It is lost."}
    assert response["output"][0]["status"] == "incomplete"


def test_shutdown_ends_only_streams_that_cannot_be_resumed() -> None:
    for is_stored in (True, False):
        encoder = ResponseEncoder(ResponseBuilder(Heading(REQUEST_ID, {})), is_stored)
        encoder.begin()
        assert bool(encoder.interrupt()) != is_stored


def test_response_without_any_text_has_an_empty_message() -> None:
    *_, end = stream([])
    (item,) = end["response"]["output"]
    assert item["content"] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]


def test_logprobs_come_with_the_text_that_they_belong_to() -> None:
    def logprob(text: str) -> TokenLogprob:
        top = (TokenProbability(1, text, (1,), -0.5),)
        return TokenLogprob(1, text, (1,), -0.5, top)

    tokens = [Token(0, "", (1,), (logprob("\ufffd"),)), Token(0, "🙂", (2,), (logprob("🙂"),))]
    events = stream(tokens)
    (delta,) = [event for event in events if "delta" in event]
    assert [each["token"] for each in delta["logprobs"]] == ["\ufffd", "🙂"]
    part = events[-1]["response"]["output"][0]["content"][0]
    assert part["logprobs"] == delta["logprobs"]
    assert part["logprobs"][0]["top_logprobs"][0]["logprob"] == -0.5


def test_response_repeats_parameters_and_has_all_fields_of_the_api() -> None:
    *_, end = stream(answer_events(("content", "Hi")), model="demo", metadata={"a": "b"})
    response = Response.model_validate(end["response"])
    assert (response.model, response.metadata) == ("demo", {"a": "b"})
    assert response.created_at == responses.created_at(REQUEST_ID).timestamp() // 1
    assert response.usage and response.usage.total_tokens == 7
    assert response.usage.input_tokens_details.cached_tokens == 3
    required = {name for name, field in Response.model_fields.items() if field.is_required()}
    assert required <= end["response"].keys()


def test_response_that_is_not_in_the_log_says_so() -> None:
    builder = ResponseBuilder(Heading(REQUEST_ID, {}))
    assert builder.finished(DONE).store
    assert not builder.finished(msgspec.structs.replace(DONE, stored="failed")).store


def test_reasoning_survives_in_a_client_that_keeps_no_text() -> None:
    assert decode_reasoning(encode_reasoning("Hm, 🙂")) == "Hm, 🙂"
    for other in ("", "gAAAAA", "plain:no base64", "plain:/w=="):
        assert decode_reasoning(other) == ""
    builder = ResponseBuilder(Heading(REQUEST_ID, {}, includes_encrypted=True))
    for event in answer_events(("reasoning", "Hm")):
        builder.push(event)
    builder.close("stop")
    assert decode_reasoning(builder.output[0]["encrypted_content"]) == "Hm"
