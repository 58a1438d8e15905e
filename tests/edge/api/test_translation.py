"""Any value of a field is accepted or rejected; nothing else is raised."""

import itertools
import json
from typing import Any

import msgspec
import pytest

from services.contract.errors import ServiceError
from services.edge.api import fields
from services.edge.api.openai_body import parse
from services.edge.api.openai_chat import chat_request
from services.edge.api.openai_completions import text_requests
from services.edge.api.openai_requests import ChatCompletionBody, CompletionBody
from services.edge.api.openai_responses_body import ResponsesTranslation
from tests.edge.conftest import LIMITS

U = {"role": "user", "content": "x"}
ODD: list[Any] = [
    None, True, False, 0, -1, -2, 1.5, 12.0, 1e300, -1e300, 10**30, -(10**30), 10**400, "", "x",
    "{}", [], [None], [[]], ["x"], [1], [{}], {}, {"type": None}, {"type": 5}, {"type": "x"},
    {"type": "function"}, {"type": "function", "function": 5}, {"type": "allowed_tools"},
    {"type": "allowed_tools", "allowed_tools": 5}, {"type": "allowed_tools", "tools": [5, {}]},
    {"type": "json_schema"}, {"type": "json_schema", "json_schema": 5}, {"type": "json_object"},
    {"json": 5}, {"json": "x"}, {"choice": []}, {"choice": 5}, {"grammar": 5}, {"name": 5},
]  # fmt: skip


def read(body: dict[str, Any], kind: type[ChatCompletionBody | CompletionBody]) -> None:
    try:
        read = parse(json.dumps(body).encode(), kind, ResponsesTranslation(LIMITS))
        if isinstance(read, ChatCompletionBody):
            msgspec.json.encode(chat_request(read, ""))
        else:
            msgspec.json.encode(text_requests(read, ""))
    except ServiceError as error:
        assert error.code in ("invalid_request", "payload_too_large")


@pytest.mark.parametrize("name", sorted(fields.CHAT.honoured | fields.CHAT.rejected.keys()))
def test_chat_field_of_any_value_is_accepted_or_rejected(name: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for value in ODD:
        read({"messages": [U], name: value}, ChatCompletionBody)
        read({"messages": [U], "tools": tools, name: value}, ChatCompletionBody)


@pytest.mark.parametrize("name", sorted(fields.TEXT.honoured | fields.TEXT.rejected.keys()))
def test_text_field_of_any_value_is_accepted_or_rejected(name: str) -> None:
    for value in ODD:
        read({"prompt": "x", name: value}, CompletionBody)


@pytest.mark.parametrize("name", sorted(fields.MESSAGE.honoured))
def test_message_field_of_any_value_is_accepted_or_rejected(name: str) -> None:
    for role, value in itertools.product(("user", "assistant", "tool", "function"), ODD):
        read({"messages": [U, U | {"role": role, name: value}]}, ChatCompletionBody)


@pytest.mark.parametrize("name", sorted(fields.CALL.honoured | fields.CALLED_FUNCTION.honoured))
def test_call_in_history_is_never_rejected_for_its_content(name: str) -> None:
    for value in ODD:
        function = {"name": "f", "arguments": "{}"}
        if name in function:
            call: dict[str, Any] = {"id": "1", "function": function | {name: value}}
        else:
            call = {"id": "1", "function": function} | {name: value}
        body = {"messages": [U, {"role": "assistant", "tool_calls": [call]}]}
        if name in ("id", "name", "arguments"):
            parse(json.dumps(body).encode(), ChatCompletionBody, ResponsesTranslation(LIMITS))
        else:
            read(body, ChatCompletionBody)


@pytest.mark.parametrize("name", sorted(fields.TOOL.honoured | fields.FUNCTION.honoured))
def test_tool_field_of_any_value_is_accepted_or_rejected(name: str) -> None:
    for value in ODD:
        read(
            {"messages": [U], "tools": [{"type": "function", "name": "f", name: value}]},
            ChatCompletionBody,
        )
        nested = {"type": "function", "function": {"name": "f", name: value}}
        read({"messages": [U], "tools": [nested], "tool_choice": "auto"}, ChatCompletionBody)


def test_guided_choice_uses_escapes_of_gbnf() -> None:
    body = {"messages": [U], "guided_choice": ["\b\f\n\0", "\\b"]}
    read = parse(json.dumps(body).encode(), ChatCompletionBody, ResponsesTranslation(LIMITS))
    assert read.grammar == r'root ::= "\u0008\u000c\n\u0000" | "\\b"'
