"""Answers that meet expectations, and answers that don't."""

from typing import Any

import pytest

from evaluation.cases import read_case
from evaluation.expectations import Check, Judge, check_answer
from evaluation.service import Answer, Service
from tests.evaluation.http_server import completion, http_server

OBJECT = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize(
    ("expected", "answer", "reasons"),
    [
        ('"contains": "b"', "abc", [""]),
        ('"contains": ["b", "d"]', "abc", ["", "'d' is missing"]),
        ('"contains": "B"', "abc", ["'B' is missing"]),
        ('"not_contains": ["b", "d"]', "abc", ["'b' is there", ""]),
        ('"regex": "^a.c$"', "abc", [""]),
        ('"regex": "(?i)B$"', "abc", ["'(?i)B$' is not found"]),
        ('"json_schema": {"type": "object", "required": ["a"]}', ' {"a": 1}\n', [""]),
        ('"json_schema": {"type": "object", "required": ["a"]}', "{}", ['"a" is a required']),
        ('"json_schema": {"type": "object", "required": ["a"]}', "```{}```", ["no JSON"]),
        ('"json_schema": {}', "NaN", ["no JSON"]),
        ('"json_schema": {}', '"\\ud800"', ["no JSON"]),
        ('"json_schema": {"type": "array"}', "1" * 5000, ["no JSON"]),
        ('"json_schema": {"type": "array"}', "[" * 100_000, ["no JSON"]),
        ('"regex": "^(a+)+$"', "a" * 100 + "b", ["'^(a+)+$' took more than"]),
    ],
)
async def test_answer_is_checked(expected: str, answer: str, reasons: list[str]) -> None:
    case = read_case(f'{{"prompt": "p", {expected}}}')
    checks = await check_answer(case, Answer(text=answer), None)
    assert [check.is_met for check in checks] == [not reason for reason in reasons]
    assert all(each.reason.startswith(reason) for each, reason in zip(checks, reasons, strict=True))


async def test_answer_with_an_error_meets_nothing() -> None:
    case = read_case('{"prompt": "p", "not_contains": "x"}')
    checks = await check_answer(case, Answer(text="y", error="cut"), None)
    assert checks == [Check("answer", "cut")]


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ('{"verdict": "yes"}', ""),
        ('{"verdict": "no"}', "no to 'Is it kind?'"),
        ("yes", "no verdict: 'yes'"),
        ("[]", "no verdict: '[]'"),
        ('{"verdict": "maybe"}', 'no verdict: \'{"verdict": "maybe"}\''),
        ("[" * 2000, f"no verdict: {'[' * 2000!r}"),
    ],
)
async def test_judge_answers_yes_or_no(verdict: str, reason: str) -> None:
    case = read_case('{"prompt": "my prompt", "judge": "Is it kind?"}')
    async with http_server(completion(verdict)) as server, Service(server.url, "") as service:
        judge = Judge(service, "j", {"temperature": 0})
        assert await check_answer(case, Answer(text="my answer"), judge) == [Check("judge", reason)]
    body: dict[str, Any] = server.requests[0][1]
    (message,) = body["messages"]
    for text in ("my prompt", "my answer", "Is it kind?"):
        assert text in message["content"]
    assert body["model"] == "j" and body["response_format"]["type"] == "json_schema"
