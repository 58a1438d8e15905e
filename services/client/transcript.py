"""What of an answer has been read, whichever workers said it. Pure: events in, news out."""

import msgspec

from services.contract.messages import (
    Accepted,
    Done,
    Resume,
    Started,
    StreamEvent,
    Token,
)


class Gap(Exception):
    """A part of the answer is missing before this event."""


class Mismatch(Exception):
    """The event says otherwise what was read already, so the two can't be one answer."""


def after(event: StreamEvent, told: int) -> StreamEvent | None:
    """What of the event comes after so many characters of the answer; None: nothing."""
    if not isinstance(event, Token) or event.offset >= told:
        return event
    text = event.text[told - event.offset :]
    return msgspec.structs.replace(event, offset=told, text=text) if text else None


class Transcript:
    """It grows by whole events: so its text and the ids of its tokens always go together."""

    def __init__(self) -> None:
        self.text = ""
        self._tokens: list[Token] = []
        self._accepted = False
        self._started: Started | None = None

    @property
    def length(self) -> int:
        return len(self.text)

    def take(self, event: StreamEvent) -> StreamEvent | None:
        """What of the event is new; None: nothing. Raises Gap or Mismatch."""
        match event:
            case Accepted():
                is_first, self._accepted = not self._accepted, True
                return event if is_first else None
            case Started():
                is_first = self._started is None
                self._started = self._started or event
                return event if is_first else None
            case Token():
                return self._read(event)
            case Done(length=int(length)) if length > self.length:
                raise Gap
        return event

    def resume(self) -> Resume | None:
        """
        What another worker needs to go on; None if nothing was said yet, so that it can simply be
        asked. Raises Mismatch if it can't go on.
        """
        origin = self._started.resume_state if self._started else None
        if not self.text:
            return None
        if origin is None:
            raise Mismatch
        ids = tuple(token_id for token in self._tokens for token_id in token.token_ids)
        return Resume(origin, ids, self.text)

    def _read(self, token: Token) -> Token | None:
        if token.offset > self.length:
            raise Gap
        known, new = self.text[token.offset :], token.text[self.length - token.offset :]
        if not known.startswith(token.text[: len(known)]):
            raise Mismatch
        if not new:
            return None
        at = self.length
        self._keep(token)
        self.text += new
        return msgspec.structs.replace(token, offset=at, text=new) if known else token

    def _keep(self, token: Token) -> None:
        """In the place of those that say the same: where tokens end only their events tell."""
        while self._tokens and self._tokens[-1].offset >= token.offset:
            self._tokens.pop()
        end = self._tokens[-1].offset + len(self._tokens[-1].text) if self._tokens else 0
        if end != token.offset:
            raise Mismatch
        self._tokens.append(token)
