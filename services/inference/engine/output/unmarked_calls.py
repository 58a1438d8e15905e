"""Reads calls without a marker: a whole answer that is JSON or a Python-like list, maybe fenced."""

import re
from collections.abc import Mapping
from typing import Any

from services.inference.engine.output.answer_format import (
    AnswerFormat,
    ArgumentFormat,
    CallFormat,
)
from services.inference.engine.output.answer_text import AnswerText, Deciding, Reading
from services.inference.engine.output.arguments import is_closed
from services.inference.engine.output.call_parser import (
    BEFORE_OBJECT,
    BEFORE_OBJECT_PREFIX,
    MAX_HEAD,
    CallParser,
)
from services.inference.engine.output.call_reader import CallReader
from services.inference.engine.output.parts import AnswerPart, ContentDelta
from services.inference.engine.output.patterns import MAX_SPACE, Hole, Pattern

_FENCE = re.compile(r"\s*```\w*+\s*+(?=\S)")
_FENCE_PREFIX = re.compile(r"\s*(`{0,2}|```\w*\s*)\Z")
_AFTER_FENCE = re.compile(r"\n```(?!\w)\s{0,64}(?:`?[^`\s]|``?[^`\s])")
_PYTHON_LIST = CallReader(
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


class UnmarkedCalls:
    """Such a call must name a declared tool."""

    def __init__(self, text: AnswerText, calls: CallParser) -> None:
        self._text, self._calls = text, calls

    def read(self) -> Deciding:
        """Read the calls, and return whether there are any."""
        text, starts = self._text, self._calls.starts
        while any(start.startswith(text.unread.lstrip()) for start in starts):
            if text.is_ended or text.unread.lstrip() in starts:
                break
            yield
        if text.unread.lstrip().startswith(starts):
            return False
        if text.unread.lstrip().startswith("`"):
            return (yield from self._read_fence())
        if (yield from self._calls.read_object_call(None, 0)):
            yield from self._calls.read_further_calls(None)
            return True
        if text.unread.lstrip().startswith("[") and text.is_at_start:
            return (yield from self._read_list())
        return False

    def read_entries(self) -> Reading:
        """Read the calls inside a fence."""
        if (yield from self._calls.read_object_call(None, 0)):
            yield from self._calls.read_further_calls(None, is_fenced=True)
        self._text.emit_content(self._text.take(len(self._text.unread)))

    def _read_list(self) -> Deciding:
        text, spaces = self._text, self._text.spaces
        while (found := _LIST_HEAD.match(text.unread[spaces:], text.is_ended)) is True:
            yield
        if isinstance(found, bool) or found["name"] not in self._calls.tools:
            return False
        text.take(spaces)
        yield from self._calls.read_named_call(_PYTHON_LIST, found)
        yield from self._calls.read_further_calls(_PYTHON_LIST)
        return True

    def _read_fence(self) -> Deciding:
        """
        Collect a fence that may contain calls, and parse it at the end of the answer: if anything
        but calls follows, it is content.
        """
        text = self._text
        while not (fence := _FENCE.match(text.unread)):
            partial = _FENCE_PREFIX.match(text.unread)
            if text.is_ended or not partial or len(text.unread) > MAX_SPACE:
                return False
            yield
        while (may_be_call := self._may_be_call(fence.end())) is None:
            if text.is_ended or len(text.unread) > MAX_HEAD:
                break
            yield
        return may_be_call is not False and (yield from self._read_fenced(fence.end()))

    def _may_be_call(self, start: int) -> bool | None:
        """Return whether a call begins in a fence; None if more text may tell."""
        written = self._text.unread
        begin = BEFORE_OBJECT.match(written, start)
        if not begin:
            return None if BEFORE_OBJECT_PREFIX.match(written, start) else False
        if self._calls.cannot_be_call(None, written, begin.end() - 1):
            return False
        return True if is_closed(written, begin.end() - 1) else None

    def _read_fenced(self, start: int) -> Deciding:
        text = self._text
        text.collect(start)
        while not (followed := _AFTER_FENCE.search(text.unread)) and not text.is_ended:
            if len(text.unread) > 4 * MAX_SPACE:
                text.collect(len(text.unread) - 2 * MAX_SPACE)
            yield
        text.collect(len(text.unread))
        written = text.take_collected()
        calls = None if followed else _parse_fenced_calls(written[start:], self._calls.tools)
        text.is_at_start = False
        if calls:
            text.emit_parts(calls)
            text.strips = True
        else:
            text.emit_content(written)
        return True


def _parse_fenced_calls(text: str, tools: Mapping[str, Any]) -> list[AnswerPart] | None:
    """Return the calls of a text inside fences, or None if it contains anything else."""
    inner = AnswerText()
    inner.add(text)
    inner.is_ended = True
    for _ in UnmarkedCalls(inner, CallParser(inner, AnswerFormat(), tools)).read_entries():
        continue
    parts, _ends = inner.take_parts()
    has_text = any(isinstance(part, ContentDelta) and part.text.strip() for part in parts)
    if has_text or inner.channel == "tool_call":
        return None
    return [part for part in parts if not isinstance(part, ContentDelta)] or None
