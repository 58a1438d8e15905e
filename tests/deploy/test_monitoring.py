"""The alert rules and the dashboard name only metrics and labels that /metrics has."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.client.routing import WorkerDirectory
from services.contract.codec import encode
from services.contract.history import HistoryStatus
from services.contract.messages import ChatRequest, Failed, Token
from services.edge.activity import ActivityMonitor
from services.edge.limits import EdgeLimits
from services.edge.metrics import EdgeMetrics
from services.runtime.bus import Bus
from services.runtime.deliveries import Delivery
from tests.fakes import DONE, report
from tests.servers import ROOT

FOLDER = ROOT / "deploy/monitoring"
OF_PROMETHEUS = {"up", "instance", "job", "namespace", "service"}
"""A metric, and labels that Prometheus and its operator add."""
VARIABLES = {"$__rate_interval": "5m", "$model": "demo", "$namespace": ".*"}
INSTALLATION = {"namespace", "service"}
"""Labels by which the figures of several installations differ."""

Metrics = dict[str, set[str]]
"""The labels of each sample name."""


@pytest.fixture
async def exposed(bus: Bus) -> Metrics:
    """The metrics of an edge that has seen everything: an answer, a failure, a request, reports."""
    workers = WorkerDirectory()
    workers.on_report(Delivery("", encode(report("w1")), ""))
    metrics = EdgeMetrics(bus, workers, ActivityMonitor(bus, workers, EdgeLimits()), by_tenant=True)
    for end in (DONE, Failed("internal", "broke")):
        answer = metrics.observe("_", ChatRequest(prompt="hi"))
        for event in (Token(0, "a", (1,)), Token(1, "b", (2,)), end):
            answer.on_event(event)
        answer.close()
    metrics.on_http_request("chat", 503, "overloaded")
    status = HistoryStatus(True, 1, 1, 1, 0, log_limit=10)
    return read_metrics(metrics.render(status).decode())


def read_metrics(text: str) -> Metrics:
    found: Metrics = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def rules() -> list[dict[str, Any]]:
    document = msgspec.yaml.decode((FOLDER / "alerts.yml").read_bytes())
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    return found


def queries() -> Iterator[str]:
    """Yield every query, with values for Grafana's variables."""
    yield from (rule["expr"] for rule in rules())
    yield from panel_queries()


def panel_queries() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            yield expr


def used(query: str) -> tuple[Metrics, set[str]]:
    """Return the metrics of a query with their labels, and the labels by which it groups."""
    metrics: Metrics = {}
    groups: set[str] = set()

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql.VectorSelector):
            labels = {matcher.name for matcher in node.matchers.matchers}
            metrics.setdefault(node.name or "", set()).update(labels)
        elif isinstance(node, promql.AggregateExpr) and node.modifier:
            groups.update(node.modifier.labels)

    promql.walk(promql.parse(query), visit)
    return metrics, groups


def groupings(query: str) -> list[set[str]]:
    """Return the labels by which each aggregation of a query groups."""
    found: list[set[str]] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.AggregateExpr):
            found.append(set(node.modifier.labels) if node.modifier else set())

    promql.walk(promql.parse(query), visit)
    return found


def check(query: str, exposed: Metrics) -> None:
    metrics, groups = used(query)
    assert metrics, query
    for name, labels in metrics.items():
        known = exposed.get(name, set()) | OF_PROMETHEUS
        assert name in exposed or name in OF_PROMETHEUS, f"{name} in {query}"
        assert labels | groups <= known, f"labels of {name} in {query}"


def test_every_query_uses_metrics_and_labels_that_exist(exposed: Metrics) -> None:
    checked = [*queries()]
    assert len(checked) > 40
    for query in checked:
        check(query, exposed)


def test_scaling_of_the_chart_uses_metrics_that_exist(exposed: Metrics) -> None:
    chart = pytest.importorskip("tests.deploy.chart")
    scaled = chart.of_kind(chart.render(chart.FULL), "ScaledObject")
    queries = [t["metadata"]["query"] for each in scaled for t in each["spec"]["triggers"]]
    assert len(queries) == 5
    for query in queries:
        check(query, exposed)


def test_dashboard_shows_what_the_chart_scales_by() -> None:
    chart = pytest.importorskip("tests.deploy.chart")
    scaled = chart.of_kind(chart.render(chart.FULL), "ScaledObject")
    wanted = {
        name
        for each in scaled
        for trigger in each["spec"]["triggers"]
        for name in used(trigger["metadata"]["query"])[0]
        if name != "finetunellm_nats_connected"  # which only stands for a zero
    }
    shown = {name for panel in panel_queries() for name in used(panel)[0]}
    assert wanted and wanted - shown == set()


def test_alerts_tell_installations_apart() -> None:
    """Else the workers of one would hide that another has none."""
    for rule in rules():
        for labels in groupings(rule["expr"]):
            assert labels >= INSTALLATION, rule["alert"]


def test_panels_show_the_chosen_namespace_only() -> None:
    for query in panel_queries():
        for name, labels in used(query)[0].items():
            assert "namespace" in labels, (name, query)


@pytest.mark.parametrize(
    "query",
    [
        "finetunellm_typo_total",
        "rate(finetunellm_typo_total[5m])",
        'finetunellm_workers{typo="ready"}',
        "sum by (typo) (finetunellm_workers)",
        "1",
    ],
)
def test_check_finds_what_does_not_exist(query: str, exposed: Metrics) -> None:
    with pytest.raises(AssertionError):
        check(query, exposed)


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 10
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    titles = [panel["title"] for panel in panels]
    assert all(titles) and len(titles) == len(set(titles))


def test_docs_list_every_metric(exposed: Metrics) -> None:
    docs = (ROOT / "docs/operations.md").read_text().partition("## Metrics")[2]
    for name in exposed:
        base = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        if not base.startswith("process_"):
            assert f"`{base}`" in docs, base


def test_runbook_has_a_line_for_each_alert() -> None:
    lines = (ROOT / "docs/runbook.md").read_text().splitlines()
    names = [rule["alert"] for rule in rules()]
    described = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert [name for name in described if name in names] == names
