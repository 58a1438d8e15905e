"""Hold an answer against what a case expects."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import jsonschema_rs
import msgspec

from evaluation.cases import Case, texts, validator
from evaluation.service import Answer, Service

Kind = Literal["answer", "contains", "not_contains", "regex", "json_schema", "judge"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What can fail; `answer`: there is none, because of an error."""

MAX_REGEX_SECONDS = 2.0  # of CPU time

VERDICT = {
    "type": "object",
    "properties": {"verdict": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["verdict"],
    "additionalProperties": False,
}
QUESTION = """\
A user wrote:

{prompt}

An assistant answered:

{answer}

Answer this question about the assistant's answer with yes or no: {question}"""


class Verdict(msgspec.Struct):
    verdict: Literal["yes", "no"]


class Check(NamedTuple):
    """One expectation, with the reason why it is not met; "" if it is."""

    kind: Kind
    reason: str

    @property
    def is_met(self) -> bool:
        return not self.reason


class Judge(NamedTuple):
    """A model that answers questions about answers, with the sampling of its requests."""

    service: Service
    model: str
    sampling: dict[str, Any]

    async def check(self, case: Case, answer: str) -> Check:
        content = QUESTION.format(prompt=case.question, answer=answer, question=case.judge)
        body = self.sampling | {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "schema": VERDICT, "strict": True},
            },
        }
        reply = await self.service.complete(body)
        try:
            verdict = msgspec.json.decode(reply.text, type=Verdict).verdict
        except (ValueError, RecursionError):
            return Check("judge", f"no verdict: {reply.error or reply.text!r}")
        return Check("judge", "" if verdict == "yes" else f"{verdict} to {case.judge!r}")


async def check_answer(case: Case, answer: Answer, judge: Judge | None) -> list[Check]:
    """Return a check for each expectation. An answer with an error meets none."""
    if answer.error:
        return [Check("answer", answer.error)]
    checks = list(_checks(case, answer.text))
    if case.judge and judge:
        checks.append(await judge.check(case, answer.text))
    return checks


def _checks(case: Case, answer: str) -> Iterator[Check]:
    for text in texts(case.contains):
        yield Check("contains", "" if text in answer else f"{text!r} is missing")
    for text in texts(case.not_contains):
        yield Check("not_contains", f"{text!r} is there" if text in answer else "")
    if case.regex is not None:
        yield Check("regex", _not_found(case.regex, answer))
    if case.json_schema is not None:
        yield Check("json_schema", _mismatch(case.json_schema, answer))


def _not_found(regex: str, answer: str) -> str:
    """Return why the pattern is not in the answer; "" if it is."""
    try:
        with _limited_time(MAX_REGEX_SECONDS):
            return "" if re.search(regex, answer) else f"{regex!r} is not found"
    except TimeoutError:
        return f"{regex!r} took more than {MAX_REGEX_SECONDS:g} s: it backtracks, simplify it"


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """
    Raise TimeoutError after so much CPU time. `re` checks for signals while it backtracks, which
    takes a time that is exponential in the length of the answer.
    """

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _mismatch(schema: dict[str, Any], answer: str) -> str:
    """Return why the answer does not match; "" if it does."""
    try:
        validator(schema).validate(msgspec.json.decode(answer))
    except jsonschema_rs.ValidationError as error:
        return str(error.message)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return ""
