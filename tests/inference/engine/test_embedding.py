"""The engine of embedding models, with a fake model that records its batches."""

from collections.abc import Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest

from services.inference.engine.backend import MAX_BATCH_TOKENS, BackendError
from services.inference.engine.embedding import (
    MAX_BATCH_INPUTS,
    EmbeddingEngine,
    EngineStopped,
    Rows,
    Tokens,
    normalize,
)
from tests.inference.fake_embedder import FakeEmbedder


class RecordingEmbedder(FakeEmbedder):
    """Gives an input its first token and its length, and fails for the token 666."""

    def __init__(self) -> None:
        super().__init__(width=2)
        self.batches: list[list[int]] = []  # lengths of the inputs

    def embed(self, inputs: Sequence[Tokens]) -> Rows:
        self.batches.append([len(tokens) for tokens in inputs])
        if any(tokens[0] == 666 for tokens in inputs):
            raise BackendError("It failed.")
        if any(tokens[0] == 13 for tokens in inputs):
            raise ZeroDivisionError
        return np.array([(tokens[0], len(tokens)) for tokens in inputs], np.float32)


def engine(embedder: RecordingEmbedder) -> EmbeddingEngine:
    return EmbeddingEngine(embedder, on_death=lambda: None)


def test_rows_are_in_the_order_of_the_inputs() -> None:
    embedder = RecordingEmbedder()
    engine_ = engine(embedder)
    result = engine_.submit("ann", [[7] * 5, [8], [9] * 3])
    engine_.step()
    assert result.result(0).tolist() == [[7, 5], [8, 1], [9, 3]]
    assert embedder.batches == [[1, 3, 5]]
    assert engine_.throughput.tokens_per_second > 0


def test_batch_is_filled_up_to_its_tokens() -> None:
    embedder = RecordingEmbedder()
    engine_ = engine(embedder)
    third = MAX_BATCH_TOKENS // 3
    result = engine_.submit("ann", [[1] * third] * 4 + [[2] * (MAX_BATCH_TOKENS + 9), [3]])
    assert engine_.waiting_tokens == 4 * third + MAX_BATCH_TOKENS + 10
    for _ in range(3):
        engine_.step()
    assert embedder.batches == [[1, third, third, third], [third], [MAX_BATCH_TOKENS + 9]]
    assert result.done() and engine_.waiting_tokens == 0


def test_batch_has_at_most_64_inputs() -> None:
    embedder = RecordingEmbedder()
    engine_ = engine(embedder)
    engine_.submit("ann", [[1]] * (MAX_BATCH_INPUTS + 1))
    engine_.step(), engine_.step()
    assert [len(batch) for batch in embedder.batches] == [MAX_BATCH_INPUTS, 1]


def test_callers_take_turns() -> None:
    engine_ = engine(RecordingEmbedder())
    long = engine_.submit("ann", [[1] * 200] * 10)
    short = engine_.submit("ann", [[2]])
    engine_.step()
    assert short.done() and not long.done()


def test_tenants_share_batches_whatever_they_wait_for() -> None:
    embedder = RecordingEmbedder()
    engine_ = engine(embedder)
    flood = [engine_.submit("ann", [[1] * 100] * 10) for _ in range(20)]
    other = engine_.submit("bob", [[2] * 50] * 16)
    short = engine_.submit("bob", [[2]])
    steps = 0
    while not other.done():
        engine_.step()
        steps += 1
    assert short.done() and not any(job.done() for job in flood)
    assert sum(map(sum, embedder.batches)) < 2 * 16 * 50 + MAX_BATCH_TOKENS and steps <= 4


def test_failed_batch_fails_its_requests_only() -> None:
    engine_ = engine(RecordingEmbedder())
    failing = engine_.submit("ann", [[666] * 400, [1] * 400])
    other = engine_.submit("ann", [[2] * 500])
    for _ in range(2):
        engine_.step()
    with pytest.raises(BackendError, match="It failed"):
        failing.result(0)
    assert other.result(0).tolist() == [[2, 500]]


def test_rows_that_are_no_numbers_are_an_error() -> None:
    class Broken(RecordingEmbedder):
        def embed(self, inputs: Sequence[Tokens]) -> Rows:
            return np.full((len(inputs), 2), np.nan, np.float32)

    engine_ = engine(Broken())
    result = engine_.submit("ann", [[1]])
    engine_.step()
    with pytest.raises(BackendError, match="no numbers"):
        result.result(0)


def test_cancelled_request_is_not_computed() -> None:
    embedder = RecordingEmbedder()
    engine_ = engine(embedder)
    cancelled, other = engine_.submit("ann", [[1]]), engine_.submit("ann", [[2] * 2])
    cancelled.cancel()
    engine_.step()
    assert embedder.batches == [[2]] and other.done()
    with pytest.raises(CancelledError):
        cancelled.result(0)


def test_request_cancelled_between_batches_ends_quietly() -> None:
    engine_ = engine(RecordingEmbedder())
    cancelled, other = engine_.submit("ann", [[1] * 400] * 2), engine_.submit("ann", [[2] * 400])
    engine_.step()
    cancelled.cancel()
    engine_.step()
    assert other.done()


def test_closed_engine_fails_what_waits_and_what_comes() -> None:
    engine_ = engine(RecordingEmbedder())
    waiting = engine_.submit("ann", [[1]])
    engine_.start()
    waiting.result(10)
    engine_.close()
    with pytest.raises(EngineStopped):
        engine_.submit("ann", [[1]]).result(0)


def test_dead_engine_fails_all_requests() -> None:
    deaths: list[int] = []
    engine_ = EmbeddingEngine(RecordingEmbedder(), on_death=lambda: deaths.append(1))
    results = [engine_.submit("ann", [[13] * 400]), engine_.submit("ann", [[1] * 400])]
    engine_.start()
    for result in results:
        with pytest.raises(EngineStopped):
            result.result(10)
    engine_.close()
    assert deaths == [1]


def test_normalized_rows_have_length_1_also_when_cut() -> None:
    rows = np.array([[3, 4, 12], [0, 0, 0], [1e-30, 0, 0]], np.float32)
    assert np.allclose(normalize(rows)[0], [3 / 13, 4 / 13, 12 / 13])
    assert normalize(rows, 2)[0].tolist() == pytest.approx([0.6, 0.8])
    assert normalize(rows)[1].tolist() == [0, 0, 0]
    assert normalize(rows)[2].tolist() == [1, 0, 0]
    assert normalize(rows).dtype == np.float32
