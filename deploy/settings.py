"""
Generate docs/settings.md and .env.example from the settings types of the services.

`--check` only reports whether they are stale. Name, default, allowed values and meaning of a
setting come from its field: `Annotated[type, Meta(ge=…, description=…)] = default`.
"""

import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from deploy.cluster.settings import ClusterSettings
from deploy.generated import write_or_check
from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from services.runtime.settings import BackendSettings, ServiceSettings

DOCS, EXAMPLE = Path("docs/settings.md"), Path(".env.example")
WIDTH = 100  # characters of a line
GROUPS = {
    "All services": ServiceSettings,
    "Edge": EdgeSettings,
    "Inference and history": BackendSettings,
    "Inference": InferenceSettings,
    "History": HistorySettings,
    "`just cluster`": ClusterSettings,
}
DOCS_HEAD = """\
# Settings

<!-- Generated from services/*/settings.py by `just lock`: change the types, not this file. -->

Each setting is an environment variable, or a line of the file `.env` in the folder in which a
process starts: copy [.env.example](../.env.example) and uncomment what you change. The environment
overrides the file. An empty value means the default. An invalid value aborts startup with an error
that names the variable; variables that look misspelt are logged.

Docker Compose reads `.env` too. For Compose, write `$$` instead of `$`, and do not use `localhost`,
which is the container itself: the host is `host.docker.internal`.
"""
EXAMPLE_HEAD = """\
# Copy to .env and uncomment what you change. An empty value means the default, which is shown.
# Environment variables override this file. Lists are JSON. Docker Compose reads this file too: for
# Compose, write $$ instead of $, and host.docker.internal instead of localhost.
#
# Generated from services/*/settings.py by `just lock`: change the types, not this file.
"""


class Setting(NamedTuple):
    name: str
    default: str
    values: str  # that are allowed, in words
    description: str


def settings_of(kind: type[ServiceSettings]) -> list[Setting]:
    """Return the settings of a service, without those that it shares with others."""
    schema = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    fields = msgspec.structs.fields
    shared = [f.name for f in fields(kind.__bases__[0])] if kind is not ServiceSettings else []
    return [_setting(name, about) for name, about in schema.items() if name not in shared]


def _setting(name: str, about: dict[str, Any]) -> Setting:
    kinds = [kind for kind in about.get("anyOf", [about]) if kind.get("type") != "null"]
    values = " or ".join(map(_values, kinds))
    return Setting(
        name.upper(), _default(about["default"]), values, (kinds[0] | about)["description"]
    )


def _default(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return msgspec.json.encode(value).decode()


def _values(kind: dict[str, Any]) -> str:
    match kind:
        case {"enum": values}:
            *first, last = (f"`{value}`" for value in values)
            return f"{', '.join(first)} or {last}" if first else last
        case {"type": "boolean"}:
            return "`true` or `false`"
        case {"type": "array", "items": {"type": item}}:
            return f"JSON list of {item}s"
        case {"type": "integer" | "number" as number}:
            return f"{number} {_range(kind)}"
    return "text"


def _range(kind: dict[str, Any]) -> str:
    match kind:
        case {"minimum": least, "maximum": most}:
            return f"from {least} to {most}"
        case {"exclusiveMinimum": bound, "maximum": most}:
            return f"above {bound}, at most {most}"
    return f"of {kind['minimum']} or more"


def docs() -> str:
    return "\n".join([DOCS_HEAD, *(_section(*group) for group in GROUPS.items())])


def _section(title: str, kind: type[ServiceSettings]) -> str:
    return f"## {title}\n\n" + "\n".join(map(_entry, settings_of(kind)))


def _entry(setting: Setting) -> str:
    values = setting.values[0].upper() + setting.values[1:]
    default = f"`{setting.default}`" if setting.default else "empty"
    lines = [f"{values}. Default: {default}."]
    if len(lines[0]) > WIDTH:
        lines = [f"{values}. Default, on one line:", "", "```json", *_items(setting.default), "```"]
    return "\n".join([f"### {setting.name}", "", *lines, "", *_wrap(setting.description), ""])


def _items(json_list: str) -> list[str]:
    """Return lines of a JSON list, broken between its items."""
    text = json_list.replace(" ", "\0").replace('","', '", "')
    return [line.replace("\0", " ") for line in _wrap(text)]


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def example() -> str:
    return "\n".join([EXAMPLE_HEAD, *(_example_section(*group) for group in GROUPS.items())])


def _example_section(title: str, kind: type[ServiceSettings]) -> str:
    lines = [f"# --- {title} ".ljust(80, "-")]
    for setting in settings_of(kind):
        lines += [*_wrap(setting.description, "# "), f"#{setting.name}={setting.default}"]
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    return {DOCS: docs(), EXAMPLE: example()}


if __name__ == "__main__":
    sys.exit(write_or_check(files(), sys.argv))
