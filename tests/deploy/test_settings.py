from pathlib import Path

import msgspec
import pytest

from deploy import settings
from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from services.runtime.settings import ServiceSettings, load

SERVICES: dict[str, type[ServiceSettings]] = {
    "edge": EdgeSettings,
    "history": HistorySettings,
    "inference": InferenceSettings,
}
SET_BY_COMPOSE = ("NATS_PORT", "EDGE_PORT")  # NATS_URL and the published port replace them


@pytest.mark.parametrize("path", settings.files())
def test_generated_file_is_fresh(path: Path) -> None:
    assert path.read_text() == settings.files()[path], "run `just lock`"


def test_docs_have_every_setting_once_and_no_long_line() -> None:
    lines = settings.docs().splitlines()
    kinds = settings.GROUPS.values()
    names = {name.upper() for kind in kinds for name in kind.__struct_fields__}
    assert sorted(line for line in lines if line.startswith("### ")) == sorted(
        f"### {name}" for name in names
    )
    assert max(map(len, lines)) <= settings.WIDTH


def test_example_shows_every_setting_with_its_default() -> None:
    example = dict(
        line.removeprefix("#").split("=", 1)
        for line in Path(".env.example").read_text().splitlines()
        if "=" in line and not line.startswith("# ")
    )
    for kind in SERVICES.values():
        names = [field.name.upper() for field in msgspec.structs.fields(kind)]
        given = {name: example[name] for name in names}
        assert load(kind, given) == kind()


@pytest.mark.parametrize("name", SERVICES)
def test_compose_passes_every_setting_to_its_container(name: str) -> None:
    compose = Path("docker-compose.yml").read_text()
    container = compose.partition(f"\n  {name}:\n")[2].partition("\n\n")[0]
    for field in msgspec.structs.fields(SERVICES[name]):
        variable = field.name.upper()
        assert f"\n      {variable}: " in container or variable in SET_BY_COMPOSE
