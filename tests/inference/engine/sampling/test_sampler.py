"""The sampler on plain logits, compared with llama.cpp's own chain; and on the demo model."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest
from msgspec.structs import replace

from services.contract.errors import ServiceError
from services.contract.messages import Sampling, TokenLogprob
from services.inference.engine.backend import Chunk, ComputeFailure, SampledToken
from services.inference.engine.llama import Llama
from services.inference.engine.sampling.grammar import Vocabulary
from services.inference.engine.sampling.sampler import (
    GROUPS,
    Candidates,
    Logits,
    SamplerChain,
    likeliest,
)
from tests.inference.engine.demo import open_demo

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


def choose(sampling: Sampling, steps: int = 150) -> list[int]:
    sampler = SamplerChain(VOCABULARY, Candidates(SIZE), sampling)
    chosen = [sampler.choose(logits_of(step)) for step in range(steps)]
    sampler.close()
    return [choice.token for choice in chosen if isinstance(choice, SampledToken)]


def choose_by_llama_cpp(sampling: Sampling, steps: int = 150) -> list[int]:
    """Choose with llama.cpp's whole chain over the whole vocabulary."""
    given = (sampling.logit_bias or {}).items()
    bias = (llama_cpp.llama_logit_bias * len(given))(
        *(llama_cpp.llama_logit_bias(int(token), value) for token, value in given)
    )
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for part in (
        llama_cpp.llama_sampler_init_logit_bias(SIZE, len(bias), bias),
        llama_cpp.llama_sampler_init_penalties(
            SIZE,
            64,
            sampling.repeat_penalty or 1.0,
            sampling.frequency_penalty or 0.0,
            sampling.presence_penalty or 0.0,
        ),
        llama_cpp.llama_sampler_init_top_k(sampling.top_k or 0),
        llama_cpp.llama_sampler_init_top_p(sampling.top_p or 1.0, 1),
        llama_cpp.llama_sampler_init_min_p(sampling.min_p or 0.0, 1),
        llama_cpp.llama_sampler_init_temp(sampling.temperature or 0.0),
        llama_cpp.llama_sampler_init_dist(sampling.seed or 0),
    ):
        llama_cpp.llama_sampler_chain_add(chain, part)
    chosen = []
    data = np.zeros(SIZE, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    for step in range(steps):
        data["id"], data["logit"] = np.arange(SIZE), logits_of(step)
        pointer = data.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(data=pointer, size=SIZE, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        chosen.append(int(array.data[array.selected].id))
        llama_cpp.llama_sampler_accept(chain, chosen[-1])
    llama_cpp.llama_sampler_free(chain)
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
        {"logit_bias": {"17": 20.0, "4999": 19.0, "18": -100.0}},
    ],
    ids=str,
)
def test_choices_equal_those_of_llama_cpp_s_own_chain(more: dict[str, Any]) -> None:
    sampling = replace(CHAT, **more)
    assert choose(sampling) == choose_by_llama_cpp(sampling)


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
def test_tiny_sampling_values_still_choose_a_token(more: dict[str, Any]) -> None:
    assert len(choose(replace(CHAT, **more), 50)) == 50


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
