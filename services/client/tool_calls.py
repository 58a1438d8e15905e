"""
Find tool calls in an answer's text while it streams. Independent of the chat template: parses
`<tool_call>{…}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS] [{…}]` (Mistral), and a JSON object or
array that is the whole answer (Llama, Mistral), also inside a Markdown fence (Qwen2.5-Coder).
"""

import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

HERMES, MISTRAL = MARKERS = ("<tool_call>", "[TOOL_CALLS]")
CLOSING = "</tool_call>"
ARGUMENT_KEYS = ("arguments", "parameters")
_CALL_KEYS = {"name", "id", "type", "function", *ARGUMENT_KEYS}

# a call up to its arguments, whose first two keys are in the usual order
_CALL_START = re.compile(
    r'\s*(?:\[\s*)?\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_FIRST_KEY = re.compile(r'\s*(?:\[\s*)?\{\s*"([^"\\]*)"')
_OBJECT_OR_LIST = re.compile(r"\s*(?:\[\s*)?(\{.*)?\Z", re.DOTALL)  # or the beginning of one
_FENCE = re.compile(r"\s*```\w*\s*")
_FENCE_PREFIX = re.compile(r"\s*(`{0,2}|```\w*\s*)\Z")
_SEPARATOR = re.compile(r"[\s},;\]]*")  # between two calls
_SEPARATOR_IN_FENCE = re.compile(r"(?:[\s},;\]]|```\w*)*")
_STRUCTURAL = re.compile(r'["\\{}]')
_JSON = json.JSONDecoder()


class TextDelta(NamedTuple):
    text: str


class ToolCallStart(NamedTuple):
    """A call begins; its arguments follow."""

    name: str


class ArgumentsDelta(NamedTuple):
    """A fragment of the arguments, as JSON, of the last call that began."""

    text: str


AnswerPart = TextDelta | ToolCallStart | ArgumentsDelta


class ToolCallParser:
    """
    Splits text into text and calls of the tools `names`. Text that looks like a call and turns out
    to be none is returned as text: without markers, a call must name one of the tools.
    """

    def __init__(self, names: Collection[str], is_fenced: bool = False) -> None:
        """`is_fenced`: the text follows the opening of a Markdown fence."""
        self._names = names
        self._separator = _SEPARATOR_IN_FENCE if is_fenced else _SEPARATOR
        # the method for what comes next; returns whether another step may find more in `_pending`
        self._step: Callable[[], bool] = self._read_text
        self._pending = ""  # not returned yet
        self._is_at_start = True  # of the answer: only white space was returned
        self._has_calls = False
        self._marker = ""  # before the call in `_pending`, empty if it has none
        self._prefix = ""  # white space, marker and fence: returned as text if there is no call
        self._is_fenced = False  # the call, between the markers
        self._arguments = _ObjectScanner()
        self._parts: list[AnswerPart] = []

    @property
    def is_within_call(self) -> bool:
        """At the end of the answer: whether the last call is incomplete."""
        return self._step == self._read_arguments

    def push(self, text: str) -> list[AnswerPart]:
        """Return the parts that are certain after `text`."""
        self._pending += text
        self._run()
        return self._take_parts()

    def flush(self) -> list[AnswerPart]:
        """Return the remaining parts at the end of the answer."""
        while self._step == self._read_call and self._parse_whole_call():
            self._run()
        text = [TextDelta(self._pending)]
        if self._step == self._read_fence:
            self._parts += _parse_fences(self._pending, self._names) or text
        elif self._step == self._read_call:
            self._parts.append(TextDelta(self._prefix + self._pending))
        elif self._step == self._read_text and (self._pending.strip() or not self._has_calls):
            self._parts += text
        return [part for part in self._take_parts() if part != TextDelta("")]

    def _run(self) -> None:
        while self._step():
            pass

    def _take_parts(self) -> list[AnswerPart]:
        parts, self._parts = self._parts, []
        return parts

    def _read_text(self) -> bool:
        text, unindented = self._pending, self._pending.lstrip()
        if found := [(at, marker) for marker in MARKERS if (at := text.find(marker)) >= 0]:
            at, marker = min(found)
            before = text[:at].rstrip()
            self._emit_text(before)
            end = at + len(marker)
            self._begin_call(marker, text[len(before) : end], text[end:])
            return True
        if self._is_at_start and unindented.startswith(("{", "[")):
            if not MISTRAL.startswith(unindented):
                self._begin_call("", "", text)
                return True
        if self._is_at_start and unindented.startswith("`"):
            self._step = self._read_fence
            return True
        certain = _length_before_marker(text)
        self._emit_text(text[:certain])
        self._pending = text[certain:]
        return False

    def _begin_call(self, marker: str, prefix: str, pending: str) -> None:
        self._marker, self._prefix, self._pending = marker, prefix, pending
        self._is_fenced = False
        self._step = self._read_call

    def _read_fence(self) -> bool:
        """Wait until the fence can't contain calls only; at the end, `flush` parses it."""
        fence = _FENCE.match(self._pending)
        if fence is None and _FENCE_PREFIX.match(self._pending):
            return False
        if fence:
            inner, closing, after = self._pending[fence.end() :].partition("\n```")
            is_followed_by_text = closing and after.strip() and not after.lstrip().startswith("`")
            if not self._cannot_be_call(inner) and not is_followed_by_text:
                return False
        self._is_at_start = False
        self._step = self._read_text
        return True

    def _read_call(self) -> bool:
        if self._marker and not self._is_fenced and self._pending.lstrip().startswith("`"):
            return self._skip_fence()
        start = _CALL_START.match(self._pending)
        if start and self._pending[start.end() :].startswith("{") and self._is_tool(start[1]):
            self._parts.append(ToolCallStart(start[1]))
            self._has_calls = True
            self._pending = self._pending[start.end() :]
            self._arguments = _ObjectScanner()
            self._step = self._read_arguments
            return True
        if CLOSING in self._pending and self._parse_whole_call():
            return True
        if self._cannot_be_call(self._pending):
            self._is_at_start = False
            self._emit_text(self._prefix + self._pending)
            self._pending = ""
            self._step = self._read_text
        return False

    def _skip_fence(self) -> bool:
        """Skip a Markdown fence around the call between the markers."""
        fence = _FENCE.match(self._pending)
        if fence is None or fence.end() == len(self._pending):
            self._is_fenced = fence is None and not _FENCE_PREFIX.match(self._pending)
            return self._is_fenced
        self._prefix += fence[0]
        self._pending = self._pending[fence.end() :]
        self._is_fenced = True
        return True

    def _cannot_be_call(self, text: str) -> bool:
        if not _OBJECT_OR_LIST.match(text):
            return True
        start, first = _CALL_START.match(text), _FIRST_KEY.match(text)
        if start and not self._is_tool(start[1]):
            return True
        return first is not None and first[1] not in _CALL_KEYS

    def _is_tool(self, name: str) -> bool:
        """Return whether a call may name it: after a marker, any name is accepted."""
        return bool(self._marker) or name in self._names

    def _read_arguments(self) -> bool:
        end = self._arguments.push(self._pending)
        if self._pending[:end]:
            self._parts.append(ArgumentsDelta(self._pending[:end]))
        if end is None:
            self._pending = ""
            return False
        self._pending = self._pending[end:]
        self._step = self._read_after_call
        return True

    def _read_after_call(self) -> bool:
        """Skip to the next call, or to text."""
        self._is_at_start = False
        separator = _SEPARATOR_IN_FENCE if self._is_fenced else self._separator
        rest = separator.sub("", self._pending, count=1)
        is_partial_fence = separator is _SEPARATOR_IN_FENCE and "```".startswith(rest)
        if not rest or CLOSING.startswith(rest) or is_partial_fence:
            return False
        if rest.startswith(CLOSING):
            self._pending = rest[len(CLOSING) :]
            return bool(self._pending)
        if rest.startswith("{") and self._marker != HERMES:
            self._begin_call(self._marker, "", rest)
        else:
            self._pending = rest
            self._step = self._read_text
        return True

    def _parse_whole_call(self) -> bool:
        """
        Parse a complete call, whose keys may have any order, and whose arguments may be missing,
        empty, or JSON in a string.
        """
        text = self._pending.lstrip().removeprefix("[").lstrip()
        try:
            call, end = _JSON.raw_decode(text)
            call = call.get("function", call)
            name = call["name"]
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return False
        is_call = isinstance(name, str) and self._is_tool(name)
        if not is_call or not (self._marker or call.keys() <= _CALL_KEYS):
            return False
        arguments = next((call[key] for key in ARGUMENT_KEYS if key in call), None)
        self._parts += [ToolCallStart(name), ArgumentsDelta(_to_json(arguments))]
        self._has_calls = True
        self._pending = text[end:]
        self._step = self._read_after_call
        return True

    def _emit_text(self, text: str) -> None:
        if text:
            self._is_at_start = self._is_at_start and not text.strip()
            self._parts.append(TextDelta(text))


class _ObjectScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._ends_in_escape = False  # the last piece

    def push(self, text: str) -> int | None:
        """Return the index after the object's last brace, None if it is not in this piece."""
        escaped_at = 0 if self._ends_in_escape else None
        for found in _STRUCTURAL.finditer(text):
            if found.start() == escaped_at:
                continue
            match found[0]:
                case "\\":
                    escaped_at = found.end()
                case '"':
                    self._in_string = not self._in_string
                case brace if not self._in_string:
                    self._depth += 1 if brace == "{" else -1
                    if not self._depth:
                        return found.end()
        self._ends_in_escape = escaped_at == len(text)
        return None


def _to_json(arguments: Any) -> str:
    """Return arguments as JSON text; models write null, "" or [] if a tool takes none."""
    if isinstance(arguments, str) and arguments:
        return arguments
    return json.dumps(arguments or {}, ensure_ascii=False)


def _parse_fences(text: str, names: Collection[str]) -> list[AnswerPart]:
    """Return the calls of fences that contain complete calls only, else an empty list."""
    fence = _FENCE.match(text)
    if fence is None:
        return []
    parser = ToolCallParser(names, is_fenced=True)
    parts = [*parser.push(text[fence.end() :]), *parser.flush()]
    has_text = any(isinstance(part, TextDelta) for part in parts)
    return [] if has_text or parser.is_within_call else parts


def _length_before_marker(text: str) -> int:
    """Return the length of the text without a partial marker, and white space, at its end."""
    longest = max(map(len, MARKERS))
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(marker.startswith(text[start:]) for marker in MARKERS):
            text = text[:start]
            break
    return len(text.rstrip())
