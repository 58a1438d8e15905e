"""The lines of an evaluation set: a prompt, and what is expected of its answer."""

import re
from pathlib import Path
from typing import Any, NoReturn

import jsonschema_rs
import msgspec

EXAMPLE = 'A line is JSON like {"prompt": "1+1?", "contains": "2"}.'
OWN_FIELDS = frozenset({"model", "messages", "stream", "stream_options", "n"})
"""Fields of the request that `sampling` can't set."""


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A prompt, or messages in the format of OpenAI's API, and expectations, which must all be met.
    `sampling` has more fields of the request, such as `max_tokens`.
    """

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    contains: str | tuple[str, ...] = ()
    not_contains: str | tuple[str, ...] = ()
    regex: str | None = None
    json_schema: dict[str, Any] | None = None
    judge: str | None = None  # a question about the answer, to which yes is right
    name: str = ""
    tags: tuple[str, ...] = ()
    sampling: dict[str, Any] = {}

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return list(self.messages or ({"role": "user", "content": self.prompt},))

    @property
    def question(self) -> str:
        """The last message, as text."""
        content = self.conversation[-1].get("content")
        return content if isinstance(content, str) else msgspec.json.encode(content).decode()


class InvalidSet(Exception):
    """The set can't be used. The message names each bad line by its number."""


def read_set(path: Path) -> dict[int, Case]:
    """Return the cases by the number of their line, from 1. Raises InvalidSet."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # `splitlines` splits inside of strings
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSet(f"{path} can't be read: {error}.") from error
    cases, errors = {}, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            cases[number] = read_case(line)
        except ValueError as error:
            errors.append(f"{path}, line {number}: {error}.")
    if not cases and not errors:
        errors.append(f"{path} is empty. {EXAMPLE}")
    if errors:
        raise InvalidSet("\n".join(errors))
    return cases


def read_case(line: str) -> Case:
    """Decode and check a line. Raises ValueError."""
    try:
        case = msgspec.json.decode(line.encode(), type=Case)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if (case.prompt is None) == (case.messages is None):
        raise ValueError("give either `prompt` or `messages`")
    if case.messages == ():
        raise ValueError("`messages` is empty")
    if not case.conversation[-1].get("content"):
        raise ValueError("the prompt is empty")
    if not (texts(case.contains) or texts(case.not_contains) or case.regex or case.judge):
        if case.json_schema is None:
            raise ValueError(
                "nothing is expected: give contains, not_contains, regex, json_schema or judge"
            )
    if "" in (*texts(case.contains), *texts(case.not_contains), case.regex, case.judge):
        raise ValueError("an empty text expects nothing")
    if fixed := OWN_FIELDS & case.sampling.keys():
        raise ValueError(f"`sampling` can't set {', '.join(sorted(fixed))}")
    check_patterns(case)
    return case


def check_patterns(case: Case) -> None:
    """Raise ValueError for an invalid regex or schema."""
    try:
        re.compile(case.regex or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the regex is invalid: {error}") from error
    try:
        validator(case.json_schema or {})
    except (ValueError, jsonschema_rs.ValidationError) as error:
        raise ValueError(f"the JSON schema is invalid: {str(error).splitlines()[0]}") from error


def validator(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    """Return a validator that loads no schema from elsewhere. Raises ValueError."""
    return jsonschema_rs.validator_for(schema, retriever=_refuse)


def _refuse(uri: str) -> NoReturn:
    raise ValueError(f"{uri} is not loaded: put it into `$defs`")


def texts(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given
