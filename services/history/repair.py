"""
Checks that log, consumers and snapshots are consistent, and repairs a log whose store was damaged,
as by two nats-servers in one folder. nats-server then acknowledges records that it can't find
again, even after a restart, until the stream is emptied.
"""

import logging
import math
import time
from datetime import UTC, datetime
from uuid import uuid4

from msgspec import UNSET
from msgspec.structs import replace

from services.contract import subjects
from services.contract.history import Cleared, Described, Erased, Exchange
from services.history.entry import Unreadable, parse_entry
from services.history.log import SessionLog
from services.history.snapshots import Snapshots
from services.runtime.streams import (
    Conflict,
    MessageTooLarge,
    StoredMessage,
    Stream,
    StreamDamaged,
    StreamUnavailable,
)

NO_LIMIT = -1

log = logging.getLogger(__name__)


class LogRepair:
    """
    Copies all readable records to a second stream, empties the log, and moves the records back.
    If the process dies at any point, another one resumes.

    Until the log is emptied, every write to the second stream expects the stream's last sequence:
    a process that was frozen, and whose lock was taken over, can write nothing more.
    """

    def __init__(self, session_log: SessionLog, snapshots: Snapshots, copy: Stream) -> None:
        self._log = session_log
        self._damaged = session_log.stream
        self._snapshots = snapshots
        self._copy = copy
        self._limits = session_log.limits
        self._last_seq = 0  # of the copy
        self._lock_seq = 0
        self._renewed_at = -math.inf

    async def is_unfinished(self) -> bool:
        """Return whether a process, maybe one that died, has begun a repair."""
        return await self._copy.exists()

    async def begin(self) -> None:
        await self._copy.ensure(subjects.HISTORY_REPAIR, NO_LIMIT, 0)

    async def run(self) -> int:
        """
        Repair the log and what depends on it. Return the number of records that were moved back.

        Raises Conflict if another process is repairing it; StreamUnavailable, also if no process
        began a repair, or another one has finished it.
        """
        moved = await self.move_records()
        await self._reset_snapshots()
        await self._log.restart_consumers(include_current=True)
        await self._copy.remove()
        return moved

    async def move_records(self) -> int:
        """The first half of `run`: move the records to the second stream and back."""
        await self._take_lock()
        if await self._copy.last(subjects.HISTORY_REPAIR_EMPTIED) is None:
            await self._empty()
            await self._write(subjects.HISTORY_REPAIR_EMPTIED, b"")
        return await self._move_all_back()

    async def _reset_snapshots(self) -> None:
        """Keep only the snapshots of sessions without records; the saver rebuilds the others."""
        last_seq = (await self._damaged.state()).last_seq
        for entry, value in (await self._log.snapshots.readable()).items():
            key = subjects.key_of_snapshot(entry)
            if value.data and await self._log.last(key) is None:
                await self._keep_lock()
                await self._write(subjects.repair_snapshot(key), value.data)
        await self._log.snapshots.purge()
        async for stored in self._copy.walk(subjects.HISTORY_REPAIR_SNAPSHOTS, 1):
            key = subjects.key_of_repair(stored.subject)
            await self._snapshots.restore(key, stored.data, last_seq)

    async def _take_lock(self) -> None:
        last = await self._copy.last(subjects.HISTORY_REPAIR_LOCK)
        if (
            last
            and (datetime.now(UTC) - last.time).total_seconds() < self._limits.repair_lock_seconds
        ):
            raise Conflict
        self._lock_seq = last.seq if last else 0
        await self._renew_lock()

    async def _renew_lock(self) -> None:
        """Raises Conflict if another process has taken it over."""
        lock = subjects.HISTORY_REPAIR_LOCK
        self._lock_seq = (await self._copy.append(lock, b"", uuid4().hex, self._lock_seq)).seq
        self._last_seq = self._lock_seq
        self._renewed_at = time.monotonic()

    async def _keep_lock(self) -> None:
        if time.monotonic() - self._renewed_at > self._limits.repair_renewal_seconds:
            await self._renew_lock()

    async def _write(self, subject: str, data: bytes) -> None:
        """Raises Conflict if another process has written to the second stream."""
        self._last_seq = (await self._copy.append_at(subject, data, self._last_seq)).seq

    async def _empty(self) -> None:
        """
        Copy the records that were not copied yet, also those that are appended meanwhile. (Message
        ids can't tell where to resume: nats-server keeps those of purged messages.)
        """
        last = await self._copy.last(subjects.HISTORY_REPAIR_RECORDS)
        copied = _split(last)[0] if last else 0
        while (state := await self._damaged.state()).messages:
            await self._copy_records(max(copied + 1, state.first_seq), state.last_seq)
            await self._damaged.purge(copied := state.last_seq)

    async def _copy_records(self, first: int, last: int) -> None:
        for seq in range(first, last + 1):
            await self._keep_lock()
            stored = await self._damaged.get(seq)
            if stored is None or not _is_record(stored):
                continue
            subject = subjects.repair_record(subjects.key_of_log(stored.subject))
            try:
                await self._write(subject, b"%d %b" % (stored.seq, stored.data))
            except MessageTooLarge as error:
                _report_loss(stored, error)

    async def _move_all_back(self) -> int:
        moved = 0
        async for stored in self._copy.walk(subjects.HISTORY_REPAIR_RECORDS, 1):
            await self._keep_lock()
            try:
                await self._move_back(stored)
            except MessageTooLarge as error:
                _report_loss(stored, error)
            await self._copy.delete(stored.seq)
            moved += 1
        return moved

    async def _move_back(self, stored: StoredMessage) -> None:
        key = subjects.key_of_repair(stored.subject)
        seq, data = _split(stored)
        message_id = f"rescued {stored.seq} {stored.time.isoformat()}"
        subject = subjects.log(key)
        record = parse_entry(StoredMessage(seq, subject, data, stored.time)).record
        if isinstance(record, Unreadable):
            log.warning("record unreadable session=%s seq=%d: %s", key, seq, record.reason)
            last = await self._log.last(key)
            await self._damaged.append(subject, data, message_id, last.seq if last else 0)
            return
        if isinstance(record, Exchange):
            record = await self._with_new_epoch(key, record)
        if isinstance(record, Described):
            record = await self._after_feedback(key, record)
        new_seq = await self._log.append(key, record, message_id)
        if isinstance(record, Cleared | Erased):
            await self._write(subjects.repair_clear(key), b"%d %d" % (seq, new_seq))
        if isinstance(record, Described) and record.feedback is not UNSET:
            await self._write(subjects.repair_feedback(key), b"%d" % new_seq)

    async def _with_new_epoch(self, key: str, exchange: Exchange) -> Exchange:
        """The epoch is the sequence of the session's last Cleared or Erased, which has changed."""
        stored = await self._copy.last(subjects.repair_clear(key))
        before, after = map(int, stored.data.split()) if stored else (0, 0)
        return replace(exchange, epoch=after) if stored and exchange.epoch >= before else exchange

    async def _after_feedback(self, key: str, described: Described) -> Described:
        """`before` is the sequence of the session's last feedback, which has changed."""
        if described.feedback is UNSET:
            return described
        stored = await self._copy.last(subjects.repair_feedback(key))
        before = int(stored.data) if stored else 0
        return replace(described, feedback=replace(described.feedback, before=before))


class Checkup:
    """Compares what JetStream has, and repairs what is inconsistent."""

    def __init__(self, session_log: SessionLog, snapshots: Snapshots, repair: LogRepair) -> None:
        self._log = session_log
        self._snapshots = snapshots
        self._log_repair = repair
        self._proofs = session_log.limits.repair_proofs
        self._failed_probes = 0
        self.warning: str | None = None
        """What was found and repaired."""

    async def run(self, is_probed: bool, is_restarted: bool) -> None:
        """
        Raises StreamUnavailable if the log can't be used; with `is_probed` also if it takes no
        records. A damaged log is repaired only if it was found at a start or reconnect
        (`is_restarted`): if it is damaged later, another nats-server is writing to it.
        """
        try:
            if is_probed or await self._is_suspect():
                await self._log.stream.probe(subjects.HISTORY_PROBE)
            self._failed_probes = 0
        except StreamDamaged as error:
            if not is_restarted:
                raise
            await self._repair_damaged(error)
        if await self._log_repair.is_unfinished():
            await self._repair()
        await self._adapt_to_older_log()

    async def _is_suspect(self) -> bool:
        """Return whether JetStream's figures are inconsistent, or it can't find the last record."""
        stream = self._log.stream
        state = await stream.state()
        end = await stream.get(state.last_seq) if state.messages else None
        if end is None:
            return not state.is_whole
        last = await stream.last(end.subject)  # raises StreamDamaged if subjects are mixed up
        return not state.is_whole or last is None or last.seq < end.seq

    async def _repair_damaged(self, damage: StreamDamaged) -> None:
        self._failed_probes += 1
        if self._failed_probes < self._proofs:
            raise damage
        self._report(
            f"The store of the session log is damaged ({damage}), as by two nats-servers in one"
            " folder. Restoring all readable records."
        )
        await self._log_repair.begin()
        await self._repair()

    async def _repair(self) -> None:
        try:
            moved = await self._log_repair.run()
        except Conflict as error:
            raise StreamUnavailable("another history process repairs it") from error
        self._failed_probes = 0
        self._report(
            "The store of the session log was damaged, as by two nats-servers in one folder."
            f" {moved} readable records were restored; all others are lost."
        )

    async def _adapt_to_older_log(self) -> None:
        """Adapt consumers and snapshots to a log that ends before them, as an older copy does."""
        ahead = await self._log.restart_consumers()
        if await self._snapshots.are_ahead() or ahead:
            await self._snapshots.rewind()
            await self._log.restart_consumers(include_current=True)
            self._report(
                "The session log ends before records that were already processed"
                f" ({', '.join(ahead) or 'snapshots'}): the store of NATS is an older copy, or"
                " damaged. Consumers and snapshots were adapted; exchanges it lacks are not shown."
            )

    def _report(self, warning: str) -> None:
        log.error("%s", warning)
        self.warning = warning


def _report_loss(stored: StoredMessage, error: MessageTooLarge) -> None:
    """A record that is too large would end every repair."""
    log.error("record lost subject=%s seq=%d: %s", stored.subject, stored.seq, error)


def _is_record(stored: StoredMessage) -> bool:
    return stored.subject != subjects.HISTORY_PROBE and subjects.matches(
        subjects.HISTORY_LOG, stored.subject
    )


def _split(copied: StoredMessage) -> tuple[int, bytes]:
    """Return the sequence that the record had in the damaged log, and its data."""
    seq, _, data = copied.data.partition(b" ")
    return int(seq), data
