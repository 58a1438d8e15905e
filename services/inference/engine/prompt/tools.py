"""
What a model is told of the functions that it may call, and the form in which it writes a call.

A template's own way is taken where its form of a call is one that is read here (its reader is
services/client/tool_calls.py); else they are described in a system text, in Hermes' form.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from services.contract import prompts, schemas
from services.contract.conversation import ChatMessage, NamedTool, Tool, ToolCall, ToolChoice
from services.contract.errors import ServiceError
from services.inference.engine.prompt.marks import Marks
from services.inference.engine.sampling.constraints import check_cost, json_lark

Json = dict[str, Any]
Render = Callable[
    [Sequence[Json], Sequence[Json]], str
]  # of messages and tools, as templates know them

_CALL = re.compile(
    r'(?P<open><tool_call>\s*|\[TOOL_CALLS]\s*\[|)\{\s*"name": ?"(?P<name>[^"]+)",'
    r'\s*"(?P<key>arguments|parameters)": ?\{"'
)
_CALL_ID = re.compile(r"[A-Za-z0-9]{9}\Z")
_NO_ARGUMENTS = ("", "null", '""', "[]", "{}")
_NO_PARAMETERS: Json = {"type": "object", "properties": {}}
_CLOSED: Json = _NO_PARAMETERS | {"additionalProperties": False}
_MANUAL = """\
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
    """How a call is written: `<open>{"name": "f", "<key>": {…}}<close>`."""

    open: str
    key: str
    between: str | None  # of two calls; None where there can be only one
    close: str


HERMES = ToolCallFormat(
    "<tool_call>\n", "arguments", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
)
LIST = ToolCallFormat("[", "arguments", ", ", "]")  # Mistral's; its [TOOL_CALLS] is a control token


class ToolPrompt:
    """
    Of one template, which `render` renders. `sample` is what it makes of functions, if it shows
    them.
    """

    def __init__(self, render: Render) -> None:
        self.sample, self._own_form = _probe(render)

    @property
    def form(self) -> ToolCallFormat:
        return self._own_form or HERMES

    def show(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> tuple[list[Json], list[Json]]:
        """Messages and tools as the template knows them: as few tools as it can show."""
        if self._own_form:
            return [*_told(messages)], [_described(tool) for tool in tools]
        plain = [*_spelled(messages)]
        return ([*_with_manual(plain, tools)] if tools else plain), []

    def call(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        several: bool | None = None,
        answer: str | None = None,
    ) -> str | None:
        """
        Return Lark for an answer that must be a call or, if that is up to the model, for calls or
        `answer`, the Lark of any other answer. None: the answer is not constrained.

        `several` calls are allowed if it is true, or None while no call is forced. Raises
        ServiceError(invalid_request).
        """
        if not tools or choice == "none" or (choice == "auto" and answer is None):
            return None
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        check_cost({"anyOf": [_arguments_schema(tool) for tool in tools]}, "tools")  # of all
        is_forced = choice != "auto"
        form = self.form
        several = not is_forced if several is None else several
        spelled = _json_call if not (is_forced or form.open) else _call_lark
        more = f"({_literal(form.between)} call)*" if several and form.between else ""
        rules = [
            "start: calls" if is_forced else "start: calls | answer",
            f"calls: {_literal(form.open)} call {more} {_literal(form.close)}",
            "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
            *(f"call{number}: {spelled(tool, form.key)}" for number, tool in enumerate(tools)),
        ]
        return "\n".join(rules if is_forced else [*rules, f"answer: {answer}"])


def _probe(render: Render) -> tuple[str, ToolCallFormat | None]:
    """
    What the template makes of functions, calls and results, and its form, if it shows all of them
    in a form that is known.
    """
    mark = Marks()
    name, argument, description, result = map(mark.of, range(4))
    call = {"name": name, "arguments": {argument: 1}}
    tool = {"name": name, "description": description, "parameters": {"type": "object"}}
    messages: list[Json] = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "123456789", "type": "function", "function": call}],
        },
        {"role": "tool", "content": result, "name": name, "tool_call_id": "123456789"},
    ]
    tools: list[Json] = [{"type": "function", "function": tool}]
    try:
        asked, shown = render(messages[:1], tools), render(messages, tools)
    except Exception:  # a template is a program, and can fail in any way
        return "", None
    if set(mark.split(shown).numbers) != set(range(4)):
        return "", None
    found = next((c for c in _CALL.finditer(shown) if c["name"] == name), None)
    if found is None or not shown.startswith(f'{argument}":', found.end()):
        return "", None
    if found["open"].startswith("<"):
        return shown, HERMES
    if found["open"]:
        return shown, LIST
    is_bare = shown.endswith(asked[-8:], 0, found.start())  # right where an answer begins
    return (shown, ToolCallFormat("", found["key"], None, "")) if is_bare else ("", None)


def _described(tool: Tool) -> Json:
    """Templates take for granted what a caller may leave out."""
    function = tool.function
    parameters = _NO_PARAMETERS | (function.parameters or {})
    description = function.description or ""
    shown = {"name": function.name, "description": description, "parameters": parameters}
    return {"type": "function", "function": shown}


def _told(messages: Sequence[ChatMessage]) -> Iterator[Json]:
    names: dict[str, str] = {}
    for message in messages:
        told: Json = {"role": _role(message), "content": message.text}
        if message.name:
            told["name"] = message.name
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            told["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.role == "tool" or message.tool_call_id:
            call_id = message.tool_call_id or ""
            told["tool_call_id"] = _call_id(call_id)
            told["name"] = names.get(call_id, message.name or "")
        yield told


def _call(call: ToolCall) -> Json:
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
    if text.strip() in _NO_ARGUMENTS:
        return {}
    try:
        arguments = msgspec.json.decode(text, type=Json)
        prompts.check_depth("messages", arguments)
    except (msgspec.DecodeError, RecursionError, ServiceError):
        return text
    return arguments


def _spelled(messages: Sequence[ChatMessage]) -> Iterator[Json]:
    """For a template that knows no functions: calls as text, results as a user's messages."""
    for is_tool, group in groupby(messages, lambda message: message.role == "tool"):
        if is_tool:
            results = [f"<tool_response>\n{m.text}\n</tool_response>" for m in group]
            yield {"role": "user", "content": "\n".join(results)}
            continue
        others = [*group]
        for told, message in zip(_told(others), others, strict=True):
            calls = map(_spelled_call, message.tool_calls or ())
            told.pop("tool_calls", None)
            yield told | {"content": "\n".join(filter(None, [message.text, *calls]))}


def _spelled_call(call: ToolCall) -> str:
    arguments = _arguments(call)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(call.function.name, ensure_ascii=False)
    return f'{HERMES.open}{{"name": {name}, "arguments": {text}}}{HERMES.close}'


def _with_manual(messages: list[Json], tools: Sequence[Tool]) -> Iterator[Json]:
    """In the first system message, or one of its own."""
    manual = _MANUAL.format(tools="\n".join(msgspec.json.encode(t).decode() for t in tools))
    first, *rest = messages
    if first["role"] == "system":
        yield {"role": "system", "content": f"{first['content']}\n\n{manual}"}
    else:
        yield {"role": "system", "content": manual}
        yield first
    yield from rest


def _role(message: ChatMessage) -> str:
    return "system" if message.role == "developer" else message.role


def _call_lark(tool: Tool, key: str) -> str:
    """Return Lark for a call of this tool, with the spacing that templates use."""
    name = json.dumps(tool.function.name, ensure_ascii=False)
    begin = f'{{"name": {name}, "{key}": '
    arguments = json_lark(_arguments_schema(tool), bool(tool.function.strict), "tools")
    return f"{_literal(begin)} {arguments} {_literal('}')}"


def _json_call(tool: Tool, key: str) -> str:
    """
    Return Lark for a call as JSON that matches a schema. If only its keys distinguish a call from
    other JSON, both must have the same lexemes.
    """
    arguments = schemas.moved(_arguments_schema(tool), f"/properties/{key}")
    properties = {"name": {"const": tool.function.name}, key: arguments}
    call = {"type": "object", "properties": properties, "required": ["name", key]}
    return json_lark(call | {"additionalProperties": False}, bool(tool.function.strict), "tools")


def _arguments_schema(tool: Tool) -> Json:
    parameters = tool.function.parameters
    return _CLOSED if parameters is None else _of_object(parameters)


def _of_object(parameters: Json) -> Json:
    """Return the schema with `type: object`: arguments are always an object."""
    return {"type": "object"} | parameters


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
