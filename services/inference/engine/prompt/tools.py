"""
Tools in prompts, and the grammar of tool calls.

A template's own format is used if services/client/tool_calls.py can parse the calls that it asks
for. Otherwise the tools are described in the system prompt, in the format of Hermes models
(https://github.com/NousResearch/Hermes-Function-Calling).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import msgspec

from services.contract import prompts
from services.contract.conversation import (
    ChatMessage,
    Function,
    FunctionCall,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)
from services.contract.errors import ServiceError
from services.inference.engine.prompt.template_renderer import Json, Placeholders
from services.inference.engine.sampling.constraints import check_cost, schema_lark
from services.inference.engine.sampling.json_schema import rebase_refs

Render = Callable[[Sequence[Json], Sequence[Json]], str]  # messages and tools to a prompt

_CALL = re.compile(
    r'(?P<open><tool_call>\s*|\[TOOL_CALLS]\s*\[|)\{\s*"name": ?"(?P<name>[^"]+)",'
    r'\s*"(?P<key>arguments|parameters)": ?\{"'
)
_CALL_ID = re.compile(r"[A-Za-z0-9]{9}\Z")
_EMPTY_ARGUMENTS = ("", "null", '""', "[]", "{}")
_NO_PARAMETERS: Json = {"type": "object", "properties": {}}
_INSTRUCTIONS = """\
You may call functions. They are given within <tools></tools>, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON within <tool_call></tool_call>, and \
nothing else:
<tool_call>
{{"name": "<name>", "arguments": {{<arguments>}}}}
</tool_call>"""


class ToolCallFormat(NamedTuple):
    """How calls are written: `<open>{"name": "f", "<key>": {…}}<close>`."""

    open: str
    key: str
    separator: str | None  # between calls; None if there can be only one
    close: str


HERMES = ToolCallFormat(
    "<tool_call>\n", "arguments", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
)
MISTRAL = ToolCallFormat("[", "arguments", ", ", "]")  # after [TOOL_CALLS], a control token


class ToolPrompt:
    """
    The tool format of one template, found by rendering a probe. `sample` is the rendered probe, or
    empty if the template's own format is not used.
    """

    def __init__(self, render: Render) -> None:
        self.sample, self._own_format = _probe(render)

    @property
    def call_format(self) -> ToolCallFormat:
        return self._own_format or HERMES

    def template_input(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> tuple[list[Json], list[Json]]:
        """Return messages and tools for the template; tools it can't show are in the messages."""
        if self._own_format:
            return [*_native_messages(messages)], [_native_tool(tool) for tool in tools]
        plain = [*_plain_messages(messages)]
        return (_with_instructions(plain, tools) if tools else plain), []

    def call_grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        parallel: bool | None = None,
        response: str | None = None,
    ) -> str | None:
        """
        Return Lark for an answer that must be a call or, if the model may choose, for calls or
        `response`, the Lark of any other answer. None: the answer is not constrained.

        Several calls are allowed if `parallel` is true, or None and no call is forced. Raises
        ServiceError(invalid_request) for a schema that can't be used.
        """
        if not tools or choice == "none" or (choice == "auto" and response is None):
            return None
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        check_cost({"anyOf": [_arguments_schema(tool) for tool in tools]}, "tools")
        is_forced = choice != "auto"
        form = self.call_format
        call_lark = _json_call_lark if not (is_forced or form.open) else _spaced_call_lark
        is_parallel = not is_forced if parallel is None else parallel
        more = f"({_quote(form.separator)} call)*" if is_parallel and form.separator else ""
        rules = [
            "start: calls" if is_forced else f"start: calls | answer\nanswer: {response}",
            f"calls: {_quote(form.open)} call {more} {_quote(form.close)}",
            "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
            *(f"call{number}: {call_lark(tool, form.key)}" for number, tool in enumerate(tools)),
        ]
        return "\n".join(rules)


def _probe(render: Render) -> tuple[str, ToolCallFormat | None]:
    """
    Return a rendered conversation with tools, and the template's format if it shows tools, calls
    and results in a known one.
    """
    placeholders = Placeholders()
    name, argument, description, result = (placeholders[i] for i in range(4))
    call = ToolCall("123456789", FunctionCall(name, json.dumps({argument: 1})))
    conversation = (
        ChatMessage("user", "x"),
        ChatMessage("assistant", tool_calls=(call,)),
        ChatMessage("tool", result, tool_call_id=call.id),
    )
    messages = [*_native_messages(conversation)]
    tools = [_native_tool(Tool(Function(name, description, {"type": "object"})))]
    try:
        question, sample = render(messages[:1], tools), render(messages, tools)
    except Exception:  # a template is a program, and can fail in any way
        return "", None
    _, numbers = placeholders.split(sample)
    found = next((c for c in _CALL.finditer(sample) if c["name"] == name), None)
    if set(numbers) != set(range(4)) or found is None:
        return "", None
    if not sample.startswith(f'{argument}":', found.end()):
        return "", None
    if found["open"]:
        return sample, HERMES if found["open"].startswith("<") else MISTRAL
    starts_answer = sample.endswith(question[-8:], 0, found.start())
    return (sample, ToolCallFormat("", found["key"], None, "")) if starts_answer else ("", None)


def _native_tool(tool: Tool) -> Json:
    """Return the tool with the fields that templates expect but callers may leave out."""
    function = tool.function
    parameters = _NO_PARAMETERS | (function.parameters or {})
    description = function.description or ""
    fields = {"name": function.name, "description": description, "parameters": parameters}
    return {"type": "function", "function": fields}


def _native_messages(messages: Sequence[ChatMessage]) -> Iterator[Json]:
    """Yield messages with `tool_calls`, and results with the name of their tool."""
    names: dict[str, str] = {}  # of tools by call id
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        native: Json = {"role": role, "content": message.text}
        if message.name:
            native["name"] = message.name
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            native["tool_calls"] = [_native_call(call) for call in message.tool_calls]
        if message.role == "tool" or message.tool_call_id:
            call_id = message.tool_call_id or ""
            native["tool_call_id"] = _call_id(call_id)
            native["name"] = names.get(call_id, message.name or "")
        yield native


def _native_call(call: ToolCall) -> Json:
    function = {"name": call.function.name, "arguments": _arguments(call)}
    return {"id": _call_id(call.id), "type": "function", "function": function}


def _call_id(given: str) -> str:
    """
    Return an id that every template accepts: Mistral's raise unless it has nine letters or digits,
    so a conversation from another server could not continue here.
    """
    return given if _CALL_ID.match(given) else hashlib.sha256(given.encode()).hexdigest()[:9]


def _arguments(call: ToolCall) -> Json | str:
    """
    Return the arguments as an object, as templates expect, or as the model's own text if that is
    not an object: so the model sees its mistake unchanged.
    """
    text = call.function.arguments
    if text.strip() in _EMPTY_ARGUMENTS:
        return {}
    try:
        arguments = msgspec.json.decode(text, type=Json)
        prompts.check_depth("messages", arguments)
    except (msgspec.DecodeError, RecursionError, ServiceError):
        return text
    return arguments


def _plain_messages(messages: Sequence[ChatMessage]) -> Iterator[Json]:
    """Yield messages with calls as text and results as a user's messages."""
    for is_tool, group in groupby(messages, lambda message: message.role == "tool"):
        if is_tool:
            results = [f"<tool_response>\n{m.text}\n</tool_response>" for m in group]
            yield {"role": "user", "content": "\n".join(results)}
            continue
        others = [*group]
        for native, message in zip(_native_messages(others), others, strict=True):
            calls = map(_call_text, message.tool_calls or ())
            native.pop("tool_calls", None)
            yield native | {"content": "\n".join(filter(None, [message.text, *calls]))}


def _call_text(call: ToolCall) -> str:
    arguments = _arguments(call)
    text = arguments if isinstance(arguments, str) else _quote(arguments)
    name = _quote(call.function.name)
    return f'{HERMES.open}{{"name": {name}, "arguments": {text}}}{HERMES.close}'


def _with_instructions(messages: list[Json], tools: Sequence[Tool]) -> list[Json]:
    """Describe the tools in the first system message, or in one of its own."""
    described = "\n".join(msgspec.json.encode(tool).decode() for tool in tools)
    instructions = _INSTRUCTIONS.format(tools=described)
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    return [{"role": "system", "content": f"{first['content']}\n\n{instructions}"}, *rest]


def _spaced_call_lark(tool: Tool, key: str) -> str:
    """Return Lark for a call of this tool, with the spacing that templates use."""
    begin = f'{{"name": {_quote(tool.function.name)}, "{key}": '
    arguments = schema_lark(_arguments_schema(tool), bool(tool.function.strict), "tools")
    return f"{_quote(begin)} {arguments} {_quote('}')}"


def _json_call_lark(tool: Tool, key: str) -> str:
    """
    Return Lark for a call as JSON that matches a schema. If only its keys distinguish a call from
    other JSON, both must have the same lexemes.
    """
    arguments = rebase_refs(_arguments_schema(tool), f"/properties/{key}")
    properties = {"name": {"const": tool.function.name}, key: arguments}
    call = {"type": "object", "properties": properties, "required": ["name", key]}
    closed = call | {"additionalProperties": False}
    return schema_lark(closed, bool(tool.function.strict), "tools")


def _arguments_schema(tool: Tool) -> Json:
    """Return the parameters as a schema of an object, which arguments always are."""
    parameters = tool.function.parameters
    if parameters is None:
        return _NO_PARAMETERS | {"additionalProperties": False}
    return {"type": "object"} | parameters


def _quote(value: Json | str) -> str:
    """Return JSON, which is also a string literal of Lark."""
    return json.dumps(value, ensure_ascii=False)
