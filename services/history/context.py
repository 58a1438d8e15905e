"""A session's context as a fold of its records: pure, no clock, no I/O."""

from datetime import datetime

from msgspec import UNSET
from msgspec.structs import replace

from services.contract.codec import encode
from services.contract.history import Cleared, Context, Described, Erased, Exchange
from services.contract.messages import Turn
from services.history.entry import MAX_BYTES, Entry, Unreadable, newest_that_fit

SLACK = 0.3
"""
How far the window may outgrow its size, as a share of it. A prompt that begins as the one before is
not read again, and it begins so until the window is cut: in one step, every few turns.
"""


TITLE_LENGTH = 60  # characters of the first prompt that a session is listed by


class LoggedTurn(Turn, frozen=True, kw_only=True):
    """A turn that knows its age."""

    logged_at: datetime


class Snapshot(Context, frozen=True):
    """
    A session as it is kept between requests: its context, and how it is listed. `opening` is the
    beginning of its first prompt; `active_at` the time of its last record, None if it has none.
    """

    turns: tuple[LoggedTurn, ...] = ()
    title: str | None = None
    opening: str = ""
    exchanges: int = 0
    active_at: datetime | None = None


def fold(snapshot: Snapshot, entry: Entry, exchanges: int) -> Snapshot:
    """
    The context after this record. Records come in the order of the log; one that was applied before
    changes nothing, and one that can't be read is passed over.
    """
    if entry.seq <= snapshot.applied_seq:
        return snapshot
    match entry.record:
        case Erased():
            return Snapshot(epoch=entry.seq, erased=entry.seq, applied_seq=entry.seq)
        case Cleared():
            snapshot = replace(snapshot, turns=(), last="", epoch=entry.seq)
        case Described() as described:
            snapshot = _describe(snapshot, described)
        case Exchange() as exchange:
            snapshot = _add(snapshot, exchange, entry.logged_at, exchanges)
    active_at = entry.logged_at if _is_activity(entry, snapshot) else snapshot.active_at
    return replace(snapshot, applied_seq=entry.seq, active_at=active_at)


def _is_activity(entry: Entry, snapshot: Snapshot) -> bool:
    """A session that is cleared before anything was said in it is none."""
    if isinstance(entry.record, Cleared):
        return snapshot.active_at is not None
    return not isinstance(entry.record, Unreadable)


def cut(snapshot: Snapshot, last_seq: int) -> Snapshot:
    """Return the snapshot of a log that ends at `last_seq`, so that later records are applied."""
    return replace(
        snapshot,
        applied_seq=min(snapshot.applied_seq, last_seq),
        epoch=min(snapshot.epoch, last_seq),
        erased=min(snapshot.erased, last_seq),
    )


def forget(snapshot: Snapshot, before: datetime) -> Snapshot:
    """Without the turns that are older."""
    if all(turn.logged_at >= before for turn in snapshot.turns):
        return snapshot  # nearly always, so that nothing is copied
    return replace(snapshot, turns=tuple(t for t in snapshot.turns if t.logged_at >= before))


def _add(snapshot: Snapshot, exchange: Exchange, logged_at: datetime, exchanges: int) -> Snapshot:
    """
    Nothing is shown of a repeat, of what was asked before the session was cleared, and of an
    exchange in which nothing was said.
    """
    request_id = exchange.request_id
    if any(turn.request_id == request_id for turn in snapshot.turns):
        return snapshot
    opening = snapshot.opening or _opening(exchange.prompt)
    snapshot = replace(snapshot, opening=opening, exchanges=snapshot.exchanges + 1)
    if exchange.epoch < snapshot.epoch:
        return snapshot
    turns = snapshot.turns
    if exchange.retry_of:
        turns = tuple(turn for turn in turns if turn.request_id != exchange.retry_of)
    if exchange.response:
        said = LoggedTurn(request_id, exchange.prompt, exchange.response, logged_at=logged_at)
        turns = _window((*turns, said), exchanges)
    return replace(snapshot, turns=turns, last=request_id)


def _describe(snapshot: Snapshot, described: Described) -> Snapshot:
    said = {"title": described.title, "system_prompt": described.system_prompt}
    return replace(snapshot, **{name: value for name, value in said.items() if value is not UNSET})


def _opening(prompt: str) -> str:
    """In one line."""
    return " ".join(prompt.split())[:TITLE_LENGTH]


def _window(turns: tuple[LoggedTurn, ...], exchanges: int) -> tuple[LoggedTurn, ...]:
    limit = exchanges + max(1, round(SLACK * exchanges))
    shown = newest_that_fit(turns if len(turns) <= limit else turns[-exchanges:])
    is_too_long = len(shown) == 1 and len(encode(shown[0])) > MAX_BYTES
    return () if is_too_long else shown
