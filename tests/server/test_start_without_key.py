"""Without a usable key the server does not start, and open access is a warning."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.server import command, running_server


def start(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = (
        "--upstream=http://127.0.0.1:9",
        "--public-url=http://127.0.0.1:9",
        f"--state-dir={folder / 'state'}",
        "--listen=tcp:0:interface=127.0.0.1",
        "--operator-listen=tcp:0:interface=127.0.0.1",
        *options,
    )
    return subprocess.run(command(*given), capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--auth=token", "--upstream-credentials=none"),
        (
            "--auth-issuer=a",
            "--auth-audience=b",
            "--auth-realm=https://c/",
            "--auth-key=/nonexistent/api.pem",
        ),
    ],
)
def test_without_a_readable_key_the_server_does_not_start(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    ran = start(tmp_path, *options)
    lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line]
    assert ran.returncode == 2
    assert all(line.startswith("obdelta: setting auth-") for line in lines)
    assert "setting auth-key" in lines[0] and not (tmp_path / "state").exists()


def test_open_access_is_a_loud_warning(tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream="http://127.0.0.1:9", auth="none") as server:
        assert "AUTH IS OFF (auth = none)" in server.log
