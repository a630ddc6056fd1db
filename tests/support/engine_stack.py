"""openBalena around a server whose builder is an engine, and the names of its images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.images import Image
from obdelta.oci import Reference
from obdelta.registry import Credentials
from tests.support.images import Pair, make_pair
from tests.support.registry import BUILDER_TOKEN
from tests.support.stack import Stack, running_stack

BUILDER = Credentials.basic("builder", BUILDER_TOKEN, exchange=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), seed=77)


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), pair) as running:
        yield running


def reference(host: str, repository: str, image: Image) -> Reference:
    """Returns an image's name by digest."""
    return Reference(host, repository, digest=image.digest)
