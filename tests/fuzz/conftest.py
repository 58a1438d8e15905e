from typing import NamedTuple

import pytest


class Size(NamedTuple):
    """How long each test sends messages; over HTTP: schemathesis' phases, and cases of a route."""

    seconds: int
    phases: str
    cases: int


SHORT = Size(30, "examples,fuzzing", 5)
LONG = Size(600, "examples,coverage,fuzzing,stateful", 50)


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return LONG if request.config.getoption("--campaigns") == "long" else SHORT
