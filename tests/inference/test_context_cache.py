"""Contexts that a worker keeps are those that history would reply."""

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.contract import subjects
from services.contract.answer import Run
from services.contract.codec import decode, encode
from services.contract.conversation import FunctionCall, ToolCall
from services.contract.history import (
    Cleared,
    Context,
    ContextReply,
    Described,
    Erased,
    Exchange,
    ExchangeFeedback,
    Feedback,
    LogRecord,
    Window,
)
from services.contract.responses import ResponseTurn
from services.history.context import Snapshot, WindowSize, fold, window
from services.history.entry import parse_entry
from services.inference.context_cache import ContextCache
from services.inference.limits import DEFAULT_LIMITS, InferenceLimits
from services.runtime.streams import StoredMessage
from tests.history.samples import exchange

KEY = subjects.session_key("alice", "s")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SMALL = WindowSize(exchanges=3, max_bytes=2000)
LARGE = WindowSize(exchanges=3, max_bytes=1_000_000)


class Log:
    """A session as history has it, beside a cache that is asked before each answer."""

    def __init__(self, limits: InferenceLimits = DEFAULT_LIMITS, size: WindowSize = SMALL) -> None:
        self.now = 0.0
        self.size = size
        self.cache = ContextCache(limits, lambda: self.now)
        self.snapshot = Snapshot()
        self.last: StoredMessage | None = None
        self.hits = 0

    @property
    def seq(self) -> int:
        return self.last.seq if self.last else 0

    @property
    def reply(self) -> ContextReply:
        reply = self.snapshot.as_reply(window(self.snapshot, self.size))
        return decode(encode(reply), ContextReply)

    def append(self, record: LogRecord) -> bytes:
        data = encode(replace(record, previous=self.seq))
        at = NOW + timedelta(seconds=self.seq)
        self.last = StoredMessage(self.seq + 2, subjects.log(KEY), data, at)
        self.snapshot = fold(self.snapshot, parse_entry(self.last), self.size)
        return data

    def append_own(self, record: Exchange) -> None:
        record = replace(record, previous=self.seq)
        data = self.append(record)
        self.cache.advance(KEY, record, self.seq, data)

    def context(self) -> Context:
        """Return the context as a worker gets it."""
        cached = self.cache.get(KEY)
        if cached and cached.ends_with(self.last):
            self.hits += 1
            return cached.context
        self.cache.put(KEY, self.reply, self.now)
        return self.reply

    def check(self) -> None:
        assert plain(self.context()) == plain(self.reply)


def plain(context: Context) -> bytes:
    """Return the bytes of the fields that a context has, whoever made it."""
    return encode(Context(*(getattr(context, name) for name in Context.__struct_fields__)))


def own(request_id: str = "r", **fields: Any) -> Exchange:
    return replace(exchange(request_id), **fields)


IDS = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"])
TEXTS = st.sampled_from(["", "x", "Grüße 🙂", "y" * 300, "z" * 900])
CALLS = (ToolCall("c1", FunctionCall("go", "{}")),)
EXCHANGES = st.builds(
    own,
    request_id=IDS,
    response=TEXTS,
    prompt=TEXTS,
    reasoning=TEXTS,
    retry_of=st.none() | IDS,
    prefix_length=st.sampled_from([0, 0, 0, 1]),
    tool_calls=st.sampled_from([(), (), CALLS]),
    order=st.just((Run("content", 1),)),
    turn=st.sampled_from([None, None, None, ResponseTurn()]),
)
ORDINARY = st.builds(own, request_id=IDS, response=st.just("fine"), reasoning=TEXTS)
OTHERS = st.one_of(
    st.builds(Cleared, previous=st.just(0), cleared_at=st.just(NOW)),
    st.builds(Erased, previous=st.just(0), erased_at=st.just(NOW)),
    st.builds(
        Described,
        previous=st.just(0),
        described_at=st.just(NOW),
        system_prompt=st.sampled_from(["Be brief.", None]),
    ),
    st.builds(
        lambda request_id, correction: Described(
            previous=0,
            described_at=NOW,
            feedback=ExchangeFeedback(request_id, Feedback(correction=correction)),
        ),
        IDS,
        st.sampled_from(["better", "w" * 700]),
    ),
)
STEPS = st.one_of(
    st.tuples(st.just("turn"), ORDINARY),
    st.tuples(st.just("turn"), EXCHANGES),
    st.tuples(st.just("late turn"), EXCHANGES),
    st.tuples(st.just("other"), st.one_of(EXCHANGES, OTHERS)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_cached_context_is_that_of_history(steps: list[tuple[str, Any]]) -> None:
    log = Log()
    epoch = 0
    for kind, record in steps:
        match kind:
            case "turn":
                log.check()
                epoch = log.reply.epoch
                log.append_own(replace(record, epoch=epoch))
            case "late turn":  # its context was read before the last records
                log.append_own(replace(record, epoch=epoch))
            case "other":
                log.append(record)
    log.check()


def test_turns_after_the_first_are_served_from_the_cache() -> None:
    log = Log(size=LARGE)
    for n in range(20):  # through several truncations
        log.check()
        log.append_own(own(f"r{n}"))
    assert log.hits == 19


def test_response_in_a_tree_keeps_the_context() -> None:
    log = Log()
    for n in range(3):
        log.check()
        log.append_own(own(f"r{n}", turn=ResponseTurn()))
    assert log.hits == 2 and log.reply.turns == ()


def test_record_of_another_process_is_noticed() -> None:
    log = Log()
    log.check()
    log.append_own(own("a"))
    log.append(own("b"))
    log.check()
    assert log.hits == 0


def test_other_record_with_the_same_sequence_is_noticed() -> None:
    log = Log()
    log.context()
    log.append_own(own("a"))
    assert log.last
    cached = log.cache.get(KEY)
    assert cached and cached.ends_with(log.last)
    assert not cached.ends_with(log.last._replace(data=encode(own("b"))))
    assert not cached.ends_with(log.last._replace(seq=log.seq + 1))
    assert not cached.ends_with(None)


def test_append_after_an_unknown_record_drops_the_context() -> None:
    log = Log()
    log.context()
    log.append(own("other"))
    log.append_own(own("a"))
    assert log.cache.get(KEY) is None


def test_context_without_a_window_is_not_kept() -> None:
    log = Log()
    log.cache.put(KEY, log.reply, 0.0)
    assert log.cache.get(KEY)
    log.cache.put(KEY, replace(log.reply, window=None), 0.0)
    assert log.cache.get(KEY) is None


def test_reply_that_was_asked_before_a_clear_is_not_kept() -> None:
    log = Log()
    log.now = 10
    log.context()
    log.cache.clear()
    assert log.cache.get(KEY) is None
    log.cache.put(KEY, log.reply, 9.0)
    assert log.cache.get(KEY) is None
    log.cache.put(KEY, log.reply, 11.0)
    assert log.cache.get(KEY)


def test_same_reply_of_history_keeps_the_known_record() -> None:
    log = Log()
    log.context()
    log.append_own(own("a"))
    log.cache.put(KEY, log.reply, log.now)
    log.check()
    assert log.hits == 1


def test_context_is_asked_for_again_after_its_time() -> None:
    log = Log(InferenceLimits(cached_context_seconds=60))
    log.context()
    log.now = 50
    log.append_own(own("a"))
    log.check()
    log.now = 61
    log.check()
    assert log.hits == 1


def full(size: int) -> ContextReply:
    log = Log()
    log.append(own("a", response="x" * size))
    return replace(log.reply, window=Window(10, 10**6))


def test_cache_is_bounded_by_number_and_keeps_the_last_used() -> None:
    cache = ContextCache(InferenceLimits(max_cached_contexts=2), lambda: 0.0)
    for key in ("a", "b"):
        cache.put(key, full(1), 0.0)
    assert cache.get("a")
    cache.put("c", full(1), 0.0)
    assert [bool(cache.get(key)) for key in ("a", "b", "c")] == [True, False, True]


def test_cache_is_bounded_by_memory() -> None:
    cache = ContextCache(InferenceLimits(max_cached_context_bytes=20_000), lambda: 0.0)
    for n in range(100):
        cache.put(f"k{n}", full(1000), 0.0)
        cache.put(f"k{n}", full(1000), 0.0)  # replaced, and counted once
    assert 4 < len(cache) < 10
    cache.put("huge", full(1500), 0.0)
    assert cache.get("huge")
    cache.drop("huge")
    for n in range(100):
        cache.drop(f"k{n}")
    cache.put("k", full(1), 0.0)
    assert len(cache) == 1
    for n in range(100):
        cache.put(f"k{n}", replace(full(1), system_prompt="x" * 1000), 0.0)
    assert 4 < len(cache) < 10
    for n in range(100):
        cache.put(f"k{n}", replace(full(1), system_prompt="ü" * 1000), 0.0)
    assert len(cache) == 1


def test_context_larger_than_the_cache_is_not_kept() -> None:
    cache = ContextCache(InferenceLimits(max_cached_context_bytes=1000), lambda: 0.0)
    cache.put(KEY, full(1500), 0.0)
    assert len(cache) == 0
