"""`POST /v1/chat/completions`: the request to a worker, the answer as choices with tool calls."""

import secrets
import string
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from litestar import post
from litestar.types import ASGIApp
from msgspec import UNSET
from msgspec.structs import replace

from services.client.tool_calls import (
    AnswerPart,
    ArgumentsDelta,
    TextDelta,
    ToolCallParser,
    ToolCallStart,
)
from services.contract.errors import ServiceError
from services.contract.messages import Channel, ChatRequest, Done, Token, TokenProbability
from services.edge.api.completion import CHAT, check_length, respond, session_of
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
    finish_reason_of,
)
from services.edge.api.openai_requests import ChatCompletionBody
from services.edge.context import Tenant, TheEdge
from services.edge.errors import AnyRequest

CALL_ID_LENGTH = 9  # of letters and digits: Mistral's templates accept no other
CALL_ID_LETTERS = string.ascii_letters + string.digits


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, ChatCompletionBody)
    check_length("messages", len(body.messages), edge.workers, body.model)
    chat = chat_request(body, session_of(request, body))
    names = [] if chat.tool_choice == "none" else [t.function.name for t in chat.tools or ()]
    is_parallel = chat.parallel_tool_calls is not False
    choices = [ChatChoiceBuilder(index, names, is_parallel) for index in range(body.n or 1)]
    return await respond(request, edge, tenant, CHAT, body, [chat], choices)


def chat_request(body: ChatCompletionBody, session_id: str) -> ChatRequest:
    """
    Return the request to a worker. Raises ServiceError(invalid_request) for fields that contradict
    each other.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ServiceError("invalid_request", "The field `top_logprobs` needs logprobs: true.")
    fields = body.sampling | {
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    return ChatRequest(
        **fields,
        model=body.model,
        session_id=session_id,
        messages=body.messages,
        continue_final=_continued_channel(body),
        tools=body.tools,
        tool_choice=body.tool_choice or "auto",
        parallel_tool_calls=body.parallel_tool_calls,
        enable_thinking=body.enable_thinking,
        reasoning_effort=body.reasoning_effort,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _continued_channel(body: ChatCompletionBody) -> Channel | None:
    """
    Return the channel in which the last message is continued; None: it is a whole turn. As in
    llama-server, `true` continues the content, unless there is only reasoning.
    """
    if not body.continue_final_message:
        return None
    _check_continuation(body)
    if body.continue_final_message is True:
        message = body.messages[-1]
        return "reasoning" if message.reasoning and not message.text else "content"
    return "content" if body.continue_final_message == "content" else "reasoning"


def _check_continuation(body: ChatCompletionBody) -> None:
    """Raise ServiceError(invalid_request) if the last message can't be continued as requested."""
    message = body.messages[-1]
    if body.add_generation_prompt:
        raise ServiceError(
            "invalid_request",
            "The field `add_generation_prompt` is true, but the last message is to be continued:"
            " set it to false.",
        )
    if message.role != "assistant" or message.tool_calls:
        raise ServiceError(
            "invalid_request",
            "The field `continue_final_message` needs a last message of the assistant without tool"
            " calls: add it, or remove the field.",
        )
    if body.continue_final_message == "reasoning_content" and message.text:
        raise ServiceError(
            "invalid_request",
            "The field `continue_final_message` is `reasoning_content`, but the last message has"
            " content after its reasoning: remove the content.",
        )


class ChatChoiceBuilder:
    """
    A ChoiceBuilder. Calls of the functions in `names` are parsed. Unless `is_parallel`, the choice
    is complete at the end of its first call.
    """

    def __init__(self, index: int, names: Collection[str], is_parallel: bool) -> None:
        self._index = index
        self._reader = ToolCallParser(names) if names else None
        self._is_parallel = is_parallel
        self._is_past_first_call = False
        self._text = ""
        self._calls: list[CompletionToolCall] = []
        self._logprobs: tuple[ChoiceLogprob, ...] | None = None
        self._finish_reason: FinishReason = "stop"

    @property
    def is_complete(self) -> bool:
        if self._is_parallel or not self._calls or self._reader is None:
            return False
        return self._is_past_first_call or not self._reader.is_within_call

    def begin(self) -> Iterator[ChunkChoice]:
        content = None if self._reader else ""  # calls may come without text
        yield ChunkChoice(self._index, Delta(role="assistant", content=content))

    def push(self, token: Token) -> Iterator[ChunkChoice]:
        logprobs = _logprobs(token)
        if logprobs:
            self._logprobs = (self._logprobs or ()) + logprobs.content
        parts = self._reader.push(token.text) if self._reader else [TextDelta(token.text)]
        deltas = [*self._deltas(parts)] or ([Delta()] if logprobs else [])
        for delta in deltas:
            yield ChunkChoice(self._index, delta, logprobs)
            logprobs = None

    def end(self, done: Done) -> Iterator[ChunkChoice]:
        for delta in self._deltas(self._reader.flush() if self._reader else []):
            yield ChunkChoice(self._index, delta)
        self._finish_reason = finish_reason_of(done)
        is_within_call = self._reader is not None and self._reader.is_within_call
        is_whole = self._finish_reason == "stop" and not is_within_call
        if self.is_complete or (self._calls and is_whole):
            self._finish_reason = "tool_calls"
        yield ChunkChoice(self._index, Delta(), finish_reason=self._finish_reason)

    def build(self) -> ChatChoice:
        calls = tuple(self._calls)
        content = self._text or (None if calls else "")
        message = AssistantMessage(content, calls or UNSET)
        logprobs = None if self._logprobs is None else Logprobs(self._logprobs)
        return ChatChoice(self._index, message, logprobs, self._finish_reason)

    def _deltas(self, parts: Iterable[AnswerPart]) -> Iterator[Delta]:
        for part in parts:
            if self._calls and not self._is_parallel and not isinstance(part, ArgumentsDelta):
                self._is_past_first_call = True
            if self._is_past_first_call:
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
                    extended = replace(call.function, arguments=call.function.arguments + text)
                    self._calls[-1] = replace(call, function=extended)
                    yield self._delta(CalledFunction(arguments=text))

    def _delta(self, function: CalledFunction, **more: Any) -> Delta:
        return Delta(tool_calls=(CallDelta(len(self._calls) - 1, function, **more),))


def _call_id() -> str:
    return "".join(secrets.choice(CALL_ID_LETTERS) for _ in range(CALL_ID_LENGTH))


def _logprobs(token: Token) -> Logprobs | None:
    if token.logprobs is None:
        return None
    return Logprobs(
        tuple(
            ChoiceLogprob(each.text, each.logprob, each.bytes, tuple(map(_likely, each.top)))
            for each in token.logprobs
        )
    )


def _likely(candidate: TokenProbability) -> Likely:
    return Likely(candidate.text, candidate.logprob, candidate.bytes)
