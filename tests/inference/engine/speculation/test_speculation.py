"""The engine with speculative decoding: every answer is as it is without."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contract.messages import Sampling
from services.inference.engine.backend import ComputeFailure, ConstraintFailure
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.kv_cache import prefix
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.parts import text_of
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import DEFAULT_LIMITS, SchedulerLimits
from services.inference.engine.scheduling.sequence import Sequence
from tests.inference.fake_backend import END, FakeBackend
from tests.inference.tag_parser import TagParser

ALWAYS = replace(  # whatever the steps cost
    DEFAULT_LIMITS, min_speculation_gain=0, max_slowdown=1e9
)
NEVER = replace(ALWAYS, max_speculating_streams=0)
PARALLEL = 4
QUOTE = "the quick brown fox jumps over the lazy dog, "
ASK = f"quote {QUOTE}!"
ANSWER = (QUOTE + "as they say: " + QUOTE).encode()


class Asked(NamedTuple):
    prompt: str = ASK
    earlier: tuple[int, ...] = ()  # tokens before the prompt
    max_tokens: int = 300
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    adapter: int = 0
    is_deterministic: bool = False
    reasoning: int | None = None  # tokens of a thought, in the tags of TagParser


class Ended(NamedTuple):
    parts: list[tuple[str, str]]  # kinds and texts
    tokens: list[int]
    end: object


class EngineRun:
    """An engine over a scripted backend, stepped in this thread."""

    def __init__(self, backend: FakeBackend, limits: SchedulerLimits = ALWAYS) -> None:
        self.backend = backend
        self.engine = Engine(backend, PARALLEL, 10_000, self._collect, pytest.fail, limits=limits)
        self.sequences: dict[str, Sequence] = {}
        self.ends: dict[str, Output] = {}
        self._parts: dict[str, list[tuple[str, str]]] = {}

    def ask(self, *asked: Asked) -> list[Ended]:
        """Ask all at once. Return the answers, in order."""
        keys = [self.submit(each) for each in asked]
        while len(self.ends) < len(self.sequences):
            self.step()
        self.engine._scheduler.check_invariants()
        return [
            Ended(self._parts.get(key, []), self.sequences[key].generated, self._end(key))
            for key in keys
        ]

    def submit(self, asked: Asked) -> str:
        key = str(len(self.sequences))
        sampling = Sampling(max_tokens=asked.max_tokens, grammar=asked.grammar)
        answer = GeneratedAnswer(
            AnswerLimits(asked.max_tokens, reasoning=asked.reasoning),
            StopRules.literal(asked.stop),
            None if asked.reasoning is None else TagParser(),
            reasoning_end=tuple(b"</think>"),
            thought_opening=list(b"<think>"),
            max_calls=1,
        )
        self.sequences[key] = Sequence(
            key,
            [*asked.earlier, *asked.prompt.encode()],
            sampling,
            self.backend.sampler(sampling),
            answer,
            asked.adapter,
            is_deterministic=asked.is_deterministic,
        )
        self.engine.submit(self.sequences[key])
        return key

    def step(self) -> None:
        """Perform a step, and check that each slot has the tokens that its key says."""
        self.engine.step()
        for number, slot in enumerate(self.engine._slots._slots):
            key = np.frombuffer(slot.key[prefix.HEADER_BYTES :], np.int32).tolist()
            assert self.backend.cells.get(number, []) == key

    @property
    def counts(self) -> tuple[int, int]:
        """The drafted and the accepted tokens of all answers."""
        usages = [end.usage for end in self.ends.values() if isinstance(end, Finished)]
        drafted = sum(usage.drafted_tokens for usage in usages)
        return drafted, sum(usage.accepted_tokens for usage in usages)

    def _collect(self, outputs: list[tuple[str, Output]]) -> None:
        for key, output in outputs:
            if isinstance(output, AnswerChunk):
                self._add(self._parts.setdefault(key, []), output)
            elif isinstance(output, Finished | ConstraintFailure | ComputeFailure):
                self.ends[key] = output

    def _add(self, parts: list[tuple[str, str]], chunk: AnswerChunk) -> None:
        """Add a chunk, whose length depends on times, to the text of its kind."""
        kind = type(chunk.part).__name__
        before = parts.pop()[1] if parts and parts[-1][0] == kind else ""
        parts.append((kind, before + text_of(chunk.part)))

    def _end(self, key: str) -> object:
        end = self.ends[key]
        if not isinstance(end, Finished):
            return end
        usage = end.usage
        counts = usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens
        return end.reason, end.stop_string, counts


def check(answers: dict[str, bytes], *asked: Asked, context: int = 1000) -> EngineRun:
    """Check that answers don't depend on speculation. Return the run with it."""
    plain = EngineRun(FakeBackend(answers, context, can_verify=True), NEVER)
    run = EngineRun(FakeBackend(answers, context, can_verify=True), ALWAYS)
    assert run.ask(*asked) == plain.ask(*asked)
    assert plain.backend.verified == []
    return run


def test_quotation_takes_fewer_steps() -> None:
    run = check({"!": ANSWER}, Asked())
    drafted, accepted = run.counts
    assert drafted >= accepted > len(QUOTE) // 2  # half: draft sizes depend on measured step times
    assert len(run.backend.steps) < len(ANSWER) + 1 - accepted + 2
    assert len(run.sequences["0"].generated) == len(ANSWER) + 1


def test_wrong_drafts_change_nothing() -> None:
    answer = b"".join(QUOTE[:n].encode() + b"; " for n in (6, 9, 20, 7, 12))
    run = check({"!": answer}, Asked())
    drafted, accepted = run.counts
    assert drafted > accepted > 0


@pytest.mark.parametrize("max_tokens", range(1, 60, 3))
def test_draft_ends_at_max_tokens(max_tokens: int) -> None:
    run = check({"!": ANSWER}, Asked(max_tokens=max_tokens))
    assert len(run.sequences["0"].generated) == max_tokens
    tokens = [len(chunk.tokens) for step in run.backend.steps[1:] for chunk in step]
    assert sum(tokens) < 2 * max_tokens


@pytest.mark.parametrize("room", range(1, 60, 3))
def test_draft_ends_at_full_context_window(room: int) -> None:
    run = check({"!": ANSWER}, Asked(), context=len(ASK) + room)
    assert len(run.sequences["0"].generated) == room


def test_end_token_in_a_draft_ends_the_answer() -> None:
    run = check({"!": ANSWER}, Asked(earlier=(*ANSWER, END)))
    assert END in run.backend.verified[-1][0].tokens
    assert run.sequences["0"].generated == [*ANSWER, END]


@pytest.mark.parametrize("stop", ["jumps", "dog, as", "lazy dog, as they", "g, a", QUOTE[20:]])
def test_stop_string_amid_a_draft_ends_the_answer(stop: str) -> None:
    run = check({"!": ANSWER}, Asked(stop=(stop,)))
    assert run.counts[1] > 0
    assert run.ends["0"].stop_string == stop  # type: ignore[union-attr]


def test_text_held_back_amid_a_draft_is_emitted_later() -> None:
    run = check({"!": ANSWER}, Asked(stop=("over the moon", "dog, so")))
    assert run.counts[1] > 0


def test_grammar_ends_the_answer_amid_a_draft() -> None:
    run = check({"!": ANSWER}, Asked(grammar=f'root ::= "{QUOTE[:30]}"'))
    assert bytes(run.sequences["0"].generated) == ANSWER[:30]


def test_grammar_that_forbids_a_draft_fails_as_without() -> None:
    run = check({"!": ANSWER}, Asked(grammar=f'root ::= "{QUOTE[:30]}" [0-9]'))
    assert run.ends["0"] == ConstraintFailure("scripted")


def test_nan_amid_a_draft_fails_and_clears_the_slot() -> None:
    run = check({"!": ANSWER[:20] + b"\0"}, Asked())
    assert run.ends["0"] == ComputeFailure("scripted")
    assert run.backend.length(0) == 0


@pytest.mark.parametrize("budget", [0, 1, 12, 30])
def test_end_of_reasoning_is_forced_amid_a_draft(budget: int) -> None:
    answer = f"<think>{QUOTE}</think>{QUOTE}<think>again</think>{QUOTE}".encode()
    run = check({"!": answer}, Asked(f"<think>{ASK}", reasoning=budget))
    assert run.counts[1] > 0


def test_call_that_is_complete_ends_the_answer_amid_a_draft() -> None:
    call = '<call>find {"text": "the quick brown fox"}</call>'
    run = check({"!": f"{call}{call}".encode()}, Asked(f"{call}{call}!", reasoning=9))
    assert run.counts[1] > 0


def test_several_streams_with_and_without_drafts() -> None:
    answers = {"!": ANSWER, "?": bytes(range(97, 123)) * 2, ".": QUOTE[:20].encode()}
    asked = [Asked(), Asked("free?"), Asked(f"{QUOTE}."), Asked(max_tokens=30)]
    run = check(answers, *asked)
    assert any(len(step) == PARALLEL for step in run.backend.verified)


def test_streams_of_several_adapters_have_drafts() -> None:
    asked = [Asked(adapter=1, prompt=f"{QUOTE.upper()}!"), Asked(adapter=0)]
    run = check({"!": ANSWER}, *asked)
    assert {step[0].adapter for step in run.backend.verified} == {0, 1}


def test_next_turn_reuses_the_accepted_tokens() -> None:
    answers = {f"{QUOTE}!": ANSWER, "?": b"yes"}
    run = check(answers, Asked())
    turn = ASK + ANSWER.decode()
    before = run.backend.computed
    (ended,) = run.ask(Asked(f"{turn}?"))
    assert run.backend.computed - before == len("?yes")
    assert bytes(ended.tokens[:-1]) == b"yes"


def test_failed_step_with_drafts_ends_its_sequences() -> None:
    run = EngineRun(FakeBackend({"!": ANSWER}, can_verify=True))
    run.submit(Asked())
    while not run.backend.verified:
        run.step()
    run.backend.fails = True
    run.ask()
    assert run.ends["0"] == ComputeFailure("scripted")
    assert run.ask(Asked())[0].tokens[:-1] == list(ANSWER)


def test_cancel_between_drafts_ends_the_answer() -> None:
    run = EngineRun(FakeBackend({"!": ANSWER}, can_verify=True))
    run.submit(Asked())
    while not run.backend.verified:
        run.step()
    run.engine.cancel("0")
    run.ask()
    assert run.sequences["0"].generated == list(ANSWER)[: len(run.sequences["0"].generated)]
    assert run.ask(Asked())[0].tokens[:-1] == list(ANSWER)


def test_seeded_request_and_its_neighbours_have_no_drafts() -> None:
    run = check({"!": ANSWER}, Asked(is_deterministic=True), Asked(max_tokens=20))
    alone = [step for step in run.backend.verified if len(step) > 1 or step[0].slot == 0]
    assert alone == []


def test_more_streams_than_the_limit_have_no_drafts() -> None:
    limits = replace(ALWAYS, max_speculating_streams=1)
    run = EngineRun(FakeBackend({"!": ANSWER}, can_verify=True), limits)
    run.ask(Asked(), Asked())
    assert all(len(step) == 1 for step in run.backend.verified)


def test_backend_that_cannot_verify_gets_no_drafts() -> None:
    run = EngineRun(FakeBackend({"!": ANSWER}))
    run.ask(Asked())
    assert run.backend.verified == []


def test_nothing_is_drafted_beside_a_prefill() -> None:
    run = EngineRun(FakeBackend({"!": ANSWER * 5, "?": b"yes"}, context=3000, can_verify=True))
    run.submit(Asked())
    while not run.backend.verified:
        run.step()
    run.submit(Asked("x" * 2000 + "?"))
    steps, verified = len(run.backend.steps), len(run.backend.verified)
    while not run.sequences["1"].generated:
        run.step()
    assert len(run.backend.steps) > steps + 3 and len(run.backend.verified) == verified


def asked_texts() -> st.SearchStrategy[str]:
    """Texts of few words, which repeat each other."""
    words = st.sampled_from(["a ", "bc ", "def ", "ghij ", QUOTE, "<think>", "</think>", "é"])
    return st.lists(words, max_size=12).map("".join)


@st.composite
def requests(draw: st.DrawFn) -> tuple[Asked, str]:
    asked = Asked(
        draw(asked_texts()),
        max_tokens=draw(st.integers(1, 80)),
        stop=draw(
            st.lists(st.sampled_from(["c d", "fox jumps", "hij a", "é"]), max_size=2).map(tuple)
        ),
        adapter=draw(st.integers(0, 1)),
        reasoning=draw(st.none() | st.integers(0, 20)),
    )
    return asked, draw(asked_texts())


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.lists(requests(), min_size=1, max_size=PARALLEL), st.integers(0, 100))
def test_any_answers_are_as_without_drafts(requests: list[tuple[Asked, str]], room: int) -> None:
    asked = [each._replace(prompt=f"{each.prompt}{n}!") for n, (each, _) in enumerate(requests)]
    answers = {f"{n}!": text.encode() for n, (_, text) in enumerate(requests)}
    context = max(len(each.prompt.encode()) for each in asked) + 1 + room
    check(answers, *asked, context=context)
