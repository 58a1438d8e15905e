"""
The OpenAPI document: openapi.yaml, completed from the routes and from the types of bodies and
responses.

Litestar's own generator can't do it (tests/edge/test_schema.py): the handlers decode bodies and
queries themselves, for their errors and limits, so Litestar finds neither; a status has only one
media type there, but completions are JSON or an event stream; and a field's description would have
to be in the types of the bus messages. Schemas of types come from msgspec.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from services.contract import history
from services.contract.messages import SessionId
from services.contract.version import VERSION
from services.edge import datasets
from services.edge.api import (
    anthropic,
    anthropic_body,
    chat,
    feedback,
    keys,
    objects,
    ollama,
    ollama_body,
    openai_conversations,
    openai_requests,
    openai_responses,
    openai_responses_body,
    openai_responses_objects,
    sessions,
    status,
)
from services.edge.errors import ANTHROPIC_PATH, OLLAMA_PATH, TABLE

TEXTS = Path(__file__).with_name("openapi.yaml")
MODULES = (
    ollama,
    ollama_body,
    anthropic,
    anthropic_body,
    chat,
    sessions,
    feedback,
    datasets,
    status,
    keys,
    openai_requests,
    objects,
    openai_responses_body,
    openai_responses_objects,
    openai_responses,
    openai_conversations,
    history,
)
"""Modules with the types of bodies and responses that openapi.yaml refers to."""
ERRORS = ((ANTHROPIC_PATH, "AnthropicError"), (OLLAMA_PATH, "OllamaError"), ("/", "Error"))
"""The form of errors by the start of the path."""
REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "An id of this HTTP request for logs and response. Default: a new one.",
    "schema": {"type": "string"},
}


def document(handlers: Sequence[HTTPRouteHandler], is_open: bool) -> dict[str, Any]:
    """Return the OpenAPI document. `is_open`: no API keys are set."""
    text = TEXTS.read_text(encoding="utf-8")
    aliased = msgspec.yaml.decode(text)  # an alias is the same object as its anchor
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(aliased))
    texts: dict[str, str] = document.pop("x-fields")
    document["info"]["version"] = VERSION
    if is_open:
        document["info"]["description"] += " There are no API keys yet: no key is needed."
    schemes = document["components"]["securitySchemes"]
    security: list[dict[str, list[str]]] = [{name: []} for name in schemes]
    for handler in handlers:
        is_keyed = not get_type_hints(handler.fn).keys().isdisjoint(("tenant", "admin"))
        for template in handler.paths:
            path = re.sub(r":\w+}", "}", template)
            for method in handler.http_methods - {"HEAD"}:
                operation = document["paths"][path][method.lower()]
                _complete(operation, path, method, handler.opt.get("query"), texts)
                if is_keyed:
                    operation["security"] = [*security, *([{}] if is_open else [])]
    codes = ", ".join(f"`{code}` ({kind.status})" for code, kind in TABLE.items())
    document["components"]["responses"]["Error"]["description"] += f" Codes: {codes}."
    _, schemas = msgspec.json.schema_components(
        types_in(text).values(), ref_template="#/components/schemas/{name}"
    )
    document["components"]["schemas"] = {
        name: _describe_fields(name, schema, texts) for name, schema in schemas.items()
    }
    json = msgspec.json.encode(document).replace(rb'\\Z"', b'$"')  # JSON schemas have no \Z
    completed: dict[str, Any] = msgspec.json.decode(json)
    return completed


def types_in(text: str) -> dict[str, type[Struct]]:
    """Return the types that a document refers to, by name. Raises KeyError for an unknown one."""
    known = {name: kind for module in MODULES for name, kind in vars(module).items()}
    return {name: known[name] for name in re.findall(r"#/components/schemas/(\w+)", text)}


def _complete(
    operation: dict[str, Any],
    path: str,
    method: str,
    query: type[Struct] | None,
    texts: dict[str, str],
) -> None:
    operation["operationId"] = re.sub(r"\W+", "_", f"{method.lower()}{path}").rstrip("_")
    more = operation.get("parameters", [])
    operation["parameters"] = [*_parameters(path, query, texts), *more, REQUEST_ID]
    ids = {
        name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", "X-Trace-Id")
    }
    for response in operation["responses"].values():
        response["headers"] = ids | response.get("headers", {})
    error = next(name for start, name in ERRORS if path.startswith(start))
    operation["responses"]["default"] = {"$ref": f"#/components/responses/{error}"}


def _parameters(
    path: str, query: type[Struct] | None, texts: dict[str, str]
) -> Iterator[dict[str, Any]]:
    in_path = re.findall(r"{(\w+)}", path)
    for name in in_path:
        text = texts.get(f"{{{name}}}") or texts[name]
        schema = msgspec.json.schema(SessionId if name == "session_id" else str)
        yield {"name": name, "in": "path", "required": True} | _described(text, schema)
    if query is None:
        return
    for name, schema in msgspec.json.schema(query)["$defs"][query.__name__]["properties"].items():
        if name not in in_path:
            yield {"name": name, "in": "query"} | _described(texts[name], _without_null(schema))


def _described(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "schema": schema}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter, which can be left out, but can't be null."""
    match schema:
        case {"anyOf": [only, {"type": "null"}]}:
            return dict(only)
    return schema


def _describe_fields(kind: str, schema: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """Return a component with a description of each field, and without the type's docstring."""
    fields = {}
    for name, field in schema.get("properties", {}).items():
        text = texts.get(f"{kind}.{name}") or texts.get(name)
        fields[name] = {"description": text, **field} if text else field
    kept = {name: value for name, value in schema.items() if name != "description"}
    return {**kept, "properties": fields} if fields else kept
