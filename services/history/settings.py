"""Settings of history. docs/settings.md is generated from them."""

import re
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from services.runtime.settings import BackendSettings, InvalidSetting, Port

DEFAULT_MONGODB = "mongodb://localhost:27017/"  # optional: used if it is running
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# at most 27 years, as MongoDB's TTL index counts its seconds in 31 bits
_AGE = re.compile(r"[1-9][0-9]{0,3}d|[1-9][0-9]{0,4}[smh]")


class HistorySettings(BackendSettings, frozen=True, kw_only=True):
    mongodb_uri: Annotated[
        str,
        Meta(
            description="MongoDB that archives the history. It is optional: without it the history"
            " is kept by NATS alone. Reads and writes use the concern `majority` unless the URI"
            " sets another (`?w=1&readConcernLevel=local`). TLS is a part of the URI, too:"
            " `?tls=true&tlsCAFile=ca.pem`."
        ),
    ] = DEFAULT_MONGODB
    mongodb_uri_file: Annotated[
        str,
        Meta(
            description="File whose text is used instead of `MONGODB_URI`, so that its password is"
            " in no environment: a secret of Docker or Kubernetes. It is read at startup."
        ),
    ] = ""
    mongodb_database: Annotated[str, Meta(description="Name of the database.")] = "finetuneLLM"
    history_exchanges: Annotated[
        int,
        Meta(
            ge=1,
            le=100,
            description="Minimum number of past exchanges in the prompt, if they fit the context"
            " window. Up to 30 % more are kept between two truncations.",
        ),
    ] = 10
    history_retention: (
        Annotated[
            str,
            Meta(
                description="Age at which the log, the snapshots and MongoDB delete an exchange: a"
                " number and `d`, `h`, `m` or `s`, such as `90d`. Empty: never."
            ),
        ]
        | None
    ) = None
    history_max_sessions: Annotated[
        int,
        Meta(
            ge=1,
            description="Maximum sessions of a tenant, with conversations and stored responses, of"
            " 16 KiB on average. Beyond it new ones are rejected, until some are deleted. Without"
            " API keys, all callers are one tenant.",
        ),
    ] = 300_000
    history_replicas: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=5,
                description="For a NATS cluster: number of servers with a copy of the log, the"
                " snapshots and the idempotency keys. With 3, one server may fail. Empty: an"
                " existing log keeps its number, a new one has 1.",
            ),
        ]
        | None
    ) = None

    history_metrics_port: Annotated[
        Port | None,
        Meta(
            description="Port for `GET /metrics` of this process, without API keys. Empty: none;"
            " `/metrics` of the edge has the figures of history, too."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mongodb_uri_file:
            msgspec.structs.force_setattr(self, "mongodb_uri", _read(self.mongodb_uri_file))
        if self.history_retention and not _AGE.fullmatch(self.history_retention):
            raise InvalidSetting(
                f"HISTORY_RETENTION={self.history_retention!r} can't be used: set an age such as"
                " 90d, 12h or 30m, or leave it empty to keep everything."
            )

    @property
    def retention_seconds(self) -> int:
        """Return the age at which exchanges are deleted, or 0 for never."""
        if self.history_retention is None:
            return 0
        return int(self.history_retention[:-1]) * _SECONDS[self.history_retention[-1]]


def _read(path: str) -> str:
    """Return the text of MONGODB_URI_FILE. Raises InvalidSetting."""
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidSetting(f"MONGODB_URI_FILE={path!r} can't be read: {reason}.") from error
    if not text:
        raise InvalidSetting(f"MONGODB_URI_FILE={path!r} is empty: write the URI into it.")
    return text
