"""The files in ``deploy/`` for two frontends and workers: Compose, Kubernetes, and KEDA, whose own
checks cannot be had in tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from obdelta.builds.replicas.leases import prefix_of
from obdelta.builds.workers.job_queue import JobQueue
from tests.support.deploy_files import (
    DEPLOY,
    DOMAIN,
    composed,
    documents,
    effective,
    restricted,
    valid,
)
from tests.support.redis import RunningRedis, running_redis

OWN = "OBDELTA_BUILDER_TOKEN=x\nOBDELTA_PUBLISH=registry\n"
KUBERNETES = DEPLOY / "kubernetes"
REDIS_METADATA = {"address", "databaseIndex", "listName", "listLength"}
"""Keys of KEDA's scaler for Redis lists that are used; all values are text."""


# -- compose -----------------------------------------------------------------------------------


@pytest.fixture
def services(tmp_path: Path) -> dict[str, Any]:
    """Returns what ``docker compose config`` makes of openBalena's file and ours."""
    files = ("docker-compose.yml", "docker-compose.override.yml", "docker-compose.workers.yml")
    ran = composed(tmp_path, own=OWN, files=files)
    assert ran.returncode == 0, ran.stderr
    return dict(yaml.safe_load(ran.stdout)["services"])


def test_compose_runs_two_frontends_and_workers(services: Mapping[str, Any]) -> None:
    ours = {name: service for name, service in services.items() if name.startswith("delta")}
    assert set(ours) == {"delta", "delta2", "delta-worker", "delta-redis"}
    servers = {name: ours[name] for name in ("delta", "delta2", "delta-worker")}
    for service in servers.values():
        found = effective(service["environment"])
        assert found.builds == "workers" and found.publish == "registry"
        assert found.shared is not None and found.shared.host == "delta-redis"
        assert found.public_url == f"https://delta.{DOMAIN}"
        assert "delta-redis" in service["depends_on"]
    assert [name for name, service in ours.items() if service.get("command") == ["--worker"]] == [
        "delta-worker"
    ]
    for service in ours.values():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert "privileged" not in service and "cap_add" not in service


def test_compose_gives_each_server_a_state_of_its_own(services: Mapping[str, Any]) -> None:
    states = []
    for name in ("delta", "delta2", "delta-worker"):
        (state,) = (
            volume.get("source")
            for volume in services[name]["volumes"]
            if volume["target"] == "/var/lib/obdelta"
        )
        states.append(state)
        assert {volume["target"] for volume in services[name]["volumes"]} == {
            "/certs",
            "/var/lib/obdelta",
        }
    # An anonymous volume: `--scale` gives each worker another one.
    assert states == ["delta-data", "delta2-data", None]
    published = [port["published"] for service in services.values() for port in ports(service)]
    assert len(set(published)) == len(published)
    assert not ports(services["delta-worker"]) and not ports(services["delta-redis"])


def ports(service: Mapping[str, Any]) -> list[Any]:
    return list(service.get("ports") or [])


# -- Kubernetes --------------------------------------------------------------------------------


@pytest.fixture
def manifests() -> dict[tuple[str, str], Any]:
    """Ours, by kind and name."""
    found = documents(KUBERNETES / "workers.yaml")
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in found}
    assert len(by_name) == len(found)
    return by_name


Manifests = Mapping[tuple[str, str], Any]


def test_kubernetes_accepts_the_manifests(manifests: Manifests) -> None:
    for manifest in manifests.values():
        valid(manifest)


def test_the_pods_are_restricted_and_their_settings_are_good(manifests: Manifests) -> None:
    given = manifests["ConfigMap", "obdelta"]["data"]
    for name, arguments in (("obdelta", None), ("obdelta-worker", ["--worker"])):
        stateful = manifests["StatefulSet", name]["spec"]
        pod = stateful["template"]["spec"]
        (container,) = pod["containers"]
        restricted(pod, container)
        assert container.get("args") == arguments
        secrets = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"]}
        assert {secret["name"] for secret in secrets.values()} == {"obdelta-shared"}
        found = effective(
            {
                **given,
                "OBDELTA_SHARED": "redis://:password@obdelta-redis:6379/0",
                **{each: "a secret" for each in secrets if each != "OBDELTA_SHARED"},
            }
        )
        assert set(secrets) == {"OBDELTA_SHARED", "OBDELTA_BUILDER_TOKEN"}
        assert found.builds == "workers" and found.builder_token == "a secret"
        assert found.shared is not None
        assert ("Service", found.shared.host) in manifests
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {str(found.state_dir), str(Path(str(found.auth_key)).parent), "/tmp"} == mounted
        volumes = {volume["name"] for volume in pod["volumes"]}
        (template,) = stateful["volumeClaimTemplates"]
        assert volumes | {template["metadata"]["name"]} == {
            mount["name"] for mount in container["volumeMounts"]
        }
        listening = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert f"tcp:{listening['operator']}" in found.operator_listen
        assert name != "obdelta" or f"tcp:{listening['http']}" in found.listen
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == "operator"
    assert manifests["StatefulSet", "obdelta"]["spec"]["replicas"] == 2
    pod = manifests["Deployment", "obdelta-redis"]["spec"]["template"]["spec"]
    restricted({"volumes": [], **pod}, pod["containers"][0])


def test_services_and_policies_select_pods_that_exist(manifests: Manifests) -> None:
    pods = {
        manifest["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]: {
            port["name"]
            for container in manifest["spec"]["template"]["spec"]["containers"]
            for port in container["ports"]
        }
        for (kind, _), manifest in manifests.items()
        if kind in ("StatefulSet", "Deployment")
    }
    for (kind, _), manifest in manifests.items():
        if kind == "Service":
            selected = manifest["spec"]["selector"]["app.kubernetes.io/name"]
            assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= pods[selected]
            assert "sessionAffinity" not in manifest["spec"]
        if kind == "NetworkPolicy":
            text = yaml.safe_dump(manifest["spec"]["podSelector"])
            assert set(re.findall(r"obdelta[a-z-]*", text)) <= set(pods)


# -- KEDA --------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path: Path, manifests: Manifests) -> Iterator[tuple[RunningRedis, JobQueue]]:
    """A real Redis, and the queue of the manifests' servers in it."""
    given = manifests["ConfigMap", "obdelta"]["data"]
    host = effective({**given, "OBDELTA_BUILDER_TOKEN": "x"}).publish_host
    assert host is not None
    with (
        running_redis(tmp_path / "redis") as running,
        redis.Redis.from_url(running.url) as client,
    ):
        yield running, JobQueue(client, prefix_of(host), host, "1-serve")


def test_keda_reads_the_lists_in_which_jobs_wait(
    manifests: Manifests, jobs: tuple[RunningRedis, JobQueue]
) -> None:
    by_kind = {each["kind"]: each for each in documents(KUBERNETES / "keda.yaml")}
    scaled = by_kind["ScaledObject"]["spec"]
    target = scaled["scaleTargetRef"]
    assert (target["kind"], target["name"]) in manifests
    assert 1 <= scaled["minReplicaCount"] < scaled["maxReplicaCount"]
    running, queue = jobs
    queue.put("device", {}, "", urgent=True)
    queue.put("prepared", {}, "", urgent=False)
    lists = []
    for trigger in scaled["triggers"]:
        assert trigger["type"] == "redis" and set(trigger["metadata"]) == REDIS_METADATA
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        host, _, port = trigger["metadata"]["address"].partition(":")
        assert manifests["Service", host]["spec"]["ports"][0]["port"] == int(port)
        lists.append(trigger["metadata"]["listName"])
        assert running.ask("LLEN", lists[-1]) == "1"
        reference = trigger["authenticationRef"]["name"]
        assert reference == by_kind["TriggerAuthentication"]["metadata"]["name"]
    assert len(set(lists)) == 2
    (secret,) = by_kind["TriggerAuthentication"]["spec"]["secretTargetRef"]
    redis_pod = manifests["Deployment", "obdelta-redis"]["spec"]["template"]["spec"]
    (password,) = redis_pod["containers"][0]["env"]
    assert password["valueFrom"]["secretKeyRef"] == {"name": secret["name"], "key": secret["key"]}
