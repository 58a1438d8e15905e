"""Renders the Helm chart with Helm's own library, and checks objects as an API server would."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.servers import ROOT

helm_python = pytest.importorskip("helm_python", reason="no wheel of helm-python-sdk fits")
jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

CHART = ROOT / "deploy/helm/finetunellm"
RELEASE, NAMESPACE = "llm", "ai"
KUBERNETES = ("1.36", "1.37")
CRDS = Path(__file__).with_name("crds")
OPEN = "x-kubernetes-preserve-unknown-fields"

Object = dict[str, Any]

DEMO: Object = {"name": "demo", "file": "demo.gguf", "source": {"claim": "models"}}
SMALL: Object = {"models": [DEMO]}
"""The least values with which something is served."""
FULL: Object = {
    "image": {"registry": "ghcr.io/you/", "tag": "1.2.3", "pullSecrets": [{"name": "pull"}]},
    "settings": {
        "LOG_FORMAT": "json",
        "NATS_TLS_CA": "/etc/finetunellm/nats-tls/ca.crt",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        "OTEL_TRACES_SAMPLER": "always_off",
    },
    "edge": {
        "keysSecret": "keys",
        "settings": {"EDGE_PAGE": False, "EDGE_ALLOWED_HOSTS": ["chat.example.com"]},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "ingress": {"enabled": True, "host": "chat.example.com", "tlsSecret": "tls"},
        "scaling": {"enabled": True},
    },
    "inference": {
        "settings": {"MODEL_CACHE": 1048576, "CHAT_TOP_P": 0.95, "CHAT_STOP": ["</s>", 'a "b"']},
        "scaling": {"enabled": True, "maxReplicas": 4},
    },
    "models": [
        DEMO,
        {
            "name": "qwen",
            "file": "Qwen2.5-7B-Q4_K_M.gguf",
            "source": {"url": "https://hub.example.com:8443/qwen.gguf"},
            "sha256": 64 * "a",
            "tokenSecret": "hub",
            "sizeLimit": "20Gi",
            "settings": {"MODEL_PARALLEL": 16, "MODEL_CACHE": 0, "MODEL_CONTEXT": "auto"},
            "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "16Gi"}},
            "runtimeClassName": "nvidia",
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "maxSurge": 0,
            "maxUnavailable": 1,
        },
        {
            "name": "image",
            "file": "sub/other.gguf",
            "source": {"image": "ghcr.io/you/model:1"},
            "scaling": {"enabled": False},
        },
    ],
    "history": {"mongodbSecret": "mongodb", "settings": {"HISTORY_RETENTION": "90d"}},
    "natsTlsSecret": "nats-tls",
    "networkPolicy": {
        "edgeFrom": [{"podSelector": {"matchLabels": {"app": "proxy"}}}],
        "natsFrom": [{"podSelector": {"matchLabels": {"app": "bot"}}}],
        "extraEgress": [{"ports": [{"port": 4318}]}],
    },
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
    },
    "nats": {"promExporter": {"enabled": True}},
}
"""Every part of the chart at once."""


def render_files(values: Object, release: str = RELEASE, folder: Path = CHART) -> Mapping[str, str]:
    """Return the text of each template. Raises HelmError."""
    with helm_python.Chart.load(folder) as chart:
        files: Mapping[str, str] = chart.render(values, name=release, namespace=NAMESPACE)
    return files


def render(values: Object, release: str = RELEASE, folder: Path = CHART) -> list[Object]:
    """Return the objects that an installation with the values creates, without Helm's tests."""
    files = render_files(values, release, folder)
    texts = [text for name, text in files.items() if name.endswith((".yaml", ".yml"))]
    documents = [each for text in texts for each in text.split("\n---")]
    objects = [msgspec.yaml.decode(each) for each in documents]
    return [each for each in objects if each and not is_test(each)]


def is_test(item: Object) -> bool:
    return "helm.sh/hook" in (item["metadata"].get("annotations") or {})


def of_kind(objects: Sequence[Object], kind: str, name: str = "") -> Iterator[Object]:
    for item in objects:
        if item["kind"] == kind and name in ("", item["metadata"]["name"]):
            yield item


def one(objects: Sequence[Object], kind: str, name: str) -> Object:
    (found,) = of_kind(objects, kind, f"{RELEASE}-{name}" if name else RELEASE)
    return found


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Yield the name and the template of each workload."""
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet"):
            yield item["metadata"]["name"], item["spec"]["template"]


def environment(container: Object) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def validate(item: Object) -> None:
    """Check an object against the schema of its kind. Raises ValidationError."""
    if item["kind"] in custom_resources():
        jsonschema.validate(item, custom_resources()[item["kind"]])
        return
    for version in KUBERNETES:
        kubernetes_validate.validate(item, version, strict=True)


@functools.cache
def custom_resources() -> dict[str, Object]:
    """Return the schemas of the custom resources by kind."""
    documents = [msgspec.yaml.decode(path.read_bytes()) for path in CRDS.glob("*.yaml")]
    return {each["spec"]["names"]["kind"]: strict(_schema(each["spec"])) for each in documents}


def _schema(spec: Object) -> Object:
    (version,) = (each for each in spec["versions"] if each["storage"])
    return dict(version["schema"]["openAPIV3Schema"])


def strict(schema: Object) -> Object:
    """Forbid unknown fields, which an API server drops."""
    result = {
        key: strict(value) if isinstance(value, dict) else value for key, value in schema.items()
    }
    if isinstance(schema.get("pattern"), str):
        result["pattern"] = schema["pattern"].replace("^(?i)", "(?i)^")  # Go allows flags there
    has_fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if has_fields and not schema.get(OPEN) and schema["properties"].keys() != {"metadata"}:
        result.setdefault("additionalProperties", False)
    return result
