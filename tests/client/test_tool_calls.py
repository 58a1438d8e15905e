import json
import time

import pytest

from services.client.tool_calls import ArgumentsPart, CallReader, CallStart, Part, TextPart

ONE = '<tool_call>\n{"name": "go", "arguments": {"to": "a \\"}{ b", "n": {"x": [1]}}}\n</tool_call>'
ARGUMENTS = '{"to": "a \\"}{ b", "n": {"x": [1]}}'


def read(text: str, size: int = 1) -> list[Part]:
    """As it comes in pieces of this size; what belongs together put together."""
    reader = CallReader(["go", "wait"])
    parts: list[Part] = []
    for at in range(0, len(text), size):
        parts += reader.push(text[at : at + size])
    together: list[Part] = []
    for part in [*parts, *reader.flush()]:
        if together and type(part) is type(together[-1]) and not isinstance(part, CallStart):
            part = part._replace(text=together.pop().text + part.text)  # type: ignore[union-attr]
        together.append(part)
    return together


def as_text(text: str) -> list[Part]:
    return [TextPart(text)]


GO: list[Part] = [CallStart("go"), ArgumentsPart(ARGUMENTS)]
WAIT: list[Part] = [CallStart("wait"), ArgumentsPart("{}")]
CASES: list[tuple[str, list[Part]]] = [
    ("hello", [TextPart("hello")]),
    (" a < b ", [TextPart(" a < b ")]),
    ("", []),
    (ONE, GO),
    (f"{ONE}\n{ONE}\n", [*GO, *GO]),
    (f"Let me see.\n{ONE}", [TextPart("Let me see."), *GO]),
    (f"{ONE}\nDone.", [*GO, TextPart("Done.")]),
    (ONE.removesuffix("\n</tool_call>"), GO),
    (f'{{"name": "go", "parameters": {ARGUMENTS}}}', GO),
    (f'{{"name": "go", "parameters": {ARGUMENTS}}}; {{"name": "wait", "parameters": {{}}}}',
     [*GO, *WAIT]),
    (f'[{{"name": "go", "arguments": {ARGUMENTS}}}, {{"name": "wait", "arguments": {{}}}}]',
     [*GO, *WAIT]),
    (f'[TOOL_CALLS] [{{"name": "go", "arguments": {ARGUMENTS}}}]', GO),
    ('{"arguments": {"a": 1}, "name": "go"}', [CallStart("go"), ArgumentsPart('{"a": 1}')]),
    ('{"type": "function", "function": {"name": "wait", "arguments": {}}}', WAIT),
    ('<tool_call>{"arguments": {}, "name": "wait"}</tool_call>', WAIT),
    ('<tool_call>{"arguments": {}, "name": "wait"}</tool_call>\n'
     '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "go"}</tool_call>\nDone.',
     [*WAIT, CallStart("go"), ArgumentsPart('{"a": "</tool_call>"}'), TextPart("Done.")]),
    ('<tool_call>{"name": "go", "arguments": "{\\"a\\": 1}"}</tool_call>\nDone.',
     [CallStart("go"), ArgumentsPart('{"a": 1}'), TextPart("Done.")]),
    ('<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>',
     [CallStart("fly"), ArgumentsPart("{}")]),
    ('{"name": "fly", "arguments": {}}', [TextPart('{"name": "fly", "arguments": {}}')]),
    ('{"name": "Ada", "age": 5}', [TextPart('{"name": "Ada", "age": 5}')]),
    ('{"answer": 5}', [TextPart('{"answer": 5}')]),
    ("[1, 2]", [TextPart("[1, 2]")]),
    ('{"name": "go"', [TextPart('{"name": "go"')]),
    ("a <tool_call>\n<function=go>", [TextPart("a <tool_call>\n<function=go>")]),
    ("write <tool_call>", [TextPart("write <tool_call>")]),
    (f'```json\n{{"name": "go", "arguments": {ARGUMENTS}}}\n```', GO),
    ('```\n{"name": "wait"}\n```\n', WAIT),
    ('\n```json\n[{"name": "wait", "arguments": {}}, {"name": "wait"}]\n```', [*WAIT, *WAIT]),
    ('```json\n{"name": "wait", "arguments": {}}\n{"name": "wait", "arguments": {}}\n```',
     [*WAIT, *WAIT]),
    ('```json\n{"name": "wait", "arguments": {}}\n```\n\n```json\n{"name": "wait"}\n```',
     [*WAIT, *WAIT]),
    ('```json\n{"name": "go", "arguments": {"to": "```"}}\n```',
     [CallStart("go"), ArgumentsPart('{"to": "```"}')]),
    ('```json\n{"name": "wait", "arguments": {}}', WAIT),
    ('<tool_call>\n```json\n{"name": "wait", "arguments": {}}\n```\n</tool_call>\nDone.',
     [*WAIT, TextPart("Done.")]),
    ('<tool_call>\n```json\n{"name": "wait"}\n```\n</tool_call>', WAIT),
    ("<tool_call>`", [TextPart("<tool_call>`")]),
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
    ('no {"name": "go", "arguments": {}}', [TextPart('no {"name": "go", "arguments": {}}')]),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "parts"), CASES, ids=lambda case: str(case)[:40])
def test_calls_are_found_however_the_text_comes_in_pieces(
    text: str, parts: list[Part], size: int
) -> None:
    assert read(text, size) == parts


def test_arguments_are_told_as_they_come() -> None:
    reader = CallReader(["go"])
    assert reader.push('<tool_call>{"name": "go", "arguments": {"to": "Ro') == [
        CallStart("go"),
        ArgumentsPart('{"to": "Ro'),
    ]
    assert reader.push("me") == [ArgumentsPart("me")]
    assert reader.push('"}}</tool_call>') == [ArgumentsPart('"}')]
    assert reader.flush() == []


def test_text_is_not_held_back_but_for_what_may_begin_a_call() -> None:
    reader = CallReader(["go"])
    assert reader.push("hello <to") == [TextPart("hello")]
    assert reader.push("day>") == [TextPart(" <today>")]


def test_a_long_call_takes_time_in_proportion_to_its_length() -> None:
    call = {"name": "go", "arguments": {"to": ['{x}\\"'] * 20_000}}
    parts = read(f"<tool_call>{json.dumps(call)}</tool_call>", 7)
    assert parts[1] == ArgumentsPart(json.dumps(call["arguments"]))


def test_long_space_before_a_call_is_read_in_linear_time() -> None:
    reader = CallReader({"f"})
    began = time.process_time()
    for text in ("<tool_call>", " " * 20_000, '{"name": "f", "arguments": {}}</tool_call>'):
        reader.push(text)
    assert time.process_time() - began < 1
