"""
An answer that goes on elsewhere is the one that was not disturbed: cut at each of its characters,
with real tokenizers and with the demo model.
"""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
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
from services.inference.engine.backend import Backend
from services.inference.engine.engine import Engine, Finished, Output
from services.inference.engine.llama import Llama
from services.inference.engine.output.generated_text import GeneratedText, TextChunk
from services.inference.engine.output.resume import resumed_answer
from services.inference.engine.output.stops import StopRules
from services.inference.engine.scheduling.limits import SchedulerLimits
from services.inference.engine.scheduling.sequence import Sequence
from services.inference.settings import STOPS
from tests.inference.dream import Dream
from tests.inference.fake_backend import FakeBackend

NOTHING = ResumeState("", b"", 0, 0, 0, datetime.now(UTC), 0, 0)
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


class Said(NamedTuple):
    pieces: list[TextChunk]
    end: Output

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for piece in self.pieces for token in piece.token_ids)

    @property
    def ended(self) -> tuple[object, str | None, int, int]:
        assert isinstance(self.end, Finished)
        reason, usage, _, stop_string = self.end
        return reason, stop_string, usage.prompt_tokens, usage.completion_tokens


EMIT_EACH_TOKEN = SchedulerLimits(emit_interval_seconds=0.0)


@pytest.fixture(scope="module")
def demo() -> Iterator[Llama]:
    llama = Llama(
        Path("model/demo.gguf"),
        context=512,
        parallel=2,
        threads=1,
        gpu_layers=0,
        on_progress=lambda _: True,
    )
    yield llama
    llama.close()


def say(
    backend: Backend,
    prompt: list[int],
    sampling: Sampling,
    resume: Resume | None = None,
    stops: StopRules | None = None,
) -> Said:
    """All that the engine puts out for one request."""
    sampler = backend.sampler(sampling)
    begun = GeneratedText(sampling, stops)
    if resume:
        begun = resumed_answer(resume, sampling, sampler, backend, stops)
    outputs: list[Output] = []

    def died() -> None:
        raise AssertionError

    def emit(new: list[tuple[str, Output]]) -> None:
        outputs.extend(output for _, output in new)

    run = Engine(backend, 1, 0, emit, died, limits=EMIT_EACH_TOKEN)
    run.submit(Sequence("a", prompt, sampling, sampler, resumed_answer=begun))
    while not outputs or not isinstance(outputs[-1], Finished):
        run.step()
    backend.truncate(0, 0)
    return Said([o for o in outputs if isinstance(o, TextChunk)], outputs[-1])


def cuts(whole: Said) -> Iterator[tuple[Said, str]]:
    """What a reader may have when the worker is lost: some pieces, the last one maybe in part."""
    yield Said([], whole.end), ""
    for count, piece in enumerate(whole.pieces, start=1):
        seen = Said(whole.pieces[:count], whole.end)
        for length in range(piece.offset + 1, piece.offset + len(piece.text) + 1):
            yield seen, whole.text[:length]


def goes_on(
    backend: Backend,
    prompt: list[int],
    sampling: Sampling,
    whole: Said,
    every: int = 1,
    stops: StopRules | None = None,
) -> None:
    for seen, text in islice(cuts(whole), 0, None, every):
        rest = say(backend, prompt, sampling, Resume(NOTHING, seen.ids, text), stops)
        assert text + rest.text == whole.text, (text, seen.ids)
        assert rest.ended == whole.ended, text
        assert seen.ids + rest.ids == whole.ids, text
        at = len(text)
        for piece in rest.pieces:
            assert piece.offset == at
            at += len(piece.text)


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
def test_with_a_real_tokenizer_it_goes_on_from_every_character(
    name: str, sampling: Sampling
) -> None:
    dream = Dream(name, TEXT)
    whole = say(dream, [*Dream.PROMPT], sampling)
    assert len(whole.text) > 20
    goes_on(dream, [*Dream.PROMPT], sampling, whole)
    dream.close()


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
def test_by_a_grammar_it_goes_on_from_every_character(
    name: str, sampling: Sampling, form: dict[str, object], text: str
) -> None:
    sampling = replace(sampling, max_tokens=30, **form)
    dream = Dream(name, text)
    whole = say(dream, [*Dream.PROMPT], sampling)
    goes_on(dream, [*Dream.PROMPT], sampling, whole)
    dream.close()


@pytest.mark.parametrize("seed", range(12))
def test_it_goes_on_from_wherever_it_is_cut_off_again_and_again(seed: int) -> None:
    dice = random.Random(seed)
    text = "".join(dice.choices("aé世🙂 \n:", k=40)) + "🙂" * dice.randint(0, 20)
    stops = tuple("".join(dice.choices("aé世🙂 \n:", k=3)) for _ in range(4))
    sampling = replace(dice.choice([GREEDY, SEEDED]), seed=seed, stop=stops)
    dream = Dream(dice.choice(["qwen2", "llama-spm", "gpt-2"]), text)
    whole = say(dream, [*Dream.PROMPT], sampling)
    for _ in range(12):
        ids: tuple[int, ...] = ()
        said, end = "", None
        while end != whole.ended:
            rest = say(dream, [*Dream.PROMPT], sampling, Resume(NOTHING, ids, said))
            pieces = together(rest.pieces, dice)
            heard = pieces[: dice.randint(0, len(pieces))]
            ids += tuple(token for piece in heard for token in piece.token_ids)
            cut = dice.choice([None, None, -1]) if heard else None
            said += "".join(piece.text for piece in heard)[:cut]
            end = rest.ended if len(heard) == len(pieces) and cut is None else None
        assert said == whole.text and ids == whole.ids
    dream.close()


def together(pieces: list[TextChunk], dice: random.Random) -> list[TextChunk]:
    """As they go out where a step is shorter than a piece may wait."""
    merged: list[TextChunk] = []
    for piece in pieces:
        if merged and dice.random() < 0.5:
            at, text, ids, _ = merged.pop()
            piece = TextChunk(at, text + piece.text, ids + piece.token_ids)
        merged.append(piece)
    return merged


@pytest.mark.parametrize("max_tokens", [500, 90])
@pytest.mark.parametrize(
    "text",
    [
        "So.\n\nLet me: no\n\n```\nUser: x\n\n\n`` `\n```\nIt is.\n\nHere's an x:\n\nUser: me",
        "<think>\n\n\nExample: x</think>\nQuestion: a\n\nQuestion: b\n\nExample:\nUser: me",
        "A quiz:\n\nQuestion: a\n\nQuestion: b\n\nLet me go on.\nAnd `</s>`.\n\nSo</s>",
    ],
)
def test_the_stops_of_a_setting_hold_where_they_would_have(text: str, max_tokens: int) -> None:
    backend, stops = FakeBackend({"hi": text.encode()}), StopRules.from_setting(STOPS, "hi")
    sampling = replace(GREEDY, max_tokens=max_tokens)
    whole = say(backend, list(b"hi"), sampling, stops=stops)
    assert whole.ended[0] == ("stop" if max_tokens > len(text) else "length")
    assert len(whole.text) > 30 and whole.text != text
    goes_on(backend, list(b"hi"), sampling, whole, stops=stops)


def test_a_loop_is_noticed_where_it_would_have_been() -> None:
    backend = FakeBackend({"hi": b"so it goes " * 40})
    sampling = Sampling(max_tokens=440)
    whole = say(backend, list(b"hi"), sampling)
    assert whole.ended == ("loop", None, 2, 128)
    for length in range(0, len(whole.text) + 1, 9):
        text = whole.text[:length]
        rest = say(backend, list(b"hi"), sampling, Resume(NOTHING, whole.ids[:length], text))
        assert text + rest.text == whole.text and rest.ended == whole.ended


@pytest.mark.timeout(180)  # half a minute on two idle cores
@pytest.mark.parametrize(
    "sampling",
    [
        replace(GREEDY, max_tokens=48),
        replace(SEEDED, max_tokens=48, stop=("\n\n", "User:")),
        replace(SEEDED, max_tokens=32, response_format=PERSON),
    ],
    ids=["greedy", "seeded", "json schema"],
)
def test_the_demo_model_goes_on_from_every_character(demo: Llama, sampling: Sampling) -> None:
    whole = say(demo, asked(demo, "What can you do?"), sampling)
    assert len(whole.ids) > 15
    goes_on(demo, asked(demo, "What can you do?"), sampling, whole)


@pytest.mark.timeout(180)
def test_the_demo_model_goes_on_after_a_long_conversation(demo: Llama) -> None:
    turn = [*asked(demo, "Thank you!"), *demo.tokenize("You are welcome!<|im_end|>\n", True)]
    prompt = [*turn * 20, *asked(demo, "Count to 20.")]
    sampling = replace(SEEDED, max_tokens=100)
    whole = say(demo, prompt, sampling)
    assert len(prompt) > 300 and len(whole.ids) > 15
    goes_on(demo, prompt, sampling, whole, every=7)


def asked(demo: Llama, question: str) -> list[int]:
    return demo.tokenize(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", True)


@pytest.mark.parametrize(
    ("ids", "text", "why"),
    [
        ((104,), "x", "the tokens do not decode to the text"),
        ((104,), "hi", "the tokens do not decode to the text"),
        ((257,), "", "a token is not in the model's vocabulary"),
    ],
)
def test_what_was_never_said_is_refused(ids: tuple[int, ...], text: str, why: str) -> None:
    backend = FakeBackend({})
    with pytest.raises(ServiceError, match=why) as error:
        resumed_answer(Resume(NOTHING, ids, text), GREEDY, backend.sampler(GREEDY), backend)
    assert error.value.code == "invalid_request" and backend.samplers[0].closed


def test_what_the_grammar_forbids_is_refused() -> None:
    backend, sampling = FakeBackend({}), replace(GREEDY, grammar='root ::= "hi"')
    with pytest.raises(ServiceError, match="can't be resumed"):
        resumed_answer(Resume(NOTHING, (120,), "x"), sampling, backend.sampler(sampling), backend)
