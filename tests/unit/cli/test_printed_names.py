"""Names from labels of images are printed and found by commands, and displayed on pages."""

from __future__ import annotations

import html
import json
import re
import urllib.request
from pathlib import Path

from bench.images import make_image, push
from tests.support.commands import HOST, check_command, run
from tests.support.images import make_layers
from tests.support.registry import RunningRegistry, plain_registry
from tests.support.server import running_server
from tests.unit.cli.test_status import server

__all__ = ["plain_registry", "server"]


def test_names_from_labels_are_printed_beside_digests(
    plain_registry: RunningRegistry, tmp_path: Path
) -> None:
    layers = make_layers(tmp_path / "blobs", size=64 << 10, seed=7)
    for number, (made, repository) in enumerate(
        zip(layers, ("named/a", "named/b"), strict=True), 1
    ):
        labels = {
            "io.balena.fleet-name": "acme",
            "io.balena.service-name": "web",
            "org.opencontainers.image.version": f"1.{number}",
        }
        image = make_image(made, tmp_path / repository, labels=labels)
        push(image, plain_registry.url, repository, "latest")
    with running_server(
        tmp_path / "state", upstream=plain_registry.url, registry_hosts=HOST
    ) as server:
        run(*check_command(server, "named/a", "named/b"), "--require-delta")
        place = ["--operator", server.operator_url]
        answer = json.loads(run("status", *place, "--json").stdout)
        row, *_ = answer["deltas"]  # in two forms
        assert row["base"]["names"] == {
            "fleet": "acme",
            "service": "web",
            "release": "1.1",
            "commit": "",
            "text": "acme/web 1.1",
        }
        assert row["target"]["names"]["text"] == "acme/web 1.2"
        text = run("status", *place).stdout.decode()
        with urllib.request.urlopen(server.operator_url, timeout=60) as page:
            first = page.read().decode()
        assert '<bdi class="name">acme/web 1.2</bdi>' in first
        link = html.unescape(re.findall(r'href="(/pairs/[^"]+)"', first)[0])
        with urllib.request.urlopen(f"{server.operator_url}{link}", timeout=60) as page:
            details = page.read().decode()
        for shown in ("acme/web 1.1", "acme/web 1.2", 'class="treemap"', "Last releases"):
            assert shown in details
        for path in ("/deltas", "/fleets"):
            with urllib.request.urlopen(f"{server.operator_url}{path}", timeout=60) as page:
                listed = page.read().decode()
            for release in ("1.1", "1.2"):
                assert f'<bdi class="name">acme/web {release}</bdi>' in listed
            assert path != "/deltas" or ">acme/web</option>" in listed
        kept = json.loads(run("list", *place, "--json").stdout)["deltas"]
        for entry in kept:
            assert entry["names"]["src"] == row["base"]["names"]
            assert entry["names"]["dest"] == row["target"]["names"]
        assert len(kept) == 2  # in both forms
        assert "served   1 delta, " in text
        for number, image in ((1, row["base"]), (2, row["target"])):
            short = image["digest"].removeprefix("sha256:")[:12]
            assert f"{image['repository']}@{short} acme/web 1.{number}" in text
        names = [f"{HOST}/named/a", f"{HOST}/named/b"]
        explained = run("explain", *names, *place).stdout.decode()
        assert "\n" + " " * 13 + "acme/web 1.1\n" in explained
        assert re.search(
            r"form=gzip outcome=ready full=\d+ delta=\d+ seconds=[0-9.]+ base='acme/web 1\.1'"
            r" target='acme/web 1\.2' request=",
            server.log,
        )
        for fleet in ("acme", "Acme/web", f"{HOST}/named/b"):
            found = json.loads(run("list", *place, "--fleet", fleet, "--json").stdout)
            assert found["deltas"] == kept, fleet
        assert json.loads(run("list", *place, "--fleet", "Other", "--json").stdout)["deltas"] == []
        for search in ("acme", "ACME/WEB 1.2", "web 1.1", "named/a"):
            found = json.loads(run("list", *place, "--search", search, "--json").stdout)
            assert found["deltas"] == kept, search
