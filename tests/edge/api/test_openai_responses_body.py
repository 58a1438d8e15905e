"""Bodies of responses from any client: their items, as messages for the model. No processes."""

import json
from typing import Any

import msgspec
import pytest

from services.contract.conversation import ChatMessage, FunctionCall, TextPart, ToolCall
from services.contract.errors import ServiceError
from services.contract.messages import JsonObjectFormat, JsonSchemaFormat, TextFormat
from services.edge.api.openai_body import parse
from services.edge.api.openai_responses_body import (
    ConversationBody,
    ResponseBody,
    ResponsesTranslation,
)
from services.edge.api.openai_responses_items import (
    ItemPlace,
    place_of,
    to_messages,
    with_ids,
)
from services.edge.api.openai_responses_objects import encode_reasoning
from tests.edge.conftest import LIMITS

ID = "0123456789abcdef" * 4
CALL = {"type": "function_call", "call_id": "c1", "name": "go", "arguments": '{"to":"Rome"}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "done"}
TOOL = {"type": "function", "name": "go", "parameters": {"type": "object"}, "strict": True}


def read(**fields: Any) -> tuple[ResponseBody, dict[str, bool]]:
    """Return the body and the ignored fields."""
    translation = ResponsesTranslation(LIMITS)
    return parse(json.dumps(fields).encode(), ResponseBody, translation), translation.ignored


def messages(*items: Any, **fields: Any) -> list[ChatMessage]:
    return to_messages(read(input=list(items), **fields)[0].items)


def call(arguments: str = '{"to":"Rome"}', id_: str = "c1") -> ToolCall:
    return ToolCall(id_, FunctionCall("go", arguments))


def test_text_is_a_message_of_the_user() -> None:
    assert to_messages(read(input="hi")[0].items) == [ChatMessage("user", "hi")]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"role": "user", "content": "hi"}, ChatMessage("user", "hi")),
        ({"content": "hi"}, ChatMessage("user", "hi")),
        ({"type": "message", "role": "developer", "content": "be kind"},
         ChatMessage("developer", "be kind")),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text",
          "text": "b"}]}, ChatMessage("user", (TextPart("a"), TextPart("b")))),
        ({"role": "assistant", "id": "msg_1", "status": "completed", "content":
          [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}]},
         ChatMessage("assistant", "yes")),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
         ChatMessage("assistant", "no")),
        (CALL, ChatMessage("assistant", tool_calls=(call(),))),
        ({"type": "custom_tool_call", "call_id": "c1", "name": "go", "input": 'x "y"'},
         ChatMessage("assistant", tool_calls=(call('{"input":"x \\"y\\""}'),))),
        (OUTPUT, ChatMessage("tool", "done", tool_call_id="c1")),
        ({**OUTPUT, "output": [{"type": "input_text", "text": "a"}, {"type": "input_text",
          "text": "b"}]}, ChatMessage("tool", "a\nb", tool_call_id="c1")),
        ({**OUTPUT, "output": {"ok": True}}, ChatMessage("tool", '{"ok": true}',
          tool_call_id="c1")),
        ({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text",
          "text": "Hm"}]}, ChatMessage("assistant", reasoning="Hm")),
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]},
         ChatMessage("assistant", reasoning="Hm")),
        ({"type": "reasoning", "summary": [], "encrypted_content": encode_reasoning("Hm")},
         ChatMessage("assistant", reasoning="Hm")),
    ],
)  # fmt: skip
def test_item_becomes_a_message(item: dict[str, Any], expected: ChatMessage) -> None:
    assert messages(item) == [expected]


def test_reasoning_text_and_calls_are_one_message() -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]}
    said = {"role": "assistant", "content": "Let me look."}
    second = {**CALL, "call_id": "c2"}
    assert messages({"content": "hi"}, thought, said, CALL, second, OUTPUT, said, CALL, said) == [
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "Let me look.", tool_calls=(call(), call(id_="c2")),
                    reasoning="Hm"),
        ChatMessage("tool", "done", tool_call_id="c1"),
        ChatMessage("assistant", "Let me look.", tool_calls=(call(),)),
        ChatMessage("assistant", "Let me look."),
    ]  # fmt: skip


def test_items_of_other_servers_are_ignored_and_named() -> None:
    hosted = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    encrypted = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
    body, ignored = read(input=[hosted, encrypted, {"content": "hi"}])
    assert to_messages(body.items) == [ChatMessage("user", "hi")]
    assert ignored.keys() == {"input[].web_search_call", "input[].encrypted_content"}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"input": [{"type": "nonsense"}]}, "item type `nonsense` is not supported"),
        ({"input": [{"role": "king", "content": "hi"}]}, r"'king' - at `\$.input\[0\].role`"),
        ({"input": [{"content": [{"type": "input_image", "image_url": "x"}]}]}, "text only"),
        ({"input": [{"type": "function_call", "name": "go"}]}, "missing required field `call_id`"),
        ({"input": [{"type": "item_reference"}]}, "missing required field `id`"),
        ({"input": 5}, r"Expected `array`, got `int` - at `\$.input`"),
        ({"input": [5]}, r"Expected `object`, got `int` - at `\$.input\[0\]`"),
        ({"input": [{"content": {"a": 1}}]}, r"Expected `array`.* - at `\$.input\[0\].content`"),
        ({"tools": [{"type": "function"}]}, "required field `name`"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "xml"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "`schema`"),
        ({"text": "json"}, r"at `\$.text`"),
        ({"reasoning": "high"}, r"at `\$.reasoning`"),
        ({"truncation": "maybe"}, "maybe"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"prompt": {"id": "pmpt_1"}}, "`prompt` is not supported"),
        ({"store": "yes"}, "store"),
        ({"conversation": 5}, "conversation"),
    ],
)
def test_invalid_body_is_rejected_by_field(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ServiceError, match=what) as raised:
        read(**fields)
    assert raised.value.code == "invalid_request"


def test_fields_without_effect_are_named() -> None:
    _, ignored = read(
        input="hi",
        service_tier="flex",
        client_metadata={"a": "b"},
        text={"verbosity": "low"},
        reasoning={"summary": "auto"},
        tools=[{"type": "web_search"}, TOOL],
        typo=1,
    )
    assert {name for name, is_known in ignored.items() if not is_known} == {"typo"}
    assert ignored.keys() >= {
        "service_tier",
        "text.verbosity",
        "reasoning.summary",
        "tools[].web_search",
    }


def test_tools_have_the_flat_form_in_both_directions() -> None:
    body, _ = read(input="hi", tools=[TOOL], tool_choice={"type": "function", "name": "go"})
    assert body.tools and body.tools[0].function.name == "go"
    assert body.parameters["tools"] == [TOOL]
    assert body.parameters["tool_choice"] == {"type": "function", "name": "go"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "go"}]}
    body, _ = read(input="hi", tools=[TOOL, {**TOOL, "name": "stay"}], tool_choice=allowed)
    assert body.tools and len(body.tools) == 1 and body.tool_choice == "required"


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"type": "text"}, TextFormat | None),
        ({"type": "json_object"}, JsonObjectFormat),
        ({"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True,
          "description": "d"}, JsonSchemaFormat),
    ],
)  # fmt: skip
def test_text_format_constrains_the_answer(given: dict[str, Any], kind: type) -> None:
    body, _ = read(input="hi", text={"format": given})
    assert isinstance(body.response_format, kind)
    assert body.parameters["text"] == {"format": given}


def test_limits_and_logprobs_have_the_names_of_the_worker() -> None:
    body, _ = read(
        input="hi",
        max_output_tokens=7,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
        stop="x",
        reasoning={"effort": "low"},
    )
    assert body.sampling["max_completion_tokens"] == 7 and body.sampling["max_tokens"] is None
    assert (body.sampling["logprobs"], body.sampling["stop"]) == (2, ("x",))
    assert body.reasoning_effort == "low"
    assert read(input="hi")[0].sampling["logprobs"] is None
    included = read(input="hi", include=["message.output_text.logprobs"])[0]
    assert included.sampling["logprobs"] == 0


def test_nulls_are_the_defaults() -> None:
    names = ("instructions", "store", "stream", "background", "previous_response_id", "tools",
             "conversation", "truncation", "metadata", "text", "reasoning", "include")  # fmt: skip
    body, _ = read(input="hi", **dict.fromkeys(names))
    assert body == read(input="hi")[0]
    assert body.parameters == {}


def test_conversation_is_an_id_or_an_object() -> None:
    for given in ("conv_1", {"id": "conv_1"}):
        assert read(input="hi", conversation=given)[0].conversation_id == "conv_1"


def test_body_of_a_conversation_has_items_and_metadata() -> None:
    given = json.dumps({"items": [{"content": "hi"}, CALL], "metadata": {"a": "b"}}).encode()
    body = parse(given, ConversationBody, ResponsesTranslation(LIMITS))
    assert [item["type"] for item in body.items] == ["message", "function_call"]
    assert body.metadata == {"a": "b"}


def test_ids_of_items_tell_their_places() -> None:
    items = with_ids(read(input=[{"content": "hi", "id": "old"}, CALL, OUTPUT])[0].items, ID)
    assert [item["id"] for item in items] == [f"msg_{ID}_i0", f"fc_{ID}_i1", f"fco_{ID}_i2"]
    assert place_of(items[1]["id"]) == ItemPlace(ID, True, 1)
    assert place_of(f"rs_{ID}_12") == ItemPlace(ID, False, 12)
    for other in ("", "msg_1", f"msg_{ID}", f"msg_{ID}_i", f"xx_{ID}_1", f"msg_{ID}_1\n"):
        assert place_of(other) is None


def test_items_survive_the_log() -> None:
    body, _ = read(input=[{"content": "hi"}, CALL, OUTPUT])
    assert msgspec.json.decode(msgspec.json.encode(body.input)) == list(body.input or ())
