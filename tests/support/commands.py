"""The ``obdelta`` command as a process of its own."""

from __future__ import annotations

import os
import pty
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
    ran = subprocess.run(
        command, input=stdin, capture_output=True, check=False, cwd=cwd, env=environment()
    )
    assert ran.returncode == status, ran.stderr.decode()
    return ran


def on_terminal(*arguments: object) -> bytes:
    """What it shows on stderr when that is a terminal; it must end well."""
    ours, theirs = pty.openpty()
    command = [*OBDELTA, *(str(argument) for argument in arguments)]
    shown = b""
    with subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment()
    ) as process:
        os.close(theirs)
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # how a terminal ends whose other side is closed
            pass
        finally:
            os.close(ours)
    assert process.returncode == 0, shown
    return shown


def error_of(ran: subprocess.CompletedProcess[bytes]) -> str:
    """What a failed command said: one line on stderr, nothing on stdout."""
    assert ran.stdout == b""
    lines = ran.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("obdelta: ")
    return lines[0]
