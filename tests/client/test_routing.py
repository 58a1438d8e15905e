from collections import Counter

import pytest
from msgspec.structs import replace

from services.client.routing import rank_workers
from services.contract.messages import ModelInfo, WorkerReport

DEMO = ModelInfo("demo", "d1", 2048, 1000, adapters=("shout",))
TUNED = replace(DEMO, digest="d2")
OTHER = ModelInfo("other", "o1", 2048, 1000)
KEYS = [f"_.session{number}" for number in range(300)]


def report(worker_id: str, in_flight: int = 0, model: ModelInfo = DEMO) -> WorkerReport:
    return WorkerReport(
        worker_id, "ready", slots=4, running=min(in_flight, 4), waiting=max(0, in_flight - 4),
        queue=8, model=model,
    )  # fmt: skip


def first(key: str, *reports: WorkerReport, model: str | None = None) -> str:
    return rank_workers(key, model, reports)[0]


def test_a_session_goes_to_one_worker_whoever_asks_and_sessions_spread() -> None:
    workers = [report(worker_id) for worker_id in "abc"]
    chosen = {key: first(key, *workers) for key in KEYS}
    assert chosen == {key: first(key, *reversed(workers)) for key in KEYS}
    assert all(count > len(KEYS) / 5 for count in Counter(chosen.values()).values())


def test_only_the_sessions_of_a_worker_that_left_move() -> None:
    a, b, c = (report(worker_id) for worker_id in "abc")
    for key in KEYS:
        before, after = first(key, a, b, c), first(key, a, b)
        assert after == before or before == "c"


def test_who_is_asked_next_is_all_the_others() -> None:
    assert sorted(rank_workers("_.s", None, [report(worker_id) for worker_id in "abc"])) == [
        "a",
        "b",
        "c",
    ]
    assert rank_workers("_.s", None, []) == []


def test_a_worker_without_a_free_slot_is_passed_over_while_another_has_one() -> None:
    for key in KEYS:
        assert first(key, report("a", 4), report("b", 3)) == "b"
    assert {first(key, report("a", 4), report("b", 5)) for key in KEYS} == {"a", "b"}


def test_nobody_has_more_than_two_more_in_flight_than_the_least_loaded() -> None:
    for key in KEYS:
        assert first(key, report("a", 3), report("b", 0)) == "b"
    assert {first(key, report("a", 2), report("b", 0)) for key in KEYS} == {"a", "b"}


def test_a_full_worker_is_asked_last() -> None:
    full = report("a", 12)
    assert rank_workers("_.s", None, [full, report("b", 11), report("c", 11)])[-1] == "a"


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
def test_only_a_ready_worker_is_asked(state: str) -> None:
    away = replace(report("a"), state=state)
    assert rank_workers("_.s", None, [away, report("b")]) == ["b"]


def test_a_model_that_is_named_is_answered_by_its_workers_alone() -> None:
    workers = [report("a"), report("b", model=OTHER), report("c", model=OTHER)]
    assert rank_workers("_.s", "demo", workers) == ["a"]
    assert rank_workers("_.s", "demo:shout", workers) == ["a"]
    assert sorted(rank_workers("_.s", "other", workers)) == ["b", "c"]
    assert rank_workers("_.s", "third", workers) == []


def test_the_default_model_and_a_name_of_two_files_are_those_of_most_workers() -> None:
    workers = [report("a"), report("b", model=TUNED), report("c", model=TUNED)]
    for name in (None, "demo"):
        assert sorted(rank_workers("_.s", name, workers)) == ["b", "c"]
        assert rank_workers("_.s", name, workers[:2]) == rank_workers("_.s", name, workers[1::-1])


def test_what_only_one_file_can_answer_goes_to_its_workers_however_few() -> None:
    workers = [report("a"), report("b", model=TUNED), report("c", model=TUNED)]
    assert rank_workers("_.s", None, workers, digest="d1") == ["a"]
    assert rank_workers("_.s", "demo", workers, digest="d3") == []
