"""
Every message on the bus. Frozen msgspec Structs, JSON on the wire (see codec); no behaviour, no
I/O.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from services.contract.conversation import Conversation as Conversation
from services.contract.conversation import ToolChoice, Tools
from services.contract.errors import ErrorCode

SessionId = Annotated[str, Meta(min_length=1, max_length=128)]
Timestamp = Annotated[datetime, Meta(tz=True)]
FinishReason = Literal["stop", "length", "loop", "cancelled", "timeout", "failed"]
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
Gbnf = Annotated[str, Meta(min_length=1, max_length=65_536)]
ModelName = Annotated[str, Meta(min_length=1, max_length=512)]  # as long as two file names
RequestId = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}\\Z")]
Tokens = Annotated[tuple[TokenId, ...], Meta(min_length=1)]
StoredState = Literal["log", "failed", "none"]


# --- a request, from anyone to a worker -----------------------------------------------------------


class ResponseFormat(Struct, frozen=True, tag_field="type"):
    """What the answer must be, as OpenAI's API has it."""


class TextFormat(ResponseFormat, frozen=True, tag="text"):
    pass


class JsonObjectFormat(ResponseFormat, frozen=True, tag="json_object"):
    pass


MAX_SCHEMA_BYTES = 2**17


class JsonSchema(Struct, frozen=True, omit_defaults=True):
    """
    A schema that the answer must match. Keywords that can't be enforced are rejected by name with
    `strict`, and ignored without it. The model does not see the `description`.
    """

    schema: dict[str, Any]
    name: Annotated[str, Meta(max_length=64)] = ""
    strict: bool | None = None
    description: str | None = None


class JsonSchemaFormat(ResponseFormat, frozen=True, tag="json_schema"):
    json_schema: JsonSchema


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    How the answer's tokens are chosen. What is left out is filled in by the worker's settings
    (CHAT_…), or has no effect where there is no such setting.
    """

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    repeat_penalty: RepeatPenalty | None = None
    max_tokens: MaxTokens | None = None
    seed: Seed | None = None  # None: a new one each time
    stop: Stops | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenIdKey, LogitBias], Meta(max_length=300)] | None = None
    # How many of the likeliest tokens to tell with each one; None: no logprobs at all
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    grammar: Gbnf | None = None


class PromptRequest(Sampling, frozen=True, kw_only=True):
    """What a person asks: the body of `POST /chat`."""

    prompt: Annotated[str, Meta(min_length=1)]
    session_id: SessionId = "default"
    model: ModelName | None = None  # `<model>:<adapter>`; without an adapter: the model as it is
    retry_of: RequestId | None = None  # the session's last exchange, whose place this one takes
    # Seconds from the worker's receipt; what was said by then is the answer. None: no deadline
    timeout_s: Annotated[float, Meta(gt=0, le=3600)] | None = None


class ResumeState(Struct, frozen=True):
    """
    What an answer began from: with it and what was said so far, another worker goes on as if it had
    been asked at first, whatever has become of the session meanwhile.
    """

    model: str  # digest, as workers report it; no other model can go on
    prompt: bytes  # its tokens, four bytes each, the lowest first
    exchanges_kept: int
    exchanges_dropped: int
    seed: Seed  # that the request gave, or the worker drew
    asked_at: Timestamp
    epoch: int  # of the session's context, as is the next
    applied_seq: int
    adapter: str = ""  # digest of the model with it, where the answer has one


class Resume(Struct, frozen=True):
    """
    What a request has been answered so far: the `ids` and the text of all its Tokens, in order. The
    text decides where the two differ; it must be a beginning of what the ids say.
    """

    state: ResumeState
    token_ids: tuple[TokenId, ...]
    text: str


class ChatRequest(PromptRequest, frozen=True, kw_only=True):
    """
    What a worker is asked: a session's next `prompt`; or all `messages` of a conversation, or a
    `text` to go on with, without the template. For these two the session is neither read nor
    written: it only says which worker is warm, and may be "", nobody's.

    A native caller may leave `request_id` out: the worker then makes one.
    """

    prompt: str = ""
    session_id: Annotated[str, Meta(max_length=128)] = "default"
    messages: Conversation | None = None
    tools: Tools | None = None  # that the model may call, in answer to `messages`
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool | None = None  # None: several only where no call is forced
    text: str | Tokens | None = None
    request_id: RequestId | None = None
    # Seconds that the answer goes on for while nobody reads it, in which somebody may come back
    grace_s: Annotated[float, Meta(ge=0, le=600)] = 0
    resume: Resume | None = None  # the worker that began the answer was lost


class Turn(Struct, frozen=True):
    """An exchange as the model sees it."""

    request_id: str
    prompt: str
    response: str


# --- what a worker sends to the reply subject -----------------------------------------------------


class Usage(Struct, frozen=True):
    """
    Counts of tokens. `cached_tokens` of the prompt had been computed before and were not
    computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timings(Struct, frozen=True):
    """Seconds, all by the worker's monotonic clock."""

    queued: float  # from receipt to a slot
    prefill: float  # from the slot to the first token
    decode: float  # from the first token to the last


class Event(Struct, frozen=True, tag_field="type"):
    """One of a request's events. Every accepted request ends in exactly one Done or Failed."""


class Accepted(Event, frozen=True, tag="accepted"):
    request_id: str
    worker_id: str


class Progress(Event, frozen=True, tag="progress"):
    """Sent each second in which nothing else was: silence means that the worker is lost."""

    queue_position: int  # 1 is next, as the queue is now; 0 once it has a slot
    prompt_tokens: int  # 0 until the prompt is tokenized
    prefilled_tokens: int


class Started(Event, frozen=True, tag="started", omit_defaults=True):
    """
    The request has a slot. `exchanges_dropped` of its session did not fit the context window.

    `origin` goes into a Resume as it is; None: the prompt is too long to be told, and the answer
    can't be resumed.
    """

    prompt_tokens: int
    cached_tokens: int
    exchanges_kept: int
    exchanges_dropped: int
    resume_state: ResumeState | None = None


class TokenProbability(Struct, frozen=True):
    """
    A token and the logarithm of its probability, as the model has it: before penalties, bias,
    temperature and grammar. `bytes` tells what `text` can't, where it is a part of a character.
    """

    id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float


class TokenLogprob(TokenProbability, frozen=True):
    """The token that was chosen, and those that were likeliest, in this order."""

    top: tuple[TokenProbability, ...]


class Token(Event, frozen=True, tag="token", omit_defaults=True):
    """
    More text. `at` is the answer's length in characters before it; `ids` are the tokens it was
    made of, `logprobs` is about the same tokens, if the request asked for it.
    """

    offset: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


class Done(Event, frozen=True, tag="done"):
    """
    The end. `stored` says whether the log has acknowledged the exchange; `none`: there is nothing
    to keep, since nothing was said or the session was erased meanwhile. `stop_string` is the entry
    of the request's `stop` or of CHAT_STOP that ended the answer; None: something else did.
    """

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    exchanges_dropped: int
    stored: StoredState
    length: int | None = None  # of the answer in characters: who has less has lost a part of it
    stop_string: str | None = None


class Failed(Event, frozen=True, tag="failed"):
    """The other end: nothing more comes, and what was said so far is not the whole answer."""

    code: ErrorCode
    message: str
    retry_after: float | None = None  # seconds


StreamEvent = Accepted | Progress | Started | Token | Done | Failed


# --- an answer again, for who has lost a part of it or comes later --------------------------------


class ReplayRequest(Struct, frozen=True):
    """`at` is the length in characters of what the reader has."""

    offset: Annotated[int, Meta(ge=0)] = 0


class Replay(Struct, frozen=True):
    """
    An answer's attempt, as the worker that gives it has it: who reads on `reply` and then asks for
    a replay has all of it. `events` begin with what was said before any text, and go on with the
    text that the reader lacks. `is_all` is false where there is more of it than fits: ask again.
    `age` is the seconds since the worker accepted the attempt, which count against the request's
    `timeout_s`.
    """

    request: ChatRequest
    worker_id: str
    reply: str
    events: tuple[StreamEvent, ...]
    is_complete: bool = True
    age_seconds: float = 0.0


# --- what goes to one worker ----------------------------------------------------------------------


class RequestAdmitted(Struct, frozen=True):
    """
    The acknowledgement of a request that one worker alone was asked: it will answer. The counts are
    those of its report, with this request.
    """

    running: int
    waiting: int


class Cancel(Struct, frozen=True, omit_defaults=True):
    """
    Ends a request's answer: its caller gets a Done, and what was said is kept.

    With `worker_id`, or `reply` (the attempt's reply subject), it drops an attempt that nobody
    waits for any more: only this worker's, or only this attempt, without a word and keeping
    nothing.
    """

    worker_id: str | None = None
    reply: str | None = None


class SessionErased(Struct, frozen=True):
    """Tell workers to stop keeping answers of the session for replay."""

    session_id: SessionId


class Empty(Struct, frozen=True):
    """A message whose subject says it all."""


# --- what a worker tells all, once a second -------------------------------------------------------


class ModelInfo(Struct, frozen=True):
    name: str  # in an exchange that was answered with an adapter `<model>:<adapter>`
    # SHA-256 of the file's first and last MiB and its size: enough to tell two models apart
    digest: str
    context: int  # tokens per conversation
    bytes: int
    adapters: tuple[str, ...] = ()  # that a request may ask for; told in reports alone, as is
    changed: int = 0  # when the file last was: Unix time


class WorkerReport(Struct, frozen=True):
    """
    `error` says why there is no model, or why a ready model can't chat; `progress` is the loaded
    share of the file.
    """

    worker_id: str
    state: Literal["loading", "ready", "draining", "failed"]
    slots: int
    running: int
    waiting: int
    queue: int = 0  # how many may wait
    queued_tokens: int = 0  # still to be computed for those that wait, as far as can be foreseen
    tokens_per_second: float = 0.0  # computed of late, of prompts and answers; 0: nothing yet
    progress: float = 0.0
    model: ModelInfo | None = None
    error: str | None = None
