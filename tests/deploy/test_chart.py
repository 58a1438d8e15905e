"""The Helm chart: what it renders is valid, holds together, and starts real servers."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy import chart
from deploy.nats.secrets import USERS, Secrets, include
from services.contract import subjects
from services.edge.limits import EdgeLimits
from services.edge.settings import EdgeSettings
from services.history.settings import HistorySettings
from services.inference.model_path import model_name
from services.inference.settings import InferenceSettings
from services.runtime.access import NatsAccess
from services.runtime.bus import Bus
from services.runtime.process import DRAIN_DEADLINE
from services.runtime.settings import InvalidSetting, ServiceSettings, load, parse
from tests.deploy.chart import (
    CHART,
    DEMO,
    FULL,
    RELEASE,
    SMALL,
    Object,
    environment,
    helm_python,
    jsonschema,
    of_kind,
    one,
    pods,
    render,
    render_files,
    validate,
)
from tests.e2e.stack import Process, plain_environment
from tests.servers import ROOT, Server, free_port, nats_server, wait_for

ROLES: dict[str, type[ServiceSettings]] = {
    "edge": EdgeSettings,
    "inference": InferenceSettings,
    "history": HistorySettings,
}


@pytest.fixture(scope="module")
def full() -> list[Object]:
    return render(FULL)


@pytest.fixture(scope="module")
def small() -> list[Object]:
    return render(SMALL)


def containers(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for name, pod in pods(objects):
        for container in [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]:
            yield f"{name}/{container['name']}", container


def main_container(objects: list[Object], name: str) -> Object:
    pod = one(objects, "Deployment", name)["spec"]["template"]["spec"]
    container: Object = pod["containers"][0]
    return container


# --- generated parts, versions, lint --------------------------------------------------------------


@pytest.mark.parametrize("path", chart.files())
def test_generated_file_is_fresh(path: Path) -> None:
    assert path.read_text() == chart.files()[path], "run `just lock`"


def test_chart_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with helm_python.Chart.load(CHART) as loaded:
        assert loaded.version == loaded.metadata["appVersion"] == version


def test_chart_of_nats_is_there_in_the_named_version() -> None:
    (dependency,) = helm_python.dependency_list(CHART)
    assert (dependency["name"], dependency["status"]) == ("nats", "ok")


@pytest.mark.parametrize("values", [SMALL, FULL])
def test_lint_finds_nothing(values: Object) -> None:
    report = helm_python.lint(CHART, values, strict=True, kube_version="v1.36.0")
    assert [each for each in report["messages"] if "icon" not in each["error"]] == []


# --- schemas --------------------------------------------------------------------------------------


def test_every_object_has_the_schema_of_its_kind(full: list[Object], small: list[Object]) -> None:
    kinds = {item["kind"] for item in full}
    assert kinds >= {"ScaledObject", "ServiceMonitor", "PrometheusRule", "NetworkPolicy", "Ingress"}
    for item in [*full, *small]:
        validate(item)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ["spec", "template", "spec", "typo"]),
        ("NetworkPolicy", ["spec", "ingres"]),
        ("ScaledObject", ["spec", "cooldown"]),
        ("ServiceMonitor", ["spec", "endpoint"]),
        ("PrometheusRule", ["spec", "groups", 0, "rule"]),
    ],
)
def test_schemas_refuse_unknown_fields(full: list[Object], kind: str, path: list[Any]) -> None:
    item = next(of_kind(render(FULL), kind))
    *folders, name = path
    place = item
    for folder in folders:
        place = place[folder]
    place[name] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate(item)


# --- values ---------------------------------------------------------------------------------------


def test_every_setting_is_a_value_or_set_by_the_chart() -> None:
    known = {name for kind in chart.KINDS for name in properties(kind)}
    names = {name.upper() for kind in ROLES.values() for name in kind.__struct_fields__}
    assert known | set(chart.SET_BY_CHART) == names
    assert known & set(chart.SET_BY_CHART) == set()


def test_docs_name_every_setting_that_the_chart_sets() -> None:
    docs = (ROOT / "docs/kubernetes.md").read_text()
    assert [name for name in chart.SET_BY_CHART if f"`{name}`" not in docs] == []


def properties(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = chart.settings_schema(chart.KINDS[kind])["properties"]
    return found


@pytest.mark.parametrize("role", ROLES)
def test_services_accept_the_environment_of_their_pods(full: list[Object], role: str) -> None:
    found = [c for name, c in containers(full) if name.endswith(f"/{role}")]
    assert found
    for container in found:
        environ = environment(container)
        environ.pop("MONGODB_URI_FILE", None)  # which history reads
        load(ROLES[role], environ)


def test_uri_of_mongodb_is_a_file_of_its_secret(full: list[Object]) -> None:
    pod = one(full, "Deployment", "history")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (volume,) = (each for each in pod["volumes"] if each["name"] == "mongodb")
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "mongodb")
    path = f"{mount['mountPath']}/{volume['secret']['items'][0]['path']}"
    assert volume["secret"]["secretName"] == "mongodb" and "MONGODB_URI" not in environment(
        container
    )
    assert environment(container)["MONGODB_URI_FILE"] == path


def test_settings_of_a_model_win_over_those_of_all(full: list[Object]) -> None:
    demo, qwen = (
        parse(InferenceSettings, environment(main_container(full, f"inference-{name}")))
        for name in ("demo", "qwen")
    )
    assert (demo.model_cache, demo.model_parallel, demo.chat_top_p) == (1048576, 8, 0.95)
    assert (qwen.model_cache, qwen.model_parallel, qwen.chat_top_p) == (0, 16, 0.95)
    assert demo.chat_stop == ("</s>", 'a "b"')
    assert qwen.model_path == "/app/model/Qwen2.5-7B-Q4_K_M.gguf"


def test_falsy_settings_reach_their_service(full: list[Object]) -> None:
    settings = parse(EdgeSettings, environment(main_container(full, "edge")))
    assert settings.edge_page is False and settings.edge_allowed_hosts == ("chat.example.com",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "models is empty: name at least one model"),
        ({"models": [DEMO | {"name": "Demo"}]}, "/models/0/name"),
        ({"models": [DEMO | {"source": {}}]}, "/models/0/source"),
        ({"models": [DEMO | {"source": {"claim": "a", "image": "b"}}]}, "/models/0/source"),
        ({"models": [DEMO | {"source": {"url": "https://x/y"}}]}, "no sha256 of its file"),
        ({"models": [DEMO | {"typo": 1}]}, "typo"),
        ({"models": [DEMO, DEMO]}, "two are named demo"),
        (SMALL | {"edge": {"settings": {"EDGE_STRIKT": True}}}, "EDGE_STRIKT"),
        (SMALL | {"inference": {"settings": {"MODEL_PARALLEL": 65}}}, "MODEL_PARALLEL"),
        (SMALL | {"history": {"settings": {"MONGODB_URI": "mongodb://secret"}}}, "MONGODB_URI"),
        (SMALL | {"image": {"registry": "ghcr.io/you"}}, "/image/registry"),
        (SMALL | {"nats": {"enabled": False}}, "settings.NATS_URL is empty"),
        (SMALL | {"edge": {"ingress": {"enabled": True}}}, "edge.ingress.host is empty"),
        (SMALL | {"networkPolicy": {"metricsFrom": []}}, "/networkPolicy/metricsFrom"),
        (SMALL | {"inference": {"maxSurge": 0}}, "demo has maxSurge and maxUnavailable 0"),
        (
            SMALL | {"inference": {"scaling": {"enabled": True, "minReplicas": 4}}},
            "llm-inference-demo: scaling.minReplicas is above scaling.maxReplicas",
        ),
        (
            SMALL | {"edge": {"scaling": {"enabled": True, "maxReplicas": 1}}},
            "llm-edge: scaling.minReplicas is above scaling.maxReplicas",
        ),
        ({"models": [DEMO | {"file": "a.gguf,b.gguf"}]}, "/models/0/file"),
        ({"models": [DEMO | {"file": "/a.gguf"}]}, "/models/0/file"),
        (
            {
                "models": [
                    DEMO
                    | {
                        "file": "a-00001-of-00002.gguf",
                        "source": {"url": "https://x/y"},
                        "sha256": 64 * "a",
                    }
                ]
            },
            "is split into several files",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(values: Object, message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(message)):
        render(values)


@pytest.mark.parametrize(
    ("release", "model", "message"),
    [
        ("llm", 30 * "m", ""),
        (47 * "r", "m", ""),
        (48 * "r", "m", "is too long for a StatefulSet"),
        (40 * "r", 30 * "m", "(81 characters) is no name for Kubernetes"),
        ("1llm", "m", "1llm-inference-m (16 characters) is no name for Kubernetes"),
        ("llm.v1", "m", "llm.v1-inference-m (18 characters) is no name for Kubernetes"),
    ],
)
def test_names_that_kubernetes_would_refuse_are_errors(
    release: str, model: str, message: str
) -> None:
    values = {"models": [DEMO | {"name": model, "scaling": {"enabled": True}}]}
    if message:
        with pytest.raises(helm_python.HelmError, match=re.escape(message)):
            render(values, release)
        return
    objects = render(values, release)
    for kind in ("Service", "ScaledObject", "Deployment"):  # for DNS, for KEDA's label, for both
        assert all(len(item["metadata"]["name"]) <= 63 for item in of_kind(objects, kind))


def test_notes_name_every_secret_that_a_pod_waits_for(small: list[Object]) -> None:
    notes = render_files(SMALL)["finetunellm/templates/NOTES.txt"]
    (line,) = (line for line in notes.splitlines() if "get secret" in line)
    mounted = {
        volume["secret"]["secretName"]
        for _, pod in pods(small)
        for volume in pod["spec"]["volumes"]
        if "secret" in volume
    }
    assert set(line.partition("get secret ")[2].split()) == mounted


def test_notes_warn_of_scaling_without_metrics() -> None:
    scaled = {"models": [DEMO | {"scaling": {"enabled": True}}]}
    monitored = scaled | {"monitoring": {"serviceMonitor": {"enabled": True}}}
    notes = [
        render_files(values)["finetunellm/templates/NOTES.txt"]
        for values in (SMALL, monitored, scaled)
    ]
    assert ["set monitoring.serviceMonitor.enabled" in text for text in notes] == [0, 0, 1]


def test_upgrade_changes_no_immutable_field(full: list[Object], tmp_path: Path) -> None:
    folder = shutil.copytree(CHART, tmp_path / "chart")
    text = (folder / "Chart.yaml").read_text()
    version = one(full, "Deployment", "edge")["metadata"]["labels"]["app.kubernetes.io/version"]
    (folder / "Chart.yaml").write_text(text.replace(f"ersion: {version}", "ersion: 99.0.0", 1))
    later = render(FULL, folder=folder)
    assert "finetunellm-99.0.0" in str(later)
    assert immutable(later) == immutable(full)


def immutable(objects: list[Object]) -> dict[str, Object]:
    """Return the fields of each object that an update can't change."""
    fields = ("selector", "serviceName", "volumeClaimTemplates", "podManagementPolicy", "clusterIP")
    return {
        f"{item['kind']} {item['metadata']['name']}": {
            field: item["spec"][field] for field in fields if field in item["spec"]
        }
        for item in objects
        if item["kind"] in ("Deployment", "StatefulSet", "Service")
    }


@pytest.mark.parametrize(
    "file", ["demo.gguf", "sub/Qwen2.5-7B-Q4_K_M.gguf", "big-v1.5-00001-of-00003.gguf"]
)
def test_trigger_names_the_model_as_its_worker_does(file: str) -> None:
    objects = render({"models": [DEMO | {"file": file, "scaling": {"enabled": True}}]})
    (scaled,) = of_kind(objects, "ScaledObject")
    for trigger in scaled["spec"]["triggers"]:
        assert f'model_name="{model_name(Path(file))}"' in trigger["metadata"]["query"]


# --- what belongs together ------------------------------------------------------------------------


def test_selectors_find_the_pods_of_their_workload(full: list[Object]) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(full)}
    for kind in ("Deployment", "PodDisruptionBudget", "Service", "ServiceMonitor"):
        for item in of_kind(full, kind):
            selector = item["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            found = selected(labels, wanted) if kind != "ServiceMonitor" else services(full, wanted)
            assert len(found) == 1, (kind, item["metadata"]["name"], found)


def selected(labels: dict[str, Object], wanted: Object) -> list[str]:
    return [name for name, own in labels.items() if wanted.items() <= own.items()]


def services(objects: list[Object], wanted: Object) -> list[str]:
    labels = {
        item["metadata"]["name"]: item["metadata"]["labels"] for item in of_kind(objects, "Service")
    }
    return selected(labels, wanted)


@pytest.mark.parametrize("values", [FULL, SMALL | {"nats": {"nameOverride": "bus"}}])
def test_every_workload_has_a_budget_and_a_policy(values: Object) -> None:
    full = render(values)
    for name, pod in pods(full):
        labels = pod["metadata"]["labels"]
        for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
            selectors = [item["spec"][key]["matchLabels"] for item in of_kind(full, kind)]
            found = [each for each in selectors if each.items() <= labels.items()]
            assert len(found) == 1, (kind, name)


def test_mounts_have_volumes_and_nothing_else_is_writable(full: list[Object]) -> None:
    for name, pod in pods(full):
        volumes = {each["name"] for each in pod["spec"]["volumes"]}
        claims = one(full, "StatefulSet", "nats")["spec"]["volumeClaimTemplates"]
        volumes |= {each["metadata"]["name"] for each in claims} if "nats" in name else set()
        mounted = [
            mount["name"]
            for container in pod["spec"]["containers"]
            for mount in container.get("volumeMounts", ())
        ]
        assert set(mounted) <= volumes, name
        assert len(volumes) == len(set(mounted) | {"hub"} & volumes), name


def test_pods_meet_the_restricted_security_standard(full: list[Object]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    for name, pod in pods(full):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False, name
        assert not any("hostPath" in volume for volume in spec["volumes"])
    names = [name for name, _ in containers(full)]
    assert len(names) == 9 and f"{RELEASE}-inference-qwen/download" in names
    for name, container in containers(full):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert container["resources"]["limits"]["memory"], name


def test_pods_end_after_their_service_has_drained(full: list[Object]) -> None:
    for name, pod in pods(full):
        if name == f"{RELEASE}-nats":
            continue
        (container,) = pod["spec"]["containers"]
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["spec"]["terminationGracePeriodSeconds"] >= pause + DRAIN_DEADLINE + 5, name
        assert (pause > EdgeLimits().handover_seconds) == (container["name"] == "edge")


def test_slow_starts_and_outages_restart_no_worker(full: list[Object]) -> None:
    probes = main_container(full, "inference-demo")
    start, live = probes["startupProbe"], probes["livenessProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1800
    assert live["periodSeconds"] * live["failureThreshold"] >= 600
    for probe in (start, live, probes["readinessProbe"]):
        assert probe["exec"]["command"] == ["python", "-m", "services.runtime.health", "inference"]
        assert probe["timeoutSeconds"] >= 15


def test_outage_of_workers_takes_no_edge_out_of_its_service(full: list[Object]) -> None:
    """Else nobody gets the errors that say what is missing, and no admin can erase sessions."""
    edge = main_container(full, "edge")
    assert edge["readinessProbe"]["httpGet"]["path"] == "/readyz?fleet=false"
    assert edge["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_metrics_are_in_no_service_that_is_reached_from_outside(full: list[Object]) -> None:
    public = one(full, "Service", "edge")["spec"]
    assert public["type"] == "LoadBalancer"
    assert [port["targetPort"] for port in public["ports"]] == ["http"]
    private = one(full, "Service", "edge-metrics")["spec"]
    assert private["clusterIP"] == "None" and private["ports"][0]["targetPort"] == "metrics"


def test_services_reach_nats_and_are_reached_by_nobody(full: list[Object]) -> None:
    for role in ("inference", "history"):
        policy = one(full, "NetworkPolicy", role)["spec"]
        assert policy["ingress"] == [] and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    ports = {
        role: [port["port"] for rule in egress_of(full, role) for port in rule["ports"]]
        for role in ROLES
    }
    assert ports == {
        "edge": [53, 53, 4222, 4318],
        "inference": [53, 53, 4222, 8443, 4318],
        "history": [53, 53, 4222, 27017, 4318],
    }
    edge, metrics = one(full, "NetworkPolicy", "edge")["spec"]["ingress"]
    assert edge["ports"] == [{"port": 8002}] and edge["from"] == FULL["networkPolicy"]["edgeFrom"]
    assert metrics["ports"] == [{"port": 9100}]
    clients, servers, _ = one(full, "NetworkPolicy", "nats")["spec"]["ingress"]
    assert clients["ports"] == [{"port": 4222}] and len(clients["from"]) == 2
    assert servers["ports"] == [{"port": 6222}]


@pytest.mark.parametrize(
    ("url", "port"),
    [("https://x/y.gguf", 443), ("http://x/y.gguf", 80), ("http://user@x:8080/y.gguf", 8080)],
)
def test_workers_reach_the_server_of_their_download(url: str, port: int) -> None:
    objects = render({"models": [DEMO | {"source": {"url": url}, "sha256": 64 * "a"}]})
    ports = [port["port"] for rule in egress_of(objects, "inference") for port in rule["ports"]]
    assert ports == [53, 53, 4222, port]


def egress_of(objects: list[Object], role: str) -> list[Object]:
    found: list[Object] = one(objects, "NetworkPolicy", role)["spec"]["egress"]
    return found


def test_small_installation_has_no_custom_resources(small: list[Object]) -> None:
    assert {item["apiVersion"] for item in small} == {
        "apps/v1", "v1", "policy/v1", "networking.k8s.io/v1"
    }  # fmt: skip
    ports = [port["port"] for rule in egress_of(small, "history") for port in rule["ports"]]
    assert ports == [53, 53, 4222]


def test_another_nats_is_used_as_its_url_says() -> None:
    url = "tls://a.example.com:4333,tls://b.example.com"
    objects = render(SMALL | {"nats": {"enabled": False}, "settings": {"NATS_URL": url}})
    assert list(of_kind(objects, "StatefulSet")) == []
    assert parse(EdgeSettings, environment(main_container(objects, "edge"))).nats_url == url
    ports = [port["port"] for rule in egress_of(objects, "edge") for port in rule["ports"]]
    assert ports == [53, 53, 4333, 4222]
    assert "HISTORY_REPLICAS" not in environment(main_container(objects, "history"))


def test_single_nats_server_keeps_one_copy() -> None:
    objects = render(SMALL | {"nats": {"config": {"cluster": {"enabled": False}}}})
    assert one(objects, "StatefulSet", "nats")["spec"]["replicas"] == 1
    assert "HISTORY_REPLICAS" not in environment(main_container(objects, "history"))
    for item in objects:
        validate(item)


def test_scaled_workloads_leave_their_replicas_to_keda(full: list[Object]) -> None:
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in of_kind(full, "ScaledObject")}
    assert scaled == {f"{RELEASE}-{name}" for name in ("edge", "inference-demo", "inference-qwen")}
    for item in of_kind(full, "Deployment"):
        assert ("replicas" in item["spec"]) == (item["metadata"]["name"] not in scaled)


def test_triggers_follow_the_slots_of_their_model(full: list[Object]) -> None:
    thresholds = {
        name: [
            trigger["metadata"]["threshold"]
            for trigger in one(full, "ScaledObject", name)["spec"]["triggers"]
        ]
        for name in ("inference-demo", "inference-qwen")
    }
    assert thresholds == {"inference-demo": ["10", "4"], "inference-qwen": ["10", "8"]}


def test_busy_slots_ask_for_as_many_workers_as_are_ready(full: list[Object]) -> None:
    """
    Workers that load, drain or failed report slots, too: during an update each new worker would be
    a reason for one more, up to the maximum.
    """
    for name, target in (("inference-demo", "4"), ("inference-qwen", "8")):
        query = one(full, "ScaledObject", name)["spec"]["triggers"][1]["metadata"]["query"]
        cap = re.search(r"(\d+) \* scalar\(max\(finetunellm_workers{.*,state=\"ready\"}\)\)", query)
        assert query.startswith("clamp_max(") and cap and cap[1] == target


def test_missing_figures_are_errors_and_not_zeros(full: list[Object]) -> None:
    """KEDA then leaves the number of replicas as it is."""
    for item in of_kind(full, "ScaledObject"):
        for trigger in item["spec"]["triggers"]:
            assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_download_checks_the_file_that_the_worker_loads(full: list[Object]) -> None:
    pod = one(full, "Deployment", "inference-qwen")["spec"]["template"]["spec"]
    (download,), (worker,) = pod["initContainers"], pod["containers"]
    assert download["command"] == ["python", "-m", "services.inference.download"]
    url, path, sha256, token = download["args"]
    assert (url, sha256) == ("https://hub.example.com:8443/qwen.gguf", 64 * "a")
    assert path == environment(worker)["MODEL_PATH"]
    assert (ROOT / "services/inference/download.py").exists()
    assert token.startswith(download["volumeMounts"][-1]["mountPath"])


# --- NATS -----------------------------------------------------------------------------------------


class ClusterOfChart:
    """The servers of the rendered configuration, on ports of this machine."""

    def __init__(self, folder: Path, objects: list[Object]) -> None:
        config = one(objects, "ConfigMap", "nats-config")["data"]["nats.conf"]
        permissions = one(objects, "ConfigMap", "nats-permissions")["data"]["permissions.conf"]
        (folder / "nats-config").mkdir()
        (folder / "nats/deploy/nats").mkdir(parents=True)
        (folder / "nats/deploy/nats/permissions.conf").write_text(permissions)
        self.secrets = Secrets(folder / "nats/.data/secrets")
        self.secrets.ensure()
        routes = [free_port() for _ in range(3)]
        for number, route in enumerate(routes):
            config = config.replace(
                f"{RELEASE}-nats-{number}.{RELEASE}-nats-headless:6222", f"127.0.0.1:{route}"
            )
        self.servers = [
            self._server(folder, number, route, config) for number, route in enumerate(routes)
        ]

    @property
    def url(self) -> str:
        return ",".join(f"nats://127.0.0.1:{server.port}" for server in self.servers)

    def access(self, user: str) -> NatsAccess:
        settings = {name.lower(): value for name, value in self.secrets.settings(user).items()}
        return NatsAccess.of(ServiceSettings(**settings))  # type: ignore[arg-type]

    def process(
        self, service: str, objects: list[Object], folder: Path, model: str = "", **settings: str
    ) -> Process:
        """Return a process with the environment of its pod, but the files and ports of a test."""
        environ = plain_environment() | environment(main_container(objects, f"{service}{model}"))
        environ |= self.secrets.settings(service) | {"NATS_URL": self.url, "MODEL_THREADS": "1"}
        port = free_port()
        environ |= {"EDGE_PORT": str(port), "EDGE_HOST": "127.0.0.1", **settings}
        return Process(f"services.{service}", port, environ, folder)

    def _server(self, folder: Path, number: int, route: int, config: str) -> Server:
        own = folder / f"server-{number}"
        own.mkdir()
        server = nats_server(own)
        here = {
            '"port": 4222': f'"port": {server.port}',
            '"port": 6222': f'"port": {route}',
            '"http_port": 8222': f'"http_port": {free_port()}',
            '"/data"': f'"{own}"',
            "/var/run/nats": str(own),
        }
        for old, new in here.items():
            assert old in config, old
            config = config.replace(old, new)
        path = folder / f"nats-config/nats-{number}.conf"
        path.write_text(config)
        binary = server.command[0]
        server.command = [binary, "-c", str(path), "-a", "127.0.0.1"]
        server.environ = dict(os.environ) | {"SERVER_NAME": f"{RELEASE}-nats-{number}"}
        return server


@pytest.mark.timeout(180)
async def test_rendered_environment_serves_a_chat(tmp_path: Path, small: list[Object]) -> None:
    """Without containers: NATS as the chart configures it, services as their pods start them."""
    cluster = ClusterOfChart(tmp_path, small)
    metrics_port = str(free_port())
    history = cluster.process("history", small, tmp_path)
    worker = cluster.process("inference", small, tmp_path, "-demo", MODEL_PATH="model/demo.gguf")
    edge = cluster.process("edge", small, tmp_path, EDGE_METRICS_PORT=metrics_port)
    with ExitStack() as cleanup:
        for part in (*cluster.servers, history, worker, edge):
            cleanup.callback(part.stop, signal.SIGKILL)
            part.start()
        url = f"http://127.0.0.1:{edge.port}"
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200, "the edge", 60)
        # an edge is ready without history, which chats need
        wait_for(lambda: httpx.get(f"{url}/status").json().get("history"), "history", 60)
        probe = main_container(small, "edge")["readinessProbe"]["httpGet"]
        assert httpx.get(f"{url}{probe['path']}").status_code == 200
        answer = httpx.post(f"{url}/chat", json={"prompt": "hello"}, timeout=30)
        assert answer.status_code == 200, answer.text
        assert '"stored":"log"' in answer.text.replace(" ", "")
        metrics = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
        assert 'finetunellm_workers{model_name="demo",state="ready"} 1.0' in metrics
        for part, role in ((worker, "inference-demo"), (history, "history")):
            assert run_probe(part, main_container(small, role)["readinessProbe"]) == 0
        async with Bus.connect(cluster.url, "test", cluster.access("admin")) as bus:
            info = await bus.jetstream.stream_info(subjects.HISTORY_STREAM)
        assert info.config.num_replicas == 3
        with pytest.raises(InvalidSetting, match="NATS"):
            async with Bus.connect(cluster.url, "stranger"):
                pass
        assert [part.stop() for part in (edge, worker, history)] == [0, 0, 0]


def run_probe(part: Process, probe: Object) -> int:
    program, *options = probe["exec"]["command"]
    assert program == "python"
    command = [sys.executable, *options]
    return subprocess.run(command, env=part.environ, timeout=probe["timeoutSeconds"]).returncode


def test_nats_writes_records_to_disk_before_it_confirms(small: list[Object]) -> None:
    config = one(small, "ConfigMap", "nats-config")["data"]["nats.conf"]
    assert '"sync_interval": "always"' in config


def test_mounts_of_nats_are_where_its_configuration_looks(small: list[Object]) -> None:
    config = one(small, "ConfigMap", "nats-config")["data"]["nats.conf"]
    pod = one(small, "StatefulSet", "nats")["spec"]["template"]["spec"]
    mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
    (path,) = re.findall(r"include (\S+);", config)
    users = Path(os.path.normpath(f"{mounts['config']}/{path}"))
    assert users == Path(mounts["users"], "users.conf")
    line = include("permissions.conf", ROOT / ".data/secrets" / USERS.parent)
    permissions = os.path.normpath(users.parent / line.split("'")[1])
    assert permissions == f"{mounts['permissions']}/permissions.conf"
