"""The chart's rule, in simulated time: it follows a step of load, and does not oscillate."""

from dataclasses import replace

import pytest

from bench import scaling
from bench.autoscaler import ScalingRule, Target

pytest.importorskip("helm_python", reason="no wheel of helm-python-sdk fits")


@pytest.fixture(scope="module")
def rule() -> ScalingRule:
    return scaling.rule_of_chart()


@pytest.mark.parametrize("seed", range(scaling.SEEDS))
def test_step_of_load_goes_from_one_to_three_and_back(rule: ScalingRule, seed: int) -> None:
    result = scaling.run_step(rule, seed)
    numbers = [1, *(number for _, number in result.changes)]
    top = numbers.index(3)
    assert numbers == sorted(numbers[: top + 1]) + [2, 1], result.changes
    up, down = result.changes[top - 1][0], result.changes[-1][0]
    assert up < scaling.STEP_AT + 90 and down < scaling.STEP_END + 900
    assert result.rejected == result.resumed == 0
    waits = result.waits(scaling.STEP_AT + 240, scaling.STEP_END)
    assert len(waits) > 1000 and waits[int(0.95 * len(waits))] < 1


@pytest.mark.parametrize("load", scaling.LOADS)
def test_steady_load_changes_workers_rarely(rule: ScalingRule, load: float) -> None:
    changes = [scaling.late_changes(scaling.run_steady(rule, load, n)) for n in range(4)]
    assert max(changes) <= 3, changes


def test_rule_without_a_cap_oscillates(rule: ScalingRule) -> None:
    """The control: the simulation shows oscillation where it is."""
    queue, busy = rule.targets
    uncapped = replace(rule, targets=(queue, Target(busy.metric, busy.average * 1.5)))
    changes = [scaling.late_changes(scaling.run_steady(uncapped, 0.7, seed)) for seed in range(4)]
    assert max(changes) > 5, changes
