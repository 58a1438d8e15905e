"""Hooks of schemathesis, for formats that it does not know. schemathesis.toml names this module."""

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/jsonl")
def json_line(context: Any, value: Any) -> bytes:
    """Return a body of one line, whose schema the document has."""
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


@schemathesis.deserializer("application/x-ndjson")
def first_line(context: Any, response: Any) -> Any:
    """Return the first line, as the schema of the document is that of each line."""
    line, _, _ = response.content.partition(b"\n")
    return json.loads(line)
