"""A server that has finished a delta, for commands that read it: ``pair`` and ``server``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.commands import HOST, run
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until_both_forms
from tests.support.server import RunningServer, running_server

BASE, TARGET = f"{HOST}/{BASE_REPOSITORY}", f"{HOST}/{TARGET_REPOSITORY}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Yields a server that has finished both forms of the delta of the pair."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder / "state", upstream=f"oci:{pair.root}", registry_hosts=HOST) as up:
        run("check", BASE, TARGET, "--server", up.url, "--registry", up.url)
        until_both_forms(up)
        yield up
