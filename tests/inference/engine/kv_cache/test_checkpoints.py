from services.inference.engine.kv_cache.checkpoints import (
    MAX_CHECKPOINTS,
    MIN_DISTANCE,
    Checkpoint,
    Checkpoints,
)
from tests.inference.fake_backend import FakeState


def checkpoint(length: int) -> Checkpoint:
    return Checkpoint(length, FakeState((0,) * length, 0))


def lengths(checkpoints: Checkpoints) -> list[int]:
    return [each.length for each in checkpoints]


def test_longest_is_the_last_one_that_fits() -> None:
    checkpoints = Checkpoints(map(checkpoint, (20, 50)))
    assert [checkpoints.reusable(length) for length in (19, 20, 49, 50, 99)] == [0, 20, 20, 50, 50]


def test_planned_lengths_keep_their_distance() -> None:
    checkpoints = Checkpoints([checkpoint(20)])
    checkpoints.plan((0, 10, 35, 36, 51, 52, 300), computed=20)
    planned = []
    while length := checkpoints.next_planned:
        planned.append(length)
        checkpoints.add(checkpoint(length))
    assert planned == [36, 52, 300]  # 20 is there, 35 and 51 are too close


def test_first_and_newest_are_kept() -> None:
    checkpoints = Checkpoints()
    for number in range(1, MAX_CHECKPOINTS + 3):
        checkpoints.add(checkpoint(number * MIN_DISTANCE))
    kept = [length // MIN_DISTANCE for length in lengths(checkpoints)]
    assert kept == [1, *range(4, MAX_CHECKPOINTS + 3)]


def test_truncation_drops_longer_ones_and_plans() -> None:
    checkpoints = Checkpoints(map(checkpoint, (20, 50)))
    checkpoints.plan([90], computed=50)
    checkpoints.truncate(49)
    assert (lengths(checkpoints), checkpoints.next_planned) == ([20], 0)


def test_held_checkpoint_is_added_if_needed() -> None:
    checkpoints = Checkpoints()
    for is_needed in (False, True):
        checkpoints.hold(checkpoint(30))
        checkpoints.hold(checkpoint(40))
        checkpoints.settle(is_needed)
        assert lengths(checkpoints) == ([40] if is_needed else [])
