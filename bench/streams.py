"""
The engine alone, with streams that begin together, or come and go; also in several processes, as
workers that share a GPU.
"""

import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.pairs import Plan, show
from bench.report import Row, Section, Spread
from services.contract.messages import Sampling
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.sequence import Sequence

STREAMS = (16, 64)
PROMPT_TOKENS, NEW_TOKENS = 94, 64
MIXED_TOKENS = (16, 112)  # of answers that come and go
ANSWERS_PER_STREAM = 8  # that come and go
THREADS = 8
MAX_SECONDS = 300.0  # of a run
SAMPLING = Sampling(temperature=0.5, top_p=0.9, top_k=40, repeat_penalty=1.1, stop=())
NOTE = f"""The engine alone, without HTTP and NATS; layers are on the GPU, if llama.cpp was built
for one. Streams have prompts of {PROMPT_TOKENS} tokens and {NEW_TOKENS} new ones, and begin
together, or each is followed by another one with {MIXED_TOKENS[0]} to {MIXED_TOKENS[1]} tokens.
Two workers are two processes with half of the streams each."""


class Burst(NamedTuple):
    ttft: float  # median, ms
    decoding: float  # tokens per second, after the first token of all


class EngineRun:
    """An engine in its thread, and when its answers began and ended."""

    def __init__(self, llama: Llama, streams: int) -> None:
        self._llama = llama
        self._changed = threading.Condition()
        self.first: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self._on_end: Callable[[], object] = lambda: None
        self._engine = Engine(llama, streams, 2**30, self._emit, lambda: None)
        self._engine.start()

    def submit(self, key: str, tokens: int = NEW_TOKENS) -> None:
        """Submit a new conversation, whose cached prompt is worth keeping."""
        tokens_of_words = range(self._llama.vocabulary_size // 3, self._llama.vocabulary_size)
        prompt = random.choices(tokens_of_words, k=PROMPT_TOKENS)
        answer = GeneratedAnswer(AnswerLimits(tokens, may_loop=True), StopRules())
        sampler = self._llama.sampler(SAMPLING)
        self._engine.submit(Sequence(key, prompt, SAMPLING, sampler, answer, session=key))

    def wait(self, answers: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.ends) == answers, MAX_SECONDS):
                raise TimeoutError("an answer has failed, or the GPU is not used")

    def burst(self, streams: int) -> Burst:
        self.first, self.ends = {}, {}
        began = time.perf_counter()
        for _ in range(streams):
            self.submit(f"{time.perf_counter()}")
        self.wait(streams)
        last_first = max(self.first.values())
        ttft = 1000 * (statistics.median(self.first.values()) - began)
        seconds = max(self.ends.values()) - last_first
        return Burst(ttft, streams * (NEW_TOKENS - 1) / seconds)

    def come_and_go(self, streams: int) -> float:
        """Return tokens per second of answers, each of which is followed by another one."""
        self.ends = {}
        lengths = [random.randint(*MIXED_TOKENS) for _ in range(ANSWERS_PER_STREAM * streams)]
        left = enumerate(lengths)

        def submit_next() -> None:
            for number, tokens in left:
                self.submit(f"{began} {number}", tokens)
                return

        began = time.perf_counter()
        self._on_end = submit_next
        for _ in range(streams):
            submit_next()
        self.wait(len(lengths))
        self._on_end = lambda: None
        return sum(lengths) / (max(self.ends.values()) - began)

    def close(self) -> None:
        self._engine.close()

    def _emit(self, outputs: list[tuple[str, Output]]) -> None:
        now = time.perf_counter()
        with self._changed:
            for key, output in outputs:
                if isinstance(output, AnswerChunk):
                    self.first.setdefault(key, now)
                elif isinstance(output, Finished):
                    self.ends[key] = now
                    self._on_end()
            self._changed.notify_all()


def run(plan: Plan) -> Section:
    rows: list[Row] = []
    for streams in STREAMS:
        with running(plan.model, streams) as engine:
            engine.burst(streams)  # warm up
            bursts = [engine.burst(streams) for _ in range(plan.pairs)]
            mixed = [engine.come_and_go(streams) for _ in range(plan.pairs)]
        show(f"streams, {streams}: {bursts}")
        shared = measure_workers(plan, streams // 2)
        for what, values in (
            ("decoding, tokens/s", [burst.decoding for burst in bursts]),
            ("decoding with two workers, tokens/s", shared),
            ("TTFT p50, ms", [burst.ttft for burst in bursts]),
            ("that come and go: tokens/s", mixed),
        ):
            rows.append(Row(f"{streams} streams: {what}", (), Spread.of(values)))
    return Section("streams", plan.model.stem, NOTE, (), rows)


@contextmanager
def running(model: Path, streams: int) -> Iterator[EngineRun]:
    llama = Llama(
        model,
        context=2048,
        parallel=streams,
        threads=THREADS,
        gpu_layers=-1,
        on_progress=lambda share: True,
    )
    engine = EngineRun(llama, streams)
    yield engine
    engine.close()
    llama.close()


def measure_workers(plan: Plan, streams: int) -> list[float]:
    """Run two processes with `streams` each. Return the tokens per second of both together."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        begin = manager.Barrier(2)
        work = partial(_bursts, plan, streams, begin)
        first, second = pool.map(work, range(2))
    return [sum(pair) for pair in zip(first, second, strict=True)]


def _bursts(plan: Plan, streams: int, begin: threading.Barrier, _number: int) -> list[float]:
    with running(plan.model, streams) as engine:
        engine.burst(streams)
        rates = []
        for _ in range(plan.pairs):
            begin.wait()  # they begin together
            rates.append(engine.burst(streams).decoding)
    return rates
