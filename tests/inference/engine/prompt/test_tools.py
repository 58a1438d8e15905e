import json
import re
from typing import Any

import pytest

from services.contract.conversation import (
    ChatMessage,
    Function,
    FunctionCall,
    FunctionName,
    NamedTool,
    Tool,
    ToolCall,
)
from services.contract.errors import ServiceError
from services.contract.messages import JsonSchema, JsonSchemaFormat, Sampling
from services.inference.engine.backend import SpecialToken
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.prompt.tools import ToolPrompt
from services.inference.engine.sampling.constraints import request_lark, schema_lark
from services.inference.engine.sampling.grammar import compile_lark
from tests.inference.chat_templates import CHATML, END, NO_SYSTEM, START, template
from tests.inference.engine.prompt.shipped_templates import SOURCES
from tests.inference.fake_backend import FakeBackend
from tests.inference.grammars import accepts
from tests.inference.vocabulary import WithSpecialTokens, load_vocabulary, text_of

QWEN, LLAMA = "Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"
NEMO = "mistralai-Mistral-Nemo-Instruct-2407"
POINT: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/n"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}
NAMED = POINT | {"$defs": {"n": {"enum": ["north"]}}}
TOOLS = (
    Tool(Function("go", "walks there", POINT)),
    Tool(Function("look", None, NAMED)),
    Tool(Function("wait")),
)
ASK = ChatMessage("user", "hi")
CALL = ToolCall("123456789", FunctionCall("go", '{"x": 1}'))
CALLED = (
    ASK,
    ChatMessage("assistant", tool_calls=(CALL,)),
    ChatMessage("tool", "there", tool_call_id=CALL.id),
)


def render(name: str, *messages: ChatMessage, tools: tuple[Tool, ...] = ()) -> str:
    """Return the prompt of a template that llama.cpp ships, or of this one."""
    made = template(SOURCES.get(name, name), context=10_000)
    return bytes(made.conversation_prompt(messages, tools, 1).tokens).decode()


HERMES = "<tool_call>\n%s\n</tool_call>"
FORMS = {QWEN: HERMES, LLAMA: "%s", NEMO: "[TOOL_CALLS][%s]"}
KEYS = {QWEN: "arguments", LLAMA: "parameters", NEMO: "arguments"}


def written(name: str, tool: str, arguments: str = "{}") -> str:
    """Return a call as the template writes it, without what surrounds all calls."""
    end = ', "id": "123456789"}' if name == NEMO else "}"
    return f'{{"name": "{tool}", "{KEYS[name]}": {arguments}{end}'


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_rendered_in_the_template_s_own_form(name: str) -> None:
    text = render(name, *CALLED, tools=TOOLS)
    assert FORMS[name] % written(name, "go", '{"x": 1}') in text
    assert "walks there" in text and "there" in text


@pytest.mark.parametrize(
    "name", ["microsoft-Phi-3.5-mini-instruct", "google-gemma-2-2b-it", CHATML]
)
def test_unknown_call_format_is_replaced_by_instructions(name: str) -> None:
    text = render(name, *CALLED, tools=TOOLS)
    assert text.count("You may call functions.") == 1 and '"description":"walks there"' in text
    assert '<tool_call>\n{"name": "go", "arguments": {"x": 1}}\n</tool_call>' in text
    assert "<tool_response>\nthere\n</tool_response>" in text


def test_instructions_join_the_caller_s_system_prompt() -> None:
    text = render(CHATML, ChatMessage("developer", "be kind"), ASK, tools=TOOLS[2:])
    assert text.startswith("<|im_start|>system\nbe kind\n\nYou may call functions.")
    assert text.count("<|im_start|>system") == 1
    assert "[user]You may call" in render(NO_SYSTEM, ASK, tools=TOOLS)


def test_adjacent_results_are_one_message() -> None:
    two = (*CALLED, ChatMessage("tool", "and there", tool_call_id="2"), ASK)
    text = render(CHATML, *two)
    assert "there\n</tool_response>\n<tool_response>\nand there\n" in text
    assert text.count("<|im_start|>user") == 3


def test_result_has_the_name_of_its_tool() -> None:
    source = "{% for m in messages %}{{ m.content }}{{ m.name }};{% endfor %}"
    hermes = SOURCES["NousResearch-Hermes-3-Llama-3.1-8B-tool_use"]
    assert '"name": "go"' in render(hermes, *CALLED)
    assert render(source, ChatMessage("user", "hi", name="Ada")) == "hiAda;"
    without_call = ChatMessage("tool", "there", name="go", tool_call_id="x")
    found = template(hermes).format.found
    messages, _ = ToolPrompt(found).template_input((ASK, without_call), ())
    assert messages[1]["name"] == "go"


@pytest.mark.parametrize("name", [QWEN, LLAMA, NEMO, CHATML, "Qwen3-Coder"])
def test_tools_calls_and_results_forge_no_reserved_token(name: str) -> None:
    control_tokens = ("<|im_end|>", "<|eot_id|>", "[/INST]", "[TOOL_CALLS]", "</s>")

    def special_tokens(evil: str) -> list[int]:
        special = ("<|im_end|>", "<|eot_id|>", "[/INST]", "[TOOL_CALLS]", "</s>")
        backend = WithSpecialTokens(
            FakeBackend({}, 10_000), [SpecialToken(x, True) for x in special]
        )
        made = ChatTemplate(SOURCES.get(name, name), backend, bos="", eos="</s>", adds_bos=False)
        schema = {"type": "object", "properties": {f"x{evil}": {"description": evil}}}
        call = ToolCall("123456789", FunctionCall("go", json.dumps({f"x{evil}": [evil]})))
        messages = (
            ChatMessage("user", f"hi{evil}"),
            ChatMessage("assistant", tool_calls=(call,)),
            ChatMessage("tool", f"x{evil}", tool_call_id=call.id),
        )
        tools = (Tool(Function("go", f"x{evil}", schema)),)
        tokens = made.conversation_prompt(messages, tools, 1).tokens
        assert text_of(backend, tokens).count(evil) >= 5
        return [token for token in tokens if token in backend.special_tokens()]

    innocent = special_tokens("abc")
    for evil in control_tokens:
        assert special_tokens(evil) == innocent


def test_token_that_only_tools_introduce_can_not_be_forged() -> None:
    backend = WithSpecialTokens(
        FakeBackend({}, 10_000), [SpecialToken("<tool_call>", False), START, END]
    )
    made = ChatTemplate(SOURCES[QWEN], backend, bos="", eos="", adds_bos=False)
    typed = ChatMessage("user", "<tool_call>")
    count = [
        sum(backend.special_tokens()[t].text == "<tool_call>" for t in tokens if t >= 1_000_000)
        for messages in ((ASK,), (typed,))
        for tokens in [made.conversation_prompt(messages, TOOLS, 1).tokens]
    ]
    assert count[0] == count[1] > 0


def allows(lark: str | None, answer: str) -> bool:
    assert lark is not None
    return accepts(lark, answer)


def test_forced_call_matches_the_schema_of_a_tool() -> None:
    model_format = template(SOURCES[QWEN]).format
    grammar = model_format.answer_lark(TOOLS, "required", False)
    form = HERMES
    assert allows(grammar, form % '{"name": "go", "arguments": {"x": 12}}')
    assert allows(grammar, form % '{"name": "look", "arguments": {"x": "north"}}')
    assert allows(grammar, form % '{"name": "wait", "arguments": {}}')
    assert not allows(grammar, form % '{"name": "go", "arguments": {"x": "north"}}')
    assert not allows(grammar, form % '{"name": "fly", "arguments": {}}')
    assert not allows(grammar, form % '{"name": "wait", "arguments": {"x": 1}}'), "it has none"
    one = form % '{"name": "wait", "arguments": {}}'
    assert not allows(grammar, f"{one}\n{one}") and not allows(grammar, "hello")
    assert allows(model_format.answer_lark(TOOLS, "required", True), f"{one}\n{one}\n{one}")


def test_tool_can_be_forced_by_name() -> None:
    model_format = template(SOURCES[LLAMA]).format
    grammar = model_format.answer_lark(TOOLS, NamedTool(FunctionName("look")), True)
    assert allows(grammar, '{"name": "look", "parameters": {"x": "north"}}')
    assert not allows(grammar, '{"name": "go", "parameters": {"x": 1}}')


def test_mistral_calls_are_a_list() -> None:
    model_format = template(SOURCES[NEMO]).format
    one = written(NEMO, "wait")
    form = FORMS[NEMO]
    assert allows(model_format.answer_lark(TOOLS, "required", True), form % f"{one}, {one}")
    assert allows(model_format.answer_lark(TOOLS, "required", False), form % one)
    assert not allows(model_format.answer_lark(TOOLS, "required", False), form % f"{one}, {one}")


@pytest.mark.parametrize("vocabulary", ["qwen2", "llama-bpe", "gpt-2"])
@pytest.mark.parametrize("name", [QWEN, LLAMA, NEMO])
def test_call_is_allowed_as_a_real_tokenizer_splits_it(name: str, vocabulary: str) -> None:
    """Also if a token spans the start or the end of the arguments."""
    model_format, words = template(SOURCES[name]).format, load_vocabulary(vocabulary)
    anything = Tool(Function("take", None, {"type": "object", "properties": {"x": {}}}))
    call = written(name, "take", '{"x": ["é \\"a\\" 🙂", {"b": -1.5}, null]}')
    two = {QWEN: f"{call}\n</tool_call>\n<tool_call>\n{call}", LLAMA: call, NEMO: f"{call}, {call}"}
    text = FORMS[name] % two[name]
    lark = model_format.answer_lark((*TOOLS, anything), "required", True)
    assert lark is not None
    grammar = compile_lark(lark, words._vocabulary)
    for token in words.tokenize(text, special=False):
        assert grammar.allows(token) and grammar.allowed()[token], words.piece(token)
        grammar.accept(token)
    assert grammar.may_end


@pytest.mark.parametrize("name", [QWEN, LLAMA, NEMO])
def test_forced_arguments_of_a_recursive_type(name: str) -> None:
    node = {
        "type": "object",
        "properties": {"n": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}},
        "required": ["n"],
    }
    model_format = template(SOURCES[name]).format
    tools = (Tool(Function("f", None, {"$defs": {"N": node}, "$ref": "#/$defs/N"})),)
    lark = model_format.answer_lark(tools, "required", False)
    assert allows(lark, FORMS[name] % written(name, "f", '{"n": {"n": null}}'))
    assert not allows(lark, FORMS[name] % written(name, "f", '{"n": {"m": null}}'))


def test_data_in_an_arguments_schema_is_unchanged() -> None:
    schema = {"properties": {"a": {"const": {"$ref": "#/x"}}}, "required": ["a"]}
    call = template().format.answer_lark((Tool(Function("f", None, schema)),), "required", False)
    form = HERMES % '{"name": "f", "arguments": {"a": {"$ref": "%s"}}}'
    assert allows(call, form % "#/x") and not allows(call, form % "#/$defs/f0/x")


def test_cost_of_all_tools_together_is_bounded() -> None:
    def divided_by(step: int) -> Tool:
        parameters = {"properties": {"n": {"type": "integer", "multipleOf": step}}}
        return Tool(Function(f"f{step}", None, parameters))

    model_format = template().format
    assert model_format.answer_lark([divided_by(9_999)], "required")
    with pytest.raises(ServiceError, match="`tools`.*multipleOf"):
        model_format.answer_lark([divided_by(step) for step in range(9_901, 10_001)], "required")


def test_auto_and_none_force_no_call() -> None:
    model_format = template().format
    assert model_format.answer_lark(TOOLS, "auto", True) is None
    assert model_format.answer_lark(TOOLS, "none", True) is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "mystery"},
        {"$ref": "http://example.com"},
        {"$ref": "#/$defs/none"},
        {"properties": {"a": {"type": "string", "pattern": "(a"}}},
        {"properties": {"a": {"enum": ["x" * 140_000]}}},
    ],
)
def test_invalid_arguments_schema_is_rejected(parameters: dict[str, Any]) -> None:
    model_format, tools = template().format, (Tool(Function("f", None, parameters)),)
    with pytest.raises(ServiceError, match="The field `tools` can't be used"):
        FakeBackend({}).sampler(Sampling(), model_format.answer_lark(tools, "required", False))


def test_strict_tool_with_unenforceable_keyword_is_rejected() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(ServiceError, match="`tools`.*`properties.a.uniqueItems`"):
        template().format.answer_lark((Tool(Function("f", None, schema, True)),), "required", False)
    lax = template().format.answer_lark((Tool(Function("f", None, schema)),), "required", False)
    assert allows(lax, HERMES % '{"name": "f", "arguments": {"a": [1]}}')


def test_schema_may_refer_to_itself() -> None:
    tree = {"type": "object", "properties": {"in": {"$ref": "#"}}, "additionalProperties": False}
    grammar = template().format.answer_lark((Tool(Function("f", None, tree)),), "required", False)
    form = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
    assert allows(grammar, form % '{"in": {"in": {}}}')
    assert not allows(grammar, form % '{"out": {}}')


@pytest.mark.parametrize("arguments", ["[1", "[1]", '{"a":' * 70 + "1" + "}" * 70])
def test_arguments_other_than_objects_are_rendered_unchanged(arguments: str) -> None:
    call = ToolCall("1", FunctionCall("go", arguments))
    called = (ASK, ChatMessage("assistant", tool_calls=(call,)))
    assert f'{{"name": "go", "arguments": {json.dumps(arguments)}}}' in render(QWEN, *called)
    assert f'{{"name": "go", "arguments": {arguments}}}' in render(CHATML, *called)


@pytest.mark.parametrize("arguments", ["", " ", "null", "[]", '""', "{}"])
def test_empty_arguments_become_an_empty_object(arguments: str) -> None:
    call = ToolCall("1", FunctionCall("go", arguments))
    text = render(QWEN, ASK, ChatMessage("assistant", tool_calls=(call,)))
    assert '{"name": "go", "arguments": {}}' in text


def test_mistral_gets_valid_ids_that_match_call_and_result() -> None:
    call = ToolCall("call_abc123def456", FunctionCall("go", '{"x": 1}'))
    result = ChatMessage("tool", "there", tool_call_id=call.id)
    text = render(NEMO, ASK, ChatMessage("assistant", tool_calls=(call,)), result, tools=TOOLS)
    assert "call_abc" not in text
    (of_call,) = re.findall(r'"id": "([a-z0-9]{9})"', text)
    assert text.count(of_call) == 2
    assert '"id": "123456789"' in render(NEMO, *CALLED, tools=TOOLS)


@pytest.mark.parametrize("name", [QWEN, LLAMA, NEMO])
def test_answer_with_schema_and_tools_is_a_call_or_json(name: str) -> None:
    model_format = template(SOURCES[name]).format
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = schema_lark(schema, True, "response_format")
    grammar = model_format.answer_lark(TOOLS, "auto", None, f"answer: {answer}")
    call = written(name, "wait")
    if name == LLAMA:  # a call in any form of JSON, since an answer is JSON, too
        call = '{"name": "wait", "parameters": {}}'
    assert allows(grammar, FORMS[name] % call) and allows(grammar, '{"city": "Rome", "n": 5}')
    assert not allows(grammar, "It is sunny.") and not allows(grammar, '{"town": "Rome"}')
    forced = model_format.answer_lark(TOOLS, "required", None, f"answer: {answer}")
    assert not allows(forced, '{"city": "Rome"}')
    if name == NEMO:
        both = FORMS[name] % f"{call}, {call}"
        assert allows(grammar, both)
        one = model_format.answer_lark(TOOLS, "auto", False, f"answer: {answer}")
        assert not allows(one, both)


def test_invalid_response_format_beside_tools_is_named() -> None:
    form = JsonSchemaFormat(JsonSchema({"type": "mystery"}))
    asked = Sampling(response_format=form)
    call = template().format.answer_lark(TOOLS, "auto", None, request_lark(asked))
    with pytest.raises(ServiceError, match="`response_format` can't be used"):
        FakeBackend({}).sampler(asked, call)


def test_a_grammar_of_a_call_can_be_sampled_with() -> None:
    FakeBackend({}).sampler(Sampling(), template().format.answer_lark(TOOLS, "required", True))
