"""The same seed and request, alone on the machine: the same answer, whatever the cache holds."""

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest

from services.contract.messages import Sampling
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.llama import Llama
from services.inference.engine.scheduling.sequence import Sequence

PROMPT = "Of numbers, names and other things. " * 30
HOT = Sampling(temperature=2.0, top_k=0, max_tokens=30, seed=7)


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Llama]:
    """With flash attention, as models with grouped-query attention have it."""
    on = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    monkeypatch.setattr(Llama, "_attention", lambda _: on)
    path = Path("model/demo.gguf")
    llama = Llama(
        path, context=512, parallel=2, threads=1, gpu_layers=0, on_progress=lambda _: True
    )
    yield llama
    llama.close()


class Asked:
    """The engine runs step by step in this thread."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._ended = 0
        self.engine = Engine(llama, 2, 2**24, self._take, lambda: None)

    def ask(self, text: str, is_exact: bool = True) -> list[int]:
        tokens = self._llama.tokenize(text, special=False)
        sampler = self._llama.sampler(HOT)
        sequence = Sequence("a", tokens, HOT, sampler, session="s", is_exact=is_exact)
        self.engine.submit(sequence)
        ended = self._ended
        while self._ended == ended:
            self.engine.step()
        return sequence.generated

    def _take(self, outputs: list[tuple[str, Output]]) -> None:
        self._ended += sum(isinstance(output, Finished) for _, output in outputs)


@pytest.mark.parametrize("length", [300, 331, 1000])
def test_an_answer_is_the_same_cold_and_warm_and_however_fast_its_prompt_is_read(
    llama: Llama, length: int
) -> None:
    text = PROMPT[:length]
    asked = Asked(llama)
    cold = asked.ask(text)
    assert asked.ask(text) == cold
    asked.ask(text, is_exact=False)
    assert asked.ask(text) == cold
    asked.ask(text[: length // 2])
    assert asked.ask(text) == cold
    slow = Asked(llama)
    slow.engine._scheduler.pace.has_read(20, 1.0, beside=False)
    for slot in range(2):
        llama.cut(slot, 0)
    assert slow.ask(text) == cold
