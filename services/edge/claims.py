"""
IdempotencyKeys of Idempotency-Keys: all edges agree which request a key stands for, by the bucket
`requests`, which history creates.
"""

import base64
import hashlib
import hmac
import math
import time
from typing import NamedTuple

from msgspec import Struct

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.messages import PromptRequest
from services.runtime.bus import Bus
from services.runtime.streams import Bucket, Conflict, StreamUnavailable

MAX_KEY_LENGTH = 256


class Keyed(NamedTuple):
    """
    A request with an Idempotency-Key. `name` is a digest of tenant and key, and the id of the first
    request for it. `body` is a digest of the request, made with the key, so that a reader of the
    bucket can't guess the request.
    """

    tenant: str
    name: str
    body: str


class Claim(Struct, frozen=True):
    """`request_id` is the request of the key; `claimed_at` is by the clock of the claiming edge."""

    body: str
    request_id: str
    claimed_at: float


class HeldClaim(NamedTuple):
    """A claim as found; `revision` 0: the key is not claimed."""

    request_id: str
    age: float  # seconds; edges' clocks may differ
    revision: int

    @property
    def is_claimed(self) -> bool:
        return self.revision > 0


class IdempotencyKeys:
    def __init__(self, bus: Bus) -> None:
        self._bucket = Bucket(bus, subjects.REQUESTS_BUCKET)

    async def take(self, keyed: Keyed, request_id: str, revision: int = 0) -> bool:
        """
        Whether it is this one's to ask it: nobody else has claimed it since `revision` (0: ever).
        """
        claim = Claim(keyed.body, request_id, time.time())
        try:
            await self._bucket.put(_entry(keyed), encode(claim), revision)
        except Conflict:
            return False
        except StreamUnavailable as error:
            raise _unavailable(error) from error
        return True

    async def held(self, keyed: Keyed) -> HeldClaim:
        """Raises ServiceError(conflict) if it was claimed for something else."""
        try:
            value = await self._bucket.get(_entry(keyed))
        except StreamUnavailable as error:
            raise _unavailable(error) from error
        if value is None:
            return HeldClaim(keyed.name, math.inf, 0)
        claim = decode(value.data, Claim)
        if claim.body != keyed.body:
            raise conflict()
        return HeldClaim(claim.request_id, time.time() - claim.claimed_at, value.revision)

    async def was_answered(self, tenant: str, request_id: str) -> bool:
        """Return whether the log had the answer in the last day; it may be erased since."""
        try:
            return await self._bucket.get(subjects.request_entry(tenant, request_id)) is not None
        except StreamUnavailable as error:
            raise _unavailable(error) from error


def identify(tenant: str, key: str, prompt: PromptRequest) -> Keyed:
    """Raises ServiceError(invalid_request)."""
    if not key.isprintable() or len(key) > MAX_KEY_LENGTH:
        raise ServiceError(
            "invalid_request",
            f"The Idempotency-Key must be at most {MAX_KEY_LENGTH} printable characters.",
        )
    digest = hashlib.sha256(f"{tenant}\0{key}".encode()).digest()
    name = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    body = hmac.digest(key.encode(), encode(prompt), "sha256").hex()
    return Keyed(tenant, name, body)


def conflict() -> ServiceError:
    return ServiceError(
        "conflict", "The Idempotency-Key was used for another request: use a new key."
    )


def _entry(keyed: Keyed) -> str:
    return subjects.idempotency_entry(keyed.tenant, keyed.name)


def _unavailable(error: StreamUnavailable) -> ServiceError:
    message = f"The Idempotency-Key can't be stored ({error}): try again, or leave it out."
    return ServiceError("bus_unavailable", message, 1)
