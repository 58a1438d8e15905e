"""What history is set by: the environment variables of the same names."""

import re
from typing import Annotated

from msgspec import Meta

from services.runtime.settings import InvalidSetting, ServiceSettings

DEFAULT_MONGODB = "mongodb://localhost:27017/"  # optional: used if it is running
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# at most 27 years, as MongoDB's TTL index counts its seconds in 31 bits
_AGE = re.compile(r"[1-9][0-9]{0,3}d|[1-9][0-9]{0,4}[smh]")


class HistorySettings(ServiceSettings, frozen=True, kw_only=True):
    """
    `history_exchanges`: how many exchanges of a session the model is shown, at least.

    `history_retention`: the age at which the log, the snapshots and MongoDB forget an exchange, as
    a number and a unit: `90d`, `12h`, `30m`, `600s`. None: never.

    `history_replicas`: how many servers of a NATS cluster keep the log and the snapshots. None: as
    many as do now, one at first.
    """

    mongodb_uri: str = DEFAULT_MONGODB
    mongodb_database: str = "finetuneLLM"
    history_exchanges: Annotated[int, Meta(ge=1, le=100)] = 10
    history_retention: str | None = None
    history_replicas: Annotated[int, Meta(ge=1, le=5)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history_retention and not _AGE.fullmatch(self.history_retention):
            raise InvalidSetting(
                f"HISTORY_RETENTION={self.history_retention!r} can't be used: set an age such as"
                " 90d, 12h or 30m, or leave it empty to keep everything."
            )

    @property
    def retention_seconds(self) -> int:
        """0: for ever."""
        if self.history_retention is None:
            return 0
        return int(self.history_retention[:-1]) * _SECONDS[self.history_retention[-1]]
