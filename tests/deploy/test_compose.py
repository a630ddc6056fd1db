"""``docker compose up`` as docs/openbalena.md says, with a real engine: the page in a browser, a
device's update, and Prometheus' scrape.

openBalena's own images cannot be had in tests. Its compose file is represented by one with a
registry alone: Debian's, which also puts the API's certificate into the volume of certificates.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.images import push
from tests.support.browser import browser
from tests.support.commands import run as obdelta
from tests.support.image import BuiltImage
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.pages import ROOT, blocks
from tests.support.processes import until
from tests.support.tokens import Issuer, pulls

pytestmark = pytest.mark.timeout(1800)  # it may wait for the image's build
DOMAIN = "example.com"
PAGE = blocks("docs/openbalena.md")
OPEN_BALENA = """
volumes:
  certs-data: {}
services:
  registry:
    image: registry:test
    volumes:
      - certs-data:/certs
"""
REGISTRY = """
FROM obdelta-base:test
COPY docker-registry /usr/bin/docker-registry
COPY registry.yml /etc/registry.yml
COPY certs /issued
CMD cp -r /issued/. /certs/ && exec docker-registry serve /etc/registry.yml
"""
SECONDS = 90.0


@dataclass(frozen=True)
class Checkout:
    """A checkout of open-balena in which ``docker compose`` is run on the test's own engine."""

    image: BuiltImage
    folder: Path

    def bash(self, script: str) -> str:
        """Runs commands; returns what they display, and fails with it if one of them does."""
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={
                "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
                "DOCKER_HOST": self.image.engine.url,
                "DOCKER_CONFIG": str(self.folder.parent / "docker"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    def address(self, service: str) -> str:
        """Returns the address of a service's container on the compose network."""
        container = self.bash(f"docker compose ps --quiet {service} 2>/dev/null")
        (shown,) = json.loads(self.bash(f"docker inspect {container}"))
        (joined,) = shown["NetworkSettings"]["Networks"].values()
        return str(joined["IPAddress"])


def commands(section: str) -> list[str]:
    return [block.commands for block in PAGE if block.section == section]


def steps() -> tuple[str, str, str, str]:
    """The guide's commands: copies, start, questions, removal. Those for haproxy are left out:
    tests/deploy/test_fail_open.py runs haproxy with the overlay's result.
    """
    (install, ask) = commands("Docker Compose")
    copy, *_haproxy, check, up = install.splitlines()
    (remove,) = commands("Remove it")
    assert copy.startswith("cp ../obdelta/deploy/compose/")
    assert check.startswith("docker compose config") and up.startswith("docker compose up")
    return copy, f"{check}\n{up}", ask, remove


@pytest.fixture
def checkout(built_image: BuiltImage, tmp_path: Path) -> Iterator[Checkout]:
    """With the registry's image built, and compose as a plugin of ``docker``, as its packages
    install it.
    """
    made = Checkout(built_image, tmp_path / "open-balena")
    made.folder.mkdir()
    plugins = tmp_path / "docker/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-compose").symlink_to(Path(sys.executable).with_name("docker-compose"))
    (tmp_path / "obdelta").symlink_to(ROOT)
    (made.folder / "docker-compose.yml").write_text(OPEN_BALENA)
    (made.folder / ".env").write_text(f"DNS_TLD={DOMAIN}\n")
    try:
        yield made
    finally:
        made.bash("docker compose down --volumes --remove-orphans --timeout 5")


def build_registry(checkout: Checkout, issuer: Issuer) -> None:
    """It puts the API's certificate into the volume when it starts, as openBalena's does."""
    context = checkout.folder.parent / "registry"
    private = context / "certs/private"
    private.mkdir(parents=True)
    shutil.copy("/usr/bin/docker-registry", context)
    (context / "registry.yml").write_text(
        "{version: '0.1', storage: {filesystem: {rootdirectory: /registry}}, http: {addr: ':80'}}"
    )
    (private / f"api.{DOMAIN}.pem").write_bytes(issuer.certificate)
    (context / "certs/root-ca.pem").write_bytes(issuer.certificate)
    (context / "Dockerfile").write_text(REGISTRY)
    checkout.bash(f"DOCKER_BUILDKIT=0 docker build --quiet --tag registry:test {context}")
    checkout.bash(f"docker tag {checkout.image.name} obdelta")


def page_of(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError):
        return ""


@contextmanager
def prometheus(folder: Path) -> Iterator[None]:
    """Debian's, with the guide's configuration, at the guide's port."""
    write, start, _ = commands("Watch it")
    assert "prometheus.yml:/etc/prometheus/prometheus.yml:ro" in start
    subprocess.run(["bash", "-c", write.replace("15s", "1s")], cwd=folder, check=True)
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (
        (folder / "prometheus.log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


def test_the_guide_ends_with_an_open_page_and_a_scrape(checkout: Checkout, tmp_path: Path) -> None:
    issuer = Issuer(issuer=f"api.{DOMAIN}", audience=f"registry2.{DOMAIN}")
    copy, start, ask, remove = steps()
    build_registry(checkout, issuer)
    checkout.bash(f"{copy}\n{start}")
    until("the page is there", lambda: "Ready" in page_of("http://localhost:9100/"), SECONDS)

    logs, doctor, _health = ask.splitlines()
    assert "devices: listening on http://" in checkout.bash(logs)
    # It ends with 3: the guide says which warning it has.
    found = checkout.bash(f"{doctor} || test $? = 3")
    assert "0 errors" in found and "operator-listen" in found, found

    # A device updates, with a token of the API.
    pair = make_pair(tmp_path / "pair")
    registry = f"http://{checkout.address('registry')}"
    for image, repository in ((pair.base, BASE_REPOSITORY), (pair.target, TARGET_REPOSITORY)):
        push(image, registry, repository)
    token = tmp_path / "token"
    token.write_text(issuer.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY)))
    server = f"http://{checkout.address('delta')}"
    images = [
        f"registry2.{DOMAIN}/{repository}@{image.digest}"
        for image, repository in ((pair.base, BASE_REPOSITORY), (pair.target, TARGET_REPOSITORY))
    ]
    options = ("--server", server, "--registry", server, "--token", f"@{token}", "--require-delta")
    assert b"verified: delta " in obdelta("check", *images, *options).stdout

    with browser(tmp_path / "profile") as page:
        page.get("http://localhost:9100")
        deltas = "return document.getElementById('deltas').innerText"
        until("the delta is shown", lambda: TARGET_REPOSITORY in page.execute_script(deltas))
        assert page.execute_script("return document.getElementById('state').innerText") == "Ready"

    *_, query = commands("Watch it")
    served = query.replace('up{job="obdelta"}', "sum(obdelta_served_deltas_total)")
    assert served != query
    with prometheus(tmp_path):
        for question in (query, served):
            until("it is scraped", lambda q=question: value_of(q) == "1", SECONDS)  # type: ignore[misc]

    # It can be removed again.
    lines = [line for line in remove.splitlines() if not line.startswith("git ")]
    checkout.bash("\n".join(lines))
    assert checkout.bash("docker compose ps --services 2>/dev/null").split() == ["registry"]
    assert not list(checkout.folder.glob("*obdelta*")), "a file is left"


def value_of(query: str) -> str | None:
    """Returns the one value that the guide's command displays, None before there is one."""
    ran = subprocess.run(["bash", "-c", query], capture_output=True, text=True, check=False)
    try:
        (series,) = json.loads(ran.stdout)["data"]["result"]
    except (ValueError, KeyError):
        return None
    return str(series["value"][1])
