"""
The OpenAPI document of all routes, made of the routes and of the types that do the reading and
writing. What no type can tell is written here.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import msgspec
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from services.contract.history import Exchange, MessagesRequest, SessionsRequest
from services.edge.chat import ChatBody as PromptBody
from services.edge.errors import TABLE, ErrorBody
from services.edge.openai.bodies import ChatBody, TextBody
from services.edge.openai.objects import ChatCompletion, TextCompletion
from services.edge.openai.tokens import DetokenizeBody, TokenizeBody
from services.edge.routes import ClearBody, Root, SessionQuery
from services.edge.sessions import DescriptionBody, Line
from services.runtime.bus import VERSION

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
    "Chat": "Ask, with a memory for each session. Answers are server-sent events.",
    "Sessions": "Read, describe, export, import, clear and erase what was said.",
    "OpenAI": "OpenAI's API, for any client that speaks it. The client keeps the conversation.",
    "Server": "What is loaded, connected and ready.",
}
SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "`Authorization: Bearer KEY`, with a key of EDGE_API_KEYS.",
    },
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same key in a header of its own.",
    },
}
HEADERS = {
    "X-Request-Id": "An id for this HTTP request, for the logs; the answer has it, or a new one.",
    "Idempotency-Key": (
        "Any text of up to 256 characters. A repeat with the same key, within a day, is given the"
        " same answer and generates nothing; with another body it is a 409."
    ),
    "Last-Event-ID": (
        "The `id` of the last event that you received. The answer goes on after it; without it,"
        " it begins anew."
    ),
}
ANSWER_HEADERS = {
    "X-Request-Id": "The id of this HTTP request in the server's logs.",
    "Retry-After": "Seconds after which to try again; where that can help.",
    "Content-Location": "The address of this answer, for `GET` (resume) and `DELETE` (stop).",
    "X-Ignored-Fields": "The fields of a `/v1` body that had no effect.",
}
FIELDS = {
    "prompt": "What the person says.",
    "session_id": "Which conversation is meant. Each has a memory of its own.",
    "model": "`name`, or `name:adapter` for a LoRA adapter. Left out: the model as it is.",
    "retry_of": "The request id of the session's last exchange, which this one replaces.",
    "timeout_s": "Seconds after which the answer ends with what there is by then.",
    "temperature": "Randomness. 0 always takes the likeliest token.",
    "top_p": "Sample from the likeliest tokens whose probabilities add up to this.",
    "top_k": "Sample from this many of the likeliest tokens; 0: from all.",
    "min_p": "Leave out tokens less likely than this share of the likeliest one.",
    "repeat_penalty": "Make tokens that this answer has already less likely; 1: not at all.",
    "presence_penalty": "Lower the logit of each token that this answer has already.",
    "frequency_penalty": "Lower the logit of a token by this, as often as this answer has it.",
    "logit_bias": "Add to the logits of tokens, by token id; -100 bans one.",
    "seed": "The same seed and request give the same answer on the same server.",
    "max_tokens": "The most tokens that the answer may have.",
    "max_completion_tokens": "The same as `max_tokens`.",
    "stop": "Texts that end the answer; they are not part of it.",
    "logprobs": "Send the log probabilities of the tokens, too.",
    "top_logprobs": "How many likely tokens to send with each one.",
    "response_format": "Force JSON, or JSON of a schema.",
    "grammar": "A GBNF grammar that the answer must match.",
    "json_schema": "The schema, with a name for it.",
    "title": "A name for people. null: the beginning of the first prompt.",
    "system_prompt": 'Instructions for the model in this session. null: the server\'s; "": none.',
    "limit": "The most items of a page.",
    "before": "The `next` of the page before this one.",
    "after": "The `next` of the page before this one.",
    "next": "Where the following page begins: send it as `before`. null: there is none.",
    "request_id": "The id of the exchange.",
    "response": "What the model answered.",
    "asked_at": "When it was asked.",
    "answered_at": "When the answer ended.",
    "finish_reason": "Why the answer ended.",
    "usage": "Counts of tokens.",
    "timings": "Durations in seconds: waiting for a slot, prefill, decode.",
    "prompt_tokens": "Tokens of the prompt.",
    "completion_tokens": "Tokens of the answer.",
    "cached_tokens": "Tokens of the prompt that did not have to be computed.",
    "messages": "The conversation, oldest message first.",
    "tools": "Functions that the model may call.",
    "tool_choice": "Whether and which function has to be called.",
    "parallel_tool_calls": "Whether several functions may be called at once.",
    "n": "How many answers to give.",
    "stream": "Send the answer as server-sent events, while it is generated.",
    "stream_options": "`include_usage` adds a last event with the counts of tokens.",
    "prompt_cache_key": "A name of the conversation, which helps to find its cached prefix.",
    "user": "Goes into the log.",
    "echo": "Begin the answer with the prompt.",
    "status": "Always the same: the request was answered.",
    "model_loaded": "Whether a model is ready to answer.",
    "database_connected": "Whether MongoDB, which is optional, is connected.",
    "nats_connected": "Whether NATS is connected.",
    "version": "The version of FineTuneLLM.",
    "workers": "The inference processes that reported in the last seconds.",
    "history": "The history service's own status; null: it does not answer.",
    "running": "Requests that have a slot.",
    "waiting": "Requests that wait for a slot.",
    "slots": "How many requests are answered at once.",
    "progress": "The share of the model's file that is loaded.",
    "error": "Why there is no model.",
    "warning": "What will soon be a problem; null: nothing.",
    "imported": "How many lines were imported.",
    "message": "For people.",
    "content": "The text.",
    "tokens": "Token ids.",
}
DESCRIPTION = """\
FineTuneLLM serves a GGUF model over HTTP: `POST /chat` keeps a memory for each session, `/v1` is
OpenAI's API. Every error is `{"error": {"message", "type", "param", "code"}}`. Unknown parameters
are refused on everything that changes something."""
OPEN = "Without EDGE_API_KEYS, as here, no key is needed."


class Described(NamedTuple):
    """
    A route in words. `streams` is an example of the events; `answers` the JSON, where no annotation
    tells it.
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
    ("GET", "/"): Described(
        "Server", "Greet", "JSON for programs, a page of links for browsers.", answers=Root
    ),
    ("GET", "/healthz"): Described("Server", "Tell whether the process lives"),
    ("GET", "/readyz"): Described(
        "Server", "Tell whether a chat can be answered now", "503, with the reason, if not."
    ),
    ("GET", "/status"): Described(
        "Server", "Tell what is loaded, connected and waiting", "Never an error."
    ),
    ("POST", "/chat"): Described(
        "Chat",
        "Ask within a session",
        "The session's earlier exchanges are part of the prompt. Closing the connection stops the"
        " answer 10 seconds later, unless somebody comes back for it.",
        PromptBody,
        {"prompt": "Hello"},
        streams=ANSWER,
        answer="`token` events, then one `done` or `error`.",
        headers=("Idempotency-Key", "Last-Event-ID"),
    ),
    ("GET", "/chat/{request_id}"): Described(
        "Chat",
        "Receive an answer again, or the rest of it",
        "While it is generated and after its end, on any edge.",
        streams=ANSWER,
        answer="`token` events, then one `done` or `error`.",
        headers=("Last-Event-ID",),
    ),
    ("DELETE", "/chat/{request_id}"): Described(
        "Chat", "Stop an answer", "Only its worker knows whether there is one: always a 202."
    ),
    ("GET", "/messages"): Described(
        "Sessions",
        "Read the last exchanges",
        "Oldest first; of one session, or without `session_id` of all.",
        query=MessagesRequest,
        answer="The exchanges.",
    ),
    ("POST", "/clear-history"): Described(
        "Sessions",
        "Clear a session's context",
        "The model forgets what was said; the messages stay readable. The session is named in the"
        " body or in the query; in neither: `default`.",
        ClearBody,
        {"session_id": "default"},
        query=SessionQuery,
        body_required=False,
    ),
    ("GET", "/sessions"): Described(
        "Sessions",
        "List the sessions",
        "Last active first.",
        query=SessionsRequest,
        answer="A page of sessions.",
    ),
    ("GET", "/sessions/{session_id}/messages"): Described(
        "Sessions",
        "Read a session's exchanges",
        "Newest first, a page at a time.",
        query=MessagesRequest,
        answer="A page of exchanges.",
    ),
    ("PATCH", "/sessions/{session_id}"): Described(
        "Sessions",
        "Set a session's title and system prompt",
        "Also before anything is said in it; null takes a value back.",
        DescriptionBody,
        {"title": "Holidays"},
        answer="The session.",
    ),
    ("DELETE", "/sessions/{session_id}"): Described(
        "Sessions",
        "Erase a session everywhere",
        "Also what is still being answered. This can't be undone.",
    ),
    ("GET", "/sessions/{session_id}/export"): Described(
        "Sessions",
        "Export a session",
        "JSON Lines, oldest exchange first, of any length. A connection that breaks off means"
        " that something is missing.",
        answers=Exchange,
        answer="An exchange on each line.",
        answer_media=JSONL,
    ),
    ("POST", "/sessions/{session_id}/messages"): Described(
        "Sessions",
        "Import into a session",
        "JSON Lines, as an export has them, of any length. A failure says in `imported` how many"
        " lines are in; sending the same again imports nothing twice.",
        Line,
        {"prompt": "Hello", "response": "Hi!"},
        body_media=JSONL,
    ),
    ("POST", "/v1/chat/completions"): Described(
        "OpenAI",
        "Complete a conversation",
        body=ChatBody,
        example={"model": "demo", "messages": MESSAGES},
        answers=ChatCompletion,
        answer="The completion; with `stream` as server-sent events.",
        streams=CHUNKS,
    ),
    ("POST", "/v1/completions"): Described(
        "OpenAI",
        "Complete a text",
        body=TextBody,
        example={"model": "demo", "prompt": "Once"},
        answers=TextCompletion,
        answer="The completion; with `stream` as server-sent events.",
        streams=PARTS,
    ),
    ("GET", "/v1/models"): Described(
        "OpenAI", "List the models and their adapters", answer="The models."
    ),
    ("GET", "/v1/models/{name}"): Described("OpenAI", "Describe a model", answer="The model."),
    ("POST", "/v1/tokenize"): Described(
        "OpenAI",
        "Turn text into token ids",
        body=TokenizeBody,
        example={"content": "Hello", "with_pieces": True},
        answer="The token ids.",
    ),
    ("POST", "/v1/detokenize"): Described(
        "OpenAI",
        "Turn token ids into text",
        body=DetokenizeBody,
        example={"tokens": [72, 101]},
        answer="The text.",
    ),
    ("POST", "/v1/chat/completions/input_tokens"): Described(
        "OpenAI",
        "Count the tokens of a conversation",
        body=ChatBody,
        example={"model": "demo", "messages": MESSAGES},
        answer="The count.",
    ),
}


class _Operation(NamedTuple):
    """`returns` is what its handler's annotation says; `is_keyed`: it needs an API key."""

    method: str
    path: str
    status: int
    returns: Any
    is_keyed: bool
    described: Described


def document(handlers: Sequence[HTTPRouteHandler], is_open: bool) -> dict[str, Any]:
    """`is_open`: no API keys are set."""
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
            for method in sorted(handler.http_methods):
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
    """None of a query or of the headers is required: a route has a default for each."""
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
        "description": f"An error: `message` is for people, `code` for programs. Codes: {codes}.",
        "headers": _refer(["X-Request-Id", "Retry-After"]),
        "content": {JSON: {"schema": schema}},
    }


def _refer(headers: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}


def _with_words(schema: dict[str, Any]) -> dict[str, Any]:
    """A component, each of its fields described. The docstrings of types are for their readers."""
    fields = {
        name: {"description": FIELDS[name], **field} if name in FIELDS else field
        for name, field in schema.get("properties", {}).items()
    }
    kept = {name: value for name, value in schema.items() if name != "description"}
    return {**kept, "properties": fields} if fields else kept
