import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from services.contract.messages import Sampling
from services.inference.engine.backend import (
    ComputeFailure,
    ConstraintFailure,
    SampledToken,
    StepInterrupted,
)
from services.inference.engine.engine import Engine, Finished, Output, PrefillStarted
from services.inference.engine.kv_cache.idle_prefill import IdlePrompt
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.parts import ContentDelta, text_of
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import SchedulerLimits
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.fake_backend import FakeBackend

FAST = SchedulerLimits(idle_after_seconds=0.01)
End = Finished | ComputeFailure | ConstraintFailure
LONG = {"long": b"".join(b"%d " % number for number in range(300))[:900], "hi": b"hello"}


class EngineRun:
    """An engine over a scripted backend, and its outputs."""

    def __init__(self, backend: FakeBackend, parallel: int) -> None:
        self.died = False
        self._backend = backend
        self._outputs: queue.SimpleQueue[tuple[str, Output]] = queue.SimpleQueue()
        self.engine = Engine(backend, parallel, 10_000, self._collect, self._die, limits=FAST)

    def submit(
        self, prompt: str, key: str = "a", adapter: int = 0, session: str = "", **sampling: object
    ) -> Sequence:
        sequence = self.new(prompt, key, adapter, session, **sampling)
        self.engine.submit(sequence)
        return sequence

    def new(
        self, prompt: str, key: str = "a", adapter: int = 0, session: str = "", **sampling: object
    ) -> Sequence:
        filled = Sampling(**({"max_tokens": 100} | sampling))  # type: ignore[arg-type]
        sampler = self._backend.sampler(filled)
        answer = GeneratedAnswer(
            AnswerLimits(filled.max_tokens), StopRules.literal(filled.stop or ())
        )
        tokens = list(prompt.encode())
        return Sequence(key, tokens, filled, sampler, answer, adapter, session)

    def until(self, done: Callable[[str, Output], bool]) -> list[tuple[str, Output]]:
        """Return the outputs up to the first one that is `done`."""
        outputs: list[tuple[str, Output]] = []
        while not outputs or not done(*outputs[-1]):
            outputs.append(self._outputs.get(timeout=5))
        return outputs

    def drain(self) -> list[tuple[str, Output]]:
        return [self._outputs.get() for _ in range(self._outputs.qsize())]

    def finish(self, key: str = "a") -> tuple[str, End]:
        """Return the text and the last output of one answer."""
        outputs = self.until(lambda k, o: k == key and isinstance(o, End))
        text = "".join(
            text_of(o.part) for k, o in outputs if k == key and isinstance(o, AnswerChunk)
        )
        end = outputs[-1][1]
        assert isinstance(end, End)
        return text, end

    def _collect(self, outputs: list[tuple[str, Output]]) -> None:
        for output in outputs:
            self._outputs.put(output)

    def _die(self) -> None:
        self.died = True


@contextmanager
def running(backend: FakeBackend, parallel: int = 2) -> Iterator[EngineRun]:
    run = EngineRun(backend, parallel)
    run.engine.start()
    yield run
    run.engine.close()
    assert not run.died, "an invariant of the engine is broken"
    assert all(sampler.closed for sampler in backend.samplers)


def test_gpu_step_overhead_is_measured_before_first_answer() -> None:
    backend = FakeBackend({"hi": b"hello"}, step_seconds=0.05)
    backend.on_gpu = True
    with running(backend, parallel=4) as run:
        for key in "abc":
            run.submit("hi", key)
        assert run.finish("c")[0] == "hello"
    prompts = [len(step) for step in backend.steps if len(step[0].tokens) == len("hi")]
    assert 1 < max(prompts) <= 3, "prompts are prefilled in one step"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_steps_are_padded_where_the_backend_is_faster_with_it(on_gpu: bool) -> None:
    backend = FakeBackend({"": b"x" * 1000}, context=10_000)
    backend.on_gpu, backend.pads = on_gpu, True
    with running(backend, parallel=8) as run:
        for key in "abcdefgh":
            run.submit(key, key, max_tokens=100 if key in "bd" else 200)
        for _ in "abcdefgh":
            run.until(lambda _, output: isinstance(output, End))
    assert [1, 3] in backend.padded, "the slots of the two answers that ended first"


@pytest.mark.parametrize(("rate", "kinds"), [(1e6, [[PrefillStarted, AnswerChunk]]), (1.0, None)])
def test_only_a_long_prefill_is_announced_before_it(
    rate: float, kinds: list[list[type]] | None
) -> None:
    emits: list[list[tuple[str, Output]]] = []
    run = EngineRun(FakeBackend({"hi": b"hello"}), parallel=1)
    limits = SchedulerLimits(initial_prefill_rate=rate)
    engine = Engine(run._backend, 1, 10_000, emits.append, lambda: None, limits=limits)
    engine.submit(run.new("hi"))
    engine.step()
    found = [[type(output) for _, output in outputs] for outputs in emits]
    assert found == (kinds or [[PrefillStarted], [AnswerChunk]])
    engine.cancel("a")
    engine.step()


class Emits:
    """What an engine on a GPU emits, with the number of steps that had begun."""

    def __init__(self, backend: FakeBackend) -> None:
        backend.on_gpu = True
        self._backend = backend
        self._run = EngineRun(backend, parallel=2)
        limits = SchedulerLimits(emit_interval_seconds=0, min_speculation_gain=0, max_slowdown=1e9)
        self.engine = Engine(backend, 2, 10_000, self._note, lambda: None, limits=limits)
        self.found: list[tuple[int, str, Output]] = []

    def submit(self, prompt: str, key: str, max_tokens: int = 100) -> None:
        self.engine.submit(self._run.new(prompt, key, max_tokens=max_tokens))

    def end_of(self, key: str) -> int:
        """Compute steps until the answer's end is emitted. Return in which step that was."""
        for _ in range(1000):
            for step, found_key, output in self.found:
                if found_key == key and isinstance(output, Finished):
                    return step
            self.engine.step()
        raise AssertionError(f"the end of {key} is not emitted")

    def _note(self, outputs: list[tuple[str, Output]]) -> None:
        self.found += [(len(self._backend.steps), key, output) for key, output in outputs]


def test_text_is_emitted_while_a_gpu_computes_the_next() -> None:
    emits = Emits(FakeBackend({"hi": b"hello"}))
    emits.submit("hi", "a")
    emits.end_of("a")
    texts = [(step, text_of(o.part)) for step, _, o in emits.found if isinstance(o, AnswerChunk)]
    assert texts[0] == (1, "h"), "the first token does not wait for a step"
    assert texts[1] == (3, "e"), "the second one is emitted during the third step"


def test_answer_that_ends_beside_another_waits_one_step_only() -> None:
    backend = FakeBackend({"hi": b"hello", "long": b"x" * 900})
    emits = Emits(backend)
    emits.submit("long", "a")
    emits.submit("hi", "b")
    ended = emits.end_of("b")
    assert ended == 1 + max(n for n, chunks in enumerate(backend.steps, 1) if len(chunks) == 2)


def test_gpu_emits_beside_drafts() -> None:
    backend = FakeBackend({"go": b"one two three " * 30}, can_verify=True)
    emits = Emits(backend)
    emits.submit("go", "a", max_tokens=300)
    emits.end_of("a")
    assert backend.verified
    steps = [step for step, _, output in emits.found if isinstance(output, AnswerChunk)]
    assert all(later - earlier <= 2 for earlier, later in zip(steps, steps[1:], strict=False))


def test_failure_of_a_step_on_a_gpu_is_emitted_at_once() -> None:
    backend = FakeBackend({"hi": b"hello"})
    emits = Emits(backend)
    emits.submit("hi", "a")
    emits.engine.step()
    backend.fails = True
    emits.engine.step()
    assert isinstance(emits.found[-1][2], ComputeFailure)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_first_token_is_followed_by_a_pause_on_a_cpu(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("services.inference.engine.engine.time.sleep", pauses.append)
    backend = FakeBackend({"hi": b"hello"})
    backend.on_gpu = on_gpu
    run = EngineRun(backend, parallel=1)
    run.submit("hi")
    for _ in range(4):
        run.engine.step()
    assert pauses.count(FAST.first_token_pause_seconds) == (not on_gpu)
    run.engine.cancel("a")
    run.engine.step()


def test_withdrawn_sequence_never_gets_the_free_slot() -> None:
    run = EngineRun(FakeBackend(LONG), parallel=1)
    started = run.submit("long", "b")
    run.engine.step()
    withdrawn = run.submit("hi", "a")
    run.engine.step()
    assert withdrawn.withdraw() and not withdrawn.withdraw()
    assert not started.withdraw()
    run.engine.cancel("b")
    run.submit("hi", "c")
    run.engine.step()
    started_keys = [key for key, output in run.drain() if isinstance(output, PrefillStarted)]
    assert started_keys == ["b", "c"]
    run.engine.cancel("a")
    run.engine.step()
    ((_, end),) = [(key, output) for key, output in run.drain() if key == "a"]
    assert isinstance(end, Finished) and end.reason == "cancelled"
    assert withdrawn.generated == []


def test_sequence_withdrawn_early_ends_as_cancelled() -> None:
    backend = FakeBackend({"hi": b"hello"})
    run = EngineRun(backend, parallel=1)
    withdrawn = run.new("hi", "a")
    assert withdrawn.withdraw()
    run.engine.cancel("a")  # comes first, and finds nothing
    run.engine.submit(withdrawn)
    run.submit("hi", "b")
    run.engine.step()
    (end,) = [output for key, output in run.drain() if key == "a"]
    assert isinstance(end, Finished) and end.reason == "cancelled"
    assert [sampler.closed for sampler in backend.samplers] == [True, False]


def test_complete_answer_that_was_withdrawn_ends_as_cancelled() -> None:
    run = EngineRun(FakeBackend({"hi": b"hello"}), parallel=1)
    complete, withdrawn = (run.new("hi", key, max_tokens=1) for key in "ab")
    for sequence in (complete, withdrawn):  # as a resume does
        sequence.answer.push(SampledToken(ord("h")), b"h", is_end=False)
        assert sequence.answer.finish_reason == "length"
    assert withdrawn.withdraw()
    for sequence in (complete, withdrawn):
        run.engine.submit(sequence)
    run.engine.cancel("b")
    run.engine.step()
    ends = {key: output.reason for key, output in run.drain() if isinstance(output, Finished)}
    assert ends == {"a": "length", "b": "cancelled"}


def test_answer_is_complete_and_ends_with_stop() -> None:
    with running(FakeBackend({"hi": b"hello"})) as run:
        run.submit("hi")
        text, end = run.finish()
        assert text == "hello"
        assert isinstance(end, Finished)
        assert (end.reason, end.usage.prompt_tokens, end.usage.completion_tokens) == ("stop", 2, 6)


def test_outputs_start_with_counts_and_chunks_have_offsets() -> None:
    with running(FakeBackend({"hi": "né".encode()})) as run:
        run.submit("hi")
        outputs = [o for _, o in run.until(lambda _, o: isinstance(o, Finished))]
        assert outputs[:3] == [
            PrefillStarted(2, 0),
            AnswerChunk(0, ContentDelta("n"), (ord("n"),)),
            AnswerChunk(1, ContentDelta("é"), tuple("é".encode())),
        ]


def test_max_tokens_ends_answer_with_length() -> None:
    with running(FakeBackend({"hi": b"hello"})) as run:
        run.submit("hi", max_tokens=3)
        text, end = run.finish()
        assert text == "hel" and isinstance(end, Finished) and end.reason == "length"


def test_full_context_window_ends_answer_with_length() -> None:
    with running(FakeBackend({"hi": b"x" * 100}, context=12)) as run:
        run.submit("hi")
        text, end = run.finish()
        assert text == "x" * 10 and isinstance(end, Finished) and end.reason == "length"


def test_stop_string_ends_answer_and_is_not_emitted() -> None:
    with running(FakeBackend({"hi": b"fine\nUser: and on"})) as run:
        run.submit("hi", stop=("\nUser:",))
        text, end = run.finish()
        assert text == "fine" and isinstance(end, Finished) and end.reason == "stop"


def test_partial_stop_string_is_emitted_at_the_end() -> None:
    with running(FakeBackend({"hi": b"fine\nUse"})) as run:
        run.submit("hi", stop=("\nUser:",))
        assert run.finish()[0] == "fine\nUse"


def test_partial_stop_string_is_dropped_at_max_tokens() -> None:
    with running(FakeBackend({"hi": b"fine\nUser: me"})) as run:
        run.submit("hi", stop=("\nUser:",), max_tokens=8)
        text, end = run.finish()
        assert text == "fine" and isinstance(end, Finished) and end.reason == "length"


def test_repetition_loop_ends_answer_with_loop() -> None:
    with running(FakeBackend({"hi": b"so " * 200})) as run:
        run.submit("hi", max_tokens=600)
        text, end = run.finish()
        assert text == ("so " * 43)[:128] and isinstance(end, Finished) and end.reason == "loop"


def test_end_of_grammar_ends_answer_with_stop() -> None:
    with running(FakeBackend({"hi": b"yes, and on"})) as run:
        run.submit("hi", grammar='root ::= "yes"', stop=("s and",))
        text, end = run.finish()
        assert text == "yes" and isinstance(end, Finished) and end.reason == "stop"


def test_constraint_failure_ends_only_its_own_answer() -> None:
    with running(FakeBackend({"no": b"yes or no", "hi": b"hello"})) as run:
        run.submit("no", grammar='root ::= "yes" [0-9]')
        assert run.finish() == ("yes", ConstraintFailure("scripted"))
        run.submit("hi", key="b")
        assert run.finish("b")[0] == "hello"


def test_eight_sequences_are_decoded_in_one_batch() -> None:
    backend = FakeBackend({f"q{i}": f"answer {i}".encode() for i in range(8)})
    run = EngineRun(backend, parallel=8)
    for i in range(8):
        run.submit(f"q{i}", key=str(i))
    texts = dict.fromkeys("01234567", "")
    while len(backend.steps) < 8 + 8:
        run.engine.step()
        for key, output in run.drain():
            texts[key] += text_of(output.part) if isinstance(output, AnswerChunk) else ""
    assert texts == {str(i): f"answer {i}" for i in range(8)}
    assert [len(step) for step in backend.steps] == [1] * 8 + [8] * 8


def test_cancel_frees_slot_at_next_step() -> None:
    with running(FakeBackend(LONG, step_seconds=0.001), parallel=1) as run:
        run.submit("long", max_tokens=900)
        run.until(lambda _, o: isinstance(o, AnswerChunk))
        run.engine.cancel("a")
        text, end = run.finish()
        assert isinstance(end, Finished) and end.reason == "cancelled" and len(text) < 900
        run.submit("hi", key="b")
        assert run.finish("b")[0] == "hello"


class EndlessStep(FakeBackend):
    """Computes until it is interrupted."""

    def __init__(self) -> None:
        super().__init__({"hi": b"hello"})
        self.began, self._interrupted = threading.Event(), threading.Event()

    def decode(self, *_: object, **__: object) -> NoReturn:
        self.began.set()
        assert self._interrupted.wait(5), "the step goes on"
        raise StepInterrupted

    def interrupt(self) -> None:
        super().interrupt()
        self._interrupted.set()


def test_cancel_interrupts_a_step_of_that_sequence_alone() -> None:
    backend = EndlessStep()
    with running(backend) as run:
        run.submit("hi")
        assert backend.began.wait(5)
        run.engine.cancel("b")  # unknown
        before = backend.interruptions
        run.engine.cancel("a")
        _, end = run.finish()
    assert isinstance(end, Finished) and end.reason == "cancelled"
    assert (before, backend.interruptions) == (0, 1)


def test_cancel_does_not_interrupt_a_step_of_several_sequences() -> None:
    backend = FakeBackend(LONG, step_seconds=0.001)
    with running(backend) as run:
        for key in "ab":
            run.submit("long", key, max_tokens=900)
        run.until(lambda key, output: key == "b" and isinstance(output, AnswerChunk))
        run.engine.cancel("a")
        run.finish("a")
        assert not backend.interruptions
        run.engine.cancel("b")
        run.finish("b")


def test_cancel_in_the_queue_ends_waiting_sequence() -> None:
    with running(FakeBackend(LONG, step_seconds=0.001), parallel=1) as run:
        run.submit("long", max_tokens=900)
        run.submit("hi", key="b")
        run.engine.cancel("b")
        text, end = run.finish("b")
        assert text == "" and isinstance(end, Finished) and end.reason == "cancelled"
        run.engine.cancel("a")
        run.finish("a")


def test_cancel_of_unknown_key_does_nothing() -> None:
    with running(FakeBackend({"hi": b"hello"})) as run:
        run.engine.cancel("a")
        run.submit("hi")
        assert run.finish()[0] == "hello"
        run.engine.cancel("a")


def test_next_turn_computes_only_new_tokens() -> None:
    backend = FakeBackend({"hi": b"hello", "hihello?": b"yes"})
    with running(backend) as run:
        run.submit("hi")
        run.finish()
        before = backend.computed
        run.submit("hihello?", key="b")
        assert run.finish("b")[0] == "yes"
        assert backend.computed - before == len("?") + len("yes")
        throughput = run.engine.throughput
        assert throughput.prefilled_tokens == len("hi") + len("?"), "without cached ones"
        assert throughput.generated_tokens == len("hello") + len("yes") + 2, "with ends"


def test_failed_step_ends_its_sequences_not_the_engine() -> None:
    backend = FakeBackend({"hi": b"hello"})
    with running(backend) as run:
        backend.fails = True
        run.submit("hi")
        text, end = run.finish()
        assert text == "" and end == ComputeFailure("scripted")
        run.submit("hi", key="b")
        assert run.finish("b")[0] == "hello"


def test_invalid_logits_fail_one_answer_and_clear_its_slot() -> None:
    with running(FakeBackend({"bad": b"so\0", "badso": b"fine", "long": b"x" * 90})) as run:
        run.submit("long", key="b")
        run.submit("bad")
        assert run.finish() == ("so", ComputeFailure("scripted"))
        text, end = run.finish("b")
        assert text.endswith("x") and isinstance(end, Finished) and end.reason == "stop"
        run.submit("badso")
        outputs = run.until(lambda _, o: isinstance(o, Finished))
        assert outputs[0] == ("a", PrefillStarted(5, cached_tokens=0))
        assert "".join(text_of(o.part) for _, o in outputs if isinstance(o, AnswerChunk)) == "fine"


def test_adapters_generate_their_own_answers_concurrently() -> None:
    with running(FakeBackend({"long": b"x" * 90}, step_seconds=0.001), parallel=4) as run:
        for key, adapter in (("a", 0), ("b", 1), ("c", 0), ("d", 2)):
            run.submit("long", key, adapter)
        texts = dict.fromkeys("abcd", "")
        finished: set[str] = set()
        while len(finished) < 4:
            ((key, output),) = run.until(lambda *_: True)
            texts[key] += text_of(output.part) if isinstance(output, AnswerChunk) else ""
            finished |= {key} if isinstance(output, Finished) else set()
    lower, upper = "x" * 90, "X" * 90
    assert texts == {"a": lower, "b": upper, "c": lower, "d": upper}


def test_failed_step_of_one_adapter_leaves_others_usable() -> None:
    backend = FakeBackend({"hi": b"hello"})
    with running(backend) as run:
        backend.fails = True
        run.submit("hi", adapter=1)
        assert run.finish()[1] == ComputeFailure("scripted")
        run.submit("hi", "b", adapter=2)
        assert run.finish("b")[0] == "HELLO"
        run.submit("hi", "c")
        assert run.finish("c")[0] == "hello"


def test_cancel_of_adapters_only_stream_passes_the_turn() -> None:
    with running(FakeBackend(LONG, step_seconds=0.001)) as run:
        run.submit("long", "a", adapter=1, max_tokens=900)
        run.until(lambda key, output: isinstance(output, AnswerChunk))
        run.submit("hi", "b")
        run.engine.cancel("a")
        text, end = run.finish("b")
        assert text == "hello" and isinstance(end, Finished)


def test_pending_text_is_emitted_before_prefill() -> None:
    backend = FakeBackend({"long": b"x" * 900, "hi": b"hello"})
    run = EngineRun(backend, parallel=2)
    run.submit("long", max_tokens=900)
    for _ in range(4):
        run.engine.step()
    run.submit("y" * 400 + "hi", key="b")
    while all(chunk.slot == 0 for chunk in backend.steps[-1]):
        run.engine.step()
    emitted = sum(
        len(text_of(o.part)) for key, o in run.drain() if key == "a" and isinstance(o, AnswerChunk)
    )
    assert emitted == sum(step[0].slot == 0 for step in backend.steps)


def test_request_interrupts_idle_prefill_which_resumes_later() -> None:
    backend = FakeBackend({"hi": b"hello"}, step_seconds=0.03)
    with running(backend) as run:
        run.engine.prefill_when_idle(IdlePrompt([7] * 500, 0, "s"))
        wait_for_tokens(backend, 1)
        run.submit("hi")
        run.finish()
        assert backend.computed < 300
        wait_for_tokens(backend, 500 + len("hihello"))
    assert backend.computed == 500 + len("hihello")


def test_request_of_its_session_cancels_an_idle_prefill() -> None:
    backend = FakeBackend({"hi": b"hello"})
    with running(backend) as run:
        for session, length in (("s", 50), ("other", 7)):
            run.engine.prefill_when_idle(IdlePrompt([7] * length, 0, session))
        run.submit("hi", session="s")
        run.finish()
        wait_for_tokens(backend, 7 + len("hihello"))
    assert backend.computed == 7 + len("hihello")


def wait_for_tokens(backend: FakeBackend, computed: int) -> None:
    deadline = time.monotonic() + 10
    while backend.computed < computed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
