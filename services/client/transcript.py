"""
The part of an answer that was received so far, from one worker or several. Pure: takes events, and
returns what is new in them.
"""

from msgspec.structs import replace

from services.contract.messages import Accepted, Done, Resume, Started, StreamEvent, Token


class Gap(Exception):
    """Events are missing before this one."""


class Mismatch(Exception):
    """The event contradicts the text so far: it belongs to another answer."""


class NotResumable(Exception):
    """The worker sent no resume state."""


def after_offset(event: StreamEvent, offset: int) -> StreamEvent | None:
    """Return the part of the event after the answer's first `offset` characters, or None."""
    if not isinstance(event, Token) or event.offset >= offset:
        return event
    text = event.text[offset - event.offset :]
    return replace(event, offset=offset, text=text) if text else None


class Transcript:
    """
    The text so far with the tokens that it consists of. It grows by whole events, so that text and
    token ids always match.
    """

    def __init__(self) -> None:
        self.text = ""
        self._tokens: list[Token] = []
        self._is_accepted = False
        self._started: Started | None = None

    @property
    def length(self) -> int:
        """The length of the text in characters."""
        return len(self.text)

    def add(self, event: StreamEvent) -> StreamEvent | None:
        """Return the part of the event that is new, or None. Raises Gap or Mismatch."""
        match event:
            case Accepted():
                is_new, self._is_accepted = not self._is_accepted, True
                return event if is_new else None
            case Started():
                is_new, self._started = self._started is None, self._started or event
                return event if is_new else None
            case Token():
                return self._add_token(event)
            case Done(length=int(length)) if length > self.length:
                raise Gap
        return event

    def lacks_started(self, event: StreamEvent) -> bool:
        """
        Return whether a Started before this event was lost. A replay may have none: an attempt that
        resumes an answer needs no slot if only its end was missing.
        """
        return isinstance(event, Token) and not self.text and self._started is None

    def resume(self) -> Resume | None:
        """
        Return what another worker needs to resume the answer, or None before its first text: then
        the request can simply be repeated. Raises NotResumable.
        """
        if not self.text:
            return None
        if self._started is None or self._started.resume_state is None:
            raise NotResumable
        ids = tuple(token_id for token in self._tokens for token_id in token.token_ids)
        return Resume(self._started.resume_state, ids, self.text)

    def _add_token(self, token: Token) -> Token | None:
        if token.offset > self.length:
            raise Gap
        known, new = self.text[token.offset :], token.text[self.length - token.offset :]
        if not known.startswith(token.text[: len(known)]):
            raise Mismatch
        if not new:
            return None
        offset = self.length
        self._replace_tail(token)
        self.text += new
        return replace(token, offset=offset, text=new) if known else token

    def _replace_tail(self, token: Token) -> None:
        """
        Append the token event, in place of the events that it repeats. Raises Mismatch if it begins
        within an earlier event: which ids belong to which text is known per event only.
        """
        while self._tokens and self._tokens[-1].offset >= token.offset:
            self._tokens.pop()
        end = self._tokens[-1].offset + len(self._tokens[-1].text) if self._tokens else 0
        if end != token.offset:
            raise Mismatch
        self._tokens.append(token)
