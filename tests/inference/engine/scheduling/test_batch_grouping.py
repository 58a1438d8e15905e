import pytest

from services.inference.engine.scheduling.batch_grouping import (
    MAX_RATIO,
    MAX_SPLIT_STREAMS,
    MIN_OTHER_SAMPLES,
    MIN_SAMPLES,
    RELEARN_STEPS,
    BatchGrouping,
)

FEW, MANY = 4, MAX_SPLIT_STREAMS + 1
few_and_many = pytest.mark.parametrize("streams", [FEW, MANY], ids=["split", "padded"])


def is_alternative(grouping: BatchGrouping, streams: int) -> bool:
    return grouping.is_split(streams) or grouping.is_padded(streams)


def run(
    grouping: BatchGrouping, streams: int, plain: float, other: float, steps: int
) -> list[bool]:
    """Return for each step whether it was split or padded. The times are seconds."""
    ways = []
    for _ in range(steps):
        ways.append(is_alternative(grouping, streams))
        grouping.record(streams, ways[-1], other if ways[-1] else plain)
    return ways


@few_and_many
def test_faster_way_is_used_after_sampling_both(streams: int) -> None:
    slower = run(BatchGrouping(), streams, plain=10, other=11, steps=100)
    assert slower == [False, True] * MIN_SAMPLES + [False] * (100 - 2 * MIN_SAMPLES)
    faster = run(BatchGrouping(), streams, plain=14, other=11, steps=100)
    assert faster == [False, True] * MIN_SAMPLES + [True] * (100 - 2 * MIN_SAMPLES)


@few_and_many
def test_interrupted_step_does_not_change_the_choice(streams: int) -> None:
    grouping = BatchGrouping()
    run(grouping, streams, plain=14, other=11, steps=2 * MIN_SAMPLES)
    grouping.record(streams, True, 100.0)
    assert all(run(grouping, streams, plain=14, other=11, steps=50))


@few_and_many
def test_hopeless_way_is_sampled_only_a_few_times(streams: int) -> None:
    ways = run(BatchGrouping(), streams, plain=10, other=10 * MAX_RATIO + 1, steps=100)
    assert ways.count(True) == MIN_OTHER_SAMPLES


@few_and_many
def test_choice_is_relearned_after_many_steps(streams: int) -> None:
    grouping = BatchGrouping()
    run(grouping, streams, plain=14, other=11, steps=2 * RELEARN_STEPS)
    assert not run(grouping, streams, plain=5, other=11, steps=RELEARN_STEPS)[-1]


def test_choice_is_learned_per_number_of_streams() -> None:
    grouping = BatchGrouping()
    for streams in (2, MANY):
        run(grouping, streams, plain=14, other=11, steps=50)
        run(grouping, streams + 1, plain=14, other=16, steps=50)
    assert grouping.is_split(2) and not grouping.is_split(3)
    assert grouping.is_padded(MANY) and not grouping.is_padded(MANY + 1)


def test_few_streams_are_split_and_many_are_padded() -> None:
    for streams in (0, 1, FEW, MAX_SPLIT_STREAMS, MANY):
        grouping = BatchGrouping()
        run(grouping, streams, plain=10, other=1, steps=50)
        assert grouping.is_split(streams) == (1 < streams <= MAX_SPLIT_STREAMS)
        assert grouping.is_padded(streams) == (streams > MAX_SPLIT_STREAMS)
