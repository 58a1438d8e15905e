"""The engine alone, decoding 16 sequences: how much of a step is spent in Python."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, ParamSpec, TypeVar

import llama_cpp

from bench import servers
from bench.pairs import Plan, show
from bench.report import Goal, Row, Section, Spread
from services.contract.messages import Sampling
from services.inference.engine.engine import Engine, Output
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.stops import StopRules
from services.inference.engine.sampling.sampler import SamplerChain
from services.inference.engine.scheduling.sequence import Sequence as EngineSequence

P = ParamSpec("P")
T = TypeVar("T")

SEQUENCES = 16
PROMPT_TOKENS = 80
STEPS = 60  # per run
SAMPLING = Sampling(
    temperature=0.5, top_p=0.9, top_k=40, repeat_penalty=1.1, max_tokens=1500, stop=()
)
NOTE = f"""The engine alone, without NATS and HTTP, decoding {SEQUENCES} sequences: the shares of a
step. Sampling works on the whole vocabulary, here in numpy and llama.cpp's samplers, in
llama-server in these alone. Python's share is what is neither sampling nor `llama_decode`."""


class Step(NamedTuple):
    """Milliseconds of a step, and how they are spent."""

    total: float
    decode: float
    sampling: float

    @property
    def python(self) -> float:
        return self.total - self.decode - self.sampling


class Profiler:
    """Adds up the seconds spent in each group of functions."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, group: str, function: Callable[P, T]) -> Callable[P, T]:
        def call(*arguments: P.args, **named: P.kwargs) -> T:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[group] += time.perf_counter() - began

        return call

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Time the parts of a step while the context is open."""
        decode, choose = llama_cpp.llama_decode, SamplerChain.choose
        llama_cpp.llama_decode = self.timed("decode", decode)
        SamplerChain.choose = self.timed("sampling", choose)  # type: ignore[method-assign]
        try:
            yield
        finally:
            llama_cpp.llama_decode = decode
            SamplerChain.choose = choose  # type: ignore[method-assign]


def run(plan: Plan) -> Section:
    profiler = Profiler()
    backend = Llama(
        plan.model,
        context=2048,
        parallel=SEQUENCES,
        threads=servers.THREADS,
        gpu_layers=0,
        on_progress=lambda share: True,
    )
    with profiler.patched():
        engine = _decoding_engine(backend)
        steps = [_time(engine, profiler, f"{i + 1} of {plan.pairs}") for i in range(plan.pairs)]
    backend.close()
    return Section("share", plan.model.stem, NOTE, ("ms per step",), rows(steps))


def _decoding_engine(backend: Llama) -> Engine:
    """Return an engine that has prefilled all prompts."""
    decoding: set[str] = set()

    def on_outputs(outputs: list[tuple[str, Output]]) -> None:
        decoding.update(key for key, output in outputs if isinstance(output, AnswerChunk))

    engine = Engine(backend, SEQUENCES, host_cache_bytes=0, emit=on_outputs, on_death=lambda: None)
    for i in range(SEQUENCES):
        prompt = random.choices(range(1000, 30000), k=PROMPT_TOKENS)
        answer = GeneratedAnswer(AnswerLimits(SAMPLING.max_tokens), StopRules())
        engine.submit(EngineSequence(str(i), prompt, SAMPLING, backend.sampler(SAMPLING), answer))
    while len(decoding) < SEQUENCES:
        engine.step()
    return engine


def _time(engine: Engine, profiler: Profiler, which: str) -> Step:
    """Return the mean step of a run."""
    profiler.seconds.clear()
    step = profiler.timed("total", engine.step)
    for _ in range(STEPS):
        step()
    mean = Step(*(1000 * profiler.seconds[group] / STEPS for group in Step._fields))
    show(f"share, run {which}: {100 * mean.python / mean.total:.2f} % Python")
    return mean


def rows(steps: list[Step]) -> list[Row]:
    """Return each part's milliseconds and share in %."""

    def row(what: str, part: Callable[[Step], float], goal: Goal | None = None) -> Row:
        milliseconds = Spread.of(map(part, steps)).median
        shares = Spread.of(100 * part(step) / step.total for step in steps)
        return Row(f"{what}, %", (milliseconds,), shares, goal)

    return [
        row("Python's share", lambda step: step.python, Goal("<", 3)),
        row("sampling", lambda step: step.sampling),
        row("llama_decode", lambda step: step.decode),
    ]
