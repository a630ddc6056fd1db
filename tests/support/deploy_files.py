"""The files in ``deploy/`` as real programs and published schemas read them.

The chart of open-balena-helm and the compose file of open-balena are not ours to ship. The
stand-ins here have the same names, variables and volumes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from obdelta import settings
from obdelta.settings import Settings

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
