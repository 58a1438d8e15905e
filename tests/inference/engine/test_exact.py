"""Deterministic prefill: the same seed gives the same answer, from a cold or a warm cache."""

from collections.abc import Iterator
from os import fsencode

import llama_cpp
import pytest

from services.contract.messages import Sampling
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_answer import AnswerLimits, GeneratedAnswer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS, SchedulerLimits
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.engine.demo import DEMO, clear_slots, open_demo

TEXT = "Of numbers, names and other things. " * 30
HOT = Sampling(temperature=2.0, top_k=0, max_tokens=30, seed=7)
PARALLEL = 2


@pytest.fixture(scope="module", params=["q8_0", "f16"])
def llama(request: pytest.FixtureRequest) -> Iterator[Llama]:
    llama = open_demo(parallel=PARALLEL, kv_type=request.param, flash_attention="on")
    yield llama
    llama.close()


@pytest.fixture(scope="module", params=["off", "on"])
def repacked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Llama]:
    """A model whose weights llama.cpp repacks for the CPU."""
    path = tmp_path_factory.mktemp("q4_k") / "demo.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S, True
    failed = llama_cpp.llama_model_quantize(fsencode(DEMO), fsencode(path), params)
    assert not failed
    llama = open_demo(path, parallel=PARALLEL, flash_attention=request.param)
    yield llama
    llama.close()


class Generator:
    """An engine with an empty cache that is stepped in this thread."""

    def __init__(self, llama: Llama, limits: SchedulerLimits = DEFAULT_LIMITS) -> None:
        clear_slots(llama, PARALLEL)
        self._llama = llama
        self._finished = 0
        self._engine = Engine(llama, PARALLEL, 2**24, self._collect, lambda: None, limits=limits)

    def generate(self, text: str, is_deterministic: bool = True) -> list[int]:
        tokens = self._llama.tokenize(text, special=False)
        sampler = self._llama.sampler(HOT)
        answer = GeneratedAnswer(AnswerLimits(HOT.max_tokens), StopRules())
        sequence = Sequence("a", tokens, HOT, sampler, answer, 0, "session", is_deterministic)
        self._engine.submit(sequence)
        finished = self._finished
        while self._finished == finished:
            self._engine.step()
        return sequence.generated

    def _collect(self, outputs: list[tuple[str, Output]]) -> None:
        self._finished += sum(isinstance(output, Finished) for _, output in outputs)


@pytest.mark.parametrize("length", [300, 331, 1000])
def test_seeded_answer_is_independent_of_cache_and_chunk_size(llama: Llama, length: int) -> None:
    check_seeded_answer(llama, TEXT[:length])


@pytest.mark.parametrize("length", [331, 400, 555])
def test_repacked_model_answers_a_seed_alike_cold_and_cached(repacked: Llama, length: int) -> None:
    check_seeded_answer(repacked, TEXT[:length])


def check_seeded_answer(llama: Llama, text: str) -> None:
    length = len(text)
    engine = Generator(llama)
    cold = engine.generate(text)
    assert engine.generate(text) == cold
    engine.generate(text, is_deterministic=False)
    assert engine.generate(text) == cold
    engine.generate(text[: length // 2])
    assert engine.generate(text) == cold
    small_chunks = SchedulerLimits(initial_prefill_rate=40)
    assert Generator(llama, small_chunks).generate(text) == cold
