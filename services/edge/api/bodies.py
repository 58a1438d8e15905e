"""What OpenAI-style clients send, and what it is as a request on the bus."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from services.contract.conversation import Conversation, ToolChoice, Tools
from services.contract.errors import ServiceError
from services.contract.messages import (
    ChatRequest,
    MaxTokens,
    ModelName,
    Sampling,
    Stop,
    TokenId,
    Tokens,
)

Choices = Annotated[int, Meta(ge=1, le=16)]
Prompt = Annotated[str, Meta(min_length=1)]
Prompts = Annotated[tuple[Prompt | TokenId | Tokens, ...], Meta(min_length=1)]
"""After translation: a list of token ids that form one prompt is an element of this list."""
MAX_PROMPTS = 16
MAX_CHOICES = 64  # to all prompts: as many as a worker's queue holds


class StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class Body(Sampling, frozen=True, kw_only=True):
    """What both endpoints have. Sampling has more than OpenAI's API: top_k, min_p, grammar, …"""

    model: ModelName | None = None
    n: Choices | None = None
    best_of: Literal[1] | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Meta(max_length=32)] | None = None  # type: ignore[assignment]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None
    user: str | None = None  # goes into the log

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionBody(Body, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Conversation
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: tuple[Literal["text"], ...] | None = None


class CompletionBody(Body, frozen=True, kw_only=True):
    """The body of `POST /v1/completions`: text, or token ids, or several of them."""

    prompt: Prompt | Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Raises ServiceError(invalid_request) for numbers beside texts, and for too many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [part for part in self.prompt[: MAX_PROMPTS + 1] if not isinstance(part, int)]
        if len(several) < len(self.prompt) or len(several) > MAX_PROMPTS:
            raise ServiceError(
                "invalid_request",
                "The field `prompt` must be a text, a list of token ids, or a list of up to"
                f" {MAX_PROMPTS} of these.",
            )
        return several


def chat_request(body: ChatCompletionBody, session_id: str) -> ChatRequest:
    """Raises ServiceError(invalid_request) for fields that contradict each other."""
    limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit]
    if body.top_logprobs is not None and not body.logprobs:
        raise ServiceError("invalid_request", "The field `top_logprobs` needs logprobs: true.")
    fields = _sampling(body) | {
        "max_tokens": min(limits, default=None),
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    return ChatRequest(
        **fields,
        model=body.model,
        session_id=session_id,
        messages=body.messages,
        tools=body.tools,
        tool_choice=body.tool_choice or "auto",
        parallel_tool_calls=body.parallel_tool_calls,
    )


def text_requests(body: CompletionBody, session_id: str) -> list[ChatRequest]:
    """One of each prompt. Raises ServiceError(invalid_request) as chat_request does."""
    if (answers := len(body.prompts) * (body.n or 1)) > MAX_CHOICES:
        raise ServiceError(
            "invalid_request",
            f"The field `n` makes {answers} answers to the prompts; {MAX_CHOICES} is the most.",
        )
    if body.echo and any(not isinstance(prompt, str) for prompt in body.prompts):
        raise ServiceError("invalid_request", "The field `echo` is for prompts that are text.")
    if body.echo and body.logprobs is not None:
        raise ServiceError(
            "invalid_request",
            "The field `echo` can't be had with logprobs: those of a prompt are not computed.",
        )
    return [
        ChatRequest(**_sampling(body), model=body.model, session_id=session_id, text=prompt)
        for prompt in body.prompts
    ]


def _sampling(body: Body) -> dict[str, Any]:
    fields = {name: getattr(body, name) for name in Sampling.__struct_fields__}
    return fields | {"stop": (body.stop,) if isinstance(body.stop, str) else body.stop}
