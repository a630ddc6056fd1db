"""The ``obdelta`` command as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OBDELTA = [str(Path(sys.executable).with_name("obdelta"))]


def environment() -> dict[str, str]:
    """This process's, with which the command finds this checkout from every folder."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def run(
    *arguments: object, stdin: bytes = b"", status: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs it, and asserts its exit status."""
    command = [*OBDELTA, *(str(argument) for argument in arguments)]
    ran = subprocess.run(command, input=stdin, capture_output=True, check=False, cwd=cwd, env=environment())
    assert ran.returncode == status, ran.stderr.decode()
    return ran


def error_of(ran: subprocess.CompletedProcess[bytes]) -> str:
    """What a failed command said: one line on stderr, nothing on stdout."""
    assert ran.stdout == b""
    lines = ran.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("obdelta: ")
    return lines[0]
