"""LoRA adapters on the real demo model: in the backend, and in the engine beside one another."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.contract.messages import Sampling
from services.inference.engine.engine import Began, Engine, Finished, Output
from services.inference.engine.llama import Llama, ModelError
from services.inference.engine.output.answer import TextChunk
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.scheduling import adapter_turns
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.lora import write_lora

DEMO = Path("model/demo.gguf")
GREEDY = Sampling(temperature=0, max_tokens=30)
QUESTION = "count to 12"


def open_llama(*adapters: Path) -> Llama:
    return Llama(
        DEMO,
        context=512,
        parallel=4,
        threads=1,
        gpu_layers=0,
        on_progress=lambda _: True,
        adapters=adapters,
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    folder = tmp_path_factory.mktemp("adapters")
    llama = open_llama(*(write_lora(folder / f"{seed}.gguf", seed) for seed in (1, 2)))
    yield llama
    llama.close()


def prompt(llama: Llama, question: str = QUESTION) -> list[int]:
    assert llama.template is not None
    template = ChatTemplate(llama.template, llama, bos=llama.bos, eos=llama.eos, adds_bos=False)
    return template.prompt("", (), question, 1).tokens


class Asked:
    """What sequences said; the engine runs step by step in this thread."""

    def __init__(self, llama: Llama) -> None:
        self.texts: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self._ended: set[str] = set()
        self._engine = Engine(llama, 4, 2**20, self._take, lambda: None)

    def ask(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self._engine.submit(sequence)
        keys = {sequence.key for sequence in sequences}
        while not keys <= self._ended:
            self._engine.step()

    def _take(self, outputs: list[tuple[str, Output]]) -> None:
        for key, output in outputs:
            match output:
                case Began(_, cached):
                    self.texts[key], self.cached[key] = "", cached
                case TextChunk(_, text):
                    self.texts[key] += text
                case Finished():
                    self._ended.add(key)


@pytest.fixture
def asked(llama: Llama) -> Iterator[Asked]:
    for slot in range(4):
        llama.cut(slot, 0)
    yield Asked(llama)


def test_an_adapter_changes_what_the_model_says_and_leaves_the_model_as_it_was(
    llama: Llama, asked: Asked
) -> None:
    for key, adapter in (("base", 0), ("one", 1), ("two", 2), ("base again", 0)):
        asked.ask(Sequence(key, prompt(llama), GREEDY, llama.sampler(GREEDY), adapter))
    assert len(set(asked.texts.values())) == 3
    assert (
        asked.texts["base again"] == asked.texts["base"] == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12."
    )


def test_each_says_beside_the_others_what_it_says_alone(
    llama: Llama, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_turns, "TURN", 0.0)  # a turn of one step
    alone = {0: "", 1: "", 2: ""}
    for adapter in alone:
        asked.ask(Sequence(f"{adapter}", prompt(llama), GREEDY, llama.sampler(GREEDY), adapter))
        alone[adapter] = asked.texts[f"{adapter}"]
    together = [
        Sequence(f"together {n}", prompt(llama), GREEDY, llama.sampler(GREEDY), adapter)
        for n, adapter in enumerate((1, 0, 2, 0))
    ]
    asked.ask(*together)
    assert [asked.texts[s.key] for s in together] == [alone[s.adapter] for s in together]


def test_what_one_computed_is_no_beginning_for_another_but_for_its_own_next_turn(
    llama: Llama, asked: Asked
) -> None:
    tokens = prompt(llama)
    for key, adapter in (("base", 0), ("one", 1), ("two", 2)):
        asked.ask(Sequence(key, tokens, GREEDY, llama.sampler(GREEDY), adapter))
        asked.ask(Sequence(f"{key} again", tokens, GREEDY, llama.sampler(GREEDY), adapter))
        assert asked.cached[key] == 0
        assert asked.cached[f"{key} again"] == len(tokens) - 1


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another width": (lambda path: write_lora(path, width=128), "incorrect shape"),
    "another architecture": (
        lambda path: write_lora(path, more={"general.architecture": "gpt2"}),
        "arch mismatch",
    ),
    "a model": (lambda path: path.write_bytes(DEMO.read_bytes()), "to be 'adapter', but got"),
    "half a file": (
        lambda path: path.write_bytes(write_lora(path).read_bytes()[:5000]),
        "corrupted or incomplete",
    ),
    "no GGUF": (lambda path: path.write_bytes(b"PK\3\4 a zip file"), "magic"),
    "an empty file": (lambda path: path.touch(), "magic"),
    "an activated LoRA": (
        lambda path: write_lora(path, more={"adapter.alora.invocation_tokens": (5, 6)}),
        "activated LoRA .* not supported: train a plain LoRA",
    ),
}


@pytest.mark.parametrize(("write", "why"), BAD.values(), ids=BAD.keys())
def test_an_adapter_that_can_not_be_used_is_named_and_why(
    tmp_path: Path, write: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / "bad.gguf"
    write(path)
    with pytest.raises(ModelError, match=rf"bad\.gguf is .*{why}.*take it out of adapters/\."):
        open_llama(path)
