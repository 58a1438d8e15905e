"""
What one sequence has said: its tokens, their text as far as it may go out, and where it ends. Knows
no model and no slot.
"""

from typing import NamedTuple

from services.contract.messages import FinishReason, Sampling, TokenLogprob
from services.inference.engine.backend import SampledToken
from services.inference.engine.output.detokenizer import Detokenizer
from services.inference.engine.output.loop_guard import LoopGuard
from services.inference.engine.output.stops import StopBuffer, StopRules, literal


class TextChunk(NamedTuple):
    """
    More text, `at` characters from the answer's beginning, and the tokens it was made of; their
    logprobs if the request asked for them.
    """

    at: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


class _Untold(NamedTuple):
    chosen: SampledToken
    begin: int  # the first character that it is a part of


class GeneratedText:
    """
    A token is told with the first character that it is a part of. So the tokens that were told say
    what went out, and at most the end of the last one more: nothing of a stop string, nor of what
    could become one.
    """

    def __init__(self, sampling: Sampling, stops: StopRules | None = None) -> None:
        """`stops` are the rules of `sampling.stop`; None: it matches literally."""
        self._max_tokens = sampling.max_tokens
        self._detokenizer = Detokenizer()
        self._stops = StopBuffer(literal(sampling.stop or ()) if stops is None else stops)
        self._loops = LoopGuard()
        self._length = 0  # of all whole characters
        self._out = ""  # that may go out and has not
        self._sent = 0  # characters that went out
        self._ahead = 0  # of these, how many are not due yet: they went out where it began
        self._untold: list[_Untold] = []
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None  # why it ends with its last token, if it does
        self.stop_string: str | None = None  # that ended it, as in the request or CHAT_STOP

    def push(self, chosen: SampledToken, piece: bytes, is_end: bool) -> None:
        """A token that is `piece`, or by which the model ended the answer."""
        self.tokens.append(chosen.token)
        if is_end:
            self._end()
            return
        self._untold.append(_Untold(chosen, self._length))
        text = self._detokenizer.push(piece)
        self._length += len(text)
        out, self.stop_string = self._stops.push(text)
        self._say(out)
        if self.stop_string is not None:
            self.reason = "stop"
        elif chosen.is_last:
            self._end()
        elif not chosen.is_constrained and self._loops.push(chosen.token):
            self.cut("loop")
        elif len(self.tokens) == self._max_tokens:
            self.cut("length")

    def cut(self, reason: FinishReason) -> None:
        """End the answer early, without the held-back text that may be half of a stop string."""
        self._say(self._stops.cut())
        self.reason = reason

    def take(self) -> TextChunk | None:
        """What may go out and has not, if there is any."""
        if not self._out:
            return None
        at, text, self._out = self._sent, self._out, ""
        self._sent += len(text)
        told = [untold.chosen for untold in self._untold if untold.begin < self._sent]
        del self._untold[: len(told)]
        logprobs = tuple(chosen.logprob for chosen in told if chosen.logprob)
        return TextChunk(at, text, tuple(chosen.token for chosen in told), logprobs or None)

    def was_sent(self, length: int) -> None:
        """
        So many of its characters went out elsewhere, and all its tokens were told: what is left is
        said next, and nothing twice.
        """
        self._ahead = max(0, length - len(self._out))
        self._out, self._sent = self._out[length:], length
        self._untold.clear()

    def _end(self) -> None:
        """What was held back was no stop string after all."""
        self._say(self._stops.flush())
        self.reason = "stop"

    def _say(self, text: str) -> None:
        self._out += text[self._ahead :]
        self._ahead = max(0, self._ahead - len(text))
