from services.inference.engine.speculation.step_costs import RELEARN_STEPS, SAMPLES, StepCosts


def test_cost_is_known_once_measured_twice() -> None:
    costs = StepCosts()
    costs.record(1, 8, 3.0)
    assert costs.seconds(1, 8) is None, "the first step may have loaded kernels"
    costs.record(1, 8, 0.3)
    assert costs.seconds(1, 8) == 0.3
    assert costs.seconds(2, 8) is None and costs.seconds(1, 4) is None


def test_cost_follows_the_machine() -> None:
    costs = StepCosts()
    for seconds in (0.1, 0.1, *[0.5] * SAMPLES):
        costs.record(1, 1, seconds)
    assert costs.seconds(1, 1) == 0.5


def test_cost_that_was_not_measured_for_long_is_forgotten() -> None:
    costs = StepCosts()
    for _ in range(2):
        costs.record(1, 8, 0.3)
    for _ in range(RELEARN_STEPS):
        costs.record(1, 1, 0.1)
    assert costs.seconds(1, 8) == 0.3
    costs.record(1, 1, 0.1)
    assert costs.seconds(1, 8) is None
    for _ in range(2):
        costs.record(1, 8, 0.9)
    assert costs.seconds(1, 8) == 0.9, "the old ones do not count"
