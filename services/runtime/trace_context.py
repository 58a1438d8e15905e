"""
The trace that the current task works on, from the headers of a request and into those of others.

W3C Trace Context: https://www.w3.org/TR/trace-context-2/
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
MAX_STATE_LENGTH, MAX_STATE_MEMBERS = 512, 32
MAX_MEMBER_LENGTH = 128  # longer members are dropped first
SAMPLED = 1

_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z0-9][a-z0-9_\-*/]{0,255}(?:@[a-z0-9][a-z0-9_\-*/]{0,13})?"
_MEMBER = re.compile(_KEY + r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")


class TraceContext(NamedTuple):
    """A span as its children know it. `state` is what other systems have added to the trace."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16 hexadecimal digits
    is_sampled: bool = False
    state: str = ""

    @classmethod
    def new(cls) -> "TraceContext":
        """Return the start of a trace that nobody records."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def parse(cls, parent: str, state: str = "") -> "TraceContext | None":
        """Return the context of the two headers; None if `parent` is invalid."""
        found = _PARENT.fullmatch(parent.strip())
        if found is None:
            return None
        version, trace_id, span_id, flags, more = found.groups()
        is_zero = not int(trace_id, 16) or not int(span_id, 16)
        if is_zero or (more and version == "00"):  # a later version may have more fields
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & SAMPLED), _bounded(state))

    @property
    def headers(self) -> dict[str, str]:
        parent = f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"
        return {TRACEPARENT: parent} | ({TRACESTATE: self.state} if self.state else {})


current: ContextVar[TraceContext | None] = ContextVar("trace", default=None)
"""The trace that the current task works on. Tasks that it starts inherit it."""


def trace_id() -> str:
    """Return the id of the current trace; "" without one."""
    context = current.get()
    return context.trace_id if context else ""


def headers() -> dict[str, str]:
    """Return the headers that continue the current trace; none without one."""
    context = current.get()
    return context.headers if context else {}


@contextmanager
def received(given: Mapping[str, str]) -> Iterator[None]:
    """Work on the trace of a message with these headers during the body, or on none."""
    # a header of Go's clients begins with a capital
    parent = given.get(TRACEPARENT) or given.get(TRACEPARENT.capitalize())
    state = given.get(TRACESTATE) or given.get(TRACESTATE.capitalize()) or ""
    with working_on(TraceContext.parse(parent, state) if parent else None):
        yield


@contextmanager
def working_on(context: TraceContext | None) -> Iterator[None]:
    """Work on this trace during the body, or on none."""
    token = current.set(context)
    try:
        yield
    finally:
        current.reset(token)


def _bounded(state: str) -> str:
    """Return the members as far as there is room, without those of an invalid list."""
    members = [member for each in state.split(",") if (member := each.strip())]
    if len(members) > MAX_STATE_MEMBERS or not all(map(_MEMBER.fullmatch, members)):
        return ""
    if len(",".join(members)) > MAX_STATE_LENGTH:
        members = [member for member in members if len(member) <= MAX_MEMBER_LENGTH]
    while len(",".join(members)) > MAX_STATE_LENGTH:
        members.pop()
    return ",".join(members)
