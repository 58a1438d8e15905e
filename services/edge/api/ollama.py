"""
Ollama's API, as far as editors and chat pages use it. Streams are lines of JSON.
https://github.com/ollama/ollama/blob/main/docs/api.md
"""

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import Response, post
from litestar.types import ASGIApp
from msgspec import Meta, Struct
from msgspec.structs import replace

from services.client.chat_client import new_request_id
from services.client.embedding_client import input_bytes
from services.contract.embeddings import MAX_INPUTS, Dimensions, EmbedRequest, floats_of
from services.contract.errors import ServiceError, shutting_down
from services.contract.messages import (
    AnswerEvent,
    Done,
    ModelInfo,
    StreamEvent,
    Token,
    ToolCallDelta,
    WorkerReport,
)
from services.edge import errors
from services.edge.api.completion import check_length, respond_whole, session_of
from services.edge.api.ollama_body import OllamaBody, OllamaGenerateBody, without_tag
from services.edge.api.openai_chat import chat_request
from services.edge.api.openai_requests import Prompt
from services.edge.context import Edge, Tenant, TheEdge
from services.edge.errors import AnyRequest
from services.edge.parameters import decode_body, get
from services.edge.sse import (
    NDJSON,
    AnswerEvents,
    SseResponse,
    ToError,
    one_line,
    read_to_end,
)

Fields = dict[str, Any]
VERSION = "0.12.0"
"""The version of Ollama whose API this is: editors require a minimum."""
NANOSECONDS = 10**9
ARCHITECTURE = "gguf"
"""Workers don't report the real one; clients use it as a prefix of other keys."""

log = logging.getLogger(__name__)


class ShowBody(Struct, frozen=True):
    """The body of `POST /api/show`; `name` is the older field."""

    model: str = ""
    name: str = ""


class EmbedBody(Struct, frozen=True):
    """The body of `POST /api/embed`."""

    model: str
    input: Prompt | Annotated[tuple[Prompt, ...], Meta(min_length=1, max_length=MAX_INPUTS)]
    dimensions: Dimensions | None = None


class EmbedPromptBody(Struct, frozen=True):
    """The body of `POST /api/embeddings`, the older form."""

    model: str
    prompt: Prompt


@post("/api/chat", status_code=200)
async def ollama_chat(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, OllamaBody)
    return await _answer(request, edge, tenant, body, "message")


@post("/api/generate", status_code=200)
async def ollama_generate(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> ASGIApp:
    body = await edge.bodies.read(request, OllamaGenerateBody)
    return await _answer(request, edge, tenant, body, "response")


@get("/api/version", sync_to_thread=False)
def ollama_version(tenant: Tenant) -> dict[str, str]:
    return {"version": VERSION}


@get("/api/tags", sync_to_thread=False)
def ollama_tags(edge: TheEdge, tenant: Tenant) -> dict[str, list[Fields]]:
    """Return the models and adapters that the tenant may use."""
    return {"models": _models(edge, tenant)}


@get("/api/ps", sync_to_thread=False)
def ollama_ps(edge: TheEdge, tenant: Tenant) -> dict[str, list[Fields]]:
    """Return the same models: all of them are in memory."""
    never = "9999-12-31T00:00:00Z"
    running = ({**each, "expires_at": never, "size_vram": 0} for each in _models(edge, tenant))
    return {"models": list(running)}


@post("/api/show", status_code=200)
async def ollama_show(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> Fields:
    body = decode_body(await request.body(), ShowBody, 'Send JSON like {"model": "demo"}')
    name = without_tag(body.model or body.name)
    if not name:
        raise ServiceError("invalid_request", "The field `model` is missing.")
    edge.rate_limits.check_model(tenant, name)
    workers = edge.rate_limits.visible_workers(tenant)
    report = workers.find_report(name)
    if report is None or report.model is None or name not in workers.model_names():
        raise workers.unavailable_error(name)
    return {
        **_model(name, report.model),
        "capabilities": _capabilities(report),
        "model_info": {
            "general.architecture": ARCHITECTURE,
            f"{ARCHITECTURE}.context_length": report.model.context,
        },
        "modelfile": "",
        "parameters": "",
        "template": "",
    }


@post("/api/embed", status_code=200)
async def ollama_embed(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> Fields:
    body = decode_body(
        await request.body(), EmbedBody, 'Send JSON like {"model": "bge", "input": "Hello"}'
    )
    inputs = (body.input,) if isinstance(body.input, str) else body.input
    started = time.monotonic()
    model, vectors, tokens = await _embed(edge, tenant, body.model, inputs, body.dimensions)
    return {
        "model": model,
        "embeddings": vectors,
        "total_duration": _nanoseconds(time.monotonic() - started),
        "load_duration": 0,
        "prompt_eval_count": tokens,
    }


@post("/api/embeddings", status_code=200)
async def ollama_embeddings(request: AnyRequest, edge: TheEdge, tenant: Tenant) -> Fields:
    body = decode_body(
        await request.body(), EmbedPromptBody, 'Send JSON like {"model": "bge", "prompt": "Hello"}'
    )
    _, (vector,), _ = await _embed(edge, tenant, body.model, (body.prompt,), None)
    return {"embedding": vector}


async def _embed(
    edge: Edge, tenant: str, model: str, inputs: tuple[str, ...], dimensions: int | None
) -> tuple[str, list[tuple[float, ...]], int]:
    """Return the model's name, the vectors, and the tokens of the inputs. Raises ServiceError."""
    message = EmbedRequest(inputs, without_tag(model), dimensions)
    with edge.embedding_client(tenant, sum(map(input_bytes, inputs))) as client:
        reply = await client.embed(message)
    return reply.model, [floats_of(vector) for vector in reply.vectors], reply.prompt_tokens


async def _answer(
    request: AnyRequest,
    edge: Edge,
    tenant: str,
    body: OllamaBody,
    form: Literal["message", "response"],
) -> ASGIApp:
    if not body.messages:  # how clients load a model
        loaded = AnswerLines(body.model or "", form).line(done=True, done_reason="load")
        return Response(loaded).to_asgi_response(app=None, request=request)
    check_length(edge, tenant, "messages", len(body.messages), body.model)
    chat = chat_request(body, session_of(request, body))
    chat = replace(chat, request_id=new_request_id())
    log.info("answer started answer=%s", chat.request_id)
    lines = AnswerLines(body.model or "", form)
    events = edge.chat_client(tenant).stream(chat)
    if body.stream:
        encoder = LineEncoder(lines)
        return SseResponse([events], encoder, edge.workers.to_error, edge.limits, NDJSON)
    return await respond_whole(request, _collect(lines, events, edge.workers.to_error))


class AnswerLines:
    """
    Builds the lines of an answer. A text is sent as it comes; a call, whose arguments are an
    object, once it is whole.
    """

    def __init__(self, model: str, form: Literal["message", "response"]) -> None:
        self._model = model
        self._form = form
        self._call: tuple[str, str] | None = None  # name and arguments of the open call
        self._content, self._thinking = "", ""
        self._calls: list[Fields] = []

    def push(self, event: AnswerEvent) -> Iterator[Fields]:
        match event:
            case Token(channel="content", text=text) if text:
                yield from self._close_call()
                self._content += text
                yield self.line(text)
            case Token(text=text) if text:
                yield from self._close_call()
                self._thinking += text
                yield self.line(thinking=text)
            case ToolCallDelta():
                if event.name:
                    yield from self._close_call()
                    self._call = event.name, ""
                name, arguments = self._call or ("", "")
                self._call = name, arguments + event.arguments

    def finish(self, done: Done) -> Iterator[Fields]:
        yield from self._close_call()
        yield self.line(**_end(done))

    def whole(self, done: Done) -> Fields:
        """Return the answer as one object, after `finish`."""
        return self.line(self._content, self._thinking, self._calls, **_end(done))

    def line(
        self,
        content: str = "",
        thinking: str = "",
        calls: list[Fields] | None = None,
        done: bool = False,
        **more: Any,
    ) -> Fields:
        part: Fields = {"thinking": thinking} if thinking else {}
        if self._form == "message":
            tool_calls = {"tool_calls": calls} if calls else {}
            message = {"role": "assistant", "content": content, **part, **tool_calls}
            shown: Fields = {"message": message}
        else:
            shown = {"response": content, **part}
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self._model, "created_at": now, **shown, "done": done, **more}

    def _close_call(self) -> Iterator[Fields]:
        if self._call is None:
            return
        name, arguments = self._call
        self._call = None
        call = {"function": {"name": name, "arguments": _object(arguments)}}
        self._calls.append(call)
        yield self.line(calls=[call])


class LineEncoder:
    """Writes an answer as lines of JSON (sse.Encoder)."""

    headers = ()

    def __init__(self, lines: AnswerLines) -> None:
        self._lines = lines

    def begin(self) -> bytes:
        return b""

    def encode(self, number: int, event: StreamEvent) -> bytes:
        match event:
            case Token() | ToolCallDelta():
                return b"".join(map(_line, self._lines.push(event)))
            case Done():
                return b"".join(map(_line, self._lines.finish(event)))
        return b""

    def end(self) -> bytes:
        return b""

    def fail(self, error: ServiceError) -> bytes:
        return _line(errors.ollama_body(error))

    def interrupt(self) -> bytes:
        return self.fail(shutting_down())


async def _collect(lines: AnswerLines, events: AnswerEvents, to_error: ToError) -> Fields:
    """Return the answer. Raises ServiceError if it fails."""
    done = await read_to_end(events, lines.push, to_error)
    [*lines.finish(done)]
    return lines.whole(done)


def _end(done: Done) -> Fields:
    timings, usage = done.timings, done.usage
    return {
        "done": True,
        "done_reason": "stop" if done.finish_reason in ("stop", "tool_calls") else "length",
        "total_duration": _nanoseconds(timings.queued + timings.prefill + timings.decode),
        "load_duration": _nanoseconds(timings.queued),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(timings.prefill),
        "eval_count": usage.completion_tokens,
        "eval_duration": _nanoseconds(timings.decode),
    }


def _models(edge: Edge, tenant: str) -> list[Fields]:
    workers = edge.rate_limits.visible_workers(tenant)
    found = ((name, workers.find_report(name)) for name in workers.model_names())
    return [_model(name, report.model) for name, report in found if report and report.model]


def _model(name: str, info: ModelInfo) -> Fields:
    details = {"parent_model": "", "format": "gguf", "family": ARCHITECTURE, "families": []}
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(info.changed, UTC).isoformat(),
        "size": info.bytes,
        "digest": info.digest,
        "details": {**details, "parameter_size": "", "quantization_level": ""},
    }


def _capabilities(report: WorkerReport) -> list[str]:
    return ["completion", "tools"] if report.kind == "chat" else ["embedding"]


def _object(arguments: str) -> Any:
    """Return the arguments of a call; `{}` if they were cut."""
    try:
        found = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _line(fields: Fields) -> bytes:
    return one_line(msgspec.json.encode(fields)) + b"\n"


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)
