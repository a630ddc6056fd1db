"""The ``obdelta`` command as a process of its own."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from tests.support.server import RunningServer

ROOT = Path(__file__).parent.parent.parent
HOST = "registry.example.com"
"""The registry's name in the names of images."""
OBDELTA = [str(Path(sys.executable).with_name("obdelta"))]


def environment() -> dict[str, str]:
    """Returns the environment in which commands find this checkout from every directory."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def run(
    *arguments: object, stdin: bytes = b"", status: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs the command, and asserts its exit status."""
    command = [*OBDELTA, *(str(argument) for argument in arguments)]
    ran = subprocess.run(
        command, input=stdin, capture_output=True, check=False, cwd=cwd, env=environment()
    )
    assert ran.returncode == status, ran.stderr.decode()
    return ran


CLEARED = b"\x1b[2K"
"""The last bytes on a terminal after a progress line was cleared."""
_STYLE = re.compile(rb"\x1b\[[0-9;]*m")


def on_terminal(*arguments: object) -> bytes:
    """Returns the command's stderr on a terminal, without colours; asserts that it succeeds."""
    ours, inner = pty.openpty()
    command = [*OBDELTA, *(str(argument) for argument in arguments)]
    shown = b""
    with subprocess.Popen(
        command, stderr=inner, stdout=subprocess.DEVNULL, env=environment()
    ) as process:
        os.close(inner)
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # reading a terminal whose other side is closed ends like this
            pass
        finally:
            os.close(ours)
    assert process.returncode == 0, shown
    return _STYLE.sub(b"", shown)


def error_of(ran: subprocess.CompletedProcess[bytes]) -> str:
    """Returns the message of a failed command: one line on stderr, nothing on stdout."""
    assert ran.stdout == b""
    lines = ran.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("obdelta: ")
    return lines[0]


def check_command(server: RunningServer, base: str, target: str) -> list[str]:
    """Returns the arguments of ``obdelta check`` for two repositories of ``HOST``."""
    names = (f"{HOST}/{repository}" for repository in (base, target))
    return ["check", *names, "--server", server.url, "--registry", server.url]
