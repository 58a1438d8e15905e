import re

import pytest

from services.runtime import trace_context
from services.runtime.trace_context import TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_headers_are_those_that_were_received() -> None:
    context = TraceContext.parse(PARENT, "a=1,b@c=x y")
    assert context == TraceContext(TRACE, SPAN, True, "a=1,b@c=x y")
    assert context.headers == {"traceparent": PARENT, "tracestate": "a=1,b@c=x y"}


@pytest.mark.parametrize(
    ("parent", "is_sampled"),
    [
        (PARENT, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # the random flag of level 2
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", True),
    ],
)
def test_valid_parent_is_continued(parent: str, is_sampled: bool) -> None:
    assert TraceContext.parse(parent) == TraceContext(TRACE, SPAN, is_sampled)


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "x",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01-",
        f"cc-{TRACE}-{SPAN}-01more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01\r\nNats-Msg-Id: 1",
        f"00-{TRACE}-{SPAN}-٠١",
        "0" * 100_000,
    ],
)
def test_invalid_parent_is_ignored(parent: str) -> None:
    assert TraceContext.parse(parent) is None


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("", ""),
        (" , a=1 ,, b=2\t", "a=1,b=2"),
        ("a=1,nonsense", ""),
        ("A=1", ""),
        ("a=b=c", ""),
        ("a=1\r\nb: 2", ""),
        ("a=ü", ""),
        (",".join(f"k{number}=v" for number in range(33)), ""),
        (f"a=1,{'b' * 250}={'c' * 250},d=4,{'e' * 99}=5", f"a=1,d=4,{'e' * 99}=5"),
        (",".join(f"k{number}={'v' * 97}" for number in range(20)), None),
    ],
)
def test_state_is_valid_and_bounded(state: str, kept: str | None) -> None:
    context = TraceContext.parse(PARENT, state)
    assert context is not None
    if kept is None:
        assert 400 < len(context.state) <= 512 and state.startswith(f"{context.state},")
    else:
        assert context.state == kept


def test_new_trace_is_valid_and_not_sampled() -> None:
    one, other = TraceContext.new(), TraceContext.new()
    assert one.trace_id != other.trace_id
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", one.headers["traceparent"])
    assert TraceContext.parse(**{"parent": one.headers["traceparent"]}) == one


def test_received_headers_apply_in_the_body_only() -> None:
    assert (trace_context.trace_id(), trace_context.headers()) == ("", {})
    with trace_context.received({"Traceparent": PARENT}):  # as Go's clients write it
        assert trace_context.headers() == {"traceparent": PARENT}
        with trace_context.received({}):
            assert trace_context.headers() == {}
        assert trace_context.trace_id() == TRACE
    assert trace_context.headers() == {}
