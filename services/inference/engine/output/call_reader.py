"""A call format, prepared for reading: patterns of a call's head, and markers that end it."""

import re
from collections.abc import Iterable
from functools import lru_cache

from services.inference.engine.output.answer_format import ID, CallFormat
from services.inference.engine.output.patterns import Ahead, Hole, Item, Pattern

NAME_KEYS = ("name", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = {*NAME_KEYS, *ARGUMENT_KEYS, "id", "tool_call_id", "type", "function"}

_MARKER = re.compile(r"<[^<>\s]*>(?:\w+<[^<>\s]*>)?|\[[^\[\]\s]*\]|\S")
_WORD = re.compile(r"\S+")
_ONLY_JSON = re.compile(r"[\s\[{(]*\Z")
_LIST_OR_FENCE = re.compile(r"(\s|\[|```\w*)+\Z")
_UNMISTAKABLE = re.compile(r"<[^<>\s]{3,}|\[[A-Z_]{3,}\]")


def first_word(literal: str) -> str:
    return (literal.split() or [""])[0]


class CallReader:
    """
    `starts` are the texts that may begin a call anywhere in content; without any, only a whole
    answer can be a call. `is_marked`: no text but a call contains them.
    """

    def __init__(self, form: CallFormat) -> None:
        self.form = form
        opens = [form.section_open + form.call_open, form.call_open]
        cores = dict.fromkeys(_core(each, form) for each in opens)
        self.cores = tuple(core for core in cores if core)
        self.starts = tuple(dict.fromkeys(first_word(c.partition(ID)[0]) for c in self.cores))
        self.is_marked = any(_UNMISTAKABLE.search(core) for core in self.cores)
        self.heads = [Pattern([*_items(core), *self._rest()]) for core in self.cores]
        ends = (form.call_close, form.separator, form.section_close)
        self.closers = tuple(sorted({*_pieces(ends)} - {"{"}, key=len, reverse=True))
        self.bare_head = None
        if not form.object and not _core(form.call_open, form):
            self.bare_head = Pattern([*_items(form.call_open.strip()), *self._rest()])

    def _rest(self) -> list[Item]:
        """Return the items after the opening up to the arguments."""
        if self.form.object:
            return []
        ahead = _ahead(self.form)
        return [Hole("name", min_length=1), *_items(self.form.name_end.rstrip()), ahead]

    def close_pattern(self, close: str) -> Pattern:
        """Return the pattern of the `close` of a raw value, which itself may contain markers."""
        return _close_pattern(self.form, self.closers, close)


@lru_cache(maxsize=256)
def _close_pattern(form: CallFormat, closers: tuple[str, ...], close: str) -> Pattern:
    assert form.argument
    next_ = (form.argument.separator.strip() + form.argument.open, form.call_close, *closers[:8])
    ahead = Ahead(tuple(dict.fromkeys(first_word(each) for each in next_ if each.strip())))
    return Pattern([close.strip(), _SPACES, ahead])


_SPACES = " "  # any white space


def _core(literal: str, form: CallFormat) -> str:
    """Return the opening without white space and, before JSON, without a bracket and a fence."""
    core = literal.strip()
    if form.object:
        core = _LIST_OR_FENCE.sub("", core)
    return "" if _ONLY_JSON.match(core) else core


def _items(literal: str) -> list[Item]:
    """Return literal texts, and holes for ids in them."""
    texts = literal.split(ID)
    items: list[Item] = [texts[0]]
    for text in texts[1:]:
        items += [Hole("id", r"[^\s<>\[\]]"), text]
    return items


def _ahead(form: CallFormat) -> Ahead:
    """Return what must follow a head."""
    if form.argument is None:
        closing = first_word(form.call_close.lstrip("}").lstrip())
        return Ahead(tuple(filter(None, (" {", ' "', closing and f" {closing}"))))
    if not form.argument.open.strip():
        return Ahead(("",))
    literals = (form.argument.open, form.call_close, form.section_close)
    return Ahead(tuple(f" {first_word(each)}" for each in literals if each.strip()))


def _pieces(literals: Iterable[str]) -> Iterable[str]:
    for literal in literals:
        for word in _WORD.findall(literal):
            yield word
            yield from _MARKER.findall(word)
