"""All files in ``deploy/``: variables that they name are settings, and JSON is valid."""

from __future__ import annotations

import json
import re

from obdelta import settings
from tests.support.deploy_files import DEPLOY


def test_every_variable_is_a_setting() -> None:
    known = {variable for row in settings.table() for variable in row.environment} | {
        "OBDELTA_CONFIG"
    }
    own = {"OBDELTA_IMAGE", "OBDELTA_ADDRESS"}  # of the compose overlay and of haproxy's
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        named = set(re.findall(r"OBDELTA_[A-Z0-9_]+", path.read_text()))
        assert named <= known | own, path


def test_json_files_are_valid() -> None:
    for path in DEPLOY.rglob("*.json"):
        json.loads(path.read_text())
