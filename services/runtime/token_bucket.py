"""Token buckets: limits of what tenants may do at a rate, with bursts."""

import math
import time
from collections.abc import Callable

from services.contract.errors import ServiceError

MAX_BUCKETS = 10_000


class TokenBuckets:
    """
    A bucket per tenant with `burst` tokens, refilled with `per_second`. `what` completes the error
    "Too many …".
    """

    def __init__(
        self,
        what: str,
        burst: float,
        per_second: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` returns seconds."""
        self._what = what
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._full_at: dict[str, float] = {}
        """When the bucket of a tenant is full again; a tenant without an entry has a full one."""

    def take(self, tenant: str, tokens: float = 1) -> None:
        """Raise ServiceError(rate_limit_exceeded) if the tenant has fewer tokens left."""
        now = self._clock()
        full_at = max(now, self._full_at.get(tenant, now)) + tokens / self._per_second
        excess = full_at - now - self._burst / self._per_second
        if excess > 0:
            wait = max(1, math.ceil(excess))
            raise ServiceError(
                "rate_limit_exceeded", f"Too many {self._what}: try again in {wait} s.", wait
            )
        self._full_at[tenant] = full_at
        if len(self._full_at) > MAX_BUCKETS:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
