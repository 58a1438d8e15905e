"""Reads the arguments of a call: one JSON object, or values with markers one by one."""

import json
import re
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

from services.inference.engine.output.answer_format import KEY, ArgumentFormat
from services.inference.engine.output.answer_text import AnswerText, Deciding, Reading
from services.inference.engine.output.call_reader import CallReader, first_word
from services.inference.engine.output.call_values import (
    GEMMA_QUOTE,
    ValueSchema,
    escape_surrogates,
    expression_to_json,
    raw_to_json,
    to_json,
    tree_to_json,
)
from services.inference.engine.output.patterns import Hole, Pattern, partial_length

MAX_STRING = 2048  # characters of arguments that are an object in a JSON string
CDATA, CDATA_END = "<![CDATA[", "]]>"
_OTHER_TYPES = {"number", "integer", "boolean", "null", "object", "array"}

_JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_STRUCTURAL = re.compile(r'["\\{}]')
_PYTHON_TOKEN = re.compile(r"""["'\\{}\[\](),]""")
_AFTER_STRING = re.compile(r"\s*(?:,\s*(?:[\w.$-]{1,256}\s*=|\))|\)\s*[\],])")
_AFTER_STRING_PREFIX = re.compile(r"\s{0,64}(?:,\s{0,64}(?:[\w.$-]{1,256}\s{0,64})?|\)\s{0,64})?\Z")
_GEMMA_TOKEN = re.compile(r'<\|"\|>|[{}\[\](),]')


def read_json_arguments(text: AnswerText) -> Deciding:
    """
    Emit a JSON object, an object in a JSON string, or an empty one if there is none. Return whether
    it is complete.
    """
    while not text.unread.lstrip() and not text.is_ended:
        yield
    if text.is_ended and not text.unread.strip():
        return False
    text.skip_spaces()
    if text.unread.startswith("{"):
        return (yield from read_object(text, text.emit_taken_arguments))
    if text.unread.startswith('"'):
        yield from _read_string_arguments(text)
    else:
        text.emit_arguments("{}")
    return True


def _read_string_arguments(text: AnswerText) -> Reading:
    while not (found := _JSON_STRING.match(text.unread)):
        if text.is_ended or len(text.unread) > MAX_STRING:
            text.emit_arguments("{}")
            return
        yield
    text.take(found.end())
    try:
        text.emit_arguments(json_of_string(json.loads(found[0], strict=False)))
    except ValueError:
        text.emit_arguments(to_json({"arguments": found[1]}))


def json_of_string(text: str) -> str:
    """Return arguments that are JSON in a string; other text becomes an argument itself."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return to_json({"arguments": text}) if text.strip() else "{}"
    return escape_surrogates(text)


def read_object(text: AnswerText, take: Callable[[int], None]) -> Deciding:
    """Take a JSON object piece by piece, and return whether it is complete."""
    scanner = _ObjectScanner()
    while True:
        end = scanner.push(text.unread)
        take(len(text.unread) if end is None else end)
        if end is not None:
            return True
        if text.is_ended:
            return False
        yield


def is_closed(text: str, begin: int) -> bool:
    """Return whether the JSON object that begins there is complete."""
    return _ObjectScanner().push(text[begin:]) is not None


class ArgumentReader:
    """Reads arguments that are written one by one, and emits them as one JSON object."""

    def __init__(self, text: AnswerText, reader: CallReader, parameters: Any) -> None:
        """`parameters` is the JSON schema of all arguments."""
        argument = reader.form.argument
        assert argument
        self._text, self._reader, self._argument = text, reader, argument
        self._schema = ValueSchema(parameters)
        self._count = 0
        self._is_other = False  # the marker says that the value is no string

    def read(self) -> Deciding:
        """Read all arguments, and return whether they are complete."""
        while (yield from self._read_argument()):
            pass
        if self._text.is_ended and not self._is_closing():
            return False
        self._text.emit_arguments("}" if self._count else "{}")
        return True

    def _is_closing(self) -> bool:
        text = self._text.unread.lstrip()
        return any(text.startswith(closer) for closer in self._reader.closers)

    def _read_argument(self) -> Deciding:
        """Read one argument, and return whether there was a complete one."""
        found = yield from self._read_head()
        if not found:
            return False
        text, argument = self._text, self._argument
        text.take(found.end())
        key = found["key"]
        schema = self._schema.of_key(key)
        types = schema.types
        is_string: bool | None = None
        if len({mid for _, mid in argument.mids}) > 1:
            is_string = not self._is_other
        elif types is not None and len(types) == 1:
            is_string = types == {"string"}
        text.emit_arguments(("{" if not self._count else ", ") + to_json(key) + ": ")
        self._count += 1
        if argument.syntax in ("raw", "cdata", "xml"):
            return (yield from self._read_raw(key, is_string, schema))
        return (yield from self._read_expression(types))

    def _read_head(self) -> Generator[None, None, re.Match[str] | None]:
        """Read up to an argument's value."""
        text, argument = self._text, self._argument
        patterns = _argument_heads(argument, self._count > 0)
        while True:
            spaces = len(text.unread) - len(text.unread.lstrip())
            text.take(spaces)
            is_partial = False
            for pattern, is_other in patterns:
                found = pattern.match(text.unread, text.is_ended)
                if isinstance(found, re.Match):
                    self._is_other = is_other
                    return found
                is_partial = is_partial or found
            if text.is_ended or not is_partial and text.unread:
                return None
            yield

    def _read_raw(self, key: str, is_string: bool | None, schema: ValueSchema) -> Deciding:
        """Read a value up to its closing marker; a string streams."""
        text = self._text
        yield from self._skip_line_break()
        prefix = ""
        if self._argument.syntax == "cdata" and (yield from self._skip_cdata()):
            prefix = CDATA_END
        close = prefix + self._argument.close.replace(KEY, key)
        take = self._string_piece if is_string else text.collect
        if is_string:
            text.emit_arguments('"')
        if not (yield from self._read_until_close(close, take)):
            return self._finish_truncated(is_string)
        if is_string:
            text.emit_arguments('"')
            return True
        value = text.take_collected()
        if self._argument.syntax == "xml":
            text.emit_arguments(tree_to_json(value, schema))
            return True
        types = schema.types
        known = types if is_string is None else (types or _OTHER_TYPES)
        text.emit_arguments(raw_to_json(value, known))
        return True

    def _read_until_close(self, close: str, take: Callable[[int], None]) -> Deciding:
        """
        Take a value up to its closing marker, which is skipped, and return whether there is one. A
        marker that nothing of a call follows belongs to the value.
        """
        text, mark = self._text, first_word(close)
        pattern = self._reader.close_pattern(close)
        leading = close[: len(close) - len(close.lstrip())]
        skip = 0
        while True:
            at = text.unread.find(mark, skip)
            certain = (at if at >= 0 else len(text.unread) - len(mark)) - len(leading)
            if certain > 0 and not (at < 0 and text.is_ended):
                take(certain)
                at, skip = at - certain, max(0, skip - certain)
            if at < 0:
                if text.is_ended:
                    return False
                yield
                continue
            found = pattern.match(text.unread[at:], text.is_ended)
            if found is True:
                yield
                continue
            is_last = text.is_ended and not text.unread[at + len(mark) :].strip()
            if found or is_last:
                break
            skip = at + 1
        take(at - (len(leading) if text.unread[:at].endswith(leading) else 0))
        text.take(text.unread.find(mark))
        matched = Pattern([close.strip()]).match(text.unread, True)
        text.take(matched.end() if isinstance(matched, re.Match) else len(mark))
        return True

    def _skip_cdata(self) -> Deciding:
        text = self._text
        while CDATA.startswith(text.unread) and not text.is_ended and text.unread != CDATA:
            yield
        is_cdata = text.unread.startswith(CDATA)
        text.unread = text.unread.removeprefix(CDATA)
        return is_cdata

    def _skip_line_break(self) -> Reading:
        """Skip the white space that the template writes before a value."""
        mid = self._argument.mid
        trailing = mid[len(mid.rstrip()) :]
        text = self._text
        while trailing.startswith(text.unread) and len(text.unread) < len(trailing):
            if text.is_ended:
                return
            yield
        text.unread = text.unread.removeprefix(trailing)

    def _string_piece(self, length: int) -> None:
        self._text.emit_arguments(to_json(self._text.take(length))[1:-1])

    def _finish_truncated(self, is_string: bool | None) -> bool:
        text = self._text
        if is_string:
            self._string_piece(len(text.unread))
            return False
        text.collect(len(text.unread))
        text.emit_arguments(text.take_collected())
        return False

    def _read_expression(self, types: set[str] | None) -> Deciding:
        """Read a value up to a comma or a closing bracket outside of quotes and brackets."""
        text, syntax = self._text, self._argument.syntax
        scanner = _ExpressionScanner(syntax == "gemma")
        while True:
            length, is_complete = scanner.scan(text.unread, text.is_ended)
            text.collect(length)
            if is_complete or text.is_ended:
                break
            yield
        value = text.take_collected()
        text.emit_arguments(expression_to_json(value, syntax, types) if is_complete else value)
        return is_complete


class _ExpressionScanner:
    """Finds the end of a value that comes in pieces."""

    def __init__(self, is_gemma: bool) -> None:
        self._tokens = _GEMMA_TOKEN if is_gemma else _PYTHON_TOKEN
        self._is_gemma = is_gemma
        self._quote = ""
        self._depth = 0

    def scan(self, text: str, is_end: bool) -> tuple[int, bool]:
        """Return how many characters belong to the value, and whether it ends after them."""
        certain = len(text)
        if self._is_gemma and not is_end:
            certain -= partial_length(text, (GEMMA_QUOTE,))
        elif text.endswith("\\") and not is_end:
            certain -= (len(text) - len(text.rstrip("\\"))) % 2
        skip = 0
        for found in self._tokens.finditer(text, 0, certain):
            if found.start() < skip:
                continue
            if found[0] == "\\":
                skip = found.start() + 2
            elif found[0] == self._quote and not self._closes(text, found.end(), is_end):
                if self._is_open_after(text, found.end(), is_end):
                    return found.start(), False
            elif self._step(found[0]):
                return found.start(), True
        return certain, False

    def _closes(self, text: str, after: int, is_end: bool) -> bool:
        """
        Return whether a quote ends a string. Templates leave quotes in strings unescaped, so the
        next argument must follow that of an argument, or the end of the call.
        """
        if self._is_gemma or self._depth:
            return True
        return bool(_AFTER_STRING.match(text, after)) or is_end and not text[after:].strip()

    def _is_open_after(self, text: str, after: int, is_end: bool) -> bool:
        return not is_end and bool(_AFTER_STRING_PREFIX.match(text, after))

    def _step(self, token: str) -> bool:
        """Return whether the value ends before the token."""
        if token in ("'", '"', GEMMA_QUOTE):
            if not self._quote:
                self._quote = token
            elif self._quote == token:
                self._quote = ""
        elif self._quote:
            return False
        elif token in "{[(":
            self._depth += 1
        elif token in "}])":
            self._depth -= 1
        return not self._quote and (self._depth < 0 or self._depth == 0 and token == ",")


class _ObjectScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._ends_in_escape = False  # the last piece

    def push(self, text: str) -> int | None:
        """Return the index after the object's last brace, None if it is not in this piece."""
        escaped_at = 0 if self._ends_in_escape and text else None
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
        self._ends_in_escape = escaped_at == len(text) if text else self._ends_in_escape
        return None


@cache
def _argument_heads(argument: ArgumentFormat, is_next: bool) -> list[tuple[Pattern, bool]]:
    """Return patterns of an argument up to its value, and whether it is no string."""
    key = Hole("key", r"[^\s<>\"'=(){}\[\],:]", min_length=1)
    if argument.open.strip():
        key = Hole("key", r"[^<>\"\n/]", min_length=1)
    separator = argument.separator.strip()
    opens = [argument.open.lstrip()]
    if is_next and separator:
        opens.insert(0, f"{separator} {opens[0]}")
    mids = dict.fromkeys(mid.rstrip() for _, mid in argument.mids)
    return [
        (Pattern([open_, key, mid]), bool(number))
        for open_ in opens
        for number, mid in enumerate(mids)
    ]
