from services.inference.engine.scheduling.batch_grouping import (
    ENOUGH,
    FORGET,
    HOPELESS,
    MOST,
    TRIES,
    BatchGrouping,
)


def run(
    grouping: BatchGrouping, streams: int, together: float, apart: float, steps: int
) -> list[bool]:
    ways = []
    for _ in range(steps):
        ways.append(grouping.is_apart(streams))
        grouping.took(streams, ways[-1], apart if ways[-1] else together)
    return ways


def test_both_ways_are_tried_and_the_faster_one_is_kept() -> None:
    assert not any(run(BatchGrouping(), 2, together=10, apart=11, steps=100)[2 * TRIES :])
    assert all(run(BatchGrouping(), 2, together=14, apart=11, steps=100)[2 * TRIES :])


def test_a_step_that_was_held_up_does_not_count() -> None:
    grouping = BatchGrouping()
    run(grouping, 2, together=14, apart=11, steps=TRIES)
    grouping.took(2, True, 100.0)
    assert all(run(grouping, 2, together=14, apart=11, steps=50))


def test_what_is_far_slower_is_tried_a_few_times() -> None:
    ways = run(BatchGrouping(), 4, together=10, apart=10 * HOPELESS + 1, steps=100)
    assert ways.count(True) == ENOUGH


def test_what_was_learned_is_learned_anew_after_a_while() -> None:
    grouping = BatchGrouping()
    run(grouping, 2, together=14, apart=11, steps=2 * FORGET)
    assert not run(grouping, 2, together=5, apart=11, steps=FORGET)[-1]


def test_each_number_of_streams_is_learned_by_itself() -> None:
    grouping = BatchGrouping()
    run(grouping, 2, together=14, apart=11, steps=50)
    run(grouping, 3, together=14, apart=16, steps=50)
    assert grouping.is_apart(2) and not grouping.is_apart(3)


def test_one_stream_and_many_are_computed_as_they_are() -> None:
    for streams in (0, 1, MOST + 1):
        assert not any(run(BatchGrouping(), streams, together=10, apart=1, steps=50))
