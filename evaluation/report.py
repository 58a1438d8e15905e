"""What the models' answers add up to: a table, failures, and whether each model is accepted."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluation.cases import Case
from evaluation.expectations import KINDS, Check
from evaluation.service import Answer
from services.terminal.safe_text import clean_line

MAX_BEGINNING = 100  # characters of an answer


@dataclass(frozen=True)
class Result:
    """An answer to a case, whose line has this number, with a check for each expectation."""

    line: int
    case: Case
    answer: Answer
    checks: Sequence[Check]

    @property
    def has_passed(self) -> bool:
        return all(check.is_met for check in self.checks)


@dataclass(frozen=True)
class Score:
    model: str
    results: Sequence[Result]

    @property
    def passed(self) -> int:
        return sum(result.has_passed for result in self.results)


class Bar(NamedTuple):
    """How many cases a model must pass: a number, or at least as many as the first model."""

    at_least: int
    is_no_worse: bool

    def accepts(self, score: Score, first: Score) -> bool:
        return score.passed >= self.at_least and (
            not self.is_no_worse or score.passed >= first.passed
        )


def show(scores: Sequence[Score], bar: Bar, console: Console) -> None:
    console.print(table(scores))
    for score in scores:
        for result in score.results:
            if not result.has_passed:
                console.print(Text(describe(score.model, result)), soft_wrap=True)
    for score in scores:
        verdict = "accepted" if bar.accepts(score, scores[0]) else "not accepted"
        console.print(Text(f"{clean_line(score.model)}: {verdict}"), soft_wrap=True)


def table(scores: Sequence[Score]) -> Table:
    """Return a column for each model. Times are medians over its answers."""
    checks = [check for score in scores for result in score.results for check in result.checks]
    kinds = [kind for kind in KINDS if any(check.kind == kind for check in checks)]
    rows: dict[str, list[str]] = {
        "passed": [str(score.passed) for score in scores],
        "failed": [str(len(score.results) - score.passed) for score in scores],
        **{str(kind): [_met(score, kind) for score in scores] for kind in kinds},
        "tokens/s": [_median(_speeds(score), 1, "") for score in scores],
        "TTFT": [_median(_waits(score), 0, " ms") for score in scores],
    }
    made = Table("")
    for score in scores:
        made.add_column(Text(clean_line(score.model)), overflow="fold")
    for name, cells in rows.items():
        made.add_row(name, *cells)
    return made


def _speeds(score: Score) -> Iterable[float | None]:
    return (result.answer.tokens_per_second for result in score.results)


def _waits(score: Score) -> Iterable[float | None]:
    """Yield times to the first token in milliseconds."""
    return (each.answer.ttft and 1000 * each.answer.ttft for each in score.results)


def _met(score: Score, kind: str) -> str:
    met = [check.is_met for each in score.results for check in each.checks if check.kind == kind]
    return f"{sum(met)}/{len(met)}" if met else ""


def _median(values: Iterable[float | None], decimals: int, unit: str) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{decimals}f}{unit}" if known else ""


def describe(model: str, result: Result) -> str:
    """Return a line about a failure, with the beginning of the answer."""
    case = result.case
    label = f"line {result.line}" + (f" ({case.name})" if case.name else "")
    tags = "".join(f" [{tag}]" for tag in case.tags)
    reasons = "; ".join(f"{each.kind}: {each.reason}" for each in result.checks if not each.is_met)
    beginning = clean_line(result.answer.text)
    if len(beginning) > MAX_BEGINNING:
        beginning = f"{beginning[:MAX_BEGINNING]}…"
    return clean_line(f"{model}, {label}{tags}: {reasons}") + f" -> {beginning}"


def as_json(scores: Sequence[Score], bar: Bar) -> list[dict[str, Any]]:
    """Return everything that was asked, answered and checked, by model."""
    return [
        {
            "model": score.model,
            "accepted": bar.accepts(score, scores[0]),
            "passed": score.passed,
            "failed": len(score.results) - score.passed,
            "answers": [_answer_as_json(result) for result in score.results],
        }
        for score in scores
    ]


def _answer_as_json(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "line": result.line,
        "name": case.name,
        "tags": case.tags,
        "messages": case.conversation,
        "passed": result.has_passed,
        "checks": [check._asdict() for check in result.checks],
        **asdict(result.answer),
    }
