"""
Renders chat templates in a process of their own: templates are programs of strangers, and Jinja's
sandbox limits neither time nor memory.

The process has no secrets in its environment, can't open files or sockets, and can't start others.
The kernel ends it when a rendering has used up its CPU time, whatever it does, also within one
C function. `template_process.py` starts it and speaks with it: a request is `marshal` data, since
it comes from the worker; a reply is a byte and text, since it may come from the template.
"""

import contextlib
import json
import marshal
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH = struct.Struct("<Q")
REPLY = struct.Struct("<BQ")
RENDERED, FAILED, TOO_LARGE = range(3)
MAX_REASON_CHARS = 500
IMPORTING = "{{ strftime_now('%Y') }}{{ lipsum(1) }}{{ '' | striptags | pprint }}{{ 1 / 0 }}"
"""A template for which Jinja imports what it imports late, when no more files can be opened."""
_LIST_METHODS = ("append", "pop")


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """Raise jinja2.TemplateSyntaxError if the source can't be parsed."""
    return _environment().from_string(source)


def variables_of(source: str) -> set[str]:
    """Return the variables that a template reads. Raises jinja2.TemplateSyntaxError."""
    return meta.find_undeclared_variables(_environment().parse(source))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Lets templates append to lists and pop from them, as llama.cpp does: Kimi K2's needs it."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_allowed = isinstance(obj, list) and attr in _LIST_METHODS
        return is_allowed or super().is_safe_attribute(obj, attr, value)


class _GenerationTag(Extension):
    """`{% generation %}` marks text for training; its content is rendered unchanged."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, escape nothing for HTML: models were trained on plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_listed,  # llama.cpp's DeepSeek R1 writes the result of `map`
    )


def _listed(value: object) -> list[Any]:
    if isinstance(value, Iterator):
        return [*value]
    raise TypeError(f"{type(value).__name__} can't be written as JSON")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# --- the process ----------------------------------------------------------------------------------


def serve(requests: BinaryIO, replies: BinaryIO, max_bytes: int) -> None:
    """Answer requests until there are no more: the worker has closed the pipe, or died."""
    _harden(max_bytes)
    while head := requests.read(LENGTH.size):
        request = requests.read(*LENGTH.unpack(head))
        status, text = _answer(request)
        data = text.encode(errors="surrogatepass")
        replies.write(REPLY.pack(status, len(data)) + data)
        replies.flush()


def _answer(request: bytes) -> tuple[int, str]:
    """Return the status and the rendered text, or why there is none."""
    source, variables, max_chars, cpu_seconds = marshal.loads(request)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends the process by default
    try:
        return _rendered(source, variables, max_chars)
    except MemoryError:
        return TOO_LARGE, "it needs too much memory"
    except RecursionError:
        return FAILED, "it nests too deeply"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _rendered(source: str, variables: dict[str, Any] | None, max_chars: int) -> tuple[int, str]:
    """Raises MemoryError or RecursionError, also for the text of an exception of the template."""
    try:
        if variables is None:
            compile_template(source)
            return RENDERED, json.dumps(sorted(variables_of(source)))
        text = compile_template(source).render(variables)
        if len(text) > max_chars:
            return TOO_LARGE, f"it writes {len(text):,} characters, more than {max_chars:,}"
        return RENDERED, text
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a template is a program, and can fail in any way
        return FAILED, _reason(error)


def _reason(error: Exception) -> str:
    reason = str(error) or type(error).__name__
    is_long = len(reason) > MAX_REASON_CHARS
    return reason[:MAX_REASON_CHARS] + "…" if is_long else reason


def _harden(max_bytes: int) -> None:
    """Take from this process what rendering does not need."""
    with contextlib.suppress(ZeroDivisionError):
        compile_template(IMPORTING).render()
    for number in (signal.SIGINT, signal.SIGTERM):  # the worker drains, and then closes the pipe
        signal.signal(number, signal.SIG_IGN)
    limits = {
        resource.RLIMIT_AS: max_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 3,  # no more than are open
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
