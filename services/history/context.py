"""A session's context as a fold of its records: pure, no clock, no I/O."""

from datetime import datetime

from msgspec.structs import replace

from services.contract.history import Cleared, Context, Described, Erased, Exchange
from services.contract.messages import Turn
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
            snapshot = replace(snapshot, turns=(), last="", epoch=entry.seq)
        case Erased():
            snapshot = Snapshot(epoch=entry.seq, erased=entry.seq)
        case Described(system_prompt=system_prompt):
            snapshot = replace(snapshot, system_prompt=system_prompt)
        case Exchange() as exchange if exchange.epoch >= snapshot.epoch:
            snapshot = _add(snapshot, exchange, entry.logged_at, exchanges)
    return replace(snapshot, applied_seq=entry.seq)


def forget(snapshot: Snapshot, before: datetime) -> Snapshot:
    """Without the turns that are older."""
    return replace(snapshot, turns=tuple(t for t in snapshot.turns if t.logged_at >= before))


def _add(snapshot: Snapshot, exchange: Exchange, logged_at: datetime, exchanges: int) -> Snapshot:
    """Nothing is shown of a repeat, nor of an exchange in which nothing was said."""
    request_id = exchange.request_id
    if any(turn.request_id == request_id for turn in snapshot.turns):
        return snapshot
    turns = tuple(turn for turn in snapshot.turns if turn.request_id != exchange.retry_of)
    if exchange.response:
        said = LoggedTurn(request_id, exchange.prompt, exchange.response, logged_at=logged_at)
        turns = _window((*turns, said), exchanges)
    return replace(snapshot, turns=turns, last=request_id)


def _window(turns: tuple[LoggedTurn, ...], exchanges: int) -> tuple[LoggedTurn, ...]:
    limit = exchanges + max(1, round(SLACK * exchanges))
    return newest_that_fit(turns if len(turns) <= limit else turns[-exchanges:])
