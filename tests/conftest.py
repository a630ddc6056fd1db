"""What all tests share: how hypothesis runs, an environment that settings of this machine do not
reach into, and what is dear.

A fixture that modules import is made once *a module*, whatever its scope says; one that stands here
is made once.
"""

from __future__ import annotations

import os

import hypothesis
import pytest

from obdelta.delta import planner
from obdelta.settings import table
from tests.support.dockerd import dockerd
from tests.support.image import built_image

__all__ = ["built_image", "dockerd"]

# The machine is shared and slow at times: how long one example takes says nothing.
hypothesis.settings.register_profile("obdelta", deadline=None, print_blob=True)
hypothesis.settings.load_profile("obdelta")

planner.STRICT = True

_OPENBALENA = {"BALENA_TLD", "REGISTRY_HOST", "REGISTRY2_HOST", "DELTA_HOST"}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of a test inherit no settings but those that the test gives them."""
    known = _OPENBALENA.union(*(row.environment for row in table()))
    for name in list(os.environ):
        if name.startswith("OBDELTA_") or name in known:
            monkeypatch.delenv(name)
