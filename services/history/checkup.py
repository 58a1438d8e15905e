"""Finds out whether log, consumers and snapshots fit each other, and mends what does not."""

import logging

from services.history.log import Log
from services.runtime.streams import Damaged, StreamUnavailable

PROOFS = 3  # probes in a row that find a damage, before the log is emptied to repair it

log = logging.getLogger(__name__)


class Checkup:
    def __init__(self, history: Log) -> None:
        self._log = history
        self._damages = 0
        self.warning: str | None = None
        """What was found, and what became of it."""

    async def run(self, is_probed: bool, is_restarted: bool) -> None:
        """
        Raises StreamUnavailable if the log can't be used. `is_probed`: also whether it takes
        records. A damaged log is only repaired if it was so when nats-server `is_restarted`: one
        that gets damaged meanwhile has another nats-server writing to it.
        """
        try:
            if is_probed or await self._log.is_suspect():
                await self._log.probe()
            self._damages = 0
        except Damaged as error:
            if not is_restarted:
                raise
            await self._repair(error)
        if await self._log.is_being_rescued():
            await self._rescue(is_under_way=True)
        await self._compare()

    async def _repair(self, damage: Damaged) -> None:
        self._damages += 1
        if self._damages < PROOFS:
            raise damage
        self._report(
            f"The store of the sessions' log is damaged ({damage}), as by two nats-servers in one"
            " folder; what can be read is being rescued."
        )
        await self._rescue()

    async def _rescue(self, is_under_way: bool = False) -> None:
        if (moved := await self._log.rescue(is_under_way)) is None:
            raise StreamUnavailable("another history process repairs it")
        self._damages = 0
        self._report(
            f"The store of the sessions' log was damaged, as by two nats-servers in one folder;"
            f" {moved} records could be read and were kept, what else it had is lost."
        )

    async def _compare(self) -> None:
        """After a rescue all fits; it does not where NATS's store is an older copy."""
        ahead = await self._log.rewind_consumers()
        if await self._log.are_snapshots_ahead() or ahead:
            await self._log.cut_snapshots()
            await self._log.rewind_consumers(all_of_them=True)
            self._report(
                "The sessions' log ends before records that were already processed"
                f" ({', '.join(ahead) or 'snapshots'}): NATS's store is an older copy, or damaged."
                " The rest was adapted to it; what the log lost is not shown any more."
            )

    def _report(self, warning: str) -> None:
        log.error("%s", warning)
        self.warning = warning
