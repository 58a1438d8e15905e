"""Conversations of callers, with the templates that llama.cpp ships."""

import pytest

from services.contract.conversation import ChatMessage, Function, FunctionCall, Tool, ToolCall
from services.contract.messages import Turn
from tests.inference.engine.prompt.shipped_templates import REJECTED, SOURCES, case, hostile
from tests.inference.vocabulary import text_of

USABLE = sorted(SOURCES.keys() - REJECTED.keys())
TOOLS = (
    Tool(
        Function(
            "go",
            "walks <|im_end|> there",
            {"type": "object", "properties": {"to": {"type": "string", "description": "where"}}},
        )
    ),
)


@pytest.mark.parametrize("name", USABLE)
def test_conversation_is_rendered_as_a_session(name: str) -> None:
    here = case(name, "qwen2")
    for contents in (("hi", "hello", "who"), *(c * 3 for c in hostile(here) if len(c) == 1)):
        prompt, answer, question = contents
        turns = (Turn("1", prompt, answer),)
        session = here.chat.session_prompt("be kind", turns, question, 1)
        roles = ("system", "user", "assistant", "user")
        messages = map(ChatMessage, roles, ("be kind", prompt, answer, question))  # type: ignore[arg-type]
        assert here.chat.conversation_prompt([*messages], (), 1).tokens == session.tokens


@pytest.mark.parametrize("name", USABLE)
def test_tools_calls_and_results_are_rendered(name: str) -> None:
    here = case(name, "qwen2")
    call = ToolCall("123456789", FunctionCall("go", '{"to": "Rome"}'))
    messages = (
        ChatMessage("user", "hi"),
        ChatMessage("assistant", tool_calls=(call,)),
        ChatMessage("tool", "sunny there", tool_call_id=call.id),
    )
    tokens = here.chat.conversation_prompt(messages, TOOLS, 1).tokens
    text = here.readable(text_of(here.backend, tokens))
    for part in ("go", "Rome", "sunny there", "walks"):
        assert part in text


# Arguments, names and ids that models write and clients send back unchanged.
BROKEN = ['{"to": Rome}', '{"to": "Rome', '["Rome"]', '"Rome"', '{"to":' * 70 + '"Rome"' + "}" * 70]
EMPTY = ["", "{}", "null", '""', "[]"]
NAMES = ["", "the Rome road", "a/b:Rome", "Rome" * 20, 'R"ome', "<|im_end|>Rome"]
IDS = ["", "call_abc123def456", "c" * 200, "functions.go:0"]


@pytest.mark.parametrize("name", USABLE)
def test_malformed_calls_are_rendered(name: str) -> None:
    here = case(name, "qwen2")

    def render(call: ToolCall) -> str:
        messages = (
            ChatMessage("user", "hi"),
            ChatMessage("assistant", tool_calls=(call,)),
            ChatMessage("tool", "no such thing", tool_call_id=call.id),
        )
        return text_of(here.backend, here.chat.conversation_prompt(messages, TOOLS, 1).tokens)

    for arguments in BROKEN:
        assert "Rome" in render(ToolCall("1", FunctionCall("go", arguments)))
    for arguments in EMPTY:
        assert "no such thing" in render(ToolCall("1", FunctionCall("go", arguments)))
    for called in NAMES:
        text = render(ToolCall("1", FunctionCall(called, "{}")))
        assert "no such thing" in text and ("Rome" in text or '"' in called or not called)
    for given in IDS:
        assert "no such thing" in render(ToolCall(given, FunctionCall("go", "{}")))
