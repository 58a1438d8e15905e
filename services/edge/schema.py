"""
What Litestar can't see for /schema: bodies that are read raw, queries, streams, errors. All
schemas are made from the types that do the reading and writing.
"""

from typing import Any, NamedTuple

import msgspec
from litestar import Litestar
from litestar.openapi.spec import (
    Components,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    RequestBody,
)
from litestar.openapi.spec import Parameter as SpecParameter
from litestar.routes import HTTPRoute
from msgspec import Struct

from services.contract.history import Exchange, MessagesRequest, SessionsRequest
from services.edge.chat import ChatBody as PromptBody
from services.edge.errors import ErrorBody
from services.edge.openai.bodies import ChatBody, TextBody
from services.edge.openai.objects import ChatCompletion, TextCompletion
from services.edge.openai.tokens import DetokenizeBody, TokenizeBody
from services.edge.routes import SessionQuery
from services.edge.sessions import DescriptionBody, Line

ANSWER = (
    'id: 5\ndata: {"token": "Hello"}\n\ndata: {"done": true, "finish_reason": "stop", "usage":'
    ' {"prompt_tokens": 12, "completion_tokens": 2, "cached_tokens": 0}}\n\n'
)
CHUNKS = (
    'data: {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [{"index": 0,'
    ' "delta": {"content": "Hello"}, "finish_reason": null}]}\n\ndata: [DONE]\n\n'
)
PARTS = (
    'data: {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text":'
    ' " upon"}]}\n\ndata: [DONE]\n\n'
)
JSON, JSONL = "application/json", "application/jsonl"
MESSAGES = [{"role": "user", "content": "Hello"}]


class Described(NamedTuple):
    """`streams` is an example of the events; `answers` the JSON, where no annotation tells it."""

    body: Any = None
    example: Any = None
    query: type[Struct] | None = None
    answers: Any = None
    streams: str = ""
    body_media: str = JSON
    answer_media: str = JSON


DESCRIBED = {
    ("POST", "/chat"): Described(PromptBody, {"prompt": "Hello"}, streams=ANSWER),
    ("GET", "/chat/{request_id}"): Described(streams=ANSWER),
    ("GET", "/messages"): Described(query=MessagesRequest),
    ("POST", "/clear-history"): Described(query=SessionQuery),
    ("GET", "/sessions"): Described(query=SessionsRequest),
    ("GET", "/sessions/{session_id}/messages"): Described(query=MessagesRequest),
    ("PATCH", "/sessions/{session_id}"): Described(DescriptionBody, {"title": "Holidays"}),
    ("GET", "/sessions/{session_id}/export"): Described(answers=Exchange, answer_media=JSONL),
    ("POST", "/sessions/{session_id}/messages"): Described(
        Line, {"prompt": "Hello", "response": "Hi!"}, body_media=JSONL
    ),
    ("POST", "/v1/chat/completions"): Described(
        ChatBody,
        {"model": "demo", "messages": MESSAGES},
        answers=ChatCompletion,
        streams=CHUNKS,
    ),
    ("POST", "/v1/completions"): Described(
        TextBody, {"model": "demo", "prompt": "Once"}, answers=TextCompletion, streams=PARTS
    ),
    ("POST", "/v1/tokenize"): Described(TokenizeBody, {"content": "Hello", "with_pieces": True}),
    ("POST", "/v1/detokenize"): Described(DetokenizeBody, {"tokens": [72, 101]}),
    ("POST", "/v1/chat/completions/input_tokens"): Described(
        ChatBody, {"model": "demo", "messages": MESSAGES}
    ),
}


class _Place(NamedTuple):
    """An operation of the document, what its handler returns, and what is said of it here."""

    operation: Operation
    returns: Any
    described: Described


def describe(app: Litestar) -> None:
    """Completes the document that Litestar has made of the routes."""
    document = app.openapi_schema
    places = [*_places(app)]
    bodies = [place.described.body or dict for place in places]
    answers = [place.described.answers or place.returns for place in places]
    schemas, components = msgspec.json.schema_components(
        [*bodies, *answers, ErrorBody], ref_template="#/components/schemas/{name}"
    )
    error = OpenAPIResponse("What went wrong", content=_content(JSON, schemas[-1]))
    for place, body, answer in zip(places, schemas, schemas[len(places) :], strict=False):
        _complete(place, body, answer)
        assert place.operation.responses is not None
        place.operation.responses.pop("400", None)
        place.operation.responses["default"] = error
    document.components = Components(schemas=components)


def _places(app: Litestar) -> "list[_Place]":
    document, found = app.openapi_schema, []
    for route in app.routes:
        path = route.path_format or "/"
        if not isinstance(route, HTTPRoute) or path not in (document.paths or {}):
            continue
        for method, (handler, _) in route.route_handler_map.items():
            item = (document.paths or {})[path]
            if operation := getattr(item, method.lower(), None):
                returns = handler.parsed_fn_signature.return_type.annotation
                described = DESCRIBED.get((method, path), Described())
                found.append(_Place(operation, dict if described.streams else returns, described))
    return found


def _complete(place: _Place, body: Any, answer: Any) -> None:
    operation, described = place.operation, place.described
    if described.body:
        operation.request_body = RequestBody(
            _content(described.body_media, body, described.example), required=True
        )
    if described.query:
        operation.parameters = [*(operation.parameters or ()), *_parameters(described.query)]
    content = {}
    if described.answers or not described.streams:
        content = _content(described.answer_media, answer)
    if described.streams:
        events = OpenAPIMediaType(example=described.streams)
        content["text/event-stream"] = events
    assert operation.responses is not None
    status = next(iter(operation.responses))
    operation.responses[status] = OpenAPIResponse("As asked", content=content)


def _parameters(query: type[Struct]) -> list[SpecParameter]:
    """None is required: a route has a default for each."""
    properties = msgspec.json.schema(query)["$defs"][query.__name__]["properties"]
    return [SpecParameter(name, "query", schema=schema) for name, schema in properties.items()]


def _content(media: str, schema: Any, example: Any = None) -> dict[str, OpenAPIMediaType]:
    return {media: OpenAPIMediaType(schema=schema, example=example)}
