from typing import Any

import pytest

from services.contract.conversation import (
    ChatMessage,
    Function,
    FunctionCall,
    Tool,
    ToolCall,
    ToolResult,
)
from services.contract.messages import Turn
from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.chat_template import ChatTemplate, PromptOptions
from services.inference.engine.sampling.grammar import Vocabulary, compile_lark
from tests.inference.chat_templates import CHATML, template
from tests.inference.engine.prompt.round_trip import template as shipped
from tests.inference.engine.prompt.shipped_templates import SOURCES
from tests.inference.fake_backend import FakeBackend
from tests.inference.grammars import accepts
from tests.inference.vocabulary import WithSpecialTokens

GLM, V31, M3, QWEN3 = "GLM-4.6", "deepseek-ai-DeepSeek-V3.1", "MiniMax-M3", "Qwen-Qwen3-0.6B"


def variables(name: str, thinks: bool | None, effort: str | None, **given: Any) -> dict[str, Any]:
    return dict(shipped(name).format.variables(thinks, effort, given))


def test_switches_are_those_that_the_template_reads() -> None:
    assert variables(GLM, False, None) == {"enable_thinking": False}
    assert variables(V31, True, None) == {"enable_thinking": True, "thinking": True}
    off = {"enable_thinking": False, "thinking_mode": "disabled"}
    assert variables(M3, None, "none") == off
    assert variables(GLM, None, None) == {}


def test_effort_turns_reasoning_on_and_is_a_variable() -> None:
    expected = {"enable_thinking": True, "reasoning_effort": "high"}
    assert variables(GLM, None, "high") == expected
    assert variables(GLM, False, "high") == expected | {"enable_thinking": False}


def test_no_effort_turns_reasoning_off_where_a_template_can() -> None:
    assert variables("ByteDance-Seed-OSS", None, "none")["thinking_budget"] == 0
    assert variables("Cohere2MoE", None, "none")["reasoning_effort"] == "none"
    assert variables("tencent-Hy3", None, "none")["reasoning_effort"] == "no_think"
    assert "reasoning_effort" not in variables("openai-gpt-oss-120b", None, "none")
    for name in ("ByteDance-Seed-OSS", "Cohere2MoE", "tencent-Hy3"):
        chat, asked = shipped(name), (ChatMessage("user", "hi"),)
        for effort, may_reason in (("none", False), ("high", True)):
            options = PromptOptions(variables=chat.format.variables(None, effort, {}))
            assert chat.conversation_prompt(asked, (), 1, options=options).tokens
            assert chat.may_reason(options) is may_reason


def test_fields_win_over_variables_of_the_request() -> None:
    assert variables(GLM, True, None, enable_thinking=False, x=1) == {
        "enable_thinking": True,
        "x": 1,
    }
    assert variables(V31, None, None, enable_thinking=False)["thinking"] is False
    assert variables(V31, None, None, thinking=True) == {"thinking": True}


@pytest.mark.parametrize(
    ("name", "thinks", "channel"),
    [
        ("Qwen3.5-4B", True, "reasoning"),
        ("Qwen3.5-4B", False, "content"),
        (QWEN3, True, "content"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", None, "reasoning"),
        (V31, False, "content"),
        (V31, True, "reasoning"),
        ("Apriel-1.6-15b-Thinker-fixed", None, "reasoning"),
        ("openai-gpt-oss-120b", None, "content"),
        ("upstage-Solar-Open-100B", None, "content"),
        ("Kimi-K3", False, "content"),
    ],
)
def test_channel_is_where_the_prompt_ends(name: str, thinks: bool | None, channel: str) -> None:
    chat = shipped(name)
    options = PromptOptions(variables=chat.format.variables(thinks, None, {}))
    for question in ("hi", "<think>", "</think>", "x<think>\n"):
        messages = (ChatMessage("user", question),)
        assert chat.conversation_prompt(messages, (), 1, options=options).channel == channel
        assert chat.session_prompt("", (), question, 1, options=options).channel == channel
    assert chat.may_reason(options) == (thinks is not False)


def test_reasoning_of_a_session_is_shown_as_the_template_wants_it() -> None:
    turns = [Turn("1", "hi", "hello", reasoning="I greet.")]
    text = bytes(shipped("GLM-4.6").session_prompt("", turns, "and?", 1).tokens).decode()
    assert "hello" in text and "I greet." not in text, "it shows thoughts after the last question"
    text = bytes(shipped("poolside-Laguna-S-2.1").session_prompt("", turns, "?", 1).tokens).decode()
    assert "<think>" in text
    plain = bytes(template(CHATML).session_prompt("", turns, "and?", 1).tokens).decode()
    assert "I greet." not in plain


TOOLS = (Tool(Function("go", "walks", {"type": "object"})),)
CALLED = Turn("1", "hi", "", tool_calls=(ToolCall("a", FunctionCall("go", '{"to": "Rome"}')),))


@pytest.mark.parametrize(
    "name", ["Qwen3-Coder", QWEN3, GLM, "mistralai-Mistral-Nemo-Instruct-2407"]
)
def test_results_in_a_session_follow_their_calls(name: str) -> None:
    results = (ToolResult("a", "sunny"),)
    made = shipped(name).session_prompt("", [CALLED], "", 1, options=PromptOptions(TOOLS, results))
    text = bytes(made.tokens).decode()
    assert text.index("Rome") < text.index("sunny")
    later = [CALLED, Turn("2", "", "It is sunny.", tool_results=results)]
    text = bytes(shipped(name).session_prompt("", later, "Thanks", 1).tokens).decode()
    assert text.index("sunny") < text.index("It is sunny.") < text.index("Thanks")


def test_kimi_gets_ids_with_names_and_numbers() -> None:
    call = ToolCall("call_1", FunctionCall("go", "{}"))
    result = ChatMessage("tool", "done", tool_call_id="call_1")
    asked = (ChatMessage("user", "hi"), ChatMessage("assistant", tool_calls=(call,)), result)
    text = bytes(shipped("moonshotai-Kimi-K2").conversation_prompt(asked, TOOLS, 1).tokens).decode()
    assert "functions.go:0" in text and "call_1" not in text


def test_grammar_requires_control_tokens_where_the_format_has_them() -> None:
    """Their text alone is not enough: no text spells a control token."""
    names = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    backend = WithSpecialTokens(FakeBackend({}, 10_000), [SpecialToken(x, True) for x in names])
    ids = {token.text: id for id, token in backend.special_tokens().items()}
    compact = {ids[name]: 257 + number for number, name in enumerate(names)}
    chat = ChatTemplate(SOURCES[QWEN3], backend, bos="", eos="", adds_bos=False)
    lark = chat.format.answer_lark(TOOLS, "required")
    assert lark is not None
    for id, number in compact.items():
        lark = lark.replace(f"<[{id}]>", f"<[{number}]>")
    pieces = [*(bytes([byte]) for byte in range(256)), b"", *(b"" for _ in names)]
    vocabulary = Vocabulary(pieces, frozenset([256]))
    answer = '<think>\nhm</think>\n\n<tool_call>\n{"name": "go", "arguments": {}}\n</tool_call>'
    for special, allowed in ((True, True), (False, False)):
        grammar = compile_lark(lark, vocabulary)
        tokens = [compact.get(t, t) for t in backend.tokenize(answer, special=special)]
        for token in tokens:
            if not grammar.allows(token):
                break
            grammar.accept(token)
        assert grammar.may_end == allowed


def test_call_after_a_thought_has_its_header() -> None:
    """Harmony: without the header, the call would be content of the thought's message."""
    form = shipped("openai-gpt-oss-120b").format
    lark = form.answer_lark(TOOLS, "required", None, None)
    assert lark and form.answer.reasoning
    call = ' to=functions.go<|channel|>commentary json<|message|>{"a": 1}'
    thought = f"{form.answer.reasoning.start}Hm.{form.answer.reasoning.end}"
    assert accepts(lark, call) and accepts(lark, f"{thought}<|start|>assistant{call}")
    assert not accepts(lark, thought + call)
    assert bytes(form.reasoning_end).decode() == "<|end|><|start|>assistant"


def test_call_that_ends_like_the_prompt_has_no_format() -> None:
    """Nothing of the call follows the text with which a prompt ends."""
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        "{{ f.name }}{{ f.arguments | tojson }}<a>{% else %}[{{ m.content }}]{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}X<a>{% endif %}"
    )
    assert template(source).format.answer.calls is None
