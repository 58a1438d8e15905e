"""The floods, and what a row of the table says. The campaign itself needs minutes."""

import json
from collections import Counter

import pytest

from bench.fairness import FLOODS, Flood, Row
from services.contract.prompts import MAX_CONVERSATION_BYTES


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.name)
def test_requests_of_a_flood_fit_and_differ(flood: Flood) -> None:
    bodies = {json.dumps(flood.body()) for _ in range(3)}
    assert len(bodies) == 3 or "messages" in flood.name
    assert max(map(len, bodies)) <= MAX_CONVERSATION_BYTES


@pytest.mark.parametrize(("beside", "is_met"), [([0.1, 0.5, 9.0], True), ([0.6], False)])
def test_bar_is_twice_alone_plus_an_answer(beside: list[float], is_met: bool) -> None:
    row = Row(FLOODS[0], alone=0.1, beside=beside, failed=1, answer=0.3, statuses=Counter("x"))
    assert row.bar == pytest.approx(0.5) and row.is_met is is_met
    assert f"{1000 * sorted(beside)[len(beside) // 2]:.0f}" in str(row)


def test_bar_is_not_met_without_an_answer() -> None:
    assert not Row(FLOODS[0], 0.1, [], 3, 0.3, Counter()).is_met
