from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from services.contract.codec import decode, encode
from services.contract.history import Cleared, Context, Described, Erased, LogRecord
from services.history.context import Snapshot, WindowSize, drop_expired, fold
from services.history.entry import Entry, Unreadable
from services.history.limits import LIMITS
from tests.history.samples import exchange, ids, with_channels

NOW = datetime(2026, 1, 1, tzinfo=UTC)

MAX_BYTES = LIMITS.max_page_bytes
SIZE = WindowSize(10, MAX_BYTES)


def entry(seq: int, record: LogRecord | Unreadable) -> Entry:
    return Entry(seq, "alice.abc", NOW + timedelta(seconds=seq), record)


def cleared() -> Cleared:
    return Cleared(previous=0, cleared_at=NOW)


def folded(*entries: Entry, max_bytes: int = MAX_BYTES) -> Snapshot:
    snapshot = Snapshot()
    for each in entries:
        snapshot = fold(snapshot, each, WindowSize(10, max_bytes))
    return snapshot


def test_exchange_is_added_at_the_end() -> None:
    snapshot = folded(entry(3, exchange("a")), entry(8, exchange("b")))
    assert [(t.prompt, t.response) for t in snapshot.turns] == [
        ("prompt of a", "response of a"),
        ("prompt of b", "response of b"),
    ]
    assert (snapshot.epoch, snapshot.applied_seq) == (0, 8)


def test_cleared_empties_the_context_and_starts_an_epoch() -> None:
    snapshot = folded(entry(3, exchange("a")), entry(5, cleared()))
    assert (snapshot.turns, snapshot.last) == ((), "")
    assert (snapshot.epoch, snapshot.applied_seq) == (5, 5)


def test_erased_session_keeps_only_its_epoch() -> None:
    described = Described(previous=0, described_at=NOW, title="t", system_prompt="Be brief.")
    erased = Erased(previous=0, erased_at=NOW)
    snapshot = folded(entry(3, exchange("a")), entry(4, described), entry(5, erased))
    assert snapshot == Snapshot(epoch=5, erased=5, applied_seq=5)
    assert fold(snapshot, entry(6, exchange("late")), SIZE).turns == ()


def test_cleared_session_keeps_its_system_prompt() -> None:
    described = Described(previous=0, described_at=NOW, title=None, system_prompt="Be brief.")
    snapshot = folded(entry(3, described), entry(4, exchange("a")), entry(5, cleared()))
    assert (snapshot.system_prompt, snapshot.turns, snapshot.last) == ("Be brief.", (), "")


def test_retry_replaces_the_exchange_it_names() -> None:
    retry = replace(exchange("c"), retry_of="b")
    snapshot = folded(entry(1, exchange("a")), entry(2, exchange("b")), entry(3, retry))
    assert (ids(snapshot), snapshot.last) == (["a", "c"], "c")


def test_retry_without_response_leaves_the_exchange_it_names() -> None:
    failed = replace(exchange("c", response=""), retry_of="b")
    snapshot = folded(entry(1, exchange("a")), entry(2, exchange("b")), entry(3, failed))
    assert (ids(snapshot), snapshot.last) == (["a", "b"], "c")
    other = fold(snapshot, entry(4, exchange("d")), SIZE)
    assert (ids(other), other.unreplaced) == (["a", "b", "d"], "")


@pytest.mark.parametrize("retry_of", ["b", "d"])
def test_retry_after_failed_retries_replaces_the_first_exchange(retry_of: str) -> None:
    first = replace(exchange("c", response=""), retry_of="b")
    second = replace(exchange("d", response=""), retry_of="c")
    retry = replace(exchange("e"), retry_of=retry_of)
    records = (exchange("a"), exchange("b"), first, second, retry)
    snapshot = folded(*(entry(seq, record) for seq, record in enumerate(records, start=1)))
    assert (ids(snapshot), snapshot.unreplaced) == (["a", "e"], "")


def test_count_and_opening_include_exchanges_not_in_the_context() -> None:
    late = exchange("late", epoch=0)
    entries = [entry(n, exchange(f"r{n}")) for n in range(1, 31)]
    snapshot = folded(*entries, entry(31, cleared()), entry(32, late), entry(33, Unreadable("why")))
    assert (snapshot.exchanges, snapshot.opening) == (31, "prompt of r1")
    assert (snapshot.turns, snapshot.active_at) == ((), NOW + timedelta(seconds=32))


def test_first_seq_is_that_of_the_first_exchange_since_an_erasure() -> None:
    described = Described(previous=0, described_at=NOW, title="t")
    snapshot = folded(entry(2, described), entry(3, exchange("a")), entry(4, exchange("b")))
    assert snapshot.first_seq == 3
    snapshot = fold(snapshot, entry(5, Erased(previous=0, erased_at=NOW)), SIZE)
    assert fold(snapshot, entry(6, exchange("c")), SIZE).first_seq == 6
    of_an_earlier_version = Snapshot(exchanges=2, applied_seq=4)
    assert fold(of_an_earlier_version, entry(5, exchange("c")), SIZE).first_seq == 0


def test_session_that_was_only_cleared_does_not_exist() -> None:
    assert folded(entry(1, cleared())).active_at is None


def test_last_names_an_exchange_without_response() -> None:
    snapshot = folded(entry(1, exchange("a")), entry(2, exchange("b", response="")))
    assert (ids(snapshot), snapshot.last) == (["a"], "b")


def test_exchange_of_an_older_epoch_is_not_in_the_context() -> None:
    snapshot = folded(entry(5, cleared()), entry(6, exchange("late", epoch=0)))
    assert (snapshot.turns, snapshot.epoch, snapshot.applied_seq) == ((), 5, 6)


def test_exchange_of_the_current_epoch_is_in_the_context() -> None:
    assert ids(folded(entry(5, cleared()), entry(6, exchange("new", epoch=5)))) == ["new"]


def test_duplicate_request_id_is_applied_once() -> None:
    snapshot = folded(entry(1, exchange("a")), entry(2, exchange("a", response="other")))
    assert [turn.response for turn in snapshot.turns] == ["response of a"]
    assert snapshot.applied_seq == 2


def test_exchange_with_calls_only_is_in_the_context() -> None:
    calls = replace(with_channels("a"), response="", order=())
    (turn,) = folded(entry(1, calls)).turns
    assert (turn.response, turn.tool_calls) == ("", calls.tool_calls)
    assert (turn.reasoning, turn.tool_results) == (calls.reasoning, calls.tool_results)


def test_exchange_with_reasoning_only_is_not_in_the_context() -> None:
    thought = replace(exchange("b", response="So"), reasoning="Hm.", prefix_length=2)
    snapshot = folded(entry(1, exchange("a")), entry(2, thought))
    assert ids(snapshot) == ["a"] and snapshot.last == "b"


def test_reasoning_too_long_for_the_context_is_dropped() -> None:
    long = replace(exchange("b"), reasoning="x" * MAX_BYTES)
    snapshot = folded(entry(1, exchange("a")), entry(2, long))
    assert [(turn.request_id, turn.reasoning) for turn in snapshot.turns] == [("a", ""), ("b", "")]


def test_reasoning_of_earlier_turns_is_dropped_before_exchanges() -> None:
    long = [replace(exchange(name), reasoning="x" * 1000) for name in "abc"]
    snapshot = folded(*(entry(seq, each) for seq, each in enumerate(long, 1)), max_bytes=2500)
    assert ids(snapshot) == ["a", "b", "c"]
    assert [len(turn.reasoning) for turn in snapshot.turns] == [0, 0, 1000]


def test_empty_response_is_not_in_the_context() -> None:
    assert folded(entry(1, exchange("a", response=""))).turns == ()


def test_record_applied_before_changes_nothing() -> None:
    snapshot = folded(entry(1, exchange("a")), entry(2, cleared()))
    assert fold(snapshot, entry(1, exchange("a", epoch=9)), SIZE) is snapshot


def test_unreadable_record_is_skipped() -> None:
    snapshot = folded(entry(1, exchange("a")), entry(2, Unreadable("why")))
    assert (ids(snapshot), snapshot.applied_seq) == (["a"], 2)


@pytest.mark.parametrize(("exchanges", "max_turns"), [(1, 2), (2, 3), (10, 13), (100, 130)])
def test_window_grows_by_a_third_and_is_truncated_in_one_step(
    exchanges: int, max_turns: int
) -> None:
    sizes, firsts = [], []
    snapshot = Snapshot()
    for n in range(1, 5 * max_turns):
        snapshot = fold(snapshot, entry(n, exchange(f"r{n}")), WindowSize(exchanges, MAX_BYTES))
        sizes.append(len(snapshot.turns))
        firsts.append(snapshot.turns[0].request_id)
    assert sizes[:max_turns] == list(range(1, max_turns + 1))
    assert set(sizes[max_turns:]) == set(range(exchanges, max_turns + 1))
    assert sizes[max_turns] == exchanges
    cuts = sum(a != b for a, b in zip(firsts, firsts[1:], strict=False))
    assert cuts == (5 * max_turns - 1 - exchanges) // (max_turns - exchanges + 1)


def test_context_fits_in_one_nats_message() -> None:
    snapshot = folded(*(entry(n, exchange(f"r{n}", response="ä" * 100_000)) for n in range(1, 9)))
    assert ids(snapshot) == ["r5", "r6", "r7", "r8"]
    assert len(encode(snapshot)) < MAX_BYTES + 1000


def test_context_fits_in_a_smaller_message() -> None:
    entries = [entry(n, exchange(f"r{n}", response="x" * 1000)) for n in range(1, 9)]
    snapshot = folded(*entries, max_bytes=4000)
    assert ids(snapshot) == ["r6", "r7", "r8"] and len(encode(snapshot)) < 5000


def test_turn_too_large_for_a_message_is_left_out() -> None:
    snapshot = folded(entry(1, exchange("a", response="x" * MAX_BYTES)))
    assert (snapshot.turns, snapshot.last, snapshot.exchanges) == ((), "a", 1)


def test_expired_turns_are_dropped() -> None:
    snapshot = folded(entry(1, exchange("a")), entry(2, exchange("b")))
    assert ids(drop_expired(snapshot, NOW + timedelta(seconds=2))) == ["b"]


def test_snapshot_decodes_as_a_context() -> None:
    snapshot = folded(entry(1, exchange("a")))
    assert decode(encode(snapshot), Snapshot) == snapshot
    assert ids(decode(encode(snapshot), Context)) == ["a"]
