"""The overlay for Compose, as ``docker compose config`` reads it with openBalena's own file."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from obdelta import settings
from tests.support.deploy_files import DEPLOY, DOMAIN, composed, effective


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
