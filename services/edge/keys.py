"""
Authentication. Each API key has a name, and the name is the tenant: it sees only its own sessions.

Only the SHA-256 of a key is kept. That is enough for keys that `new_key` makes: nobody guesses 256
random bits, so a slow hash would only cost time.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from services.contract import subjects
from services.contract.errors import ServiceError
from services.contract.version import COMMAND
from services.runtime.settings import InvalidSetting

PREFIX = "ftl_"
"""Begins each key that we make, so that scanners of secrets can find it."""
KEY_BYTES = 32
MIN_KEY_LENGTH = 16
"""Characters. A shorter key can be guessed."""
ID_LENGTH = 12

Name = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
ModelPattern = Annotated[str, Meta(min_length=1)]
Limit = Annotated[int, Meta(ge=1, le=10**12)]
Days = Annotated[int, Meta(ge=1, le=36_500)]
Moment = Annotated[datetime, Meta(tz=True)]


class ApiKey(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """
    A key, as in the key file and in the bucket `keys`. `name` is its tenant. `models` are patterns
    of names as in `/v1/models`, in which `*` stands for any text; empty: all models. `tokens` are
    those of prompts and answers. An `admin` may manage keys and see the state of all tenants.
    """

    name: Name
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    admin: bool = False
    models: tuple[ModelPattern, ...] = ()
    parallel: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    created: Moment | None = None
    expires: Moment | None = None

    @property
    def id(self) -> str:
        """Return the first digits of the digest, for lists and logs."""
        return self.sha256[:ID_LENGTH]

    def allows(self, model: str) -> bool:
        """Return whether the key may use the model, at any scale of its adapter."""
        names = {model, model.rpartition("@")[0] or model}
        return not self.models or any(_matches(p, name) for name in names for p in self.models)


NO_LIMITS = ApiKey(name=subjects.OPEN_TENANT, sha256="0" * 64)
Source = Literal["EDGE_API_KEYS", "EDGE_KEYS_FILE", "just keys"]
REMOVALS: dict[Source, str] = {
    "EDGE_API_KEYS": "Remove it from this setting, and restart every edge that has it",
    "EDGE_KEYS_FILE": f"Remove it from this file: `{COMMAND} keys revoke NAME --file FILE`",
}
"""How to remove a key from a source that an edge can't change."""


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def sha256_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def parse_setting(setting: str) -> tuple[ApiKey, ...]:
    """Parse EDGE_API_KEYS. Raises InvalidSetting with a message that contains no key."""
    keys: dict[str, ApiKey] = {}
    for name, key in _entries(setting):
        digest = sha256_of(key)
        if digest in keys:
            raise _invalid(f"{keys[digest].name} and {name} have the same key")
        keys[digest] = ApiKey(name=name, sha256=digest)
    if setting and not keys:
        raise _invalid("it has no name:key, only separators")
    return tuple(keys.values())


def guessable_names(setting: str) -> list[str]:
    """Return the names in EDGE_API_KEYS whose keys are too short to be safe."""
    return [name for name, key in _entries(setting) if len(key) < MIN_KEY_LENGTH]


def _entries(setting: str) -> Iterator[tuple[str, str]]:
    for entry in filter(None, map(str.strip, setting.split(","))):
        name, _, key = map(str.strip, entry.partition(":"))
        if not key or not key.isascii():
            raise _invalid("each entry must be name:key, the key in ASCII")
        if not is_tenant(name):
            raise _invalid(
                f"the name {name!r} must have 1 to 64 characters of A-Z a-z 0-9 _ -, and must not"
                " be `_`"
            )
        yield name, key


def is_tenant(name: str) -> bool:
    """Return whether a key may have the name."""
    return subjects.is_id(name) and name != subjects.OPEN_TENANT


def check_tenant(name: str, field: str = "field `name`") -> None:
    """Raise ServiceError(invalid_request) that names the field if no key may have the name."""
    if not is_tenant(name):
        raise ServiceError("invalid_request", f"The {field} must not be {name!r}.")


def select(keys: Iterable[ApiKey], name_or_id: str) -> list[ApiKey]:
    """Return the key with this id, or all keys of a name. Raises ServiceError(not_found)."""
    keys = list(keys)
    found = [key for key in keys if key.id == name_or_id]
    if found := found or [key for key in keys if key.name == name_or_id]:
        return found
    raise ServiceError(
        "not_found",
        f"There is no key {name_or_id[:100]!r} to revoke: `{COMMAND} keys list` shows those that"
        " there are. Keys of EDGE_API_KEYS are removed there, those of a file with `--file FILE`.",
    )


class ApiKeys:
    """
    The keys of all sources. If several keys have one name, the limits and models of the newest one
    hold for all of them: what is limited is the tenant.
    """

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        """`keys` are those of EDGE_API_KEYS."""
        self._by_source: dict[Source, tuple[ApiKey, ...]] = {}
        self._required: set[Source] = set()
        self._listeners: list[Callable[[], None]] = []
        self._is_known = True
        self.replace("EDGE_API_KEYS", tuple(keys))

    @classmethod
    def parse(cls, setting: str) -> "ApiKeys":
        """Return the keys of EDGE_API_KEYS. Raises InvalidSetting."""
        return cls(parse_setting(setting))

    @property
    def is_open(self) -> bool:
        """Return whether no key is needed."""
        return self._is_known and not self._required

    def replace(self, source: Source, keys: Collection[ApiKey], is_required: bool = False) -> None:
        """Take other keys of one source. Keys are needed if there are any, or if `is_required`."""
        self._by_source[source] = tuple(keys)
        if keys or is_required:
            self._required.add(source)
        else:
            self._required.discard(source)
        self._index()

    def set_known(self, is_known: bool) -> None:
        """Say whether all sources were read. Until then, requests need a key that is known."""
        self._is_known = is_known

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change of the keys."""
        self._listeners.append(listener)

    def check_revoked(self, name_or_id: str) -> None:
        """
        Raise ServiceError(conflict) if a key with this id or name is defined outside the bucket,
        where it can't be revoked over HTTP.
        """
        for source, key in self.all():
            if source in REMOVALS and name_or_id in (key.id, key.name):
                raise ServiceError(
                    "conflict",
                    f"The key {key.id} of {key.name!r} is still valid: it is defined in {source}."
                    f" {REMOVALS[source]}.",
                )

    def all(self) -> list[tuple[Source, ApiKey]]:
        return [(source, key) for source, keys in self._by_source.items() for key in keys]

    @property
    def tenants(self) -> list[str]:
        """Return all tenants: those of the keys, or the open one."""
        return [subjects.OPEN_TENANT] if self.is_open else sorted(self._by_name)

    def tenant(self, headers: Mapping[str, str]) -> str:
        """Return the tenant of a request. Raises ServiceError(unauthorized)."""
        return subjects.OPEN_TENANT if self.is_open else self._key(headers).name

    def admin(self, headers: Mapping[str, str]) -> str:
        """
        Return the name of the admin who sends a request. Without keys, everybody is an admin.
        Raises ServiceError(forbidden) if the key is of no admin.
        """
        if not self.is_admin(headers):
            raise ServiceError(
                "forbidden", f"This needs the key of an admin: `{COMMAND} keys add NAME --admin`."
            )
        return self.tenant(headers)

    def is_admin(self, headers: Mapping[str, str]) -> bool:
        """Return whether the request may see the state of all tenants."""
        return self.is_open or self._key(headers).admin

    def limits(self, tenant: str) -> ApiKey:
        """Return the key whose limits and models hold for the tenant."""
        return self._by_name.get(tenant, NO_LIMITS)

    def _key(self, headers: Mapping[str, str]) -> ApiKey:
        digest = sha256_of(_key_in(headers))
        found = self._by_digest.get(digest)
        # the time of the lookup may reveal a part of the digest, which reveals nothing of the key
        if found is None or not hmac.compare_digest(found.sha256, digest):
            raise self._unknown()
        if found.expires and found.expires <= datetime.now(UTC):
            message = (
                f"The API key expired on {found.expires:%Y-%m-%d %H:%M %Z}: ask for a new one."
            )
            raise ServiceError("unauthorized", message)
        return found

    def _unknown(self) -> ServiceError:
        if not self._is_known:
            return ServiceError("bus_unavailable", "The API keys can't be read: try again.")
        return ServiceError(
            "unauthorized",
            "A valid API key is needed: send `Authorization: Bearer <key>` or `X-API-Key`.",
        )

    def _index(self) -> None:
        keys = [key for _, key in self.all()]
        self._by_digest = {key.sha256: key for key in keys}
        self._by_name = {key.name: key for key in sorted(keys, key=_age)}
        for listener in self._listeners:
            listener()


def _matches(pattern: str, name: str) -> bool:
    """
    Return whether a name matches; `*` stands for any text. Not by a regular expression: some
    patterns and a long name, which a request can contain, would take it minutes.
    """
    first, *between = pattern.split("*")
    if not between:
        return name == pattern
    last, end = between.pop(), len(first)
    if not name.startswith(first):
        return False
    for part in between:  # the leftmost place leaves the most for the rest
        if (start := name.find(part, end)) < 0:
            return False
        end = start + len(part)
    return name.endswith(last) and len(name) - len(last) >= end


def _age(key: ApiKey) -> datetime:
    return key.created or datetime.min.replace(tzinfo=UTC)


def _key_in(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _invalid(why: str) -> InvalidSetting:
    return InvalidSetting(f"EDGE_API_KEYS can't be used: {why}.")
