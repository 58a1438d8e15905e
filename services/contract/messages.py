"""Messages on the bus, as frozen msgspec Structs. codec.py encodes them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from services.contract.conversation import Conversation as Conversation
from services.contract.conversation import ToolCall, ToolChoice, ToolResults, Tools
from services.contract.errors import ErrorCode
from services.contract.responses import ResponseTurn

SessionId = Annotated[str, Meta(min_length=1, max_length=128)]
Timestamp = Annotated[datetime, Meta(tz=True)]
FinishReason = Literal["stop", "tool_calls", "length", "loop", "cancelled", "timeout", "failed"]
Channel = Literal["content", "reasoning"]  # of text; tool calls have events of their own
Temperature = Annotated[float, Meta(ge=0, le=5)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=1000)]  # 0: all tokens
RepeatPenalty = Annotated[float, Meta(gt=0, le=10)]
MaxTokens = Annotated[int, Meta(ge=1, le=1_000_000)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Annotated[tuple[Stop, ...], Meta(max_length=32)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenIdKey = Annotated[str, Meta(pattern="^[0-9]{1,9}\\Z")]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, lt=2**32 - 1)]
LogitBias = Annotated[float, Meta(ge=-100, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
LastTokens = Annotated[int, Meta(ge=-1, le=1_000_000)]  # 0: none, -1: all
SequenceBreaker = Annotated[str, Meta(min_length=1, max_length=40)]
Gbnf = Annotated[str, Meta(min_length=1, max_length=65_536)]
ModelName = Annotated[str, Meta(min_length=1, max_length=512)]  # as long as two file names
RequestId = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}\\Z")]
WorkerId = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}\\Z")]  # a token of subjects
Tokens = Annotated[tuple[TokenId, ...], Meta(min_length=1)]
StoredState = Literal["log", "failed", "none"]
ReasoningBudget = Annotated[int, Meta(ge=-1, le=1_000_000)]  # tokens; -1: no budget
ReasoningEffort = Annotated[str, Meta(min_length=1, max_length=32)]


# --- requests to workers --------------------------------------------------------------------------


class ResponseFormat(Struct, frozen=True, tag_field="type"):
    """Constraint on the answer, in the format of OpenAI's API."""


class TextFormat(ResponseFormat, frozen=True, tag="text"):
    pass


class JsonObjectFormat(ResponseFormat, frozen=True, tag="json_object"):
    pass


MAX_SCHEMA_BYTES = 2**17


class JsonSchema(Struct, frozen=True, omit_defaults=True):
    """
    A schema that the answer must match. With `strict`, unsupported keywords are rejected by name;
    without it they are ignored. `description` is not part of the prompt.
    """

    schema: dict[str, Any]
    name: Annotated[str, Meta(max_length=64)] = ""
    strict: bool | None = None
    description: str | None = None


class JsonSchemaFormat(ResponseFormat, frozen=True, tag="json_schema"):
    json_schema: JsonSchema


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    Sampling parameters. The worker's CHAT_… settings are the defaults; a parameter that has no such
    setting is off by default.
    """

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    repeat_penalty: RepeatPenalty | None = None
    max_tokens: MaxTokens | None = None  # of content and tool calls
    max_completion_tokens: MaxTokens | None = None  # of the whole answer, also its reasoning
    # Tokens of reasoning after which its end is forced
    reasoning_budget_tokens: ReasoningBudget | None = None
    seed: Seed | None = None  # None: random
    stop: Stops | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenIdKey, LogitBias], Meta(max_length=300)] | None = None
    # Number of most likely tokens to return with each token; None: no logprobs at all
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    grammar: Gbnf | None = None
    # Samplers of llama.cpp, by its names. None: off, or llama.cpp's default
    repeat_last_n: LastTokens | None = None
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Meta(ge=1, le=10)] | None = None
    dry_allowed_length: Annotated[int, Meta(ge=0, le=1000)] | None = None
    dry_penalty_last_n: LastTokens | None = None
    dry_sequence_breakers: Annotated[tuple[SequenceBreaker, ...], Meta(max_length=16)] | None = None
    top_n_sigma: Annotated[float, Meta(ge=-1, le=100)] | None = None  # 0 and less: off
    typical_p: Share | None = None  # 0 and 1: off
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None  # over 0.5: off
    dynatemp_range: Annotated[float, Meta(ge=0, le=5)] | None = None
    dynatemp_exponent: Annotated[float, Meta(ge=0, le=10)] | None = None
    mirostat: Annotated[int, Meta(ge=0, le=2)] | None = None  # the version
    mirostat_tau: Annotated[float, Meta(ge=0, le=20)] | None = None
    mirostat_eta: Share | None = None
    min_keep: Annotated[int, Meta(ge=0, le=1000)] | None = None
    # As in vLLM
    min_tokens: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    ignore_eos: bool | None = None


class PromptRequest(Sampling, frozen=True, kw_only=True):
    """
    The body of `POST /chat`: the next prompt of a session, or the results of the tool calls in its
    last answer, or both.

    `enable_thinking`, `reasoning_effort` (`none`: no reasoning) and `chat_template_kwargs` are
    variables for the chat template. The answer continues `prefix`, which is a part of it, but is
    not sent.
    """

    prompt: str = ""
    session_id: SessionId = "default"
    model: ModelName | None = None  # see model_names.py
    retry_of: RequestId | None = None  # the session's last exchange, which this one replaces
    # Seconds after the worker received the request at which the answer ends. None: no limit
    timeout_s: Annotated[float, Meta(gt=0, le=3600)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool | None = None  # None: several calls, unless one is forced
    tool_results: ToolResults | None = None
    enable_thinking: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prefix: str = ""


class Turn(Struct, frozen=True, omit_defaults=True):
    """An exchange as it is part of a prompt."""

    request_id: str
    prompt: str
    response: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_results: ToolResults = ()  # of the calls before, sent with the prompt


class ResumeState(Struct, frozen=True):
    """
    What another worker needs, beside the emitted tokens, to resume an answer exactly, even if the
    session has changed since.
    """

    model: str  # digest, as workers report it; only the same model can resume
    prompt: bytes  # token ids, 4 bytes each, little-endian
    exchanges_kept: int
    exchanges_dropped: int
    seed: Seed  # given by the request, or drawn by the worker
    asked_at: Timestamp
    epoch: int  # of the session's context
    applied_seq: int  # of the session's context
    channel: Channel = "content"  # in which the prompt ends
    adapter: str = ""  # digest of the model with its adapter, if the request names one


# --- events, from a worker to the reply subject ---------------------------------------------------


class Usage(Struct, frozen=True, omit_defaults=True):
    """
    Token counts. `cached_tokens` of the prompt were in the prefix cache, and `reasoning_tokens` are
    a part of the completion, as are the `accepted_tokens` of the `drafted_tokens`.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0
    drafted_tokens: int = 0  # by speculative decoding
    accepted_tokens: int = 0


class Timings(Struct, frozen=True):
    """Durations in seconds, by the worker's monotonic clock."""

    queued: float  # from receipt to the slot
    prefill: float  # from the slot to the first token
    decode: float  # from the first token to the last


class Event(Struct, frozen=True, tag_field="type"):
    """
    One of a request's events. Every accepted request ends in exactly one Done or Failed.

    The most frequent ones are not tracked by the garbage collector: they can't be in a cycle.
    """


class Accepted(Event, frozen=True, tag="accepted"):
    request_id: str
    worker_id: WorkerId


class Progress(Event, frozen=True, tag="progress"):
    """Sent in each second without another event, so that silence means that the worker is lost."""

    queue_position: int  # 1 is next; 0 once the request has a slot
    prompt_tokens: int  # 0 until the prompt is tokenized
    prefilled_tokens: int


class Started(Event, frozen=True, tag="started", omit_defaults=True):
    """
    The request has a slot. `exchanges_dropped` of its session did not fit the context window.

    `resume_state` is for a Resume. None: the prompt is too long for an event, so the answer can't
    be resumed.
    """

    prompt_tokens: int
    cached_tokens: int
    exchanges_kept: int
    exchanges_dropped: int
    resume_state: ResumeState | None = None


class TokenProbability(Struct, frozen=True):
    """
    A token and the natural logarithm of its probability, before penalties, bias, temperature and
    grammar. `bytes` is exact where a token is a part of a character.
    """

    id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float


class TokenLogprob(TokenProbability, frozen=True):
    """The sampled token, and the most likely ones in descending order."""

    top: tuple[TokenProbability, ...]


class Token(Event, frozen=True, tag="token", omit_defaults=True, gc=False):
    """
    More text of the answer's content or reasoning.

    `offset` counts the characters of the answer before it, in all channels: content, reasoning, and
    names and arguments of tool calls. `token_ids` are the tokens that made the text certain and are
    in no earlier event: also those of markup, of text that is still held back, and the end token.
    With them, the answer can be resumed after any event. `mirostat_mu` is the state of Mirostat
    after them, which does not follow from tokens. `logprobs`, if requested, are of the tokens that
    begin in the text, or in markup before it.
    """

    offset: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    channel: Channel = "content"
    mirostat_mu: float | None = None

    @property
    def end(self) -> int:
        """The offset of the next event."""
        return self.offset + len(self.text)


class ToolCallDelta(Event, frozen=True, tag="tool_call", omit_defaults=True, gc=False):
    """
    The begin of tool call number `index`, with its id and name, or more of its arguments, or both.
    The arguments of all its events together are JSON. The other fields are those of Token.
    """

    offset: int
    index: int
    token_ids: tuple[int, ...]
    id: str = ""
    name: str = ""
    arguments: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    mirostat_mu: float | None = None

    @property
    def end(self) -> int:
        """The offset of the next event."""
        return self.offset + len(self.name) + len(self.arguments)


AnswerEvent = Token | ToolCallDelta


class Done(Event, frozen=True, tag="done"):
    """
    The end of a complete answer.

    `stored` says whether the log acknowledged the exchange; `none`: there is nothing to store, as
    the answer is empty, stateless or of an erased session. `stop_string` is the entry of `stop` or
    CHAT_STOP that ended the answer, if one did.
    """

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    exchanges_dropped: int
    stored: StoredState
    # Of the answer in characters, as in Token.offset; a reader with less has a gap
    length: int | None = None
    stop_string: str | None = None


class Failed(Event, frozen=True, tag="failed"):
    """The end of an answer that is incomplete."""

    code: ErrorCode
    message: str
    retry_after: float | None = None  # seconds


StreamEvent = Accepted | Progress | Started | Token | ToolCallDelta | Done | Failed


# --- resumed answers, and the request to a worker -------------------------------------------------


class Resume(Struct, frozen=True):
    """
    The emitted part of an answer that is resumed: all its Token and ToolCallDelta events in order,
    which may be merged. Their texts decide where the answer continues.
    """

    state: ResumeState
    events: tuple[AnswerEvent, ...]


class ChatRequest(PromptRequest, frozen=True, kw_only=True):
    """
    A request to a worker, with one of three inputs: the next `prompt` of a session; all `messages`
    of a conversation; or a `text` to complete, without a chat template.

    With `messages` or `text` the session is neither read nor written. Its id only selects the
    worker with the cached prefix, and may be empty. A caller on the bus may leave out `request_id`;
    the worker then draws one.

    With `turn` the answer to `messages` is stored nevertheless, as a response of `/v1/responses`
    whose request id names its session (responses.py).
    """

    session_id: Annotated[str, Meta(max_length=128)] = "default"
    messages: Conversation | None = None
    # Continue the content or the reasoning of the last message, which is the assistant's
    continue_final: Channel | None = None
    # If the messages don't fit the context window, drop the oldest exchanges instead of failing
    drop_oldest: bool = False
    text: str | Tokens | None = None
    turn: ResponseTurn | None = None
    request_id: RequestId | None = None
    # Seconds for which the answer continues without a reader, who may return
    grace_s: Annotated[float, Meta(ge=0, le=86_400)] = 0
    resume: Resume | None = None  # continues the answer of a lost worker


# --- replays, for readers that have a gap or return -----------------------------------------------


class ReplayRequest(Struct, frozen=True):
    """`offset` is the length in characters of the answer that the reader has, as in Token."""

    offset: Annotated[int, Meta(ge=0)] = 0


class Replay(Struct, frozen=True):
    """
    The events of an attempt, from the worker that generates it.

    A reader that subscribes to `reply` and then requests a replay misses nothing. `events` are
    those before any text, then the text from the offset on. If they exceed the message size,
    `is_complete` is False and the reader requests the rest. `age_seconds` since the worker accepted
    the attempt count against `timeout_s`.
    """

    request: ChatRequest
    worker_id: WorkerId
    reply: str
    events: tuple[StreamEvent, ...]
    is_complete: bool = True
    age_seconds: float = 0.0


# --- messages to workers --------------------------------------------------------------------------


class RequestAdmitted(Struct, frozen=True):
    """
    Reply of a worker that admitted a request sent to it alone. The counts are those of its report,
    with this request.
    """

    running: int
    waiting: int


class Cancel(Struct, frozen=True, omit_defaults=True):
    """
    End an answer: the caller gets a Done event, and the text so far is stored.

    With `worker_id` or `reply` (its reply subject), drop an attempt that no reader needs any more:
    the one of that worker, or with that reply subject. It sends no event and stores nothing.
    """

    worker_id: WorkerId | None = None
    reply: str | None = None


class SessionErased(Struct, frozen=True):
    """
    Tell workers to cancel the session's answers, and to drop what they keep of it. `epoch` is the
    sequence of the Erased record: answers of this or a later epoch are not affected.
    """

    session_id: SessionId
    epoch: int = 0


class Empty(Struct, frozen=True):
    """A message without content."""


# --- reports of workers ---------------------------------------------------------------------------


ModelKind = Literal["chat", "embedding", "rerank"]
"""What a model is for: to generate text, or to give embeddings of texts, or relevance scores."""


class ModelInfo(Struct, frozen=True):
    name: str  # `<model>`, or in an exchange with an adapter `<model>:<adapter>`
    # SHA-256 of the file's size and its first and last MiB
    digest: str
    context: int  # tokens per conversation
    bytes: int
    adapters: tuple[str, ...] = ()  # only in reports, as are the next
    changed: int = 0  # Unix time of the file's last change
    trained_context: int = 0  # tokens


class WorkerReport(Struct, frozen=True):
    """
    State of a worker. `name` is the model's, which is known before it is loaded. `error` is the
    reason why it has no model, or why a ready model can't chat; `adapter_faults` are those of files
    beside its adapters that are not used. `progress` is the loaded share of the model file.
    `default_model` is the name of the model that serves requests which name none (MODEL_DEFAULT).
    `dimensions` is the number of floats in an embedding; 0 if the model gives none.
    `prefilled_tokens` and `generated_tokens` are those computed since the worker's start. A later
    report has a higher `number`, also after a restart.
    """

    worker_id: WorkerId
    state: Literal["loading", "ready", "draining", "failed"]
    slots: int
    running: int
    waiting: int
    queue: int = 0  # maximum waiting requests
    queued_tokens: int = 0  # estimate of the tokens to compute for waiting requests
    tokens_per_second: float = 0.0  # recent rate of prefill and decode; 0: none yet
    progress: float = 0.0
    model: ModelInfo | None = None
    error: str | None = None
    name: str = ""
    default_model: str = ""
    adapter_faults: tuple[str, ...] = ()
    kind: ModelKind = "chat"  # known before the model is loaded
    dimensions: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    interval: Annotated[float, Meta(gt=0)] = 1.0  # seconds until the next report
    number: int = 0  # 0: of an earlier version
