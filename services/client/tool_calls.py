"""
The calls of functions in an answer's text, found as it comes: `<tool_call>{…}</tool_call>` (Hermes,
Qwen), a JSON object or list that is the whole answer (Llama, Mistral), also within a Markdown fence
(Qwen2.5-Coder). Knows no template.
"""

import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

OPENINGS = ("<tool_call>", "[TOOL_CALLS]")
CLOSING = "</tool_call>"
KEYS = ("arguments", "parameters")
_START = re.compile(
    r'\s*(?:\[\s*)?\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_FIRST_KEY = re.compile(r'\s*(?:\[\s*)?\{\s*"([^"\\]*)"')
_BEGINNING = re.compile(r"\s*(?:\[\s*)?(\{.*)?\Z", re.DOTALL)
_FENCE = re.compile(r"\s*```\w*\s*")
_FENCE_BEGINNING = re.compile(r"\s*(`{0,2}|```\w*\s*)\Z")
_BETWEEN = re.compile(r"[\s},;\]]*")  # separates two calls
_BETWEEN_FENCED = re.compile(r"(?:[\s},;\]]|```\w*)*")
_CALL_KEYS = {"name", "id", "type", "function", *KEYS}
_JSON = json.JSONDecoder()
_SIGNS = re.compile(r'["\\{}]')


class TextDelta(NamedTuple):
    text: str


class ToolCallStart(NamedTuple):
    """A call begins; its arguments follow."""

    name: str


class ArgumentsDelta(NamedTuple):
    """More of the arguments of the call that began last, as JSON."""

    text: str


AnswerPart = TextDelta | ToolCallStart | ArgumentsDelta


class ToolCallParser:
    """
    `names` are those of the functions: JSON that names another is no call. What looks like a call
    and turns out to be none is text.
    """

    def __init__(self, names: Collection[str], is_fenced: bool = False) -> None:
        """`is_fenced`: the text follows the opening of a Markdown fence."""
        self._names = names
        self._between = _BETWEEN_FENCED if is_fenced else _BETWEEN
        self._text = ""  # not told yet
        self._opening = ""  # of the call that `_text` may be
        self._before = ""  # space and the opening, which are text if it is none
        self._has_called = False
        self._is_start = True  # nothing was said yet
        self._is_fenced = False  # the call within `_opening`
        self._braces = _Braces()
        self._parts: list[AnswerPart] = []
        self._step: Callable[[], bool] = self._read_text

    @property
    def is_within_call(self) -> bool:
        """At the answer's end: the last call was cut off."""
        return self._step == self._read_arguments

    def push(self, text: str) -> list[AnswerPart]:
        self._text += text
        while self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    def flush(self) -> list[AnswerPart]:
        """What is left at the answer's end."""
        while self._step == self._read_call and self._read_whole():
            while self._step():
                pass
        if self._step == self._read_fence:
            self._parts += _calls_in_fences(self._text, self._names) or [TextDelta(self._text)]
        elif self._step == self._read_call:
            self._parts.append(TextDelta(self._before + self._text))
        elif self._step == self._read_text and (self._text.strip() or not self._has_called):
            self._parts.append(TextDelta(self._text))
        parts, self._parts = self._parts, []
        return [part for part in parts if part != TextDelta("")]

    def _read_text(self) -> bool:
        found = [(at, sign) for sign in OPENINGS if (at := self._text.find(sign)) >= 0]
        if found:
            at, sign = min(found)
            said = self._text[:at].rstrip()
            self._say(said)
            self._begin_call(sign, self._text[len(said) : at] + sign, self._text[at + len(sign) :])
            return True
        begun = self._text.lstrip()
        if self._is_start and begun.startswith(("{", "[")) and not OPENINGS[1].startswith(begun):
            self._begin_call("", "", self._text)
            return True
        if self._is_start and begun.startswith("`"):
            self._step = self._read_fence
            return True
        kept = _kept(self._text)
        self._say(self._text[:kept])
        self._text = self._text[kept:]
        return False

    def _begin_call(self, opening: str, before: str, text: str) -> None:
        self._opening, self._before, self._text = opening, before, text
        self._is_fenced = False
        self._step = self._read_call

    def _read_fence(self) -> bool:
        """
        Hold back fences at the start of the answer while they can still contain calls only, which
        is certain at the end of the answer.
        """
        fence = _FENCE.match(self._text)
        if fence is None and _FENCE_BEGINNING.match(self._text):
            return False
        if fence:
            inner, closing, after = self._text[fence.end() :].partition("\n```")
            goes_on = bool(closing and after.strip()) and not after.lstrip().startswith("`")
            if not self._is_no_call(inner) and not goes_on:
                return False
        self._is_start = False
        self._step = self._read_text
        return True

    def _read_call(self) -> bool:
        if self._opening and not self._is_fenced and self._text.lstrip().startswith("`"):
            return self._skip_fence()
        start = _START.match(self._text)
        if start and self._text[start.end() :].startswith("{") and self._may_be(start[1]):
            self._parts.append(ToolCallStart(start[1]))
            self._has_called = True
            self._text = self._text[start.end() :]
            self._braces = _Braces()
            self._step = self._read_arguments
            return True
        if CLOSING in self._text and self._read_whole():
            return True
        if self._is_no_call(self._text):
            self._is_start = False
            self._say(self._before + self._text)
            self._text = ""
            self._step = self._read_text
        return False

    def _skip_fence(self) -> bool:
        """Drop a fence around a call inside the model's own markers."""
        fence = _FENCE.match(self._text)
        if fence is None or fence.end() == len(self._text):
            self._is_fenced = fence is None and not _FENCE_BEGINNING.match(self._text)
            return self._is_fenced
        self._before += fence[0]
        self._text = self._text[fence.end() :]
        self._is_fenced = True
        return True

    def _is_no_call(self, text: str) -> bool:
        if not _BEGINNING.match(text):
            return True
        start, first = _START.match(text), _FIRST_KEY.match(text)
        if start and not self._may_be(start[1]):
            return True
        return first is not None and first[1] not in _CALL_KEYS

    def _may_be(self, name: str) -> bool:
        """Between its own signs a call is one whatever it names."""
        return bool(self._opening) or name in self._names

    def _read_arguments(self) -> bool:
        end = self._braces.push(self._text)
        said, self._text = self._text[:end], self._text[end:] if end is not None else ""
        if said:
            self._parts.append(ArgumentsDelta(said))
        if end is None:
            return False
        self._step = self._read_end
        return True

    def _read_end(self) -> bool:
        """Up to the next call, or to text."""
        self._is_start = False
        between = _BETWEEN_FENCED if self._is_fenced else self._between
        rest = between.sub("", self._text, count=1)
        is_part_of_fence = between is _BETWEEN_FENCED and "```".startswith(rest)
        if not rest or CLOSING.startswith(rest) or is_part_of_fence:
            return False
        if rest.startswith(CLOSING):
            self._text = rest[len(CLOSING) :]
            return bool(self._text)
        is_next = rest.startswith("{") and self._opening != OPENINGS[0]
        if is_next:
            self._begin_call(self._opening, "", rest)
        else:
            self._text = rest
            self._step = self._read_text
        return True

    def _read_whole(self) -> bool:
        """
        Read a complete call: its keys may be in any order, and its arguments missing, empty, or
        JSON in a string.
        """
        text = self._text.lstrip().removeprefix("[").lstrip()
        try:
            call, end = _JSON.raw_decode(text)
            call = call.get("function", call)
            name = call["name"]
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return False
        is_call = isinstance(name, str) and self._may_be(name)
        if not is_call or not (self._opening or call.keys() <= _CALL_KEYS):
            return False
        arguments = next((call[key] for key in KEYS if key in call), None)
        self._parts += [ToolCallStart(name), ArgumentsDelta(_written(arguments))]
        self._has_called = True
        self._text = text[end:]
        self._step = self._read_end
        return True

    def _say(self, text: str) -> None:
        if text:
            self._is_start = self._is_start and not text.strip()
            self._parts.append(TextDelta(text))


class _Braces:
    """Where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> int | None:
        """The place after the object's last brace, if it is in this piece."""
        escaped_at = 0 if self._escaped else None
        for found in _SIGNS.finditer(text):
            if found.start() == escaped_at:
                continue
            match found[0]:
                case "\\":
                    escaped_at = found.end()
                case '"':
                    self._in_string = not self._in_string
                case sign if not self._in_string:
                    self._depth += 1 if sign == "{" else -1
                    if not self._depth:
                        return found.end()
        self._escaped = escaped_at == len(text)
        return None


def _written(arguments: Any) -> str:
    """Return arguments as JSON text. Models write null, "" or [] if a function takes none."""
    if isinstance(arguments, str) and arguments:
        return arguments
    return json.dumps(arguments or {}, ensure_ascii=False)


def _calls_in_fences(text: str, names: Collection[str]) -> list[AnswerPart]:
    """Return the parts of fences that contain complete calls only, else an empty list."""
    fence = _FENCE.match(text)
    if fence is None:
        return []
    reader = ToolCallParser(names, is_fenced=True)
    parts = [*reader.push(text[fence.end() :]), *reader.flush()]
    is_whole = not reader.is_within_call and not any(isinstance(part, TextDelta) for part in parts)
    return parts if is_whole else []


def _kept(text: str) -> int:
    """Where the end of the text begins that may belong to a call: its sign, or space before it."""
    longest = max(map(len, OPENINGS))
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(sign.startswith(text[start:]) for sign in OPENINGS):
            text = text[:start]
            break
    return len(text.rstrip())
