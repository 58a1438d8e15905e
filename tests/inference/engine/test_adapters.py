"""LoRA adapters of the demo model: in the backend, and several at once in the engine."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from services.contract.messages import Sampling
from services.inference.engine.adapter_numbers import BASE, adapter_number
from services.inference.engine.backend import AdapterError
from services.inference.engine.engine import Engine, Finished, Output, PrefillStarted
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.parts import ContentDelta
from services.inference.engine.output.stops import StopRules
from services.inference.engine.prompt.chat_template import ChatTemplate
from services.inference.engine.scheduling.limits import SchedulerLimits
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.engine.demo import DEMO, clear_slots, open_demo
from tests.inference.lora import write_lora

GREEDY = Sampling(temperature=0, max_tokens=30)
QUESTION = "count to 12"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    folder = tmp_path_factory.mktemp("adapters")
    llama = open_demo(adapters=[write_lora(folder / f"{seed}.gguf", seed) for seed in (1, 2)])
    yield llama
    llama.close()


def question(llama: Llama, key: str, file: int, scale: float = 1.0) -> Sequence:
    """Return the question, for an adapter's file or the base model (0)."""
    adapter = adapter_number(file, scale) if file else BASE
    assert llama.template is not None
    template = ChatTemplate(llama.template, llama, bos=llama.bos, eos=llama.eos, adds_bos=False)
    tokens = template.session_prompt("", (), QUESTION, 1).tokens
    answer = GeneratedAnswer(AnswerLimits(GREEDY.max_tokens), StopRules())
    return Sequence(key, tokens, GREEDY, llama.sampler(GREEDY), answer, adapter)


class Answers:
    """The answers of an engine that is stepped in this thread."""

    def __init__(self, llama: Llama) -> None:
        self.texts: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self._finished: set[str] = set()
        one_step_turns = SchedulerLimits(adapter_turn_seconds=0.0)
        self._engine = Engine(llama, 4, 2**20, self._collect, lambda: None, limits=one_step_turns)

    def generate(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self._engine.submit(sequence)
        keys = {sequence.key for sequence in sequences}
        while not keys <= self._finished:
            self._engine.step()

    def generate_while_loading(self, file: int, path: Path, *sequences: Sequence) -> "Future[None]":
        """Load an adapter after five steps."""
        for sequence in sequences:
            self._engine.submit(sequence)
        for _ in range(5):
            self._engine.step()
        loaded = self._engine.load_adapter(file, path)
        self._engine.step()
        while not {sequence.key for sequence in sequences} <= self._finished:
            self._engine.step()
        return loaded

    def free(self, file: int) -> None:
        self._engine.free_adapter(file)
        self._engine.step()

    def _collect(self, outputs: list[tuple[str, Output]]) -> None:
        for key, output in outputs:
            match output:
                case PrefillStarted(_, cached):
                    self.texts[key], self.cached[key] = "", cached
                case AnswerChunk(_, ContentDelta(text)):
                    self.texts[key] += text
                case Finished():
                    self._finished.add(key)


@pytest.fixture
def answers(llama: Llama) -> Answers:
    clear_slots(llama, parallel=4)
    return Answers(llama)


def test_adapter_changes_answer_and_leaves_base_model_intact(
    llama: Llama, answers: Answers
) -> None:
    for key, adapter in (("base", 0), ("one", 1), ("two", 2), ("base again", 0)):
        answers.generate(question(llama, key, adapter))
    texts = answers.texts
    assert len(set(texts.values())) == 3
    assert texts["base again"] == texts["base"] == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12."


def test_adapters_generate_the_same_concurrently_as_alone(llama: Llama, answers: Answers) -> None:
    for adapter in (0, 1, 2):
        answers.generate(question(llama, f"alone {adapter}", adapter))
    adapters = (1, 0, 2, 0)
    answers.generate(*(question(llama, f"{n}", adapter) for n, adapter in enumerate(adapters)))
    for number, adapter in enumerate(adapters):
        assert answers.texts[f"{number}"] == answers.texts[f"alone {adapter}"]


def test_scales_generate_the_same_concurrently_as_alone(llama: Llama, answers: Answers) -> None:
    scales = (0.0, 0.8, 1.0, 2.0)
    for scale in scales:
        answers.generate(question(llama, f"alone {scale}", 1, scale))
    answers.generate(*(question(llama, f"{scale}", 1, scale) for scale in scales))
    alone = [answers.texts[f"alone {scale}"] for scale in scales]
    assert [answers.texts[f"{scale}"] for scale in scales] == alone
    assert alone[0] == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12." and len(set(alone)) == 4


def test_scales_share_no_prefix_but_reuse_their_own(llama: Llama, answers: Answers) -> None:
    for scale in (0.5, 0.51):
        first, second = (question(llama, f"{scale}{turn}", 1, scale) for turn in "ab")
        answers.generate(first, second)
        assert answers.cached[first.key] == 0
        answers.generate(again := question(llama, f"{scale}c", 1, scale))
        assert answers.cached[again.key] == len(again.prompt) - 1


def test_freed_adapter_leaves_no_trace_for_the_next(llama: Llama, tmp_path: Path) -> None:
    clear_slots(llama, parallel=4)
    answers = Answers(llama)
    texts = []
    for file, seed in enumerate((1, 3, 1, 3), start=10):  # the allocator may reuse addresses
        llama.load_adapter(file, write_lora(tmp_path / "x.gguf", seed))
        answers.generate(question(llama, f"{file}", file))
        assert answers.cached[f"{file}"] == 0
        texts.append(answers.texts[f"{file}"])
        answers.free(file)
    assert texts[:2] == texts[2:] and texts[0] != texts[1]
    answers.generate(question(llama, "base", 0))
    assert answers.texts["base"] == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12."


def test_adapter_is_loaded_and_freed_beside_running_answers(
    llama: Llama, answers: Answers, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "x.gguf", 3)
    answers.generate(question(llama, "alone 1", 1), question(llama, "alone 0", 0))
    running = [question(llama, "1", 1), question(llama, "0", 0)]
    loaded = answers.generate_while_loading(20, path, *running)
    assert loaded.result(0) is None
    assert [answers.texts[key] for key in "10"] == [answers.texts[f"alone {n}"] for n in "10"]
    answers.free(20)


def test_adapters_share_no_prefix_but_reuse_their_own(llama: Llama, answers: Answers) -> None:
    for adapter in (0, 1, 2):
        first, second = (question(llama, f"{adapter}{turn}", adapter) for turn in "ab")
        answers.generate(first)
        answers.generate(second)
        assert answers.cached[first.key] == 0
        assert answers.cached[second.key] == len(first.prompt) - 1


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another width": (lambda path: write_lora(path, width=128), "incorrect shape"),
    "another architecture": (
        lambda path: write_lora(path, metadata={"general.architecture": "gpt2"}),
        "arch mismatch",
    ),
    "a model": (lambda path: path.write_bytes(DEMO.read_bytes()), "to be 'adapter', but got"),
    "half a file": (
        lambda path: path.write_bytes(write_lora(path).read_bytes()[:5000]),
        "corrupted or incomplete",
    ),
    "no GGUF": (lambda path: path.write_bytes(b"PK\3\4 a zip file"), "does not begin with GGUF"),
    "an empty file": (lambda path: path.touch(), "ends within its header"),
    "a number as its type": (
        lambda path: write_lora(path, metadata={"adapter.type": 1.0}),
        "adapter.type has another type",
    ),
    "an activated LoRA": (
        lambda path: write_lora(path, metadata={"adapter.alora.invocation_tokens": (5, 6)}),
        "activated LoRA .* not supported: train a plain LoRA",
    ),
}


@pytest.mark.parametrize(("write", "why"), BAD.values(), ids=BAD.keys())
def test_invalid_adapter_is_an_error_with_reason(
    tmp_path: Path, write: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / "bad.gguf"
    write(path)
    with pytest.raises(AdapterError, match=rf"bad\.gguf is .*{why}.*remove it from adapters/\."):
        open_demo(adapters=[path])
