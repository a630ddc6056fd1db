"""The manifests for Kubernetes, checked against its published schemas."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.deploy_files import DEPLOY, documents, effective, restricted, valid


def test_the_kubernetes_manifests_are_valid() -> None:
    manifests = documents(DEPLOY / "kubernetes/obdelta.yaml")
    for manifest in manifests:
        valid(manifest)
    kinds = [manifest["kind"] for manifest in manifests]
    assert sorted(kinds) == sorted(
        [
            "ConfigMap",
            "PersistentVolumeClaim",
            "Deployment",
            "Service",
            "Service",
            "NetworkPolicy",
            "Ingress",
        ]
    )


def test_the_kubernetes_pod_is_restricted_and_its_settings_are_good() -> None:
    manifests = documents(DEPLOY / "kubernetes/obdelta.yaml")
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    restricted(pod, container)
    found = effective(by_kind["ConfigMap"]["data"])
    # obdelta listens on every port to which something leads.
    listening = {
        int(re.findall(r"\d+", text)[0]) for text in (*found.listen, *found.operator_listen)
    }
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(named.values()) == listening
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == "operator"
    for service in (manifest for manifest in manifests if manifest["kind"] == "Service"):
        assert all(port["targetPort"] in named for port in service["spec"]["ports"])
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(found.state_dir), str(Path(str(found.auth_key)).parent), "/tmp"} == mounted
    backend = by_kind["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "obdelta", "port": {"name": "http"}}
