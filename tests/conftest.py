"""Shared by all tests: settings of hypothesis, an environment without this machine's settings, and
expensive fixtures.

A fixture that a module imports is made once *a module*, whatever its scope says. A fixture in this
file is made once.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

from obdelta.delta import planner
from obdelta.settings import table
from tests.support.dockerd import dockerd
from tests.support.image import built_image
from tests.support.newcomer import newcomer

__all__ = ["built_image", "dockerd", "newcomer"]

# The machine is shared and sometimes slow, so the time of one example means nothing.
hypothesis.settings.register_profile("obdelta", deadline=None, print_blob=True)
hypothesis.settings.load_profile("obdelta")

planner.STRICT = True

TESTS = Path(__file__).parent

_OPENBALENA = {"BALENA_TLD", "REGISTRY_HOST", "REGISTRY2_HOST", "DELTA_HOST"}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes of a test inherit only those settings that the test gives them."""
    known = _OPENBALENA.union(*(row.environment for row in table()))
    for name in list(os.environ):
        if name.startswith("OBDELTA_") or name in known:
            monkeypatch.delenv(name)


class ModuleScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no annotations
    """With several processes, the tests of a module run in one of them, as its fixtures do.

    The tests of ``tests/deploy`` change files of the machine, so all of them run in one.
    """

    def _split_scope(self, nodeid: str) -> str:
        module, _, _ = nodeid.partition("::")
        return "tests/deploy" if module.startswith("tests/deploy/") else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ModuleScheduling:
    return ModuleScheduling(config, log)
