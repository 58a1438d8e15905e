"""Reads tool calls after markers: the model's own ones, and common ones."""

import json
import re
from collections.abc import Generator, Mapping, Sequence
from functools import cache
from typing import Any

from services.inference.engine.output.answer_format import HERMES, AnswerFormat, CallFormat
from services.inference.engine.output.answer_text import AnswerText, Deciding, Reading
from services.inference.engine.output.arguments import (
    ArgumentReader,
    is_closed,
    json_of_string,
    read_json_arguments,
    read_object,
)
from services.inference.engine.output.call_reader import (
    ARGUMENT_KEYS,
    CALL_KEYS,
    NAME_KEYS,
    CallReader,
)
from services.inference.engine.output.call_values import is_utf8, to_json
from services.inference.engine.output.patterns import MAX_SPACE

MAX_HEAD = 2048  # characters up to the arguments of a call that streams

BEFORE_OBJECT = re.compile(r"\s*(?:```\w*\s*)?(?:\[\s*)?\{")
BEFORE_OBJECT_PREFIX = re.compile(r"\s*(?:`{0,2}|```\w*\s*(?:\[\s*)?|\[\s*)\Z")
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_PAIR = re.compile(r'\s*"([^"\\]*)"\s*:\s*(?:"([^"\\]*)"|-?[\w.+-]+)\s*,')
_NEXT_KEY = re.compile(r'\s*"([^"\\]*)"')
_EMPTY_OBJECT = re.compile(r"\{\s*\}")
_AFTER_ARGUMENTS = re.compile(
    r'\s*(?:,\s*"[^"]{0,256}"\s*:\s*(?:"[^"]{0,256}"|[\w.+-]{1,64})\s*)*\}'
)
_AFTER_ARGUMENTS_PREFIX = re.compile(r'(?:\s|,|"[^"]{0,256}"?|:|[\w.+-]{1,64})*\Z')
_SPACES = re.compile(r"\s*")
_ENTRY_SEPARATORS = re.compile(r"[\s},;\]]*")
_ENTRY_SEPARATORS_IN_FENCE = re.compile(r"(?:[\s},;\]]|```\w*)*")
_HERMES_CORE = HERMES.call_open.strip()
_MISTRAL_LIST = CallFormat(
    section_open="[TOOL_CALLS][", separator=", ", section_close="]", object=HERMES.object
)
_call_reader = cache(CallReader)


class CallParser:
    """`starts` are the texts that may begin a call anywhere in content."""

    def __init__(self, text: AnswerText, form: AnswerFormat, tools: Mapping[str, Any]) -> None:
        self._text, self.tools = text, tools
        self._readers = _readers(form, bool(tools))
        self.starts = tuple(start for reader in self._readers for start in reader.starts)

    def is_callable(self, name: str, is_marked: bool) -> bool:
        """Return whether a call may name it: after an unmistakable marker, any name that is one."""
        return bool(name) and (is_marked or name in self.tools)

    def read(self) -> Deciding:
        """Read the calls that begin after white space, and return whether there are any."""
        for reader in self._readers:
            core = yield from self._read_call(reader)
            if core is not None:
                yield from self.read_further_calls(reader, core)
                return True
        return False

    def read_arguments_of(self, name: str) -> Deciding:
        """Read a call whose name has been read, and return whether it is complete."""
        self._text.begin_call(name, "")
        is_complete = yield from read_json_arguments(self._text)
        if is_complete:
            self._text.end_call()
        return is_complete

    def read_named_call(self, reader: CallReader, found: re.Match[str]) -> Reading:
        """Read a call whose name is no part of its JSON; `found` is the match of its head."""
        self._text.take(found.end())
        self._text.begin_call(found["name"], found.groupdict().get("id") or "")
        if reader.form.argument is None:
            is_complete = yield from read_json_arguments(self._text)
        else:
            parameters = self.tools.get(found["name"])
            is_complete = yield from ArgumentReader(self._text, reader, parameters).read()
        if is_complete:
            self._text.end_call()

    def _read_call(self, reader: CallReader) -> Generator[None, None, str | None]:
        """Read a call after white space and return its opening, or None if there is none."""
        text, spaces = self._text, self._text.spaces
        for core, head in zip(reader.cores, reader.heads, strict=True):
            while (found := head.match(text.unread[spaces:], text.is_ended)) is True:
                yield
            if isinstance(found, bool):
                continue
            if reader.form.object:
                if (yield from self.read_object_call(reader, spaces + found.end())):
                    return core
            elif self.is_callable(found["name"], reader.is_marked):
                text.take(spaces)
                yield from self.read_named_call(reader, found)
                return core
        return None

    # after a call

    def read_further_calls(
        self, reader: CallReader | None, core: str = "", is_fenced: bool = False
    ) -> Reading:
        """Read the markers after a call that began with `core`, and further calls."""
        text = self._text
        is_object = reader is None or reader.form.object is not None
        separators = _ENTRY_SEPARATORS_IN_FENCE if is_fenced else _ENTRY_SEPARATORS
        if not is_object:
            separators = _SPACES
        while text.channel == "content":
            text.unread = separators.sub("", text.unread, count=1)
            if not text.unread:
                if text.is_ended:
                    return
                yield
                continue
            if reader and (yield from self._skip_closer(reader)):
                continue
            if reader and (opening := (yield from self._read_further_call(reader))) is not None:
                core = opening
                continue
            is_entry = is_object and text.unread.startswith("{") and core != _HERMES_CORE
            if not (is_entry and (yield from self.read_object_call(reader, 0))):
                return

    def _skip_closer(self, reader: CallReader) -> Deciding:
        text, closers = self._text, (*reader.closers, "```")
        while True:
            found = next((c for c in closers if text.unread.startswith(c)), None)
            longer = any(c.startswith(text.unread) and len(c) > len(found or "") for c in closers)
            is_head = any(c.startswith(text.unread) for c in reader.cores)
            if text.is_ended or not (longer or is_head):
                break
            yield
        is_open = any(text.unread.startswith(core) for core in reader.cores if core != found)
        if found is None or is_open:
            return False
        text.take(len(found))
        return True

    def _read_further_call(self, reader: CallReader) -> Generator[None, None, str | None]:
        """Read a further call in the same section, and return its opening, or None."""
        text = self._text
        core = yield from self._read_call(reader)
        if core is not None or reader.bare_head is None:
            return core
        while (found := reader.bare_head.match(text.unread, text.is_ended)) is True:
            yield
        if isinstance(found, bool) or not self._is_next(reader, found["name"]):
            return None
        yield from self.read_named_call(reader, found)
        return ""

    def _is_next(self, reader: CallReader, name: str) -> bool:
        return name in self.tools or reader.is_marked and not self.tools

    # calls that are a JSON object

    def read_object_call(self, reader: CallReader | None, start: int) -> Deciding:
        """
        Read a call after `start` characters of markers, and return whether it is one. If not, the
        text is unchanged, or what can't contain a call was emitted.
        """
        text = self._text
        while not (before := BEFORE_OBJECT.match(text.unread, start)):
            partial = BEFORE_OBJECT_PREFIX.match(text.unread, start)
            if text.is_ended or not partial or len(text.unread) > start + MAX_SPACE:
                return False
            yield
        begin = before.end() - 1
        head, is_marked = _object_head(reader), bool(reader and reader.is_marked)
        while True:
            beginning = text.unread[: begin + MAX_HEAD]
            found = head.match(beginning, begin)
            if found and self.is_callable(found["name"], is_marked):
                text.take(found.end())
                text.begin_call(found["name"], "")
                if (yield from read_object(text, text.emit_taken_arguments)):
                    yield from self._read_object_end()
                    text.end_call()
                return True
            if found or self.cannot_be_call(reader, beginning, begin):
                return False
            is_long = len(text.unread) > begin + MAX_HEAD
            if is_long or text.is_ended or is_closed(text.unread, begin):
                return (yield from self._read_whole_call(reader, begin))
            yield

    def cannot_be_call(self, reader: CallReader | None, text: str, begin: int) -> bool:
        """Return whether the object that begins there is no call, by its keys and name so far."""
        if _EMPTY_OBJECT.match(text, begin):
            return True
        is_marked, form = bool(reader and reader.is_marked), reader.form.object if reader else None
        if form and not form.name_key:
            first = _FIRST_KEY.match(text, begin)
            return bool(first and not self.is_callable(first[1], is_marked))
        at = begin + 1
        while pair := _PAIR.match(text, at):
            is_name = pair[1] == (form.name_key if form else "name")
            if pair[1] not in CALL_KEYS:
                return True
            if is_name and (pair[2] is None or not self.is_callable(pair[2], is_marked)):
                return True
            at = pair.end()
        if key := _NEXT_KEY.match(text, at):
            return key[1] not in CALL_KEYS
        inner = text[at : at + MAX_SPACE].lstrip()
        return bool(inner) and not inner.startswith('"')

    def _read_object_end(self) -> Reading:
        """Skip the rest of a call's object after its arguments."""
        text = self._text
        while not (found := _AFTER_ARGUMENTS.match(text.unread)):
            partial = _AFTER_ARGUMENTS_PREFIX.match(text.unread)
            if text.is_ended or not partial or len(text.unread) > MAX_HEAD:
                return
            yield
        text.take(found.end())

    def _read_whole_call(self, reader: CallReader | None, begin: int) -> Deciding:
        """
        Read a complete call, whose keys may have any order, and whose arguments may be missing,
        empty, or JSON in a string. Emit what is none as content.
        """
        text = self._text
        text.collect(begin)
        is_complete = yield from read_object(text, text.collect)
        written = text.take_collected()
        form = reader.form.object if reader else None
        name_key = form.name_key if form else "name"
        call = _parse_call(written[begin:], name_key) if is_complete else None
        if call and self.is_callable(call[0], bool(reader and reader.is_marked)):
            text.begin_call(call[0], "")
            text.emit_arguments(call[1])
            text.end_call()
            return True
        text.emit_content(written)
        text.is_at_start = False
        return False


def _readers(form: AnswerFormat, has_tools: bool) -> list[CallReader]:
    """
    Return readers of the model's own calls, and of common ones: fine-tuned models do not always
    keep to the template.
    """
    own = [form.calls] if form.calls else []
    common = [HERMES, _MISTRAL_LIST] if has_tools and not form.header else []
    readers = [_call_reader(each) for each in (*own, *common)]
    starts = {start for reader in readers[: len(own)] for start in reader.starts}
    return [
        reader
        for i, reader in enumerate(readers)
        if reader.starts and (i < len(own) or starts.isdisjoint(reader.starts))
    ]


@cache
def _object_head(reader: CallReader | None) -> re.Pattern[str]:
    """Return the regex of a call's object up to its arguments, with the keys in the usual order."""
    form = reader.form.object if reader else None
    if form and not form.name_key:
        return re.compile(r'\{\s*"(?P<name>[^"\\]{1,256})"\s*:\s*(?=\{)')
    names = _alternatives((*NAME_KEYS, *((form.name_key,) if form else ())))
    keys = _alternatives((*ARGUMENT_KEYS, *((form.arguments_key,) if form else ())))
    first = r'(?:"(?:id|tool_call_id|type)"\s*:\s*(?:"[^"\\]{0,256}"|\d{1,9})\s*,\s*){0,2}'
    return re.compile(
        rf'\{{\s*{first}"(?:{names})"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:{keys})"\s*:\s*(?=\{{)'
    )


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(map(re.escape, dict.fromkeys(words)))


def _parse_call(text: str, name_key: str) -> tuple[str, str] | None:
    """Return name and arguments as JSON of a call as a complete JSON object, or None."""
    try:
        call = json.loads(text)
        if not name_key and len(call) == 1:
            ((name, arguments),) = call.items()
            return (name, _arguments_text(arguments)) if is_utf8(name) else None
        is_plain = call.keys() <= CALL_KEYS
        call = call.get("function", call) if not isinstance(call.get("function"), str) else call
        name = next(call[key] for key in (name_key, *NAME_KEYS, "function") if key in call)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, StopIteration):
        return None
    if not isinstance(name, str) or not is_plain or not is_utf8(name):
        return None
    arguments = next((call[key] for key in ARGUMENT_KEYS if key in call), None)
    return (name, _arguments_text(arguments))


def _arguments_text(arguments: Any) -> str:
    """Return arguments as JSON text; models write null, "" or [] if a tool takes none."""
    if isinstance(arguments, str):
        return json_of_string(arguments)
    return to_json(arguments or {})
