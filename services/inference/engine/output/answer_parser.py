"""
Parses the text of an answer by its model's format, while it streams.

A state machine: each state reads what belongs to it, and returns the next one.

    seam ──────► content ──► seam            content, and calls in it; a marker may stand at a seam
    thought ───► seam
    header ────► thought | content ──► message end ──► header    in formats with headers
"""

import re
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from services.inference.engine.output.answer_format import AnswerFormat
from services.inference.engine.output.answer_text import AnswerText, Deciding
from services.inference.engine.output.call_parser import CallParser
from services.inference.engine.output.call_reader import first_word
from services.inference.engine.output.parts import (
    AnswerPart,
    Channel,
    ContentDelta,
    ReasoningDelta,
)
from services.inference.engine.output.patterns import MAX_SPACE, Pattern, any_of
from services.inference.engine.output.unmarked_calls import UnmarkedCalls

State: TypeAlias = "Callable[[], Generator[None, None, State | None]]"
NextState: TypeAlias = "Generator[None, None, State | None]"  # None: the answer has ended

MAX_HEADER = 512


class FormatParser:
    """
    Splits an answer into parts. `tools` are the JSON schemas of the declared tools' arguments, by
    name. A call without an unmistakable marker must name one of them. `channel` is where the prompt
    ends.
    """

    def __init__(
        self, form: AnswerFormat, tools: Mapping[str, Any], channel: Channel = "content"
    ) -> None:
        self._form, self._has_tools = form, bool(tools)
        self._text = AnswerText(channel)
        self._calls = CallParser(self._text, form, tools)
        self._unmarked_calls = UnmarkedCalls(self._text, self._calls)
        self._seam_markers = _seam_markers(form)
        header = form.header
        self._message_ends = (*header.ends, header.start) if header else ()
        self._content_end = Pattern([" ", form.content_end.strip()])
        self._content_marks = self._marks_in_content()
        self._any_content_mark = any_of(self._content_marks)
        self._state: State = self._seam
        self.ends: list[int] = []
        self._reading = self._read()
        next(self._reading)

    @property
    def channel(self) -> Channel:
        return self._text.channel

    @property
    def held_length(self) -> int:
        return self._text.held_length

    @property
    def can_open_thought(self) -> bool:
        return self._state in (self._seam, self._header, self._message_end)

    @property
    def is_within_call(self) -> bool:
        return self._text.channel == "tool_call"

    def push(self, text: str) -> list[AnswerPart]:
        if self._text.add(text):
            next(self._reading, None)
        return self._take_parts()

    def flush(self) -> list[AnswerPart]:
        if not self._text.is_ended:
            self._text.is_ended = True
            next(self._reading, None)
        return self._take_parts()

    def _take_parts(self) -> list[AnswerPart]:
        parts, self.ends = self._text.take_parts()
        return parts

    def _read(self) -> Generator[None, None, None]:
        yield
        if self.channel == "reasoning":
            self._state = self._thought
        elif self._form.header:
            self._state = self._header
        while not self._text.is_finished and (state := (yield from self._state())):
            self._state = state

    def _marks_in_content(self) -> tuple[str, ...]:
        """Return the begins of markers that can stand anywhere in content."""
        turn = self._form.turn.strip()
        turns = [turn] if turn.startswith(("<", "[")) else []
        marks = [*self._calls.starts, first_word(self._form.content_end), *turns]
        return tuple(dict.fromkeys(filter(None, [*self._message_ends, *marks])))

    # states

    def _seam(self) -> NextState:
        """
        Read a marker at the begin of the answer, or after another one. White space before it is
        dropped.
        """
        text = self._text
        while (found := self._marker()) is None:
            yield
        if found:
            length, act = found
            text.take(length)
            text.strips = True
            return self._thought if act == "open" else self._seam
        begins_unmarked = text.unread.lstrip()[:1] in ("{", "[", "`")
        if self._has_tools and text.is_at_start and begins_unmarked:
            if (yield from self._unmarked_calls.read()):
                return self._seam
        return self._content

    def _marker(self) -> tuple[int, str] | Literal[False] | None:
        """Return the length of a marker and what it does; None if more text is needed."""
        text, spaces = self._text, self._text.spaces
        stripped = text.unread[spaces:]
        if not stripped:
            return False if text.is_ended or spaces >= MAX_SPACE else None
        for marker in self._seam_markers:
            if marker.is_first and not text.is_at_start:
                continue
            found = marker.pattern.match(stripped, text.is_ended)
            if isinstance(found, re.Match):
                return spaces + found.end(), marker.act
            if found is True and spaces < MAX_SPACE:
                return None
        return False

    def _thought(self) -> NextState:
        """Read a thought whose opening has been read, and its end."""
        text, reasoning = self._text, self._form.thought
        text.channel, text.strips = "reasoning", False
        ends = self._message_ends
        if not ends:
            assert reasoning
            ends = (reasoning.end.strip(),)
            yield from self._skip_second_opening(reasoning.start.strip())
        end = any_of(ends)
        while not (found := end.search(text.unread)) and not text.is_ended:
            yield from text.wait(ends, ReasoningDelta)
        if not found:
            text.emit_reasoning(text.take(len(text.unread)))
            return None
        text.emit_reasoning(text.take(len(text.unread[: found.start()].rstrip())))
        text.skip_spaces()
        if self._message_ends:
            return self._message_end
        text.take(len(found[0]))
        text.channel, text.strips = "content", True
        return self._seam

    def _skip_second_opening(self, start: str) -> Generator[None, None, None]:
        """Skip the opening of a thought, which a model may repeat."""
        yield from self._text.skip_all_spaces()
        if not start:
            return
        opening = Pattern([start])
        while (found := opening.match(self._text.unread, self._text.is_ended)) is True:
            yield
        if isinstance(found, re.Match):
            self._text.take(found.end())
            yield from self._text.skip_all_spaces()

    def _content(self) -> NextState:
        """Read content up to a marker."""
        text = self._text
        text.skip_stripped()
        while True:
            found = self._any_content_mark.search(text.unread)
            if found:
                text.emit_content(text.take(len(text.unread[: found.start()].rstrip())))
                if (state := (yield from self._marked(found[0]))) is not None:
                    return state
                text.emit_content(text.take(text.spaces + 1))
            elif text.is_ended:
                self._emit_rest()
                return None
            else:
                yield from text.wait(self._content_marks, ContentDelta)

    def _emit_rest(self) -> None:
        rest = self._text.take(len(self._text.unread))
        if rest.strip() or not self._text.strips:
            self._text.emit_content(rest)

    def _marked(self, mark: str) -> NextState:
        """Read what a mark begins after white space. Return None if it is ordinary content."""
        text = self._text
        if mark in self._message_ends:
            text.emit_content(text.take(text.spaces))
            return self._message_end
        if mark == first_word(self._form.content_end):
            return self._seam if (yield from self._skip_content_end()) else None
        if mark == self._form.turn.strip():
            text.take(text.spaces + len(mark))
            text.strips = True
            return self._seam
        if text.is_quoting and not text.spaces:
            return None  # text about calls
        if (yield from self._calls.read()):
            return self._content if self._form.header else self._seam
        return None

    def _skip_content_end(self) -> Deciding:
        text = self._text
        while (found := self._content_end.match(text.unread, text.is_ended)) is True:
            yield
        if isinstance(found, re.Match):
            text.take(found.end())
            text.strips = True
        return bool(found)

    # messages with headers

    def _header(self) -> NextState:
        """Read up to the text of a message. A header that never ends is content."""
        text, header = self._text, self._form.header
        assert header
        length = 0
        while not text.unread.endswith(header.body, 0, length):
            is_possible = re.fullmatch(header.prefix, text.unread[:length], re.DOTALL)
            is_all = length == len(text.unread)
            if not is_possible or length > MAX_HEADER or is_all and text.is_ended:
                return self._content
            if is_all:
                yield
            else:
                length += 1
        fields = text.unread[: length - len(header.body)]
        called = re.search(header.call, fields) if header.call else None
        if called and not self._calls.is_callable(called[1], header.start.startswith("<")):
            return self._content
        text.take(length)
        if called:
            is_complete = yield from self._calls.read_arguments_of(called[1])
            return self._message_end if is_complete else None
        if header.thought and re.search(header.thought, fields):
            return self._thought
        return self._content

    def _message_end(self) -> NextState:
        """Skip what ends a message and begins the next one."""
        text, header = self._text, self._form.header
        assert header
        text.channel = "content"
        while True:
            stripped = text.unread.lstrip()
            mark = next((mark for mark in self._message_ends if stripped.startswith(mark)), None)
            if mark:
                text.unread = stripped.removeprefix(mark)
                if mark == header.start:
                    return self._header
            elif text.is_ended or not any(m.startswith(stripped) for m in self._message_ends):
                return self._content
            else:
                yield


class SeamMarker(NamedTuple):
    """One that is first stands at the begin of an answer only."""

    pattern: Pattern
    act: Literal["open", "skip"]
    is_first: bool


def _seam_markers(form: AnswerFormat) -> list[SeamMarker]:
    """Return the markers of a seam with what they do, longer ones first."""
    opening = form.thought.start if form.thought else ""
    marks: list[tuple[str, Literal["open", "skip"], bool]] = [
        (opening.strip(), "open", form.reasoning is None),
        (form.reasoning.end.strip() if form.reasoning else "", "skip", True),
        (form.content_start.strip(), "skip", False),
        (form.turn.strip(), "skip", False),
    ]
    marks.sort(key=lambda mark: -len(mark[0]))
    return [SeamMarker(Pattern([mark]), act, is_first) for mark, act, is_first in marks if mark]
