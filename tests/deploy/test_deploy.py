"""The files in ``deploy/``: each is read by the real program where tests can have it, and
otherwise checked against its published schema.

The chart of open-balena-helm and the compose file of open-balena are not ours to ship. The
stand-ins here have the same names, variables and volumes. helm cannot be had in tests; the
kustomize of ``kubectl`` can.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from obdelta import settings
from obdelta.settings import Settings
from tests.support.booted import INSTALLED, booted
from tests.support.server import command

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = ("1.29", "1.33", kubernetes_validate.latest_version())
DOMAIN = "example.com"


def effective(environment: Mapping[str, str]) -> Settings:
    """Returns the settings of a server in this environment; raises SettingsError if they are
    unusable.
    """
    return settings.read({}, environment, None)


def documents(path: Path) -> list[Any]:
    """Returns the content of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def valid(manifest: Mapping[str, Any]) -> None:
    """Raises an error where a Kubernetes API server would refuse it."""
    for version in KUBERNETES:
        kubernetes_validate.validate(dict(manifest), version, strict=True)


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    """Returns a container's environment, with a placeholder for each secret."""
    return {each["name"]: each.get("value", "from a secret") for each in container.get("env", ())}


# -- compose -----------------------------------------------------------------------------------

OPEN_BALENA_COMPOSE = """
version: '2.4'
volumes:
  certs-data: {}
  resin-data: {}
x-default-healthcheck: &default-healthcheck
  test: /usr/src/app/docker-hc
  interval: 45s
x-default-volumes-trait: &with-default-volumes
  volumes:
    - certs-data:/certs
    - resin-data:/balena
x-default-privileges-trait: &with-default-privileges
  cap_add: [SYS_ADMIN, SYS_RESOURCE]
  security_opt: ['apparmor=unconfined']
x-base-service-definition: &base-service
  restart: unless-stopped
  env_file:
    - .env
  tty: true
services:
  api:
    <<: [*base-service, *with-default-privileges, *with-default-volumes]
    image: balena/open-balena-api
    healthcheck:
      <<: *default-healthcheck
    environment:
      HOSTS_CONFIG: API_HOST:api,DELTA_HOST:delta,REGISTRY2_HOST:registry2
      REDIS_IS_CLUSTER: "false"
  registry:
    <<: [*base-service, *with-default-privileges]
    image: balena/open-balena-registry
    volumes:
      - certs-data:/certs
      - resin-data:/balena
    depends_on: [api]
  haproxy:
    <<: [*base-service, *with-default-privileges, *with-default-volumes]
    build: src/haproxy
    sysctls:
      net.ipv4.ip_unprivileged_port_start: 0
    ports:
      - "80:80/tcp"
      - "443:443/tcp"
      - "1936:1936/tcp"
  haproxy-sidecar:
    <<: *base-service
    build: src/haproxy-sidecar
    labels:
      io.balena.features.balena-socket: 1
    environment:
      ALIASES: api,ca,cloudlink,db,delta,logs,redis,registry2,s3,stats,tunnel
  sut:
    build: src/balena-tests
    restart: no
"""
"""openBalena's own file in short (v4.1.924): its traits and merges, its files of variables, its
odd values.
"""

MAKE_WRITES = (
    f"BALENARC_NO_ANALYTICS=1\nDNS_TLD={DOMAIN}\nORG_UNIT=openBalena\nPRODUCTION_MODE=true\n"
)
"""The first lines of a ``.env`` that ``make up`` writes; it overwrites the file's content."""


def composed(
    tmp_path: Path, env: str = MAKE_WRITES, own: str = "", files: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Returns ``docker compose config`` in a checkout of openBalena with our files beside its own;
    ``own`` is added to our variables.

    A current docker compose from a wheel checks the files by its own schema; Debian's is of 2021
    and cannot read openBalena's.
    """
    (tmp_path / "docker-compose.yml").write_text(OPEN_BALENA_COMPOSE)
    (tmp_path / ".env").write_text(env)
    for file in (DEPLOY / "compose").iterdir():
        shutil.copy(file, tmp_path)
    with (tmp_path / "obdelta.env").open("a") as variables:
        variables.write(own)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OBDELTA_", "DNS_", "COMPOSE_"))
    }
    return subprocess.run(
        [
            Path(sys.executable).with_name("docker-compose"),
            *(f"--file={name}" for name in files),
            "config",
        ],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )


def test_compose_takes_the_overlay(tmp_path: Path) -> None:
    ran = composed(
        tmp_path, own="OBDELTA_MAX_BUILDS=3\nOBDELTA_PUBLISH=registry\nOBDELTA_BUILDER_TOKEN=x\n"
    )
    assert ran.returncode == 0, ran.stderr
    merged = yaml.safe_load(ran.stdout)
    assert set(merged["services"]) == {
        "api",
        "registry",
        "haproxy",
        "haproxy-sidecar",
        "sut",
        "delta",
    }
    service = merged["services"]["delta"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "privileged" not in service and "cap_add" not in service
    assert not any("docker.sock" in str(volume) for volume in service["volumes"])
    found = effective(service["environment"])
    assert found.listen == ("tcp:80",)
    assert found.public_url == f"https://delta.{DOMAIN}"
    assert found.auth == "token"
    assert str(found.auth_key) == f"/certs/private/api.{DOMAIN}.pem"
    assert found.registry_hosts >= {f"registry2.{DOMAIN}", f"registry.{DOMAIN}"}
    assert (found.auth_audience or ("",))[0] == found.auth_service == f"registry2.{DOMAIN}"
    assert found.upstream == settings.RegistryUrl("http://registry", "registry")
    assert found.max_builds == 3
    assert (found.publish, found.publish_host) == ("registry", f"registry2.{DOMAIN}")


def test_compose_publishes_the_operators_page_for_this_machine_alone(tmp_path: Path) -> None:
    service = yaml.safe_load(composed(tmp_path).stdout)["services"]["delta"]
    (port,) = service["ports"]
    assert (port["host_ip"], int(port["published"]), port["target"]) == ("127.0.0.1", 9100, 9100)
    assert effective(service["environment"]).operator_listen == ("tcp:9100",)


def test_compose_passes_every_setting(tmp_path: Path) -> None:
    """The values are used whatever `make up` writes into `.env`. An unknown variable is passed
    too, so that the server can refuse it.
    """
    names = [row.environment[0] for row in settings.table()] + [
        "OBDELTA_CONFIG",
        "OBDELTA_NO_SUCH_SETTING",
    ]
    ran = composed(tmp_path, own="".join(f"{name}=value of {name}\n" for name in names))
    assert ran.returncode == 0, ran.stderr
    passed = yaml.safe_load(ran.stdout)["services"]["delta"]["environment"]
    assert {name: passed.get(name) for name in names} == {
        name: f"value of {name}" for name in names
    }


def test_the_file_of_variables_holds_settings_alone() -> None:
    """The variables that are commented out are valid too."""
    text = (DEPLOY / "compose/obdelta.env").read_text()
    given = dict(re.findall(r"^#?(OBDELTA_[A-Z0-9_]+)=(.*)$", text, re.MULTILINE))
    found = effective({"BALENA_TLD": DOMAIN, **given})
    assert (found.publish, found.effort, found.max_builds, found.store_quota) == (
        "registry",
        "small",
        2,
        50 << 30,
    )


def test_compose_requires_the_domain(tmp_path: Path) -> None:
    ran = composed(tmp_path, env="")
    assert ran.returncode != 0
    assert "DNS_TLD" in ran.stderr


# -- Kubernetes --------------------------------------------------------------------------------


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


def restricted(pod: Mapping[str, Any], container: Mapping[str, Any]) -> None:
    """Checks what Pod Security's "restricted" demands (Kubernetes' pod-security-standards page)."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert "privileged" not in own
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])


# -- helm --------------------------------------------------------------------------------------


def chart_deployment(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the chart renders of ``delta`` (see the head of this file)."""
    delta = values["delta"]
    labels = {"app.kubernetes.io/name": "openbalena", "app.kubernetes.io/component": "delta"}
    secret = {"secretKeyRef": {"name": "openbalena-registry-api-keys", "key": "builder"}}
    container = {
        "name": "openbalena-delta",
        "image": f"{delta['image']['repository']}:{delta['image']['tag']}",
        "imagePullPolicy": delta["image"]["pullPolicy"],
        "resources": delta["resources"],
        "ports": [{"name": "http", "containerPort": 80}],
        "securityContext": {
            "privileged": True,
            "capabilities": {"add": ["SYS_ADMIN", "SYS_RESOURCE"]},
        },
        "env": [
            {"name": "BALENA_TLD", "value": DOMAIN},
            {"name": "REGISTRY_HOST", "value": f"registry.{DOMAIN}"},
            {"name": "DOCKER_HOST", "value": "unix:///var/run/docker.sock"},
            {"name": "DOCKER_BUILDKIT", "value": "0"},
            {"name": "TOKEN_AUTH_BUILDER_TOKEN", "valueFrom": secret},
            {"name": "JWT_ALGO", "value": "ES256"},
        ],
        "volumeMounts": [
            {"name": "balena-engine-storage", "mountPath": "/var/lib/balena-engine"},
            {"name": "delta-rsync-storage", "mountPath": "/delta-rsync"},
            {"name": "cert-api", "mountPath": "/certs/api"},
        ],
        "lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", "true"]}}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "openbalena-delta", "labels": labels},
        "spec": {
            "replicas": delta["replicas"],
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "containers": [container],
                    "volumes": [
                        {"name": "balena-engine-storage", "emptyDir": {}},
                        {"name": "delta-rsync-storage", "emptyDir": {}},
                        {"name": "cert-api", "secret": {"secretName": "openbalena-pki-api"}},
                    ],
                },
            },
        },
    }


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


# -- systemd -----------------------------------------------------------------------------------

EXPOSURE_LIMIT = 1.7
"""Points out of 10, as systemd weighs them: most of the rest is for its access to the network."""


@pytest.fixture
def units(tmp_path: Path) -> Iterator[Path]:
    """Returns the units with the program's path in this checkout, because systemd checks that it
    exists.
    """
    for unit in (DEPLOY / "systemd").iterdir():
        text = unit.read_text().replace("/opt/obdelta/bin/twistd", command()[0])
        (tmp_path / unit.name).write_text(text)
    yield tmp_path


def test_systemd_takes_the_units(units: Path) -> None:
    ran = subprocess.run(
        ["systemd-analyze", "verify", units / "obdelta.service", units / "obdelta.socket"],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in ran.stderr.splitlines() if "obdelta" in line]
    assert (ran.returncode, ours) == (0, [])


def test_the_service_is_hardened(units: Path) -> None:
    ran = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", units / "obdelta.service"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Overall exposure level for obdelta.service: ([0-9.]+)", ran.stdout)
    assert found is not None, ran.stdout
    assert float(found[1]) <= EXPOSURE_LIMIT


def test_a_booted_systemd_runs_the_units(tmp_path: Path) -> None:
    """The whole sandbox is in force (tests/support/booted.py), and builds of both kinds work in
    it.
    """
    found, log = booted("tests.support.booted", tmp_path), tmp_path / "log"
    # Only the socket was started; the first connection started the service, and both address
    # families are served.
    assert (found["before"], found["first"], found["by_ipv6"]) == ("inactive", "ok\n", "ok\n")
    assert found["shown"] == {"ActiveState": "active", "NRestarts": "0", "DynamicUser": "yes"}
    assert 61184 <= int(found["Uid"]) <= 65519  # systemd's range of dynamic users
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert (found["is_delta"], found["updated"]) == (True, True)
    assert (found["v2_version"], found["v2_full_pull"]) == (2, False)
    assert found["private"] == "0o700" and "catalogue.sqlite" in found["state"]
    # `systemctl reload` takes effect, and ends nothing.
    assert found["reloaded"] is True and "reload: done" in log.read_text()
    # Connections that came while the service was stopped waited for its next start.
    assert found["waited"] == "ok\n,ok\n"
    assert found["after"] == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    # The commands of docs/systemd.md that start and remove it.
    assert found["installed"] == list(INSTALLED)
    assert (found["enabled"], found["started"]) == (["enabled", "enabled"], "ok\n")
    assert (found["left"], found["loaded"]) == ([], ["not-found", "not-found"])
    assert found["open"] is False
    assert "Traceback" not in log.read_text()


# -- all ---------------------------------------------------------------------------------------


def test_every_variable_is_a_setting() -> None:
    known = {variable for row in settings.table() for variable in row.environment} | {
        "OBDELTA_CONFIG"
    }
    own = {"OBDELTA_IMAGE", "OBDELTA_ADDRESS"}  # of the compose overlay and of haproxy's
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        named = set(re.findall(r"OBDELTA_[A-Z0-9_]+", path.read_text()))
        assert named <= known | own, path


def test_json_files_are_valid() -> None:
    for path in DEPLOY.rglob("*.json"):
        json.loads(path.read_text())
