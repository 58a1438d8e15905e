"""
Tools, calls and results as input of a chat template.

A template's own format is used if it shows all of them. Otherwise the tools are described in the
system prompt, in the format of Hermes models
(https://github.com/NousResearch/Hermes-Function-Calling).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import msgspec

from services.contract import prompts
from services.contract.conversation import ChatMessage, Tool, ToolCall
from services.contract.errors import ServiceError
from services.inference.engine.output.answer_format import HERMES, CallFormat
from services.inference.engine.prompt.argument_grammar import NO_PARAMETERS
from services.inference.engine.prompt.format_probe import FoundFormat
from services.inference.engine.prompt.template_renderer import REASONING, Json

_CALL_ID = re.compile(r"[A-Za-z0-9]{9}\Z")
_EMPTY_ARGUMENTS = ("", "null", '""', "[]", "{}")
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


class ToolPrompt:
    """
    Puts tools, calls and results into a template's input: as the template wants them, or as text if
    it does not show them.
    """

    def __init__(self, found: FoundFormat) -> None:
        self._found = found

    def template_input(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> tuple[list[Json], list[Json]]:
        """Return messages and tools for the template; tools it can't show are in the messages."""
        native = [*_native_messages(messages, self._found)]
        if self._found.is_native and self._found.writes_calls:
            return native, [_native_tool(tool) for tool in tools]
        if self._found.is_native and self._found.answer.calls:
            form = self._found.answer.calls
            written = [_with_calls_as_text(message, form) for message in native]
            return written, [_native_tool(tool) for tool in tools]
        plain = [*_plain_messages(messages, self._found)]
        return (_with_instructions(plain, tools) if tools else plain), []


def _native_tool(tool: Tool) -> Json:
    """Return the tool with the fields that templates expect but callers may leave out."""
    function = tool.function
    parameters = NO_PARAMETERS | (function.parameters or {})
    description = function.description or ""
    fields = {"name": function.name, "description": description, "parameters": parameters}
    return {"type": "function", "function": fields}


def _native_messages(messages: Sequence[ChatMessage], found: FoundFormat) -> Iterator[Json]:
    """Yield messages with reasoning and `tool_calls`, and results with the name of their tool."""
    names: dict[str, str] = {}  # of tools by call id
    ids: dict[str, str] = {}  # that the template accepts, by call id
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        native: Json = {"role": role, "content": message.text}
        if message.name:
            native["name"] = message.name
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            for call in message.tool_calls:
                ids[call.id] = _call_id(call, len(ids), found)
            native["tool_calls"] = [
                _native_call(call, ids[call.id], found) for call in message.tool_calls
            ]
        if message.role == "tool" or message.tool_call_id:
            call_id = message.tool_call_id or ""
            native["tool_call_id"] = ids.get(call_id) or _nine_letters(call_id)
            native["name"] = names.get(call_id, message.name or "")
        yield native | _reasoning_fields(message, found)


def _reasoning_fields(message: ChatMessage, found: FoundFormat) -> Json:
    """Return the template's field for reasoning; the template decides whether to show it."""
    field, reasoning = found.reasoning_field, message.reasoning
    if message.role != "assistant" or not reasoning or not field:
        return {}
    if message.tool_calls and message.text and not found.takes_reasoning_beside:
        return {}
    return {REASONING: reasoning}


def _native_call(call: ToolCall, call_id: str, found: FoundFormat) -> Json:
    arguments = _arguments(call)
    if isinstance(arguments, str) and not found.accepts_text_arguments:
        arguments = {"arguments": arguments}
    if found.wants_text_arguments and not isinstance(arguments, str):
        arguments = _quote(arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _call_id(call: ToolCall, number: int, found: FoundFormat) -> str:
    """Return an id that the template accepts; Kimi K2's are `functions.name:number`."""
    form = found.answer.calls
    if form and form.call_open.endswith("functions."):
        return f"functions.{call.function.name}:{number}"
    return _nine_letters(call.id)


def _nine_letters(given: str) -> str:
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


def _with_calls_as_text(message: Json, form: CallFormat) -> Json:
    """Write the calls of a message into its content, for a template that does not show them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = form.separator.join(
        form.call_open + _written_call(call["function"], form) + form.call_close for call in calls
    )
    content = f"{message['content']}{form.section_open}{written}{form.section_close}"
    return {key: item for key, item in message.items() if key != "tool_calls"} | {
        "content": content
    }


def _written_call(function: Json, form: CallFormat) -> str:
    name, arguments = function["name"], function["arguments"]
    if form.object:
        text = arguments if isinstance(arguments, str) else _quote(arguments)
        written = form.object
        return f"{written.begin}{_quote(name)[1:-1]}{written.middle}{text}{written.end}"
    if isinstance(arguments, str):
        return f"{name}{form.name_end}{arguments}"
    pairs = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"{name}{form.name_end}{pairs}"


def _plain_messages(messages: Sequence[ChatMessage], found: FoundFormat) -> Iterator[Json]:
    """Yield messages with calls as text and results as a user's messages."""
    for is_tool, group in groupby(messages, lambda message: message.role == "tool"):
        if is_tool:
            results = [f"<tool_response>\n{m.text}\n</tool_response>" for m in group]
            yield {"role": "user", "content": "\n".join(results)}
            continue
        others = [*group]
        for native, message in zip(_native_messages(others, found), others, strict=True):
            calls = map(_call_text, message.tool_calls or ())
            native.pop("tool_calls", None)
            yield native | {"content": "\n".join(filter(None, [message.text, *calls]))}


def _call_text(call: ToolCall) -> str:
    arguments = _arguments(call)
    text = arguments if isinstance(arguments, str) else _quote(arguments)
    name = _quote(call.function.name)
    return f'{HERMES.call_open}{{"name": {name}, "arguments": {text}}}{HERMES.call_close}'


def _with_instructions(messages: list[Json], tools: Sequence[Tool]) -> list[Json]:
    """Describe the tools in the first system message, or in one of its own."""
    described = "\n".join(msgspec.json.encode(tool).decode() for tool in tools)
    instructions = _INSTRUCTIONS.format(tools=described)
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    return [{"role": "system", "content": f"{first['content']}\n\n{instructions}"}, *rest]


def _quote(value: Json | str) -> str:
    """Return JSON, which is also a string literal of Lark."""
    return json.dumps(value, ensure_ascii=False)
