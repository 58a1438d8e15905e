"""The engine: one thread that owns the model. It knows neither asyncio nor NATS."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from services.contract.messages import FinishReason, Timings, Usage
from services.inference.engine.backend import (
    AdapterError,
    Backend,
    BackendError,
    ComputeFailure,
    ConstraintFailure,
    SampledToken,
    SampleResult,
    StepInterrupted,
)
from services.inference.engine.kv_cache.host_cache import SavedState
from services.inference.engine.kv_cache.idle_prefill import IdlePrefill, IdlePrompt
from services.inference.engine.kv_cache.slots import Slots
from services.inference.engine.output.generated_answer import AnswerChunk
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS, SchedulerLimits
from services.inference.engine.scheduling.prefill_budget import Throughput
from services.inference.engine.scheduling.scheduler import Scheduler, Step
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.engine.scheduling.step_overhead import measure_step_overhead
from services.inference.engine.speculation.speculator import Speculator

log = logging.getLogger(__name__)


class PrefillStarted(NamedTuple):
    """The sequence got a slot."""

    prompt_tokens: int
    cached_tokens: int


class Finished(NamedTuple):
    reason: FinishReason
    usage: Usage
    timings: Timings
    stop_string: str | None = None  # the one that ended the answer


class ForgetSession(NamedTuple):
    session: str


class LoadAdapter(NamedTuple):
    file: int
    path: Path
    loaded: "Future[None]"


class FreeAdapter(NamedTuple):
    file: int


Output = PrefillStarted | AnswerChunk | Finished | ConstraintFailure | ComputeFailure
Emit = Callable[[list[tuple[str, Output]]], object]
# generate, idle prefill, forget, adopt, adapters, cancel by key, close
_Command = (
    Sequence | IdlePrompt | ForgetSession | SavedState | LoadAdapter | FreeAdapter | str | None
)


class Engine:
    """
    Generates answers for all submitted sequences at once, by continuous batching. `start` runs it
    in a thread; tests and benchmarks call `step` instead.

    `emit` gets a step's outputs as (key, output), in the engine's thread. Each sequence ends in
    exactly one Finished, ConstraintFailure or ComputeFailure. If the thread dies of an error,
    `on_death` is called, and there are no more outputs.

    `host_cache_bytes` bounds the host KV cache. `public_prefixes` are the starts of prompts that
    all tenants share (`kv_cache/slots.py`).
    """

    def __init__(
        self,
        backend: Backend,
        parallel: int,
        host_cache_bytes: int,
        emit: Emit,
        on_death: Callable[[], object],
        public_prefixes: Iterable[list[int]] = (),
        limits: SchedulerLimits = DEFAULT_LIMITS,
    ) -> None:
        self._backend = backend
        self._parallel = parallel
        self._emit = emit
        self._on_death = on_death
        self._limits = limits
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._slots = Slots(backend, parallel, host_cache_bytes, public_prefixes)
        speculator = Speculator(backend.context, limits) if backend.can_verify else None
        self._scheduler = Scheduler(self._slots, limits, speculator, backend.max_padded_length)
        self._idle_prefill = IdlePrefill(backend, self._slots)
        self.throughput = Throughput()
        self._outputs: list[tuple[str, Output]] = []
        self._has_first_token = False  # in this step, of any sequence
        self._closing = False
        self._computing: str | None = None  # the sequence that the running step computes alone
        self._computing_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        self._commands.put(sequence)

    def prefill_when_idle(self, prompt: IdlePrompt) -> None:
        """Queue a prompt for idle prefill."""
        self._commands.put(prompt)

    def cancel(self, key: str) -> None:
        """
        End a sequence before the next step. If the running step computes only this sequence,
        interrupt it. Does nothing if the sequence has ended.
        """
        self._commands.put(key)
        with self._computing_lock:
            if key == self._computing:
                self._backend.interrupt()

    def forget_session(self, session: str) -> None:
        """Drop what is cached of a conversation, except what its running sequences use."""
        self._commands.put(ForgetSession(session))

    def try_adapter(self, path: Path) -> None:
        """Do what Backend.try_adapter does, in the caller's thread. Raises AdapterError."""
        self._backend.try_adapter(path)

    def load_adapter(self, file: int, path: Path) -> "Future[None]":
        """
        Load an adapter's file between two steps (Backend.load_adapter). The future raises
        AdapterError.
        """
        loaded: Future[None] = Future()
        self._commands.put(LoadAdapter(file, path, loaded))
        return loaded

    def free_adapter(self, file: int) -> None:
        """Free an adapter's file and its cached tokens. No sequence may use it any more."""
        self._commands.put(FreeAdapter(file))

    def adopt(self, saved: SavedState) -> None:
        """Take a cached prompt of an earlier process, unless its conversation has gone on here."""
        self._commands.put(saved)

    def close(self) -> None:
        """Stop the thread after the current step. Running sequences get no more outputs."""
        self._commands.put(None)
        self._thread.join()

    def save_all(self) -> list[SavedState]:
        """Return the prompts to keep (Slots.save_all). The engine must be closed."""
        return self._slots.save_all()

    def _run(self) -> None:
        try:
            self._backend.warm_up()
            if self._backend.on_gpu:
                overhead = measure_step_overhead(self._backend, self._parallel)
                self._scheduler.step_overhead = overhead
            while not self._closing:
                self.step()
            self._flush()
        except Exception:
            log.exception("engine died")
            self._on_death()

    def step(self) -> None:
        """
        Handle commands, admit sequences, compute one batch, emit. Blocks while idle.

        On a GPU, text is emitted while the next step computes. Before it, the event loop would take
        the GIL to send the text, and the GPU would have nothing to do. First tokens and the end of
        the last sequence are emitted at once.
        """
        self._receive()
        for sequence in self._scheduler.admit():
            usage = sequence.usage
            self._put(sequence, PrefillStarted(usage.prompt_tokens, usage.cached_tokens))
        if self._scheduler.running:
            self._compute()
        if self._has_first_token or not self._backend.on_gpu or not self._scheduler.running:
            self._flush()
        if self._has_first_token:
            self._has_first_token = False
            if not self._backend.on_gpu:  # else the CPU is free
                time.sleep(self._limits.first_token_pause_seconds)

    def _receive(self) -> None:
        if self._scheduler.is_idle:
            self._scheduler.check_invariants()
            self._handle(self._next_command())
        while not self._commands.empty():
            self._handle(self._commands.get())

    def _next_command(self) -> _Command:
        """Wait for a command; after `idle_after_seconds` without one, do idle work meanwhile."""
        try:
            return self._commands.get(timeout=self._limits.idle_after_seconds)
        except queue.Empty:
            while self._commands.empty() and self._idle_step():
                pass
            return self._commands.get()

    def _idle_step(self) -> bool:
        chunk = self._scheduler.budget.idle_chunk
        return self._idle_prefill.step(chunk) or self._slots.offload_next()

    def _handle(self, command: _Command) -> None:
        match command:
            case None:
                self._closing = True
            case IdlePrompt():
                self._idle_prefill.add(command)
            case ForgetSession() | SavedState():
                self._change_cache(command)
            case LoadAdapter():
                self._load_adapter(command)
            case FreeAdapter(file):
                self._idle_prefill.forget_adapter(file)
                self._slots.forget_adapter(file)
                self._backend.free_adapter(file)
            case Sequence():
                self._add(command)
            case str():
                if sequence := self._scheduler.find(command):
                    self._finish(sequence, "cancelled")

    def _add(self, sequence: Sequence) -> None:
        if sequence.is_withdrawn:
            sequence.sampler.close()
            self._put(sequence, Finished("cancelled", sequence.usage, sequence.timings))
            return
        self._idle_prefill.cancel(sequence.owner)
        self._scheduler.add(sequence)
        # a resumed answer may already be complete
        if (reason := self._end_reason(sequence)) and sequence.claim():
            self._finish(sequence, reason)

    def _change_cache(self, command: ForgetSession | SavedState) -> None:
        if isinstance(command, SavedState):
            self._slots.adopt(command)
        else:
            self._idle_prefill.forget_session(command.session)
            self._slots.forget_session(command.session)

    def _load_adapter(self, command: LoadAdapter) -> None:
        if not command.loaded.set_running_or_notify_cancel():
            return
        self._flush()  # text need not wait for the file
        try:
            self._backend.load_adapter(command.file, command.path)
        except AdapterError as error:
            command.loaded.set_exception(error)
        except Exception as error:  # ends the thread, and must not leave the caller waiting
            command.loaded.set_exception(error)
            raise
        else:
            command.loaded.set_result(None)

    def _compute(self) -> None:
        step = None
        try:
            step = self._scheduler.schedule()
            if step.is_prefill and self._is_long(step.tokens):
                self._emit_all_text()
            began = time.monotonic()
            if step.drafts:
                accept = partial(self._accept_drafts, step, self._backend.verify(step.chunks))
            else:
                commit = partial(self._commit, step)
                with self._interruptible(step):
                    results = self._backend.decode(step.chunks, commit, step.padding)
                accept = partial(self._accept_tokens, step, results)
            seconds = time.monotonic() - began
        except StepInterrupted:  # by a cancel, which is handled next
            assert step is not None
            self._scheduler.record_interrupted(step, time.monotonic() - began)
            return
        except BackendError as error:
            # without a step, schedule() failed while it moved a sequence between slots
            self._fail(step.sequences if step else self._scheduler.running, str(error))
            self._flush()
            return
        if step.drafts:
            self._commit(step)
        before = self.throughput.generated_tokens
        accept()
        if step.drafts:  # other steps were sampled by the backend already
            seconds = time.monotonic() - began
        self._record(step, seconds, self.throughput.generated_tokens - before)

    @contextmanager
    def _interruptible(self, step: Step) -> Iterator[None]:
        """Let `cancel` interrupt the body, which computes the step, if it is of one sequence."""
        self._set_computing(step.sequences[0].key if len(step.scheduled) == 1 else None)
        try:
            yield
        finally:
            self._set_computing(None)

    def _set_computing(self, key: str | None) -> None:
        with self._computing_lock:
            self._computing = key

    def _commit(self, step: Step) -> None:
        self._scheduler.commit(step)
        if self._backend.on_gpu:
            self._flush()

    def _record(self, step: Step, seconds: float, generated: int) -> None:
        """Record how long a step took, sampling included."""
        self._scheduler.record(step, seconds)
        if step.is_prefill:
            self.throughput.record_prefill(step.tokens, seconds)
        else:
            self.throughput.record(generated if step.drafts else step.tokens, seconds)

    def _accept_tokens(self, step: Step, results: Iterable[SampleResult | None]) -> None:
        for sequence, result in zip(step.sequences, results, strict=True):
            if result is not None:
                self._accept(sequence, result)
                self._put_due_text(sequence)

    def _accept_drafts(self, step: Step, choices: Iterable[Iterator[SampleResult]]) -> None:
        for (sequence, chunk), draft, sampled in zip(
            step.scheduled, step.drafts, choices, strict=True
        ):
            self._accept_draft(sequence, draft, sampled)
            self._slots.drop_draft(chunk.slot)
            self._put_due_text(sequence)

    def _accept_draft(
        self, sequence: Sequence, draft: list[int], choices: Iterator[SampleResult]
    ) -> None:
        """
        Sample the tokens after the newest one, as long as the draft has the same ones and the
        answer goes on. Each is appended before the next is sampled, as if each had its own step.
        """
        sequence.drafted_tokens += len(draft)
        for drafted, result in zip((*draft, None), choices, strict=False):
            is_hit = isinstance(result, SampledToken) and result.token == drafted
            sequence.accepted_tokens += is_hit
            self._accept(sequence, result)
            if drafted is None or not is_hit or sequence.answer.finish_reason:
                return
            self._scheduler.keep(sequence, [drafted])

    def _is_long(self, tokens: int) -> bool:
        """Return whether a prefill of `tokens` tokens takes longer than text should wait."""
        seconds = self._scheduler.budget.prefill_seconds(tokens)
        return seconds > self._limits.emit_interval_seconds / 2

    def _accept(self, sequence: Sequence, result: SampleResult) -> None:
        match result:
            case SampledToken():
                self._append(sequence, result)
            case ConstraintFailure():
                self._end(sequence, result)
            case ComputeFailure(message):
                self._fail([sequence], message)

    def _append(self, sequence: Sequence, sampled: SampledToken) -> None:
        """Append a token to the answer, which may end it."""
        sequence.last_token_at = time.monotonic()
        if not sequence.first_token_at:
            sequence.first_token_at = sequence.last_token_at
            self._has_first_token = True
        self.throughput.generated_tokens += 1
        token, was_holding = sampled.token, sequence.answer.is_holding
        sequence.answer.push(sampled, self._backend.piece(token), self._backend.is_end(token))
        sequence.sampler.force(sequence.answer.take_forced())
        sequence.sampler.forbid(sequence.answer.forbidden)
        if sequence.answer.is_holding and not was_holding and sequence.slot is not None:
            self._slots.hold_checkpoint(sequence.slot)  # the slot does not have this token yet
        if reason := self._end_reason(sequence):
            self._finish(sequence, reason)

    def _end_reason(self, sequence: Sequence) -> FinishReason | None:
        """Return why the sequence ends now; None if it goes on."""
        is_full = sequence.length == self._backend.context
        return sequence.answer.finish_reason or ("length" if is_full else None)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        answer = sequence.answer
        if not answer.finish_reason:
            answer.interrupt(reason)
            reason = answer.finish_reason or reason  # a stop string may have been held back
        self._end(sequence, Finished(reason, sequence.usage, sequence.timings, answer.stop_string))

    def _fail(self, sequences: Iterable[Sequence], message: str) -> None:
        """End sequences of a failed step. Their slots are undefined, so they are cleared."""
        log.error("step failed error=%s", message)
        for sequence in list(sequences):
            assert sequence.slot is not None
            self._slots.invalidate(sequence.slot)
            self._end(sequence, ComputeFailure(message))

    def _end(self, sequence: Sequence, output: Output) -> None:
        """Emit the rest of the text and the last output, and free slot and sampler."""
        self._put_text(sequence)
        if sequence.slot is not None:
            is_cut = sequence.answer.stop_string is not None
            self._slots.settle_checkpoint(sequence.slot, is_needed=is_cut)
        self._scheduler.remove(sequence)
        sequence.sampler.close()
        self._put(sequence, output)

    def _emit_all_text(self) -> None:
        for sequence in self._scheduler.running:
            self._put_text(sequence)
        self._flush()

    def _put_due_text(self, sequence: Sequence) -> None:
        """Emit the text now, or with that of the next `emit_interval`."""
        if sequence.last_token_at - sequence.last_emit_at >= self._limits.emit_interval_seconds:
            self._put_text(sequence)

    def _put_text(self, sequence: Sequence) -> None:
        for chunk in sequence.answer.take_chunks():
            self._put(sequence, chunk)
            sequence.last_emit_at = sequence.last_token_at

    def _put(self, sequence: Sequence, output: Output) -> None:
        self._outputs.append((sequence.key, output))

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._emit(outputs)
