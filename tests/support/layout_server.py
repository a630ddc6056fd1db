"""A real server over a pair of images in OCI layouts, and a device that updates by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device, Update
from obdelta.oci import Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server
from tests.support.tokens import AUDIENCE, Issuer

BASE, TARGET = BASE_REPOSITORY, TARGET_REPOSITORY


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


@pytest.fixture
def server(pair: Pair, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "state", upstream=f"oci:{pair.root}") as running:
        yield running


@contextmanager
def server_with_tokens(
    directory: Path, pair: Pair, issuer: Issuer, **options: Any
) -> Iterator[RunningServer]:
    """A server of the pair for devices with the issuer's tokens."""
    with running_server(
        directory / "state",
        upstream=f"oci:{pair.root}",
        upstream_credentials="none",
        auth="token",
        auth_key=str(issuer.write(directory)),
        auth_issuer=issuer.issuer,
        auth_audience=AUDIENCE,
        auth_realm="https://api.example.com/auth/v1/token",
        **options,
    ) as running:
        yield running


def names(server: RunningServer, base: str = BASE, target: str = TARGET) -> tuple[str, str]:
    return f"{server.host}/{base}", f"{server.host}/{target}"


def update(server: RunningServer, work: Path, base: str = BASE, target: str = TARGET) -> Update:
    """Updates like a device; raises unless every diff_id and the image ID are right."""
    work.mkdir()
    http = Http(timeout=30)
    device = Device(http, Engine(http, registry=server.url), server.url)
    base_name, target_name = names(server, base, target)
    return device.update(
        device.load_base(Reference.parse(base_name), work), base_name, target_name, work
    )
