"""
A resumed answer equals the undisturbed one, interrupted at each of its characters, with real
tokenizers and with the demo model.
"""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from services.contract.errors import ServiceError
from services.contract.messages import (
    JsonSchema,
    JsonSchemaFormat,
    Resume,
    ResumeState,
    Sampling,
)
from services.inference.engine.backend import Backend, SampledToken
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.llama import Llama
from services.inference.engine.output.answer_format import AnswerFormat, ReasoningFormat
from services.inference.engine.output.answer_parser import FormatParser
from services.inference.engine.output.generated_answer import (
    AnswerChunk,
    AnswerLimits,
    GeneratedAnswer,
)
from services.inference.engine.output.parts import ContentDelta, text_of
from services.inference.engine.output.resume import restore_answer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import SchedulerLimits
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.settings import STOPS
from tests.fakes import text_resume
from tests.inference.engine.demo import open_demo
from tests.inference.fake_backend import FakeBackend
from tests.inference.scripted_logits import ScriptedLogits

EMPTY_STATE = ResumeState("", b"", 0, 0, 0, datetime.now(UTC), 0, 0)
GREEDY = Sampling(temperature=0, max_tokens=60)
SEEDED = Sampling(temperature=0.8, top_k=40, top_p=0.95, repeat_penalty=1.2, seed=7, max_tokens=60)
TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve 🙂🙂 words\n\nUnbelievably  so.\nUser: no"
PERSON = JsonSchemaFormat(
    JsonSchema(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "ages": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["name", "ages"],
            "additionalProperties": False,
        },
    )
)


class Received(NamedTuple):
    """The chunks of an answer, and how it ended."""

    chunks: list[AnswerChunk]
    end: Output

    @property
    def text(self) -> str:
        return "".join(text_of(chunk.part) for chunk in self.chunks)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.token_ids)

    @property
    def mirostat_mu(self) -> float | None:
        states = [each.mirostat_mu for each in self.chunks if each.mirostat_mu is not None]
        return states[-1] if states else None

    @property
    def ending(self) -> tuple[object, str | None, int, int]:
        assert isinstance(self.end, Finished)
        reason, usage, _, stop_string = self.end
        return reason, stop_string, usage.prompt_tokens, usage.completion_tokens


EMIT_EACH_TOKEN = SchedulerLimits(emit_interval_seconds=0.0)


@pytest.fixture(scope="module")
def demo_model() -> Iterator[Llama]:
    llama = open_demo(parallel=2)
    yield llama
    llama.close()


def new_answer(sampling: Sampling, stops: StopRules | None = None) -> GeneratedAnswer:
    limits = AnswerLimits(
        sampling.max_tokens,
        minimum=sampling.min_tokens or 0,
        may_loop=bool(sampling.ignore_eos),
    )
    return GeneratedAnswer(limits, stops or StopRules.literal(sampling.stop or ()))


def generate(
    backend: Backend,
    prompt: list[int],
    sampling: Sampling,
    resume: Resume | None = None,
    stops: StopRules | None = None,
) -> Received:
    """Return what an engine emits for one request."""
    sampler = backend.sampler(sampling, None, prompt)
    answer = new_answer(sampling, stops)
    if resume:
        restore_answer(answer, resume, sampler, backend)
    outputs: list[Output] = []

    def died() -> None:
        raise AssertionError

    def emit(new: list[tuple[str, Output]]) -> None:
        outputs.extend(output for _, output in new)

    run = Engine(backend, 1, 0, emit, died, limits=EMIT_EACH_TOKEN)
    run.submit(Sequence("a", prompt, sampling, sampler, answer))
    while not outputs or not isinstance(outputs[-1], Finished):
        run.step()
    backend.truncate(0, 0)
    return Received([o for o in outputs if isinstance(o, AnswerChunk)], outputs[-1])


def interruptions(whole: Received, in_chunk: int | None) -> Iterator[tuple[Received, str]]:
    """
    Yield what a reader may have when the worker is lost: the last chunk maybe in part, at each of
    its characters, or after `in_chunk` of them and at its end.
    """
    yield Received([], whole.end), ""
    for count, chunk in enumerate(whole.chunks, start=1):
        received, end = Received(whole.chunks[:count], whole.end), len(text_of(chunk.part))
        lengths = range(1, end + 1) if in_chunk is None else sorted({min(in_chunk, end), end})
        for length in lengths:
            yield received, whole.text[: chunk.offset + length]


def assert_resumes(
    backend: Backend,
    prompt: list[int],
    sampling: Sampling,
    whole: Received,
    stops: StopRules | None = None,
    step: int = 1,
    in_chunk: int | None = None,
) -> None:
    """Assert that the answer, interrupted anywhere, ends up the same."""
    for received, text in islice(interruptions(whole, in_chunk), 0, None, step):
        resume = text_resume(EMPTY_STATE, received.token_ids, text, received.mirostat_mu)
        rest = generate(backend, prompt, sampling, resume, stops)
        assert text + rest.text == whole.text, (text, received.token_ids)
        assert rest.ending == whole.ending, text
        assert received.token_ids + rest.token_ids == whole.token_ids, text
        offset = len(text)
        for chunk in rest.chunks:
            assert chunk.offset == offset
            offset += len(text_of(chunk.part))


@pytest.mark.parametrize("name", ["qwen2", "llama-spm", "gpt-2"])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, stop=("\nUser:", "\n\n\n", "so.\nX", "🙂🙂🙂")),
        replace(GREEDY, stop=("\nUser:",), max_tokens=33),
        SEEDED,
        replace(SEEDED, seed=8, presence_penalty=0.5, stop=("\nUser:", "ds")),
    ],
    ids=["greedy", "stops", "length", "seeded", "seeded with stops"],
)
def test_resume_at_any_character_with_a_real_tokenizer(name: str, sampling: Sampling) -> None:
    backend = ScriptedLogits(name, TEXT)
    whole = generate(backend, [*backend.PROMPT], sampling)
    assert len(whole.text) > 20
    assert_resumes(backend, [*backend.PROMPT], sampling, whole)


SAMPLERS = [
    replace(SEEDED, repeat_last_n=-1, presence_penalty=0.7),
    replace(SEEDED, dry_multiplier=2.0, dry_allowed_length=0, dry_penalty_last_n=-1),
    replace(SEEDED, xtc_probability=0.5, xtc_threshold=0.02),
    replace(SEEDED, typical_p=0.8, min_keep=3),
    replace(SEEDED, top_n_sigma=2.5, top_k=0),
    replace(SEEDED, dynatemp_range=0.5, dynatemp_exponent=1.5),
    replace(SEEDED, mirostat=1, mirostat_tau=3.0, mirostat_eta=0.5),
    replace(SEEDED, mirostat=2, mirostat_tau=3.0, mirostat_eta=0.5),
    replace(SEEDED, min_tokens=50, stop=("世", "naïve", "🙂🙂")),
    replace(SEEDED, ignore_eos=True),
    replace(GREEDY, dry_multiplier=2.0, dry_allowed_length=0, mirostat=2, xtc_probability=1.0),
]


@pytest.mark.parametrize("sampling", SAMPLERS, ids=str)
def test_resume_at_any_chunk_with_each_sampler(sampling: Sampling) -> None:
    backend = ScriptedLogits("qwen2", TEXT)
    whole = generate(backend, [*backend.PROMPT], sampling)
    assert len(whole.text) > 20
    assert_resumes(backend, [*backend.PROMPT], sampling, whole, in_chunk=1)


@pytest.mark.parametrize("sampling", SAMPLERS, ids=str)
def test_resume_at_any_chunk_with_a_sampler_and_a_grammar(sampling: Sampling) -> None:
    sampling = replace(sampling, max_tokens=40, response_format=PERSON, stop=None)
    backend = ScriptedLogits("qwen2", '{"name": "Zoë 🙂", "ages": [1, 23]} and more')
    whole = generate(backend, [*backend.PROMPT], sampling)
    assert len(whole.text) > 20
    assert_resumes(backend, [*backend.PROMPT], sampling, whole, in_chunk=1)


@pytest.mark.parametrize("version", [1, 2])
def test_resume_without_the_state_of_mirostat_differs(version: int) -> None:
    sampling = replace(SEEDED, mirostat=version, mirostat_tau=1.0, mirostat_eta=1.0)
    backend = ScriptedLogits("qwen2", TEXT)
    whole = generate(backend, [*backend.PROMPT], sampling)
    received = Received(whole.chunks[:5], whole.end)
    resume = text_resume(EMPTY_STATE, received.token_ids, received.text)
    rest = generate(backend, [*backend.PROMPT], sampling, resume)
    assert received.text + rest.text != whole.text


@pytest.mark.parametrize("name", ["qwen2", "llama-spm"])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"response_format": PERSON}, '{"name": "Zoë 🙂", "ages": [1, 23]} and more'),
        ({"grammar": 'root ::= "ja" [^.]* ("ö" | "🙂")+ "."'}, "ja, naïve 世界 öö🙂. Gut"),
    ],
    ids=["json schema", "gbnf"],
)
def test_resume_at_any_character_with_a_grammar(
    name: str, sampling: Sampling, form: dict[str, object], text: str
) -> None:
    sampling = replace(sampling, max_tokens=30, **form)
    backend = ScriptedLogits(name, text)
    whole = generate(backend, [*backend.PROMPT], sampling)
    assert_resumes(backend, [*backend.PROMPT], sampling, whole)


@pytest.mark.parametrize("seed", range(12))
def test_resume_after_repeated_interruptions(seed: int) -> None:
    dice = random.Random(seed)
    text = "".join(dice.choices("aé世🙂 \n:", k=40)) + "🙂" * dice.randint(0, 20)
    stops = tuple("".join(dice.choices("aé世🙂 \n:", k=3)) for _ in range(4))
    sampling = replace(dice.choice([GREEDY, SEEDED]), seed=seed, stop=stops)
    backend = ScriptedLogits(dice.choice(["qwen2", "llama-spm", "gpt-2"]), text)
    whole = generate(backend, [*backend.PROMPT], sampling)
    for _ in range(12):
        ids: tuple[int, ...] = ()
        received, ending = "", None
        while ending != whole.ending:
            resume = text_resume(EMPTY_STATE, ids, received)
            rest = generate(backend, [*backend.PROMPT], sampling, resume)
            chunks = merge_some(rest.chunks, dice)
            delivered = chunks[: dice.randint(0, len(chunks))]
            ids += tuple(token for chunk in delivered for token in chunk.token_ids)
            cut = dice.choice([None, None, -1]) if delivered else None
            received += "".join(text_of(chunk.part) for chunk in delivered)[:cut]
            ending = rest.ending if len(delivered) == len(chunks) and cut is None else None
        assert received == whole.text and ids == whole.token_ids


def merge_some(chunks: list[AnswerChunk], dice: random.Random) -> list[AnswerChunk]:
    """Merge adjacent chunks, as if steps took less time than the interval between chunks."""
    merged: list[AnswerChunk] = []
    for chunk in chunks:
        if merged and dice.random() < 0.5:
            offset, part, ids, *_ = merged.pop()
            both = ContentDelta(text_of(part) + text_of(chunk.part))
            chunk = AnswerChunk(offset, both, ids + chunk.token_ids)
        merged.append(chunk)
    return merged


@pytest.mark.parametrize("max_tokens", [500, 90])
@pytest.mark.parametrize(
    "text",
    [
        "So.\n\nLet me: no\n\n```\nUser: x\n\n\n`` `\n```\nIt is.\n\nHere's an x:\n\nUser: me",
        "Well, it is:\nQuestion: a\n\nQuestion: b\n\nExample:\nUser: me",
        "A quiz:\n\nQuestion: a\n\nQuestion: b\n\nLet me go on.\nAnd `</s>`.\n\nSo</s>",
    ],
)
def test_resumed_answer_ends_at_the_same_chat_stop(text: str, max_tokens: int) -> None:
    backend, stops = FakeBackend({"hi": text.encode()}), StopRules.from_setting(STOPS, "hi")
    sampling = replace(GREEDY, max_tokens=max_tokens)
    whole = generate(backend, list(b"hi"), sampling, stops=stops)
    assert whole.ending[0] == ("stop" if max_tokens > len(text) else "length")
    assert len(whole.text) > 30 and whole.text != text
    assert_resumes(backend, list(b"hi"), sampling, whole, stops)


def test_resumed_answer_ends_at_the_same_loop() -> None:
    backend = FakeBackend({"hi": b"so it goes " * 40})
    sampling = Sampling(max_tokens=440)
    whole = generate(backend, list(b"hi"), sampling)
    assert whole.ending == ("loop", None, 2, 128)
    for length in range(0, len(whole.text) + 1, 9):
        text = whole.text[:length]
        resume = text_resume(EMPTY_STATE, whole.token_ids[:length], text)
        rest = generate(backend, list(b"hi"), sampling, resume)
        assert text + rest.text == whole.text and rest.ending == whole.ending


@pytest.mark.timeout(180)  # seconds on idle cores
@pytest.mark.parametrize(
    "sampling",
    [
        replace(GREEDY, max_tokens=48),
        replace(SEEDED, max_tokens=48, stop=("\n\n", "User:")),
        replace(SEEDED, max_tokens=32, response_format=PERSON),
    ],
    ids=["greedy", "seeded", "json schema"],
)
def test_resume_at_any_character_with_the_demo_model(demo_model: Llama, sampling: Sampling) -> None:
    prompt = question(demo_model, "What can you do?")
    whole = generate(demo_model, prompt, sampling)
    assert len(whole.token_ids) > 15
    assert_resumes(demo_model, prompt, sampling, whole)


@pytest.mark.timeout(180)
def test_resume_after_a_long_conversation_with_the_demo_model(demo_model: Llama) -> None:
    turn = question(demo_model, "Thank you!")
    turn += demo_model.tokenize("You are welcome!<|im_end|>\n", True)
    prompt = [*turn * 20, *question(demo_model, "Count to 20.")]
    sampling = replace(SEEDED, max_tokens=100)
    whole = generate(demo_model, prompt, sampling)
    assert len(prompt) > 300 and len(whole.token_ids) > 15
    assert_resumes(demo_model, prompt, sampling, whole, step=7)


def question(llama: Llama, text: str) -> list[int]:
    return llama.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", True)


@pytest.mark.parametrize(
    ("ids", "text", "reason"),
    [
        ((104,), "x", "the tokens do not spell the answer"),
        ((104,), "hi", "the tokens do not spell the answer"),
        ((257,), "", "a token is not in the model's vocabulary"),
    ],
)
def test_resume_with_impossible_tokens_is_rejected(
    ids: tuple[int, ...], text: str, reason: str
) -> None:
    backend = FakeBackend({})
    with pytest.raises(ServiceError, match=reason) as error:
        restore_answer(
            new_answer(GREEDY),
            text_resume(EMPTY_STATE, ids, text),
            backend.sampler(GREEDY),
            backend,
        )
    assert error.value.code == "invalid_request" and backend.samplers[0].closed


def test_resume_against_the_grammar_is_rejected() -> None:
    backend, sampling = FakeBackend({}), replace(GREEDY, grammar='root ::= "hi"')
    resume = text_resume(EMPTY_STATE, (120,), "x")
    with pytest.raises(ServiceError, match="can't be resumed"):
        restore_answer(new_answer(sampling), resume, backend.sampler(sampling), backend)


FORM = AnswerFormat(ReasoningFormat("<think>", "</think>"))
CALL = '<tool_call>\n{"name": "go", "arguments": {"a": "x y", "b": [1, 2]}}\n</tool_call>'
MARKED = [
    f"<think>\n\nso\n</think>\n <to \n\n {CALL} \n\n{CALL}\n  Done <tool",
    '<think>a</think> \n <  STOP {"name": "go"}',
    '```json\n{"name": "go"}\n```\n',
    f'  {{"arguments": {{"q": 1}}, "name": "go"}} ; {CALL}',
    f'{CALL}<tool_call>{{"name": "go", "arguments": {{"a":',
]


@pytest.mark.parametrize("text", MARKED)
@pytest.mark.parametrize("seed", range(6))
def test_resume_after_any_part_of_a_marked_answer(text: str, seed: int) -> None:
    draw = random.Random(seed)
    pieces = [piece.encode() for piece in cut(text, draw, seed + 1)]
    whole = marked_answer()
    push_rest(whole, pieces)
    chunks = whole.take_chunks()
    for count in range(1, len(chunks) + 1):
        received = chunks[:count]
        tokens = [token for chunk in received for token in chunk.token_ids]
        assert tokens == [*range(len(tokens))]
        answer = marked_answer()
        push_rest(answer, pieces, len(tokens))
        assert answer.skip_sent([chunk.part for chunk in received])
        push_rest(answer, pieces)
        rest = answer.take_chunks()
        assert [chunk.part for chunk in (*received, *rest)] == [chunk.part for chunk in chunks]
        assert (answer.finish_reason, answer.tokens) == (whole.finish_reason, whole.tokens)


def cut(text: str, draw: random.Random, longest: int) -> Iterator[str]:
    at = 0
    while at < len(text):
        end = at + draw.randint(1, longest)
        yield text[at:end]
        at = end


def marked_answer() -> GeneratedAnswer:
    parser = FormatParser(FORM, {"go": None})
    return GeneratedAnswer(AnswerLimits(1_000), StopRules.literal(("STOP",)), parser)


def push_rest(answer: GeneratedAnswer, pieces: list[bytes], count: int = 1_000) -> None:
    """Push the next ones of the first `count` tokens, the last of which ends the answer."""
    for token in range(len(answer.tokens), min(len(pieces) + 1, count)):
        if not answer.finish_reason:
            is_end = token == len(pieces)
            answer.push(SampledToken(token), b"" if is_end else pieces[token], is_end)
