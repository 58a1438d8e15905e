"""A GGUF under evaluation, run with the service's own engine, chat template and settings."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from services.contract.messages import ChatRequest, Turn
from services.inference.engine.adapter_numbers import BASE, adapter_number
from services.inference.engine.engine import Engine, Finished, Output, PrefillStarted
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.parts import text_of
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.model_files import find_adapters
from services.inference.models import load_chat_model
from services.inference.settings import InferenceSettings

PARALLEL = 16
WAITING = 2 * PARALLEL
BUDGET = 2**28  # bytes of the host KV cache
SERVICE = ChatRequest()  # the defaults of the settings
GREEDY = ChatRequest(temperature=0, repeat_penalty=1)


class Question(NamedTuple):
    system: str
    history: tuple[tuple[str, str], ...]
    prompt: str


class Reply(NamedTuple):
    text: str
    ended: bool


class Examinee:
    """Answers many questions in parallel; the same seed gives the same answers."""

    def __init__(self, path: Path, adapter: str | None, request: ChatRequest, seed: int) -> None:
        settings = InferenceSettings(
            model_path=str(path),
            model_parallel=PARALLEL,
            model_threads=1,  # fast enough, also beside other processes
        )
        self._model = load_chat_model(settings, lambda _: True)
        self._adapter = self._load_adapter(path, adapter) if adapter else BASE
        self._sampling = settings.fill_in(request)
        self._seed = seed
        self._engine = Engine(self._model.backend, PARALLEL, BUDGET, self._take, lambda: None)
        self._texts: dict[str, str] = {}
        self._replies: dict[str, Reply] = {}

    def _load_adapter(self, path: Path, name: str) -> int:
        """Load an adapter of the model in `path`. Return its number. Raises KeyError."""
        self._model.backend.load_adapter(1, find_adapters(path).files[name])
        return adapter_number(1)

    def answer_all(self, questions: Iterable[Question]) -> list[Reply]:
        self._texts, self._replies = {}, {}
        waiting = self._sequences(questions)
        while True:
            for sequence in islice(waiting, WAITING - len(self._texts) + len(self._replies)):
                self._texts[sequence.key] = ""
                self._engine.submit(sequence)
            if len(self._replies) == len(self._texts):
                return [self._replies[key] for key in self._texts]
            self._engine.step()

    def _sequences(self, questions: Iterable[Question]) -> Iterator[Sequence]:
        for number, question in enumerate(questions):
            sampling = replace(self._sampling, seed=self._seed * 1_000_003 + number)
            turns = [Turn("", *exchange) for exchange in question.history]
            prompt = self._model.template.session_prompt(
                question.system, turns, question.prompt, sampling.max_tokens or 0
            )
            sampler = self._model.backend.sampler(sampling)
            stops = StopRules.literal(sampling.stop or ())
            answer = GeneratedAnswer(AnswerLimits(sampling.max_tokens), stops)
            yield Sequence(str(number), prompt.tokens, sampling, sampler, answer, self._adapter)

    def _take(self, outputs: list[tuple[str, Output]]) -> None:
        for key, output in outputs:
            if isinstance(output, AnswerChunk):
                self._texts[key] += text_of(output.part)
            elif isinstance(output, Finished):
                self._replies[key] = Reply(self._texts[key], output.reason == "stop")
            elif not isinstance(output, PrefillStarted):
                raise RuntimeError(f"The model failed: {output.message}")
