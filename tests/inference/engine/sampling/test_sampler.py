"""The sampler on plain logits, compared with llama.cpp's own chain; and on the demo model."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import eq
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from services.contract.errors import ServiceError
from services.contract.messages import Sampling, TokenLogprob
from services.inference.engine.backend import Chunk, ComputeFailure, SampledToken
from services.inference.engine.llama import Llama
from services.inference.engine.sampling.candidates import GROUPS, Candidates, Logits, likeliest
from services.inference.engine.sampling.grammar import Vocabulary
from services.inference.engine.sampling.penalties import Dry
from services.inference.engine.sampling.sampler import SamplerChain
from tests.inference.engine.demo import open_demo
from tests.inference.engine.sampling.llama_cpp_chain import LlamaCppChain
from tests.inference.vocabulary import VocabularyBackend, load_vocabulary

CREATIVE = Sampling(temperature=1.5, top_p=1.0, top_k=0)
CHAT = Sampling(temperature=0.8, top_p=0.9, top_k=40, repeat_penalty=1.1, seed=11)
SIZE = 5_000  # more than GROUPS, and no multiple of it
VOCABULARY = Vocabulary([b"%d " % token for token in range(SIZE)], frozenset([0]))


@pytest.fixture(scope="module")
def demo_model() -> Iterator[Llama]:
    llama = open_demo(context=128, parallel=1)
    yield llama
    llama.close()


def generate(demo_model: Llama, sampling: Sampling, length: int = 16) -> list[int]:
    sampler = demo_model.sampler(sampling)
    demo_model.truncate(0, 0)
    chosen_tokens: list[int] = []
    tokens, position = demo_model.tokenize("<|im_start|>user\n", special=True), 0
    for _ in range(length):
        (chosen,) = demo_model.decode([Chunk(0, position, tokens, sampler)])
        assert isinstance(chosen, SampledToken)
        position += len(tokens)
        tokens = [chosen.token]
        chosen_tokens.append(chosen.token)
    sampler.close()
    return chosen_tokens


def logits_of(step: int, spread: float = 4.0) -> Logits:
    """Return logits with tokens that stay likely for some steps, so that penalties matter."""
    steady = np.random.default_rng(step // 20).normal(0, spread, SIZE)
    return (steady + np.random.default_rng(step).normal(0, 0.3, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def words() -> VocabularyBackend:
    """A vocabulary of llama.cpp; the tokens of VOCABULARY have their texts in it."""
    return load_vocabulary("gpt-2")


def chain_of(
    sampling: Sampling,
    words: VocabularyBackend,
    candidates: Candidates,
    prompt: Sequence[int] = (),
) -> SamplerChain:
    has_dry = sampling.dry_multiplier and not sampling.mirostat
    dry = Dry(words._vocab, candidates, sampling, prompt, 10_000) if has_dry else None
    return SamplerChain(VOCABULARY, candidates, sampling, dry=dry)


def choose(
    sampling: Sampling, words: VocabularyBackend, steps: int = 150, prompt: Sequence[int] = ()
) -> list[int]:
    sampler = chain_of(sampling, words, Candidates(SIZE), prompt)
    chosen = [sampler.choose(logits_of(step)) for step in range(steps)]
    sampler.close()
    return [choice.token for choice in chosen if isinstance(choice, SampledToken)]


def choose_by_llama_cpp(
    sampling: Sampling, words: VocabularyBackend, steps: int = 150, prompt: Sequence[int] = ()
) -> list[int]:
    """Choose with llama.cpp's whole chain over the whole vocabulary."""
    chain = LlamaCppChain(sampling, words._vocab, SIZE)
    for token in prompt:
        chain.accept(token)
    chosen = []
    for step in range(steps):
        chosen.append(chain.choose(logits_of(step)))
        chain.accept(chosen[-1])
    chain.close()
    return chosen


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"top_k": 1},
        {"top_k": 0},
        {"top_k": 1000},
        {"top_p": 1.0},
        {"temperature": 2.0, "top_k": 300, "top_p": 1.0},
        {"temperature": 0.0},
        {"repeat_penalty": 1.0},
        {"repeat_penalty": 3.0},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7, "presence_penalty": -0.5},
        {"repeat_penalty": 1.0, "frequency_penalty": -2.0},
        {"min_p": 0.2, "top_p": 1.0},
        {"min_p": 0.05, "top_k": 0, "temperature": 1.5},
        {"repeat_last_n": 3},
        {"repeat_last_n": 0},
        {"repeat_last_n": -1, "frequency_penalty": 0.3},
        {"dry_multiplier": 3.0, "dry_allowed_length": 1, "dry_base": 2.0},
        {"dry_multiplier": 3.0, "dry_allowed_length": 0, "dry_penalty_last_n": -1},
        {"dry_multiplier": 3.0, "dry_allowed_length": 0, "dry_sequence_breakers": ("e", "the")},
        {"dry_multiplier": 100.0, "dry_allowed_length": 0, "temperature": 0.0},
        {"top_n_sigma": 1.0},
        {"top_n_sigma": 3.5, "top_k": 0, "top_p": 1.0},
        {"typical_p": 0.5},
        {"typical_p": 0.9, "top_k": 0, "top_p": 1.0},
        {"typical_p": 0.2, "min_keep": 4},
        {"min_keep": 5, "top_p": 0.1, "min_p": 0.5},
        {"xtc_probability": 1.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.02, "min_keep": 3},
        {"dynatemp_range": 0.4},
        {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0, "top_k": 0, "temperature": 1.0},
        {"mirostat": 2, "temperature": 0.0},
        {"logit_bias": {"17": 20.0, "4999": 19.0, "18": -100.0}},
    ],
    ids=str,
)
def test_choices_equal_those_of_llama_cpp_s_own_chain(
    more: dict[str, Any], words: VocabularyBackend
) -> None:
    sampling = replace(CHAT, **more)
    assert choose(sampling, words) == choose_by_llama_cpp(sampling, words)


@pytest.mark.parametrize("seed", range(60))
def test_choices_by_random_settings_equal_those_of_llama_cpp(
    seed: int, words: VocabularyBackend
) -> None:
    sampling = random_sampling(random.Random(seed))
    # llama.cpp's other penalties apply to the prompt as well, ours don't
    prompt = [4, 2, 4, 2, 4] if sampling.dry_multiplier else []
    ours = choose(sampling, words, 60, prompt)
    assert ours == choose_by_llama_cpp(sampling, words, 60, prompt)


def random_sampling(dice: random.Random) -> Sampling:
    """Return settings of some samplers, in combinations that llama.cpp can compute."""
    settings: list[dict[str, Any]] = [
        {"repeat_penalty": dice.uniform(1, 2), "repeat_last_n": dice.choice([-1, 5, 64])},
        {"presence_penalty": dice.uniform(0, 2), "frequency_penalty": dice.uniform(0, 1)},
        {"top_n_sigma": dice.uniform(0.5, 4)},
        {"top_k": dice.choice([0, 5, 300, 1000])},
        {"typical_p": dice.uniform(0.1, 1)},
        {"top_p": dice.uniform(0.1, 1)},
        {"min_p": dice.uniform(0.01, 0.3), "min_keep": dice.randint(0, 9)},
        {"xtc_probability": 1.0, "xtc_threshold": dice.uniform(0.01, 0.6)},
        {"dynatemp_range": dice.uniform(0.1, 2), "dynatemp_exponent": dice.uniform(0.5, 3)},
        {"dry_multiplier": dice.uniform(0.5, 5), "dry_allowed_length": dice.randint(0, 2)},
    ]
    chosen = dice.sample(settings, 4)
    fields = {name: value for each in chosen for name, value in each.items()}
    if "top_n_sigma" in fields:  # llama.cpp's entropy of its excluded tokens is NaN, or wrong
        fields.pop("typical_p", None)
        fields.pop("dynatemp_range", None)
    if "repeat_penalty" in fields or "presence_penalty" in fields:
        fields.pop("dry_multiplier", None)  # which applies to the prompt, in contrast to them
    return Sampling(temperature=dice.uniform(0.3, 2), seed=dice.randrange(1000), **fields)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("more", [{}, {"mirostat_tau": 7.0, "mirostat_eta": 0.2}], ids=str)
def test_mirostat_chooses_like_llama_cpp(
    version: int, more: dict[str, Any], words: VocabularyBackend
) -> None:
    """Almost: a probability may round to the other side of a bound."""
    sampling = replace(CHAT, temperature=1.5, mirostat=version, **more)
    ours, theirs = choose(sampling, words), choose_by_llama_cpp(sampling, words)
    assert sum(map(eq, ours, theirs)) > 0.95 * len(theirs) == 0.95 * 150


@pytest.mark.parametrize("probability", [0.2, 0.7])
def test_xtc_draws_from_the_distribution_of_llama_cpp(
    probability: float, words: VocabularyBackend
) -> None:
    likely = np.full(SIZE, -20, np.float32)
    likely[[3, 5, 7, 9]] = 3.0, 2.5, 2.0, -1.0
    sampling = Sampling(temperature=1.0, top_k=40, top_p=1.0, xtc_probability=probability)
    count, ours, theirs = 3000, Counter[int](), Counter[int]()
    chain = LlamaCppChain(replace(sampling, seed=1), words._vocab, SIZE)
    sampler = SamplerChain(VOCABULARY, Candidates(SIZE), replace(sampling, seed=2))
    for _ in range(count):
        chosen = sampler.choose(likely.copy())
        assert isinstance(chosen, SampledToken)
        ours[chosen.token] += 1
        theirs[chain.choose(likely)] += 1
    chain.close()
    sampler.close()
    assert all(abs(ours[token] - theirs[token]) < 0.05 * count for token in (3, 5, 7, 9))
    assert abs(ours[3] / count - 0.5 * (1 - probability)) < 0.05  # else it is excluded


ALL_SAMPLERS: list[dict[str, Any]] = [
    {"repeat_last_n": -1, "presence_penalty": 1.0},
    {"dry_multiplier": 5.0, "dry_allowed_length": 0},
    {"top_n_sigma": 1.0},
    {"typical_p": 0.5},
    {"xtc_probability": 0.5},
    {"dynatemp_range": 0.8},
    {"mirostat": 1},
    {"mirostat": 2},
    {"min_tokens": 100},
    {"ignore_eos": True},
]


def test_chains_that_share_candidates_choose_as_alone(words: VocabularyBackend) -> None:
    samplings = [replace(CHAT, seed=seed, **more) for seed, more in enumerate(ALL_SAMPLERS)]
    candidates = Candidates(SIZE)
    chains = [chain_of(sampling, words, candidates) for sampling in samplings]
    steps = [[chain.choose(logits_of(step)) for chain in chains] for step in range(40)]
    for sampling, chain, chosen in zip(samplings, chains, zip(*steps, strict=True), strict=True):
        chain.close()
        assert [choice.token for choice in chosen if isinstance(choice, SampledToken)] == choose(
            sampling, words, 40
        )


@pytest.mark.parametrize("more", ALL_SAMPLERS, ids=str)
def test_sampler_changes_some_choices(more: dict[str, Any], words: VocabularyBackend) -> None:
    sampling = replace(CHAT, temperature=1.5, top_p=1.0, top_k=0)
    if "min_tokens" in more or "ignore_eos" in more:
        sampling = replace(sampling, logit_bias={"0": 12.0})
    assert choose(sampling, words) != choose(replace(sampling, **more), words)


@pytest.mark.parametrize("more", [*ALL_SAMPLERS[2:8], {"xtc_probability": 1.0}], ids=str)
def test_temperature_0_is_greedy_with_each_sampler(
    more: dict[str, Any], words: VocabularyBackend
) -> None:
    greedy = replace(CHAT, temperature=0.0, repeat_penalty=1.0)
    assert choose(replace(greedy, **more), words) == choose(greedy, words)


@pytest.mark.parametrize("more", [{"min_tokens": 30}, {"ignore_eos": True}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_is_excluded_before_min_tokens(
    more: dict[str, Any], temperature: float, words: VocabularyBackend
) -> None:
    """Even if the request makes it the likeliest token."""
    sampling = replace(CHAT, temperature=temperature, logit_bias={"0": 100.0})
    chosen = choose(replace(sampling, **more), words, 60)
    assert 0 not in chosen[:30]
    assert (0 in chosen[30:31]) == ("min_tokens" in more)
    assert choose(sampling, words, 1) == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_forbidden_token_is_not_chosen(temperature: float, words: VocabularyBackend) -> None:
    sampler = chain_of(Sampling(temperature=temperature, seed=1), words, Candidates(SIZE))
    logits = logits_of(0)
    logits[7] = 100.0
    for forbidden, is_chosen in ((None, True), (7, False), (None, True)):
        sampler.forbid(forbidden)
        chosen = sampler.choose(logits.copy())
        assert isinstance(chosen, SampledToken) and (chosen.token == 7) == is_chosen
    sampler.close()


def test_dynamic_temperature_of_a_certain_token_takes_it(words: VocabularyBackend) -> None:
    """llama.cpp's own sampler divides by almost 0 there and takes the least likely candidate."""
    for gap in range(20, 101):
        sampling = Sampling(temperature=0.5, dynatemp_range=0.5, dynatemp_exponent=3.0, seed=1)
        logits = np.full(SIZE, -50, np.float32)
        logits[[7, 8]] = 50.0, 50.0 - gap
        sampler = SamplerChain(VOCABULARY, Candidates(SIZE), sampling)
        chosen = sampler.choose(logits)
        sampler.close()
        assert isinstance(chosen, SampledToken) and chosen.token == 7


def test_typical_survives_impossible_tokens(words: VocabularyBackend) -> None:
    """llama.cpp's entropy of candidates with a probability of 0 is NaN."""
    sampling = Sampling(temperature=1.0, typical_p=0.5, seed=1, logit_bias={"9": -100.0})
    plain = replace(sampling, logit_bias=None)
    assert choose(sampling, words, 50) == choose(plain, words, 50)


def test_likeliest_finds_the_highest_logits_of_any_vocabulary() -> None:
    for size in (1, 5, GROUPS - 1, GROUPS, 2 * GROUPS, 2 * GROUPS + 1, 49_152):
        for count in (1, 40, 1000):
            logits = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
            found = likeliest(logits, count)
            best = np.sort(logits)[::-1][:count]
            assert np.array_equal(np.sort(logits[found])[::-1][: len(best)], best)


def test_likeliest_returns_few_tokens_more_than_asked() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 49_152).astype(np.float32)
    assert 40 <= len(likeliest(logits, 40)) < 60


def test_likeliest_excludes_logits_of_minus_infinity() -> None:
    logits = np.full(SIZE, -np.inf, np.float32)
    logits[[7, 4_999]] = 1.0
    assert list(likeliest(logits, 40)) == [7, 4_999]


@pytest.mark.parametrize("top_k", [0, 40])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_without_numbers_give_no_token(top_k: int, temperature: float) -> None:
    sampling = replace(CHAT, top_k=top_k, temperature=temperature)
    sampler = SamplerChain(VOCABULARY, Candidates(SIZE), sampling)
    for nothing in (np.nan, -np.inf):
        choice = sampler.choose(np.full(SIZE, nothing, np.float32))
        assert isinstance(choice, ComputeFailure) and "NaN" in choice.message
    sampler.close()


@pytest.mark.parametrize(
    "more",
    [
        {"repeat_penalty": 1e-300},
        {"temperature": 1e-300},
        {"temperature": 1e-40},
        {"top_p": 1e-300},
    ],
    ids=str,
)
def test_tiny_sampling_values_still_choose_a_token(
    more: dict[str, Any], words: VocabularyBackend
) -> None:
    assert len(choose(replace(CHAT, **more), words, 50)) == 50


def test_logprob_ignores_bias_and_temperature() -> None:
    sampling = replace(CHAT, logprobs=5, logit_bias={"17": 100.0}, temperature=0.1)
    sampler = SamplerChain(VOCABULARY, Candidates(SIZE), sampling)
    logits = logits_of(0)
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    chosen = sampler.choose(logits.copy())
    sampler.close()
    assert isinstance(chosen, SampledToken) and isinstance(chosen.logprob, TokenLogprob)
    assert (chosen.token, chosen.logprob.id, chosen.logprob.text) == (17, 17, "17 ")
    assert chosen.logprob.bytes == tuple(b"17 ")
    assert chosen.logprob.logprob == pytest.approx(expected[17], abs=1e-4)
    assert [c.id for c in chosen.logprob.top] == list(np.argsort(-logits)[:5])
    assert [c.logprob for c in chosen.logprob.top] == pytest.approx(
        sorted(expected)[::-1][:5], abs=1e-4
    )


def test_probabilities_add_up_to_one() -> None:
    vocabulary = Vocabulary([b"a"] * 15, frozenset())
    sampler = SamplerChain(vocabulary, Candidates(15), replace(CHAT, logprobs=20))
    logits = np.linspace(-500, 300, 15, dtype=np.float32)
    logits[0] = -np.inf
    chosen = sampler.choose(logits)
    sampler.close()
    assert isinstance(chosen, SampledToken) and chosen.logprob is not None
    assert sum(math.exp(c.logprob) for c in chosen.logprob.top) == pytest.approx(1)
    assert chosen.logprob.top[-1].logprob == -9999.0


def test_logprobs_are_returned_only_if_requested() -> None:
    for logprobs in (None, 0):
        sampler = SamplerChain(VOCABULARY, Candidates(SIZE), replace(CHAT, logprobs=logprobs))
        chosen = sampler.choose(logits_of(0))
        sampler.close()
        assert isinstance(chosen, SampledToken) and (chosen.logprob is None) == (logprobs is None)
        assert chosen.logprob is None or chosen.logprob.top == ()


def test_bias_for_an_unknown_token_is_rejected(demo_model: Llama) -> None:
    last = len(demo_model._vocabulary) - 1
    demo_model.sampler(Sampling(logit_bias={str(last): 1.0})).close()
    with pytest.raises(ServiceError, match=f"token {last + 1}.*is {last}") as error:
        demo_model.sampler(Sampling(logit_bias={str(last + 1): 1.0}))
    assert error.value.code == "invalid_request"


def test_seed_determines_the_answer(demo_model: Llama) -> None:
    first = generate(demo_model, replace(CREATIVE, seed=7))
    assert generate(demo_model, replace(CREATIVE, seed=7)) == first
    assert any(generate(demo_model, replace(CREATIVE, seed=seed)) != first for seed in range(5))


def test_answers_differ_without_a_seed(demo_model: Llama) -> None:
    assert len({tuple(generate(demo_model, CREATIVE)) for _ in range(5)}) > 1


def test_temperature_0_is_greedy(demo_model: Llama) -> None:
    greedy = generate(demo_model, Sampling(temperature=0))
    assert generate(demo_model, Sampling(temperature=0)) == greedy
    assert generate(demo_model, Sampling(temperature=1.5, top_k=1)) == greedy


def test_repeat_penalty_reduces_repetition(demo_model: Llama) -> None:
    plain = generate(demo_model, Sampling(temperature=0, repeat_penalty=1.0), 48)
    penalised = generate(demo_model, Sampling(temperature=0, repeat_penalty=10.0), 48)
    assert len(set(penalised)) > len(set(plain))


def test_banned_token_is_not_generated(demo_model: Llama) -> None:
    greedy = generate(demo_model, Sampling(temperature=0))
    banned = str(greedy[0])
    answer = generate(demo_model, Sampling(temperature=0, logit_bias={banned: -100.0}))
    assert greedy[0] not in answer
