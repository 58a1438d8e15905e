import json
import time

import pytest

from services.inference.engine.output.answer_format import AnswerFormat
from services.inference.engine.output.answer_parser import FormatParser
from services.inference.engine.output.parts import (
    AnswerPart,
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    ReasoningDelta,
)

ONE = '<tool_call>\n{"name": "go", "arguments": {"to": "a \\"}{ b", "n": {"x": [1]}}}\n</tool_call>'
ARGUMENTS = '{"to": "a \\"}{ b", "n": {"x": [1]}}'


def parse(text: str, size: int = 1) -> list[AnswerPart]:
    """Parse the text in pieces of `size` characters, and join consecutive deltas of one kind."""
    parser = FormatParser(AnswerFormat(), {"go": None, "wait": None})
    parts: list[AnswerPart] = []
    for at in range(0, len(text), size):
        parts += parser.push(text[at : at + size])
    joined: list[AnswerPart] = []
    for part in [*parts, *parser.flush()]:
        if joined and type(part) is type(joined[-1]) and not isinstance(part, CallStart):
            part = part._replace(text=joined.pop().text + part.text)  # type: ignore[union-attr]
        joined.append(part)
    return joined


def as_text(text: str) -> list[AnswerPart]:
    return [ContentDelta(text)]


GO: list[AnswerPart] = [CallStart("go"), ArgumentsDelta(ARGUMENTS)]
WAIT: list[AnswerPart] = [CallStart("wait"), ArgumentsDelta("{}")]
CASES: list[tuple[str, list[AnswerPart]]] = [
    ("hello", [ContentDelta("hello")]),
    ("\n<think>\nso\n</think>\n\nhi <think>", [ReasoningDelta("so"), ContentDelta("hi <think>")]),
    (f"<think>{ONE}</think>{ONE}", [ReasoningDelta(ONE), *GO]),
    ("hi <think>so</think>", [ContentDelta("hi <think>so</think>")]),
    ("</think>hi", [ContentDelta("</think>hi")]),
    (" a < b ", [ContentDelta(" a < b ")]),
    ("", []),
    (ONE, GO),
    (f"{ONE}\n{ONE}\n", [*GO, *GO]),
    *((f"Write {quote}{ONE}{quote}!", as_text(f"Write {quote}{ONE}{quote}!")) for quote in "`'\""),
    (f"So `x` {ONE}", [ContentDelta("So `x`"), *GO]),
    (f"Let me see.\n{ONE}", [ContentDelta("Let me see."), *GO]),
    (f"{ONE}\nDone.", [*GO, ContentDelta("Done.")]),
    (ONE.removesuffix("\n</tool_call>"), GO),
    (f'{{"name": "go", "parameters": {ARGUMENTS}}}', GO),
    (f'{{"name": "go", "parameters": {ARGUMENTS}}}; {{"name": "wait", "parameters": {{}}}}',
     [*GO, *WAIT]),
    (f'[{{"name": "go", "arguments": {ARGUMENTS}}}, {{"name": "wait", "arguments": {{}}}}]',
     [*GO, *WAIT]),
    (f'[TOOL_CALLS] [{{"name": "go", "arguments": {ARGUMENTS}}}]', GO),
    ('{"arguments": {"a": 1}, "name": "go"}', [CallStart("go"), ArgumentsDelta('{"a": 1}')]),
    ('{"type": "function", "function": {"name": "wait", "arguments": {}}}', WAIT),
    ('<tool_call>{"arguments": {}, "name": "wait"}</tool_call>', WAIT),
    ('<tool_call>{"arguments": {}, "name": "wait"}</tool_call>\n'
     '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "go"}</tool_call>\nDone.',
     [*WAIT, CallStart("go"), ArgumentsDelta('{"a": "</tool_call>"}'), ContentDelta("Done.")]),
    ('<tool_call>{"name": "go", "arguments": "{\\"a\\": 1}"}</tool_call>\nDone.',
     [CallStart("go"), ArgumentsDelta('{"a": 1}'), ContentDelta("Done.")]),
    ('<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>',
     [CallStart("fly"), ArgumentsDelta("{}")]),
    ('<tool_call>{"arguments": "Rome", "name": "go"}</tool_call>',
     [CallStart("go"), ArgumentsDelta('{"arguments": "Rome"}')]),
    ('<tool_call>{"arguments": {"a": "\\ud800"}, "name": "go"}</tool_call>',
     [CallStart("go"), ArgumentsDelta('{"a": "\\ud800"}')]),
    ('<tool_call>{"arguments": {}, "name": "\\ud800"}</tool_call>',
     [ContentDelta('<tool_call>{"arguments": {}, "name": "\\ud800"}</tool_call>')]),
    ('{"name": "fly", "arguments": {}}', [ContentDelta('{"name": "fly", "arguments": {}}')]),
    ('{"name": "Ada", "age": 5}', [ContentDelta('{"name": "Ada", "age": 5}')]),
    ('{"answer": 5}', [ContentDelta('{"answer": 5}')]),
    ("[1, 2]", [ContentDelta("[1, 2]")]),
    ('{"name": "go"', [ContentDelta('{"name": "go"')]),
    ("a <tool_call>\n<function=go>", [ContentDelta("a <tool_call>\n<function=go>")]),
    ("write <tool_call>", [ContentDelta("write <tool_call>")]),
    (f'```json\n{{"name": "go", "arguments": {ARGUMENTS}}}\n```', GO),
    ('```\n{"name": "wait"}\n```\n', WAIT),
    ('\n```json\n[{"name": "wait", "arguments": {}}, {"name": "wait"}]\n```', [*WAIT, *WAIT]),
    ('```json\n{"name": "wait", "arguments": {}}\n{"name": "wait", "arguments": {}}\n```',
     [*WAIT, *WAIT]),
    ('```json\n{"name": "wait", "arguments": {}}\n```\n\n```json\n{"name": "wait"}\n```',
     [*WAIT, *WAIT]),
    ('```json\n{"name": "go", "arguments": {"to": "```"}}\n```',
     [CallStart("go"), ArgumentsDelta('{"to": "```"}')]),
    ('```json\n{"name": "wait", "arguments": {}}', WAIT),
    ('<tool_call>\n```json\n{"name": "wait", "arguments": {}}\n```\n</tool_call>\nDone.',
     [*WAIT, ContentDelta("Done.")]),
    ('<tool_call>\n```json\n{"name": "wait"}\n```\n</tool_call>', WAIT),
    ("<tool_call>`", [ContentDelta("<tool_call>`")]),
    *((text, as_text(text)) for text in (
        '```json\n{"name": "Ada"}\n```',
        '```json\n{"name": "go", "arguments": {"to": "Ro',
        '```json\n{"name": "wait", "arguments": {}}\n```\nThis waits.',
        '```json\n{"name": "wait", "arguments": {}}\n```\n`This` waits.',
        '```json\n{"name": "wait"}\n```\n```python\nprint()\n```',
        '```python\nprint("hi")\n```',
        "`code` and more", "```", "``", '{"name": "Ada"}', '{"name": "wait", "age": 5}', "[]",
    )),
    *((before + '{"name": "wait"' + more + "}" + after, WAIT)
      for before, after in (
          ("<tool_call>\n", "\n</tool_call>"), ("[", "]"), ("", ""), ("[TOOL_CALLS] [", "]"))
      for more in ("", ', "arguments": null', ', "arguments": ""', ', "parameters": []')),
    ('[{"name": "wait"}, {"name": "wait", "arguments": null}]', [*WAIT, *WAIT]),
    ('no {"name": "go", "arguments": {}}', [ContentDelta('no {"name": "go", "arguments": {}}')]),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "parts"), CASES, ids=lambda case: str(case)[:40])
def test_calls_are_found_in_pieces_of_any_size(
    text: str, parts: list[AnswerPart], size: int
) -> None:
    assert parse(text, size) == parts


def test_arguments_are_returned_as_they_arrive() -> None:
    parser = FormatParser(AnswerFormat(), {"go": None})
    assert parser.push('<tool_call>{"name": "go", "arguments": {"to": "Ro') == [
        CallStart("go"),
        ArgumentsDelta('{"to": "Ro'),
    ]
    assert parser.push("me") == [ArgumentsDelta("me")]
    assert parser.push('"}}</tool_call>') == [ArgumentsDelta('"}')]
    assert parser.flush() == []


def test_only_a_possible_marker_is_held_back() -> None:
    parser = FormatParser(AnswerFormat(), {"go": None})
    assert parser.push("hello <to") == [ContentDelta("hello")]
    assert parser.push("day>") == [ContentDelta(" <today>")]


def test_long_call_is_parsed_in_linear_time() -> None:
    call = {"name": "go", "arguments": {"to": ['{x}\\"'] * 20_000}}
    parts = parse(f"<tool_call>{json.dumps(call)}</tool_call>", 7)
    assert parts[1] == ArgumentsDelta(json.dumps(call["arguments"]))


def test_long_white_space_is_parsed_in_linear_time() -> None:
    parser = FormatParser(AnswerFormat(), {"f": None})
    began = time.process_time()
    for text in ("<tool_call>", " " * 20_000, '{"name": "f", "arguments": {}}</tool_call>'):
        parser.push(text)
    assert time.process_time() - began < 1
