"""The output of one sequence: its tokens, the text that can be sent, and where it ends."""

import codecs
from collections import deque
from operator import ge
from typing import NamedTuple

from services.contract.messages import FinishReason, TokenLogprob
from services.inference.engine.backend import SampledToken
from services.inference.engine.output.stops import StopBuffer, StopRules

MAX_LOOP_PERIOD = 32  # tokens
MIN_LOOP_REPETITIONS = 8
MIN_LOOP_TOKENS = 128
# By period: how many tokens must equal the token one period earlier.
_LOOP_LIMITS = tuple(
    max(MIN_LOOP_TOKENS, MIN_LOOP_REPETITIONS * period) - period
    for period in range(1, MAX_LOOP_PERIOD + 1)
)


class TextChunk(NamedTuple):
    """Text to send, its offset in the answer in characters, and the tokens it was decoded from."""

    offset: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None  # if the request asked for them


class _PendingToken(NamedTuple):
    """A token whose text has not been sent, and the offset of its first character."""

    chosen: SampledToken
    offset: int


class GeneratedText:
    """
    The tokens of one answer, decoded to text and checked for stop strings, loops and `max_tokens`.

    A chunk carries every token that has a character in its text. So the tokens sent so far decode
    to the text sent so far, except that the last one may have further characters; tokens of a stop
    string, or of what could become one, are never sent.
    """

    def __init__(self, max_tokens: int | None, stops: StopRules) -> None:
        self._max_tokens = max_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopBuffer(stops)
        self._loop_guard = LoopGuard()
        self._decoded = 0  # characters decoded so far
        self._sent = 0  # characters sent so far
        self._unsent = ""  # released by the stop buffer
        self._to_skip = 0  # characters still held back here that were sent before a resume
        self._pending: list[_PendingToken] = []
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None  # as in the request or CHAT_STOP

    def push(self, chosen: SampledToken, piece: bytes, is_end: bool) -> None:
        """Add a token with the bytes `piece`, or the token with which the model ends the answer."""
        self.tokens.append(chosen.token)
        if is_end:
            self._finish()
            return
        self._pending.append(_PendingToken(chosen, self._decoded))
        text = self._decoder.decode(piece)
        self._decoded += len(text)
        released, self.stop_string = self._stops.push(text)
        self._release(released)
        if self.stop_string is not None:
            self.finish_reason = "stop"
        elif chosen.is_last:
            self._finish()
        elif not chosen.is_constrained and self._loop_guard.push(chosen.token):
            self.interrupt("loop")
        elif len(self.tokens) == self._max_tokens:
            self.interrupt("length")

    def interrupt(self, reason: FinishReason) -> None:
        """End the answer early, and discard held-back text that may be half of a stop string."""
        self._release(self._stops.flush_interrupted())
        self.finish_reason = reason

    def take_chunk(self) -> TextChunk | None:
        """Return and remove the text that can be sent, or None if there is none."""
        if not self._unsent:
            return None
        offset, text, self._unsent = self._sent, self._unsent, ""
        self._sent += len(text)
        chosen = [token.chosen for token in self._pending if token.offset < self._sent]
        del self._pending[: len(chosen)]
        logprobs = tuple(each.logprob for each in chosen if each.logprob)
        return TextChunk(offset, text, tuple(each.token for each in chosen), logprobs or None)

    def skip_sent(self, length: int) -> None:
        """Skip the first `length` characters and all tokens: another worker has sent them."""
        self._to_skip = max(0, length - len(self._unsent))
        self._unsent, self._sent = self._unsent[length:], length
        self._pending.clear()

    def _finish(self) -> None:
        """End the answer normally: held-back text is no stop string."""
        self._release(self._stops.flush())
        self.finish_reason = "stop"

    def _release(self, text: str) -> None:
        self._unsent += text[self._to_skip :]
        self._to_skip = max(0, self._to_skip - len(text))


class LoopGuard:
    """
    Detects an answer that repeats the same 1 to 32 tokens at least 8 times and for at least 128
    tokens: for example one token 128 times, or a sentence of 20 tokens 8 times.

    The limits are high enough that table rules, rows of zeros and laughter pass. Repetition that
    people ask for usually differs somewhere, such as in a number, and a difference resets the
    count. Not used with a grammar, which may require a hundred zeros.
    """

    def __init__(self) -> None:
        # By period, how many of the last tokens equal the token one period earlier.
        self._runs = [0] * MAX_LOOP_PERIOD
        self._recent = deque([-1] * MAX_LOOP_PERIOD, MAX_LOOP_PERIOD)  # newest first

    def push(self, token: int) -> bool:
        """Add a token and return whether the answer loops now."""
        if token not in self._recent:
            self._runs = [0] * MAX_LOOP_PERIOD
        else:
            self._runs = [
                run + 1 if token == earlier else 0
                for run, earlier in zip(self._runs, self._recent, strict=True)
            ]
        self._recent.appendleft(token)
        return any(map(ge, self._runs, _LOOP_LIMITS))
