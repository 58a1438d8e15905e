"""The text of an answer while it is parsed: what is unread, and the parts that were read."""

from collections.abc import Generator, Iterable, Sequence
from re import Pattern

from services.inference.engine.output.parts import (
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    Channel,
    ContentDelta,
    ReasoningDelta,
)
from services.inference.engine.output.patterns import (
    MAX_SPACE,
    first_characters,
    partial_length,
)

Reading = Generator[None, None, None]  # yields when it needs more text
QUOTES = "`'\"\u2018\u201c\u00ab"
Deciding = Generator[None, None, bool]


class AnswerText:
    """
    Readers are coroutines: they look at `unread`, and yield when more is needed to decide. So a
    decision depends on the whole text so far, and not on how it was divided. What they hold back is
    either short (a possible marker, white space, the head of a call) or collected in a list: time
    is linear.
    """

    def __init__(self, channel: Channel = "content") -> None:
        self.channel: Channel = channel
        self.unread = ""
        self.is_ended = False
        self.is_at_start = True  # of the answer: no content and no call yet
        self.strips = False  # white space at the begin of content belongs to a marker before
        self.is_quoting = False  # the last character of content is a quotation mark
        self._length = 0
        self._collected: list[str] = []  # read, but in no part yet
        self._collected_length = 0
        self._parts: list[AnswerPart] = []
        self._ends: list[int] = []
        self._flow: tuple[type[ContentDelta | ReasoningDelta], Pattern[str]] | None = None

    # for the parser

    @property
    def held_length(self) -> int:
        return len(self.unread) + self._collected_length

    @property
    def is_finished(self) -> bool:
        return self.is_ended and not self.unread

    def add(self, text: str) -> bool:
        """Add text, and return whether a reader must look at it."""
        self.unread += text
        self._length += len(text)
        if not self._flow or self.unread[-1:].isspace() or self._flow[1].search(self.unread):
            return bool(text)
        kind, self.unread, text = self._flow[0], "", self.unread
        self._emit_text(kind, text)
        return False

    def take_parts(self) -> tuple[list[AnswerPart], list[int]]:
        """Return and remove the parts, and where each one ends, in characters of the answer."""
        parts, ends = self._parts, self._ends
        self._parts, self._ends = [], []
        return parts, ends

    # reading

    @property
    def spaces(self) -> int:
        """The white space that comes next."""
        return len(self.unread) - len(self.unread.lstrip())

    def take(self, length: int) -> str:
        taken, self.unread = self.unread[:length], self.unread[length:]
        return taken

    def skip_spaces(self) -> None:
        self.unread = self.unread.lstrip()

    def skip_all_spaces(self) -> Reading:
        """Skip white space until other text comes."""
        while not self.unread.lstrip() and not self.is_ended:
            self.skip_spaces()
            yield
        self.skip_spaces()

    def skip_stripped(self) -> None:
        if self.strips:
            self.skip_spaces()
            self.strips = not self.unread

    def collect(self, length: int) -> None:
        taken = self.take(length)
        self._collected.append(taken)
        self._collected_length += len(taken)

    def take_collected(self) -> str:
        text, self._collected, self._collected_length = "".join(self._collected), [], 0
        return text

    def wait(self, marks: Sequence[str], kind: type[ContentDelta | ReasoningDelta]) -> Reading:
        """
        Emit the text without a partial mark at its end, and without white space before it, and wait
        for more. Text in which no mark begins never wakes the reader.
        """
        length = len(self.unread) - partial_length(self.unread, marks)
        length = max(len(self.unread[:length].rstrip()), length - MAX_SPACE)
        self._emit_text(kind, self.take(max(0, length)))
        if not self.strips and not self.unread.strip():
            self._flow = kind, first_characters(tuple(marks))
        yield
        self._flow = None

    # emitting

    def emit_content(self, text: str) -> None:
        self._emit_text(ContentDelta, text)

    def emit_reasoning(self, text: str) -> None:
        self._emit_text(ReasoningDelta, text)

    def emit_arguments(self, text: str) -> None:
        if text:
            self._emit(ArgumentsDelta(text))

    def emit_taken_arguments(self, length: int) -> None:
        self.emit_arguments(self.take(length))

    def emit_parts(self, parts: Iterable[AnswerPart]) -> None:
        for part in parts:
            self._emit(part)

    def begin_call(self, name: str, call_id: str) -> None:
        self.channel = "tool_call"
        self._emit(CallStart(name, call_id))

    def end_call(self) -> None:
        self.channel = "content"
        self.strips = True

    def _emit_text(self, kind: type[ContentDelta | ReasoningDelta], text: str) -> None:
        if text:
            self._emit(kind(text))

    def _emit(self, part: AnswerPart) -> None:
        if self.is_at_start and not isinstance(part, ReasoningDelta):
            self.is_at_start = isinstance(part, ContentDelta) and not part.text.strip()
        self.is_quoting = isinstance(part, ContentDelta) and part.text[-1] in QUOTES
        self._parts.append(part)
        self._ends.append(self._length - self.held_length)
