"""
An answer as its events build it up: content, reasoning and tool calls. One offset in characters
counts all of them, in the order in which they were generated.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby, pairwise
from typing import Literal, Self

from msgspec import Struct
from msgspec.structs import replace

from services.contract.conversation import FunctionCall, ToolCall
from services.contract.messages import AnswerEvent, Token, ToolCallDelta

RunKind = Literal["content", "reasoning", "tool_call"]


class Run(Struct, frozen=True, array_like=True):
    """Consecutive characters of one channel, or of one tool call."""

    kind: RunKind
    length: int


@dataclass(slots=True)
class Answer:
    """What was generated so far. It grows by events without gaps or repetitions."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[AnswerEvent]) -> Self:
        answer = cls()
        for event in merge(events):  # adding each one would copy the text so far each time
            answer.add(event)
        return answer

    def add(self, event: AnswerEvent) -> None:
        is_new_call = isinstance(event, ToolCallDelta) and event.index == len(self.tool_calls)
        match event:
            case Token(channel="content", text=text):
                self.content += text
            case Token(text=text):
                self.reasoning += text
            case ToolCallDelta():
                self._add_call(event)
        kind: RunKind = event.channel if isinstance(event, Token) else "tool_call"
        length = event.end - event.offset
        if self.runs and self.runs[-1].kind == kind and not is_new_call:
            length += self.runs.pop().length
        self.runs.append(Run(kind, length))

    @property
    def length(self) -> int:
        """The number of characters in all channels."""
        return sum(run.length for run in self.runs)

    @property
    def order(self) -> tuple[Run, ...]:
        """
        The order in which the answer was generated, if it is not the usual one: reasoning, then
        content, then tool calls. Else (), which `events_of` takes for the usual one.
        """
        usual = Answer.of(events_of(self.content, self.reasoning, self.tool_calls))
        return () if usual.runs == self.runs else tuple(self.runs)

    def starts_with(self, other: "Answer") -> bool:
        """Return whether the other answer is a first part of this one, or equal."""
        if not other.runs:
            return True
        *whole, last = other.runs
        if len(self.runs) <= len(whole) or self.runs[: len(whole)] != whole:
            return False
        own = self.runs[len(whole)]
        is_longer = own.kind == last.kind and own.length >= last.length
        return is_longer and self.text.startswith(other.text)

    @property
    def text(self) -> str:
        """The characters of all channels."""
        events = events_of(self.content, self.reasoning, self.tool_calls, self.runs)
        return "".join(map(text_of, events))

    def _add_call(self, delta: ToolCallDelta) -> None:
        if delta.index == len(self.tool_calls):
            self.tool_calls.append(ToolCall(delta.id, FunctionCall(delta.name, delta.arguments)))
            return
        call = self.tool_calls[delta.index]
        function = replace(call.function, arguments=call.function.arguments + delta.arguments)
        self.tool_calls[delta.index] = replace(call, function=function)


def events_of(
    content: str, reasoning: str, tool_calls: Iterable[ToolCall], order: Iterable[Run] = ()
) -> list[AnswerEvent]:
    """Return one event per run of a stored answer, without token ids; `order` as in Answer."""
    calls = list(tool_calls)
    runs = [*order] or [
        *([Run("reasoning", len(reasoning))] if reasoning else []),
        *([Run("content", len(content))] if content else []),
        *(Run("tool_call", _call_length(call)) for call in calls),
    ]
    texts = {"content": content, "reasoning": reasoning}
    used: Counter[RunKind] = Counter()  # characters of texts, and calls
    ends = accumulate((run.length for run in runs), initial=0)
    events: list[AnswerEvent] = []
    for run, (start, end) in zip(runs, pairwise(ends), strict=True):
        kind, at = run.kind, used[run.kind]
        if kind == "tool_call":
            call = calls[at]
            name, arguments = call.function.name, call.function.arguments
            events.append(ToolCallDelta(start, at, (), call.id, name, arguments))
            used[kind] += 1
        else:
            events.append(Token(start, texts[kind][at : at + run.length], (), channel=kind))
            used[kind] += run.length
        assert events[-1].end == end, "the runs of an answer don't add up"
    return events


def _call_length(call: ToolCall) -> int:
    return len(call.function.name) + len(call.function.arguments)


def text_of(event: AnswerEvent) -> str:
    """Return the characters that the offsets count."""
    return event.text if isinstance(event, Token) else event.name + event.arguments


def after_offset(event: AnswerEvent, offset: int) -> AnswerEvent | None:
    """
    Return the part of the event after the answer's first `offset` characters, or None. The begin of
    a call is not cut: who has a part of its name gets all of it.
    """
    if event.offset >= offset:
        return event
    if event.end <= offset:
        return None
    if isinstance(event, Token):
        return replace(event, offset=offset, text=event.text[offset - event.offset :])
    known = offset - event.offset - len(event.name)
    if known < 0:
        return event
    return replace(event, offset=offset, id="", name="", arguments=event.arguments[known:])


def merge(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    """Return as few events as possible: one per run. Logprobs are left out."""
    groups = groupby(events, lambda event: (event.__class__, _channel(event)))
    return [_joined(list(group)) for _, group in groups]


def _channel(event: AnswerEvent) -> str | int:
    return event.channel if isinstance(event, Token) else event.index


def _joined(events: list[AnswerEvent]) -> AnswerEvent:
    """Return events of one channel or call as one."""
    first = events[0]
    text = "".join(map(text_of, events))
    ids = tuple(chain.from_iterable(event.token_ids for event in events))
    mu = mirostat_mu(events)
    if isinstance(first, Token):
        return replace(first, text=text, token_ids=ids, logprobs=None, mirostat_mu=mu)
    arguments = text.removeprefix(first.name)
    return replace(first, arguments=arguments, token_ids=ids, logprobs=None, mirostat_mu=mu)


def mirostat_mu(events: Sequence[AnswerEvent]) -> float | None:
    """Return the state of Mirostat after the events; None without Mirostat."""
    states = (event.mirostat_mu for event in reversed(events))
    return next((state for state in states if state is not None), None)


def split(event: AnswerEvent, max_chars: int) -> Iterator[AnswerEvent]:
    """Yield the event in parts of at most `max_chars` characters, but for the name of a call."""
    if isinstance(event, Token):
        for at in range(0, len(event.text), max_chars):
            yield replace(event, offset=event.offset + at, text=event.text[at : at + max_chars])
        return
    yield replace(event, arguments=event.arguments[:max_chars])
    start = event.offset + len(event.name)
    for at in range(max_chars, len(event.arguments), max_chars):
        part = event.arguments[at : at + max_chars]
        yield replace(event, offset=start + at, id="", name="", arguments=part)
