"""
The OpenAPI document of all routes, built from the routes and from the types of bodies and
responses. Descriptions and examples are written here.

Litestar's own generator can't do it (tests/edge/test_schema.py): the handlers decode bodies and
queries themselves, for their errors and limits, so Litestar finds neither; a status has only one
media type there, but completions are JSON or an event stream; and a field's description would have
to be in the types of the bus messages. Schemas of types come from msgspec.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import msgspec
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from services.contract.history import Exchange, MessagesRequest, SessionsRequest
from services.contract.version import VERSION
from services.edge.api.chat import ChatBody
from services.edge.api.objects import ChatCompletion, TextCompletion
from services.edge.api.openai_requests import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from services.edge.api.sessions import ClearBody, DescriptionBody, ImportLine
from services.edge.api.status import Root
from services.edge.errors import TABLE, ErrorBody
from services.edge.parameters import SessionQuery

ANSWER = (
    'id: 5\ndata: {"token": "Hello"}\n\nid: end\ndata: {"done": true, "finish_reason": "stop",'
    ' "usage": {"prompt_tokens": 12, "completion_tokens": 2, "cached_tokens": 0}}\n\n'
)
CHUNKS = (
    'data: {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [{"index": 0,'
    ' "delta": {"content": "Hello"}, "finish_reason": null}]}\n\ndata: [DONE]\n\n'
)
PARTS = (
    'data: {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text":'
    ' " upon"}]}\n\ndata: [DONE]\n\n'
)
JSON, JSONL, EVENTS = "application/json", "application/jsonl", "text/event-stream"
MESSAGES = [{"role": "user", "content": "Hello"}]

TAGS = {
    "Chat": "Ask within a session, whose history is kept. Answers are server-sent events.",
    "Sessions": "Read, describe, export, import, clear and erase conversations.",
    "OpenAI": "OpenAI's API, for any OpenAI client. The client keeps the conversation.",
    "Server": "Health and status.",
}
SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "`Authorization: Bearer KEY`, with a key from EDGE_API_KEYS.",
    },
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same key in its own header.",
    },
}
HEADERS = {
    "X-Request-Id": "An id of this HTTP request for logs and response; default: a new one.",
    "Idempotency-Key": (
        "Up to 256 printable characters. A repeat with the same key within a day returns the same"
        " answer and generates nothing; with another body it is a 409."
    ),
    "Last-Event-ID": (
        "The `id` of the last event that was received: the stream resumes after it. Without it, the"
        " stream starts at the beginning."
    ),
}
ANSWER_HEADERS = {
    "X-Request-Id": "The id of this HTTP request in the server's logs.",
    "Retry-After": "Seconds after which to retry, if that can help.",
    "Content-Location": "The address of this answer, for `GET` (resume) and `DELETE` (stop).",
    "X-Ignored-Fields": "The fields of a `/v1` body that had no effect.",
}
FIELDS = {
    "prompt": "The user's message.",
    "session_id": "The conversation. Each one has its own history.",
    "model": "`name`, or `name:adapter` for a LoRA adapter. Default: the model without an adapter.",
    "retry_of": "The request id of the session's last exchange, which this one replaces.",
    "timeout_s": "Seconds after which the answer ends, with the text generated so far.",
    "temperature": "Randomness. 0 always takes the likeliest token.",
    "top_p": "Sample from the likeliest tokens whose probabilities add up to this.",
    "top_k": "Sample from this many of the likeliest tokens; 0: from all.",
    "min_p": "Leave out tokens less likely than this share of the likeliest one.",
    "repeat_penalty": "Make tokens less likely that the answer already contains; 1: off.",
    "presence_penalty": "Lower the logit of each token that the answer already contains.",
    "frequency_penalty": "Lower the logit of a token by this for each occurrence in the answer.",
    "logit_bias": "Add to the logits of tokens, by token id; -100 bans one.",
    "seed": "The same seed and request give the same answer on the same server.",
    "max_tokens": "Maximum number of tokens of the answer.",
    "max_completion_tokens": "The same as `max_tokens`.",
    "stop": "Strings that end the answer; they are not part of it.",
    "logprobs": "Also send the log probabilities of the tokens.",
    "top_logprobs": "How many of the likeliest tokens to send with each token.",
    "response_format": "Force JSON, or JSON that matches a schema.",
    "grammar": "A GBNF grammar that the answer must match.",
    "json_schema": "The schema and its name.",
    "title": "A name for display. null: the start of the first prompt.",
    "system_prompt": 'Instructions for the model. null: CHAT_SYSTEM_PROMPT; "": none.',
    "limit": "Maximum number of items per page.",
    "before": "The `next` of the previous page.",
    "after": "The `next` of the previous page.",
    "next": "Cursor of the following page: send it as `before`. null: this is the last page.",
    "request_id": "The id of the exchange.",
    "response": "The model's answer.",
    "asked_at": "Time of the request.",
    "answered_at": "Time of the end of the answer.",
    "finish_reason": "Why the answer ended.",
    "usage": "Token counts.",
    "timings": "Durations in seconds: waiting for a slot, prefill, decode.",
    "prompt_tokens": "Tokens of the prompt.",
    "completion_tokens": "Tokens of the answer.",
    "cached_tokens": "Tokens of the prompt that came from the prefix cache.",
    "messages": "The conversation, oldest message first.",
    "tools": "Functions that the model may call.",
    "tool_choice": "Whether a function must be called, and which.",
    "parallel_tool_calls": "Whether one answer may contain several calls.",
    "n": "Number of answers.",
    "stream": "Send the answer as server-sent events, while it is generated.",
    "stream_options": "`include_usage` adds a last event with the token counts.",
    "prompt_cache_key": "An id of the conversation, which helps to find its cached prefix.",
    "user": "Recorded in the log.",
    "echo": "Start the answer with the prompt.",
    "status": "A constant.",
    "model_loaded": "Whether a model is ready.",
    "database_connected": "Whether MongoDB, which is optional, is connected.",
    "nats_connected": "Whether NATS is connected.",
    "version": "The version of FineTuneLLM.",
    "workers": "The inference workers that reported in the last 3 seconds.",
    "history": "Status of the history service; null: it does not reply.",
    "running": "Requests that have a slot.",
    "waiting": "Requests that wait for a slot.",
    "slots": "How many requests can run at once.",
    "progress": "Loaded share of the model file, 0 to 1.",
    "error": "Why there is no model, or why it can't chat.",
    "warning": "What is wrong or will be soon, and what to do; null: nothing.",
    "imported": "Number of imported lines.",
    "message": "A sentence for people.",
    "content": "The text.",
    "tokens": "Token ids.",
}
DESCRIPTION = """\
FineTuneLLM serves a GGUF model over HTTP: `POST /chat` remembers each session, `/v1` is OpenAI's
API. Every error is `{"error": {"message", "type", "param", "code"}}`. Unknown query parameters of
a POST, PATCH or DELETE are a 400, except under `/v1`."""
OPEN = "EDGE_API_KEYS is not set, so this server needs no key."


class Operation(NamedTuple):
    """
    The description of a route. `streams` is an example of the events; `answers` is the type of the
    JSON, if the handler's annotation does not have it.
    """

    tag: str
    summary: str
    description: str = ""
    body: Any = None
    example: Any = None
    query: type[Struct] | None = None
    answers: Any = None
    answer: str = "Success."
    streams: str = ""
    body_media: str = JSON
    answer_media: str = JSON
    body_required: bool = True
    headers: tuple[str, ...] = ()


DESCRIBED = {
    ("GET", "/"): Operation(
        "Server", "Get started", "JSON for programs, a page of links for browsers.", answers=Root
    ),
    ("GET", "/healthz"): Operation("Server", "Check whether the process is alive"),
    ("GET", "/readyz"): Operation(
        "Server", "Check whether chats can be answered now", "If not: 503 with the reason."
    ),
    ("GET", "/status"): Operation(
        "Server",
        "Get what is loaded, connected and waiting",
        "A part that is down shows in the fields.",
    ),
    ("POST", "/chat"): Operation(
        "Chat",
        "Ask within a session",
        "The session's earlier exchanges are part of the prompt. The answer is cancelled 10 seconds"
        " after its last reader disconnects, unless a client resumes it.",
        ChatBody,
        {"prompt": "Hello"},
        streams=ANSWER,
        answer="`token` events, then one `done` or `error`.",
        headers=("Idempotency-Key", "Last-Event-ID"),
    ),
    ("GET", "/chat/{request_id}"): Operation(
        "Chat",
        "Receive an answer again, or the rest of it",
        "While it is generated and for a day after its end, at any edge. 204 after `done`.",
        streams=ANSWER,
        answer="`token` events, then one `done` or `error`.",
        headers=("Last-Event-ID",),
    ),
    ("DELETE", "/chat/{request_id}"): Operation(
        "Chat",
        "Stop an answer",
        "Always a 202: only the worker knows whether the answer still runs.",
    ),
    ("GET", "/messages"): Operation(
        "Sessions",
        "Read the last exchanges",
        "Oldest first, of one session or, without `session_id`, of all.",
        query=MessagesRequest,
        answer="The exchanges.",
    ),
    ("POST", "/clear-history"): Operation(
        "Sessions",
        "Clear a session's context",
        "The model forgets the conversation; its messages stay readable. Name the session in the"
        " body or in the query; the default is `default`.",
        ClearBody,
        {"session_id": "default"},
        query=SessionQuery,
        body_required=False,
    ),
    ("GET", "/sessions"): Operation(
        "Sessions",
        "List the sessions",
        "Last active first.",
        query=SessionsRequest,
        answer="A page of sessions.",
    ),
    ("GET", "/sessions/{session_id}/messages"): Operation(
        "Sessions",
        "Read a session's exchanges",
        "Newest first, a page at a time.",
        query=MessagesRequest,
        answer="A page of exchanges.",
    ),
    ("PATCH", "/sessions/{session_id}"): Operation(
        "Sessions",
        "Set a session's title and system prompt",
        "Possible before its first exchange; null resets a value.",
        DescriptionBody,
        {"title": "Holidays"},
        answer="The session.",
    ),
    ("DELETE", "/sessions/{session_id}"): Operation(
        "Sessions",
        "Erase a session everywhere",
        "Running answers of the session are erased too. This can't be undone.",
    ),
    ("GET", "/sessions/{session_id}/export"): Operation(
        "Sessions",
        "Export a session",
        "JSON Lines, oldest exchange first, of any length. If the connection breaks off, the export"
        " is incomplete.",
        answers=Exchange,
        answer="An exchange on each line.",
        answer_media=JSONL,
    ),
    ("POST", "/sessions/{session_id}/messages"): Operation(
        "Sessions",
        "Import into a session",
        "JSON Lines in the format of an export, of any length. An error has the number of imported"
        " lines in `imported`; sending the same lines again imports none twice.",
        ImportLine,
        {"prompt": "Hello", "response": "Hi!"},
        body_media=JSONL,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "OpenAI",
        "Complete a conversation",
        body=ChatCompletionBody,
        example={"model": "demo", "messages": MESSAGES},
        answers=ChatCompletion,
        answer="The completion; with `stream` as server-sent events.",
        streams=CHUNKS,
    ),
    ("POST", "/v1/completions"): Operation(
        "OpenAI",
        "Complete a text",
        body=CompletionBody,
        example={"model": "demo", "prompt": "Once"},
        answers=TextCompletion,
        answer="The completion; with `stream` as server-sent events.",
        streams=PARTS,
    ),
    ("GET", "/v1/models"): Operation(
        "OpenAI", "List the models and their adapters", answer="The models."
    ),
    ("GET", "/v1/models/{name}"): Operation("OpenAI", "Describe a model", answer="The model."),
    ("POST", "/v1/tokenize"): Operation(
        "OpenAI",
        "Turn text into token ids",
        body=TokenizeBody,
        example={"content": "Hello", "with_pieces": True},
        answer="The token ids.",
    ),
    ("POST", "/v1/detokenize"): Operation(
        "OpenAI",
        "Turn token ids into text",
        body=DetokenizeBody,
        example={"tokens": [72, 101]},
        answer="The text.",
    ),
    ("POST", "/v1/chat/completions/input_tokens"): Operation(
        "OpenAI",
        "Count the tokens of a conversation",
        body=ChatCompletionBody,
        example={"model": "demo", "messages": MESSAGES},
        answer="The count.",
    ),
}


class _Operation(NamedTuple):
    """A route and method. `returns` is its return annotation; `is_keyed`: it needs an API key."""

    method: str
    path: str
    status: int
    returns: Any
    is_keyed: bool
    described: Operation


def document(handlers: Sequence[HTTPRouteHandler], is_open: bool) -> dict[str, Any]:
    """Return the OpenAPI document. `is_open`: no API keys are set."""
    operations = [*_operations(handlers)]
    bodies = [each.described.body or dict for each in operations]
    answers = [each.described.answers or each.returns for each in operations]
    schemas, components = msgspec.json.schema_components(
        [*bodies, *answers, ErrorBody], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for each, body, answer in zip(operations, schemas, schemas[len(operations) :], strict=False):
        operation = _operation(each, body, answer, is_open)
        paths.setdefault(each.path, {})[each.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FineTuneLLM",
            "version": VERSION,
            "description": f"{DESCRIPTION} {OPEN}" if is_open else DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {name: _with_words(schema) for name, schema in components.items()},
            "headers": {
                name: {"description": text, "schema": {"type": "string"}}
                for name, text in ANSWER_HEADERS.items()
            },
            "responses": {"Error": _error(schemas[-1])},
            "securitySchemes": SECURITY,
        },
    }


def _operations(handlers: Sequence[HTTPRouteHandler]) -> Iterator[_Operation]:
    for handler in handlers:
        hints = get_type_hints(handler.fn)
        for template in handler.paths:
            path = re.sub(r":\w+}", "}", template)
            for method in sorted(handler.http_methods - {"HEAD"}):
                described = DESCRIBED[method, path]
                returns = dict if described.streams else hints["return"]
                is_keyed = "tenant" in hints
                yield _Operation(method, path, handler.status_code, returns, is_keyed, described)


def _operation(each: _Operation, body: Any, answer: Any, is_open: bool) -> dict[str, Any]:
    described = each.described
    operation: dict[str, Any] = {
        "tags": [described.tag],
        "summary": described.summary,
        "operationId": re.sub(r"\W+", "_", f"{each.method.lower()}{each.path}").rstrip("_"),
        "parameters": [*_parameters(each)],
        "responses": {
            str(each.status): _answer(each, answer),
            "default": {"$ref": "#/components/responses/Error"},
        },
    }
    if described.description:
        operation["description"] = described.description
    if each.is_keyed:
        operation["security"] = [*({name: []} for name in SECURITY), *([{}] if is_open else [])]
    if described.body:
        media = {"schema": body, "example": described.example}
        operation["requestBody"] = {
            "content": {described.body_media: media},
            "required": described.body_required,
        }
    return operation


def _parameters(each: _Operation) -> Iterator[dict[str, Any]]:
    """Yield the parameters of a route. Those of query and headers all have defaults."""
    in_path = re.findall(r"{(\w+)}", each.path)
    for name in in_path:
        text = FIELDS.get(name, f"The {name} that is meant.")
        schema = {"type": "string"}
        yield _parameter(name, "path", text, schema) | {"required": True}
    if query := each.described.query:
        properties = msgspec.json.schema(query)["$defs"][query.__name__]["properties"]
        for name, schema in properties.items():
            if name not in in_path:
                yield _parameter(name, "query", FIELDS[name], schema)
    for name in (*each.described.headers, "X-Request-Id"):
        yield _parameter(name, "header", HEADERS[name], {"type": "string"})


def _parameter(name: str, place: str, text: str, schema: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "description": text, "schema": schema}


def _answer(each: _Operation, schema: Any) -> dict[str, Any]:
    described = each.described
    content: dict[str, Any] = {}
    if described.answers or not described.streams:
        content[described.answer_media] = {"schema": schema}
    headers = ["X-Request-Id"]
    if described.streams:
        content[EVENTS] = {"schema": {"type": "string"}, "example": described.streams}
    if described.tag == "Chat" and described.streams:
        headers.append("Content-Location")
    return {"description": described.answer, "headers": _refer(headers), "content": content}


def _error(schema: Any) -> dict[str, Any]:
    codes = ", ".join(f"`{code}` ({kind.status})" for code, kind in TABLE.items())
    return {
        "description": f"An error: `message` for people, `code` for programs. Codes: {codes}.",
        "headers": _refer(["X-Request-Id", "Retry-After"]),
        "content": {JSON: {"schema": schema}},
    }


def _refer(headers: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}


def _with_words(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a component with a description of each field, and without the type's docstring."""
    fields = {
        name: {"description": FIELDS[name], **field} if name in FIELDS else field
        for name, field in schema.get("properties", {}).items()
    }
    kept = {name: value for name, value in schema.items() if name != "description"}
    return {**kept, "properties": fields} if fields else kept
