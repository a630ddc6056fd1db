"""A full disk: clean failures, nothing left behind, and service continues when there is space."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

_ON_A_SMALL_DISK = (
    'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -m tests.support.store_disk_full "$1"'
)


def test_a_full_disk_fails_cleanly_and_recovers(tmp_path: Path) -> None:
    # A separate namespace: the small disk disappears with the process, and needs no privileges.
    finished = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            _ON_A_SMALL_DISK,
            "sh",
            tmp_path,
            sys.executable,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stdout == "all went on\n"
    assert finished.returncode == 0
