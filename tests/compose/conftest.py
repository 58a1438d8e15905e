"""The options of `just compose-test`, and the project that its tests share."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.compose.project import OFFLINE, SLOW, NoEngine, Project, require_engine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--offline", action="store_true", help="use deploy/compose/offline")
    parser.addoption("--no-build", action="store_true", help="use the images of an earlier run")


@pytest.fixture(scope="session")
def files(pytestconfig: pytest.Config) -> list[str]:
    """The Compose files that each project needs on this machine."""
    return [OFFLINE] if pytestconfig.getoption("--offline") else []


@pytest.fixture(scope="session")
def built(pytestconfig: pytest.Config, files: list[str]) -> None:
    """Builds the images. Ends the run, and not silently, if no engine is there."""
    try:
        require_engine()
    except NoEngine as error:
        pytest.exit(f"COMPOSE WAS NOT TESTED: {error}", returncode=1)
    if not pytestconfig.getoption("--no-build"):
        with closing(Project(files)) as project:
            project.compose("build", seconds=2 * 3600)


@pytest.fixture(scope="session")
def project(built: None, files: list[str]) -> Iterator[Project]:
    """One process of each service, with a slowed model. Tests that change that put it back."""
    with closing(Project([*files, SLOW])) as project:
        project.down("--volumes")
        try:
            project.up()
            yield project
        finally:
            project.down("--volumes")
