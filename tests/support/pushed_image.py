"""An image in a real registry: fixtures for a module that also imports ``plain_registry``."""

from __future__ import annotations

import pytest

from bench.images import Image, push
from obdelta.registry import Credentials, OwnCredentials
from tests.support.images import make_pair
from tests.support.registry import (
    BUILDER_TOKEN,
    RunningRegistry,
)

ANONYMOUS = Credentials.anonymous()
BUILDER = OwnCredentials.builder(BUILDER_TOKEN).own


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return make_pair(tmp_path_factory.mktemp("pair")).target


@pytest.fixture(scope="module")
def pushed(image: Image, plain_registry: RunningRegistry) -> Image:
    push(image, plain_registry.url, "client/app", "latest")
    return image
