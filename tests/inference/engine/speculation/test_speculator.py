import pytest

from services.contract.messages import Sampling
from services.inference.engine.backend import Chunk
from services.inference.engine.output.generated_answer import AnswerLimits, GeneratedAnswer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS
from services.inference.engine.scheduling.prefill_budget import PrefillBudget
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.engine.speculation.speculator import Speculator, with_drafts
from tests.inference.fake_backend import FakeBackend

TEXT = [*range(100)]
CPU = {1: 1.0, 2: 1.8, 4: 3.0, 8: 6.0, 16: 8.0, 32: 14.0, 64: 27.0}  # as measured, in tokens
GPU = {1: 1.0, 2: 1.0, 4: 1.1, 8: 1.1, 16: 1.2, 32: 1.3, 64: 1.6}
CONTEXT = 10_000
TOKEN_SECONDS = 0.05


def sequence(
    quoted: int, max_tokens: int = 1000, prompt: int = 200, is_deterministic: bool = False
) -> Sequence:
    """Return one whose answer has quoted the first `quoted` tokens of its prompt's text."""
    sampling = Sampling(max_tokens=max_tokens)
    answer = GeneratedAnswer(AnswerLimits(max_tokens), StopRules())
    answer.tokens += [1000, *TEXT[:quoted]]
    tokens = [*TEXT, *range(2000, 2000 + prompt - len(TEXT))]
    sampler = FakeBackend({}).sampler(sampling)
    return Sequence("a", tokens, sampling, sampler, answer, is_deterministic=is_deterministic)


def measured(costs: dict[int, float], streams: int = 1, context: int = CONTEXT) -> Speculator:
    speculator = Speculator(context)
    for size, cost in [*costs.items()] * 2:
        speculator.record(streams, size, cost * TOKEN_SECONDS)
    return speculator


def prefilling(tokens_per_second: float = 1000) -> PrefillBudget:
    budget = PrefillBudget()
    for _ in range(50):
        budget.record_prefill(500, 500 / tokens_per_second, is_interleaved=False)
    return budget


def length(speculator: Speculator, *sequences: Sequence, rate: float = 1000) -> list[int]:
    return [len(draft) for draft in speculator.drafts(list(sequences), prefilling(rate))]


def test_draft_has_the_tokens_that_followed_before() -> None:
    (draft,) = measured(CPU).drafts([sequence(40)], prefilling())
    assert draft == TEXT[40 : 40 + len(draft)]


def test_longer_matches_have_longer_drafts() -> None:
    assert [length(measured(CPU), sequence(n)) for n in (2, 3, 16, 60)] == [[], [], [15], [31]]


def test_draft_is_short_where_a_step_of_several_tokens_costs_little() -> None:
    assert length(measured(GPU), sequence(3)) > [3]
    assert length(measured(GPU), sequence(2)) == []


def test_nothing_is_drafted_where_it_never_pays() -> None:
    costs = {size: float(size) for size in CPU}
    assert length(measured(costs), sequence(80)) == []


def test_nothing_is_drafted_before_a_step_was_measured() -> None:
    assert length(Speculator(CONTEXT), sequence(40)) == []


def test_unmeasured_step_counts_as_decode_and_prefill() -> None:
    speculator = measured({1: 1.0})
    assert length(speculator, sequence(40), rate=1 / TOKEN_SECONDS) == []
    assert length(speculator, sequence(40), rate=100) > [7]


def test_step_that_turns_out_expensive_is_not_tried_again() -> None:
    speculator = measured({1: 1.0})
    tried = []
    while drafts := length(speculator, sequence(60), rate=200):
        tried.append(drafts[0] + 1)
        for _ in range(2):
            speculator.record(1, tried[-1], 40 * TOKEN_SECONDS)
    assert sorted(tried) == sorted(set(tried))


def test_draft_has_at_most_the_tokens_of_a_prefill_chunk() -> None:
    slow = DEFAULT_LIMITS.min_chunk_tokens / DEFAULT_LIMITS.max_chunk_seconds
    assert length(measured(GPU), sequence(60), rate=slow) == [15]


@pytest.mark.parametrize("left", [1, 2, 5, 10])
def test_draft_leaves_room_for_the_token_after_it(left: int) -> None:
    max_tokens = 41 + left
    assert length(measured(GPU), sequence(40, max_tokens)) == ([left - 1] if left > 1 else [])
    whole = measured(GPU, context=241 + left)
    assert sum(length(whole, sequence(40))) <= left


def test_several_streams_share_a_step() -> None:
    streams = [sequence(60), sequence(0), sequence(30)]
    assert length(measured(GPU, streams=3), *streams) == [15, 0, 15]
    costs = {size: 3 * cost for size, cost in CPU.items()} | {1: 2.3}
    assert length(measured(costs, streams=3), *streams) == [], "a stream has no draft"


def test_stream_without_a_draft_does_not_wait_long() -> None:
    streams = [sequence(60), sequence(0)]
    slow = {1: 1.8, 2: 1.9, 4: 4.0, 8: 4.1, 16: 4.2}
    assert length(measured(slow, streams=2), *streams) == [1, 0]
    assert length(measured(slow, streams=2), streams[0], sequence(60)) == [15, 15]


def test_stream_with_a_seed_has_no_drafts_beside_it() -> None:
    streams = [sequence(60), sequence(60, is_deterministic=True)]
    assert length(measured(GPU, streams=2), *streams) == []
    assert length(measured(GPU, streams=2), streams[0], sequence(60)) != []


def test_chunks_with_drafts_are_equally_long() -> None:
    chunks = [Chunk(slot, 5, [slot], None) for slot in range(3)]
    lengthened = with_drafts(chunks, [[7, 8], [], [9, 9, 9, 9]])
    assert [len(chunk.tokens) for chunk in lengthened] == [8, 8, 8]
    assert [chunk.tokens[:5] for chunk in lengthened] == [
        [0, 7, 8, 0, 0],
        [1, 0, 0, 0, 0],
        [2, 9, 9, 9, 9],
    ]
