import pytest

from services.contract.errors import ServiceError
from services.runtime.token_bucket import TokenBuckets


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bucket_allows_a_burst_and_then_the_rate() -> None:
    clock = Clock()
    buckets = TokenBuckets("things", burst=3, per_second=0.5, clock=clock)
    for _ in range(3):
        buckets.take("ann")
    with pytest.raises(ServiceError, match=r"Too many things: try again in 2 s\.") as rejected:
        buckets.take("ann")
    assert (rejected.value.code, rejected.value.retry_after) == ("rate_limit_exceeded", 2)
    clock.now += 2
    buckets.take("ann")
    with pytest.raises(ServiceError):
        buckets.take("ann")


def test_buckets_of_tenants_are_independent() -> None:
    buckets = TokenBuckets("things", burst=1, per_second=0.1)
    buckets.take("ann")
    buckets.take("bob")
    with pytest.raises(ServiceError):
        buckets.take("ann")


def test_larger_takes_need_more_tokens() -> None:
    buckets = TokenBuckets("things", burst=10, per_second=1)
    buckets.take("ann", 8)
    with pytest.raises(ServiceError, match="in 6 s"):
        buckets.take("ann", 8)
    buckets.take("ann", 2)


def test_full_buckets_are_forgotten() -> None:
    clock = Clock()
    buckets = TokenBuckets("things", burst=1, per_second=1, clock=clock)
    for n in range(10_000):
        buckets.take(f"t{n}")
    clock.now += 1
    buckets.take("last")
    assert list(buckets._full_at) == ["last"]
