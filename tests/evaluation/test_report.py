"""Tables, failures and verdicts."""

import argparse
import io

import pytest
from rich.console import Console

from evaluation.__main__ import CANNOT_RUN, needed, number_or_share, read_options
from evaluation.cases import Case, InvalidSet
from evaluation.expectations import Check
from evaluation.report import Bar, Result, Score, as_json, show
from evaluation.service import Answer

GOOD, BAD = Check("contains", ""), Check("contains", "'x' is missing")


def score(model: str, *passes: bool) -> Score:
    case = Case(prompt="p", contains="x", name="n", tags=("t",))
    answer = Answer("a\x1b]0;t\x07 " + "long " * 50, ttft=0.5, decode=2.0, completion_tokens=21)
    checks = (
        [GOOD] if has_passed else [BAD, Check("regex", "'y' is not found")] for has_passed in passes
    )
    return Score(model, [Result(3 + at, case, answer, each) for at, each in enumerate(checks)])


def test_report_names_failures_and_verdicts() -> None:
    stream = io.StringIO()
    scores = [score("demo", True, True), score("demo:[bold]x", True, False)]
    show(scores, Bar(0, is_no_worse=True), Console(file=stream, width=80))
    shown = stream.getvalue()
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["passed", "2", "1"],
        ["failed", "0", "1"],
        ["contains", "2/2", "1/2"],
        ["regex", "", "0/1"],
        ["tokens/s", "10.0", "10.0"],
        ["TTFT", "500 ms", "500 ms"],
    ]
    failure = (
        "demo:[bold]x, line 4 (n) [t]: contains: 'x' is missing; regex: 'y' is not found -> a␛]0;t␇"
    )
    assert failure in shown and "\x1b" not in shown and "…" in shown
    assert shown.endswith("demo: accepted\ndemo:[bold]x: not accepted\n")


@pytest.mark.parametrize(
    ("bar", "first", "second"),
    [
        (Bar(2, False), False, True),
        (Bar(1, False), True, True),
        (Bar(0, True), True, True),
        (Bar(2, True), False, True),
    ],
)
def test_bar_accepts_by_number_and_by_the_first(bar: Bar, first: bool, second: bool) -> None:
    one, two = score("a", True, False), score("b", True, True)
    assert (bar.accepts(one, one), bar.accepts(two, one)) == (first, second)
    assert bar.accepts(one, two) == (first and not bar.is_no_worse)


@pytest.mark.parametrize(
    ("given", "is_no_worse", "number"),
    [(None, False, 7), (None, True, 0), ("3", True, 3), ("50%", False, 4), ("100%", False, 7)],
)
def test_at_least_is_a_number_or_a_share(given: str | None, is_no_worse: bool, number: int) -> None:
    at_least = number_or_share(given) if given else None
    assert needed(argparse.Namespace(at_least=at_least, no_worse=is_no_worse), 7) == number


def test_at_least_beyond_the_set_is_refused() -> None:
    with pytest.raises(InvalidSet, match="more than the set's 7 lines"):
        needed(argparse.Namespace(at_least=8, no_worse=False), 7)
    for nonsense in ("101%", "-1", "x", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            number_or_share(nonsense)


@pytest.mark.parametrize(
    "option", [("--model", ""), ("--temperature", "nan"), ("--temperature", "hot")]
)
def test_option_without_a_meaning_is_refused(
    option: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["eval", "--set", "s", "--model", "demo", *option])
    with pytest.raises(SystemExit) as ended:
        read_options()
    assert ended.value.code == CANNOT_RUN
    assert f"argument {option[0]}: '{option[1]}' is not a" in capsys.readouterr().err


def test_json_has_answers_and_checks() -> None:
    (model,) = as_json([score("demo", False)], Bar(1, False))
    (answer,) = model["answers"]
    assert (model["accepted"], model["failed"], answer["line"]) == (False, 1, 3)
    assert answer["checks"][0] == {"kind": "contains", "reason": "'x' is missing"}
    assert answer["text"].startswith("a\x1b]0;t\x07"), "as it is"
