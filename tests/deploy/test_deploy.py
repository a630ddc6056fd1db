"""What ``deploy/`` ships: each file is read by the real thing where tests can have it, else by its
published schema.

The chart of open-balena-helm and the compose file of open-balena are not ours to ship: what stands
for them here has the same names, variables and volumes. helm cannot be had in tests; the kustomize
of ``kubectl`` can.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from obdelta import settings
from obdelta.settings import Settings
from tests.support.server import command

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = ("1.29", "1.33", kubernetes_validate.latest_version())
DOMAIN = "example.com"


def effective(environment: Mapping[str, str]) -> Settings:
    """The settings that a server in this environment has; SettingsError where
    they cannot be used.
    """
    return settings.read({}, environment, None)


def documents(path: Path) -> list[Any]:
    """What a YAML file holds."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def valid(manifest: Mapping[str, Any]) -> None:
    """Raises where a Kubernetes API server would refuse it."""
    for version in KUBERNETES:
        kubernetes_validate.validate(dict(manifest), version, strict=True)


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    """A container's environment; what comes from a secret has a stand-in."""
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
"""The shape of openBalena's own file (v4.1.924): its traits and merges, its files of variables, its
odd values.
"""

MAKE_WRITES = (
    f"BALENARC_NO_ANALYTICS=1\nDNS_TLD={DOMAIN}\nORG_UNIT=openBalena\nPRODUCTION_MODE=true\n"
)
"""The beginning of what ``make up`` makes of ``.env``, whatever stood there."""


def composed(
    tmp_path: Path, env: str = MAKE_WRITES, own: str = ""
) -> subprocess.CompletedProcess[str]:
    """``docker compose config`` in a checkout of openBalena with our files beside its own, ``own``
    added to our variables.

    It is the program of today, which checks the files by its own schema, from a wheel; Debian's is
    of 2021 and cannot read openBalena's.
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
        [Path(sys.executable).with_name("docker-compose"), "config"],
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
    """Whatever `make up` makes of `.env`; a variable that we do not know is passed too, so that the
    server can refuse it.
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
    """Those that are commented out, too, can be used as they stand."""
    text = (DEPLOY / "compose/obdelta.env").read_text()
    given = dict(re.findall(r"^#?(OBDELTA_[A-Z0-9_]+)=(.*)$", text, re.MULTILINE))
    found = effective({"BALENA_TLD": DOMAIN, **given})
    assert (found.publish, found.effort, found.max_builds, found.store_quota) == (
        "registry",
        "small",
        2,
        50 << 30,
    )


def test_compose_asks_for_the_domain(tmp_path: Path) -> None:
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
    # Every port that something leads to is one that obdelta listens on.
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
    """What Pod Security's "restricted" asks for (Kubernetes' pod-security-standards page)."""
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
    """What the chart renders of ``delta`` (see the head of this file)."""
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
"""Nothing of ours is to touch it."""

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


def test_helm_values_are_ones_that_the_chart_has() -> None:
    (values,) = documents(DEPLOY / "helm/values.yaml")
    assert set(values) == {"delta"}
    assert set(values["delta"]) <= CHART_VALUES
    assert set(values["delta"]["image"]) == {"repository", "tag", "pullPolicy"}
    made = chart_deployment(values)
    valid(made)
    effective(variables(made["spec"]["template"]["spec"]["containers"][0]))


def test_the_chart_can_be_without_privileges() -> None:
    """As ``helm --post-renderer`` runs it, by the real kustomize."""
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
    """What its snippets do: tests/deploy/test_fail_open.py."""
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

MOST_EXPOSED = 1.7
"""Of systemd's 10 points, by its own weighing: what is left is mostly that it speaks to the
network.
"""


@pytest.fixture
def units(tmp_path: Path) -> Iterator[Path]:
    """The units, with the program where this checkout has it: systemd looks whether it is there."""
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
    assert float(found[1]) <= MOST_EXPOSED


def test_a_booted_systemd_runs_the_units(tmp_path: Path) -> None:
    """All of the sandbox, in force: see tests/support/booted.py. Builds of both
    kinds work in it.
    """
    namespaces = (
        "--mount",
        "--net",
        "--pid",
        "--ipc",
        "--uts",
        "--cgroup",
        "--fork",
        "--kill-child",
    )
    ran = subprocess.run(
        [
            "unshare",
            *namespaces,
            "--propagation=private",
            sys.executable,
            "-m",
            "tests.support.booted",
            str(tmp_path),
        ],
        cwd=DEPLOY.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    log = tmp_path / "log"
    assert ran.returncode == 0, ran.stderr[-3000:] + (
        log.read_text()[-6000:] if log.exists() else ""
    )
    found = json.loads((tmp_path / "found.json").read_text())
    # The socket alone was started; the first connection brought the service, and both families are
    # served.
    assert (found["before"], found["first"], found["by_ipv6"]) == ("inactive", "ok\n", "ok\n")
    assert found["shown"] == {"ActiveState": "active", "NRestarts": "0", "DynamicUser": "yes"}
    assert 61184 <= int(found["Uid"]) <= 65519  # systemd's range of dynamic users
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert (found["is_delta"], found["updated"]) == (True, True)
    assert (found["v2_version"], found["v2_full_pull"]) == (2, False)
    assert found["private"] == "0o700" and "catalogue.sqlite" in found["state"]
    # `systemctl reload` is heard, and ends nothing.
    assert found["reloaded"] is True and "reload: done" in log.read_text()
    # Connections that came while the service was stopped waited for its next start.
    assert found["waited"] == "ok\n,ok\n"
    assert found["after"] == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert "Traceback" not in log.read_text()


# -- Grafana -----------------------------------------------------------------------------------

METRICS_PAGE = DEPLOY.parent / "docs/metrics.md"
"""Its table is what a running server exports (tests/unit/observability/test_metrics.py)."""


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/obdelta.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_every_metric_of_the_dashboard_is_exported_with_its_labels() -> None:
    rows = re.findall(
        r"^\| `(obdelta_\w+)` \| (\w+) \|([^|]*)\|", METRICS_PAGE.read_text(), re.MULTILINE
    )
    labels = {name: set(filter(None, given.strip().split(", "))) for name, _, given in rows}
    kinds = {name: kind for name, kind, _ in rows}
    for expression in expressions():
        for used, matchers in re.findall(r"\b((?:obdelta|process)_\w+)\{([^}]*)\}", expression):
            if used.startswith("process_"):
                continue  # the Prometheus client's own
            name = re.sub(r"_(?:bucket|sum|count)$", "", used) if used not in labels else used
            assert name in labels, f"{used} in {expression}"
            assert (kinds[name] == "histogram") == (name != used), expression
            matched = {matcher.strip().partition("=")[0] for matcher in matchers.split(",")} - {
                "job",
                "instance",
            }
            grouped = set(
                re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))
            ) - {"le"}
            assert matched | grouped <= labels[name], expression
            assert ("rate(" in expression or "increase(" in expression or "served" in name) == (
                kinds[name] != "gauge"
            )
    assert len(expressions()) > 20


def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    """Its expressions as rules, with values for Grafana's own variables."""
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


def test_the_dashboard_holds_together() -> None:
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


# -- all ---------------------------------------------------------------------------------------


def test_every_variable_is_a_setting() -> None:
    known = {variable for row in settings.table() for variable in row.environment} | {
        "OBDELTA_CONFIG"
    }
    own = {"OBDELTA_IMAGE", "OBDELTA_ADDRESS"}  # of the compose overlay and of haproxy's
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        named = set(re.findall(r"OBDELTA_[A-Z0-9_]+", path.read_text()))
        assert named <= known | own, path


def test_json_is_json() -> None:
    for path in DEPLOY.rglob("*.json"):
        json.loads(path.read_text())
