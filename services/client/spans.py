"""
Spans of requests to a model, by the GenAI conventions of OpenTelemetry:
https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-spans.md
"""

from contextlib import AbstractContextManager
from typing import Literal

from services.contract import prompts
from services.contract.messages import ChatRequest, Done, Failed, ModelKind
from services.runtime import tracing

PROVIDER = "finetunellm"
_OPERATIONS: dict[ModelKind, str] = {
    "chat": "chat",
    "embedding": "embeddings",
    "rerank": "rerank",
}


def embedding(
    kind: ModelKind, model: str | None, side: Literal["client", "server"]
) -> AbstractContextManager[tracing.Span]:
    """Work on a span of a request for embeddings or scores during the body."""
    return tracing.span(_name(kind, model), side, _about(kind, model))


def start_chat(
    request: ChatRequest,
    side: Literal["client", "server"],
    at: float | None = None,
    **own: str | int | bool | None,
) -> tracing.Span:
    """Start the span of an attempt at an answer. `own` are attributes without a convention."""
    about = {
        "gen_ai.conversation.id": prompts.stored_session(request),
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.max_tokens": request.max_completion_tokens or request.max_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.top_k": request.top_k,
        "gen_ai.request.seed": request.seed,
    }
    ours = {f"finetunellm.{name}": value for name, value in own.items()}
    attributes = {**_about("chat", request.model), **about, **ours}
    return tracing.start(_name("chat", request.model), side, attributes, at)


def end_chat(span: tracing.Span, end: Done | Failed | str) -> None:
    """End the span with the last event of the attempt, or with the code of an error."""
    if not isinstance(end, Done):
        span.end(end.code if isinstance(end, Failed) else end)
        return
    if span.is_recorded:
        usage = end.usage
        span.set(
            {
                "gen_ai.response.finish_reasons": [end.finish_reason],
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
                "finetunellm.stored": end.stored,
            }
        )
    span.end()


def _about(kind: ModelKind, model: str | None) -> tracing.Attributes:
    return {
        "gen_ai.operation.name": _OPERATIONS[kind],
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
    }


def _name(kind: ModelKind, model: str | None) -> str:
    return f"{_OPERATIONS[kind]} {model}" if model else _OPERATIONS[kind]
