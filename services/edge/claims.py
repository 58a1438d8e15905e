"""
Which request an Idempotency-Key stands for, agreed on by all edges: claims in the bucket
`requests`, which history makes. Answers nothing.
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
from services.contract.messages import Prompt
from services.runtime.bus import Bus
from services.runtime.streams import Bucket, Conflict, StreamUnavailable

MAX_KEY_LENGTH = 256


class Keyed(NamedTuple):
    """
    A request with an Idempotency-Key. `name` is a digest of tenant and key, and the id of the first
    request that is asked for it. `body` is a digest of what is asked. The key is a part of it, so
    that nobody who reads the bucket can guess what somebody asked.
    """

    tenant: str
    name: str
    body: str


class Claim(Struct, frozen=True):
    """`request_id` is the request that answers; `claimed_at` a time of the edge that asks it."""

    body: str
    request_id: str
    claimed_at: float


class Held(NamedTuple):
    """`revision` 0: nobody has claimed it."""

    request_id: str
    age: float  # seconds; edges' clocks may differ
    revision: int

    @property
    def is_claimed(self) -> bool:
        return self.revision > 0


class Claims:
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

    async def held(self, keyed: Keyed) -> Held:
        """Raises ServiceError(conflict) if it was claimed for something else."""
        try:
            value = await self._bucket.get(_entry(keyed))
        except StreamUnavailable as error:
            raise _unavailable(error) from error
        if value is None:
            return Held(keyed.name, math.inf, 0)
        claim = decode(value.data, Claim)
        if claim.body != keyed.body:
            raise conflict()
        return Held(claim.request_id, time.time() - claim.claimed_at, value.revision)

    async def was_answered(self, tenant: str, request_id: str) -> bool:
        """Whether the log had the answer, if only of the last day: it may be erased by now."""
        try:
            return await self._bucket.get(subjects.answer_entry(tenant, request_id)) is not None
        except StreamUnavailable as error:
            raise _unavailable(error) from error


def identify(tenant: str, key: str, prompt: Prompt) -> Keyed:
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
        "conflict", "The Idempotency-Key was used for another request: choose a new one."
    )


def _entry(keyed: Keyed) -> str:
    return subjects.claim_entry(keyed.tenant, keyed.name)


def _unavailable(error: StreamUnavailable) -> ServiceError:
    message = f"Idempotency keys can't be kept ({error}): try again, or leave the key out."
    return ServiceError("bus_unavailable", message, 1)
