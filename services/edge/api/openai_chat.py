"""`POST /v1/chat/completions`: the request to a worker, the answer as choices."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from litestar import delete, post
from litestar.params import FromPath
from litestar.types import ASGIApp
from msgspec import UNSET

from services.client.history_requests import check_connected
from services.contract import subjects
from services.contract.answer import Answer
from services.contract.conversation import ChatMessage
from services.contract.errors import ServiceError
from services.contract.messages import (
    AnswerEvent,
    Channel,
    ChatRequest,
    Done,
    Token,
    TokenProbability,
    ToolCallDelta,
)
from services.edge.api.completion import (
    CHAT,
    CompletionEncoder,
    check_length,
    completion_heading,
    respond,
    send,
    session_of,
)
from services.edge.api.objects import (
    AssistantMessage,
    CallDelta,
    CalledFunction,
    ChatChoice,
    ChoiceLogprob,
    ChunkChoice,
    Delta,
    FinishReason,
    Likely,
    Logprobs,
    finish_reason_of,
)
from services.edge.api.openai_requests import ChatCompletionBody
from services.edge.context import Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.parameters import get
from services.edge.sse import END, last_event_id, no_content


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, ChatCompletionBody)
    check_length(edge, tenant, "messages", len(body.messages), body.model)
    chat = chat_request(body, session_of(request, body))
    choices = [_choice_builder(index, body, chat) for index in range(body.n or 1)]
    return await respond(request, edge, tenant, CHAT, body, [chat], choices)


@get("/v1/chat/completions/{completion_id:str}")
async def chat_completion(
    request: AnyRequest, completion_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> ASGIApp:
    """
    Send a completion that a worker generates or has finished in the last minute: as a stream from
    `Last-Event-ID` on, or as JSON to a client that does not accept a stream. 204 says that there is
    nothing (more) to stream.
    """
    request_id = _request_id(completion_id)
    is_stream = request.accept.accepts("text/event-stream")
    offset = last_event_id(request) if is_stream else 0
    if offset == END:
        return no_content()
    client = edge.chat_client(tenant)
    replay = await client.find_replay(request_id, offset)
    if replay is None and is_stream:
        return no_content()
    if replay is None:
        raise ServiceError("not_found", "No worker has this completion (any more): ask again.")
    model, age = replay.request.model, replay.age_seconds
    heading = completion_heading(CHAT, request_id, edge.workers, model, age)
    choices = [ChatChoiceBuilder(0, has_tools=bool(replay.request.tools))]
    encoder = CompletionEncoder(CHAT, heading, choices, 1, includes_usage=True, is_resumable=True)
    return await send(request, edge, encoder, [client.rejoin(request_id, offset)], is_stream)


@delete("/v1/chat/completions/{completion_id:str}", status_code=200)
async def cancel_completion(
    completion_id: FromPath[str], edge: TheEdge, tenant: Tenant
) -> dict[str, Any]:
    """Cancel a completion that is being generated; a finished one stays as it is."""
    check_connected(edge.bus)
    await edge.chat_client(tenant).cancel(_request_id(completion_id))
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


def _request_id(completion_id: str) -> str:
    request_id = completion_id.removeprefix(f"{CHAT.id_prefix}-")
    subjects.require_request_id(request_id)
    return request_id


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
            "The field `continue_final_message`, or `prefix` in a message, needs a last message of"
            " the assistant without tool calls: add it, or remove the field.",
        )
    if body.continue_final_message == "reasoning_content" and message.text:
        raise ServiceError(
            "invalid_request",
            "The field `continue_final_message` is `reasoning_content`, but the last message has"
            " content after its reasoning: remove the content.",
        )


def _choice_builder(index: int, body: ChatCompletionBody, chat: ChatRequest) -> "ChatChoiceBuilder":
    echo = body.messages[-1] if chat.continue_final and body.echo else None
    has_tools = bool(chat.tools) and chat.tool_choice != "none"
    includes_reasoning = body.include_reasoning is not False
    return ChatChoiceBuilder(index, has_tools, includes_reasoning, echo, bool(body.functions))


class ChatChoiceBuilder:
    """
    A ChoiceBuilder. `echo` is the message that the answer continues, if it should be a part of the
    choice. With `has_functions`, a call has the form before there were tools. Logprobs are those of
    the content.
    """

    def __init__(
        self,
        index: int,
        has_tools: bool = False,
        includes_reasoning: bool = True,
        echo: ChatMessage | None = None,
        has_functions: bool = False,
    ) -> None:
        self._index = index
        self._has_tools = has_tools
        self._includes_reasoning = includes_reasoning
        self._echo = echo
        self._has_functions = has_functions
        self._events: list[AnswerEvent] = []

    def begin(self) -> Iterator[ChunkChoice]:
        content = None if self._has_tools else ""  # calls may come without content
        yield ChunkChoice(self._index, Delta(role="assistant", content=content))
        if self._echo and self._echo.reasoning and self._includes_reasoning:
            yield ChunkChoice(self._index, _reasoning_delta(self._echo.reasoning))
        if self._echo and self._echo.text:
            yield ChunkChoice(self._index, Delta(content=self._echo.text))

    def add(self, event: AnswerEvent) -> None:
        self._events.append(event)

    def chunks(self, event: AnswerEvent) -> Iterator[ChunkChoice]:
        match event:
            case Token(channel="content"):
                yield from self._content(event)
            case Token(text=text) if text and self._includes_reasoning:
                yield ChunkChoice(self._index, _reasoning_delta(text))
            case ToolCallDelta() if self._has_functions:
                function = CalledFunction(event.name or UNSET, event.arguments)
                yield ChunkChoice(self._index, Delta(function_call=function))
            case ToolCallDelta():
                for delta in _call_deltas(event):
                    yield ChunkChoice(self._index, Delta(tool_calls=(delta,)))

    def end(self, done: Done) -> Iterator[ChunkChoice]:
        yield ChunkChoice(self._index, Delta(), finish_reason=self._finish_reason(done))

    def build(self, done: Done) -> ChatChoice:
        answer = Answer.of(self._events)
        calls = tuple(answer.tool_calls)
        echo = self._echo or ChatMessage("assistant")
        content = echo.text + answer.content
        reasoning = (echo.reasoning or "") + answer.reasoning
        reasoning_or_none = (reasoning if self._includes_reasoning else "") or UNSET
        message = AssistantMessage(
            content=content or (None if calls else ""),
            reasoning_content=reasoning_or_none,
            reasoning=reasoning_or_none,
            tool_calls=calls or UNSET if not self._has_functions else UNSET,
            function_call=calls[0].function if calls and self._has_functions else UNSET,
        )
        return ChatChoice(self._index, message, self._all_logprobs(), self._finish_reason(done))

    def _finish_reason(self, done: Done) -> FinishReason:
        reason = finish_reason_of(done)
        return "function_call" if self._has_functions and reason == "tool_calls" else reason

    def _all_logprobs(self) -> Logprobs | None:
        tokens = (each for each in self._events if isinstance(each, Token))
        parts = [*filter(None, (_logprobs(each) for each in tokens if each.channel == "content"))]
        return Logprobs(tuple(chain.from_iterable(p.content for p in parts))) if parts else None

    def _content(self, token: Token) -> Iterator[ChunkChoice]:
        logprobs = _logprobs(token)
        if token.text:
            yield ChunkChoice(self._index, Delta(content=token.text), logprobs)
        elif logprobs:
            yield ChunkChoice(self._index, Delta(), logprobs)


def _reasoning_delta(text: str) -> Delta:
    return Delta(reasoning_content=text, reasoning=text)


def _call_deltas(event: ToolCallDelta) -> Iterator[CallDelta]:
    """Yield the begin of a call with empty arguments, and the arguments, as OpenAI's API does."""
    if event.name:
        function = CalledFunction(event.name)
        yield CallDelta(event.index, function, id=event.id, type="function")
    if event.arguments:
        yield CallDelta(event.index, CalledFunction(arguments=event.arguments))


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
