"""
Generate the parts of the Helm chart that follow from other files: copies of the NATS permissions
and of the alert rules, which Helm reads in the chart's folder only, and the settings in
values.schema.json.

`--check` only reports whether they are stale.
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from deploy.generated import write_or_check
from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.settings import InferenceSettings
from services.runtime.settings import ServiceSettings

CHART = Path("deploy/helm/finetunellm")
SCHEMA = CHART / "values.schema.json"
COPIES = {
    CHART / "files/alerts.yml": Path("deploy/monitoring/alerts.yml"),
    CHART / "files/permissions.conf": Path("deploy/nats/permissions.conf"),
}
KINDS = {
    "settings": ServiceSettings,
    "edgeSettings": EdgeSettings,
    "inferenceSettings": InferenceSettings,
    "historySettings": HistorySettings,
}
"""The settings that each definition of the schema has."""
SET_BY_CHART = {
    "EDGE_API_KEYS": "edge.keysSecret",
    "EDGE_HOST": "0.0.0.0",
    "EDGE_KEYS_FILE": "edge.keysSecret",
    "EDGE_METRICS_PORT": "9100",
    "EDGE_PORT": "8002",
    "HISTORY_METRICS_PORT": "none: the edges have the figures",
    "INFERENCE_METRICS_PORT": "none: the edges have the figures",
    "METRICS_HOST": "none",
    "MODEL_PATH": "models[].file",
    "MONGODB_URI": "history.mongodbSecret",
    "MONGODB_URI_FILE": "history.mongodbSecret",
    "NATS_CREDS": "natsKeys",
    "NATS_INBOX_PREFIX": "that of the service's user",
    "NATS_PORT": "settings.NATS_URL",
}
"""Settings that are no values of `settings`, and what stands for them."""


def settings_schema(kind: type[ServiceSettings]) -> dict[str, Any]:
    """Return the JSON schema of the settings that a service does not share with others."""
    known = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    shared = () if kind is ServiceSettings else ServiceSettings.__struct_fields__
    own = {name.upper(): known[name] for name in sorted(known) if name not in shared}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: own[name] for name in own if name not in SET_BY_CHART},
        "patternProperties": {"^OTEL_[A-Z_]+$": {"type": "string"}},  # those of OpenTelemetry
    }


def schema() -> str:
    """Return values.schema.json with the settings as they are now, and the rest as it is."""
    document = json.loads(SCHEMA.read_text("utf-8"))
    document["$defs"] |= {name: settings_schema(kind) for name, kind in KINDS.items()}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def files() -> dict[Path, str]:
    copies = {copy: source.read_text("utf-8") for copy, source in COPIES.items()}
    return {SCHEMA: schema(), **copies}


if __name__ == "__main__":
    sys.exit(write_or_check(files(), sys.argv))
