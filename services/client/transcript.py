"""
The part of an answer that was received so far, from one worker or several. Pure: takes events, and
returns what is new in them.
"""

from typing import TypeGuard

from services.contract.answer import after_offset, merge, text_of
from services.contract.messages import (
    Accepted,
    AnswerEvent,
    Done,
    Resume,
    Started,
    StreamEvent,
    Token,
    ToolCallDelta,
)


class Gap(Exception):
    """Events are missing before this one."""


class Mismatch(Exception):
    """The event contradicts the text so far: it belongs to another answer."""


class NotResumable(Exception):
    """The worker sent no resume state."""


class Transcript:
    """
    The answer so far with the tokens that it consists of. It grows by whole events, so that text
    and token ids always match.
    """

    __slots__ = ("length", "_events", "_is_accepted", "_started")

    def __init__(self) -> None:
        self.length = 0
        """The length of the answer in characters, as offsets count it."""
        self._events: list[AnswerEvent] = []  # each one begins where the one before it ends
        self._is_accepted = False
        self._started: Started | None = None

    def add(self, event: StreamEvent) -> StreamEvent | None:
        """Return the part of the event that is new, or None. Raises Gap or Mismatch."""
        match event:
            case Accepted():
                is_new, self._is_accepted = not self._is_accepted, True
                return event if is_new else None
            case Started():
                is_new, self._started = self._started is None, self._started or event
                return event if is_new else None
            case Token() | ToolCallDelta():
                return self._add_text(event)
            case Done(length=int(length)) if length > self.length:
                raise Gap
        return event

    def append(self, token: Token) -> None:
        """Add text by which the text so far is continued (see `is_continued_by`)."""
        self._events.append(token)
        self.length += len(token.text)

    def is_continued_by(self, event: StreamEvent) -> TypeGuard[Token]:
        """Return whether the event is new text that begins where the text so far ends."""
        return (
            isinstance(event, Token)
            and event.offset == self.length
            and bool(event.text and event.token_ids)
            and (self.length > 0 or self._started is not None)  # see `lacks_started`
        )

    def lacks_started(self, event: StreamEvent) -> bool:
        """
        Return whether a Started before this event was lost. A replay may have none: an attempt that
        resumes an answer needs no slot if only its end was missing.
        """
        is_text = isinstance(event, Token | ToolCallDelta)
        return is_text and not self.length and self._started is None

    def resume(self) -> Resume | None:
        """
        Return what another worker needs to resume the answer, or None before its first text: then
        the request can simply be repeated. Raises NotResumable.
        """
        if not self.length:
            return None
        if self._started is None or self._started.resume_state is None:
            raise NotResumable
        return Resume(self._started.resume_state, tuple(merge(self._events)))

    def _add_text(self, event: AnswerEvent) -> AnswerEvent | None:
        if event.offset > self.length:
            raise Gap
        known, text = self._text_from(event.offset), text_of(event)
        if not known.startswith(text[: len(known)]):
            raise Mismatch
        new = after_offset(event, self.length)
        if new is None:
            return None
        if event.token_ids:
            self._replace_tail(event)
        else:  # from the replay of a finished answer, which nobody resumes
            self._events.append(new)
        self.length = new.end
        return new

    def _text_from(self, offset: int) -> str:
        texts = []
        for event in reversed(self._events):
            if event.end <= offset:
                break
            texts.append(text_of(event)[max(0, offset - event.offset) :])
        return "".join(reversed(texts))

    def _replace_tail(self, event: AnswerEvent) -> None:
        """
        Append the event, in place of the events that it repeats. Raises Mismatch if it begins
        within an earlier event: which ids belong to which text is known per event only.
        """
        while self._events and self._events[-1].offset >= event.offset:
            self._events.pop()
        end = self._events[-1].end if self._events else 0
        if end != event.offset:
            raise Mismatch
        self._events.append(event)
