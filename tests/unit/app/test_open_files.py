"""The limit of open files is checked at the start of the server, not when a build fails by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.server import command, running_server


def limited(most: int, *options: str) -> list[str]:
    """Runs the server under a hard limit of open files."""
    return ["prlimit", f"--nofile={most}:{most}", *command(*options)]


def test_too_low_a_limit_stops_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(
            AssertionError,
            match=r"cannot start: the limit of open files is 48: at least 256 are needed, and 384",
        ),
        running_server(
            tmp_path / "state",
            upstream=f"oci:{tmp_path}",
            run=lambda *given: limited(48, *given),
            max_builds="2",
        ),
    ):
        pass


def test_a_low_limit_is_a_warning(tmp_path: Path) -> None:
    with running_server(
        tmp_path / "state",
        upstream=f"oci:{tmp_path}",
        run=lambda *given: limited(300, *given),
        max_builds="8",
    ) as server:
        assert "the limit of open files is 300: 8 builds may need 768" in server.log
