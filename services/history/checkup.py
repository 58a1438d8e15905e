"""Checks that log, consumers and snapshots are consistent, and repairs what is not."""

import logging

from services.history.log import Log
from services.runtime.streams import StreamDamaged, StreamUnavailable

PROOFS = 3  # failed probes in a row that prove damage, before the log is emptied and rebuilt

log = logging.getLogger(__name__)


class Checkup:
    def __init__(self, history: Log) -> None:
        self._log = history
        self._damages = 0
        self.warning: str | None = None
        """What was found and what was done about it."""

    async def run(self, is_probed: bool, is_restarted: bool) -> None:
        """
        Raises StreamUnavailable if the log can't be used; with `is_probed` also if it takes no
        records. A damaged log is repaired only if it was found at a start or reconnect
        (`is_restarted`): if it is damaged later, another nats-server is writing to it.
        """
        try:
            if is_probed or await self._log.is_suspect():
                await self._log.probe()
            self._damages = 0
        except StreamDamaged as error:
            if not is_restarted:
                raise
            await self._repair(error)
        if await self._log.is_being_rescued():
            await self._rescue(is_under_way=True)
        await self._compare()

    async def _repair(self, damage: StreamDamaged) -> None:
        self._damages += 1
        if self._damages < PROOFS:
            raise damage
        self._report(
            f"The store of the sessions' log is damaged ({damage}), as by two nats-servers in one"
            " folder. All readable records are being rescued."
        )
        await self._rescue()

    async def _rescue(self, is_under_way: bool = False) -> None:
        if (moved := await self._log.rescue(is_under_way)) is None:
            raise StreamUnavailable("another history process repairs it")
        self._damages = 0
        self._report(
            f"The store of the sessions' log was damaged, as by two nats-servers in one folder."
            f" {moved} readable records were kept; all others are lost."
        )

    async def _compare(self) -> None:
        """Adapt consumers and snapshots to a log that ends before them, as an older copy does."""
        ahead = await self._log.rewind_consumers()
        if await self._log.are_snapshots_ahead() or ahead:
            await self._log.cut_snapshots()
            await self._log.rewind_consumers(all_of_them=True)
            self._report(
                "The sessions' log ends before records that were already processed"
                f" ({', '.join(ahead) or 'snapshots'}): NATS's store is an older copy, or damaged."
                " Consumers and snapshots were adapted; the missing exchanges are not shown."
            )

    def _report(self, warning: str) -> None:
        log.error("%s", warning)
        self.warning = warning
