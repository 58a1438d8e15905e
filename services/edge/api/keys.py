"""`/keys`: API keys in the bucket `keys`, for admins. `just keys` does the same."""

import logging
from datetime import UTC, datetime, timedelta

from litestar import delete, post
from litestar.params import FromPath
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict

from services.contract.codec import decode
from services.contract.errors import ServiceError
from services.contract.version import COMMAND
from services.edge.context import Admin, TheEdge
from services.edge.errors import AnyRequest
from services.edge.key_sources import KeyBucket
from services.edge.keys import (
    ApiKey,
    Days,
    Limit,
    ModelPattern,
    Moment,
    Name,
    Source,
    check_tenant,
    new_key,
    sha256_of,
)
from services.edge.parameters import get
from services.runtime.streams import StreamUnavailable

log = logging.getLogger(__name__)


class KeyBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /keys`."""

    name: Name
    admin: bool = False
    models: tuple[ModelPattern, ...] = ()
    parallel: Limit | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    expires_in_days: Days | None = None


class KeyObject(Struct, frozen=True, kw_only=True):
    """A key without its secret. `source` is where it is defined; `models` empty: all."""

    id: str
    name: str
    admin: bool
    models: tuple[str, ...]
    parallel: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: Moment | None
    expires: Moment | None
    source: Source
    key: str | UnsetType = UNSET
    """Only in the response that creates the key."""


class KeyList(Struct, frozen=True):
    keys: list[KeyObject]


@get("/keys")
async def keys(edge: TheEdge, admin: Admin) -> KeyList:
    """Return the keys of all sources."""
    return KeyList([_describe(source, key) for source, key in edge.api_keys.all()])


@post("/keys", status_code=201)
async def add_key(request: AnyRequest, edge: TheEdge, admin: Admin) -> KeyObject:
    """Make a key. The response is the only one that contains it."""
    if edge.api_keys.is_open:
        message = (
            f"The first key is made with `{COMMAND} keys add NAME --admin`, where NATS is reached."
        )
        raise ServiceError("forbidden", message)
    secret, key = make_key(decode(await request.body(), KeyBody))
    try:
        stored = await KeyBucket(edge.bus).add(key)
    except StreamUnavailable as error:
        raise _unavailable(error) from error
    log.info("API key added name=%s id=%s is_admin=%s by=%s", key.name, key.id, key.admin, admin)
    return _describe("just keys", stored, secret)


@delete("/keys/{key_id:str}", status_code=200)
async def revoke_key(key_id: FromPath[str], edge: TheEdge, admin: Admin) -> KeyList:
    """
    Revoke the key with this id, or all keys of a name. Answers that are running continue. If the
    name has keys outside the bucket as well, the others are revoked, and the response is a 409.
    """
    try:
        revoked = await KeyBucket(edge.bus).revoke(key_id)
    except StreamUnavailable as error:
        raise _unavailable(error) from error
    except ServiceError:
        edge.api_keys.check_revoked(key_id)
        raise
    for key in revoked:
        log.info("API key revoked name=%s id=%s by=%s", key.name, key.id, admin)
    edge.api_keys.check_revoked(key_id)
    return KeyList([_describe("just keys", key) for key in revoked])


def make_key(body: KeyBody) -> tuple[str, ApiKey]:
    """Return a new key and what is stored of it. Raises ServiceError(invalid_request)."""
    check_tenant(body.name)
    secret, fields = new_key(), asdict(body)
    now, days = datetime.now(UTC).replace(microsecond=0), fields.pop("expires_in_days")
    expires = None if days is None else now + timedelta(days=days)
    return secret, ApiKey(**fields, sha256=sha256_of(secret), created=now, expires=expires)


def _describe(source: Source, key: ApiKey, secret: str | UnsetType = UNSET) -> KeyObject:
    fields = asdict(key)
    del fields["sha256"]
    return KeyObject(id=key.id, source=source, key=secret, **fields)


def _unavailable(error: StreamUnavailable) -> ServiceError:
    return ServiceError("bus_unavailable", f"The API keys can't be changed ({error}): try again.")
