"""
The one thread that owns the model: takes requests in, steps, gives events out. Knows no asyncio and
no NATS.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from services.contract.messages import FinishReason, Timings, TokenLogprob, Usage
from services.inference.engine.backend import Backend, BackendError, Chosen, Stuck
from services.inference.engine.pace import PIECE_INTERVAL
from services.inference.engine.scheduler import Scheduler
from services.inference.engine.sequence import Sequence
from services.inference.engine.slots import Slots
from services.inference.engine.speed import Speed

TIDY_AFTER = 0.3  # seconds without a request

log = logging.getLogger(__name__)


class Began(NamedTuple):
    """The sequence has a slot."""

    prompt_tokens: int
    cached_tokens: int


class Piece(NamedTuple):
    """
    More text, `at` characters from the answer's beginning, and the tokens it was made of; their
    logprobs if the request asked for them.
    """

    at: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


class Finished(NamedTuple):
    reason: FinishReason
    usage: Usage
    timings: Timings


class Broken(NamedTuple):
    """The model failed; the answer ends here, unfinished."""

    message: str


class Refused(NamedTuple):
    """What was asked of the answer can't be; it ends here, unfinished."""

    message: str


Output = Began | Piece | Finished | Broken | Refused
Emit = Callable[[list[tuple[str, Output]]], None]


class Engine:
    """
    `budget` is how many bytes of RAM idle conversations may take. `emit` gets a step's outputs at
    once, as (key, output), in the engine's thread.

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
    ) -> None:
        self._backend = backend
        self._emit = emit
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Sequence | str | None] = queue.SimpleQueue()
        self._slots = Slots(backend, parallel, budget)
        self._scheduler = Scheduler(self._slots)
        self.speed = Speed()
        self._outputs: list[tuple[str, Output]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        self._inbox.put(sequence)

    def cancel(self, key: str) -> None:
        """Ends the sequence before the next step; does nothing if it has ended."""
        self._inbox.put(key)

    def close(self) -> None:
        """Ends the thread after the step that it is in. What still runs gets no more outputs."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
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

    def _wait(self) -> Sequence | str | None:
        """Tidies up meanwhile, but not where the next turn may follow at once."""
        try:
            return self._inbox.get(timeout=TIDY_AFTER)
        except queue.Empty:
            while self._inbox.empty() and self._slots.tidy():
                pass
            return self._inbox.get()

    def _handle(self, item: Sequence | str | None) -> None:
        if item is None:
            self._closing = True
        elif isinstance(item, Sequence):
            self._scheduler.add(item)
        elif sequence := self._scheduler.find(item):
            self._finish(sequence, "cancelled")

    def _start_waiting(self) -> None:
        for sequence in self._scheduler.admit():
            self._put(sequence, Began(len(sequence.prompt), sequence.cached))

    def _compute(self) -> None:
        try:
            step = self._scheduler.plan()
        except BackendError as error:  # a sequence was lost on its way to another slot
            self._break(self._scheduler.running, error)
            return
        if step.is_read:
            self._send_all_text()
        began = time.monotonic()
        try:
            chosen = self._backend.decode([p.chunk for p in step.planned])
        except BackendError as error:
            self._break([p.sequence for p in step.planned], error)
            return
        seconds = time.monotonic() - began
        self._scheduler.commit(step, seconds)
        self.speed.add(sum(len(p.chunk.tokens) for p in step.planned), seconds)
        for (sequence, _), next_token in zip(step.planned, chosen, strict=True):
            if next_token is not None:
                self._accept(sequence, next_token)

    def _accept(self, sequence: Sequence, chosen: Chosen | Stuck) -> None:
        """
        A new token: its text goes out unless it could begin a stop string; ends the answer
        if due.
        """
        if isinstance(chosen, Stuck):
            self._send_text(sequence)
            self._remove(sequence)
            self._put(sequence, Refused(chosen.message))
            return
        token = chosen.token
        sequence.last_token = time.monotonic()
        sequence.first_token = sequence.first_token or sequence.last_token
        sequence.generated.append(token)
        if self._backend.is_end(token):
            self._say(sequence, sequence.stops.flush())
            self._finish(sequence, "stop")
            return
        sequence.unsent.append(chosen)
        text, stopped = sequence.stops.push(sequence.detokenizer.push(self._backend.piece(token)))
        self._say(sequence, text)
        if stopped:
            self._finish(sequence, "stop")
        elif chosen.is_last:
            self._say(sequence, sequence.stops.flush())
            self._finish(sequence, "stop")
        elif sequence.loops.push(token):
            self._finish(sequence, "loop")
        elif self._is_full(sequence):
            self._finish(sequence, "length")  # what is held back may be half of a stop string

    def _is_full(self, sequence: Sequence) -> bool:
        return (
            len(sequence.generated) == sequence.sampling.max_tokens
            or sequence.length == self._backend.context
        )

    def _say(self, sequence: Sequence, text: str) -> None:
        """Sent now, or with what comes in the next PIECE_INTERVAL."""
        sequence.unsent_text += text
        if sequence.last_token - sequence.last_sent >= PIECE_INTERVAL:
            self._send_text(sequence)

    def _send_text(self, sequence: Sequence) -> None:
        if text := sequence.unsent_text:
            self._put(sequence, _piece(sequence.sent_chars, text, sequence.unsent))
            sequence.sent_chars += len(text)
            sequence.last_sent = sequence.last_token
            sequence.unsent_text = ""
            sequence.unsent.clear()

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._send_text(sequence)
        self._remove(sequence)
        self._put(sequence, Finished(reason, sequence.usage, sequence.timings))

    def _send_all_text(self) -> None:
        """A read takes longer than a piece should wait."""
        for sequence in self._scheduler.running:
            self._send_text(sequence)
        self._send()

    def _break(self, sequences: list[Sequence], error: BackendError) -> None:
        """They end; what their slots hold can't be trusted."""
        log.error("a step failed: %s", error)
        for sequence in list(sequences):
            assert sequence.slot is not None
            self._slots.forget(sequence.slot)
            self._remove(sequence)
            self._put(sequence, Broken(str(error)))

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        sequence.sampler.close()

    def _put(self, sequence: Sequence, output: Output) -> None:
        self._outputs.append((sequence.key, output))

    def _send(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._emit(outputs)


def _piece(at: int, text: str, tokens: list[Chosen]) -> Piece:
    logprobs = tuple(chosen.logprob for chosen in tokens if chosen.logprob)
    return Piece(at, text, tuple(chosen.token for chosen in tokens), logprobs or None)
