"""The parts of an answer: pieces of its content, of its reasoning, and of its tool calls."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Channel = Literal["content", "reasoning", "tool_call"]


class ContentDelta(NamedTuple):
    text: str


class ReasoningDelta(NamedTuple):
    text: str


class CallStart(NamedTuple):
    """
    A tool call begins; its arguments follow. `name` is never empty: offsets count its characters,
    so a reader could not know an empty begin. `id` is the model's own; "": it wrote none.
    """

    name: str
    id: str = ""


class ArgumentsDelta(NamedTuple):
    """A fragment of the arguments, as JSON, of the last call that began."""

    text: str


AnswerPart = ContentDelta | ReasoningDelta | CallStart | ArgumentsDelta


class AnswerParser(Protocol):
    """
    Splits the text of an answer into parts while it streams.

    What it returns depends only on the whole text so far, not on how that was divided into `push`
    calls, and never changes later: the parts of a longer text begin with the parts of a shorter
    one. So another worker can resume an answer after any character of any part. Text that can't be
    parsed is content.
    """

    @property
    def ends(self) -> Sequence[int]:
        """Where the parts of the last `push` or `flush` end, in characters of the whole text."""

    @property
    def held_length(self) -> int:
        """The number of pushed characters, at the end, that no returned part covers yet."""

    @property
    def channel(self) -> Channel:
        """The channel of the next character, as far as the text so far tells."""

    @property
    def can_open_thought(self) -> bool:
        """Whether reasoning may begin with the next characters, or with those held back."""

    @property
    def is_within_call(self) -> bool:
        """Whether the last call is incomplete."""

    def push(self, text: str) -> list[AnswerPart]:
        """Return the parts that are certain after `text`."""

    def flush(self) -> list[AnswerPart]:
        """Return the remaining parts at the end of the answer."""


def text_of(part: AnswerPart) -> str:
    """Return the characters that the offsets of events count."""
    return part.name if isinstance(part, CallStart) else part.text


class PlainParser:
    """The parser of answers without any format, as of a base model: all text is content."""

    held_length = 0
    can_open_thought = False
    channel: Channel = "content"
    is_within_call = False

    def __init__(self) -> None:
        self.ends: list[int] = []
        self._length = 0

    def push(self, text: str) -> list[AnswerPart]:
        self._length += len(text)
        self.ends = [self._length] if text else []
        return [ContentDelta(text)] if text else []

    def flush(self) -> list[AnswerPart]:
        self.ends = []
        return []
