from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from services.contract.messages import Sampling
from services.inference.engine.backend import Chosen, Chunk
from services.inference.engine.llama import Llama

CREATIVE = Sampling(temperature=1.5, top_p=1.0, top_k=0)


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    llama = Llama(
        Path("model/demo.gguf"),
        context=128,
        parallel=1,
        threads=2,
        gpu_layers=0,
        on_progress=lambda _: True,
    )
    yield llama
    llama.close()


def write(llama: Llama, sampling: Sampling, length: int = 16) -> list[int]:
    sampler = llama.sampler(sampling)
    llama.share(0, 0, 0)
    said: list[int] = []
    tokens, position = llama.tokenize("<|im_start|>user\n", special=True), 0
    for _ in range(length):
        (chosen,) = llama.decode([Chunk(0, position, tokens, sampler)])
        assert isinstance(chosen, Chosen)
        position += len(tokens)
        tokens = [chosen.token]
        said.append(chosen.token)
    sampler.close()
    return said


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
