"""The objects of OpenAI's API in responses (https://platform.openai.com/docs/api-reference)."""

from typing import Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from services.contract.conversation import FunctionCall, ToolCall
from services.contract.messages import Done, ModelKind

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class PromptDetails(Struct, frozen=True):
    cached_tokens: int


class CompletionDetails(Struct, frozen=True):
    reasoning_tokens: int
    accepted_prediction_tokens: int | UnsetType = UNSET  # only if some were drafted
    rejected_prediction_tokens: int | UnsetType = UNSET


class CompletionUsage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Likely(Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[int, ...]


class ChoiceLogprob(Likely, frozen=True):
    top_logprobs: tuple[Likely, ...]


class Logprobs(Struct, frozen=True):
    content: tuple[ChoiceLogprob, ...]
    refusal: None = None


class CalledFunction(Struct, frozen=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class CallDelta(Struct, frozen=True):
    """The first delta of a call has its id and name, the others have more of its arguments."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Reasoning(Struct, frozen=True, kw_only=True):
    """
    The same text under the names of both families of servers: llama-server and DeepSeek send
    `reasoning_content`, vLLM and OpenRouter `reasoning`, and each has clients that read no other.
    """

    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class AssistantMessage(Reasoning, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: tuple[ToolCall, ...] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET  # the older form
    refusal: None = None


class Delta(Reasoning, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: tuple[CallDelta, ...] | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET  # the older form


class ChatChoice(Struct, frozen=True):
    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class TextLogprobs(Struct, frozen=True):
    """The form of the older endpoint: lists of the same length."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[str, float], ...]
    text_offset: tuple[int, ...]


class TextChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(Struct, frozen=True, kw_only=True):
    """A completion, or a chunk of one that is streamed."""

    id: str
    created: int  # Unix time
    model: str
    system_fingerprint: str
    usage: CompletionUsage | UnsetType | None = UNSET


class ChatCompletion(Completion, frozen=True, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: tuple[ChatChoice, ...]


class ChatChunk(Completion, frozen=True, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: tuple[ChunkChoice, ...]


class TextCompletion(Completion, frozen=True, kw_only=True):
    object: Literal["text_completion"] = "text_completion"
    choices: tuple[TextChoice, ...]


class EmbeddingObject(Struct, frozen=True):
    """`embedding` as bytes is base64 in JSON."""

    index: int
    embedding: tuple[float, ...] | bytes
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True):
    """`data` has the JSON of EmbeddingObjects."""

    data: tuple[Raw, ...]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class DocumentText(Struct, frozen=True):
    text: str


class RerankResult(Struct, frozen=True):
    index: int
    relevance_score: float
    document: DocumentText | UnsetType = UNSET


class Ranking(Struct, frozen=True):
    """Jina's form; Cohere's has `results`, too."""

    results: tuple[RerankResult, ...]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class TeiResult(Struct, frozen=True):
    """A result of text-embeddings-inference, whose response is a list of these."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class ModelStatus(Struct, frozen=True):
    """State of a model, as llama-server reports it (tools/server/README.md, GET /models)."""

    value: Literal["loaded", "loading", "unloaded"]
    progress: float | UnsetType = UNSET  # the loaded share
    failed: bool | UnsetType = UNSET
    error: str | UnsetType = UNSET  # why it failed


class ModelMeta(Struct, frozen=True):
    """Facts that clients read from llama-server: context windows in tokens, size in bytes."""

    n_ctx: int
    n_ctx_train: int
    size: int
    n_embd: int | UnsetType = UNSET  # floats of an embedding


class ModelObject(Struct, frozen=True):
    """
    A model that requests can name. `max_model_len` (tokens) and `parent`, the model of an adapter,
    are vLLM's names, `type` and its values Together's. A model that is not ready has neither a
    `max_model_len` nor `meta`.
    """

    id: str
    created: int
    status: ModelStatus
    type: ModelKind
    max_model_len: int | UnsetType = UNSET
    meta: ModelMeta | UnsetType = UNSET
    parent: str | UnsetType = UNSET
    adapters: tuple[str, ...] | UnsetType = UNSET
    owned_by: str = "finetunellm"
    object: Literal["model"] = "model"


class ModelList(Struct, frozen=True):
    data: tuple[ModelObject, ...]
    object: Literal["list"] = "list"


def finish_reason_of(done: Done) -> FinishReason:
    """Return OpenAI's reason, which has only `length` for a loop, a timeout and a cancel."""
    match done.finish_reason:
        case "stop" | "tool_calls" as reason:
            return reason
    return "length"
