"""
The one thread that owns the model: takes requests in, steps, gives events out. Knows no asyncio and
no NATS.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from services.contract.messages import FinishReason, Timings, Usage
from services.inference.engine.backend import Backend, BackendError, Choice, NoNumbers, Stuck
from services.inference.engine.kv_cache.idle_prefill import IdlePrefill, IdlePrompt
from services.inference.engine.kv_cache.slots import Slots
from services.inference.engine.output.answer import TextChunk
from services.inference.engine.scheduling.prefill_budget import PIECE_INTERVAL
from services.inference.engine.scheduling.scheduler import Scheduler
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.engine.scheduling.step_overhead import fixed_cost
from services.inference.engine.scheduling.throughput import Throughput

TIDY_AFTER = 0.3  # seconds without a request

log = logging.getLogger(__name__)


class Began(NamedTuple):
    """The sequence has a slot."""

    prompt_tokens: int
    cached_tokens: int


class Finished(NamedTuple):
    reason: FinishReason
    usage: Usage
    timings: Timings
    stop_string: str | None = None  # that ended the answer


class Broken(NamedTuple):
    """The model failed; the answer ends here, unfinished."""

    message: str


class Refused(NamedTuple):
    """What was asked of the answer can't be; it ends here, unfinished."""

    message: str


Output = Began | TextChunk | Finished | Broken | Refused
_Item = Sequence | IdlePrompt | str | None  # to compute, to read ahead, to cancel, the end
Emit = Callable[[list[tuple[str, Output]]], None]


class Engine:
    """
    `budget` is how many bytes of RAM idle conversations may take. `emit` gets a step's outputs at
    once, as (key, output), in the engine's thread. `heads` are the public heads of prompts, which
    all tenants share (`slots.py`).

    Every sequence submitted ends in exactly one Finished, Broken or Refused. `on_death` is called
    if the thread dies of an error; nothing is answered after that.
    """

    def __init__(
        self,
        backend: Backend,
        parallel: int,
        budget: int,
        emit: Emit,
        on_death: Callable[[], None],
        heads: Iterable[list[int]] = (),
    ) -> None:
        self._backend = backend
        self._parallel = parallel
        self._emit = emit
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._slots = Slots(backend, parallel, budget, heads)
        self._scheduler = Scheduler(self._slots)
        self._ahead = IdlePrefill(backend, self._slots)
        self.speed = Throughput()
        self._outputs: list[tuple[str, Output]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        self._inbox.put(sequence)

    def read_ahead(self, beginning: IdlePrompt) -> None:
        """While there is nothing else to do, so that the conversation's next answer comes soon."""
        self._inbox.put(beginning)

    def cancel(self, key: str) -> None:
        """Ends the sequence before the next step; does nothing if it has ended."""
        self._inbox.put(key)

    def close(self) -> None:
        """Ends the thread after the step that it is in. What still runs gets no more outputs."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._backend.on_gpu:
                self._scheduler.fixed_cost = fixed_cost(self._backend, self._parallel)
            while not self._closing:
                self.step()
        except Exception:
            log.exception("the engine died")
            self._on_death()

    def step(self) -> None:
        self._take_in()
        self._start_waiting()
        if self._scheduler.running:
            self._compute()
        self._send()

    def _take_in(self) -> None:
        """Blocks while there is nothing to do."""
        if self._scheduler.is_idle:
            self._scheduler.check()
            self._handle(self._wait())
        while not self._inbox.empty():
            self._handle(self._inbox.get())

    def _wait(self) -> _Item:
        """Reads ahead and tidies up meanwhile, but not where the next turn may follow at once."""
        try:
            return self._inbox.get(timeout=TIDY_AFTER)
        except queue.Empty:
            read, pace = self._ahead.read, self._scheduler.pace
            while self._inbox.empty() and (read(pace.chunk_ahead) or self._slots.tidy()):
                pass
            return self._inbox.get()

    def _handle(self, item: _Item) -> None:
        if item is None:
            self._closing = True
        elif isinstance(item, IdlePrompt):
            self._ahead.add(item)
        elif isinstance(item, Sequence):
            self._ahead.forget(item.owner)
            self._scheduler.add(item)
            self._end_if_due(item)  # one that was begun elsewhere may lack nothing but its end
        elif sequence := self._scheduler.find(item):
            self._finish(sequence, "cancelled")

    def _start_waiting(self) -> None:
        for sequence in self._scheduler.admit():
            self._put(sequence, Began(sequence.usage.prompt_tokens, sequence.usage.cached_tokens))

    def _compute(self) -> None:
        try:
            step = self._scheduler.plan()
        except BackendError as error:  # a sequence was lost on its way to another slot
            self._break(self._scheduler.running, str(error))
            return
        if step.is_read:
            self._send_all_text()
        began = time.monotonic()
        try:
            chosen = self._backend.decode([p.chunk for p in step.planned])
        except BackendError as error:
            self._break([p.sequence for p in step.planned], str(error))
            return
        seconds = time.monotonic() - began
        self._scheduler.commit(step, seconds)
        self.speed.add(sum(len(p.chunk.tokens) for p in step.planned), seconds)
        for (sequence, _), choice in zip(step.planned, chosen, strict=True):
            if choice is not None:
                self._accept(sequence, choice)

    def _accept(self, sequence: Sequence, choice: Choice) -> None:
        """A new token: its text goes out now, or with what comes in the next PIECE_INTERVAL."""
        if isinstance(choice, Stuck):
            self._send_text(sequence)
            self._remove(sequence)
            self._put(sequence, Refused(choice.message))
            return
        if isinstance(choice, NoNumbers):
            self._break([sequence], choice.message)
            return
        sequence.last_token = time.monotonic()
        sequence.first_token = sequence.first_token or sequence.last_token
        token = choice.token
        sequence.answer.push(choice, self._backend.piece(token), self._backend.is_end(token))
        if sequence.last_token - sequence.last_sent >= PIECE_INTERVAL:
            self._send_text(sequence)
        self._end_if_due(sequence)

    def _end_if_due(self, sequence: Sequence) -> None:
        if sequence.answer.reason:
            self._finish(sequence, sequence.answer.reason)
        elif sequence.length == self._backend.context:
            self._finish(sequence, "length")

    def _send_text(self, sequence: Sequence) -> None:
        if piece := sequence.answer.take():
            self._put(sequence, piece)
            sequence.last_sent = sequence.last_token

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if not sequence.answer.reason:
            sequence.answer.cut(reason)
        self._send_text(sequence)
        self._remove(sequence)
        stop_string = sequence.answer.stop_string
        self._put(sequence, Finished(reason, sequence.usage, sequence.timings, stop_string))

    def _send_all_text(self) -> None:
        """A read takes longer than a piece should wait."""
        for sequence in self._scheduler.running:
            self._send_text(sequence)
        self._send()

    def _break(self, sequences: list[Sequence], message: str) -> None:
        """They end; what their slots hold can't be trusted."""
        log.error("a step failed: %s", message)
        for sequence in list(sequences):
            assert sequence.slot is not None
            self._send_text(sequence)
            self._slots.forget(sequence.slot)
            self._remove(sequence)
            self._put(sequence, Broken(message))

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        sequence.sampler.close()

    def _put(self, sequence: Sequence, output: Output) -> None:
        self._outputs.append((sequence.key, output))

    def _send(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._emit(outputs)
