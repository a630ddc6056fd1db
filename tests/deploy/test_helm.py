"""Values, Ingress and post-renderer for the chart of open-balena-helm.

helm cannot be had in tests; the kustomize of ``kubectl`` can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.deploy_files import (
    DEPLOY,
    chart_deployment,
    documents,
    effective,
    restricted,
    valid,
    variables,
)

OTHER_DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "openbalena-api", "labels": {"app.kubernetes.io/component": "api"}},
    "spec": {
        "template": {"spec": {"containers": [{"name": "api", "image": "x", "securityContext": {}}]}}
    },
}
"""Our post-renderer must not change it."""

CHART_VALUES = {
    "enabled",
    "replicas",
    "image",
    "labels",
    "annotations",
    "affinity",
    "resources",
    "nodeSelector",
    "tolerations",
    "service",
    "storage",
    "storageClass",
    "priorityClassName",
}


def test_helm_values_exist_in_the_chart() -> None:
    (values,) = documents(DEPLOY / "helm/values.yaml")
    assert set(values) == {"delta"}
    assert set(values["delta"]) <= CHART_VALUES
    assert set(values["delta"]["image"]) == {"repository", "tag", "pullPolicy"}
    made = chart_deployment(values)
    valid(made)
    effective(variables(made["spec"]["template"]["spec"]["containers"][0]))


def test_the_chart_works_without_privileges() -> None:
    """Runs it as ``helm --post-renderer`` does, with the real kustomize."""
    (values,) = documents(DEPLOY / "helm/values.yaml")
    ran = subprocess.run(
        [DEPLOY / "helm/unprivileged/render"],
        input=yaml.safe_dump_all([chart_deployment(values), OTHER_DEPLOYMENT]),
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    made = {
        (each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(ran.stdout)
    }
    assert made.pop(("Deployment", "openbalena-api")) == OTHER_DEPLOYMENT
    patched, claim = (
        made.pop(("Deployment", "openbalena-delta")),
        made.pop(("PersistentVolumeClaim", "obdelta")),
    )
    assert not made
    valid(patched)
    valid(claim)
    pod = patched["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    restricted(pod, container)
    assert "lifecycle" not in container
    found = effective(variables(container))
    assert found.listen == ("tcp:80",)
    assert str(found.auth_key).startswith("/certs/api/")
    assert str(found.state_dir) in {mount["mountPath"] for mount in container["volumeMounts"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {claim["metadata"]["name"]}


def test_the_ingress_is_valid_and_leads_to_the_chart_s_service() -> None:
    """The behaviour of its snippets is tested in tests/deploy/test_fail_open.py."""
    (ingress,) = documents(DEPLOY / "helm/ingress-nginx.yaml")
    valid(ingress)
    (rule,) = ingress["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {
        "name": "openbalena-delta",
        "port": {"number": 80},
    }
    assert ingress["spec"]["tls"][0]["hosts"] == [rule["host"]]


def test_the_post_renderer_is_a_plugin_too() -> None:
    """Helm 4 takes a plugin where Helm 3 takes a program; the fields are those of its
    documentation.
    """
    (plugin,) = documents(DEPLOY / "helm/unprivileged/plugin.yaml")
    assert (plugin["apiVersion"], plugin["type"], plugin["runtime"]) == (
        "v1",
        "postrenderer/v1",
        "subprocess",
    )
    (command,) = plugin["runtimeConfig"]["platformCommand"]
    assert command["command"] == "${HELM_PLUGIN_DIR}/render"
    assert f"--post-renderer {plugin['name']}" in (DEPLOY.parent / "docs/openbalena.md").read_text()
