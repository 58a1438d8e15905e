"""
Translates a /v1 body of any client to the types of openai_requests.py. Takes `{name: Raw}`, returns
`{name: Raw or JSON}`, and decodes only what it has to change.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Raw, Struct

from services.contract.conversation import MAX_MESSAGES
from services.contract.embeddings import MAX_INPUTS
from services.contract.errors import ServiceError
from services.edge.api import fields
from services.edge.api.fields import Fields
from services.edge.api.openai_requests import MAX_PROMPTS, ReasoningOptions
from services.edge.limits import EdgeLimits
from services.edge.request_body import check_field_count, check_sizes, too_large

Object = dict[str, Raw]
T = TypeVar("T")

MAX_MAX_TOKENS = 1_000_000  # a larger one means the same
MAX_INTEGER = 2**63
MAX_FLOAT = 10**300  # integers up to it become floats
SEEDS = 2**32 - 1
GREEDY_TOP_P = 1e-6  # leaves one token, which other servers write as 0
NULL = b"null"
MAX_REASONING_DEPTH = 4  # of lists and objects around a text
EMPTY = {NULL, b"false", b'""', b"[]", b"{}"}
GBNF_ESCAPES = {r"\b": r"\u0008", r"\f": r"\u000c"}

_TOKEN_IDS, _LISTS = re.compile(rb"\[\s*-?\d"), re.compile(rb"\[\s*\[")
_INDEXES = re.compile(r"\[\d+\]")
_ESCAPES = re.compile(r"\\[\\bf]")


class _PlainMessage(Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_call_id: str | None = None


class Translation:
    """
    Translates one body. `ignored` has the paths of fields without effect, and whether each is a
    known one. `renamed` maps our name of a field to the one in the body, if they differ. Every
    method raises ServiceError.
    """

    def __init__(self, limits: EdgeLimits) -> None:
        self.ignored: dict[str, bool] = {}
        self.renamed: dict[str, str] = {}
        self._continues_last = False  # a `prefix` in the last message says so
        self._limits = limits
        self._noted: set[tuple[int, str]] = set()
        self._translated = 0
        self._foreign = 0  # objects of another API, which become those that are translated

    def chat(self, given: Object) -> dict[str, Any]:
        body = self._body(given, fields.CHAT)
        self._translate_switches(body)
        if "messages" in body:
            body["messages"] = self._messages(body["messages"])
        self._translate_continuation(body)
        self._translate_functions(body)
        if tools := self._tools(body.pop("tools", None)):
            body["tools"] = tools
        self._translate_choice(body)
        if body.get("top_logprobs") == 0 and body.get("logprobs") is not True:
            del body["top_logprobs"]
        return body

    def text(self, given: Object) -> dict[str, Any]:
        body = self._body(given, fields.TEXT)
        if "prompt" in body:
            body["prompt"] = _token_lists(bytes(body["prompt"]), "prompt", MAX_PROMPTS)
        return body

    def embedding(self, given: Object) -> dict[str, Any]:
        body = self._body(given, fields.EMBEDDING)
        if "input" in body:
            body["input"] = _token_lists(bytes(body["input"]), "input", MAX_INPUTS)
        return body

    def rerank(self, given: Object) -> dict[str, Any]:
        body = self._body(given, fields.RERANK)
        if "documents" in body:
            documents = _decode(body["documents"], list[Raw], "$.documents")
            if len(documents) > MAX_INPUTS:
                raise _invalid(f"The field `documents` has more than {MAX_INPUTS:,} items", "$")
            body["documents"] = [
                self._document(document, f"$.documents[{number}]")
                for number, document in enumerate(documents)
            ]
        return body

    def _document(self, given: Raw, path: str) -> Raw:
        """Return the text of a document, which may be an object."""
        if bytes(given)[:1] != b"{":
            return given
        document = self.keep(_decode(given, Object, path), fields.DOCUMENT, path)
        if "text" not in document:
            raise _invalid("Object missing required field `text`", path)
        text: Raw = document["text"]
        return text

    def keep(self, given: Object, kind: Fields, path: str) -> dict[str, Any]:
        """Return the honoured fields that are not null, note ignored ones, raise for rejected."""
        check_field_count(given, self._limits, path)
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if name in kind.honoured:
                if bytes(value) != NULL:
                    kept[name] = value
            elif bytes(value).strip() in EMPTY:
                continue
            elif advice := kind.rejected.get(name):
                raise _invalid(f"The field `{name}` is not supported: {advice}", path)
            elif (id(kind), name) not in self._noted:
                self._noted.add((id(kind), name))
                self.ignored[_without_indexes(f"{path}.{name}")] = name in kind.harmless
        return kept

    def decode_foreign(self, given: Raw, kind: Any, path: str) -> Any:
        """Decode a value of another API. Limits the objects of its lists before they are read."""
        value = _decode(given, kind, path)
        if isinstance(value, list):
            self._foreign = self._checked_count(self._foreign + len(value))
        return value

    def _count(self, objects: Sequence[Any]) -> None:
        """Limit the objects that are translated one by one."""
        self._translated = self._checked_count(self._translated + len(objects))

    def _checked_count(self, count: int) -> int:
        maximum = self._limits.max_translated
        if count > maximum:
            raise too_large(f"The body has more than {maximum:,} messages, parts, calls and tools")
        return count

    def _body(self, given: Object, kind: Fields) -> dict[str, Any]:
        body = self.keep(given, kind, "$")
        check_sizes(body, self._limits)
        for name in body:
            if translate := VALUES.get(fields.SYNONYMS.get(name, name)):
                body[name] = translate(_decode(body[name], Any, f"$.{name}"))
        body = {name: value for name, value in body.items() if value is not None}
        for synonym, name in fields.SYNONYMS.items():
            if synonym in body:
                self._set_default(body, name, body.pop(synonym), synonym)
        if "stream_options" in body:
            options = _decode(body["stream_options"], Object, "$.stream_options")
            body["stream_options"] = self.keep(options, fields.STREAM_OPTIONS, "$.stream_options")
        self._translate_format(body)
        return body

    def _set_default(self, body: dict[str, Any], name: str, value: Any, synonym: str) -> None:
        """Set a field that has another name in the body, unless it is there itself."""
        if name not in body:
            body[name] = value
            self.renamed[name] = synonym

    def _ignore(self, path: str) -> None:
        """Note a known field without effect."""
        self.ignored[_without_indexes(path)] = True

    # --- reasoning and prefill ---

    def _translate_switches(self, body: dict[str, Any]) -> None:
        """Replace fields for reasoning by those of ChatCompletionBody, which win if both exist."""
        for name in fields.REASONING_SWITCHES:
            if name in body:
                for field, value in self._switches(name, body.pop(name)).items():
                    self._set_default(body, field, value, name)

    def _switches(self, name: str, given: Raw) -> dict[str, Any]:
        path = f"$.{name}"
        match bytes(given)[:1]:
            case b"t" | b"f":
                return {"enable_thinking": given}
            case b'"':
                return {"reasoning_effort": given} if bytes(given) != b'""' else {}
            case b"{":
                options = self.keep(_decode(given, Object, path), fields.REASONING, path)
                for budget in options.keys() & {"max_tokens", "budget_tokens"}:
                    options[budget] = _token_count(
                        _decode(options[budget], Any, f"{path}.{budget}")
                    )
                return _decode(msgspec.json.encode(options), ReasoningOptions, path).fields
        raise _invalid("Expected `bool | str | object`", path)

    def _translate_continuation(self, body: dict[str, Any]) -> None:
        given = body.get("continue_final_message", Raw(b"false"))
        is_continued = bytes(given) != b"false"
        if self._continues_last and not is_continued:
            if "continue_final_message" in body:
                raise _invalid(
                    "The last message has `prefix`, but the field `continue_final_message` is"
                    " false: remove one of them",
                    "$",
                )
            body["continue_final_message"] = is_continued = True
        for name, value in (("echo", b"true"), ("add_generation_prompt", b"false")):
            if not is_continued and bytes(body.get(name, b"")) == value:
                self._ignore(name)

    # --- the format of the answer ---

    def _translate_format(self, body: dict[str, Any]) -> None:
        """Replace every field for the format of the answer by response_format or grammar."""
        names = ("response_format", *fields.FORMAT_FIELDS, "structured_outputs")
        given = [name for name in names if name in body]
        found = [each for name in given if (each := self._format(name, body.pop(name)))]
        if len(found) > 1:
            raise _invalid(
                f"The field `{given[-1]}` sets the format of the answer, and so does"
                f" `{given[0]}`: remove one of them",
                "$",
            )
        if found:
            body |= found[0]

    def _format(self, name: str, value: Raw) -> dict[str, Any] | None:
        path = f"$.{name}"
        if kind := fields.FORMAT_FIELDS.get(name):
            return _constraint(kind, value, path)
        given = _decode(value, Object, path)
        if name == "response_format":
            return self._response_format(given, path)
        outputs = self.keep(given, fields.STRUCTURED_OUTPUTS, path)
        kinds = [kind for kind, part in outputs.items() if bytes(part) not in EMPTY]
        if len(kinds) > 1:
            raise _invalid(f"The field `{name}` sets the format of the answer more than once", "$")
        return _constraint(kinds[0], outputs[kinds[0]], f"{path}.{kinds[0]}") if kinds else None

    def _response_format(self, given: Object, path: str) -> dict[str, Any] | None:
        answer_format = self.keep(given, fields.RESPONSE_FORMAT, path)
        schema = answer_format.pop("schema", None)  # beside OpenAI's `json_schema`
        kind = bytes(answer_format.get("type", b""))
        if kind == b'"text"':
            return None
        if "json_schema" in answer_format:
            path += ".json_schema"
            named = _decode(answer_format["json_schema"], Object, path)
            answer_format["json_schema"] = {
                "name": "answer",
                **self.keep(named, fields.JSON_SCHEMA, path),
            }
        elif schema is not None and kind in (b'"json_object"', b'"json_schema"'):
            return _json_format(schema, f"{path}.schema")
        return {"response_format": answer_format}

    # --- messages ---

    def _messages(self, given: Raw) -> Any:
        if _are_plain(given):
            return given
        messages = _decode(given, list[Object], "$.messages")
        if len(messages) > MAX_MESSAGES:
            raise _invalid(f"There are more than {MAX_MESSAGES:,} messages", "$.messages")
        self._count(messages)
        translated = [self._message(each, f"$.messages[{n}]") for n, each in enumerate(messages)]
        prefixes = [message.pop("prefix", False) for message in translated]
        self._continues_last = any(prefixes[-1:])
        if any(prefixes[:-1]):
            self._ignore("$.messages[].prefix")
        return translated

    def _message(self, given: Object, path: str) -> dict[str, Any]:
        message = self.keep(given, fields.MESSAGE, path)
        role = bytes(message.get("role", b""))
        if role == b'"function"':
            message["role"] = "tool"
        is_answer = role == b'"assistant"'
        refusal = message.pop("refusal", None)
        reasoning = self._reasoning(message, path, is_answer)
        if "content" in message:
            content, thoughts = self._content(message["content"], f"{path}.content", is_answer)
            message["content"] = content
            reasoning = reasoning or thoughts
        elif refusal is not None:
            message["content"] = refusal
        elif "content" in given:  # null
            message["content"] = ""
        if reasoning:
            message["reasoning"] = reasoning
        if "prefix" in message:
            message["prefix"] = _decode(message["prefix"], bool, f"{path}.prefix")
        if "tool_call_id" in message:
            message["tool_call_id"] = _text(message["tool_call_id"])
        if calls := self._calls(message, path):
            message["tool_calls"] = calls
        return message

    def _reasoning(self, message: dict[str, Any], path: str, is_answer: bool) -> str:
        """Remove the fields for reasoning, and return the first text in them."""
        found = ""
        for name in fields.REASONING_FIELDS:
            given = message.pop(name, Raw(NULL))
            text = self._reasoning_text(given, f"{path}.{name}") if is_answer else ""
            if not text and bytes(given).strip() not in EMPTY:
                self._ignore(f"{path}.{name}")
            found = found or text
        return found

    def _reasoning_text(self, given: Raw, path: str, depth: int = 0) -> str:
        """Return the text of a string, an object or a list; "" for encrypted reasoning."""
        kind = bytes(given)[:1] if depth <= MAX_REASONING_DEPTH else b""
        match kind:
            case b'"':
                return _decode(given, str, path)
            case b"[":
                parts = _decode(given, list[Raw], path)
                self._count(parts)
                return "".join(self._reasoning_text(part, path, depth + 1) for part in parts)
            case b"{":
                part = _decode(given, Object, path)
                check_field_count(part, self._limits, path)
                inner = (part[name] for name in fields.REASONING_TEXTS if name in part)
                texts = (self._reasoning_text(each, path, depth + 1) for each in inner)
                return next(filter(None, texts), "")
        return ""

    def _content(self, given: Raw, path: str, is_answer: bool) -> tuple[Any, str]:
        """Return the content, and the text of the parts that are reasoning."""
        match bytes(given)[:1]:
            case b"[":
                parts = _decode(given, list[Raw], path)
                self._count(parts)
                translated = [
                    self._part(part, f"{path}[{n}]", is_answer) for n, part in enumerate(parts)
                ]
                reasoning = "".join(part for part in translated if isinstance(part, str))
                return [part for part in translated if not isinstance(part, str)], reasoning
            case b"{":  # a tool's result
                return _text(given), ""
        return given, ""

    def _part(self, given: Raw, path: str, is_answer: bool) -> dict[str, Any] | str:
        """Return a text part, or the text of reasoning."""
        if bytes(given)[:1] == b'"':
            return {"type": "text", "text": given}
        part = _decode(given, Object, path)
        kind = _decode(part.get("type", Raw(b'"text"')), str, f"{path}.type")
        if kind in fields.REASONING_PARTS:
            text = self._reasoning_text(given, path) if is_answer else ""
            if not text:
                self._ignore(f"{path}.{kind}")
            return text
        if kind not in fields.TEXT_PARTS:
            raise _invalid(f"The part type `{kind}` is not supported: {fields.NOT_TEXT}", path)
        kept = self.keep(part, fields.PART, path)
        return {"type": "text", "text": kept.get(fields.TEXT_PARTS[kind], "")}

    def _calls(self, message: dict[str, Any], path: str) -> list[dict[str, Any]]:
        """Remove tool calls, or the older function_call, and return them translated."""
        calls = _decode(message.pop("tool_calls", Raw(b"[]")), list[Object], f"{path}.tool_calls")
        self._count(calls)
        if function_call := message.pop("function_call", None):
            calls = calls or [{"function": function_call}]
        return [self._call(call, f"{path}.tool_calls[{n}]") for n, call in enumerate(calls)]

    def _call(self, given: Object, path: str) -> dict[str, Any]:
        """Accept any name, id and arguments, because a model wrote them."""
        call = self.keep(given, fields.CALL, path)
        called = _decode(call.pop("function", Raw(b"{}")), Object, f"{path}.function")
        if "custom" in call:
            custom = _decode(call.pop("custom"), Object, f"{path}.custom")
            called = {"name": custom.get("name", Raw(b'""'))}
            if "input" in custom:
                called["arguments"] = Raw(b'{"input":%b}' % bytes(custom["input"]))
        kept = self.keep(called, fields.CALLED_FUNCTION, f"{path}.function")
        function = {name: _text(kept.get(name)) for name in ("name", "arguments")}
        return {"id": _text(call.get("id")), "type": "function", "function": function}

    # --- tools ---

    def _translate_functions(self, body: dict[str, Any]) -> None:
        """Replace the older `functions` and `function_call` by tools, of which one is called."""
        functions, choice = body.pop("functions", None), body.pop("function_call", None)
        if functions is None or "tools" in body:
            for name, value in (("functions", functions), ("function_call", choice)):
                if value is not None:
                    self._ignore(name)
            return
        given = _decode(functions, list[Raw], "$.functions")
        tools = [{"type": "function", "function": each} for each in given]
        body |= {
            "tools": Raw(msgspec.json.encode(tools)),
            "functions": True,
            "parallel_tool_calls": False,
        }
        if choice is not None:
            body["tool_choice"] = _older_choice(choice)

    def _tools(self, given: Raw | None) -> list[dict[str, Any]]:
        """Return the tools without repeats."""
        if given is None:
            return []
        tools = _decode(given, list[Object], "$.tools")
        self._count(tools)
        translated = [self._tool(tool, f"$.tools[{n}]") for n, tool in enumerate(tools)]
        return [*{msgspec.json.encode(tool): tool for tool in translated}.values()]

    def _translate_choice(self, body: dict[str, Any]) -> None:
        if "tool_choice" in body:
            choice = _tool_choice(_decode(body["tool_choice"], Any, "$.tool_choice"), body)
            body["tool_choice"] = "required" if choice == "any" else choice

    def _tool(self, given: Object, path: str) -> dict[str, Any]:
        kind = _decode(given.get("type", Raw(b'"function"')), str, f"{path}.type")
        if kind != "function":
            raise _invalid(f"The tool type `{kind}` is not supported: only `function` is", path)
        tool = self.keep(given, fields.TOOL, path)
        if "function" in tool:
            path += ".function"
            function = self.keep(_decode(tool["function"], Object, path), fields.FUNCTION, path)
        else:  # as in the Responses API
            function = {name: value for name, value in tool.items() if name != "type"}
        return {"type": "function", "function": function}


def _tool_choice(given: Any, body: dict[str, Any]) -> Any:
    """Return a tool_choice in OpenAI's form. Remove tools that are not allowed from the body."""
    match given:
        case {"type": "allowed_tools", "allowed_tools": {"tools": [*allowed], **more}} | {
            "type": "allowed_tools",
            "tools": [*allowed],
            **more,
        }:
            names = [_name_in(tool) for tool in allowed]
            tools = body.pop("tools", [])
            if kept := [tool for tool in tools if _tool_name(tool) in names]:
                body["tools"] = kept
            return more.get("mode", "auto")
        case {"type": "auto" | "none" | "required" | "any" as choice}:
            return choice
        case {"type": "function" | "tool"}:
            return {"type": "function", "function": {"name": _name_in(given)}}
    return given


def _older_choice(given: Raw) -> Raw:
    """Return a `function_call` of a request as a tool_choice."""
    if bytes(given)[:1] != b"{":
        return given
    return Raw(b'{"type":"function","function":%b}' % bytes(given))


def _name_in(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    return function.get("name") if isinstance(function, dict) else None


def _tool_name(tool: dict[str, Any]) -> Any:
    return msgspec.json.decode(bytes(tool["function"].get("name", NULL)))


def _token_lists(given: bytes, field: str, maximum: int) -> Any:
    """Wrap token ids as one text. Count lists of them before they are decoded."""
    if _TOKEN_IDS.match(given):
        return [Raw(given)]
    if _LISTS.match(given) and given.count(b"[") > maximum + 1:
        raise _invalid(f"The field `{field}` has more than {maximum:,} items", "$")
    return Raw(given)


def _are_plain(messages: Raw) -> bool:
    """Return whether no message needs translation, as in most bodies; this check is fast."""
    try:
        msgspec.json.decode(messages, type=tuple[_PlainMessage, ...])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _text(given: Raw | None) -> Any:
    """Return any JSON as a string: a model or another server wrote it."""
    if given is None:
        return ""
    return given if bytes(given)[:1] == b'"' else bytes(given).decode()


def _without_indexes(path: str) -> str:
    return _INDEXES.sub("[]", path).removeprefix("$.")


def _constraint(kind: str, value: Raw, path: str) -> dict[str, Any]:
    """Translate one of vLLM's constraints of an answer."""
    match kind:
        case "json":
            return _json_format(value, path)
        case "choice":
            choices = _decode(value, list[str], path)
            return {"grammar": f"root ::= {' | '.join(map(_gbnf_literal, choices))}"}
        case "grammar":
            return {"grammar": value}
    return {"response_format": {"type": "json_object"}}


def _json_format(schema: Raw, path: str) -> dict[str, Any]:
    """Return the response_format of a schema, which may be a JSON string, as vLLM allows."""
    if bytes(schema)[:1] == b'"':
        schema = Raw(_decode(schema, str, path).encode())
        _decode(schema, Object, path)
    json_schema = {"name": "answer", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def _gbnf_literal(text: str) -> str:
    """Return the literal in JSON's syntax, without the two escapes that GBNF lacks."""
    literal = json.dumps(text, ensure_ascii=False)
    return _ESCAPES.sub(lambda found: GBNF_ESCAPES.get(found[0], found[0]), literal)


def _decode(value: Any, kind: type[T], path: str) -> T:
    """Decode a value. Raises ServiceError(invalid_request) that names the path."""
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what, _, inner = str(error).partition(" - at `$")
        raise _invalid(what, f"{path}{inner.removesuffix('`')}") from error


def _invalid(what: str, path: str) -> ServiceError:
    place = f" - at `{path}`" if path != "$" else ""
    return ServiceError("invalid_request", f"{what}{place}.")


# --- values ---


def _integer(value: Any) -> Any:
    """Return 12 for 12.0: JSON has one kind of number. Numbers over 64 bits stay floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    is_whole = isinstance(value, int) or value.is_integer()
    if is_whole and abs(value) < MAX_INTEGER:
        return int(value)
    return float(min(max(value, -MAX_FLOAT), MAX_FLOAT))


def _max_tokens(value: Any) -> Any:
    value = _token_count(value)
    return None if value == -1 else value


def _token_count(value: Any) -> Any:
    value = _integer(value)
    return min(value, MAX_MAX_TOKENS) if isinstance(value, int | float) else value


def _off_at_minus_1(value: Any) -> Any:
    value = _integer(value)
    return 0 if value == -1 else value


def _seed(value: Any) -> Any:
    """Map OpenAI's signed 64-bit seeds to ours, always in the same way; -1 means any seed."""
    value = _integer(value)
    if value == -1:
        return None
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return value % SEEDS if is_integer else value


def _top_p(value: Any) -> Any:
    return GREEDY_TOP_P if value == 0 and not isinstance(value, bool) else value


def _top_n_sigma(value: Any) -> Any:
    return max(value, -1) if isinstance(value, int | float) else value  # all negative ones: off


def _sequence_breakers(value: Any) -> Any:
    """Return a list for its JSON, with or without brackets, as text-generation-webui has it."""
    if not isinstance(value, str) or value[:1] not in ("[", '"'):
        return value
    text = value if value.startswith("[") else f"[{value}]"
    return _decode(text.encode(), list[str], "$.dry_sequence_breakers")


def _stop(value: Any) -> Any:
    """Drop empty strings, which would stop at once and are meant as none."""
    if isinstance(value, list):
        return [stop for stop in value if stop != ""]
    return value or None


VALUES: dict[str, Callable[[Any], Any]] = {
    "model": lambda name: None if name == "" else name,
    "max_tokens": _max_tokens,
    "max_completion_tokens": _max_tokens,
    "max_output_tokens": _max_tokens,
    "reasoning_budget_tokens": _token_count,
    "reasoning_effort": lambda effort: None if effort == "" else effort,
    "seed": _seed,
    "top_k": _off_at_minus_1,
    "top_p": _top_p,
    "stop": _stop,
    "n": _integer,
    "dimensions": _integer,
    "top_n": _integer,
    "best_of": _integer,
    "logprobs": _integer,
    "top_logprobs": _integer,
    "repeat_last_n": _token_count,
    "dry_multiplier": _off_at_minus_1,
    "dry_base": lambda base: base or None,  # 0 is the default of servers where DRY is off
    "dry_allowed_length": _integer,
    "dry_penalty_last_n": _token_count,
    "dry_sequence_breakers": _sequence_breakers,
    "top_n_sigma": _top_n_sigma,
    "typical_p": _off_at_minus_1,
    "xtc_probability": _off_at_minus_1,
    "dynatemp_range": _off_at_minus_1,
    "mirostat": _off_at_minus_1,
    "min_keep": _off_at_minus_1,
    "min_tokens": _off_at_minus_1,
}
"""
Translations of values that mean the same, or the default, elsewhere, by our own names. None: left
out.
"""
