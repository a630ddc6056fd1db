"""Whether rsync can be run at all: v2 deltas need it, and a build should not begin without."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from twisted.internet.defer import ensureDeferred

from obdelta.concurrency.threads import Threads
from obdelta.oci import shown

GOOD_SECONDS, BAD_SECONDS = 60.0, 5.0
"""How long an answer holds."""
_PATIENCE = 10.0
"""Seconds for what takes some milliseconds."""
_REST = (
    "v2 is answered with full pulls: install rsync 3.2 or newer, and see that this user may run it"
)


def why_unusable(rsync: str = "rsync") -> str | None:
    """Runs ``rsync --version`` and returns what is wrong with it, None where nothing is. Blocking."""
    try:
        ran = subprocess.run(
            [rsync, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        return f"rsync is missing: {_REST}"
    except subprocess.TimeoutExpired:
        return f"rsync did not answer within {_PATIENCE:g} seconds: {_REST}"
    except OSError as error:
        return f"rsync cannot be started: {shown((error.strerror or '').encode())}: {_REST}"
    if ran.returncode < 0:
        return f"rsync was killed by signal {-ran.returncode}: {_REST}"
    if ran.returncode:
        return f"rsync ended with status {ran.returncode}: {_REST}"
    return None


class RsyncProbe:
    """Asks again when an answer is old. ``seconds`` gives monotonic time."""

    def __init__(self, threads: Threads, seconds: Callable[[], float]) -> None:
        self._threads, self._seconds = threads, seconds
        self._found: str | None = None
        self._until = float("-inf")

    async def problem(self) -> str | None:
        """Returns what is wrong with rsync, in one line; None where nothing is."""
        if self._seconds() >= self._until:
            self._found = await self._threads.run(why_unusable)
            self._until = self._seconds() + (GOOD_SECONDS if self._found is None else BAD_SECONDS)
        return self._found

    def note(self) -> str:
        """Returns what was last found wrong, for operators; empty where nothing was."""
        if self._seconds() >= self._until:
            ensureDeferred(self.problem()).addErrback(lambda _: None)  # it is called off at the end
        return self._found or ""
