import fnmatch
import inspect
import re
from typing import Any, get_args

import msgspec

from deploy import asyncapi
from services.contract import conversation, fleet, history, messages, subjects, tokens
from services.contract.subjects import ANY

BASES = {"Context", "Event", "Record", "ResponseFormat", "PromptRequest"}
COMPRESSED = {"HeardReport", "HeardReports"}  # in FleetReports


def structs() -> set[str]:
    return {
        name
        for module in (conversation, fleet, history, messages, tokens)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
    }


def test_asyncapi_file_is_fresh() -> None:
    assert asyncapi.PATH.read_text() == asyncapi.text(), "run `just lock`"


def test_asyncapi_has_every_message() -> None:
    assert structs() - asyncapi.document()["components"]["schemas"].keys() == BASES | COMPRESSED


def test_asyncapi_has_every_subject_with_a_subscriber() -> None:
    addresses = [re.sub(r"\{\w+}", "x", channel.subject) for channel in asyncapi.CHANNELS]
    patterns = [
        subjects.request(ANY),
        subjects.worker_request(ANY, ANY),
        subjects.report(ANY),
        subjects.hub(ANY),
        subjects.reports(ANY),
        subjects.cancel(ANY, ANY),
        subjects.replay(ANY, ANY),
        subjects.erased(ANY),
        *(subjects.history(verb, ANY) for verb in get_args(subjects.HistoryVerb)),
        subjects.HISTORY_LOG,
    ]
    for pattern in patterns:
        assert fnmatch.filter(addresses, pattern.replace(">", "*")), pattern


def test_asyncapi_references_resolve() -> None:
    document = asyncapi.document()
    for reference in re.findall(r"'\$ref': '#/([^']+)'", str(document)):
        found: Any = document
        for part in reference.split("/"):
            found = found[part]
        assert found


def test_yaml_lines() -> None:
    lines = asyncapi.yaml({"a": [1, {"b": None}], "$c": "x: y", "d": {}, "e": [[True]]})
    assert list(lines) == [
        "a:", "  - 1", "  -", "    b: null", '"$c": "x: y"', "d: {}", "e:", "  -", "    - true",
    ]  # fmt: skip
