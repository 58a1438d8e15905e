"""
Translates a body as clients send it to one that the types of `bodies` decode. Takes
`{name: Raw}`, returns `{name: Raw or JSON}`, and decodes only what it has to change.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Raw, Struct

from services.contract.errors import ServiceError
from services.edge import sizes
from services.edge.api import fields
from services.edge.api.bodies import MAX_PROMPTS
from services.edge.api.fields import Fields

Object = dict[str, Raw]
T = TypeVar("T")

MAX_MESSAGES = 10_000
MAX_OBJECTS = 4_000
"""Limit of messages (if any needs translation), parts, calls and tools, handled one by one."""
MAX_LIMIT = 1_000_000  # tokens; a larger max_tokens means the same
MAX_INTEGER = 2**63
LARGEST = 10**300  # that becomes a float
SEEDS = 2**32 - 1
LIKELIEST = 1e-6  # a top_p that leaves one token; other servers take 0 for that
NOTHING = {b"null", b"false", b'""', b"[]", b"{}"}
NULL = b"null"
_IDS, _LISTS = re.compile(rb"\[\s*-?\d"), re.compile(rb"\[\s*\[")
_NUMBERS = re.compile(r"\[\d+\]")
_ESCAPES = re.compile(r"\\[\\bf]")
GBNF_ESCAPES = {r"\b": r"\u0008", r"\f": r"\u000c"}


class _Plain(Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_call_id: str | None = None


class Translation:
    """Translates one body. `ignored` maps fields without effect to whether they are known."""

    def __init__(self) -> None:
        self.ignored: dict[str, bool] = {}
        self._noted: set[tuple[int, str]] = set()
        self._objects = 0

    def chat(self, given: Object) -> dict[str, Any]:
        """Raises ServiceError."""
        body = self._body(given, fields.CHAT)
        if "messages" in body:
            body["messages"] = self._messages(body["messages"])
        if tools := self._tools(body.pop("tools", None)):
            body["tools"] = tools
        self._choose_tool(body)
        if body.get("top_logprobs") == 0 and body.get("logprobs") is not True:
            del body["top_logprobs"]
        return body

    def text(self, given: Object) -> dict[str, Any]:
        """Raises ServiceError."""
        body = self._body(given, fields.TEXT)
        if "prompt" in body:
            body["prompt"] = _prompts(bytes(body["prompt"]))
        return body

    def keep(self, given: Object, kind: Fields, path: str) -> dict[str, Any]:
        """
        Return the honoured fields that are not null, and note the ignored ones. Raises
        ServiceError(invalid_request) for a refused field.
        """
        sizes.check_fields(given, path)
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if name in kind.honoured:
                if bytes(value) != NULL:
                    kept[name] = value
            elif instead := kind.refused.get(name):
                if bytes(value).strip() not in NOTHING:
                    raise _refusal(f"The field `{name}` is not supported: {instead}", path)
            elif (id(kind), name) not in self._noted and bytes(value).strip() not in NOTHING:
                self._noted.add((id(kind), name))
                self.ignored[_place(f"{path}.{name}")] = name in kind.harmless
        return kept

    def _count(self, objects: Sequence[Any]) -> None:
        """Raises ServiceError(payload_too_large)."""
        self._objects += len(objects)
        if self._objects > MAX_OBJECTS:
            raise sizes.too_many(
                f"The body has more than {MAX_OBJECTS:,} messages, parts, calls and tools"
            )

    def _body(self, given: Object, kind: Fields) -> dict[str, Any]:
        body = self.keep(given, kind, "$")
        sizes.check_sizes(body)
        for name, value in VALUES.items():
            if name in body:
                body[name] = value(_decode(body[name], Any, f"$.{name}"))
        body = {name: value for name, value in body.items() if value is not None}
        for other, name in fields.SYNONYMS.items():
            if other in body:
                body.setdefault(name, body.pop(other))
        if "stream_options" in body:
            options = _decode(body["stream_options"], Object, "$.stream_options")
            body["stream_options"] = self.keep(options, fields.STREAM_OPTIONS, "$.stream_options")
        self._form(body)
        return body

    def _form(self, body: dict[str, Any]) -> None:
        """Translate every field for the format of the answer to response_format or grammar."""
        given = [name for name in ("response_format", *fields.FORMS) if name in body]
        found = [form for name in given if (form := self._form_of(name, body.pop(name)))]
        if len(found) > 1:
            raise _refusal(
                f"The field `{given[-1]}` sets the format of the answer, and so does"
                f" `{given[0]}`: remove one of them",
                "$",
            )
        if found:
            body |= found[0]

    def _form_of(self, name: str, value: Raw) -> dict[str, Any] | None:
        match name:
            case "response_format":
                return self._response_format(_decode(value, Object, "$.response_format"))
            case "json_schema" | "guided_json":
                return _json_form(value, f"$.{name}")
            case "guided_choice":
                return _choice_form(_decode(value, list[str], f"$.{name}"))
            case "guided_grammar":
                return {"grammar": value}
        path = f"$.{name}"
        given = self.keep(_decode(value, Object, path), fields.OUTPUTS, path)
        asked = [key for key, part in given.items() if bytes(part) not in NOTHING]
        if len(asked) > 1:
            raise _refusal(f"The field `{name}` sets the format of the answer more than once", "$")
        match asked:
            case ["json"]:
                return _json_form(given["json"], f"{path}.json")
            case ["choice"]:
                return _choice_form(_decode(given["choice"], list[str], f"{path}.choice"))
            case ["grammar"]:
                return {"grammar": given["grammar"]}
            case ["json_object"]:
                return {"response_format": {"type": "json_object"}}
        return None

    def _response_format(self, given: Object) -> dict[str, Any] | None:
        path = "$.response_format"
        form = self.keep(given, fields.FORMAT, path)
        kind = bytes(form.get("type", b""))
        if kind == b'"text"':
            return None
        if kind == b'"json_object"' and "schema" in form or kind == b'"json_schema"':
            if "json_schema" not in form and "schema" in form:
                return _json_form(form["schema"], f"{path}.schema")
            if "json_schema" in form:
                path += ".json_schema"
                schema = _decode(form["json_schema"], Object, path)
                form["json_schema"] = {"name": "answer", **self.keep(schema, fields.SCHEMA, path)}
        return {"response_format": {k: v for k, v in form.items() if k != "schema"}}

    def _messages(self, given: Raw) -> Any:
        if _are_plain(given):
            return given
        messages = _decode(given, list[Object], "$.messages")
        if len(messages) > MAX_MESSAGES:
            raise _refusal(f"There are more than {MAX_MESSAGES:,} messages", "$.messages")
        self._count(messages)
        return [
            self._message(message, f"$.messages[{number}]")
            for number, message in enumerate(messages)
        ]

    def _message(self, given: Object, path: str) -> dict[str, Any]:
        message = self.keep(given, fields.MESSAGE, path)
        if bytes(message.get("role", b"")) == b'"function"':
            message["role"] = "tool"
        refusal = message.pop("refusal", None)
        if "content" in message:
            message["content"] = self._content(message["content"], f"{path}.content")
        elif refusal is not None:
            message["content"] = refusal
        elif "content" in given:  # null
            message["content"] = ""
        if "tool_call_id" in message:
            message["tool_call_id"] = _text(message["tool_call_id"])
        self._calls(message, path)
        return message

    def _content(self, given: Raw, path: str) -> Any:
        match bytes(given)[:1]:
            case b"[":
                parts = _decode(given, list[Raw], path)
                self._count(parts)
                read = (self._part(part, f"{path}[{n}]") for n, part in enumerate(parts))
                return [part for part in read if part is not None]
            case b"{":  # a tool's result
                return _text(given)
        return given

    def _part(self, given: Raw, path: str) -> dict[str, Any] | None:
        if bytes(given)[:1] == b'"':
            return {"type": "text", "text": given}
        part = _decode(given, Object, path)
        kind = _decode(part.get("type", Raw(b'"text"')), str, f"{path}.type")
        if kind in fields.THOUGHTS:
            self.ignored[_place(f"{path}.{kind}")] = True
            return None
        if kind not in fields.TEXTS:
            raise _refusal(f"The part type `{kind}` is not supported: {fields.SEEN}", path)
        kept = self.keep(part, fields.PART, path)
        return {"type": "text", "text": kept.get(fields.TEXTS[kind], "")}

    def _calls(self, message: dict[str, Any], path: str) -> None:
        """Translate tool calls, or the older function_call, whatever a model wrote in them."""
        calls = _decode(message.pop("tool_calls", Raw(b"[]")), list[Object], f"{path}.tool_calls")
        self._count(calls)
        if "function_call" in message:
            calls = calls or [{"function": message["function_call"]}]
            del message["function_call"]
        read = [self._call(call, f"{path}.tool_calls[{n}]") for n, call in enumerate(calls)]
        if read:
            message["tool_calls"] = read

    def _call(self, given: Object, path: str) -> dict[str, Any]:
        call = self.keep(given, fields.CALL, path)
        called = _decode(call.pop("function", Raw(b"{}")), Object, f"{path}.function")
        if "custom" in call:
            custom = _decode(call.pop("custom"), Object, f"{path}.custom")
            called = {"name": custom.get("name", Raw(b'""'))}
            if "input" in custom:
                called["arguments"] = Raw(b'{"input":%b}' % bytes(custom["input"]))
        function = self.keep(called, fields.CALLED, f"{path}.function")
        function = {name: _text(function.get(name)) for name in ("name", "arguments")}
        return {"id": _text(call.get("id")), "type": "function", "function": function}

    def _tools(self, given: Raw | None) -> list[dict[str, Any]]:
        if given is None:
            return []
        tools = _decode(given, list[Object], "$.tools")
        self._count(tools)
        read = [self._tool(tool, f"$.tools[{number}]") for number, tool in enumerate(tools)]
        distinct = {msgspec.json.encode(tool): tool for tool in reversed(read)}
        return [*reversed(distinct.values())]

    def _tool(self, given: Object, path: str) -> dict[str, Any]:
        kind = _decode(given.get("type", Raw(b'"function"')), str, f"{path}.type")
        if kind != "function":
            raise _refusal(f"The tool type `{kind}` is not supported: only `function` is", path)
        tool = self.keep(given, fields.TOOL, path)
        if "function" in tool:
            path += ".function"
            function = self.keep(_decode(tool["function"], Object, path), fields.FUNCTION, path)
        else:  # as in the Responses API
            function = {name: value for name, value in tool.items() if name != "type"}
        return {"type": "function", "function": function}

    def _choose_tool(self, body: dict[str, Any]) -> None:
        if "tool_choice" not in body:
            return
        given: Any = _decode(body["tool_choice"], Any, "$.tool_choice")
        choice = _choice(given, body) if isinstance(given, dict) else given
        body["tool_choice"] = "required" if choice == "any" else choice


def _choice(given: dict[str, Any], body: dict[str, Any]) -> Any:
    """Return a tool_choice in OpenAI's form. Remove tools that are not allowed from the body."""
    match given:
        case {"type": "allowed_tools", "allowed_tools": {"tools": [*allowed], **more}} | {
            "type": "allowed_tools",
            "tools": [*allowed],
            **more,
        }:
            wanted = [_named(tool) for tool in allowed]
            tools = body.pop("tools", [])
            if kept := [tool for tool in tools if _tool_name(tool) in wanted]:
                body["tools"] = kept
            return more.get("mode", "auto")
        case {"type": "auto" | "none" | "required" | "any" as word}:
            return word
        case {"type": "function" | "tool"}:
            return {"type": "function", "function": {"name": _named(given)}}
    return given


def _named(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    return function.get("name") if isinstance(function, dict) else None


def _tool_name(tool: dict[str, Any]) -> Any:
    return msgspec.json.decode(bytes(tool["function"].get("name", b"null")))


def _prompts(given: bytes) -> Any:
    """Wrap token ids as one prompt. Count lists of them before they are decoded."""
    if _IDS.match(given):
        return [Raw(given)]
    if _LISTS.match(given) and given.count(b"[") > MAX_PROMPTS + 1:
        raise _refusal(f"The field `prompt` has more than {MAX_PROMPTS} prompts", "$")
    return Raw(given)


def _are_plain(messages: Raw) -> bool:
    """Return whether no message needs translation, as in most bodies; that check is fast."""
    try:
        msgspec.json.decode(messages, type=tuple[_Plain, ...])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _text(given: Raw | None) -> Any:
    """Return any JSON as a string: a model or another server wrote it."""
    if given is None:
        return ""
    return given if bytes(given)[:1] == b'"' else bytes(given).decode()


def _place(path: str) -> str:
    """Return the path as in the header, without indexes."""
    return _NUMBERS.sub("[]", path).removeprefix("$.")


def _json_form(schema: Raw, path: str) -> dict[str, Any]:
    """Return the response_format of a schema, which may be a JSON string, as vLLM allows."""
    if bytes(schema)[:1] == b'"':
        schema = Raw(_decode(schema, str, path).encode())
        _decode(schema, Object, path)
    json_schema = {"name": "answer", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def _choice_form(choices: list[str]) -> dict[str, Any]:
    return {"grammar": f"root ::= {' | '.join(map(_gbnf_literal, choices))}"}


def _gbnf_literal(text: str) -> str:
    """As JSON has it, but for two escapes that GBNF lacks."""
    literal = json.dumps(text, ensure_ascii=False)
    return _ESCAPES.sub(lambda found: GBNF_ESCAPES.get(found[0], found[0]), literal)


def _decode(value: Any, kind: type[T], path: str) -> T:
    """Raises ServiceError(invalid_request) that names the place."""
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what, _, inner = str(error).partition(" - at `$")
        raise _refusal(what, f"{path}{inner.removesuffix('`')}") from error


def _refusal(what: str, path: str) -> ServiceError:
    place = f" - at `{path}`" if path != "$" else ""
    return ServiceError("invalid_request", f"{what}{place}.")


def _whole(value: Any) -> Any:
    """Return 12 for 12.0: JSON has one kind of number. Numbers over 64 bits stay floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    is_whole = isinstance(value, int) or value.is_integer()
    if is_whole and abs(value) < MAX_INTEGER:
        return int(value)
    return float(min(max(value, -LARGEST), LARGEST))


def _limit(value: Any) -> Any:
    value = _whole(value)
    if value == -1:
        return None
    return MAX_LIMIT if isinstance(value, int | float) and value > MAX_LIMIT else value


def _seed(value: Any) -> Any:
    """Map OpenAI's signed 64-bit seeds to ours, always in the same way; -1 means any seed."""
    value = _whole(value)
    if value == -1:
        return None
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value % SEEDS if is_whole else value


def _top_k(value: Any) -> Any:
    value = _whole(value)
    return 0 if value == -1 else value


def _top_p(value: Any) -> Any:
    return LIKELIEST if value == 0 and not isinstance(value, bool) else value


def _stop(value: Any) -> Any:
    """Drop empty strings, which would stop at once and are meant as none."""
    if isinstance(value, list):
        return [stop for stop in value if stop != ""]
    return value or None


VALUES: dict[str, Callable[[Any], Any]] = {
    "model": lambda name: None if name == "" else name,
    "max_tokens": _limit,
    "max_completion_tokens": _limit,
    "n_predict": _limit,
    "seed": _seed,
    "random_seed": _seed,
    "top_k": _top_k,
    "top_p": _top_p,
    "stop": _stop,
    "n": _whole,
    "best_of": _whole,
    "logprobs": _whole,
    "top_logprobs": _whole,
}
"""Translations of values that mean the same, or the default, elsewhere. None: left out."""
