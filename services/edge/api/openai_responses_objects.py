"""
The objects and events of `/v1/responses`, built from the events of an answer.
https://platform.openai.com/docs/api-reference/responses-streaming
"""

import base64
import time
from binascii import Error as Base64Error
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct, field

from services.contract import responses
from services.contract.errors import ErrorCode, ServiceError, shutting_down
from services.contract.messages import (
    AnswerEvent,
    Done,
    FinishReason,
    StreamEvent,
    Token,
    TokenLogprob,
    TokenProbability,
    ToolCallDelta,
    Usage,
)
from services.contract.responses import ResponseTurn
from services.edge.sse import data_line

ID_PREFIX = "resp_"
CONVERSATION_PREFIX = "conv_"
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
Fields = dict[str, Any]

STATUSES: dict[FinishReason, ResponseStatus] = {
    "stop": "completed",
    "tool_calls": "completed",
    "cancelled": "cancelled",
    "failed": "failed",
}
"""Of finished answers. All others are incomplete, and OpenAI's API has only one reason for that."""
ERROR_CODES: dict[ErrorCode, str] = {
    "overloaded": "rate_limit_exceeded",
    "too_many_sessions": "rate_limit_exceeded",
    "invalid_request": "invalid_prompt",
    "context_length_exceeded": "invalid_prompt",
}


ENCODED = "plain:"
"""Begin of an `encrypted_content` of ours, which hides nothing: clients only have to return it."""


class InputDetails(Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(Struct, frozen=True):
    code: str
    message: str


class ResponseObject(Struct, frozen=True, kw_only=True):
    """A response. The last fields are those of the request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    output: tuple[Fields, ...] = ()
    usage: ResponseUsage | None = None

    model: str = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: dict[str, str] | None = None
    background: bool = False
    store: bool = True
    truncation: str = "disabled"
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    parallel_tool_calls: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    tools: tuple[Fields, ...] = ()
    tool_choice: Any = "auto"
    text: Fields = field(default_factory=lambda: {"format": {"type": "text"}})
    reasoning: Fields = field(default_factory=lambda: {"effort": None, "summary": None})
    metadata: dict[str, str] = {}
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str = "default"
    user: str | None = None


class Heading(NamedTuple):
    """What is known of a response before its answer."""

    request_id: str
    parameters: Fields
    includes_encrypted: bool = False

    @property
    def is_background(self) -> bool:
        return bool(self.parameters.get("background"))


def heading_of(request_id: str, turn: ResponseTurn | None) -> Heading:
    return Heading(request_id, turn.parameters if turn else {})


class ResponseBuilder:
    """
    Builds a response and its events from the events of its answer.

    Sequence numbers depend on the answer's characters only, not on how they are split into events:
    each character of a delta has a number, and the event that of its last one. So any edge can
    continue a stream after a number, with events that came from another worker or from the log.
    """

    def __init__(self, heading: Heading) -> None:
        self.heading = heading
        self.output: list[Fields] = []
        self._next = 0
        self._is_open = False
        self._logprobs: list[Fields] = []  # of tokens whose text is yet to come
        self._calls = 0

    # --- events ---

    def begin(self) -> list[Fields]:
        is_background = self.heading.is_background
        status: ResponseStatus = "queued" if is_background else "in_progress"
        kinds = ["created", *(["queued"] if is_background else [])]
        events = [self._event(f"response.{kind}", response=self.response(status)) for kind in kinds]
        in_progress = self.response("in_progress")
        return [*events, self._event("response.in_progress", response=in_progress)]

    def push(self, event: AnswerEvent) -> list[Fields]:
        match event:
            case Token(channel="content", text=text, logprobs=logprobs):
                self._logprobs += [_logprob(each) for each in logprobs or ()]
                return [*self._text("message", text)] if text else []
            case Token(text=text):
                return [*self._text("reasoning", text)] if text else []
            case ToolCallDelta():
                return [*self._call(event)]

    def close(self, reason: FinishReason) -> list[Fields]:
        """End the last item. A finished answer without any has a message without text."""
        status: ResponseStatus = STATUSES.get(reason, "incomplete")
        is_whole = status == "completed"
        events: list[Fields] = []
        if not self.output and status in ("completed", "incomplete"):
            events += self._open_message()
        return [*events, *self._close("completed" if is_whole else "incomplete")]

    def end(self, done: Done) -> list[Fields]:
        events = self.close(done.finish_reason)
        response = self.finished(done)
        kind = "completed" if response.status == "completed" else "incomplete"
        return [*events, self._event(f"response.{kind}", response=response)]

    def fail(self, error: ServiceError) -> list[Fields]:
        events = self.close("failed")
        return [*events, self._event("response.failed", response=self.failed(error))]

    # --- responses ---

    def response(self, status: ResponseStatus, **more: Any) -> ResponseObject:
        output = tuple(dict(item) for item in self.output)
        return ResponseObject(
            id=ID_PREFIX + self.heading.request_id,
            created_at=int(responses.created_at(self.heading.request_id).timestamp()),
            status=status,
            output=output,
            **{**self.heading.parameters, **more},
        )

    def finished(self, done: Done, at: datetime | None = None) -> ResponseObject:
        """`at` is the time of the end, by default now."""
        status: ResponseStatus = STATUSES.get(done.finish_reason, "incomplete")
        more = {"store": False} if done.stored == "failed" else {}
        completed_at = int(at.timestamp() if at else time.time())
        return self.response(
            status,
            completed_at=completed_at if status == "completed" else None,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            usage=_usage(done.usage),
            **more,
        )

    def failed(self, error: ServiceError) -> ResponseObject:
        code = ERROR_CODES.get(error.code, "server_error")
        return self.response("failed", error=ResponseError(code, error.message))

    # --- items ---

    @property
    def _place(self) -> Fields:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _text(self, kind: Literal["message", "reasoning"], text: str) -> Iterator[Fields]:
        if not self._is_open or self.output[-1]["type"] != kind:
            yield from self._close()
            yield from self._open_message() if kind == "message" else self._open_reasoning()
        part = self.output[-1]["content"][0]
        part["text"] += text
        if kind == "reasoning":
            yield self._delta("response.reasoning_text.delta", text, content_index=0)
            return
        logprobs, self._logprobs = self._logprobs, []
        part["logprobs"] += logprobs
        yield self._delta("response.output_text.delta", text, content_index=0, logprobs=logprobs)

    def _open_message(self) -> Iterator[Fields]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._open("msg", type="message", role="assistant", content=[])
        yield from self._open_part(part)

    def _open_reasoning(self) -> Iterator[Fields]:
        yield from self._open("rs", type="reasoning", summary=[], content=[])
        yield from self._open_part({"type": "reasoning_text", "text": ""})

    def _open_part(self, part: Fields) -> Iterator[Fields]:
        yield self._event("response.content_part.added", **self._place, content_index=0, part=part)
        self.output[-1]["content"] = [dict(part, logprobs=[]) if "logprobs" in part else dict(part)]

    def _call(self, event: ToolCallDelta) -> Iterator[Fields]:
        if event.index == self._calls:
            self._calls += 1
            yield from self._close()
            fields = {"call_id": event.id, "name": event.name, "arguments": ""}
            yield from self._open("fc", type="function_call", **fields)
        if event.arguments:
            self.output[-1]["arguments"] += event.arguments
            yield self._delta("response.function_call_arguments.delta", event.arguments)

    def _open(self, prefix: str, **fields: Any) -> Iterator[Fields]:
        id_ = f"{prefix}_{self.heading.request_id}_{len(self.output)}"
        item = {"id": id_, **fields, "status": "in_progress"}
        self.output.append(item)
        self._is_open = True
        index = len(self.output) - 1
        yield self._event("response.output_item.added", output_index=index, item=dict(item))

    def _close(self, status: str = "completed") -> Iterator[Fields]:
        if not self._is_open:
            return
        self._is_open = False
        item = self.output[-1]
        item["status"] = status
        yield from self._done_events(item)
        if item["type"] == "reasoning" and self.heading.includes_encrypted:
            item["encrypted_content"] = encode_reasoning(item["content"][0]["text"])
        index = len(self.output) - 1
        yield self._event("response.output_item.done", output_index=index, item=dict(item))

    def _done_events(self, item: Fields) -> Iterator[Fields]:
        place = self._place
        if item["type"] == "function_call":
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **place, **named)
            return
        part = item["content"][0]
        if item["type"] == "message":
            part["logprobs"] += self._logprobs
        more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        kind = "output_text" if item["type"] == "message" else "reasoning_text"
        text = part["text"]
        yield self._event(f"response.{kind}.done", **place, content_index=0, text=text, **more)
        yield self._event("response.content_part.done", **place, content_index=0, part=part)

    def _delta(self, kind: str, delta: str, **fields: Any) -> Fields:
        self._next += len(delta) - 1
        return self._event(kind, **self._place, **fields, delta=delta)

    def _event(self, kind: str, **fields: Any) -> Fields:
        self._next += 1
        return {"type": kind, "sequence_number": self._next - 1, **fields}


class ResponseEncoder:
    """An sse.Encoder of the events after number `after`, of a response that is stored or not."""

    headers = ()

    def __init__(self, builder: ResponseBuilder, is_stored: bool, after: int = -1) -> None:
        self._builder = builder
        self._is_stored = is_stored
        self._after = after

    def begin(self) -> bytes:
        return self._write(self._builder.begin())

    def encode(self, number: int, event: StreamEvent) -> bytes:
        match event:
            case Token() | ToolCallDelta():
                return self._write(self._builder.push(event))
            case Done():
                return self._write(self._builder.end(event))
        return b""

    def end(self) -> bytes:
        return b""

    def fail(self, error: ServiceError) -> bytes:
        return self._write(self._builder.fail(error))

    def interrupt(self) -> bytes:
        """Write no event if the client can continue the stream at another edge."""
        return b"" if self._is_stored else self.fail(shutting_down())

    def _write(self, events: Iterable[Fields]) -> bytes:
        return b"".join(map(_encode, filter(None, map(self._new_part, events))))

    def _new_part(self, event: Fields) -> Fields | None:
        """Return the part of the event after the number; None if the client has all of it."""
        new = event["sequence_number"] - self._after
        if new <= 0:
            return None
        delta = event.get("delta", "")
        is_cut = new < len(delta)
        return {**event, "delta": delta[-new:]} if is_cut else event


def encode_reasoning(text: str) -> str:
    """Return the `encrypted_content` with which a client can send reasoning back."""
    return ENCODED + base64.b64encode(text.encode()).decode()


def decode_reasoning(encoded: str) -> str:
    """Return the reasoning in an `encrypted_content`; "" if it is of another server."""
    if not encoded.startswith(ENCODED):
        return ""
    try:
        return base64.b64decode(encoded.removeprefix(ENCODED), validate=True).decode()
    except (Base64Error, UnicodeDecodeError):
        return ""


def _encode(event: Fields) -> bytes:
    return b"event: %b\n%b" % (event["type"].encode(), data_line(msgspec.json.encode(event)))


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        InputDetails(usage.cached_tokens),
        usage.completion_tokens,
        OutputDetails(usage.reasoning_tokens),
        usage.prompt_tokens + usage.completion_tokens,
    )


def _logprob(token: TokenLogprob) -> Fields:
    return {**_likely(token), "top_logprobs": [*map(_likely, token.top)]}


def _likely(token: TokenProbability) -> Fields:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}
