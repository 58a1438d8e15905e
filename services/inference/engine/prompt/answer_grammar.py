"""
The grammar of answers in a model's own form, in llguidance's Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from services.contract.conversation import NamedTool, Tool, ToolChoice
from services.contract.messages import Channel
from services.inference.engine.output.answer_format import (
    HERMES,
    ID,
    KEY,
    NAME,
    AnswerFormat,
    ArgumentFormat,
    ObjectFormat,
)
from services.inference.engine.output.call_values import property_schema, types_of
from services.inference.engine.sampling.constraints import check_cost, schema_lark
from services.inference.engine.sampling.json_schema import rebase_refs

Json = dict[str, Any]

NO_PARAMETERS: Json = {"type": "object", "properties": {}}
_SPACES = r"/[ \n]{0,4}/"
_ANY_KEY = r"/[A-Za-z_][A-Za-z0-9_-]{0,63}/"
_PYTHON_STRING = r"/'(?:[^'\\\n\r]|\\[\\'nrt])*'/"
_NUMBER = r"/-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?/"
_ROOT = "tool_parameters"
_PLAIN_SCHEMA = {"type", "description", "title", "default", "examples", "format"}


class AnswerGrammar:
    """
    Writes the Lark of one answer. `tokens` are the control tokens of markers by their text; `ends`
    are the texts of tokens that end an answer, which a grammar leaves out.
    """

    def __init__(
        self, form: AnswerFormat, tokens: Mapping[str, int], ends: Iterable[str] = ()
    ) -> None:
        self._form = form
        self._calls = form.calls or HERMES
        self._tokens = tokens
        texts = sorted({*tokens, *ends, ID}, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, texts))})")
        self._ends = frozenset(ends)
        self._rules: list[str] = []

    def lark(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        parallel: bool | None,
        response: str | None,
        channel: Channel,
        may_reason: bool,
    ) -> str | None:
        has_calls = bool(tools) and choice != "none"
        if response is None and (not has_calls or choice == "auto"):
            return None
        answers = []
        if has_calls:
            if isinstance(choice, NamedTool):
                tools = [tool for tool in tools if tool.function.name == choice.function.name]
            check_cost({"anyOf": [arguments_schema(tool) for tool in tools]}, "tools")
            is_forced = choice != "auto"
            self._add_calls(tools, not is_forced if parallel is None else parallel, is_forced)
            answers.append("calls")
        if response is not None and (choice == "auto" or not has_calls):
            is_begun = channel == "content" and not may_reason
            self._rules += [f"content: {self._content('answer', is_begun)}", response]
            answers.append("content")
        thought = self._thought(channel, may_reason)
        return "\n".join([f"start: {thought} ({' | '.join(answers)})", *self._rules])

    # text

    def text(self, literal: str) -> str:
        """Return Lark for a text of the template, in which markers become their tokens."""
        parts = []
        for part in self._split.split(literal):
            if part in self._tokens:
                parts.append(f"<[{self._tokens[part]}]>")
            elif part == ID:
                parts.append("/[A-Za-z0-9]{1,9}/")
            elif part and part not in self._ends:
                parts.append(quote(part))
        return " ".join(parts) or '""'

    def _until(self, name: str, end: str) -> str:
        """Return Lark for any text up to its end, and the end."""
        stripped = end.strip()
        first = self._split.split(stripped)
        if first[0] == "" and len(first) > 1 and first[1] in self._tokens:
            return f"/(?s:.*)/ {self.text(stripped)}"
        text = first[0]
        rule = f"{name}_text"
        self._rules.append(f"{rule}[lazy]: /(?s:.*){_regex(text)}/")
        return f"{rule} {self.text(stripped[len(text) :])}"

    def _thought(self, channel: Channel, may_reason: bool) -> str:
        reasoning = self._form.reasoning
        if reasoning is None or channel == "content" and not may_reason:
            return ""
        closed = self._until("thought", reasoning.end)
        turn = self._form.next_turn
        after = self.text(turn) if turn else ""
        spaces = "" if self._form.header else _SPACES  # a header may begin with a space
        if channel == "reasoning":
            return f"{closed} {after} {spaces}"
        start = reasoning.start if self._form.header else reasoning.start.strip()
        return f"({spaces} {self.text(start)} {closed} {after} {spaces})?"

    def _content(self, response: str, is_begun: bool) -> str:
        """Return Lark for a response in content, which the prompt may have begun."""
        form = self._form
        if form.header:
            optional = "?" if is_begun else ""
            return f"({self.text(form.header.content)}){optional} {response}"
        if not form.content_start:
            return response
        start, end = self.text(form.content_start), self.text(form.content_end)
        return f"({start})? {response} ({end})?"

    # calls

    def _add_calls(self, tools: Sequence[Tool], is_parallel: bool, is_forced: bool) -> None:
        form, header = self._calls, self._form.header
        if header and header.call:
            self._add_header_calls(tools)
            return
        is_marked = bool((form.section_open + form.call_open).strip())
        opened = (form.section_open + form.call_open).lstrip()
        call = f"{self.text(opened)} call {self.text(form.call_close.rstrip())}"
        section_close = self.text(form.section_close.rstrip())
        more = ""
        if is_parallel and form.can_repeat and not header:
            spaces = form.call_close[len(form.call_close.rstrip()) :]
            between = self.text(spaces + form.separator + form.call_open)
            more = f"({between} call {self.text(form.call_close.rstrip())})*"
        if form.section_close.strip():
            spaces = form.call_close[len(form.call_close.rstrip()) :]
            section_close = self.text(spaces + form.section_close.rstrip())
        is_bare = not is_forced and not is_marked
        if header:
            self._rules += self._calls_of_messages(tools, call, section_close)
        elif is_marked:
            empty = self.text(self._form.content_start) + " " + self.text(self._form.content_end)
            before = f"({empty})? {_SPACES}" if self._form.content_start else _SPACES
            self._rules.append(f"calls: {before} {call} {more} {section_close}")
        else:
            self._rules.append(f"calls: {call} {more} {section_close}")
        names = [f"call{number}" for number in range(len(tools))]
        self._rules.append(f"call: {' | '.join(names)}")
        for name, tool in zip(names, tools, strict=True):
            self._rules.append(f"{name}: {self._call(name, tool, is_bare)}")

    def _calls_of_messages(self, tools: Sequence[Tool], call: str, section_close: str) -> list[str]:
        header = self._form.header
        assert header
        names = " | ".join(quote(tool.function.name) for tool in tools)
        before, after = header.call_header.split(NAME)
        return [
            f"calls: {self.text(before)} recipient {self.text(after)} {call} {section_close}",
            f"recipient: {names}",
        ]

    def _add_header_calls(self, tools: Sequence[Tool]) -> None:
        header = self._form.header
        assert header
        names = [f"call{number}" for number in range(len(tools))]
        self._rules.append(f"calls: {' | '.join(names)}")
        for name, tool in zip(names, tools, strict=True):
            head = header.call_header.replace(NAME, tool.function.name)
            self._rules.append(f"{name}: {self.text(head)} {_json_arguments(tool)}")

    def _call(self, rule: str, tool: Tool, is_bare: bool) -> str:
        form, name = self._calls, quote(tool.function.name)
        if form.object and is_bare:
            return _json_call(tool, form.object)
        if form.object:
            written = form.object
            return (
                f"{self.text(written.begin + _inside_json(tool.function.name) + written.middle)}"
                f" {_json_arguments(tool)} {self.text(written.end)}"
            )
        if form.argument is None:
            return f"{name} {self.text(form.name_end)} {_json_arguments(tool)}"
        arguments = self._arguments(rule, tool, form.argument)
        return f"{name} {self.text(form.name_end)} {arguments}"

    # arguments one by one

    def _arguments(self, rule: str, tool: Tool, argument: ArgumentFormat) -> str:
        parameters = arguments_schema(tool)
        properties = parameters.get("properties") or {}
        required = set(parameters.get("required") or ())
        if not properties:
            if parameters.get("additionalProperties") is False or tool.function.parameters is None:
                return ""
            any_one = self._argument(f"{rule}_any", None, argument, parameters, tool)
            return f"({any_one})*" if not argument.separator.strip() else f"({any_one})?"
        keys = sorted(properties) if argument.syntax == "gemma" else list(properties)
        for number, key in enumerate(keys):
            text = self._argument(f"{rule}_{number}", key, argument, parameters, tool)
            self._rules.append(f"{rule}_{number}: {text}")
        return self._sequence(rule, [key in required for key in keys], argument)

    def _sequence(self, rule: str, is_required: Sequence[bool], argument: ArgumentFormat) -> str:
        """Return Lark for the required arguments and any of the others, in this order."""
        separator = self.text(argument.separator) if argument.separator else ""
        if not argument.separator.strip():
            names = (
                f"{rule}_{i}" if each else f"({rule}_{i})?" for i, each in enumerate(is_required)
            )
            return f" {separator} ".join(names)
        count = len(is_required)
        self._rules.append(f'{rule}_rest{count}: ""')
        for i, each in enumerate(is_required[1:], start=1):
            one = f"{separator} {rule}_{i}"
            self._rules.append(f"{rule}_rest{i}: {one if each else f'({one})?'} {rule}_rest{i + 1}")
        firsts = list(is_required).index(True) + 1 if True in is_required else count
        starts = " | ".join(f"{rule}_{i} {rule}_rest{i + 1}" for i in range(firsts))
        return f"({starts})" if True in is_required else f"({starts})?"

    def _argument(
        self, rule: str, key: str | None, argument: ArgumentFormat, parameters: Json, tool: Tool
    ) -> str:
        schema = property_schema(parameters, key) if key is not None else None
        types = types_of(schema)
        name = quote(key) if key is not None else _ANY_KEY
        head = f"{self.text(argument.open)} {name} {self.text(argument.mid_of(types))}"
        if argument.syntax == "xml" and key is None:
            return f"{head} /[^<\\]]*/ {self.text(argument.close.replace(KEY, 'x'))}"
        close = argument.close.replace(KEY, key or "")
        return f"{head} {self._value(rule, schema, types, argument, close, parameters, tool)}"

    def _value(
        self,
        rule: str,
        schema: Mapping[str, Any] | None,
        types: set[str] | None,
        argument: ArgumentFormat,
        close: str,
        parameters: Json,
        tool: Tool,
    ) -> str:
        """Return Lark for a value and the marker that closes it."""
        end = self.text(close)
        strings = _strings(schema)
        if argument.syntax == "python":
            return f"({self._python_value(schema, types, strings, parameters, tool)}) {end}"
        if types and types <= {"integer", "number", "boolean", "null"}:
            return f"{_property_json(schema or {}, parameters, tool)} {end}"
        if argument.syntax == "gemma":
            return f"({self._gemma_value(types, strings)}) {end}"
        if strings is not None:
            return f"({' | '.join(map(quote, strings))}) {end}"
        if not types or "string" in types:
            leading = close[: len(close) - len(close.lstrip())]
            text = self._until(rule, close)
            trailing = close[len(close.rstrip()) :]
            assert leading is not None
            return f"{text} {self.text(trailing)}" if trailing else text
        return f"{_property_json(schema or {}, parameters, tool)} {end}"

    def _python_value(
        self,
        schema: Mapping[str, Any] | None,
        types: set[str] | None,
        strings: Sequence[str] | None,
        parameters: Json,
        tool: Tool,
    ) -> str:
        if strings is not None:
            return " | ".join(quote(_python_string(each)) for each in strings)
        if types is None or types == {"string"}:
            return _PYTHON_STRING
        known = {"boolean": '"True" | "False"', "null": '"None"', "string": _PYTHON_STRING}
        parts = [known[each] for each in sorted(types) if each in known]
        if len(parts) < len(types):
            parts.append(_property_json(schema or {}, parameters, tool))
        return " | ".join(parts)

    def _gemma_value(self, types: set[str] | None, strings: Sequence[str] | None) -> str:
        mark = self.text('<|"|>')
        if strings is not None:
            return " | ".join(f"{mark} {quote(each)} {mark}" for each in strings)
        self._add_gemma_rules(mark)
        known = {
            "string": "gemma_string",
            "object": "gemma_object",
            "array": "gemma_array",
        }
        return " | ".join(known.get(each, "gemma_value") for each in sorted(types or {"any"}))

    def _add_gemma_rules(self, mark: str) -> None:
        if any(rule.startswith("gemma_value:") for rule in self._rules):
            return
        literal = '<|"|>'
        text = f"{mark} /(?s:.*)/ {mark}"
        if literal not in self._tokens:
            self._rules.append(f"gemma_text[lazy]: /(?s:.*){_regex(literal)}/")
            text = f"{mark} gemma_text"
        self._rules += [
            f"gemma_string: {text}",
            f'gemma_value: gemma_string | {_NUMBER} | "true" | "false" | "null"'
            " | gemma_object | gemma_array",
            'gemma_object: "{" (gemma_pair ("," gemma_pair)*)? "}"',
            f'gemma_pair: {_ANY_KEY} ":" gemma_value',
            'gemma_array: "[" (gemma_value ("," gemma_value)*)? "]"',
        ]


def arguments_schema(tool: Tool) -> Json:
    """Return the parameters as a schema of an object, which arguments always are."""
    parameters = tool.function.parameters
    if parameters is None:
        return NO_PARAMETERS | {"additionalProperties": False}
    return {"type": "object"} | parameters


def quote(value: Json | str) -> str:
    """Return JSON, which is also a string literal of Lark."""
    return json.dumps(value, ensure_ascii=False)


def _inside_json(text: str) -> str:
    return quote(text)[1:-1]


def _regex(literal: str) -> str:
    escaped = re.sub(r"([\\^$.|?*+()\[\]{}/\-])", r"\\\1", literal)
    return escaped.replace("\n", "\\n")


def _json_arguments(tool: Tool) -> str:
    return schema_lark(arguments_schema(tool), bool(tool.function.strict), "tools")


def _json_call(tool: Tool, form: ObjectFormat) -> str:
    """
    Return Lark for a call as JSON that matches a schema. If only its keys distinguish a call from
    other JSON, both must have the same lexemes.
    """
    key = form.arguments_key
    arguments = rebase_refs(arguments_schema(tool), f"/properties/{key}")
    properties = {form.name_key: {"const": tool.function.name}, key: arguments}
    call = {"type": "object", "properties": properties, "required": [form.name_key, key]}
    closed = call | {"additionalProperties": False}
    return schema_lark(closed, bool(tool.function.strict), "tools")


def _strings(schema: Mapping[str, Any] | None) -> list[str] | None:
    """Return the only strings that a schema allows, if it lists them."""
    if schema is None:
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        return None
    return values or None


def _property_json(schema: Mapping[str, Any], parameters: Json, tool: Tool) -> str:
    """Return Lark for JSON of a property, whose `$ref`s point into the parameters."""
    own = dict(schema)
    if "$ref" in json.dumps(own):
        rebased = rebase_refs(parameters, f"/$defs/{_ROOT}")
        key = next(
            (k for k in rebased["properties"] if property_schema(parameters, k) == schema), ""
        )
        own = {"$ref": f"#/$defs/{_ROOT}/properties/{key}", "$defs": {_ROOT: rebased}}
    return schema_lark(own, bool(tool.function.strict), "tools")


def _python_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "'" + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + "'"
