"""
Measure speculative decoding: a real chat model quotes and edits a real text, and writes free text,
greedily, with and without drafts.

    python -m bench.speculation .data/models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf

A pair takes about four minutes with a 1.5B model on two cores.
"""

import argparse
import statistics
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple

from bench import report
from bench.pairs import show
from bench.report import Goal, Row, Section, Spread
from services.contract.messages import Sampling
from services.inference import models
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.output.generated_answer import AnswerLimits, GeneratedAnswer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.models import LoadedModel
from services.inference.settings import InferenceSettings

MAX_TOKENS = 256
GREEDY = Sampling(temperature=0, max_tokens=MAX_TOKENS, stop=())


def _head(path: str, max_characters: int = 1100) -> str:
    """Return the first whole lines of a file."""
    text = Path(path).read_text()[:max_characters]
    return text[: text.rindex("\n")]


CODE = _head("services/inference/engine/scheduling/tenant_shares.py")
PROSE = _head("docs/security.md")
TASKS = {
    "quoting": (
        f"Repeat this text word for word, without anything else.\n\n{PROSE}",
        f"Show me this file again, unchanged.\n\n```python\n{CODE}\n```",
    ),
    "editing": (
        "Rename the class in this file to Shares, and show me the whole file.\n\n"
        f"```python\n{CODE}\n```",
        f"Write `tenant` in capitals everywhere in this text, and change nothing else.\n\n{PROSE}",
        "Rename the parameter `tenant` to `owner` in this file, and show me the whole file.\n\n"
        f"```python\n{CODE}\n```",
    ),
    "free text": (
        "Tell me a long story about a fox.",
        "How does photosynthesis work?",
        "Write a Python module with two functions: one that reads a CSV file and one that writes"
        " it.",
        "What is the difference between TCP and UDP?",
    ),
}
GOALS = {"quoting": Goal("≥", 1.5), "editing": Goal("≥", 1.5), "free text": Goal("≥", 0.97)}
NOTE = f"""Tokens/s of decoding, alone, at most {MAX_TOKENS} tokens an answer, temperature 0. The
result is that with drafts divided by that without, in pairs of alternate answers. The first ones
include what the engine had to learn about the machine. `accepted` is the share of the drafted
tokens, `same` the share of answers that are equal to those without drafts: logits depend on the
number of tokens in a step, so a choice between two tokens that are nearly as likely may differ."""
COLUMNS = "with", "without", "drafted", "accepted, %", "same, %"


class Answered(NamedTuple):
    tokens: list[int]
    seconds: float  # of decoding
    drafted: int
    accepted: int


class Run(NamedTuple):
    """The answers to all tasks of a kind."""

    answers: list[Answered]

    @property
    def rate(self) -> float:
        """Tokens per second. The first token of an answer belongs to the prefill."""
        tokens = sum(len(each.tokens) - 1 for each in self.answers)
        return tokens / sum(each.seconds for each in self.answers)


def main() -> None:
    options = _options()
    settings = InferenceSettings(
        model_path=str(options.model), model_context=2048, model_parallel=1, model_threads=2
    )
    model = models.load_chat_model(settings, lambda _: True)
    generator = Generator(model)
    runs: dict[str, list[tuple[Run, Run]]] = {kind: [] for kind in TASKS}
    for number in range(options.pairs):
        for kind, tasks in TASKS.items():
            runs[kind].append(_pair(generator, tasks, is_reversed=number % 2 > 0))
            show(f"{kind}, pair {number + 1} of {options.pairs}: {_ratio(runs[kind])}")
    rows = [row(kind, pairs) for kind, pairs in runs.items()]
    section = Section("speculation", options.model.stem, NOTE, COLUMNS, rows)
    print(report.format_table(section))
    show(f"results written to {report.write_section(section)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speculative decoding.")
    parser.add_argument("model", type=Path, help="the GGUF file of a chat model")
    parser.add_argument("--pairs", type=int, default=3)
    return parser.parse_args()


class Generator:
    """An engine that generates one answer at a time, with what it has learned before."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._finished = False
        self._engine = Engine(model.backend, 1, 0, self._collect, self._die)

    def answer(self, task: str, has_drafts: bool) -> Answered:
        """Answer a task. Without drafts it is a request with a seed, which has none."""
        model, self._finished = self._model, False
        prompt = model.template.session_prompt("", (), task, MAX_TOKENS).tokens
        answer = GeneratedAnswer(AnswerLimits(MAX_TOKENS), StopRules())
        sampler = model.backend.sampler(GREEDY)
        sequence = Sequence("", prompt, GREEDY, sampler, answer, is_deterministic=not has_drafts)
        self._engine.submit(sequence)
        while not self._finished:
            self._engine.step()
        counts = sequence.drafted_tokens, sequence.accepted_tokens
        return Answered(sequence.generated, sequence.timings.decode, *counts)

    def _collect(self, outputs: list[tuple[str, Output]]) -> None:
        self._finished |= any(isinstance(output, Finished) for _, output in outputs)

    def _die(self) -> None:
        raise SystemExit("The engine died: see the error above.")


def _pair(generator: Generator, tasks: Seq[str], is_reversed: bool) -> tuple[Run, Run]:
    """Return a run with drafts and one without, whose answers were generated alternately."""
    order = (False, True) if is_reversed else (True, False)
    answers = [{has: generator.answer(task, has) for has in order} for task in tasks]
    return Run([each[True] for each in answers]), Run([each[False] for each in answers])


def _ratio(pairs: list[tuple[Run, Run]]) -> Spread:
    return Spread.of(drafted.rate / plain.rate for drafted, plain in pairs)


def row(kind: str, pairs: list[tuple[Run, Run]]) -> Row:
    with_drafts, without = (
        Spread.of(run.rate for run in runs) for runs in zip(*pairs, strict=True)
    )
    answers = [answer for run, _ in pairs for answer in run.answers]
    plain = [answer for _, run in pairs for answer in run.answers]
    drafted = sum(answer.drafted for answer in answers)
    accepted = sum(answer.accepted for answer in answers)
    same = sum(a.tokens == b.tokens for a, b in zip(answers, plain, strict=True))
    cells = (
        statistics.median(run.rate for run, _ in pairs),
        statistics.median(run.rate for _, run in pairs),
        drafted / len(pairs),
        100 * accepted / max(1, drafted),
        100 * same / len(answers),
    )
    return Row(f"{kind}, tokens/s", cells, _ratio(pairs), GOALS[kind])


if __name__ == "__main__":
    main()
