"""``state-dir``, opened as a server opens it, and what a directory holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from obdelta import settings
from obdelta.app.components import open_state
from obdelta.concurrency.tasks import Threads
from tests.support.store import runtime


def configured(state: Path) -> settings.Settings:
    given = {
        "upstream": "https://registry.example.com",
        "public-url": "https://delta.example.com",
        "auth": "none",
    }
    return settings.read({**given, "state-dir": str(state)}, {})


async def opened_and_closed(state: Path, threads: Threads) -> None:
    process = runtime(configured(state), threads)
    try:
        await open_state(process)
    finally:
        await process.services.stopService()


def contents(directory: Path) -> dict[str, tuple[int, str]]:
    """Returns every path below a directory: its mode and its content."""
    found = {}
    for path in sorted(directory.rglob("*")):
        held = str(path.readlink()) if path.is_symlink() else ""
        if not held and path.is_file():
            held = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(directory))] = (path.lstat().st_mode, held)
    return found
