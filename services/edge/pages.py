"""
The HTML pages: a welcome at `/`, and the reference of all routes. They have no scripts and load
nothing from other hosts, so they work offline; the renderers of Litestar's OpenAPI plugins all load
theirs from a CDN.
"""

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from typing import Any

import msgspec
from litestar import Response

from services.contract.version import COMMAND

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 0.9em/1.4 ui-monospace, monospace }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid #8886; border-radius: 6px }
table { border-collapse: collapse; width: 100% }
td { border-top: 1px solid #8884; padding: 0.3rem 0.6rem 0.3rem 0; vertical-align: top }
h3 { margin-top: 2rem; border-top: 2px solid #8886; padding-top: 0.5rem }
"""
_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}


def respond(page: str) -> Response[str]:
    return Response(page, media_type="text/html", headers=HEADERS)


def welcome(host: str) -> str:
    url = f"http://{host}"
    return _page(
        "FineTuneLLM",
        "<p>The server is running. Talk to it in a terminal:</p>"
        f'<pre>{COMMAND} chat\n\ncurl -N {escape(url)}/chat -d \'{{"prompt":"Hello!"}}\'</pre>'
        '<ul><li><a href="/schema">All routes</a>, with their fields and examples</li>'
        '<li><a href="/status">Status</a>: what is loaded and connected</li>'
        f"<li>OpenAI clients: base URL <code>{escape(url)}/v1</code></li></ul>",
    )


def reference(document: dict[str, Any]) -> str:
    """Return the OpenAPI document as a page."""
    info = document["info"]
    parts = [
        f"<p>{_prose(info['description'])}</p>",
        '<p>For programs: <a href="/schema/openapi.json">openapi.json</a>,'
        ' <a href="/schema/openapi.yaml">openapi.yaml</a> (OpenAPI 3.1).</p>',
        "<h2>Authentication</h2>",
        _table(
            (name, _prose(scheme["description"]))
            for name, scheme in document["components"]["securitySchemes"].items()
        ),
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2><p>{_prose(tag['description'])}</p>")
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if tag["name"] in operation["tags"]:
                    parts += _operation(f"{method.upper()} {path}", operation)
    parts.append("<h2>Errors</h2>")
    for error in document["components"]["responses"].values():
        parts += [f"<p>{_prose(error['description'])}</p>", *_content(error["content"])]
    parts.append("<h2>Types</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts += [f'<h3 id="{escape(name)}">{escape(name)}</h3>', _fields(schema)]
    return _page(f"{info['title']} {info['version']}: HTTP API", "\n".join(parts))


def _operation(title: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<h3><code>{escape(title)}</code><br>{escape(operation['summary'])}</h3>"
    if description := operation.get("description"):
        yield f"<p>{_prose(description)}</p>"
    yield _table(
        (
            f"<code>{escape(each['name'])}</code>",
            f"{each['in']}, {_type(each['schema'])}",
            _prose(each["description"]),
        )
        for each in operation["parameters"]
    )
    if body := operation.get("requestBody"):
        yield f"<p>Body{'' if body['required'] else ' (optional)'}:</p>"
        yield from _content(body["content"])
    for status, answer in operation["responses"].items():
        if status != "default":
            yield f"<p>Response {status}: {_prose(answer['description'])}</p>"
            yield from _content(answer.get("content", {}))


def _content(content: dict[str, Any]) -> Iterator[str]:
    for media, each in content.items():
        kind = "events" if media == "text/event-stream" else _type(each["schema"])
        yield f"<p><code>{escape(media)}</code>: {kind}</p>"
        if example := each.get("example"):
            text = example if isinstance(example, str) else _json(example)
            yield f"<pre>{escape(text.strip())}</pre>"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    return _table(
        (
            f"<code>{escape(name)}</code>{' (required)' if name in required else ''}",
            _type(field) + (f"; default {_json(field['default'])}" if "default" in field else ""),
            _prose(field.get("description", "")),
        )
        for name, field in schema.get("properties", {}).items()
    )


def _type(schema: dict[str, Any]) -> str:
    """Return a short description of a type as HTML."""
    if target := schema.get("$ref"):
        name = target.rpartition("/")[2]
        return f'<a href="#{escape(name)}">{escape(name)}</a>'
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(map(_type, options))
    if "enum" in schema:
        return " or ".join(f"<code>{escape(_json(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(_json(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items') or {})}"
    return escape(schema.get("type", "anything")) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    """Return the limits of a number, or of the length of a text."""
    for least, most, unit in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
    ):
        if least in schema or most in schema:
            span = f"{schema.get(least, '')} … {schema.get(most, '')}".strip()
            return f" ({span}{unit})"
    return ""


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _prose(text: str) -> str:
    """Return escaped HTML with `code` as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if n % 2 else part for n, part in enumerate(parts))


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>"
    )
