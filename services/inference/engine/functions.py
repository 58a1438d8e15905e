"""
What a model is told of the functions that it may call, and the form in which it writes a call.

A template's own way is taken where its form of a call is one that is read here (its reader is
services/client/tool_calls.py); else they are described in a system text, in Hermes' form.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from services.contract import prompts
from services.contract.conversation import ChatMessage, NamedTool, Tool, ToolCall, ToolChoice
from services.contract.errors import ServiceError
from services.inference.engine.constraints import json_lark
from services.inference.engine.mark import Mark

Json = dict[str, Any]
Render = Callable[
    [Sequence[Json], Sequence[Json]], str
]  # of messages and tools, as templates know them

_CALL = re.compile(
    r'(?P<open><tool_call>\s*|\[TOOL_CALLS]\s*\[|)\{\s*"name": ?"(?P<name>[^"]+)",'
    r'\s*"(?P<key>arguments|parameters)": ?\{"'
)
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


class Form(NamedTuple):
    """How a call is written: `<open>{"name": "f", "<key>": {…}}<close>`."""

    open: str
    key: str
    between: str | None  # of two calls; None where there can be only one
    close: str


HERMES = Form("<tool_call>\n", "arguments", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")
LIST = Form("[", "arguments", ", ", "]")  # Mistral's; its [TOOL_CALLS] is a control token


class Functions:
    """
    Of one template, which `render` renders. `sample` is what it makes of functions, if it shows
    them.
    """

    def __init__(self, render: Render) -> None:
        self.sample, self._own_form = _probe(render)

    @property
    def form(self) -> Form:
        return self._own_form or HERMES

    def show(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> tuple[list[Json], list[Json]]:
        """Messages and tools as the template knows them: as few tools as it can show."""
        if self._own_form:
            return [*_told(messages)], [_described(tool) for tool in tools]
        plain = [*_spelled(messages)]
        return ([*_with_manual(plain, tools)] if tools else plain), []

    def call(self, tools: Sequence[Tool], choice: ToolChoice, several: bool) -> str | None:
        """
        Return Lark for an answer that must be a call, or several, if it must be one. Raises
        ServiceError(invalid_request).
        """
        if choice in ("none", "auto"):
            return None
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        form = self.form
        more = f"({_literal(form.between)} call)*" if several and form.between else ""
        rules = [
            f"start: {_literal(form.open)} call {more} {_literal(form.close)}",
            "call: " + " | ".join(f"call{number}" for number in range(len(tools))),
            *(_call_lark(number, tool, form.key) for number, tool in enumerate(tools)),
        ]
        return "\n".join(rules)


def _probe(render: Render) -> tuple[str, Form | None]:
    """
    What the template makes of functions, calls and results, and its form, if it shows all of them
    in a form that is known.
    """
    mark = Mark()
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
    return (shown, Form("", found["key"], None, "")) if is_bare else ("", None)


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
        if message.tool_call_id:
            told["tool_call_id"] = message.tool_call_id
            told["name"] = names.get(message.tool_call_id, message.name or "")
        yield told


def _call(call: ToolCall) -> Json:
    function = {"name": call.function.name, "arguments": _arguments(call)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(call: ToolCall) -> Json:
    """Raises ServiceError(invalid_request)."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=Json)
        prompts.check_depth("messages", arguments)
        return arguments
    except (msgspec.DecodeError, RecursionError) as error:
        raise ServiceError(
            "invalid_request",
            f"The arguments of the call {call.id!r} in `$.messages` are no JSON object: {error}.",
        ) from error


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
    said = {"name": call.function.name, "arguments": _arguments(call)}
    return HERMES.open + json.dumps(said, ensure_ascii=False) + HERMES.close


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


def _call_lark(number: int, tool: Tool, key: str) -> str:
    """Return the rule of a call of this tool, spelled as templates spell calls."""
    function = tool.function
    begin = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{key}": '
    schema = _CLOSED if function.parameters is None else _of_object(function.parameters)
    arguments = json_lark(schema, bool(function.strict), "tools")
    return f"call{number}: {_literal(begin)} {arguments} {_literal('}')}"


def _of_object(parameters: Json) -> Json:
    """Arguments are an object, also where the schema does not say so."""
    return {"type": "object"} | parameters


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
