"""By a clock that goes on as the step that is computed costs."""

from collections.abc import Sequence

import pytest

from services.inference.engine import fixed_cost as measured
from services.inference.engine.backend import BackendError, Choice, Chunk
from services.inference.engine.fixed_cost import MOST, fixed_cost
from tests.inference.fake_backend import FakeBackend


class Costly(FakeBackend):
    """A step takes `step` seconds and `token` for each of its tokens; the first one longer."""

    def __init__(self, step: float, token: float, slots: int = 2) -> None:
        super().__init__({})
        self.now = 0.0
        self.can_be_cut = True
        self._step, self._token, self._slots = step, token, slots

    def monotonic(self) -> float:
        return self.now

    def decode(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        if len(chunks) > self._slots:
            raise BackendError("no such slot")
        self.now += self._step + self._token * sum(len(chunk.tokens) for chunk in chunks)
        self.now += 10 if not self.steps else 0
        return super().decode(chunks)

    def cut(self, slot: int, length: int) -> bool:
        return super().cut(slot, length if self.can_be_cut else 0) and self.can_be_cut


@pytest.mark.parametrize(
    ("step", "token", "cost"),
    [(0.006, 0.00005, 120), (0.005, 0.0014, 4), (0, 0.001, 0), (0.006, 0, MOST)],
    ids=["a GPU", "a CPU", "tokens alone", "the step alone"],
)
def test_it_is_told_in_tokens_that_take_as_long(
    monkeypatch: pytest.MonkeyPatch, step: float, token: float, cost: int
) -> None:
    backend = Costly(step, token)
    monkeypatch.setattr(measured, "time", backend)
    assert fixed_cost(backend) == cost
    assert backend.length(0) == backend.length(1) == 0


def test_it_is_none_where_a_second_prompt_has_no_slot() -> None:
    backend = Costly(1, 1, slots=1)
    assert fixed_cost(backend) == 0
    assert backend.length(0) == 0


def test_it_is_none_where_a_sequence_can_not_be_cut() -> None:
    backend = Costly(1, 1)
    backend.can_be_cut = False
    assert fixed_cost(backend) == 0
    assert backend.length(0) == backend.length(1) == 0
