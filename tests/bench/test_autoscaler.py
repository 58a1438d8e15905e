from dataclasses import replace

import pytest

from bench.autoscaler import Autoscaler, Pace, ScalingRule, Target

QUEUE, BUSY = "finetunellm_queued_seconds", "vllm:num_requests_running"
RULE = ScalingRule(
    targets=(Target(QUEUE, 10), Target(BUSY, 4, is_capped=True)),
    min_workers=1,
    max_workers=5,
    up=Pace(0, 2, 60),
    down=Pace(300, 1, 60),
)
SCALED_OBJECT = {
    "spec": {
        "minReplicaCount": 1,
        "maxReplicaCount": 5,
        "triggers": [
            {"metadata": {"threshold": "10", "query": f'max({QUEUE}{{model_name="a"}})'}},
            {
                "metadata": {
                    "threshold": "4",
                    "query": f"clamp_max(max({BUSY}{{}}), 4 * scalar(max(slots{{}})))",
                }
            },
        ],
        "advanced": {
            "horizontalPodAutoscalerConfig": {
                "behavior": {
                    "scaleUp": {
                        "stabilizationWindowSeconds": 0,
                        "policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}],
                    },
                    "scaleDown": {
                        "stabilizationWindowSeconds": 300,
                        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
                    },
                }
            }
        },
    }
}


def test_rule_is_read_from_a_scaled_object() -> None:
    assert ScalingRule.of(SCALED_OBJECT) == RULE


@pytest.mark.parametrize(
    ("workers", "queued", "running", "wanted"),
    [
        (1, 0, 0, 1),
        (1, 10, 0, 1),
        (1, 10.9, 0, 1),  # within the tolerance
        (1, 11.1, 0, 2),
        (1, 21, 0, 3),
        (1, 500, 0, 3),  # two more in a minute
        (3, 500, 24, 5),
        (2, 0, 16, 2),  # busy slots add no worker
        (2, 0, 5, 2),
        (2, 15, 16, 2),
    ],
)
def test_worker_count_follows_the_queue(
    workers: int, queued: float, running: float, wanted: int
) -> None:
    assert Autoscaler(RULE).decide(0, workers, {QUEUE: queued, BUSY: running}) == wanted


def test_one_worker_leaves_after_the_window_and_a_minute_each() -> None:
    scaler, workers, changes = Autoscaler(RULE), 3, []
    for now in range(0, 600, 15):
        figures = {QUEUE: 0.0 if now else 30.0, BUSY: 0.0}
        wanted = scaler.decide(now, workers, figures)
        if wanted != workers:
            changes.append((now, wanted))
        workers = wanted
    assert changes == [(315, 2), (375, 1)]


def test_busy_slots_keep_the_workers_that_need_them() -> None:
    scaler = Autoscaler(replace(RULE, down=Pace(0, 1, 60)))
    assert scaler.decide(0, 3, {QUEUE: 0, BUSY: 9}) == 3
    assert scaler.decide(15, 3, {QUEUE: 0, BUSY: 8}) == 2
    assert scaler.decide(90, 2, {QUEUE: 0, BUSY: 5}) == 2
    assert scaler.decide(105, 2, {QUEUE: 0, BUSY: 4}) == 1


def test_without_a_figure_no_worker_leaves() -> None:
    scaler = Autoscaler(replace(RULE, down=Pace(0, 1, 60)))
    assert scaler.decide(0, 3, {}) == 3
    assert scaler.decide(15, 3, {BUSY: 0}) == 3
    assert scaler.decide(30, 3, {QUEUE: 45}) == 5
    assert scaler.decide(45, 3, {QUEUE: 0, BUSY: 0}) == 2


def test_limits_hold_whatever_is_wanted() -> None:
    scaler = Autoscaler(replace(RULE, min_workers=2, up=Pace(0, 9, 60), down=Pace(0, 9, 60)))
    assert scaler.decide(0, 3, {QUEUE: 1e9, BUSY: 0}) == 5
    assert scaler.decide(15, 5, {QUEUE: 0, BUSY: 0}) == 2


def test_growth_is_paced_over_the_period() -> None:
    scaler, numbers, workers = Autoscaler(replace(RULE, max_workers=9)), [], 1
    for now in range(0, 135, 15):
        workers = scaler.decide(now, workers, {QUEUE: 1e9, BUSY: 0})
        numbers.append(workers)
    assert numbers == [3, 3, 3, 3, 5, 5, 5, 5, 7]
