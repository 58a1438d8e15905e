from collections.abc import Callable, Sequence

import pytest

from services.inference.engine.backend import MAX_BATCH_TOKENS, BackendError, Chunk, SampleResult
from services.inference.engine.scheduling.step_overhead import measure_step_overhead
from tests.inference.fake_backend import FakeBackend


class TimedBackend(FakeBackend):
    """
    Has a clock, on which a step takes `step` seconds and `token` for each token; the first one 10
    seconds more.
    """

    def __init__(
        self, step: float = 0.006, token: float = 0.00005, window: int | None = None
    ) -> None:
        super().__init__({}, window=window)
        self.now = 0.0
        self.fails_at = 1000
        self._step, self._token = step, token

    def clock(self) -> float:
        return self.now

    def decode(
        self,
        chunks: Sequence[Chunk],
        meanwhile: Callable[[], object] = lambda: None,
        padding: Sequence[Chunk] = (),
    ) -> Sequence[SampleResult | None]:
        self.now += self._step + self._token * sum(len(chunk.tokens) for chunk in chunks)
        self.now += 10 if not self.steps else 0
        chosen = super().decode(chunks, meanwhile, padding)
        if len(self.steps) == self.fails_at:
            raise BackendError("in the middle")
        return chosen


@pytest.mark.parametrize(
    ("step", "token", "overhead"),
    [(0.006, 0.00005, 120), (0.005, 0.0014, 4), (0, 0.001, 0), (0.006, 0, MAX_BATCH_TOKENS)],
    ids=["a GPU", "a CPU", "tokens alone", "the step alone"],
)
@pytest.mark.parametrize("slots", [2, 16])
def test_overhead_is_measured_in_prompt_tokens(
    step: float, token: float, overhead: int, slots: int
) -> None:
    backend = TimedBackend(step, token)
    assert measure_step_overhead(backend, slots, backend.clock) == overhead
    check_empty(backend)


def test_overhead_is_zero_with_one_slot() -> None:
    backend = TimedBackend()
    assert measure_step_overhead(backend, 1) == 0
    assert not backend.steps


def test_overhead_is_zero_without_truncation() -> None:
    backend = TimedBackend(window=0)
    assert measure_step_overhead(backend, 4) == 0
    check_empty(backend)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_overhead_is_zero_and_slots_empty_after_failed_step(fails_at: int) -> None:
    backend = TimedBackend()
    backend.fails_at = fails_at
    assert measure_step_overhead(backend, 4) == 0
    check_empty(backend)


def check_empty(backend: TimedBackend) -> None:
    assert [backend.length(slot) for slot in range(4)] == [0, 0, 0, 0]
