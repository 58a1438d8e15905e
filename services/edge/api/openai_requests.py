"""The types of /v1 request bodies, after translation. See fields.py for what else is accepted."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from services.contract.conversation import Conversation, ToolChoice, Tools
from services.contract.embeddings import MAX_INPUTS, Dimensions
from services.contract.errors import ServiceError
from services.contract.messages import (
    ModelName,
    ReasoningBudget,
    ReasoningEffort,
    Sampling,
    Stop,
    TokenId,
    Tokens,
)
from services.contract.tokens import DetokenizeRequest, Text

Choices = Annotated[int, Meta(ge=1, le=16)]
Prompt = Annotated[str, Meta(min_length=1)]
Prompts = Annotated[tuple[Prompt | TokenId | Tokens, ...], Meta(min_length=1)]
"""A list of token ids that form one prompt is an element of this list, after translation."""
MAX_PROMPTS = 16


class StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    """The fields of both endpoints. `Sampling` has more than OpenAI's API: top_k, min_p, …"""

    model: ModelName | None = None
    n: Choices | None = None
    best_of: Literal[1] | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Meta(max_length=32)] | None = None  # type: ignore[assignment]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None
    user: str | None = None  # logged

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> dict[str, Any]:
        """
        Return the fields of `Sampling`, with `stop` as a tuple. The limit of OpenAI's API counts
        all tokens, also of reasoning.
        """
        fields = {name: getattr(self, name) for name in Sampling.__struct_fields__}
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit]
        return fields | {
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "max_tokens": None,
            "max_completion_tokens": min(limits, default=None),
        }


class ChatCompletionBody(CompletionRequest, frozen=True, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Conversation
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: bool | None = None  # the tools were sent in the older form; so is the answer
    enable_thinking: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None  # in the response
    # The answer continues the last message; `true`: its content, or its reasoning if that is all
    continue_final_message: bool | Literal["content", "reasoning_content"] | None = None
    add_generation_prompt: bool | None = None
    echo: bool | None = None  # of the last message, if it is continued
    modalities: tuple[Literal["text"], ...] | None = None


class ReasoningOptions(Struct, frozen=True):
    """OpenRouter's `reasoning`, and `thinking` of DeepSeek, GLM and Anthropic."""

    enabled: bool | None = None
    type: Literal["enabled", "disabled", "adaptive", "auto"] | None = None
    effort: ReasoningEffort | None = None
    max_tokens: ReasoningBudget | None = None
    budget_tokens: ReasoningBudget | None = None
    exclude: bool | None = None  # from the response

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of ChatCompletionBody that mean the same."""
        budget = self.budget_tokens if self.max_tokens is None else self.max_tokens
        fields = {
            "enable_thinking": self._is_enabled(budget),
            "reasoning_effort": self.effort,
            "reasoning_budget_tokens": budget,
            "include_reasoning": None if self.exclude is None else not self.exclude,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _is_enabled(self, budget: int | None) -> bool | None:
        """Return None for the default of the template. A budget alone asks for reasoning."""
        if self.enabled is not None:
            return self.enabled
        if self.type in ("enabled", "disabled"):
            return self.type == "enabled"
        return True if budget and self.effort is None else None


class CompletionBody(CompletionRequest, frozen=True, kw_only=True):
    """The body of `POST /v1/completions`: a text, token ids, or several of these."""

    prompt: Prompt | Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """
        Return the prompts as a list. Raises ServiceError(invalid_request) for numbers beside texts,
        and for too many prompts.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts = [part for part in self.prompt[: MAX_PROMPTS + 1] if not isinstance(part, int)]
        if len(prompts) < len(self.prompt) or len(prompts) > MAX_PROMPTS:
            raise ServiceError(
                "invalid_request",
                "The field `prompt` must be a text, a list of token ids, or a list of up to"
                f" {MAX_PROMPTS} of these.",
            )
        return prompts


Documents = Annotated[tuple[Text, ...], Meta(min_length=1, max_length=MAX_INPUTS)]


class EmbeddingBody(Struct, frozen=True, kw_only=True):
    """The body of `POST /v1/embeddings`: a text, token ids, or several of these."""

    input: Prompt | Annotated[tuple[Prompt | TokenId | Tokens, ...], Meta(min_length=1)]
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Dimensions | None = None
    normalize: bool | None = None  # of vLLM and TEI; only true is possible

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        """Return the inputs as a list. Raises ServiceError(invalid_request)."""
        if self.normalize is False:
            raise ServiceError(
                "invalid_request",
                "The field `normalize` can't be false: embeddings always have length 1.",
            )
        if isinstance(self.input, str):
            return (self.input,)
        inputs = tuple(part for part in self.input if not isinstance(part, int))
        if len(inputs) < len(self.input) or len(inputs) > MAX_INPUTS:
            raise ServiceError(
                "invalid_request",
                "The field `input` must be a text, a list of token ids, or a list of up to"
                f" {MAX_INPUTS:,} of these.",
            )
        return inputs


class RerankBody(Struct, frozen=True, kw_only=True):
    """
    The body of `POST /v1/rerank`: `documents` as in Jina's and Cohere's API, after translation, or
    `texts` as in that of text-embeddings-inference (TEI).
    """

    query: Annotated[Text, Meta(min_length=1)]
    documents: Documents | None = None
    texts: Documents | None = None
    model: ModelName | None = None
    top_n: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    return_documents: bool = False
    return_text: bool = False  # beside `texts`

    @property
    def candidates(self) -> tuple[str, ...]:
        """Return the documents or texts. Raises ServiceError(invalid_request) for both or none."""
        if (self.documents is None) is (self.texts is None):
            raise ServiceError(
                "invalid_request", "The field `documents`, or `texts`, must be there, not both."
            )
        return self.documents or self.texts or ()


class TokenizeBody(Struct, frozen=True):
    """The body of `POST /v1/tokenize`."""

    content: Text
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    model: ModelName | None = None


class DetokenizeBody(DetokenizeRequest, frozen=True):
    """The body of `POST /v1/detokenize`."""

    model: ModelName | None = None
