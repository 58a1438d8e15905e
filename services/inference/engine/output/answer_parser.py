"""
Parses the text of an answer by its model's format, while it streams.

The parser is a coroutine: it reads `_text` and yields when more is needed to decide, so a decision
depends on the whole text so far and not on how it was divided. What it holds back is either short
(a possible marker, white space, the head of a call), or collected in a list: time is linear.
"""

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache
from typing import Any

from services.inference.engine.output.answer_format import (
    HERMES,
    KEY,
    AnswerFormat,
    ArgumentFormat,
    CallFormat,
)
from services.inference.engine.output.call_reader import (
    ARGUMENT_KEYS,
    CALL_KEYS,
    NAME_KEYS,
    CallReader,
    first_word,
)
from services.inference.engine.output.call_values import (
    GEMMA_QUOTE,
    expression_to_json,
    property_schema,
    raw_to_json,
    to_json,
    tree_to_json,
    types_of,
)
from services.inference.engine.output.parts import (
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    Channel,
    ContentDelta,
    ReasoningDelta,
)
from services.inference.engine.output.patterns import MAX_SPACE, Hole, Pattern, partial_length

Reading = Generator[None, None, None]
Deciding = Generator[None, None, bool]

MAX_HEAD = 2048  # characters up to the arguments of a call that streams
MAX_HEADER = 512
CDATA, CDATA_END = "<![CDATA[", "]]>"

_SPACES = re.compile(r"\s*")
_STRUCTURAL = re.compile(r'["\\{}]')
_FENCE = re.compile(r"\s*```\w*+\s*+(?=\S)")
_FENCE_PREFIX = re.compile(r"\s*(`{0,2}|```\w*\s*)\Z")
_BEFORE_OBJECT = re.compile(r"\s*(?:```\w*\s*)?(?:\[\s*)?\{")
_BEFORE_OBJECT_PREFIX = re.compile(r"\s*(?:`{0,2}|```\w*\s*(?:\[\s*)?|\[\s*)\Z")
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_EMPTY_OBJECT = re.compile(r"\{\s*\}")
_AFTER_ARGUMENTS = re.compile(
    r'\s*(?:,\s*"[^"]{0,256}"\s*:\s*(?:"[^"]{0,256}"|[\w.+-]{1,64})\s*)*\}'
)
_AFTER_ARGUMENTS_PREFIX = re.compile(r'(?:\s|,|"[^"]{0,256}"?|:|[\w.+-]{1,64})*\Z')
_ENTRY_SEPARATORS = re.compile(r"[\s},;\]]*")
_ENTRY_SEPARATORS_IN_FENCE = re.compile(r"(?:[\s},;\]]|```\w*)*")
_KEY = re.compile(r"[\w.$-]{1,256}")
_PYTHON_TOKEN = re.compile(r"""["'\\{}\[\](),]""")
_GEMMA_TOKEN = re.compile(r'<\|"\|>|[{}\[\](),]')


class FormatParser:
    """
    Splits an answer into parts. `tools` are the JSON schemas of the declared tools' arguments, by
    name. A call without an unmistakable marker must name one of them. `channel` is where the prompt
    ends.
    """

    def __init__(
        self, form: AnswerFormat, tools: Mapping[str, Any], channel: Channel = "content"
    ) -> None:
        self._form, self._tools = form, tools
        self._readers = _readers(form, bool(tools))
        self._text = ""  # not read yet
        self._collected: list[str] = []  # read, but in no part yet
        self._collected_length = 0
        self._is_ended = False
        self._parts: list[AnswerPart] = []
        self.channel: Channel = channel
        self._is_first_call_open = False
        self._is_at_start = True  # of the answer: no content and no call yet
        self._strips = False  # white space at the begin of content belongs to a marker before
        self._seam_markers = _seam_markers(form)
        self._content_marks = _content_marks(form, self._readers)
        self._content_regex = _any(self._content_marks)
        self._coroutine = self._read_answer()
        next(self._coroutine)

    @property
    def held_length(self) -> int:
        return len(self._text) + self._collected_length

    @property
    def is_within_call(self) -> bool:
        return self.channel == "tool_call"

    def push(self, text: str) -> list[AnswerPart]:
        if text:
            self._text += text
            self._resume()
        return self._take_parts()

    def flush(self) -> list[AnswerPart]:
        if not self._is_ended:
            self._is_ended = True
            self._resume()
        return self._take_parts()

    def _resume(self) -> None:
        next(self._coroutine, None)

    def _take_parts(self) -> list[AnswerPart]:
        parts, self._parts = self._parts, []
        return parts

    # parts

    def _emit(self, part: AnswerPart) -> None:
        self._parts.append(part)

    def _emit_content(self, text: str) -> None:
        if text:
            self._is_at_start = self._is_at_start and not text.strip()
            self._emit(ContentDelta(text))

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._emit(ArgumentsDelta(text))

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _skip_spaces(self) -> None:
        self._text = self._text.lstrip()

    def _collect(self, length: int) -> None:
        taken = self._take(length)
        self._collected.append(taken)
        self._collected_length += len(taken)

    def _take_collected(self) -> str:
        text, self._collected, self._collected_length = "".join(self._collected), [], 0
        return text

    # the answer

    def _read_answer(self) -> Reading:
        yield
        if self._form.header:
            yield from self._read_messages()
            return
        if self.channel == "reasoning":
            yield from self._read_reasoning()
        while not (self._is_ended and not self._text):
            if not (yield from self._read_seam()):
                yield from self._read_content()

    def _read_messages(self) -> Reading:
        """Read messages with headers, the first one without its start."""
        header = self._form.header
        assert header
        is_header = self.channel == "content"
        while not (self._is_ended and not self._text):
            if is_header:
                yield from self._read_header()
            if self.channel == "reasoning":
                yield from self._read_text(header.ends + (header.start,), ReasoningDelta)
            elif self.channel == "content":
                yield from self._read_body()
            if self.is_within_call:
                return  # truncated
            self.channel = "content"
            is_header = yield from self._skip_header_start()

    def _skip_header_start(self) -> Deciding:
        """Skip what ends a message and begins the next one, and return whether one begins."""
        header = self._form.header
        assert header
        while True:
            stripped = self._text.lstrip()
            for mark in header.ends:
                if stripped.startswith(mark):
                    self._text = stripped.removeprefix(mark)
                    break
            else:
                if stripped.startswith(header.start):
                    self._text = stripped.removeprefix(header.start)
                    return True
                marks = (*header.ends, header.start)
                if self._is_ended or not any(m.startswith(stripped) for m in marks):
                    return False
                yield

    def _read_header(self) -> Reading:
        """Read up to the text of a message. A header that never ends is content."""
        header = self._form.header
        assert header
        while header.body not in self._text[: MAX_HEADER + len(header.body)]:
            is_possible = re.fullmatch(header.prefix, self._text, re.DOTALL)
            if self._is_ended or len(self._text) > MAX_HEADER or not is_possible:
                return
            yield
        fields, _, rest = self._text.partition(header.body)
        if not re.fullmatch(header.prefix, fields, re.DOTALL):
            return
        called = re.search(header.call, fields) if header.call else None
        if called and not (self._is_marked_header or called[1] in self._tools):
            return
        self._text = rest
        if called:
            self._begin_call(called[1], "")
            if (yield from self._read_object_arguments()):
                self._end_call()
        elif header.thought and re.search(header.thought, fields):
            self.channel = "reasoning"

    @property
    def _is_marked_header(self) -> bool:
        header = self._form.header
        return bool(header and header.start.startswith("<"))

    def _read_body(self) -> Reading:
        """Read content and marked calls up to the end of a message."""
        header = self._form.header
        assert header
        marks = (*header.ends, header.start)
        while True:
            if (yield from self._read_marked_calls()):
                continue
            self._skip_stripped()
            if (yield from self._read_until_mark(marks)):
                return
            if self._is_ended and not self._text:
                return

    def _read_marked_calls(self) -> Deciding:
        for reader in self._readers:
            if (yield from self._read_calls(reader)):
                return True
        return False

    def _skip_stripped(self) -> None:
        if self._strips:
            self._skip_spaces()
            self._strips = not self._text

    def _read_until_mark(self, ends: Sequence[str]) -> Deciding:
        """Emit content up to an end, and return True, or up to a possible call."""
        starts = [start for reader in self._readers for start in reader.starts]
        marks = (*ends, *starts)
        regex = _any(marks)
        skip = 1 if any(self._text.startswith(start) for start in starts) else 0
        while True:
            if found := regex.search(self._text, skip):
                self._emit_content(self._take(found.start()))
                return found[0] in ends
            self._emit_certain(marks, ContentDelta)
            skip = 0
            if self._is_ended:
                self._emit_content(self._take(len(self._text)))
                return True
            yield

    # reasoning

    def _read_reasoning(self) -> Reading:
        """Read a thought whose opening has been read, and its end."""
        reasoning = self._form.reasoning
        assert reasoning
        self.channel = "reasoning"
        end = reasoning.end.strip()
        yield from self._skip_all_spaces()
        start = Pattern([reasoning.start.strip() or end])
        while (found := start.match(self._text, self._is_ended)) is True:
            yield
        if reasoning.start.strip() and isinstance(found, re.Match):
            self._take(found.end())  # again, after the prompt has opened it
            yield from self._skip_all_spaces()
        yield from self._read_text((end,), ReasoningDelta)
        self._take(len(end) if self._text.startswith(end) else 0)
        self.channel = "content"
        self._strips = True

    def _skip_all_spaces(self) -> Reading:
        while not self._text.lstrip() and not self._is_ended:
            self._skip_spaces()
            yield
        self._skip_spaces()

    def _read_text(self, ends: Sequence[str], kind: type[ReasoningDelta]) -> Reading:
        """Emit text up to one of the ends, which stays, or the end of the answer."""
        regex = _any(ends)
        while not (found := regex.search(self._text)):
            if self._is_ended:
                if self._text:
                    self._emit(kind(self._take(len(self._text))))
                return
            self._emit_certain(ends, kind)
            yield
        length = len(self._text[: found.start()].rstrip())
        if length:
            self._emit(kind(self._text[:length]))
        self._text = self._text[found.start() :]

    def _emit_certain(
        self, marks: Sequence[str], kind: type[ContentDelta] | type[ReasoningDelta]
    ) -> None:
        """Emit the text without a partial mark at its end, and without white space before it."""
        length = len(self._text) - partial_length(self._text, marks)
        certain = len(self._text[:length].rstrip())
        length = max(certain, length - MAX_SPACE)
        if length <= 0:
            return
        if kind is ContentDelta:
            self._emit_content(self._take(length))
        else:
            self._emit(kind(self._take(length)))

    # content

    def _read_seam(self) -> Deciding:
        """
        Read a marker at the begin of the answer, or after another one, and return whether there was
        one. White space before it is dropped.
        """
        while True:
            stripped = self._text.lstrip()
            for _, pattern, act in self._seam_markers:
                found = pattern.match(stripped, self._is_ended)
                if found is True and self._text and len(self._text) - len(stripped) < MAX_SPACE:
                    break
                if isinstance(found, re.Match) and stripped:
                    if act == "close" and not self._is_at_start:
                        continue
                    self._text = stripped[found.end() :]
                    yield from self._act(act)
                    return True
            else:
                if stripped or self._is_ended or len(self._text) >= MAX_SPACE:
                    break
            if self._is_ended:
                break
            yield
        if self._tools and self._is_at_start and stripped[:1] in ("{", "[", "`"):
            if (yield from self._read_bare()):
                return True
        return False

    def _act(self, act: str) -> Reading:
        if act == "open":
            yield from self._read_reasoning()
        else:
            self._strips = True

    def _read_content(self) -> Reading:
        """Read content, and calls in it, until the answer ends or a marker may follow."""
        self._skip_stripped()
        while True:
            found = self._content_regex.search(self._text)
            if found is None:
                self._emit_certain(self._content_marks, ContentDelta)
                if self._is_ended:
                    self._emit_rest()
                    return
                yield
                continue
            before = self._text[: found.start()]
            self._emit_content(self._take(len(before.rstrip())))
            if self._form.content_end and found[0] == first_word(self._form.content_end):
                if (yield from self._skip_content_end()):
                    return
            elif (yield from self._read_marked()):
                return
            spaces = len(self._text) - len(self._text.lstrip())
            self._emit_content(self._take(spaces + 1))

    def _emit_rest(self) -> None:
        rest = self._take(len(self._text))
        if rest.strip() or not self._strips:
            self._emit_content(rest)

    def _skip_content_end(self) -> Deciding:
        end = Pattern([" ", self._form.content_end.strip()])
        while (found := end.match(self._text, self._is_ended)) is True:
            yield
        if not found:
            return False
        assert isinstance(found, re.Match)
        self._take(found.end())
        self._strips = True
        return True

    def _read_marked(self) -> Deciding:
        """Read the calls or the turn that begin after white space, and return whether they do."""
        turn = self._form.turn.strip()
        if turn and self._text.lstrip().startswith(turn):
            self._text = self._text.lstrip().removeprefix(turn)
            self._strips = True
            return True
        return (yield from self._read_marked_calls())

    # calls

    def _read_calls(self, reader: CallReader) -> Deciding:
        """Read the calls that begin after white space, and return whether there are any."""
        core = yield from self._read_call(reader)
        is_call = core is not None
        while core is not None:
            core = yield from self._read_after_call(reader, core)
        return is_call

    def _read_call(self, reader: CallReader) -> Generator[None, None, str | None]:
        """Read a call after white space and return its opening, or None if there is none."""
        spaces = len(self._text) - len(self._text.lstrip())
        for core, head in zip(reader.cores, reader.heads, strict=True):
            while (found := head.match(self._text[spaces:], self._is_ended)) is True:
                yield
            if isinstance(found, bool):
                continue
            if reader.form.object:
                if (yield from self._read_object_call(reader, spaces + found.end())):
                    return core
            elif self._is_callable(reader, found["name"]):
                self._take(spaces + found.end())
                yield from self._read_named_call(reader, found)
                return core
        return None

    def _is_callable(self, reader: CallReader | None, name: str) -> bool:
        """Return whether a call may name it: after an unmistakable marker, any name that is one."""
        return bool(name) and (bool(reader and reader.is_marked) or name in self._tools)

    def _begin_call(self, name: str, call_id: str) -> None:
        self.channel = "tool_call"
        self._is_at_start = False
        self._emit(CallStart(name, call_id))

    def _end_call(self) -> None:
        self.channel = "content"
        self._strips = True

    def _read_named_call(self, reader: CallReader, found: re.Match[str]) -> Reading:
        """Read the arguments of a call whose name is no JSON."""
        self._begin_call(found["name"], found.groupdict().get("id") or "")
        if reader.form.argument is None:
            is_complete = yield from self._read_object_arguments()
        else:
            is_complete = yield from _ArgumentReading(self, reader, found["name"]).run()
        if is_complete:
            self._end_call()

    def _read_object_arguments(self) -> Deciding:
        """
        Emit a JSON object, an object in a JSON string, or an empty one if there is none. Return
        whether it is complete.
        """
        while not self._text.lstrip() and not self._is_ended:
            yield
        if self._is_ended and not self._text.strip():
            return False
        self._skip_spaces()
        if self._text.startswith("{"):
            return (yield from self._read_object(self._emit_arguments_of))
        if self._text.startswith('"'):
            yield from self._read_string_arguments()
        else:
            self._emit_arguments("{}")
        return True

    def _emit_arguments_of(self, length: int) -> None:
        self._emit_arguments(self._take(length))

    def _read_string_arguments(self) -> Reading:
        while not (found := re.match(r'"((?:[^"\\]|\\.)*)"', self._text, re.DOTALL)):
            if self._is_ended or len(self._text) > MAX_HEAD:
                self._emit_arguments("{}")
                return
            yield
        try:
            text = json.loads(found[0], strict=False)
            json.loads(text)
        except ValueError:
            text = to_json({"arguments": found[1]})
        self._take(found.end())
        self._emit_arguments(text or "{}")

    def _read_object(self, take: Callable[[int], None]) -> Deciding:
        """Take a JSON object piece by piece, and return whether it is complete."""
        scanner = _ObjectScanner()
        while True:
            end = scanner.push(self._text)
            take(len(self._text) if end is None else end)
            if end is not None:
                return True
            if self._is_ended:
                return False
            yield

    # calls that are a JSON object

    def _read_object_call(self, reader: CallReader | None, start: int) -> Deciding:
        """
        Read a call after `start` characters of markers, and return whether it is one. If not, the
        text is unchanged, or what can't contain a call was emitted.
        """
        while not (before := _BEFORE_OBJECT.match(self._text, start)):
            partial = _BEFORE_OBJECT_PREFIX.match(self._text, start)
            if self._is_ended or not partial or len(self._text) > start + MAX_SPACE:
                return False
            yield
        begin = before.end() - 1
        head = _object_head(reader)
        while True:
            text = self._text[: begin + MAX_HEAD]
            found = head.match(text, begin)
            if found and self._is_callable(reader, found["name"]):
                self._take(found.end())
                self._begin_call(found["name"], "")
                if (yield from self._read_object(self._emit_arguments_of)):
                    yield from self._read_object_end()
                    self._end_call()
                return True
            if self._cannot_be_call(reader, text, begin, found):
                return False
            if (
                len(self._text) > begin + MAX_HEAD
                or self._is_ended
                or _is_closed(self._text, begin)
            ):
                return (yield from self._read_whole_call(reader, begin))
            yield

    def _cannot_be_call(
        self, reader: CallReader | None, text: str, begin: int, found: re.Match[str] | None
    ) -> bool:
        if found or _EMPTY_OBJECT.match(text, begin):
            return True
        first = _FIRST_KEY.match(text, begin)
        if reader and reader.form.object and not reader.form.object.name_key:
            return bool(first and not self._is_callable(reader, first[1]))
        if first:
            return first[1] not in CALL_KEYS
        inner = text[begin + 1 : begin + 1 + MAX_SPACE].lstrip()
        return bool(inner) and not inner.startswith('"')

    def _read_object_end(self) -> Reading:
        """Skip the rest of a call's object after its arguments."""
        while not (found := _AFTER_ARGUMENTS.match(self._text)):
            partial = _AFTER_ARGUMENTS_PREFIX.match(self._text)
            if self._is_ended or not partial or len(self._text) > MAX_HEAD:
                return
            yield
        self._take(found.end())

    def _read_whole_call(self, reader: CallReader | None, begin: int) -> Deciding:
        """
        Read a complete call, whose keys may have any order, and whose arguments may be missing,
        empty, or JSON in a string. Emit what is none as content.
        """
        self._collect(begin)
        is_complete = yield from self._read_object(self._collect)
        text = self._take_collected()
        call = _parse_call(text[begin:], self._name_key(reader)) if is_complete else None
        if call and self._is_callable(reader, call[0]):
            self._begin_call(call[0], call[2])
            self._emit_arguments(call[1])
            self._end_call()
            return True
        self._emit_content(text)
        self._is_at_start = False
        return False

    def _name_key(self, reader: CallReader | None) -> str:
        form = reader.form.object if reader else None
        return form.name_key if form else "name"

    def _read_after_call(
        self, reader: CallReader | None, core: str, is_fenced: bool = False
    ) -> Generator[None, None, str | None]:
        """
        Read the markers after a call. Return the opening of a further call, which has been read, or
        None if something else follows.
        """
        is_object = reader is None or reader.form.object is not None
        separators = _ENTRY_SEPARATORS_IN_FENCE if is_fenced else _ENTRY_SEPARATORS
        if not is_object:
            separators = _SPACES
        while self.channel == "content":
            self._text = separators.sub("", self._text, count=1)
            if not self._text:
                if self._is_ended:
                    return None
                yield
                continue
            if reader and (yield from self._skip_closer(reader)):
                continue
            if reader and (further := (yield from self._read_further_call(reader))) is not None:
                return further
            if is_object and self._text.startswith("{") and core != HERMES_CORE:
                if (yield from self._read_object_call(reader, 0)):
                    continue
            return None
        return None

    def _skip_closer(self, reader: CallReader) -> Deciding:
        closers = reader.closers + ("```",)
        while True:
            found = next((c for c in closers if self._text.startswith(c)), None)
            longer = any(c.startswith(self._text) and len(c) > len(found or "") for c in closers)
            is_head = any(c.startswith(self._text) for c in reader.cores)
            if self._is_ended or not (longer or is_head):
                break
            yield
        is_open = any(self._text.startswith(core) for core in reader.cores if core != found)
        if found is None or is_open:
            return False
        self._take(len(found))
        return True

    def _read_further_call(self, reader: CallReader) -> Generator[None, None, str | None]:
        """Read a further call in the same section, and return its opening, or None."""
        core = yield from self._read_call(reader)
        if core is not None or reader.bare_head is None:
            return core
        while (found := reader.bare_head.match(self._text, self._is_ended)) is True:
            yield
        if isinstance(found, bool) or not self._is_next(reader, found["name"]):
            return None
        self._take(found.end())
        yield from self._read_named_call(reader, found)
        return ""

    def _is_next(self, reader: CallReader, name: str) -> bool:
        return name in self._tools or reader.is_marked and not self._tools

    # calls without a marker

    def _read_bare(self) -> Deciding:
        """Read calls that are the whole answer, as JSON or as a Python-like list, maybe fenced."""
        starts = tuple(start for reader in self._readers for start in reader.starts)
        while any(start.startswith(self._text.lstrip()) for start in starts):
            if self._is_ended or self._text.lstrip() in starts:
                break
            yield
        if self._text.lstrip().startswith(starts):
            return False
        if self._text.lstrip().startswith("`"):
            return (yield from self._read_fence())
        if (yield from self._read_object_call(None, 0)):
            yield from self._read_after_call(None, "")
            return True
        if self._text.lstrip().startswith("[") and self._is_at_start:
            return (yield from self._read_calls_of_list())
        return False

    def _read_calls_of_list(self) -> Deciding:
        spaces = len(self._text) - len(self._text.lstrip())
        while (found := _LIST_HEAD.match(self._text[spaces:], self._is_ended)) is True:
            yield
        if isinstance(found, bool) or found["name"] not in self._tools:
            return False
        self._take(spaces + found.end())
        yield from self._read_named_call(PYTHON_LIST, found)
        while (yield from self._read_after_call(PYTHON_LIST, "")) is not None:
            pass
        return True

    def _read_fence(self) -> Deciding:
        """
        Collect a fence that may contain calls, and parse it at the end of the answer: if anything
        but calls follows, it is content.
        """
        while not (fence := _FENCE.match(self._text)):
            partial = _FENCE_PREFIX.match(self._text)
            if self._is_ended or not partial or len(self._text) > MAX_SPACE:
                return False
            yield
        begin = _BEFORE_OBJECT.match(self._text, fence.end())
        while not begin or not _FIRST_KEY.match(self._text, begin.end() - 1):
            if (
                self._is_ended
                or begin
                and self._cannot_be_call(None, self._text, begin.end() - 1, None)
            ):
                return False
            if not begin and not _BEFORE_OBJECT_PREFIX.match(self._text, fence.end()):
                return False
            if len(self._text) > MAX_HEAD:
                return False
            yield
            begin = _BEFORE_OBJECT.match(self._text, fence.end())
        if self._cannot_be_call(None, self._text, begin.end() - 1, None):
            return False
        return (yield from self._read_fenced(fence.end()))

    def _read_fenced(self, start: int) -> Deciding:
        self._collect(start)
        while not (followed := _AFTER_FENCE.search(self._text)):
            if self._is_ended:
                break
            if len(self._text) > 4 * MAX_SPACE:
                self._collect(len(self._text) - 2 * MAX_SPACE)
            yield
        self._collect(len(self._text))
        text = self._take_collected()
        calls = None if followed else _parse_fenced_calls(text[start:], self._tools)
        self._is_at_start = False
        if calls:
            self._parts += calls
            self._strips = True
            return True
        self._emit_content(text)
        return True

    def read_entries(self) -> Reading:
        """Read the calls inside a fence."""
        yield
        if (yield from self._read_object_call(None, 0)):
            yield from self._read_after_call(None, "", is_fenced=True)
        self._emit_content(self._take(len(self._text)))


class _ArgumentReading:
    """Reads arguments that are written one by one, and emits them as one JSON object."""

    def __init__(self, parser: "FormatParser", reader: CallReader, name: str) -> None:
        argument = reader.form.argument
        assert argument
        self._parser, self._reader, self._argument = parser, reader, argument
        self._parameters = parser._tools.get(name)
        self._count = 0
        self._is_other = False  # the marker says that the value is no string

    def run(self) -> Deciding:
        """Read all arguments, and return whether they are complete."""
        while (yield from self._read_argument()):
            pass
        if self._parser._is_ended and not self._is_closing():
            return False
        self._parser._emit_arguments("}" if self._count else "{}")
        return True

    def _is_closing(self) -> bool:
        text = self._parser._text.lstrip()
        return any(text.startswith(closer) for closer in self._reader.closers)

    def _read_argument(self) -> Deciding:
        """Read one argument, and return whether there was a complete one."""
        found = yield from self._read_head()
        if not found:
            return False
        parser, argument = self._parser, self._argument
        parser._take(found.end())
        key = found["key"]
        types = types_of(property_schema(self._parameters, key))
        is_string: bool | None = None
        if len({mid for _, mid in argument.mids}) > 1:
            is_string = not self._is_other
        elif types is not None and len(types) == 1:
            is_string = types == {"string"}
        parser._emit_arguments(("{" if not self._count else ", ") + to_json(key) + ": ")
        self._count += 1
        if argument.syntax in ("raw", "cdata", "xml"):
            return (yield from self._read_raw(key, is_string, types))
        return (yield from self._read_expression(types))

    def _read_head(self) -> Generator[None, None, re.Match[str] | None]:
        """Read up to an argument's value."""
        parser, argument = self._parser, self._argument
        patterns = _argument_heads(argument, self._count > 0)
        while True:
            spaces = len(parser._text) - len(parser._text.lstrip())
            parser._take(spaces)
            is_partial = False
            for pattern, is_other in patterns:
                found = pattern.match(parser._text, parser._is_ended)
                if isinstance(found, re.Match):
                    self._is_other = is_other
                    return found
                is_partial = is_partial or found
            if parser._is_ended or not is_partial and parser._text:
                return None
            yield

    def _read_raw(self, key: str, is_string: bool | None, types: set[str] | None) -> Deciding:
        """Read a value up to its closing marker; a string streams."""
        parser = self._parser
        yield from self._skip_line_break()
        prefix = ""
        if self._argument.syntax == "cdata" and (yield from self._skip_cdata()):
            prefix = CDATA_END
        close = prefix + self._argument.close.replace(KEY, key)
        take = self._string_piece if is_string else parser._collect
        if is_string:
            parser._emit_arguments('"')
        if not (yield from self._read_until_close(close, take)):
            return self._finish_truncated(is_string)
        if is_string:
            parser._emit_arguments('"')
            return True
        value = parser._take_collected()
        known = types if is_string is None else (types or _OTHER_TYPES)
        is_tree = self._argument.syntax == "xml"
        parser._emit_arguments((tree_to_json if is_tree else raw_to_json)(value, known))
        return True

    def _read_until_close(self, close: str, take: Callable[[int], None]) -> Deciding:
        """
        Take a value up to its closing marker, which is skipped, and return whether there is one. A
        marker that nothing of a call follows belongs to the value.
        """
        parser, mark = self._parser, first_word(close)
        pattern = self._reader.close_pattern(close)
        leading = close[: len(close) - len(close.lstrip())]
        skip = 0
        while True:
            at = parser._text.find(mark, skip)
            certain = (at if at >= 0 else len(parser._text) - len(mark)) - len(leading)
            if certain > 0 and not (at < 0 and parser._is_ended):
                take(certain)
                at, skip = at - certain, max(0, skip - certain)
            if at < 0:
                if parser._is_ended:
                    return False
                yield
                continue
            found = pattern.match(parser._text[at:], parser._is_ended)
            if found is True:
                yield
                continue
            is_last = parser._is_ended and not parser._text[at + len(mark) :].strip()
            if found or is_last:
                break
            skip = at + 1
        take(at - (len(leading) if parser._text[:at].endswith(leading) else 0))
        parser._take(parser._text.find(mark))
        matched = Pattern([close.strip()]).match(parser._text, True)
        parser._take(matched.end() if isinstance(matched, re.Match) else len(mark))
        return True

    def _skip_cdata(self) -> Deciding:
        parser = self._parser
        while CDATA.startswith(parser._text) and not parser._is_ended and parser._text != CDATA:
            yield
        is_cdata = parser._text.startswith(CDATA)
        parser._text = parser._text.removeprefix(CDATA)
        return is_cdata

    def _skip_line_break(self) -> Reading:
        """Skip the white space that the template writes before a value."""
        mid = self._argument.mid
        trailing = mid[len(mid.rstrip()) :]
        parser = self._parser
        while trailing.startswith(parser._text) and len(parser._text) < len(trailing):
            if parser._is_ended:
                return
            yield
        parser._text = parser._text.removeprefix(trailing)

    def _string_piece(self, length: int) -> None:
        self._parser._emit_arguments(to_json(self._parser._take(length))[1:-1])

    def _finish_truncated(self, is_string: bool | None) -> bool:
        parser = self._parser
        if is_string:
            self._string_piece(len(parser._text))
            return False
        parser._collect(len(parser._text))
        text = parser._take_collected()
        parser._emit_arguments(text)
        return False

    def _read_expression(self, types: set[str] | None) -> Deciding:
        """Read a value up to a comma or a closing bracket outside of quotes and brackets."""
        parser, syntax = self._parser, self._argument.syntax
        scanner = _ExpressionScanner(syntax == "gemma")
        while True:
            length, is_complete = scanner.scan(parser._text, parser._is_ended)
            parser._collect(length)
            if is_complete or parser._is_ended:
                break
            yield
        text = parser._take_collected()
        if not is_complete:
            parser._emit_arguments(text)
            return False
        parser._emit_arguments(expression_to_json(text, syntax, types))
        return True


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
            elif self._step(found[0]):
                return found.start(), True
        return certain, False

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


_OTHER_TYPES = {"number", "integer", "boolean", "null", "object", "array"}
_AFTER_FENCE = re.compile(r"\n```(?!\w)\s{0,64}(?:`?[^`\s]|``?[^`\s])")
HERMES_CORE = HERMES.call_open.strip()
MISTRAL_LIST = CallFormat(
    section_open="[TOOL_CALLS][", separator=", ", section_close="]", object=HERMES.object
)
PYTHON_LIST = CallReader(
    CallFormat(
        section_open="[",
        name_end="(",
        call_close=")",
        separator=", ",
        section_close="]",
        argument=ArgumentFormat("", (("string", "="),), "", ", ", "python"),
    )
)
_LIST_HEAD = Pattern(["[", Hole("name", min_length=1), "("])
_CALL_READERS = cache(CallReader)


def _readers(form: AnswerFormat, has_tools: bool) -> list[CallReader]:
    """
    Return readers of the model's own calls, and of common ones: fine-tuned models do not always
    keep to the template.
    """
    own = [form.calls] if form.calls else []
    common = [HERMES, MISTRAL_LIST] if has_tools and not form.header else []
    readers = [_CALL_READERS(each) for each in (*own, *common)]
    starts = {start for reader in readers[: len(own)] for start in reader.starts}
    return [
        reader
        for i, reader in enumerate(readers)
        if reader.starts and (i < len(own) or starts.isdisjoint(reader.starts))
    ]


def _seam_markers(form: AnswerFormat) -> list[tuple[str, Pattern, str]]:
    """Return the markers of a seam with what they do, longer ones first."""
    reasoning = form.reasoning
    marks = [
        (reasoning.start if reasoning else "", "open"),
        (reasoning.end if reasoning else "", "close"),
        (form.content_start, "skip"),
        (form.turn, "skip"),
    ]
    patterns = [(text.strip(), Pattern([text.strip()]), act) for text, act in marks if text.strip()]
    return sorted(patterns, key=lambda mark: -len(mark[0]))


def _content_marks(form: AnswerFormat, readers: Sequence[CallReader]) -> list[str]:
    """Return the begins of markers that can stand anywhere in content."""
    starts = [start for reader in readers for start in reader.starts]
    ends = [first_word(form.content_end)] if form.content_end else []
    turn = [form.turn.strip()] if form.turn.strip().startswith(("<", "[")) else []
    return list(dict.fromkeys(filter(None, [*starts, *ends, *turn])))


@cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _any(texts: Sequence[str]) -> re.Pattern[str]:
    return _any_of(tuple(texts))


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


@cache
def _object_head(reader: CallReader | None) -> re.Pattern[str]:
    """Return the regex of a call's object up to its arguments, with the keys in the usual order."""
    form = reader.form.object if reader else None
    if form and not form.name_key:
        return re.compile(r'\{\s*"(?P<name>[^"\\]{1,256})"\s*:\s*(?=\{)')
    names = "|".join(
        map(re.escape, dict.fromkeys((*NAME_KEYS, *((form.name_key,) if form else ()))))
    )
    keys = "|".join(
        map(re.escape, dict.fromkeys((*ARGUMENT_KEYS, *((form.arguments_key,) if form else ()))))
    )
    first = r'(?:"(?:id|tool_call_id|type)"\s*:\s*(?:"[^"\\]{0,256}"|\d{1,9})\s*,\s*){0,2}'
    return re.compile(
        rf'\{{\s*{first}"(?:{names})"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:{keys})"\s*:\s*(?=\{{)'
    )


def _is_closed(text: str, begin: int) -> bool:
    return _ObjectScanner().push(text[begin:]) is not None


def _parse_call(text: str, name_key: str) -> tuple[str, str, str] | None:
    """Return name, arguments as JSON, and id of a call as a complete JSON object, or None."""
    try:
        call = json.loads(text)
        if not name_key and len(call) == 1:
            ((name, arguments),) = call.items()
            return (name, _arguments_text(arguments), "")
        is_plain = call.keys() <= CALL_KEYS
        call = call.get("function", call) if not isinstance(call.get("function"), str) else call
        name = next(call[key] for key in (name_key, *NAME_KEYS, "function") if key in call)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, StopIteration):
        return None
    if not isinstance(name, str) or not is_plain:
        return None
    arguments = next((call[key] for key in ARGUMENT_KEYS if key in call), None)
    return (name, _arguments_text(arguments), "")


def _arguments_text(arguments: Any) -> str:
    """Return arguments as JSON text; models write null, "" or [] if a tool takes none."""
    if isinstance(arguments, str) and arguments:
        return arguments
    return to_json(arguments or {})


def _parse_fenced_calls(text: str, tools: Mapping[str, Any]) -> list[AnswerPart] | None:
    """Return the calls of a text inside fences, or None if it contains anything else."""
    parser = FormatParser(AnswerFormat(), tools)
    parser._coroutine = parser.read_entries()
    next(parser._coroutine)
    parts = [*parser.push(text), *parser.flush()]
    has_text = any(isinstance(part, ContentDelta) and part.text.strip() for part in parts)
    if has_text or parser.is_within_call:
        return None
    return [part for part in parts if not isinstance(part, ContentDelta)] or None
