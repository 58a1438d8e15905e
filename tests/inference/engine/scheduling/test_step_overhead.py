"""By a clock that goes on as the step that is computed costs."""

from collections.abc import Sequence

import pytest

from services.inference.engine.backend import BackendError, Choice, Chunk
from services.inference.engine.scheduling import step_overhead as measured
from services.inference.engine.scheduling.prefill_budget import CHUNK_MAX
from services.inference.engine.scheduling.step_overhead import fixed_cost
from tests.inference.fake_backend import FakeBackend


class Costly(FakeBackend):
    """A step takes `step` seconds and `token` for each of its tokens; the first one longer."""

    def __init__(self, step: float = 0.006, token: float = 0.00005) -> None:
        super().__init__({})
        self.now = 0.0
        self.can_be_cut = True
        self.fails_at = 1000
        self._step, self._token = step, token

    def monotonic(self) -> float:
        return self.now

    def decode(self, chunks: Sequence[Chunk]) -> Sequence[Choice | None]:
        self.now += self._step + self._token * sum(len(chunk.tokens) for chunk in chunks)
        self.now += 10 if not self.steps else 0
        chosen = super().decode(chunks)
        if len(self.steps) == self.fails_at:
            raise BackendError("in the middle")
        return chosen

    def cut(self, slot: int, length: int) -> bool:
        return super().cut(slot, length if self.can_be_cut else 0) and self.can_be_cut


@pytest.mark.parametrize(
    ("step", "token", "cost"),
    [(0.006, 0.00005, 120), (0.005, 0.0014, 4), (0, 0.001, 0), (0.006, 0, CHUNK_MAX)],
    ids=["a GPU", "a CPU", "tokens alone", "the step alone"],
)
@pytest.mark.parametrize("slots", [2, 16])
def test_it_is_told_in_tokens_that_take_as_long(
    monkeypatch: pytest.MonkeyPatch, step: float, token: float, cost: int, slots: int
) -> None:
    backend = Costly(step, token)
    monkeypatch.setattr(measured, "time", backend)
    assert fixed_cost(backend, slots) == cost
    check_empty(backend)


def test_it_is_none_where_there_is_one_slot() -> None:
    backend = Costly()
    assert fixed_cost(backend, 1) == 0
    assert not backend.steps


def test_it_is_none_where_a_sequence_can_not_be_cut() -> None:
    backend = Costly()
    backend.can_be_cut = False
    assert fixed_cost(backend, 4) == 0
    check_empty(backend)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_it_is_none_and_nothing_is_left_where_it_could_not_be_measured(fails_at: int) -> None:
    backend = Costly()
    backend.fails_at = fails_at
    assert fixed_cost(backend, 4) == 0
    check_empty(backend)


def check_empty(backend: Costly) -> None:
    assert [backend.length(slot) for slot in range(4)] == [0, 0, 0, 0]
