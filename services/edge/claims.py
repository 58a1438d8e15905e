"""
Which request an Idempotency-Key stands for, agreed on by all edges: kept in a bucket of NATS.
Answers nothing.
"""

import base64
import hashlib
import time
from typing import NamedTuple

from msgspec import Struct

from services.contract import subjects
from services.contract.codec import decode, encode
from services.contract.errors import ServiceError
from services.contract.messages import Prompt
from services.runtime.bus import Bus
from services.runtime.streams import Bucket, Conflict, Stream, StreamUnavailable

KEPT_FOR = 86_400.0  # seconds
MAX_KEY_LENGTH = 256


class Claim(Struct, frozen=True):
    """`body` is a digest of what is asked, `claimed_at` a time of the edge that asks it."""

    body: str
    request_id: str
    claimed_at: float


class Held(NamedTuple):
    request_id: str
    age: float  # seconds; edges' clocks may differ
    revision: int


class Claims:
    def __init__(self, bus: Bus) -> None:
        self._bucket = Bucket(bus, subjects.REQUESTS_BUCKET)
        self._log = Stream(bus, subjects.HISTORY_STREAM)
        self._is_ensured = False

    async def take(
        self, tenant: str, name: str, prompt: Prompt, request_id: str, revision: int = 0
    ) -> bool:
        """
        Whether it is this one's to ask it: nobody else has claimed it since `revision` (0: ever).
        """
        claim = Claim(_digest(prompt), request_id, time.time())
        try:
            await self._ensure()
            await self._bucket.put(f"{tenant}.{name}", encode(claim), revision)
        except Conflict:
            return False
        except StreamUnavailable as error:
            raise self._unavailable(error) from error
        return True

    async def held(self, tenant: str, name: str, prompt: Prompt) -> Held:
        """Raises ServiceError(conflict) if it was claimed for something else."""
        try:
            value = await self._bucket.get(f"{tenant}.{name}")
        except StreamUnavailable as error:
            raise self._unavailable(error) from error
        if value is None:  # it was there a moment ago
            return Held(name, KEPT_FOR, 0)
        claim = decode(value.data, Claim)
        if claim.body != _digest(prompt):
            raise ServiceError(
                "conflict", "The Idempotency-Key was used for another request: choose a new one."
            )
        return Held(claim.request_id, time.time() - claim.claimed_at, value.revision)

    async def _ensure(self) -> None:
        """On as many servers of a cluster as the log is (HISTORY_REPLICAS)."""
        if not self._is_ensured:
            await self._bucket.ensure(KEPT_FOR, await self._log.replicas())
            self._is_ensured = True

    def _unavailable(self, error: StreamUnavailable) -> ServiceError:
        self._is_ensured = False  # it may come back with nothing
        message = f"Idempotency keys can't be kept ({error}): try again, or leave the key out."
        return ServiceError("bus_unavailable", message, 1)


def name_of(tenant: str, key: str) -> str:
    """
    Of the claim, and the id of its request, unless that failed. Raises
    ServiceError(invalid_request).
    """
    if not key.isprintable() or len(key) > MAX_KEY_LENGTH:
        raise ServiceError(
            "invalid_request",
            f"The Idempotency-Key must be at most {MAX_KEY_LENGTH} printable characters.",
        )
    digest = hashlib.sha256(f"{tenant}\0{key}".encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _digest(prompt: Prompt) -> str:
    return hashlib.sha256(encode(prompt)).hexdigest()
