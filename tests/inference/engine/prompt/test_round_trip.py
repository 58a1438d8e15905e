"""
Answers in the format of each chat template that llama.cpp ships: what a template renders is parsed
to the same reasoning, content and calls, however it is split, and grammars allow it.
"""

import json
import random
import time
from functools import cache

import pytest

from services.contract.conversation import ChatMessage, Function, Tool
from services.contract.errors import ServiceError
from services.contract.messages import Channel
from services.inference.engine.backend import SpecialToken
from services.inference.engine.output.answer_parser import FormatParser
from services.inference.engine.output.parts import AnswerParser, AnswerPart, CallStart, text_of
from services.inference.engine.prompt.chat_template import (
    ChatTemplate,
    PromptOptions,
    RenderedPrompt,
)
from services.inference.engine.prompt.model_format import THINKING_SWITCHES
from services.inference.engine.sampling.grammar import compile_lark
from tests.inference.engine.prompt.round_trip import (
    ARGUMENTS,
    CONTENT,
    ENDS,
    THOUGHT,
    TOOLS,
    Answer,
    Turn,
    answers,
    merged,
    parse,
    read,
    template,
    turn,
)
from tests.inference.engine.prompt.shipped_templates import SOURCES, USABLE
from tests.inference.fake_backend import VOCABULARY
from tests.inference.grammars import accepts
from tests.inference.vocabulary import WithSpecialTokens, load_vocabulary
from tests.inference.vocabulary import text_of as text_of_tokens

# Answers that don't survive, and why.
NOT_HOLDING = {
    **{
        ("openai-gpt-oss-120b", name): "the template writes content beside calls as reasoning"
        for name in ("content and two calls", "all")
    },
}
# Templates that show no reasoning of any answer.
VOCABULARIES = ["qwen2", "llama-bpe", "gpt-2"]
CASES = [(name, label) for name in USABLE for label in answers()]


@cache
def made(name: str, label: str) -> Turn:
    return turn(name, answers()[label])


def parser(name: str, channel: str = "content") -> AnswerParser:
    return template(name).format.parser(TOOLS, channel)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", USABLE)
def test_rendered_answer_is_parsed_to_what_was_said(name: str) -> None:
    for label in answers():
        given = made(name, label)
        parts = parse(parser(name, given.channel), [given.text])
        holds = is_as_said(parts, given.answer)
        assert holds == ((name, label) not in NOT_HOLDING), (label, parts, given.text)


def is_as_said(parts: list[AnswerPart], said: Answer) -> bool:
    try:
        return read(parts) == said
    except json.JSONDecodeError:
        return False


def test_templates_hide_little() -> None:
    """A positive control: reasoning and calls are in the rendered answers."""
    reasoning = [name for name in USABLE if made(name, "thought and call").answer.reasoning]
    calls = [name for name in USABLE if made(name, "plain arguments").answer.calls]
    assert len(reasoning) >= 32 and len(calls) >= 63, (len(reasoning), len(calls))


@cache
def vocabulary(name: str, template_name: str) -> WithSpecialTokens:
    """Return a vocabulary in which the markers of a template are control tokens."""
    base = load_vocabulary(name)
    literals = " ".join(template(template_name).format.answer.literals)
    known = {token.text for token in base.special_tokens().values()}
    words = {word for word in literals.replace("><", "> <").split() if word.startswith(("<", "["))}
    return WithSpecialTokens(base, [SpecialToken(x, True) for x in sorted(words - known)])


def pieces(name: str, words: str, text: str, has_markers: bool) -> list[str]:
    """Return the text of each of its tokens; incomplete characters come with the next token."""
    backend = vocabulary(words, name) if has_markers else load_vocabulary(words)
    special = backend.special_tokens()
    found, data = list[str](), b""
    for token in backend.tokenize(text, special=has_markers):
        data += special[token].text.encode() if token in special else backend.piece(token)
        try:
            found.append(data.decode())
            data = b""
        except UnicodeDecodeError:
            continue
    return found


@pytest.mark.parametrize("name", USABLE)
def test_parts_do_not_depend_on_the_tokens(name: str) -> None:
    draw = random.Random(name)
    for label in answers():
        given = made(name, label)
        whole = parse(parser(name, given.channel), [given.text])
        words = draw.choice(VOCABULARIES)
        for has_markers in (False, True):
            split = pieces(name, words, given.text, has_markers)
            assert "".join(split).replace(" ", "") == given.text.replace(" ", "")
            assert parse(parser(name, given.channel), split) == whole, label
        for _ in range(3):
            cuts = sorted(draw.sample(range(len(given.text) + 1), k=min(5, len(given.text))))
            bounds = zip([0, *cuts], [*cuts, len(given.text)], strict=True)
            split = [given.text[begin:end] for begin, end in bounds]
            assert parse(parser(name, given.channel), split) == whole, (label, split)


@pytest.mark.parametrize("name", USABLE)
def test_parts_of_a_prefix_never_change(name: str) -> None:
    """Also each character alone makes the same parts as the whole prefix at once."""
    for label in ("all", "thought and call", "tags arguments", "nested arguments"):
        given = made(name, label)
        slow = parser(name, given.channel)
        parts: list[AnswerPart] = []
        for count, character in enumerate(given.text, start=1):
            parts += slow.push(character)
            if count % 7 == 0:
                quick = parser(name, given.channel)
                assert merged(quick.push(given.text[:count])) == merged(parts), given.text[:count]
                assert (quick.held_length, quick.channel) == (slow.held_length, slow.channel)


@pytest.mark.parametrize("name", USABLE)
def test_truncated_answer_keeps_what_was_said(name: str) -> None:
    given = made(name, "all")
    for end in range(0, len(given.text), 5):
        parts = parse(parser(name, given.channel), [given.text[:end]])
        for part in parts:
            assert isinstance(part, CallStart) or text_of(part)
        if (name, "all") not in NOT_HOLDING:
            kept = "".join(text_of(part) for part in parts)
            assert CONTENT not in given.text[:end] or CONTENT in kept
            assert THOUGHT not in given.text[:end] or THOUGHT in kept


@pytest.mark.parametrize("name", USABLE)
def test_truncated_call_is_known_to_be_incomplete(name: str) -> None:
    given = made(name, "plain arguments")
    whole = parser(name, given.channel)
    whole.push(given.text)
    whole.flush()
    assert not whole.is_within_call
    half = parser(name, given.channel)
    half.push(given.text[: given.text.index("Rome") + 2])
    assert half.is_within_call
    half.flush()
    assert half.is_within_call and half.held_length == 0


@pytest.mark.parametrize("name", USABLE)
def test_call_inside_a_thought_is_reasoning(name: str) -> None:
    reasoning = template(name).format.answer.reasoning
    if reasoning is None:
        return
    call = made(name, "plain arguments").text
    inner = call.partition(reasoning.end.strip())[2] or call
    if reasoning.end.strip() in inner or template(name).format.answer.header:
        return
    parts = parse(parser(name, "reasoning"), [f"so {inner} then"])
    assert not any(isinstance(part, CallStart) for part in parts)


@pytest.mark.parametrize("name", USABLE)
def test_nonsense_of_markers_loses_no_text(name: str) -> None:
    draw = random.Random(name)
    form = template(name).format.answer
    marks = [mark for mark in form.literals if mark.strip()]
    marks += ['{"name": "act", "arguments": {', '"}', "}", "act", "[", "```json\n", "\n", " ", "<"]
    for _ in range(60):
        words = [draw.choice([*marks, "wordé", "🙂", "12"]) for _ in range(draw.randint(1, 12))]
        text = "".join(words)
        channel = draw.choice(["content", "reasoning"]) if form.reasoning else "content"
        whole = parse(parser(name, channel), [text])
        assert parse(parser(name, channel), list(text)) == whole, text
        said = "".join(
            part.name if isinstance(part, CallStart) else text_of(part) for part in whole
        )
        for word in ("wordé", "🙂"):
            assert said.count(word) >= text.count(word) - sum(map(_hidden, whole)), (text, whole)


def _hidden(part: AnswerPart) -> int:
    """Return how many words may be in the id of a call, or in other keys of its object."""
    return 12 if isinstance(part, CallStart) else 0


@pytest.mark.parametrize("name", USABLE)
def test_long_answers_are_parsed_in_linear_time(name: str) -> None:
    form = template(name).format.answer
    marks = " ".join(mark for mark in form.literals if mark.strip())
    began = time.process_time()
    for text in (
        "word " * 4_000,
        " " * 20_000,
        f"{marks} x" * 100,
        '{"name": "act", "id": "' + "x" * 20_000,
    ):
        made_parser = parser(name)
        for at in range(0, len(text), 4):
            made_parser.push(text[at : at + 4])
        made_parser.flush()
    assert time.process_time() - began < 3


@pytest.mark.parametrize("name", USABLE)
def test_answer_may_have_a_thousand_calls(name: str) -> None:
    one = made(name, "plain arguments").text
    said = [part for part in parse(parser(name), [one * 1_000]) if isinstance(part, CallStart)]
    assert len(said) in (1, 1_000) and said[0].name == "act"


@pytest.mark.parametrize("name", USABLE)
def test_grammar_of_forced_calls_allows_the_rendered_call(name: str) -> None:
    given = made(name, "plain arguments")
    lark = template(name).format.answer_lark(
        TOOLS, "required", None, None, given.channel, may_reason=True
    )
    assert lark is not None
    text = given.text.rstrip()
    assert any(accepts(lark, text + end) for end in ("", *ENDS)), (text, lark)
    assert not accepts(lark, "No call."), lark


def test_a_parser_is_a_format_parser() -> None:
    assert isinstance(parser("Qwen3-Coder"), FormatParser) and ARGUMENTS


# Templates that show the reasoning of answers with tool calls only, or of those with content.
HIDES_LAST_THOUGHT = {
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "Kimi-K2-Thinking",
    "google-gemma-4-31B-it",
    "google-gemma-4-31B-it-interleaved",
}


def prefilled(name: str, message: ChatMessage, channel: Channel) -> RenderedPrompt:
    messages = (ChatMessage("user", "hi"), message)
    variables = {key: on for key, (_, on) in THINKING_SWITCHES.items() if on is not None}
    options = PromptOptions(variables=variables, continue_final=channel)
    return template(name).conversation_prompt(messages, (), 1, options=options)


@pytest.mark.parametrize("name", USABLE)
def test_answer_continues_the_last_message(name: str) -> None:
    begun = prefilled(name, ChatMessage("assistant", "Once upon "), "content")
    text = bytes(begun.tokens).decode()
    assert text.endswith("Once upon ") and text.count("Once upon") == 1
    assert begun.channel == "content"
    session = template(name).session_prompt(
        "", (), "hi", 1, options=PromptOptions(prefix="Once upon ")
    )
    assert bytes(session.tokens).decode().endswith("Once upon ")


@pytest.mark.parametrize("name", USABLE)
def test_answer_continues_a_thought_if_the_template_shows_it(name: str) -> None:
    message = ChatMessage("assistant", "", reasoning="I must")
    if not template(name).format.found.reasoning_field:
        with pytest.raises(ServiceError, match="it has no reasoning"):
            prefilled(name, message, "reasoning")
        return
    if name in HIDES_LAST_THOUGHT:
        with pytest.raises(ServiceError, match="chat template rejects"):
            prefilled(name, message, "reasoning")
        return
    begun = prefilled(name, message, "reasoning")
    assert bytes(begun.tokens).decode().endswith("I must") and begun.channel == "reasoning"


SMALL = Tool(
    Function(
        "act",
        "acts",
        {
            "type": "object",
            "properties": {
                "kind": {"enum": ["one", "it's"]},
                "count": {"type": "integer", "minimum": 1, "maximum": 99},
                "flag": {"type": "boolean"},
            },
            "required": ["kind", "count"],
            "additionalProperties": False,
        },
    )
)


def walk(lark: str, draw: random.Random) -> str:
    """Return a text that the grammar allows, byte by byte at random, and that may end there."""
    grammar, data = compile_lark(lark, VOCABULARY), bytearray()
    while not (grammar.may_end and (grammar.is_finished or draw.random() < 0.3)):
        allowed = [int(token) for token in grammar.allowed().nonzero()[0]]
        # no white space without end
        visible = [token for token in allowed if token > 32] or allowed
        token = draw.choice(visible)
        grammar.accept(token)
        data.append(token)
        assert len(data) < 5_000, bytes(data[:300])
    return data.decode()


@pytest.mark.parametrize("name", USABLE)
def test_call_drawn_from_the_grammar_matches_the_schema(name: str) -> None:
    draw, chat = random.Random(name), template(name)
    lark = chat.format.answer_lark((SMALL,), "required", False, None, "content", may_reason=False)
    assert lark is not None
    for _ in range(3):
        text = walk(lark, draw)
        said = read(parse(chat.format.parser((SMALL,)), [text]))
        assert len(said.calls) == 1, (text, lark)
        ((called, arguments),) = said.calls
        assert called == "act" and arguments["kind"] in ("one", "it's"), text
        assert type(arguments["count"]) is int and 1 <= arguments["count"] <= 99, text
        assert type(arguments.get("flag", True)) is bool, text


@pytest.mark.parametrize("name", USABLE)
def test_schema_does_not_forbid_thinking(name: str) -> None:
    form = template(name).format
    schema = 'answer: "{\\"a\\": 1}"'
    lark = form.answer_lark((), "auto", None, schema)
    assert lark is not None and accepts(lark, content(name, '{"a": 1}'))
    assert not accepts(lark, content(name, "no"))
    if form.answer.reasoning is None:
        return
    reasoning, turn_start = form.answer.reasoning, form.answer.turn
    turn_start = form.answer.header.start if form.answer.header else turn_start
    thought = f"so{reasoning.end}{turn_start}{reasoning.between}"
    answer = content(name, '{"a": 1}')
    assert accepts(lark, reasoning.start + thought + answer), lark
    no_thought = form.answer_lark((), "auto", None, schema, may_reason=False)
    assert no_thought and not accepts(no_thought, reasoning.start + thought + answer)
    opened = form.answer_lark((), "auto", None, schema, "reasoning")
    assert opened and accepts(opened, thought + answer) and not accepts(opened, answer)


def content(name: str, text: str) -> str:
    """Return an answer without reasoning as the model writes it."""
    form = template(name).format.answer
    if form.header:
        return form.header.content + text
    return form.content_start + text + form.content_end


@pytest.mark.parametrize("name", USABLE)
def test_control_tokens_of_markers_are_known_and_forced(name: str) -> None:
    backend = vocabulary("gpt-2", name)
    chat = ChatTemplate(SOURCES[name], backend, bos="<s>", eos="<EOS>", adds_bos=False)
    special = backend.special_tokens()
    for token, marker in chat.markers.items():
        assert special[token].text.encode() == marker and not backend.piece(token)
    literals = " ".join(chat.format.answer.literals)
    for token, (text, is_control) in special.items():
        if is_control and text in literals and not backend.is_end(token):
            assert token in chat.markers
    if reasoning := chat.format.answer.reasoning:
        assert reasoning.end.strip() in text_of_tokens(backend, chat.reasoning_end)
    lark = chat.format.answer_lark(TOOLS, "required")
    assert lark is not None
    written = " ".join(chat.format.answer.calls.literals if chat.format.answer.calls else ())
    if chat.format.found.is_native and any(t.decode() in written for t in chat.markers.values()):
        assert "<[" in lark


NAMELESS = (
    '<tool_call>\n{"name": "", "arguments": {"a": 1}}\n</tool_call>',
    '<tool_call>\n{"arguments": {"a": 1}, "name": ""}\n</tool_call>',
    '[TOOL_CALLS][{"name": "", "arguments": {}}]',
    '<|tools_prefix|>[{"": {"a": 1}}]<|tools_suffix|>',
    "[(a=1)]",
)


@pytest.mark.parametrize("name", USABLE)
def test_call_without_a_name_is_content(name: str) -> None:
    for text in NAMELESS:
        for size in (1, len(text)):
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            parts = parse(template(name).format.parser(TOOLS), pieces)
            assert not any(isinstance(part, CallStart) for part in parts), text
            assert "".join(map(text_of, parts)).strip(), "the text is lost"


ORDINARY = {  # with the most characters that may be held back
    'Paris is old. It lies on the Seine, and has people! "Yes," he said. I\'m sure: 1<2.': 6,
    "So:\n\n```python\ndef f(a, b=[1, 2]):\n    return {k: v for k in a if a < b}\n```\nDone.": 8,
    '<!DOCTYPE html>\n<html><div class="a"><tool-tip>x</tool-tip><function-list/></div></html>': 10,
    "| a | b |\n|---|---|\n| 1 | [x](y) |\n\n- [ ] to do [1]. See [TODO] and [NOTE]: text.": 6,
    '{"name": "Ada", "age": 5, "tags": ["a", {"b": null}], "nested": {"name": "x"}}': 20,
    '{"id": 1, "type": "person", "biography": "' + "She was born. " * 20 + '"}': 40,
    '```json\n{"name": "Ada", "biography": "' + "She was born. " * 20 + '"}\n```\nThis is she.': 30,
}


@pytest.mark.parametrize("name", USABLE)
def test_little_of_ordinary_text_is_held_back(name: str) -> None:
    for text, most in ORDINARY.items():
        made_parser, said = parser(name), ""
        for count, character in enumerate(text, start=1):
            said += "".join(map(text_of, made_parser.push(character)))
            held = made_parser.held_length
            assert held <= most and held == len(text[:count]) - len(said), text[:count]
            assert not (held and text[:count].endswith((". ", "! "))) or held == 1
        assert said + "".join(map(text_of, made_parser.flush())) == text


def test_broken_header_is_content_in_any_pieces() -> None:
    text = " to=user<|mess<|message|>ge|>I look."
    whole = parse(parser("muse-glimmer"), [text])
    assert whole == parse(parser("muse-glimmer"), [*text]) and read(whole).content == text.strip()
