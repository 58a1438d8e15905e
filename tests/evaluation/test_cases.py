"""Lines of evaluation sets, and which are refused before anything runs."""

from pathlib import Path

import pytest

from evaluation.cases import Case, InvalidSet, read_case, read_set
from tests.servers import ROOT


def test_example_set_is_valid() -> None:
    cases = read_set(ROOT / "evaluation/sets/demo.jsonl")
    assert len(cases) > 20 and all(case.name for case in cases.values())


def test_line_becomes_a_case() -> None:
    case = read_case('{"prompt": "hi", "contains": ["a", "b"], "sampling": {"max_tokens": 5}}')
    assert case == Case(prompt="hi", contains=("a", "b"), sampling={"max_tokens": 5})
    assert case.conversation == [{"role": "user", "content": "hi"}] and case.question == "hi"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "JSON is malformed"),
        ("[]", "Expected `object`"),
        ('{"contains": "a"}', "either `prompt` or `messages`"),
        ('{"prompt": "a", "messages": [{}], "contains": "a"}', "either `prompt` or `messages`"),
        ('{"prompt": "", "contains": "a"}', "the prompt is empty"),
        ('{"messages": [{"role": "user"}], "contains": "a"}', "the prompt is empty"),
        ('{"messages": [], "contains": "a"}', "`messages` is empty"),
        ('{"prompt": "a"}', "nothing is expected"),
        ('{"prompt": "a", "contains": []}', "nothing is expected"),
        ('{"prompt": "a", "contains": ["b", ""]}', "an empty text"),
        ('{"prompt": "a", "contains": "b", "judge": ""}', "an empty text"),
        ('{"prompt": "a", "contains": "b", "regex": ""}', "an empty text"),
        ('{"prompt": "a", "contain": "b"}', "unknown field `contain`"),
        ('{"prompt": "a", "contains": 5}', "`$.contains`"),
        ('{"prompt": "a", "regex": "("}', "the regex is invalid"),
        ('{"prompt": "a", "regex": "b{99999999999}"}', "the regex is invalid"),
        ('{"prompt": "a", "regex": "' + "(" * 5000 + '"}', "the regex is invalid"),
        ('{"prompt": "a", "json_schema": ' + '{"a":' * 5000, "nested too deeply"),
        ('{"prompt": "a", "json_schema": {"type": "objekt"}}', "the JSON schema is invalid"),
        ('{"prompt": "a", "json_schema": {"$ref": "http://x.test/"}}', "is not loaded"),
        ('{"prompt": "a", "contains": "b", "sampling": {"model": "x"}}', "can't set model"),
    ],
)
def test_bad_line_is_explained(line: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_case(line)
    assert reason in str(caught.value)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """Not at the separators of Unicode, which JSON may contain; editors write the rest."""
    path = tmp_path / "set.jsonl"
    lines = ['{"prompt": "a\u2028b\x85c", "contains": "d"}', '{"prompt": "e", "contains": "f"}']
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [case.prompt for case in read_set(path).values()] == ["a\u2028b\x85c", "e"]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "contains": "b"}\n\n{"prompt": "a"}\nx\n')
    with pytest.raises(InvalidSet) as caught:
        read_set(path)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        f"{path}, line 3",
        f"{path}, line 4",
    ]


@pytest.mark.parametrize(("data", "reason"), [(b"", "is empty"), (b"\xff\n", "can't be read")])
def test_unreadable_set_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(data)
    with pytest.raises(InvalidSet, match=reason):
        read_set(path)
    with pytest.raises(InvalidSet, match="can't be read"):
        read_set(tmp_path / "nowhere")
