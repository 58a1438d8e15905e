from services.inference.engine.scheduling.batch_grouping import (
    MAX_SPLIT_RATIO,
    MAX_STREAMS,
    MIN_SAMPLES,
    MIN_SPLIT_SAMPLES,
    RELEARN_STEPS,
    BatchGrouping,
)


def run(
    grouping: BatchGrouping, streams: int, batched: float, split: float, steps: int
) -> list[bool]:
    """Return for each step whether it was split; the arguments are seconds."""
    ways = []
    for _ in range(steps):
        ways.append(grouping.is_split(streams))
        grouping.record(streams, ways[-1], split if ways[-1] else batched)
    return ways


def test_faster_way_is_used_after_sampling_both() -> None:
    assert not any(run(BatchGrouping(), 2, batched=10, split=11, steps=100)[2 * MIN_SAMPLES :])
    assert all(run(BatchGrouping(), 2, batched=14, split=11, steps=100)[2 * MIN_SAMPLES :])


def test_interrupted_step_does_not_change_the_choice() -> None:
    grouping = BatchGrouping()
    run(grouping, 2, batched=14, split=11, steps=MIN_SAMPLES)
    grouping.record(2, True, 100.0)
    assert all(run(grouping, 2, batched=14, split=11, steps=50))


def test_hopeless_way_is_sampled_only_a_few_times() -> None:
    ways = run(BatchGrouping(), 4, batched=10, split=10 * MAX_SPLIT_RATIO + 1, steps=100)
    assert ways.count(True) == MIN_SPLIT_SAMPLES


def test_choice_is_relearned_after_many_steps() -> None:
    grouping = BatchGrouping()
    run(grouping, 2, batched=14, split=11, steps=2 * RELEARN_STEPS)
    assert not run(grouping, 2, batched=5, split=11, steps=RELEARN_STEPS)[-1]


def test_choice_is_learned_per_number_of_streams() -> None:
    grouping = BatchGrouping()
    run(grouping, 2, batched=14, split=11, steps=50)
    run(grouping, 3, batched=14, split=16, steps=50)
    assert grouping.is_split(2) and not grouping.is_split(3)


def test_one_stream_and_many_are_never_split() -> None:
    for streams in (0, 1, MAX_STREAMS + 1):
        assert not any(run(BatchGrouping(), streams, batched=10, split=1, steps=50))
