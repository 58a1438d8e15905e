from collections.abc import Awaitable, Callable

import pytest

from bench.pairs import interleave
from bench.report import Spread, ratio


def test_ratio_is_computed_within_each_pair() -> None:
    assert ratio([(1, 2), (30, 10), (4, 4)]) == Spread(1, 0.5, 3)


async def test_every_second_pair_runs_in_reverse_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    order = []

    def run(name: str, value: float) -> Callable[[], Awaitable[float]]:
        async def one() -> float:
            order.append(name)
            return value

        return one

    pairs = await interleave("load", [run("ours", 3), run("theirs", 2)], 2, lambda value: value)
    assert order == ["ours", "theirs", "theirs", "ours"]
    assert pairs == [(3, 2), (3, 2)]
    assert "load, pair 2 of 2: ratio **1.50**" in capsys.readouterr().err
