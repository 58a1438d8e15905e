"""How much of the log's room is taken, and what that means for who asks. No I/O."""

import logging

from services.contract.errors import ServiceError
from services.runtime.streams import StreamState

NEARLY_FULL = 0.8
FULL = 0.95  # the rest is for the answers that are being generated
RETRY_AFTER = 5.0  # seconds
MIB = 2**20

log = logging.getLogger(__name__)


class Quota:
    """Knows what it was last shown, so that asking it costs nothing."""

    def __init__(self) -> None:
        self.warning: str | None = None
        self._is_full = False

    def see(self, state: StreamState) -> None:
        """Logs a warning when the log comes to be nearly full."""
        share = state.bytes / state.limit if state.limit else 0.0
        if share >= NEARLY_FULL and self.warning is None:
            log.warning("%s", _warning(state, share))
        self.warning = _warning(state, share) if share >= NEARLY_FULL else None
        self._is_full = share >= FULL and not state.drops_old

    @property
    def refusal(self) -> ServiceError | None:
        """Return the error that chats get while the log is full, else None."""
        if not self._is_full:
            return None
        return ServiceError("history_full", self.warning or "The log is full.", RETRY_AFTER)

    def check(self) -> None:
        """Raises ServiceError(history_full)."""
        if refusal := self.refusal:
            raise refusal


def _warning(state: StreamState, share: float) -> str:
    limit = (state.limit or 0) / MIB
    figure = f"The sessions' log has taken {share:.0%} of its {limit:,.0f} MiB"
    if state.drops_old:
        return (
            f"{figure}. Without MongoDB it drops its oldest records when it is full: `nats stream"
            " edit HISTORY --max-bytes …` gives it more room."
        )
    return (
        f"{figure}, since MongoDB has not taken them: bring MongoDB back. New chats are refused"
        f" from {FULL:.0%} on, so that nothing is lost."
    )
