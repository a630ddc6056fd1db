"""Prometheus, its operator and Grafana read their files in ``deploy/``: ``promtool`` checks the
alerts and tests when they fire, and every used metric is one that a server exports.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
METRICS_PAGE = ROOT / "docs/metrics.md"
"""Its table lists the metrics that a running server exports
(tests/unit/observability/test_metrics.py).
"""


# -- Grafana -----------------------------------------------------------------------------------


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/obdelta.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


@pytest.mark.parametrize("expression", [*expressions(), *(rule["expr"] for rule in alerts())])
def test_every_metric_is_exported_with_its_labels(expression: str) -> None:
    rows = re.findall(
        r"^\| `(obdelta_\w+)` \| (\w+) \|([^|]*)\|", METRICS_PAGE.read_text(), re.MULTILINE
    )
    labels = {name: set(filter(None, given.strip().split(", "))) for name, _, given in rows}
    kinds = {name: kind for name, kind, _ in rows}
    for used, matchers in re.findall(r"\b(obdelta_\w+)(?:\{([^}]*)\})?(?!\w)", expression):
        if used == "obdelta_upstream_":
            continue  # the start of a pattern
        name = re.sub(r"_(?:bucket|sum|count)$", "", used) if used not in labels else used
        assert name in labels, f"{used} in {expression}"
        assert (kinds[name] == "histogram") == (name != used), expression
        matched = set(re.findall(r"(\w+)[=!]", matchers)) - {"job", "instance"}
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
        assert matched | grouped <= labels[name] | {"job", "instance", "le"}, expression
        assert kinds[name] == "gauge" or re.search(r"rate\(|increase\(|unless|served", expression)


def test_the_dashboard_has_over_twenty_queries() -> None:
    assert len(expressions()) > 20


def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    """Returns its expressions as rules, with values for Grafana's own variables."""
    filled = [
        expression.replace("$__rate_interval", "5m")
        .replace("$__range", "6h")
        .replace("$job", ".*")
        .replace("$instance", ".*")
        for expression in expressions()
    ]
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(filled)
    ]
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]})
    )
    ran = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(rules)} rules found" in ran.stdout


def test_the_dashboard_is_consistent() -> None:
    dashboard = json.loads((DEPLOY / "grafana/obdelta.json").read_text())
    identities = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identities)) == len(identities)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)\b", json.dumps(dashboard["panels"])))
    assert used <= declared


def test_panels_of_good_or_bad_values_have_thresholds() -> None:
    dashboard = json.loads((DEPLOY / "grafana/obdelta.json").read_text())
    coloured = {
        panel["title"]: [
            step["color"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        ]
        for panel in dashboard["panels"]
        if "thresholds" in panel.get("fieldConfig", {}).get("defaults", {})
    }
    assert len(coloured) >= 6
    assert all("red" in colours and "green" in colours for colours in coloured.values())


# -- alerts ------------------------------------------------------------------------------------


def promtool(*arguments: object) -> str:
    ran = subprocess.run(
        ["promtool", *map(str, arguments)],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_prometheus_takes_the_alerts_and_they_fire_when_they_should() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "alerts.yml")
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yml")


def test_each_alert_has_tests_that_it_fires_and_that_it_does_not() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for fires in (True, False):
        tested = {case["alertname"] for case in cases if bool(case["exp_alerts"]) == fires}
        assert tested == {rule["alert"] for rule in alerts()}


def test_each_alert_names_a_part_of_the_documentation() -> None:
    for rule in alerts():
        path, _, anchor = rule["annotations"]["page"].partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
        assert anchor in anchors, rule["annotations"]["page"]


# -- the Prometheus operator -------------------------------------------------------------------


def test_the_monitor_selects_the_operators_port_alone() -> None:
    monitor = yaml.safe_load((DEPLOY / "kubernetes/servicemonitor.yaml").read_text())["spec"]
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes/obdelta.yaml").read_text()))
    wanted = monitor["selector"]["matchLabels"].items()
    ports = {port["port"] for port in monitor["endpoints"]}
    selected = [
        (manifest["metadata"]["name"], manifest["metadata"]["labels"][monitor["jobLabel"]])
        for manifest in manifests
        if manifest["kind"] == "Service" and wanted <= manifest["metadata"]["labels"].items()
        for port in manifest["spec"]["ports"]
        if port["name"] in ports
    ]
    # The second is the name of the job, which the alerts match.
    assert selected == [("obdelta-operator", "obdelta")]


def test_the_page_s_command_makes_a_rule_object_of_the_alerts() -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", METRICS_PAGE.read_text(), re.DOTALL)
    shown, _, sent = block.partition("| kubectl apply ")
    assert shlex.split(sent)[-2:] == ["-f", "-"]
    ran = subprocess.run(["sh", "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True)
    made = yaml.safe_load(ran.stdout)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
