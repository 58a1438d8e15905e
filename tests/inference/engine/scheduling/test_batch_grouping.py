import pytest

from services.inference.engine.scheduling.batch_grouping import (
    MAX_RATIO,
    MIN_HALVED,
    MIN_OTHER_SAMPLES,
    MIN_PADDED,
    MIN_SAMPLES,
    RELEARN_STEPS,
    BatchGrouping,
)

each_way = pytest.mark.parametrize(
    "streams", [4, MIN_HALVED, MIN_PADDED], ids=["one by one", "halves", "padded"]
)


def is_alternative(grouping: BatchGrouping, streams: int) -> bool:
    return grouping.batches(streams) > 1 or grouping.is_padded(streams)


def run(
    grouping: BatchGrouping, streams: int, plain: float, other: float, steps: int
) -> list[bool]:
    """Return for each step whether it was split or padded. The times are seconds."""
    ways = []
    for _ in range(steps):
        ways.append(is_alternative(grouping, streams))
        grouping.record(streams, ways[-1], other if ways[-1] else plain)
    return ways


@each_way
def test_faster_way_is_used_after_sampling_both(streams: int) -> None:
    slower = run(BatchGrouping(), streams, plain=10, other=11, steps=100)
    assert slower == [False, True] * MIN_SAMPLES + [False] * (100 - 2 * MIN_SAMPLES)
    faster = run(BatchGrouping(), streams, plain=14, other=11, steps=100)
    assert faster == [False, True] * MIN_SAMPLES + [True] * (100 - 2 * MIN_SAMPLES)


@each_way
def test_interrupted_step_does_not_change_the_choice(streams: int) -> None:
    grouping = BatchGrouping()
    run(grouping, streams, plain=14, other=11, steps=2 * MIN_SAMPLES)
    grouping.record(streams, True, 100.0)
    assert all(run(grouping, streams, plain=14, other=11, steps=50))


@each_way
def test_hopeless_way_is_sampled_only_a_few_times(streams: int) -> None:
    ways = run(BatchGrouping(), streams, plain=10, other=10 * MAX_RATIO + 1, steps=100)
    assert ways.count(True) == MIN_OTHER_SAMPLES


@each_way
def test_choice_is_relearned_after_many_steps(streams: int) -> None:
    grouping = BatchGrouping()
    run(grouping, streams, plain=14, other=11, steps=2 * RELEARN_STEPS)
    assert not run(grouping, streams, plain=5, other=11, steps=RELEARN_STEPS)[-1]


def test_choice_is_learned_per_number_of_streams() -> None:
    grouping = BatchGrouping()
    for streams in (2, MIN_PADDED):
        run(grouping, streams, plain=14, other=11, steps=50)
        run(grouping, streams + 1, plain=14, other=16, steps=50)
    assert (grouping.batches(2), grouping.batches(3)) == (2, 1)
    assert grouping.is_padded(MIN_PADDED) and not grouping.is_padded(MIN_PADDED + 1)


@pytest.mark.parametrize(
    ("streams", "batches", "is_padded"),
    [(1, 1, False), (2, 2, False), (7, 7, False), (8, 2, False), (11, 2, False), (12, 1, True)],
)
def test_other_way_depends_on_the_number_of_streams(
    streams: int, batches: int, is_padded: bool
) -> None:
    grouping = BatchGrouping()
    run(grouping, streams, plain=10, other=1, steps=50)
    assert grouping.batches(streams) == batches
    assert grouping.is_padded(streams) == is_padded
