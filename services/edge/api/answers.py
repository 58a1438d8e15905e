"""One of a completion's answers as it comes: what each event adds to it, and the whole of it."""

import secrets
import string
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate, chain, islice
from typing import Any, Protocol

from msgspec import UNSET, Struct
from msgspec.structs import replace

from services.client.tool_calls import (
    AnswerPart,
    ArgumentsDelta,
    TextDelta,
    ToolCallParser,
    ToolCallStart,
)
from services.contract.messages import Done, Token, TokenProbability
from services.edge.api.objects import (
    AssistantMessage,
    CallDelta,
    CalledFunction,
    ChatChoice,
    ChoiceLogprob,
    ChunkChoice,
    CompletionToolCall,
    Delta,
    FinishReason,
    Likely,
    Logprobs,
    TextChoice,
    TextLogprobs,
)

CALL_ID_LENGTH = 9  # of letters and digits: Mistral's templates take no other
CALL_ID_LETTERS = string.ascii_letters + string.digits


class ChoiceBuilder(Protocol):
    """The parts are what a streaming client is sent."""

    @property
    def is_complete(self) -> bool:
        """Return whether nothing that the model still generates can belong to the answer."""

    def begin(self) -> Iterable[Struct]: ...

    def push(self, token: Token) -> Iterable[Struct]: ...

    def end(self, done: Done) -> Iterable[Struct]:
        """The last part has the finish reason."""

    def whole(self) -> Struct:
        """After its end."""


class ChatChoiceBuilder:
    """
    `names` are the functions that it may call. Without `several` it is complete at the end of the
    first call.
    """

    def __init__(self, index: int, names: Collection[str], several: bool) -> None:
        self._index = index
        self._reader = ToolCallParser(names) if names else None
        self._several = several
        self._is_full = False
        self._text = ""
        self._calls: list[CompletionToolCall] = []
        self._logprobs: tuple[ChoiceLogprob, ...] | None = None
        self._finish_reason: FinishReason = "stop"

    @property
    def is_complete(self) -> bool:
        if self._several or not self._calls or self._reader is None:
            return False
        return self._is_full or not self._reader.is_within_call

    def begin(self) -> Iterator[ChunkChoice]:
        content = None if self._reader else ""  # there may be none beside calls
        yield ChunkChoice(self._index, Delta(role="assistant", content=content))

    def push(self, token: Token) -> Iterator[ChunkChoice]:
        logprobs = _logprobs(token)
        if logprobs:
            self._logprobs = (self._logprobs or ()) + logprobs.content
        parts = self._reader.push(token.text) if self._reader else [TextDelta(token.text)]
        deltas = [*self._read(parts)] or ([Delta()] if logprobs else [])
        for delta in deltas:
            yield ChunkChoice(self._index, delta, logprobs)
            logprobs = None

    def end(self, done: Done) -> Iterator[ChunkChoice]:
        for delta in self._read(self._reader.flush() if self._reader else []):
            yield ChunkChoice(self._index, delta)
        self._finish_reason = _finish_reason(done)
        is_within_call = self._reader is not None and self._reader.is_within_call
        is_whole = self._finish_reason == "stop" and not is_within_call
        if self.is_complete or (self._calls and is_whole):
            self._finish_reason = "tool_calls"
        yield ChunkChoice(self._index, Delta(), finish_reason=self._finish_reason)

    def whole(self) -> ChatChoice:
        calls = tuple(self._calls)
        content = self._text or (None if calls else "")
        message = AssistantMessage(content, calls or UNSET)
        logprobs = None if self._logprobs is None else Logprobs(self._logprobs)
        return ChatChoice(self._index, message, logprobs, self._finish_reason)

    def _read(self, parts: Iterable[AnswerPart]) -> Iterator[Delta]:
        for part in parts:
            if self._calls and not self._several and not isinstance(part, ArgumentsDelta):
                self._is_full = True
            if self._is_full:
                return
            match part:
                case TextDelta(text):
                    self._text += text
                    yield Delta(content=text)
                case ToolCallStart(name):
                    self._calls.append(CompletionToolCall(_call_id(), CalledFunction(name)))
                    yield self._delta(CalledFunction(name), id=self._calls[-1].id, type="function")
                case ArgumentsDelta(text):
                    call = self._calls[-1]
                    said = replace(call.function, arguments=call.function.arguments + text)
                    self._calls[-1] = replace(call, function=said)
                    yield self._delta(CalledFunction(arguments=text))

    def _delta(self, function: CalledFunction, **more: Any) -> Delta:
        return Delta(tool_calls=(CallDelta(len(self._calls) - 1, function, **more),))


class TextChoiceBuilder:
    """`echo` is the prompt, where it is to stand before what follows."""

    is_complete = False

    def __init__(self, index: int, echo: str) -> None:
        self._index = index
        self._echo = echo
        self._text = echo
        self._logprobs: list[TextLogprobs] = []
        self._finish_reason: FinishReason = "stop"

    def begin(self) -> Iterator[TextChoice]:
        if self._echo:
            yield TextChoice(self._index, self._echo)

    def push(self, token: Token) -> Iterator[TextChoice]:
        logprobs = _text_logprobs(token)
        if logprobs:
            self._logprobs.append(logprobs)
        self._text += token.text
        yield TextChoice(self._index, token.text, logprobs)

    def end(self, done: Done) -> Iterator[TextChoice]:
        self._finish_reason = _finish_reason(done)
        yield TextChoice(self._index, "", finish_reason=self._finish_reason)

    def whole(self) -> TextChoice:
        logprobs = _joined(self._logprobs) if self._logprobs else None
        return TextChoice(self._index, self._text, logprobs, self._finish_reason)


def _finish_reason(done: Done) -> FinishReason:
    """OpenAI's API has no word of its own for a loop, a time that is up, a cancel: it was cut."""
    return "stop" if done.finish_reason == "stop" else "length"


def _call_id() -> str:
    return "".join(secrets.choice(CALL_ID_LETTERS) for _ in range(CALL_ID_LENGTH))


def _logprobs(token: Token) -> Logprobs | None:
    if token.logprobs is None:
        return None
    return Logprobs(
        tuple(
            ChoiceLogprob(told.text, told.logprob, told.bytes, tuple(map(_likely, told.top)))
            for told in token.logprobs
        )
    )


def _likely(candidate: TokenProbability) -> Likely:
    return Likely(candidate.text, candidate.logprob, candidate.bytes)


def _text_logprobs(token: Token) -> TextLogprobs | None:
    if token.logprobs is None:
        return None
    offsets = accumulate((len(told.text) for told in token.logprobs), initial=token.offset)
    return TextLogprobs(
        tuple(told.text for told in token.logprobs),
        tuple(told.logprob for told in token.logprobs),
        tuple({likely.text: likely.logprob for likely in told.top} for told in token.logprobs),
        tuple(islice(offsets, len(token.logprobs))),
    )


def _joined(parts: list[TextLogprobs]) -> TextLogprobs:
    fields = ((getattr(part, name) for part in parts) for name in TextLogprobs.__struct_fields__)
    return TextLogprobs(*(tuple(chain.from_iterable(field)) for field in fields))
