"""Hooks of schemathesis, for formats that it does not know. schemathesis.toml names this module."""

import json
from typing import Any

import schemathesis

MIN_TIMEOUT_SECONDS = 60


@schemathesis.serializer("application/jsonl")
def json_line(context: Any, value: Any) -> bytes:
    """Return a body of one line, whose schema the document has."""
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


@schemathesis.deserializer("application/x-ndjson")
def first_line(context: Any, response: Any) -> Any:
    """Return the first line, as the schema of the document is that of each line."""
    line, _, _ = response.content.partition(b"\n")
    return json.loads(line)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Raise a short `timeout_s`, which would rightly give a 504. Send invalid values unchanged."""
    body = case.body
    seconds: Any = body.get("timeout_s") if isinstance(body, dict) else None
    if type(seconds) in (int, float) and 0 < seconds < MIN_TIMEOUT_SECONDS:
        case.body = body | {"timeout_s": MIN_TIMEOUT_SECONDS}
