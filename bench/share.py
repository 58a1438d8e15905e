"""The engine alone, 16 sequences decoding: whose time a step is."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, ParamSpec, TypeVar

import llama_cpp

from bench import servers
from bench.bars import Bar, Spread
from bench.pairs import Plan, tell
from bench.report import Row, Section
from services.contract.messages import Sampling
from services.inference.engine.engine import Engine, Output
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_text import TextChunk
from services.inference.engine.sampling.sampler import SamplerChain
from services.inference.engine.scheduling.sequence import Sequence as Conversation

P = ParamSpec("P")
T = TypeVar("T")

SEQUENCES = 16
PROMPT = 80  # tokens
STEPS = 60  # in each of the runs
SAMPLING = Sampling(
    temperature=0.5, top_p=0.9, top_k=40, repeat_penalty=1.1, max_tokens=1500, stop=()
)
NOTE = f"""The engine alone, without NATS and HTTP: {SEQUENCES} sequences decoding, whose time a
step is. Choosing a token is work over the whole vocabulary, here in numpy and llama.cpp's samplers,
in llama-server in these alone; what is neither that nor computing is Python's."""


class Step(NamedTuple):
    """Milliseconds: the whole, and how much of it was in which functions."""

    whole: float
    computing: float
    choosing: float

    @property
    def python(self) -> float:
        return self.whole - self.computing - self.choosing


class Clock:
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
    def watching(self) -> Iterator[None]:
        """While it is open, the parts of a step are timed."""
        decode, choose = llama_cpp.llama_decode, SamplerChain.choose
        llama_cpp.llama_decode = self.timed("computing", decode)
        SamplerChain.choose = self.timed("choosing", choose)  # type: ignore[method-assign]
        try:
            yield
        finally:
            llama_cpp.llama_decode = decode
            SamplerChain.choose = choose  # type: ignore[method-assign]


def run(plan: Plan) -> Section:
    clock = Clock()
    backend = Llama(
        plan.model,
        context=2048,
        parallel=SEQUENCES,
        threads=servers.THREADS,
        gpu_layers=0,
        on_progress=lambda share: True,
    )
    with clock.watching():
        engine = _decoding(backend)
        steps = [_time(engine, clock, f"{i + 1} of {plan.pairs}") for i in range(plan.pairs)]
    backend.close()
    return Section("share", plan.model.stem, NOTE, ("ms a step",), rows(steps))


def _decoding(backend: Llama) -> Engine:
    """An engine that has read all prompts."""
    speaking: set[str] = set()

    def hear(outputs: list[tuple[str, Output]]) -> None:
        speaking.update(key for key, output in outputs if isinstance(output, TextChunk))

    engine = Engine(backend, SEQUENCES, host_cache_bytes=0, emit=hear, on_death=lambda: None)
    for i in range(SEQUENCES):
        prompt = random.choices(range(1000, 30000), k=PROMPT)
        engine.submit(Conversation(str(i), prompt, SAMPLING, backend.sampler(SAMPLING)))
    while len(speaking) < SEQUENCES:
        engine.step()
    return engine


def _time(engine: Engine, clock: Clock, which: str) -> Step:
    """A step's mean over a run."""
    clock.seconds.clear()
    step = clock.timed("whole", engine.step)
    for _ in range(STEPS):
        step()
    mean = Step(*(1000 * clock.seconds[group] / STEPS for group in Step._fields))
    tell(f"share, run {which}: {100 * mean.python / mean.whole:.2f} % Python")
    return mean


def rows(steps: list[Step]) -> list[Row]:
    """The milliseconds of each part, and its share in %."""

    def row(what: str, part: Callable[[Step], float], bar: Bar | None = None) -> Row:
        milliseconds = Spread.of(map(part, steps)).median
        shares = Spread.of(100 * part(step) / step.whole for step in steps)
        return Row(f"{what}, %", (milliseconds,), shares, bar)

    return [
        row("Python's share", lambda step: step.python, Bar("<", 3)),
        row("choosing tokens", lambda step: step.choosing),
        row("computing", lambda step: step.computing),
    ]
