"""The sampler on plain logits, held against llama.cpp's own full chain; and on the demo model."""

from __future__ import annotations  # llama_cpp has its pointer types for type checkers only

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
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

CREATIVE = Sampling(temperature=1.5, top_p=1.0, top_k=0)
CHAT = Sampling(temperature=0.8, top_p=0.9, top_k=40, repeat_penalty=1.1, seed=11)
SIZE = 5_000  # more than the groups that candidates are found by, and no multiple of them
VOCABULARY = Vocabulary([b"%d " % token for token in range(SIZE)], frozenset([0]))


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    llama = Llama(
        Path("model/demo.gguf"),
        context=128,
        parallel=1,
        threads=1,
        gpu_layers=0,
        on_progress=lambda _: True,
    )
    yield llama
    llama.close()


def write(llama: Llama, sampling: Sampling, length: int = 16) -> list[int]:
    sampler = llama.sampler(sampling)
    llama.truncate(0, 0)
    said: list[int] = []
    tokens, position = llama.tokenize("<|im_start|>user\n", special=True), 0
    for _ in range(length):
        (chosen,) = llama.decode([Chunk(0, position, tokens, sampler)])
        assert isinstance(chosen, SampledToken)
        position += len(tokens)
        tokens = [chosen.token]
        said.append(chosen.token)
    sampler.close()
    return said


def logits_of(step: int, spread: float = 4.0) -> Logits:
    """A few likely tokens that stay likely for some steps, so that penalties have their part."""
    steady = np.random.default_rng(step // 20).normal(0, spread, SIZE)
    return (steady + np.random.default_rng(step).normal(0, 0.3, SIZE)).astype(np.float32)


def choose(sampling: Sampling, steps: int = 150) -> list[int]:
    sampler = SamplerChain(VOCABULARY, Candidates(SIZE), sampling)
    chosen = [sampler.choose(logits_of(step)) for step in range(steps)]
    sampler.close()
    return [choice.token for choice in chosen if isinstance(choice, SampledToken)]


def choose_by_llama_cpp(sampling: Sampling, steps: int = 150) -> list[int]:
    """By its whole chain, over the whole vocabulary."""
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
def test_every_choice_is_the_one_of_llama_cpp_s_own_chain(more: dict[str, Any]) -> None:
    sampling = replace(CHAT, **more)
    assert choose(sampling) == choose_by_llama_cpp(sampling)


def test_the_likeliest_tokens_are_found_whatever_the_vocabulary_s_size() -> None:
    for size in (1, 5, GROUPS - 1, GROUPS, 2 * GROUPS, 2 * GROUPS + 1, 49_152):
        for count in (1, 40, 1000):
            logits = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
            found = likeliest(logits, count)
            best = np.sort(logits)[::-1][:count]
            assert np.array_equal(np.sort(logits[found])[::-1][: len(best)], best)


def test_the_likeliest_of_40_are_few_so_that_the_chain_has_little_to_do() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 49_152).astype(np.float32)
    assert 40 <= len(likeliest(logits, 40)) < 60


def test_what_has_no_chance_is_never_among_them() -> None:
    logits = np.full(SIZE, -np.inf, np.float32)
    logits[[7, 4_999]] = 1.0
    assert list(likeliest(logits, 40)) == [7, 4_999]


@pytest.mark.parametrize("top_k", [0, 40])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_where_no_numbers_were_computed_there_is_no_token(top_k: int, temperature: float) -> None:
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
def test_the_smallest_values_choose_a_token_as_all_others_do(more: dict[str, Any]) -> None:
    assert len(choose(replace(CHAT, **more), 50)) == 50


def test_a_token_s_logprob_is_the_model_s_own_whatever_changes_the_choice() -> None:
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


def test_the_probabilities_of_all_tokens_are_one() -> None:
    vocabulary = Vocabulary([b"a"] * 15, frozenset())
    sampler = SamplerChain(vocabulary, Candidates(15), replace(CHAT, logprobs=20))
    logits = np.linspace(-500, 300, 15, dtype=np.float32)
    logits[0] = -np.inf
    chosen = sampler.choose(logits)
    sampler.close()
    assert isinstance(chosen, SampledToken) and chosen.logprob is not None
    assert sum(math.exp(c.logprob) for c in chosen.logprob.top) == pytest.approx(1)
    assert chosen.logprob.top[-1].logprob == -9999.0


def test_logprobs_are_told_only_where_they_were_asked_for() -> None:
    for logprobs in (None, 0):
        sampler = SamplerChain(VOCABULARY, Candidates(SIZE), replace(CHAT, logprobs=logprobs))
        chosen = sampler.choose(logits_of(0))
        sampler.close()
        assert isinstance(chosen, SampledToken) and (chosen.logprob is None) == (logprobs is None)
        assert chosen.logprob is None or chosen.logprob.top == ()


def test_a_bias_for_a_token_that_is_not_there_is_refused(llama: Llama) -> None:
    last = len(llama._vocabulary) - 1
    llama.sampler(Sampling(logit_bias={str(last): 1.0})).close()
    with pytest.raises(ServiceError, match=f"token {last + 1}.*is {last}") as error:
        llama.sampler(Sampling(logit_bias={str(last + 1): 1.0}))
    assert error.value.code == "invalid_request"


def test_the_same_seed_writes_the_same_and_another_seed_another(llama: Llama) -> None:
    first = write(llama, replace(CREATIVE, seed=7))
    assert write(llama, replace(CREATIVE, seed=7)) == first
    assert any(write(llama, replace(CREATIVE, seed=seed)) != first for seed in range(5))


def test_without_a_seed_each_answer_is_its_own(llama: Llama) -> None:
    assert len({tuple(write(llama, CREATIVE)) for _ in range(5)}) > 1


def test_temperature_0_takes_the_likeliest_token(llama: Llama) -> None:
    greedy = write(llama, Sampling(temperature=0))
    assert write(llama, Sampling(temperature=0)) == greedy
    assert write(llama, Sampling(temperature=1.5, top_k=1)) == greedy


def test_a_repeat_penalty_makes_repetition_rarer(llama: Llama) -> None:
    plain = write(llama, Sampling(temperature=0, repeat_penalty=1.0), 48)
    penalised = write(llama, Sampling(temperature=0, repeat_penalty=10.0), 48)
    assert len(set(penalised)) > len(set(plain))


def test_a_token_that_is_banned_is_not_said(llama: Llama) -> None:
    greedy = write(llama, Sampling(temperature=0))
    banned = str(greedy[0])
    said = write(llama, Sampling(temperature=0, logit_bias={banned: -100.0}))
    assert greedy[0] not in said
