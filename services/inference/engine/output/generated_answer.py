"""The output of one sequence: its tokens, the parts that can be sent, and where it ends."""

import codecs
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, groupby
from types import MappingProxyType
from typing import NamedTuple

from services.contract.messages import FinishReason, TokenLogprob
from services.inference.engine.backend import SampledToken
from services.inference.engine.output.parts import (
    AnswerParser,
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    PlainParser,
    text_of,
)
from services.inference.engine.output.stops import StopBuffer, StopRules

MAX_TAG_TOKENS = 16  # of a tag that is ordinary text
MAX_LOOP_PERIOD = 32  # tokens
MIN_LOOP_REPETITIONS = 8
MIN_LOOP_TOKENS = 128
# By period: how many tokens must equal the token one period earlier.
_LOOP_LIMITS = tuple(
    max(MIN_LOOP_TOKENS, MIN_LOOP_REPETITIONS * period) - period
    for period in range(1, MAX_LOOP_PERIOD + 1)
)


class AnswerChunk(NamedTuple):
    """
    A part of the answer to send, its offset in characters of all channels, and the tokens that made
    it certain. `logprobs` are of those tokens that begin in its text or in markup before it.
    """

    offset: int
    part: AnswerPart
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # if the request asked for them
    mirostat_mu: float | None = None  # after these tokens, if the request uses Mirostat


class AnswerLimits(NamedTuple):
    """
    Maximum tokens; None: only the context window limits them. A stop string or loop within the
    first `minimum` tokens is ignored, as in vLLM, and a loop always if the answer `may_loop`.
    """

    total: int | None = None
    content: int | None = None  # of content and tool calls
    reasoning: int | None = None
    minimum: int = 0
    may_loop: bool = False


class GeneratedAnswer:
    """
    The tokens of one answer, decoded to text, parsed into parts, and checked for stop strings,
    loops and limits.

    A chunk carries all tokens up to the one that made its part certain, also those of markup, of
    text that is still held back, of a stop string, and the end token. So the tokens sent so far
    make the parts sent so far, whatever follows: an answer can be resumed after any chunk.

    Stop strings and the loop guard apply to content, the latter also to tool calls. Reasoning that
    reaches its limit is closed: `take_forced` returns the tokens.
    """

    def __init__(
        self,
        limits: AnswerLimits,
        stops: StopRules,
        parser: AnswerParser | None = None,
        markers: Mapping[int, bytes] = MappingProxyType({}),
        reasoning_end: Sequence[int] = (),
        thought_opening: Sequence[int] = (),
        max_calls: int | None = None,
    ) -> None:
        """
        `markers` are the control tokens that the parser needs, with their text. `reasoning_end` are
        the tokens that close reasoning, and `thought_opening` the first ones that open it, as by
        AnswerFormat.thought_opening. The answer ends after `max_calls` tool calls.
        """
        self._limits = limits
        self._stops = StopBuffer(stops)
        self._parser = parser or PlainParser()
        self._markers = markers
        self._reasoning_end = tuple(reasoning_end)
        self._thought_opening = list(thought_opening)
        self._max_calls = max_calls
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._loop_guard = LoopGuard()
        self._texts: list[str] = []  # raw text, of each token
        self._decoded = 0  # characters of raw text
        self._content_end = 0  # in raw text, of the last content
        self._length = 0  # characters of all parts, sent and unsent
        self._unsent: list[AnswerChunk] = []
        self._sent_before = 0  # characters that another worker has sent before a resume
        self._pending: list[SampledToken] = []  # not sent yet
        self._logprobs: deque[tuple[int, TokenLogprob]] = deque()  # unsent, by offset in raw text
        self._offsets: list[int] = []  # in raw text, of each token
        self._starts: dict[type[AnswerPart], int] = {}  # in raw text, of the first part of a kind
        self._calls = 0
        self._is_past_calls = False  # something follows the last allowed call
        self._thought_tokens = 0  # of reasoning, without its opening tag
        self._undecided = 0  # newest tokens that may be part of a tag
        self._is_closing = False  # the end of reasoning is being forced
        self._was_closed = False  # it was forced
        self.tokens: list[int] = []
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None  # as in the request or CHAT_STOP

    def tokens_from(self, kind: type[AnswerPart]) -> list[int]:
        """Return the tokens from the first part of a kind on, without an end token."""
        start = self._starts.get(kind, self._decoded)
        return self.tokens[bisect_left(self._offsets, start) : len(self._offsets)]

    @property
    def remaining_tokens(self) -> int:
        """The most tokens that may still be generated; 0 without a limit."""
        total = (self._limits.total or 0) - len(self.tokens)
        content, budget = self._limits.content, self._limits.reasoning
        is_reasoning = self._parser.channel == "reasoning"
        if content is None or is_reasoning and budget is None:
            return total
        reasoning = max(0, (budget or 0) - self._thought_tokens) if is_reasoning else 0
        return min(total, content - self._content_count + reasoning)

    @property
    def is_holding(self) -> bool:
        """Whether text is held back, since a stop string could begin with it."""
        return bool(self._stops.held)

    def push(self, chosen: SampledToken, piece: bytes, is_end: bool) -> None:
        """Add a token with the bytes `piece`, or the token with which the model ends the answer."""
        was_reasoning = self._parser.channel == "reasoning"
        self.tokens.append(chosen.token)
        self._pending.append(chosen)
        if is_end:
            self._finish()
            return
        if chosen.logprob:
            self._logprobs.append((self._decoded, chosen.logprob))
        self._offsets.append(self._decoded)
        text = self._decoder.decode(self._markers.get(chosen.token, piece))
        self._decoded += len(text)
        self._texts.append(text)
        self._add(self._accept(self._parser.push(text)))
        is_reasoning = self._count(was_reasoning)
        if self.finish_reason is None:
            self._check_end(chosen, is_reasoning)

    def _count(self, was_reasoning: bool) -> bool:
        """Count the newest token, and return whether it belongs to reasoning."""
        is_open = self._parser.channel == "reasoning"
        is_reasoning = is_open or was_reasoning
        if is_reasoning:
            self.reasoning_tokens += 1 + self._undecided
            self._thought_tokens += was_reasoning
        is_undecided = self._parser.held_length and not is_reasoning
        self._undecided = self._undecided + 1 if is_undecided else 0
        self._is_closing &= is_open
        return is_reasoning

    def interrupt(self, reason: FinishReason) -> None:
        """
        End the answer early, and discard held-back text that may be half of a stop string. One that
        is whole ends the answer normally.
        """
        self._add(self._accept(self._parser.flush()))
        self._add([(ContentDelta(self._stops.flush_interrupted()), self._content_end)])
        self.finish_reason = self.finish_reason or reason

    def take_chunks(self) -> list[AnswerChunk]:
        """Return and remove what can be sent."""
        chunks, self._unsent = self._unsent, []
        return _merged(chunks) if len(chunks) > 1 else chunks

    def take_forced(self) -> tuple[int, ...]:
        """Return the tokens that must follow, once: those that close reasoning at its limit."""
        limit, is_reasoning = self._limits.reasoning, self._parser.channel == "reasoning"
        if not is_reasoning or limit is None or self._thought_tokens < limit:
            return ()
        if self._is_closing or self._decoder.getstate()[0]:  # a character is incomplete
            return ()
        self._is_closing = self._was_closed = True
        return self._reasoning_end

    @property
    def forbidden(self) -> int | None:
        """
        The token that must not follow: it would open a thought after the end of reasoning was
        forced. Else a model that opens thoughts again and again would write no content.
        """
        if not (self._was_closed and self._thought_opening and self._parser.can_open_thought):
            return None
        *before, last = self._thought_opening
        return last if self.tokens[len(self.tokens) - len(before) :] == before else None

    def skip_sent(self, sent: Sequence[AnswerPart]) -> bool:
        """
        Skip the parts `sent` by another worker, also those that are still held back here, and all
        tokens. Return False if the tokens do not spell these parts.
        """
        self._unsent = _merged(self._unsent)
        if not _is_prefix(sent, [chunk.part for chunk in self._unsent], self._held_text):
            return False
        self._sent_before = sum(len(text_of(part)) for part in sent)
        left = (_after(chunk, self._sent_before) for chunk in self._unsent)
        self._unsent = [
            chunk._replace(token_ids=(), logprobs=None, mirostat_mu=None) for chunk in left if chunk
        ]
        self._pending.clear()
        self._logprobs.clear()
        return True

    @property
    def _held_text(self) -> str:
        """The text that is in no part yet; between the two there may be markup."""
        consumed = self._decoded - self._parser.held_length
        return self._stops.held + "".join(self._texts)[consumed:]

    def _check_end(self, chosen: SampledToken, is_reasoning: bool) -> None:
        is_guarded = not (chosen.is_constrained or is_reasoning or self._limits.may_loop)
        if chosen.is_last or self._has_all_calls:
            self._finish()
        elif is_guarded and self._loop_guard.push(chosen.token) and self._may_stop:
            self.interrupt("loop")
        elif self._is_full:
            self.interrupt("length")

    @property
    def _may_stop(self) -> bool:
        return len(self.tokens) > self._limits.minimum

    @property
    def _content_count(self) -> int:
        """The tokens of content and calls, without those that may open reasoning."""
        return len(self.tokens) - self.reasoning_tokens - min(self._undecided, MAX_TAG_TOKENS)

    @property
    def _is_full(self) -> bool:
        content, total = self._limits.content, self._limits.total
        is_content_full = content is not None and self._content_count >= content
        return is_content_full or len(self.tokens) == total

    @property
    def _has_all_calls(self) -> bool:
        is_complete = self._calls == self._max_calls and not self._parser.is_within_call
        return is_complete or self._is_past_calls

    def _finish(self) -> None:
        """End the answer normally: held-back text is no stop string."""
        self._add(self._accept(self._parser.flush()))
        self._add([(ContentDelta(self._stops.flush()), self._content_end)])
        if self.finish_reason is None:
            is_whole = self._is_past_calls or not self._parser.is_within_call
            self.finish_reason = "tool_calls" if self._calls and is_whole else "stop"

    def _accept(self, parts: list[AnswerPart]) -> Iterator[tuple[AnswerPart, int]]:
        """
        Yield the parts to send, up to a stop string or the last allowed call, and where each one
        ends in the raw text.
        """
        for part, end in zip(parts, self._parser.ends, strict=True):
            if self._calls == self._max_calls and not isinstance(part, ArgumentsDelta):
                self._is_past_calls = True
            if self._is_past_calls or self.finish_reason:
                return
            self._starts.setdefault(type(part), end - len(text_of(part)))
            if isinstance(part, ContentDelta):
                yield self._until_stop(part.text, end)
            else:
                self._calls += isinstance(part, CallStart)
                yield ContentDelta(self._stops.flush()), self._content_end
                yield part, end

    def _until_stop(self, text: str, end: int) -> tuple[ContentDelta, int]:
        """Return the content that can be sent. Ends the answer at a stop string."""
        length = len(self._stops.held) + len(text)
        released, self.stop_string = self._stops.push(text, self._may_stop)
        if self.stop_string is not None:
            self.finish_reason = "stop"
        self._content_end = end
        return ContentDelta(released), end - (length - len(released))

    def _add(self, parts: Iterable[tuple[AnswerPart, int]]) -> None:
        """Add parts to send. The first one carries all tokens."""
        for part, end in parts:
            if not (text := text_of(part)):
                continue
            chunk = AnswerChunk(self._length, part)
            self._length += len(text)
            if left := _after(chunk, self._sent_before):
                self._unsent.append(self._with_tokens(left, end))

    def _with_tokens(self, chunk: AnswerChunk, end: int) -> AnswerChunk:
        """Add the pending tokens, and the log probabilities of those before `end`."""
        pending, logprobs = self._pending, list[TokenLogprob]()
        while self._logprobs and self._logprobs[0][0] < end:
            logprobs.append(self._logprobs.popleft()[1])
        if pending:
            self._pending = []
        ids = tuple([each.token for each in pending])
        mu = pending[-1].mirostat_mu if pending else None
        return AnswerChunk(chunk.offset, chunk.part, ids, tuple(logprobs) or None, mu)


def _merged(chunks: Iterable[AnswerChunk]) -> list[AnswerChunk]:
    """Join consecutive chunks of one channel; the begin of a call stays one of its own."""
    return [_joined(list(group)) for _, group in groupby(chunks, _channel)]


def _channel(chunk: AnswerChunk) -> tuple[type[AnswerPart], int | None]:
    part = chunk.part
    return type(part), chunk.offset if isinstance(part, CallStart) else None


def _joined(chunks: list[AnswerChunk]) -> AnswerChunk:
    first = chunks[0]
    if len(chunks) == 1:
        return first
    text = "".join(text_of(chunk.part) for chunk in chunks)
    ids = tuple(chain.from_iterable(chunk.token_ids for chunk in chunks))
    logprobs = tuple(chain.from_iterable(chunk.logprobs or () for chunk in chunks))
    states = [chunk.mirostat_mu for chunk in chunks if chunk.mirostat_mu is not None]
    state = states[-1] if states else None
    return AnswerChunk(first.offset, type(first.part)(text), ids, logprobs or None, state)


def _after(chunk: AnswerChunk, offset: int) -> AnswerChunk | None:
    """
    Return the part of the chunk after the answer's first `offset` characters, or None. The begin of
    a call is not cut.
    """
    text = text_of(chunk.part)
    if chunk.offset + len(text) <= offset:
        return None
    if chunk.offset >= offset or isinstance(chunk.part, CallStart):
        return chunk
    part = chunk.part._replace(text=text[offset - chunk.offset :])
    return chunk._replace(offset=offset, part=part)


def _is_prefix(sent: Sequence[AnswerPart], produced: Sequence[AnswerPart], held: str) -> bool:
    """
    Return whether `produced` begins with the parts `sent`. Another worker that ended the answer
    early, such as at its end of the context window, has sent `held` text, too, in any channel and
    maybe without white space.
    """
    text, own = ("".join(map(text_of, parts)) for parts in (sent, produced))
    length = min(len(text), len(own))
    rest = "".join(text[length:].split())
    is_held = not rest or "".join(held.split()).startswith(rest)
    return is_held and _begin(sent, length) == _begin(produced, length)


def _begin(parts: Sequence[AnswerPart], length: int) -> list[tuple[type[AnswerPart], str]]:
    """Return types and texts of the parts within the first `length` characters."""
    starts = accumulate((len(text_of(part)) for part in parts), initial=0)
    begun = [(part, start) for part, start in zip(parts, starts, strict=False) if start < length]
    return [(type(part), text_of(part)[: length - start]) for part, start in begun]


class LoopGuard:
    """
    Detects an answer that repeats the same 1 to 32 tokens at least 8 times and for at least 128
    tokens: for example one token 128 times, or a sentence of 20 tokens 8 times.

    The limits are high enough that table rules, rows of zeros and laughter pass. Repetition that
    people ask for usually differs somewhere, such as in a number, and a difference resets the
    count. Not used with a grammar, which may require a hundred zeros.
    """

    def __init__(self) -> None:
        # How many of the last tokens equal the token one period earlier, by period, if any do.
        self._runs: dict[int, int] = {}
        self._recent = deque([-1] * MAX_LOOP_PERIOD, MAX_LOOP_PERIOD)  # newest first

    def push(self, token: int) -> bool:
        """Add a token and return whether the answer loops now."""
        runs: dict[int, int] = {}
        if token in self._recent:
            for period, earlier in enumerate(self._recent):
                if earlier == token:
                    runs[period] = self._runs.get(period, 0) + 1
        self._runs = runs
        self._recent.appendleft(token)
        return any([run >= _LOOP_LIMITS[period] for period, run in runs.items()])
