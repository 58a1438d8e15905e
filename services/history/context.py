"""A session's context as a fold of its records: pure, no clock, no I/O."""

from datetime import datetime

from msgspec.structs import replace

from services.contract.messages import Cleared, Context, Exchange, Turn
from services.history.entry import Entry, newest_that_fit

SLACK = 0.3
"""
How far the window may outgrow its size, as a share of it. A prompt that begins as the one before is
not read again, and it begins so until the window is cut: in one step, every few turns.
"""


class LoggedTurn(Turn, frozen=True, kw_only=True):
    """A turn that knows its age."""

    logged_at: datetime


class Snapshot(Context, frozen=True):
    """A context as it is kept between requests."""

    turns: tuple[LoggedTurn, ...] = ()


def fold(snapshot: Snapshot, entry: Entry, exchanges: int) -> Snapshot:
    """
    The context after this record. Records come in the order of the log; one that was applied before
    changes nothing, and one that can't be read is passed over.
    """
    if entry.seq <= snapshot.applied_seq:
        return snapshot
    match entry.record:
        case Cleared():
            return Snapshot(epoch=entry.seq, applied_seq=entry.seq)
        case Exchange() as exchange if _is_shown(exchange, snapshot):
            turns = _window((*snapshot.turns, _turn(exchange, entry.logged_at)), exchanges)
            return replace(snapshot, turns=turns, applied_seq=entry.seq)
    return replace(snapshot, applied_seq=entry.seq)


def forget(snapshot: Snapshot, before: datetime) -> Snapshot:
    """Without the turns that are older."""
    return replace(snapshot, turns=tuple(t for t in snapshot.turns if t.logged_at >= before))


def _is_shown(exchange: Exchange, snapshot: Snapshot) -> bool:
    """Not if it was asked before the session was cleared, or is a repeat, or has no answer."""
    return (
        exchange.epoch >= snapshot.epoch
        and exchange.response != ""
        and all(turn.request_id != exchange.request_id for turn in snapshot.turns)
    )


def _turn(exchange: Exchange, logged_at: datetime) -> LoggedTurn:
    return LoggedTurn(exchange.request_id, exchange.prompt, exchange.response, logged_at=logged_at)


def _window(turns: tuple[LoggedTurn, ...], exchanges: int) -> tuple[LoggedTurn, ...]:
    limit = exchanges + max(1, round(SLACK * exchanges))
    return newest_that_fit(turns if len(turns) <= limit else turns[-exchanges:])
