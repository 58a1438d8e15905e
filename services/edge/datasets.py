"""
Training data from stored conversations: lines for supervised fine-tuning and preference pairs, in
the conversational form of TRL (https://huggingface.co/docs/trl/dataset_formats), which Axolotl and
Unsloth read, too; docs/training-loop.md converts them for LLaMA-Factory. Knows no HTTP.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import dropwhile, pairwise, permutations
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from services.contract.codec import encode
from services.contract.conversation import Tool, ToolCall
from services.contract.history import Exchange, Feedback

RatingFilter = Literal["up", "down", "none"]
Source = Literal["correction", "preference", "rating", "retry"]
Find = Callable[[str, str], Awaitable[Exchange | None]]
"""Returns the exchange of a session id and a request id; None: it is not stored."""
FINISHED = ("stop", "tool_calls")
WHOLE = (*FINISHED, "length", "loop")
"""The model ended these answers by itself, well or badly; others were stopped from outside."""


class CalledFunction(Struct, frozen=True):
    """`arguments` is an object, as chat templates expect it; a text if it is none."""

    name: str
    arguments: Any


class Call(Struct, frozen=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(Struct, frozen=True):
    """`weight` 0: an answer that is not to be learned, as in OpenAI's format for fine-tuning."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[Call, ...] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET
    weight: Literal[0] | UnsetType = UNSET


class Line(Struct, frozen=True, kw_only=True):
    """
    What all lines have. `tools` are those that the model could call at its last answer; `tenant` is
    only set if the request names tenants.
    """

    tools: tuple[Tool, ...] | UnsetType = UNSET
    session_id: str
    message_id: str
    tenant: str | UnsetType = UNSET


class SftLine(Line, frozen=True, kw_only=True):
    """A conversation that ends with the answer `message_id`."""

    messages: tuple[Message, ...]


class PreferenceLine(Line, frozen=True, kw_only=True):
    """Two answers to a prompt. `message_id` is that of the chosen one; `source` is what says so."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: Source


@dataclass(frozen=True)
class Origin:
    """The session that lines come from."""

    session_id: str
    system_prompt: str | None
    tenant: str | UnsetType = UNSET


class AnswerFilter(NamedTuple):
    """Which answers are wanted; None: any. `since` is inclusive, `until` is not."""

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    adapter: str | None = None
    rating: RatingFilter | None = None

    def matches(self, exchange: Exchange) -> bool:
        name = exchange.model.name if exchange.model else ""
        model, _, adapter = name.partition(":")
        rating = (exchange.feedback and exchange.feedback.rating) or "none"
        return (
            (self.since is None or exchange.answered_at >= self.since)
            and (self.until is None or exchange.answered_at < self.until)
            and self.model in (None, name, model)
            and self.adapter in (None, adapter, adapter.rpartition("@")[0] or adapter)
            and self.rating in (None, rating)
        )


@dataclass(frozen=True)
class ConversationLimits:
    """
    What a line contains about at most, so that a session of any length takes bounded memory. A
    longer conversation continues in another line, or loses its older half.
    """

    max_turns: int = 100
    max_bytes: int = 2**20


@dataclass
class PromptTurn:
    """A prompt and all answers to it, the oldest first."""

    answers: list[Exchange]

    @property
    def last(self) -> Exchange:
        return self.answers[-1]

    @property
    def best(self) -> Exchange | None:
        """
        The answer to learn: a corrected one, or the preferred one, or one rated up, or the last.
        None if no answer is fit to be learned.
        """
        fit = [each for each in self.answers if _is_fit(each)]
        by_id = {each.request_id: each for each in fit}
        worse = {_given(each).preferred_to for each in fit if not _is_overridden(each, by_id)}

        def rank(exchange: Exchange) -> tuple[bool, ...]:
            given = _given(exchange)
            return (
                given.correction is not None,
                exchange.request_id not in worse,
                bool(given.preferred_to),
                given.rating == "up",
            )

        return max(reversed(fit), key=rank, default=None)

    def asked(self) -> Iterator[Message]:
        for result in self.last.tool_results:
            yield Message("tool", result.content, tool_call_id=result.tool_call_id)
        if self.last.prompt:
            yield Message("user", self.last.prompt)


class Kept(NamedTuple):
    """A turn in the context of later ones, with the answer that these see."""

    turn: PromptTurn
    answer: Exchange
    size: int  # of the exchange as JSON, in bytes

    def messages(self) -> Iterator[Message]:
        yield from self.turn.asked()
        yield answer_of(self.answer)


@dataclass
class Conversation:
    """
    The exchanges of a session since it was cleared, as they come. A subclass makes the lines.

    An exchange that is not fit to be learned is left out with its prompt; so is one whose tool
    results lack their calls then.
    """

    origin: Origin
    wanted: AnswerFilter
    limits: ConversationLimits = ConversationLimits()
    context: list[Kept] = field(default_factory=list)
    _epoch: int = 0
    _turn: PromptTurn | None = None

    async def push(self, exchange: Exchange) -> AsyncIterator[Line]:
        """Take the session's next exchange. Yield lines that are complete."""
        if exchange.epoch < self._epoch:  # it was running while the session was cleared
            return
        if exchange.epoch > self._epoch:
            async for line in self.end():
                yield line
            self._epoch = exchange.epoch
        turn = self._turn
        is_retry = turn and exchange.retry_of in {each.request_id for each in turn.answers}
        if turn and is_retry and _asked(exchange) == _asked(turn.last):
            self._turn = PromptTurn([*turn.answers, exchange])
            return
        async for line in self._end_turn(is_replaced=bool(is_retry)):
            yield line
        self._turn = PromptTurn([exchange])

    async def end(self) -> AsyncIterator[Line]:
        """Yield the last lines of the conversation, and forget it."""
        async for line in self._end_turn():
            yield line
        for line in self.lines_at_end():
            yield line
        self.context = []

    async def _end_turn(self, is_replaced: bool = False) -> AsyncIterator[Line]:
        """Yield the lines of the last turn. If it `is_replaced` by an edit, later ones lack it."""
        turn, self._turn = self._turn, None
        if turn is None or not self._has_calls_of(turn):
            return
        async for line in self.lines_of(turn):
            yield line
        if (best := turn.best) is None:
            return
        self.context.append(Kept(turn, best, len(encode(best))))
        for line in self.lines_after_turn():
            yield line
        if is_replaced:
            self.context.pop()
        elif self._is_long():
            for line in self.lines_at_end():
                yield line
            self.context = self.shortened()

    def lines_of(self, turn: PromptTurn) -> AsyncIterator[Line]:
        """Yield lines of a turn that is not in the context yet."""
        raise NotImplementedError

    def lines_after_turn(self) -> Iterator[Line]:
        """Yield lines that end with the context."""
        raise NotImplementedError

    def lines_at_end(self) -> Iterator[Line]:
        """Yield lines before the context is forgotten."""
        raise NotImplementedError

    def _has_calls_of(self, turn: PromptTurn) -> bool:
        """Return whether the context ends with the calls that the turn has results of."""
        calls = self.context[-1].answer.tool_calls if self.context else ()
        wanted = {result.tool_call_id for result in turn.last.tool_results}
        return wanted <= {call.id for call in calls}

    def _is_long(self) -> bool:
        size = sum(kept.size for kept in self.context)
        return len(self.context) >= self.limits.max_turns or size >= self.limits.max_bytes

    def shortened(self) -> list[Kept]:
        """Return the newer half of the context, which does not begin with tool results."""
        newer = self.context[(len(self.context) + 1) // 2 :]
        return list(dropwhile(lambda kept: kept.turn.last.tool_results, newer))

    def prompt(self) -> Iterator[Message]:
        """Yield the messages of the context, after the session's own system prompt."""
        if self.origin.system_prompt:
            yield Message("system", self.origin.system_prompt)
        for kept in self.context:
            yield from kept.messages()

    def heading(self, exchange: Exchange) -> dict[str, Any]:
        """Return the fields of Line."""
        used = (kept.answer.tools for kept in reversed(self.context))
        tools = exchange.tools or next(filter(None, used), ())
        return {
            "tools": tools or UNSET,
            "session_id": self.origin.session_id,
            "message_id": exchange.request_id,
            "tenant": self.origin.tenant,
        }


class SftConversation(Conversation):
    """
    One line for a conversation. If the filter selects answers, one for each of these, which ends
    with it: then only the last message of a line is to be learned, and other answers say so.
    """

    async def lines_of(self, turn: PromptTurn) -> AsyncIterator[Line]:
        return
        yield

    def lines_after_turn(self) -> Iterator[Line]:
        if self.wanted != AnswerFilter() and self.wanted.matches(self.context[-1].answer):
            yield self._line()

    def lines_at_end(self) -> Iterator[Line]:
        if self.context and self.wanted == AnswerFilter():
            yield self._line()

    def shortened(self) -> list[Kept]:
        return [] if self.wanted == AnswerFilter() else super().shortened()

    def _line(self) -> SftLine:
        *earlier, last = self.prompt()
        if self.wanted != AnswerFilter():
            earlier = [_unlearned(message) for message in earlier]
        heading = self.heading(self.context[-1].answer)
        return SftLine(messages=(*earlier, last), **heading)


@dataclass
class PreferenceConversation(Conversation):
    """A line for each pair of answers of which one is better, if the filter selects one of them."""

    find: Find | None = None

    async def lines_of(self, turn: PromptTurn) -> AsyncIterator[Line]:
        prompt = (*self.prompt(), *turn.asked())
        seen: set[frozenset[bytes]] = set()  # by texts: a user may have sent an answer again
        for pair in [*corrections(turn), *await self._preferences(turn), *implied(turn)]:
            chosen, rejected = pair.messages()
            texts = frozenset((_said(chosen), _said(rejected)))
            if len(texts) < 2 or texts in seen:
                continue
            seen.add(texts)
            if self.wanted.matches(pair.chosen) or self.wanted.matches(pair.rejected):
                yield PreferenceLine(
                    prompt=prompt,
                    chosen=(chosen,),
                    rejected=(rejected,),
                    source=pair.source,
                    **self.heading(pair.chosen),
                )

    def lines_after_turn(self) -> Iterator[Line]:
        return iter(())

    def lines_at_end(self) -> Iterator[Line]:
        return iter(())

    async def _preferences(self, turn: PromptTurn) -> list["Pair"]:
        """Return pairs of preferences, the last given first: it overrides the others."""
        known = {each.request_id: each for each in turn.answers}
        pairs = []
        for chosen in turn.answers:
            given = _given(chosen)
            other = known.get(given.preferred_to or "")
            if other is None and given.preferred_session and given.preferred_to and self.find:
                other = await self.find(given.preferred_session, given.preferred_to)
            if other is None or _asked(other) != _asked(chosen):  # as an import may claim
                continue
            if _has_answer(chosen) and _has_answer(other):
                pairs.append(Pair(chosen, other, "preference"))
        return sorted(pairs, key=lambda pair: _given_at(pair.chosen), reverse=True)


class Pair(NamedTuple):
    chosen: Exchange
    rejected: Exchange
    source: Source

    def messages(self) -> tuple[Message, Message]:
        """Return both answers; of a correction, the corrected one and the generated one."""
        chosen = answer_of(self.chosen) if self.source == "correction" else generated(self.chosen)
        return chosen, generated(self.rejected)


def corrections(turn: PromptTurn) -> Iterator[Pair]:
    for each in turn.answers:
        if _given(each).correction and _has_answer(each):
            yield Pair(each, each, "correction")


def implied(turn: PromptTurn) -> Iterator[Pair]:
    """
    Yield pairs of ratings, then of retries: a user retries an answer that is not good enough. A
    retry is no pair against the ratings, or if an answer was stopped before its end.
    """
    whole = [each for each in turn.answers if _has_answer(each)]
    for chosen, rejected in permutations(whole, 2):
        if (_given(chosen).rating, _given(rejected).rating) == ("up", "down"):
            yield Pair(chosen, rejected, "rating")
    for before, after in pairwise(whole):
        is_contradicted = _given(before).rating == "up" or _given(after).rating == "down"
        is_whole = before.finish_reason in WHOLE and after.finish_reason in FINISHED
        if is_whole and not is_contradicted:
            yield Pair(after, before, "retry")


def answer_of(exchange: Exchange) -> Message:
    """Return the answer to learn: the correction, if there is one."""
    correction = _given(exchange).correction
    return generated(exchange) if correction is None else Message("assistant", correction)


def generated(exchange: Exchange) -> Message:
    """Return the answer as it was generated."""
    return Message(
        "assistant",
        exchange.response,
        exchange.reasoning or UNSET,
        tuple(map(_call, exchange.tool_calls)) or UNSET,
    )


def _call(call: ToolCall) -> Call:
    arguments: Any = call.function.arguments
    try:
        parsed = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        parsed = None
    return Call(
        call.id,
        CalledFunction(call.function.name, parsed if isinstance(parsed, dict) else arguments),
    )


def _given(exchange: Exchange) -> Feedback:
    return exchange.feedback or Feedback()


def _given_at(exchange: Exchange) -> float:
    at = _given(exchange).given_at
    return at.timestamp() if at else 0


def _is_overridden(exchange: Exchange, by_id: Mapping[str, Exchange]) -> bool:
    """Return whether the answer that it is preferred to was later preferred to it."""
    other = by_id.get(_given(exchange).preferred_to or "")
    return (
        other is not None
        and _given(other).preferred_to == exchange.request_id
        and _given_at(other) > _given_at(exchange)
    )


def _has_answer(exchange: Exchange) -> bool:
    return bool(exchange.response or exchange.tool_calls)


def _is_fit(exchange: Exchange) -> bool:
    """Return whether the answer can be learned: corrected, or good, or at least complete."""
    given = _given(exchange)
    if given.correction is not None:
        return True
    is_good = exchange.finish_reason in FINISHED or given.rating == "up"
    return _has_answer(exchange) and is_good and given.rating != "down"


def _unlearned(message: Message) -> Message:
    return replace(message, weight=0) if message.role == "assistant" else message


def _asked(exchange: Exchange) -> tuple[object, ...]:
    return exchange.prompt, exchange.tool_results


def _said(message: Message) -> bytes:
    """Return what the message says beside its reasoning."""
    return encode(replace(message, reasoning_content=UNSET))


def lines_as_json(lines: Sequence[Line]) -> bytes:
    return b"".join(encode(line) + b"\n" for line in lines)
