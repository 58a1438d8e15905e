"""A session's context as a fold of its log records. Pure: no clock, no I/O."""

from datetime import datetime
from typing import NamedTuple

from msgspec import UNSET
from msgspec.structs import asdict, replace

from services.contract.codec import encode
from services.contract.history import (
    Cleared,
    Context,
    ContextReply,
    Described,
    Erased,
    Exchange,
    ExchangeFeedback,
    Removed,
    Window,
    newest_turns,
)
from services.contract.messages import Turn
from services.history.entry import Entry, Unreadable, fit_newest

MAX_OPENING_CHARS = 60


class LoggedTurn(Turn, frozen=True, kw_only=True):
    """A turn with its time in the log, and the text that a user gave in place of its response."""

    logged_at: datetime
    correction: str | None = None

    @property
    def as_corrected(self) -> Turn:
        """The turn for the next prompt, without the reasoning that led to another response."""
        if self.correction is None:
            return self
        return replace(self, response=self.correction, reasoning="", correction=None)


class Snapshot(Context, frozen=True):
    """
    A session as it is stored between requests: its context, and what lists of sessions show.

    `opening` is the start of its first prompt; `active_at` is the time of its last record (None: it
    has none); `first_seq` is the sequence of its first exchange (0: none or unknown). `metadata` is
    that of a conversation of `/v1/conversations`. `feedback_seq` is the sequence of its last
    feedback (0: none).
    """

    turns: tuple[LoggedTurn, ...] = ()
    title: str | None = None
    opening: str = ""
    exchanges: int = 0
    active_at: datetime | None = None
    first_seq: int = 0
    metadata: dict[str, str] | None = None
    feedback_seq: int = 0

    def as_reply(self, window: Window | None) -> ContextReply:
        """Return the context for the next prompt: the model must see what users corrected."""
        turns = tuple(turn.as_corrected for turn in self.turns)
        return ContextReply(
            turns,
            self.epoch,
            self.applied_seq,
            self.erased,
            self.last,
            self.system_prompt,
            self.unreplaced,
            window,
        )


class WindowSize(NamedTuple):
    """
    Size of a session's context: the exchanges that are left after it is truncated, and the maximum
    of its JSON in bytes.
    """

    exchanges: int
    max_bytes: int


def fold(snapshot: Snapshot, entry: Entry, size: WindowSize) -> Snapshot:
    """
    Return the snapshot with one more record applied.

    Records must come in log order. A record that was applied before changes nothing, and an
    unreadable one only advances `applied_seq`.
    """
    if entry.seq <= snapshot.applied_seq:
        return snapshot
    active_at: datetime | None = entry.logged_at
    match entry.record:
        case Erased():
            return Snapshot(epoch=entry.seq, erased=entry.seq, applied_seq=entry.seq)
        case Cleared():
            snapshot = replace(snapshot, turns=(), last="", unreplaced="", epoch=entry.seq)
            active_at = snapshot.active_at and active_at  # clearing creates no session
        case Described() as described:
            snapshot = _describe(snapshot, described)
            if described.feedback is not UNSET:
                turns = _correct(snapshot.turns, described.feedback)
                turns = _truncate(turns, size) if turns != snapshot.turns else turns
                snapshot = replace(snapshot, turns=turns, feedback_seq=entry.seq)
        case Exchange() as exchange:
            if not snapshot.exchanges:
                snapshot = replace(snapshot, first_seq=entry.seq)
            snapshot = _add(snapshot, exchange, entry.logged_at, size)
        case Removed() | Unreadable():
            active_at = snapshot.active_at
    return replace(snapshot, applied_seq=entry.seq, active_at=active_at)


def window(snapshot: Snapshot, size: WindowSize) -> Window:
    """Return how the context grows by exchanges that a worker adds to it."""
    used = sum(len(encode(turn)) + 1 for turn in snapshot.turns)
    return Window(size.exchanges, size.max_bytes - used)


def rewind(snapshot: Snapshot, last_seq: int) -> Snapshot:
    """Return the snapshot for a log that ends at `last_seq`, so that later records are applied."""
    return replace(
        snapshot,
        applied_seq=min(snapshot.applied_seq, last_seq),
        epoch=min(snapshot.epoch, last_seq),
        erased=min(snapshot.erased, last_seq),
        first_seq=min(snapshot.first_seq, last_seq),
        feedback_seq=min(snapshot.feedback_seq, last_seq),
    )


def drop_expired(snapshot: Snapshot, before: datetime) -> Snapshot:
    """Return the snapshot without turns that were logged before this time."""
    turns = tuple(turn for turn in snapshot.turns if turn.logged_at >= before)
    return snapshot if len(turns) == len(snapshot.turns) else replace(snapshot, turns=turns)


def _add(snapshot: Snapshot, exchange: Exchange, logged_at: datetime, size: WindowSize) -> Snapshot:
    """
    Count the exchange, and add it to the turns unless it is a duplicate, has no response, or was
    requested before the session was cleared.
    """
    request_id = exchange.request_id
    if any(turn.request_id == request_id for turn in snapshot.turns):
        return snapshot
    opening = snapshot.opening or " ".join(exchange.prompt.split())[:MAX_OPENING_CHARS]
    snapshot = replace(snapshot, opening=opening, exchanges=snapshot.exchanges + 1)
    if exchange.epoch < snapshot.epoch or exchange.turn is not None:  # of a tree of responses
        return snapshot
    replaced = snapshot.retried_turn(exchange.retry_of)
    if not exchange.has_answer:
        return replace(snapshot, last=request_id, unreplaced=replaced)
    turn = LoggedTurn(
        **asdict(exchange.as_turn),
        logged_at=logged_at,
        correction=exchange.feedback.correction if exchange.feedback else None,
    )
    kept = (turn for turn in snapshot.turns if turn.request_id != replaced)
    turns = _truncate((*kept, turn), size)
    return replace(snapshot, turns=turns, last=request_id, unreplaced="")


def _describe(snapshot: Snapshot, described: Described) -> Snapshot:
    names = ("title", "system_prompt", "metadata")
    fields = {name: getattr(described, name) for name in names}
    return replace(snapshot, **{k: value for k, value in fields.items() if value is not UNSET})


def _correct(turns: tuple[LoggedTurn, ...], feedback: ExchangeFeedback) -> tuple[LoggedTurn, ...]:
    correction = feedback.given.correction if feedback.given else None
    return tuple(
        replace(turn, correction=correction) if turn.request_id == feedback.request_id else turn
        for turn in turns
    )


def _truncate(turns: tuple[LoggedTurn, ...], size: WindowSize) -> tuple[LoggedTurn, ...]:
    kept = newest_turns(turns, size.exchanges)
    fitting = fit_newest(kept, size.max_bytes)
    if len(fitting) < len(kept):  # exchanges are worth more than earlier reasoning
        fitting = fit_newest([*map(_without_reasoning, kept[:-1]), kept[-1]], size.max_bytes)
    if _is_too_large(fitting, size):
        fitting = fit_newest(map(_without_reasoning, kept), size.max_bytes)
    return () if _is_too_large(fitting, size) else fitting


def _is_too_large(fitting: tuple[LoggedTurn, ...], size: WindowSize) -> bool:
    """Return whether even the newest turn does not fit."""
    return len(fitting) == 1 and len(encode(fitting[0])) > size.max_bytes


def _without_reasoning(turn: LoggedTurn) -> LoggedTurn:
    return replace(turn, reasoning="")
